"""
LM2, a Large Memory Model: a Llama-style decoder with a bank of memory slots that its tokens read by
cross-attention and that LSTM-style gates update. Everything about the model is in this one file.

References:
1) LM2: Kang et al. 2025, https://arxiv.org/abs/2502.06049. Equations (1)-(6) below are numbered as there.
2) Llama: Touvron et al. 2023, https://arxiv.org/abs/2302.13971. The decoder; its defaults are Llama 3's.
3) RMT: Bulatov et al. 2022, https://arxiv.org/abs/2207.06881. The baseline, memory_type="rmt".
4) The relational memory core: Santoro et al. 2018, https://arxiv.org/abs/1806.01822. Where LM2's gates come from.

Shapes, one letter one meaning, in every file:
    B batch      T tokens of one segment (block_size)      S segments      V vocabulary
    C width      H heads      K key-value heads      D = C/H width of a head
    N memory slots      J chunks of a segment, each a candidate for a slot      L layers that own a bank

A *segment* is what self-attention sees at once. A longer text is a sequence of segments, and the memory is the
only thing that passes from one to the next. It is an explicit input and output of every call; nothing is hidden
on the module:
    logits, loss, memory = model(idx, targets, memory)

HOW DO T TOKENS UPDATE N SLOTS? The paper's equations (4)-(6) multiply T x C gates with an N x C bank and do not
say. This file's answer, and the one place where it had to decide:
  * Time. All tokens of a segment read the bank as it stood before that segment; the bank is written once, when
    the segment is full. So no token can see a later one, whatever T and N are.
  * Rows. The segment is cut into J chunks of consecutive tokens, as many as slots but of four tokens at least. Each is
    gathered, weighted by a learned salience, into one candidate row, and claims a slot or declines. Those that claim most
    take the slots that were written longest ago. Then (4)-(6) apply row by row, the gates seeing candidate and old slot. As
    far as a chunk declines, its slot stays as it is, however many segments pass.
  * Why chunks. If tokens choose their slot by content, all places look alike and land in one slot, where two facts
    are averaged before anything has learned to tell them apart. By position, two sentences start in two slots.
  * Why four tokens. A slot shall hold something that can be told apart, "to the garden." and not "the". More slots than
    chunks hold more of the past, not smaller pieces.
  * Why the oldest slot. If chunk i always went to slot i, a fact would die when a later one fell into the same chunk.
    In training a text has but a part of the bank, about a quarter to all of it: needless claims bury facts sooner, and are
    sooner unlearned; and what is missing may have been lost, so no fact can be told by its absence.
  * Why claims are drawn back. A claim of almost one has almost no gradient: what is written once would be written for good,
    whatever it buries. In training, logits above 6 (a claim of 0.998) are drawn back to it.
  * Age. Somebody moves twice, and two slots match the question: the later one is right. So each slot carries its age,
    and a read prefers the younger of equals. Age is counted in chunks written since, not in tokens read: idle talk lets
    no slot grow old.
  * Place. A slot of age a is read as if it lay a chunks before the segment: the bank is a text of what was worth
    writing. Nearness means there what it means in the window, and the halves of a sentence cut by a border are neighbours.
  * What is written. (6) as printed would write what the tokens READ (E_mem); nothing new could ever enter the
    bank. We write what the tokens ARE (h, the states that enter the memory, E_t in the paper).
  * Read projections. Tokens ask the bank what they ask the window: W_Q is the self-attention's. W_K and W_V are the
    read's own, as the block's plus differences that start at zero: a lookup learned inside the window works on the
    bank at once. A W_Q of its own gained nothing and costs a product per token, where keys and values cost one per slot.
The alternatives stand in tests/variants.py, what was measured in tests/RESULTS.md.
"""
import json
import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint


@dataclass
class LM2Config:
    block_size: int = 1024  # T, tokens of one segment
    vocab_size: int = 50304  # V
    n_layer: int = 6  # decoder blocks
    n_head: int = 6  # H, query heads
    n_kv_head: int = 0  # K, key-value heads, each shared by H/K query heads; 0: as many as n_head
    n_embd: int = 384  # C
    intermediate_size: int = 0  # width of the feed-forward; 0: 8/3 C, rounded up to a multiple of 16
    rope_theta: float = 500000.0  # base of the rotary frequencies
    norm_eps: float = 1e-5  # added to the mean square in RMSNorm
    tie_embeddings: bool = True  # the output head is the embedding matrix
    qk_norm: bool = False  # normalise queries and keys per head (not in Llama; small models learn sooner)
    token_shift: bool = False  # h_t + g * h_{t-1} before attention (not in Llama; small models learn sooner)
    memory_type: str = "lm2"  # "lm2", "rmt" or "none"
    memory_slots: int = 16  # N (for RMT: memory tokens); 0 is memory_type="none"
    n_memory_layers: int = 0  # L, the first blocks that own a bank; 0: all
    memory_top_k: int = 0  # a token reads only its k best slots, per head; 0: all
    forget_bias: float = 0.0  # b_forget at the start: sigmoid(0) = 0.5 of a slot survives what is written over it
    memory_gain: bool = False  # what is read passes a gain that starts at zero: for a memory grafted onto a trained decoder
    rope_scaling: tuple = ()  # Llama 3.1's: factor, low_freq_factor, high_freq_factor, original_max_position_embeddings

    def __post_init__(self):
        """Fills in what is derived; raises ValueError with one sentence for a value that cannot work."""
        if self.memory_type not in ("lm2", "rmt", "none"):
            raise ValueError(f"memory_type must be lm2, rmt or none, not {self.memory_type!r}")
        for low, names in (1, "block_size vocab_size n_layer n_head n_embd"), \
                          (0, "n_kv_head intermediate_size memory_slots n_memory_layers memory_top_k"):
            for name in names.split():
                if getattr(self, name) < low:
                    raise ValueError(f"{name} must be at least {low}, not {getattr(self, name)}")
        for name in ("rope_theta", "norm_eps"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be positive and finite, not {getattr(self, name)}")
        if not math.isfinite(self.forget_bias):
            raise ValueError(f"forget_bias must be finite, not {self.forget_bias}")
        if self.n_embd % (2 * self.n_head):
            raise ValueError(f"n_embd must be an even multiple of n_head, but {self.n_embd} is not one of {self.n_head}")
        self.n_kv_head = self.n_kv_head or self.n_head
        if self.n_head % self.n_kv_head:
            raise ValueError(f"n_head must be a multiple of n_kv_head, but {self.n_head} is not one of {self.n_kv_head}")
        self.intermediate_size = self.intermediate_size or -(-8 * self.n_embd // 48) * 16
        if self.n_memory_layers > self.n_layer:
            raise ValueError(f"n_memory_layers must be at most n_layer = {self.n_layer}, not {self.n_memory_layers}")
        if self.memory_type == "none" or self.memory_slots == 0:
            self.memory_type, self.memory_slots = "none", 0
        if self.memory_top_k > self.memory_slots > 0:
            raise ValueError(f"memory_top_k must be at most memory_slots = {self.memory_slots}, not {self.memory_top_k}")


def rms_norm(x, eps=1e-5):
    """x / rms(x) over the last dimension, without a gain; any shape and dtype."""
    return F.rms_norm(x, (x.size(-1),), eps=eps)


def rope_table(config, positions):
    """cos and sin (P, D) of rotary position embedding at positions (P,), float or int."""
    D = config.n_embd // config.n_head
    freq = config.rope_theta ** (-torch.arange(0, D, 2).float() / D)  # (D/2,)
    if config.rope_scaling:  # long waves are stretched by the factor, short ones kept, those in between mixed
        factor, low, high, positions_before = config.rope_scaling
        kept = ((positions_before * freq / (2 * math.pi) - low) / (high - low)).clamp(0, 1)
        freq = freq * (kept + (1 - kept) / factor)
    angle = torch.outer(positions.float(), freq).repeat(1, 2)  # (P, D)
    return angle.cos(), angle.sin()


def rotate(x, rope):
    """Rotary position embedding (Llama's half-split form). x (B, H, T, D), rope = (cos, sin), each (T, D) or (B, 1, T, D)."""
    cos, sin = rope
    x1, x2 = x.chunk(2, dim=-1)
    return (x * cos + torch.cat((-x2, x1), dim=-1) * sin).type_as(x)


class Attention(nn.Module):
    """Causal self-attention with grouped key-value heads. The memory's read takes its queries from here."""

    def __init__(self, config):
        super().__init__()
        C, D = config.n_embd, config.n_embd // config.n_head
        self.head_dim, self.qk_norm = D, config.qk_norm
        # normalised queries and keys give logits within +-sqrt(D): twice that lets a small head point at one key
        self.scale = (2.0 if config.qk_norm else 1.0) / math.sqrt(D)
        self.grouped = config.n_kv_head != config.n_head
        self.wq = nn.Linear(C, C, bias=False)  # W_Q
        self.wk = nn.Linear(C, config.n_kv_head * D, bias=False)  # W_K
        self.wv = nn.Linear(C, config.n_kv_head * D, bias=False)  # W_V
        self.wo = nn.Linear(C, C, bias=False)  # applied by the block, to what was attended to and read together

    def heads(self, x, norm=False):
        """(B, T, H*D) -> (B, H, T, D), each head normalised where asked and where the config says so."""
        x = x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        return rms_norm(x) if norm and self.qk_norm else x

    def queries(self, h, rope):
        """h (B, T, C) -> (B, H, T, D), which ask the window and the bank alike."""
        return rotate(self.heads(self.wq(h), norm=True), rope)

    def forward(self, h, rope, cache=None):
        """
        h (B, T, C), rope of its T positions; cache: a dict that keeps keys and values of the segment so far, or
        None. With keys in the cache, T must be 1. Returns y (B, T, C) and the queries (B, H, T, D).
        """
        q = self.queries(h, rope)
        k = rotate(self.heads(self.wk(h), norm=True), rope)  # (B, K, T, D)
        v = self.heads(self.wv(h))  # (B, K, T, D)
        if cache is not None:
            k, v = (torch.cat((cache[n], new), dim=2) if n in cache else new for n, new in (("k", k), ("v", v)))
            cache["k"], cache["v"] = k, v
        y = F.scaled_dot_product_attention(
            q, k, v, is_causal=h.size(1) > 1, scale=self.scale, enable_gqa=self.grouped
        )  # (B, H, T, D)
        return y.transpose(1, 2).flatten(2), q


class MLP(nn.Module):
    """SwiGLU feed-forward."""

    def __init__(self, config):
        super().__init__()
        self.w1 = nn.Linear(config.n_embd, config.intermediate_size, bias=False)
        self.w3 = nn.Linear(config.n_embd, config.intermediate_size, bias=False)
        self.w2 = nn.Linear(config.intermediate_size, config.n_embd, bias=False)

    def forward(self, x):
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class DrawBack(torch.autograd.Function):
    """The identity for x of any shape. Backward, what x is above `limit`, times `pull`, is added to its gradient."""

    @staticmethod
    def forward(ctx, x, limit, pull):
        ctx.save_for_backward(x)
        ctx.set_materialize_grads(False)  # no gradient, behind the last segment say, stays none
        ctx.limit, ctx.pull = limit, pull
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return None if grad is None else grad + ctx.pull * (x - ctx.limit).clamp(min=0), None, None


class Memory(nn.Module):
    """How a block's tokens read its bank, and how a segment writes it. M (B, N, C + 1): N slots and, last, their age."""

    def __init__(self, config):
        super().__init__()
        C, N, T = config.n_embd, config.memory_slots, config.block_size
        self.top_k = config.memory_top_k
        kv = C // config.n_head * config.n_kv_head
        self.d_k = nn.Linear(C, kv, bias=False)  # what W_K and W_V of the read differ by
        self.d_v = nn.Linear(C, kv, bias=False)  # from the self-attention's; they start at zero
        self.recency = 3.0  # how much a read prefers what was written later
        J = min(N, max(1, T // 4))
        # a slot lies before the segment, as far as if all that was written since were text, of T/J tokens a chunk; at most T
        cos, sin = rope_table(config, -((torch.arange(N + 1) + 0.5) * T / J).clamp(max=T))  # by age, 0 to N; (N + 1, D)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        self.w_out = nn.Linear(C, C)  # W_out, b_out
        self.gain = nn.Parameter(torch.empty(C)) if config.memory_gain else None  # a closed gate would stop the gradient
        self.salience = nn.Parameter(torch.empty(C))  # w_sal: how much of its chunk's slot a token claims
        self.sharpness = 8.0  # of the claims: a slot learns early to take nothing from a chunk that holds no fact
        self.limit, self.pull = 6.0, 1e-4  # of claims' logits; train.py sets pull to 0.1, shared by all the chunks of a step
        self.threshold = 0.25  # a chunk that claims more counts as written
        self.w_cand = nn.Linear(C, C, bias=False)  # W_c, starts as the identity
        self.w_in, self.u_in = nn.Linear(C, C), nn.Linear(C, C, bias=False)  # W_in, b_in and U_in
        self.w_forget, self.u_forget = nn.Linear(C, C), nn.Linear(C, C, bias=False)  # W_forget, b_forget and U_forget
        # chunk i holds tokens iT//J to (i+1)T//J: uneven where J does not divide T
        i, w = torch.arange(J)[:, None], -(-T // J)  # (J, 1); w: width of the longest chunk
        chunks = i * T // J + torch.arange(w)  # (J, w)
        self.register_buffer("outside", chunks >= (i + 1) * T // J, persistent=False)
        self.register_buffer("chunks", chunks.clamp(max=T - 1), persistent=False)

    def read(self, q, M, attn):
        """Queries q (B, H, T, D) of the tokens, M (B, N, C + 1), the block's self-attention. Returns E_gated (B, T, C)."""
        k, v, bias = self.lookup(q, M, attn)
        # (1)  A = softmax(Q K^T / sqrt(d)), optionally over the top k slots;  E_mem = A V
        E_mem = F.scaled_dot_product_attention(q, k, v, bias, scale=attn.scale, enable_gqa=attn.grouped)  # (B, H, T, D)
        E_mem = E_mem.transpose(1, 2).flatten(2)  # (B, T, C)
        # (2)  g_out = sigmoid(E_mem W_out)
        g_out = torch.sigmoid(self.w_out(E_mem))  # (B, T, C)
        # (2)  E_gated = g_out * E_mem                      printed with M_t for E_mem, whose shape does not fit
        return g_out * E_mem if self.gain is None else self.gain * g_out * E_mem

    def lookup(self, q, M, attn):
        """What the queries meet in the bank: keys and values (B, K, N, D), and what is added to their products."""
        M, age = M[..., :-1], M[..., -1].detach()  # (B, N, C), (B, N): a bias with a gradient has no fused attention
        # (1)  Q = E_t W_Q, K = M_t W_K, V = M_t W_V        keys rotated by age: see "Place" above
        k, v = self.project(rms_norm(M, 1e-20).to(q.dtype), attn)  # (B, K, N, D); tiny eps: a faded slot still counts
        place = age.long().clamp(0, age.size(1))  # (B, N)
        k = rotate(k, (self.cos[place][:, None], self.sin[place][:, None]))
        # of two slots that match alike, about one person say, the one written later shall win
        bias = -self.recency * torch.log1p(age)[:, None, None].to(q.dtype)  # (B, 1, 1, N)
        if self.top_k:
            scores = self.scores(q, k, attn) + bias  # (B, H, T, N)
            bias = torch.where(scores < scores.topk(self.top_k, dim=-1).values[..., -1:], -math.inf, bias)  # (B, H, T, N)
        return k, v, bias

    def scores(self, q, k, attn):
        """Q K^T / sqrt(d), (B, H, T, N)."""
        return q @ k.repeat_interleave(q.size(1) // k.size(1), dim=1).mT * attn.scale

    def attention(self, q, M, attn):
        """A (B, H, T, N) of (1), to be looked at: `read` leaves it inside the fused attention. Arguments as read's."""
        k, _, bias = self.lookup(q, M, attn)
        return (self.scores(q, k, attn) + bias).softmax(dim=-1)

    def project(self, m, attn):
        """Keys and values (B, K, N, D) of normalised slots m (B, N, C)."""
        k = F.linear(m, attn.wk.weight + self.d_k.weight)
        return attn.heads(k, norm=True), attn.heads(F.linear(m, attn.wv.weight + self.d_v.weight))

    def gather(self, h, m):
        """T rows become J: of tokens h (B, T, C) for slots m (B, N, C). Returns c (B, J, C) and claimed (B, J), 0 to 1, by chunk."""
        # c_i = sum over the tokens t of chunk i of softmax(8 h_t w_sal) h_t; one more logit, 0, stands for "nothing"
        h = h.index_select(1, self.chunks.flatten()).unflatten(1, self.chunks.shape)  # (B, J, w, C)
        logits = self.sharpness * (h.float() * self.salience.float()).sum(dim=-1)  # (B, J, w)
        logits = logits.masked_fill(self.outside, -math.inf)
        if self.training:
            logits = DrawBack.apply(logits, self.limit, self.pull)
        claim = F.pad(logits, (0, 1)).softmax(dim=-1)  # (B, J, w + 1)
        return (claim[..., :-1, None].to(h.dtype) * h).sum(dim=2), 1 - claim[..., -1]

    def assign(self, claimed, age):
        """The slot that each chunk is offered, (B, J) int64: what is claimed most goes where nothing was written for longest."""
        chunks = (8 * claimed).round().argsort(dim=1, descending=True, stable=True)  # rounded: equals shall stay in order
        slots = age.argsort(dim=1, descending=True, stable=True)[:, : claimed.size(1)]
        return torch.empty_like(chunks).scatter_(1, chunks, slots)

    def gates(self, h, M, usable=None):
        """
        What write applies, by chunk: candidates c (B, J, C), claimed (B, J), g_in and g_forget (B, J, C), and the slot (B, J) int64
        that each goes into. Arguments as write's.
        """
        m, age = rms_norm(M[..., :-1], 1e-20).to(h.dtype), M[..., -1]  # (B, N, C), (B, N)
        c, claimed = self.gather(h, m)
        slot = self.assign(claimed, age if usable is None else age * usable)
        m = m.gather(1, slot[..., None].expand_as(c))  # (B, J, C)
        # (4)  g_in = sigmoid(E_t W_in)                     here from the candidate and the old slot, as in an LSTM
        g_in = torch.sigmoid((self.w_in(c) + self.u_in(m)).float())  # (B, J, C)
        # (5)  g_forget = sigmoid(E_mem W_forget)           the same, as far as claimed: what nobody claims stays as it is
        g_forget = torch.sigmoid((self.w_forget(c) + self.u_forget(m)).float())  # (B, J, C)
        g_forget = 1 - claimed[..., None] * (1 - g_forget)  # in float32: bfloat16 has nothing above 0.996
        return c, claimed, g_in, g_forget, slot

    def write(self, h, M, usable=None):
        """
        h (B, T, C) of a full segment, M (B, N, C + 1) float32 as the segment read it, in training usable (B, N) bool: the other
        slots count as just written when the oldest are taken. Returns M_t+1 (B, N, C + 1).
        """
        c, claimed, g_in, g_forget, slot = self.gates(h, M, usable)
        M, age, rows = M[..., :-1], M[..., -1], slot[..., None].expand_as(c)  # (B, N, C), (B, N), (B, J, C)
        # (6)  M_t+1 = g_in * tanh(E_mem) + g_forget * M_t  with the candidate c W_c for E_mem
        M = M.scatter(1, rows, g_in * torch.tanh(self.w_cand(c).float()) + g_forget * M.gather(1, rows))
        return torch.cat((M, self.grow(age, claimed, slot)[..., None]), dim=-1)

    def grow(self, age, claimed, slot):
        """The age (B, N) of each slot once a segment is written: how many chunks have been written since the slot was."""
        written = claimed > self.threshold  # (B, J)
        count = written.to(age.dtype).cumsum(dim=1)  # (B, J)
        total = count[:, -1:]  # (B, 1)
        age = age + total
        return age.scatter(1, slot, torch.where(written, total - count, age.gather(1, slot)))


class Block(nn.Module):
    def __init__(self, config, has_memory):
        super().__init__()
        self.norm1 = nn.RMSNorm(config.n_embd, eps=config.norm_eps)
        self.attn = Attention(config)
        self.memory = Memory(config) if has_memory else None
        self.norm2 = nn.RMSNorm(config.n_embd, eps=config.norm_eps)
        self.mlp = MLP(config)
        self.shift = nn.Parameter(torch.empty(config.n_embd)) if config.token_shift else None

    def forward(self, x, rope, M=None, cache=None):
        """x (B, T, C), M (B, N, C + 1) where the block has a memory. Returns x and h (B, T, C), what a write needs."""
        h = self.norm1(x)
        if self.shift is not None:
            before = torch.zeros_like(h[:, :1]) if cache is None or "h" not in cache else cache["h"]
            if cache is not None:
                cache["h"] = h[:, -1:]
            h = h + self.shift * torch.cat((before, h[:, :-1]), dim=1)
        y, q = self.attn(h, rope, cache)
        if self.memory is not None:
            # (3)  E_next = E_attn + E_gated                one output projection serves both
            y = y + self.memory.read(q, M, self.attn)
        x = x + self.attn.wo(y)
        return x + self.mlp(self.norm2(x)), h


class LM2(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = c = config
        L = (c.n_memory_layers or c.n_layer) if c.memory_type == "lm2" else 0
        self.embed = nn.Embedding(c.vocab_size, c.n_embd)
        self.blocks = nn.ModuleList(Block(c, has_memory=i < L) for i in range(c.n_layer))
        self.norm = nn.RMSNorm(c.n_embd, eps=c.norm_eps)
        self.head = nn.Linear(c.n_embd, c.vocab_size, bias=False)
        if c.tie_embeddings:
            self.head.weight = self.embed.weight
        # RMT: the memory tokens that a text starts with
        self.memory_tokens = nn.Parameter(torch.empty(c.memory_slots, c.n_embd)) if c.memory_type == "rmt" else None
        cos, sin = rope_table(c, torch.arange(c.block_size + (2 * c.memory_slots if c.memory_type == "rmt" else 0)))
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        """Sets every parameter. The decoder is drawn before its memory, so one seed gives all types one decoder."""
        if self.embed.weight.is_meta:
            return  # there is nothing to set: somebody counts the parameters
        g = torch.Generator().manual_seed(torch.initial_seed())

        def normal(weight, std):  # drawn on the CPU: the same numbers on every device
            weight.copy_(torch.randn(weight.shape, generator=g).mul_(std))

        normal(self.embed.weight, 0.02 if self.config.tie_embeddings else 1.0)
        if not self.config.tie_embeddings:
            self.head.weight.zero_()
        for block in self.blocks:
            for linear in (block.attn.wq, block.attn.wk, block.attn.wv, block.attn.wo, *block.mlp.children()):
                normal(linear.weight, linear.in_features**-0.5)
            if block.shift is not None:
                block.shift.fill_(0.5)
        for memory in (block.memory for block in self.blocks if block.memory is not None):
            for linear in (memory.w_out, memory.w_in, memory.u_in, memory.w_forget, memory.u_forget):
                normal(linear.weight, linear.in_features**-0.5)
            for weight in (memory.d_k.weight, memory.d_v.weight, memory.salience):
                weight.zero_()  # salience: all tokens alike
            if memory.gain is not None:
                memory.gain.zero_()
            memory.w_cand.weight.copy_(torch.eye(self.config.n_embd))
            memory.w_out.bias.zero_()
            memory.w_in.bias.zero_()
            memory.w_forget.bias.fill_(self.config.forget_bias)
        if self.memory_tokens is not None:
            normal(self.memory_tokens, 0.02 if self.config.tie_embeddings else 1.0)

    @classmethod
    def from_llama(cls, folder, **overrides):
        """
        The decoder of a Llama in Hugging Face's format (config.json and .safetensors files of bfloat16, float16 or float32), in
        float32. overrides: fields of LM2Config, such as block_size; with memory_slots the memory is grafted on, with a gain
        that starts at zero, so that the logits stay as they were; a smaller vocab_size keeps the first tokens. Raises
        ValueError for a folder that is not whole, or not a Llama.
        """
        theirs = llama_config(Path(folder, "config.json"))
        model = cls(LM2Config(**{**theirs, "memory_slots": 0, "memory_gain": True, **overrides}))
        if model.config.vocab_size > theirs["vocab_size"]:
            raise ValueError(f"{folder} knows {theirs['vocab_size']} tokens, and the text {model.config.vocab_size}: use its tokenizer")
        missing = {name: p.data for name, p in model.named_parameters() if "memory" not in name}
        files = sorted(Path(folder).glob("*.safetensors"))
        for path in files:
            for name, weight in read_safetensors(path):
                ours = ".".join(LLAMA_NAMES.get(part, part) for part in name.removeprefix("model.").split("."))
                if name.endswith("rotary_emb.inv_freq") or (ours == "head.weight" and model.config.tie_embeddings):
                    continue
                if ours not in missing:
                    raise ValueError(f"{path}: {name} is there twice, or no weight of this Llama")
                if ours in ("embed.weight", "head.weight"):
                    weight = weight[: model.config.vocab_size]  # Llama's last tokens are the special ones
                if weight.shape != missing[ours].shape:
                    raise ValueError(f"{path}: {name} has shape {list(weight.shape)}, the config says {list(missing[ours].shape)}")
                missing.pop(ours).copy_(weight)
        if missing:
            raise ValueError(f"{folder}: {len(files)} .safetensors files, and none holds {next(iter(missing))}")
        return model

    def num_params(self, memory=True):
        """How many parameters; memory=False: those of the decoder alone."""
        return sum(p.numel() for n, p in self.named_parameters() if memory or "memory" not in n)

    def initial_memory(self, batch_size):
        """
        The memory before any text, float32: LM2's banks (L, B, N, C + 1), the last column a slot's age, RMT's tokens
        (1, B, N, C), or, with no memory, an empty tensor. A plain tensor: detach it, move it, save it.
        """
        c = self.config
        if c.memory_type == "rmt":
            return self.memory_tokens.float().expand(1, batch_size, -1, -1)
        # M_0 = I: slots must start different. Row i is e_(i mod C): a zero row would explode when normalised
        rows = torch.arange(c.memory_slots, device=self.embed.weight.device) % c.n_embd
        L = sum(block.memory is not None for block in self.blocks)
        rows = F.pad(F.one_hot(rows, c.n_embd).float(), (0, 1), value=c.memory_slots)  # as old as if N chunks had been written since
        return rows.expand(L, batch_size, -1, -1)

    def segment(self, idx, memory, usable=None, cache=None, start=0):
        """
        The decoder on tokens idx (B, T) of one segment, `start` tokens into it. Returns final states (B, T, C) and
        the memory, written if the segment is full. usable: as in write; cache: a list with a dict per block, to go on token by token.
        """
        x = self.embed(idx)  # (B, T, C)
        full = idx.size(1) == self.config.block_size
        if self.config.memory_type == "rmt":
            x, start = self.rmt_wrap(x, memory[0].type_as(x), start, full)
        rope = self.cos[start : start + x.size(1)], self.sin[start : start + x.size(1)]
        written = []
        for i, block in enumerate(self.blocks):
            M = memory[i] if block.memory is not None else None  # (B, N, C + 1)
            x, h = block(x, rope, M, None if cache is None else cache[i])
            if full and block.memory is not None:
                written.append(block.memory.write(h, M, usable))
        x = self.norm(x)
        if self.config.memory_type == "rmt":
            return self.rmt_unwrap(x, memory, start, full)
        return x, torch.stack(written) if written else memory

    def usable(self, idx):
        """
        The slots (B, N) bool that training texts idx (B, S*T) have, as if drawn: each with a probability of the text's, itself
        as if drawn from a quarter to one. In truth from the tokens: the same in any batch, on any device.
        """
        place, slot = (torch.arange(1, n + 1, device=idx.device) for n in (idx.size(1), self.config.memory_slots + 1))
        key = (idx * place**2).sum(dim=1, keepdim=True) % 65537 * 40503 % 65537  # (B, 1)
        draws = key * slot**3 % 65537 / 65537  # (B, N + 1), 0 to 1
        return draws[:, :-1] < 0.25 + 0.75 * draws[:, -1:]

    def rmt_wrap(self, x, M, start, full):
        """RMT: [M | tokens | M], the leading copy to read, the trailing one, behind a full segment, to write."""
        lead = [] if start else [M]
        start = start + M.size(1) if start else 0
        return torch.cat(lead + [x] + ([M] if full else []), dim=1), start

    def rmt_unwrap(self, x, memory, start, full):
        """The states of the tokens, and of the trailing M, which become the memory tokens of the next segment."""
        N = memory.size(2)
        x = x if start else x[:, N:]
        return (x[:, :-N], x[None, :, -N:].float()) if full else (x, memory)

    def loss(self, logits, targets, weights):
        """Cross-entropy of logits (n, V) against targets (n,), nothing where they are -1, summed by weight. A scalar."""
        return (F.cross_entropy(logits.float(), targets, ignore_index=-1, reduction="none") * weights).sum()

    def forward(self, idx, targets=None, memory=None, weights=None):
        """
        One segment. idx (B, T) int64, T at most block_size; targets (B, T) int64, -1 where none; memory as from
        initial_memory, which it defaults to; weights (B, T) float, of each target in the loss.
        Returns logits (B, T, V), loss (scalar, or None without targets) and the memory after the segment: written
        from a full one, as it was from a shorter one. Raises ValueError for a segment longer than block_size.
        """
        if idx.size(1) > self.config.block_size:
            raise ValueError(f"a segment holds {self.config.block_size} tokens, not {idx.size(1)}: use unroll")
        return self.unroll(idx, targets, memory, weights)

    def unroll(self, idx, targets=None, memory=None, weights=None, bptt_segments=0, checkpoint_segments=False, logits_at=None):
        """
        Any number of segments, the memory carried through; arguments and returns as forward's, over all S*T
        tokens, the loss averaged once over all targets, by weight. Gradients cross every border, unless bptt_segments > 0
        cuts them after every so many. checkpoint_segments: what a segment computed is not kept for the backward pass,
        but computed again. logits_at (B, S*T) bool: return logits (n, V) of these tokens alone; for the loss they are then
        computed where there is a target, in small pieces.
        """
        memory, states = self.initial_memory(idx.size(0)) if memory is None else memory, []
        usable = self.usable(idx) if self.training and self.config.memory_type == "lm2" else None
        run = partial(checkpoint, use_reentrant=False) if checkpoint_segments else lambda function, *args: function(*args)
        for s, part in enumerate(idx.split(self.config.block_size, dim=1)):
            if s and bptt_segments and s % bptt_segments == 0:
                memory = memory.detach()
            x, memory = run(self.segment, part, memory, usable)
            states.append(x)
        x = torch.cat(states, dim=1)  # (B, S*T, C)
        logits = self.head(x if logits_at is None else x[logits_at])  # (B, S*T, V) or (n, V)
        if targets is None:
            return logits, None, memory
        there = targets != -1
        weights = there.float() if weights is None else weights * there  # (B, S*T)
        if logits_at is None:
            loss = self.loss(logits.flatten(0, 1), targets.flatten(), weights.flatten())
        else:  # large arrays, of all the logits, are slow on a CPU: every step they come fresh from the operating system
            pieces = zip(*(part[there].split(1024) for part in (x, targets, weights)))
            loss = sum(run(lambda x, t, w: self.loss(self.head(x), t, w), *piece) for piece in pieces)
        return logits, loss / weights.sum().clamp(min=1e-20), memory

    def compile(self, **options):
        """
        Compiles what costs, the reading of full segments: one graph with gradients and one without, for any number of
        segments and batch (a batch of one gets its own). Names of weights stay as they are. Prompts and answers are of
        all lengths; they stay as they are too. options: torch.compile's.
        """
        plain, compiled = self.segment, torch.compile(self.segment, fullgraph=True, dynamic=False, **options)

        def segment(idx, memory, usable=None, cache=None, start=0):
            if cache is not None or idx.size(1) < self.config.block_size:
                return plain(idx, memory, usable, cache, start)
            # a memory that is fresh or was loaded shall look like one carried over, or each kind gets its own graph
            idx, memory = idx.contiguous(), memory.contiguous()
            if torch.is_grad_enabled() and not memory.requires_grad:
                memory = memory.detach().requires_grad_()
            torch._dynamo.maybe_mark_dynamic(idx, 0)
            torch._dynamo.maybe_mark_dynamic(memory, 1)
            if usable is not None:
                torch._dynamo.maybe_mark_dynamic(usable, 0)
            return compiled(idx, memory, usable)

        self.segment, self.loss = segment, torch.compile(self.loss, fullgraph=True, dynamic=True, **options)

    @torch.no_grad()
    def generate(self, idx, max_new_tokens, state=None, temperature=1.0, top_k=None, on_token=None):
        """
        Reads a prompt idx (B, any length), then continues it by max_new_tokens, sampled at `temperature` (0: the
        most likely token) from the top_k. state = (memory, tokens (B, t) since it was written) from an earlier call,
        or None. on_token is called with every new token (B, 1), and ends the text by returning True. Returns idx with
        the new tokens, and the state after them. Within a segment keys and values are cached; when a token follows a
        full segment, that segment is read once more, as a whole, to write the memory.
        """
        memory, tail = (self.initial_memory(idx.size(0)), idx[:, :0]) if state is None else state
        tail, cache = torch.cat((tail, idx), dim=1), None
        if max_new_tokens > 0 and tail.size(1) == 0:
            raise ValueError("there is nothing to continue: neither the prompt nor the state holds a token")
        while True:
            while tail.size(1) > self.config.block_size:
                _, memory = self.segment(tail[:, : self.config.block_size], memory)
                tail, cache = tail[:, self.config.block_size :], None
            if max_new_tokens <= 0:
                return idx, (memory, tail)
            if cache is None:
                cache = [{} for _ in self.blocks]
                x, _ = self.segment(tail, memory, cache=cache)
            else:
                x, _ = self.segment(tail[:, -1:], memory, cache=cache, start=tail.size(1) - 1)
            token = self.sample(self.head(x[:, -1]), temperature, top_k)  # (B, 1)
            idx, tail = torch.cat((idx, token), dim=1), torch.cat((tail, token), dim=1)
            max_new_tokens = 0 if on_token is not None and on_token(token) else max_new_tokens - 1

    @staticmethod
    def sample(logits, temperature, top_k):
        """One token (B, 1) from logits (B, V)."""
        if temperature == 0:
            return logits.argmax(dim=-1, keepdim=True)
        logits = logits.float() / temperature
        if top_k:
            worst = logits.topk(min(top_k, logits.size(-1))).values[:, -1:]
            logits = logits.masked_fill(logits < worst, -math.inf)
        return torch.multinomial(logits.softmax(dim=-1), num_samples=1)

    def configure_optimizers(self, weight_decay, learning_rate, betas, muon_lr=0.0):
        """
        A list of optimizers: one AdamW for everything or, if muon_lr > 0, torch.optim.Muon for the matrices inside
        the blocks and AdamW for the rest. Matrices decay; vectors (norms, biases, salience, shift) do not.
        """
        matrices = [p for p in self.blocks.parameters() if p.dim() == 2] if muon_lr else []
        inside = {id(p) for p in matrices}
        rest = [p for p in self.parameters() if id(p) not in inside]
        groups = [
            {"params": [p for p in rest if p.dim() == 2], "weight_decay": weight_decay},
            {"params": [p for p in rest if p.dim() < 2], "weight_decay": 0.0},
        ]
        muon = [torch.optim.Muon(matrices, lr=muon_lr, weight_decay=weight_decay)] if muon_lr else []
        return [torch.optim.AdamW(groups, lr=learning_rate, betas=betas)] + muon


# -----------------------------------------------------------------------------
# Llama's files

LLAMA_NAMES = {"embed_tokens": "embed", "layers": "blocks", "self_attn": "attn", "q_proj": "wq", "k_proj": "wk", "v_proj": "wv",
               "o_proj": "wo", "gate_proj": "w1", "up_proj": "w3", "down_proj": "w2", "input_layernorm": "norm1",
               "post_attention_layernorm": "norm2", "lm_head": "head"}
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def llama_config(path):
    """The fields of LM2Config that Hugging Face's config.json of a Llama says. Raises ValueError for another model's."""
    try:
        c = json.loads(path.read_text(encoding="utf-8"))
        rope = c.get("rope_parameters") or {**(c.get("rope_scaling") or {}), "rope_theta": c.get("rope_theta", 10000.0)}
        kind = rope.get("rope_type", rope.get("type", "default"))
        fields = {"n_embd": c["hidden_size"], "n_layer": c["num_hidden_layers"], "n_head": c["num_attention_heads"],
                  "n_kv_head": c.get("num_key_value_heads") or c["num_attention_heads"], "vocab_size": c["vocab_size"],
                  "intermediate_size": c["intermediate_size"], "norm_eps": c.get("rms_norm_eps", 1e-6),
                  "rope_theta": rope["rope_theta"], "tie_embeddings": c.get("tie_word_embeddings", False)}
        if kind == "llama3":
            fields["rope_scaling"] = tuple(rope[n] for n in ("factor", "low_freq_factor", "high_freq_factor",
                                                             "original_max_position_embeddings"))
        other = {"model_type": c["model_type"] != "llama", "rope_type": kind not in ("default", "llama3"),
                 "hidden_act": c.get("hidden_act", "silu") != "silu",
                 "head_dim": (c.get("head_dim") or fields["n_embd"] // fields["n_head"]) * fields["n_head"] != fields["n_embd"],
                 "attention_bias": bool(c.get("attention_bias")), "mlp_bias": bool(c.get("mlp_bias"))}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        raise ValueError(f"{path} is not the config of a Llama ({type(e).__name__}: {e})") from None
    if any(other.values()):
        raise ValueError(f"{path} is of a model that this decoder is not: see its {', '.join(name for name in other if other[name])}")
    return fields


def read_safetensors(path):
    """
    Yields (name, tensor) of a .safetensors file, one in memory at a time. Raises ValueError for a file that is not one, or whose
    header does not fit its size.
    """
    with open(path, "rb") as f:
        try:
            size, start = Path(path).stat().st_size, 8 + int.from_bytes(f.read(8), "little")
            if not 8 < start <= min(size, 10**8):
                raise ValueError(f"its header would end at byte {start}")
            header, end, tensors = json.loads(f.read(start - 8)), 0, []
            header.pop("__metadata__", None)
            for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
                (a, b), shape, dtype = entry["data_offsets"], entry["shape"], DTYPES[entry["dtype"]]
                if not all(type(n) is int and n >= 0 for n in (a, b, *shape)) or a != end or b - a != math.prod(shape) * dtype.itemsize:
                    raise ValueError(f"{name} overlaps another, leaves a gap, or has another size than its shape")
                tensors.append((name, dtype, shape))
                end = b
            if start + end != size:
                raise ValueError(f"its tensors end at byte {start + end} of {size}")
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
            raise ValueError(f"{path} is not a whole .safetensors file of f32, f16 or bf16 ({type(e).__name__}: {e})") from None
        for name, dtype, shape in tensors:  # they lie one behind the other
            data = bytearray(math.prod(shape) * dtype.itemsize)
            f.readinto(data)
            yield name, torch.frombuffer(data, dtype=dtype).view(shape) if data else torch.empty(shape, dtype=dtype)
