"""
LM2, a Large Memory Model: a Llama-style decoder with a bank of memory slots that its tokens read by
cross-attention and that LSTM-style gates update. The whole model is in this file.

References:
1) LM2: Kang et al. 2025, https://arxiv.org/abs/2502.06049, equations (1) to (6)
2) Llama: Touvron et al. 2023, https://arxiv.org/abs/2302.13971, the decoder
3) RMT: Bulatov et al. 2022, https://arxiv.org/abs/2207.06881, the baseline

Shapes (in equations K and V are keys and values):
    B batch     S segments of a text     T tokens of a segment (block_size)     V vocabulary
    C width     H heads     K key-value heads     D = C/H width of a head     L blocks with a bank
    N slots of a bank     w tokens of a chunk (chunk_size)     J = T/w chunks of a segment
    P = min(J, N) chunks of a segment that can be written

Self-attention sees one segment. What lies further back is known from the memory alone, which goes
in and comes out of every call:  states, loss, memory = model(idx, targets, memory)

HOW DO T TOKENS UPDATE N SLOTS? The paper does not say: its gates have T rows, its bank has N. Here
the bank is a queue, the youngest slot first. A full segment is cut into chunks of w tokens:
1. A chunk becomes one row, a weighted mean of its tokens, and a claim, 0 to 1: worth a slot?
2. If its claim is above 3/4, the gates mix its row into the oldest slot,
3. which moves to the front. All other slots keep their content and move back.
Of several in one segment the last one written meets the oldest slot, and becomes slot 0.
In training P chunks, written or not, are mixed in, each as far as its claim: so claims can be
learned. There 1/2 is enough to move to the front: needless rows then cost loss, so training lowers
their claims. While the learning rate falls, noise on the claims drives those of facts and of the
haystack apart; 3/4 lies between, mostly (tests/RESULTS.md). Block 1, which sees little but single
words, claims for its own bank, block 2 for all later ones: so they hold rows of the same chunks.
Tokens read the bank as it was before their segment: no token sees a later one.
Why tokens do not choose a slot by their content: early in training all choose the same one, and two
facts are averaged before anything has learned to keep them apart. Why a queue: a slot's age is its
index, so a read can prefer the later of two facts. Why one claim for many banks: where each block
claims for itself, some end up writing all, or nothing. Other rules, measured: README.

Each equation stands above its line, as it is here and, where that differs, as printed (README says
why). E: tokens' states, M: the bank, m: its slots, normalised, h: a block's input, normalised and
perhaps shifted, c: the row of a chunk.
"""
import json
import math
from dataclasses import dataclass
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
    n_kv_head: int = 0  # K, key-value heads, each shared by H/K query heads; 0: H
    n_embd: int = 384  # C
    intermediate_size: int = 0  # width of the feed-forward; 0: 8/3 C, up to a multiple of 16
    rope_theta: float = 500000.0  # base of the rotary frequencies
    rope_scaling: tuple = ()  # Llama 3.1's: factor, low and high frequency factor, old block_size
    norm_eps: float = 1e-5  # added to the mean square in RMSNorm
    tie_embeddings: bool = True  # the output head is the embedding matrix
    qk_norm: bool = False  # normalise queries and keys (not Llama's; small models learn sooner)
    token_shift: bool = False  # h_t + shift * h_{t-1} before attention (likewise)
    memory_type: str = "lm2"  # "lm2", "rmt" or "none"
    memory_slots: int = 16  # N (for RMT: memory tokens); 0 is memory_type="none"
    chunk_size: int = 4  # w, tokens that share a slot
    claim_threshold: float = 0.75  # a chunk with a larger claim is written; in training 1/2
    n_memory_layers: int = 0  # L, the first blocks, which own a bank; 0: all
    memory_top_k: int = 0  # a token reads only its k best slots, per head; 0: all
    bptt_segments: int = 0  # in training, cut the gradient after so many segments; 0: never
    activation_checkpointing: bool = False  # in training, compute a block twice, not keep it

    def __post_init__(self):
        """Fills in what is derived. ValueError: one sentence on values that cannot work."""
        if self.memory_type == "none" or self.memory_slots == 0:
            self.memory_type, self.memory_slots = "none", 0
        self.n_kv_head = self.n_kv_head or self.n_head
        self.intermediate_size = self.intermediate_size or math.ceil(self.n_embd / 6) * 16
        if not 0 < self.claim_threshold < 1:
            raise ValueError(f"claim_threshold must be between 0 and 1, not {self.claim_threshold}")
        for name, of, unit in (("n_embd", "2 x n_head", 2 * self.n_head),
                               ("n_head", "n_kv_head", self.n_kv_head),
                               ("block_size", "chunk_size", self.chunk_size)):
            if (value := getattr(self, name)) % unit:
                raise ValueError(f"{name} must be a multiple of {of} = {unit}, not {value}")


def rms_norm(x, eps=1e-5):
    """x / rms(x) over the last dimension, without a gain; any shape and dtype."""
    return F.rms_norm(x, (x.size(-1),), eps=eps)


def rope_table(config, positions):
    """cos and sin (2, n, D) of rotary position embedding at positions (n,), float or int."""
    D = config.n_embd // config.n_head
    freq = config.rope_theta ** (-torch.arange(0, D, 2).float() / D)  # (D/2,)
    if config.rope_scaling:  # long waves are stretched, short ones kept, those in between mixed
        factor, low, high, old_block_size = config.rope_scaling
        kept = ((old_block_size * freq / (2 * math.pi) - low) / (high - low)).clamp(0, 1)
        freq = freq * (kept + (1 - kept) / factor)
    angle = torch.outer(positions.float(), freq).repeat(1, 2)  # (n, D)
    return torch.stack((angle.cos(), angle.sin()))  # (2, n, D)


def rotate(x, rope):
    """Rotary embedding, Llama's half-split form, of x (B, H, T, D). rope (2, T, D)."""
    cos, sin = rope
    x1, x2 = x.chunk(2, dim=-1)
    return (x * cos + torch.cat((-x2, x1), dim=-1) * sin).type_as(x)


class Attention(nn.Module):
    """Causal self-attention with grouped key-value heads, within each segment."""

    def __init__(self, config):
        super().__init__()
        C, D = config.n_embd, config.n_embd // config.n_head
        self.head_dim, self.qk_norm = D, config.qk_norm
        # twice for normalised q and k, so that a head can point at one key
        self.scale = (1 + config.qk_norm) / math.sqrt(D)
        self.wq = nn.Linear(C, C, bias=False)
        self.wk = nn.Linear(C, config.n_kv_head * D, bias=False)
        self.wv = nn.Linear(C, config.n_kv_head * D, bias=False)
        self.wo = nn.Linear(C, C, bias=False)  # the block applies it, to attention + read

    def heads(self, x, norm=False):
        """(B, S, T, H*D) -> (B*S, H, T, D), normalised if norm and qk_norm."""
        x = x.flatten(0, 1).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        return rms_norm(x) if norm and self.qk_norm else x

    def forward(self, h, rope):
        """h (B, S, T, C), rope of its T positions -> y and the queries, (B*S, H, T, D)."""
        q = rotate(self.heads(self.wq(h), norm=True), rope)  # (B*S, H, T, D)
        k = rotate(self.heads(self.wk(h), norm=True), rope)  # (B*S, K, T, D)
        v = self.heads(self.wv(h))  # (B*S, K, T, D)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.scale,
                                           enable_gqa=q.size(1) != k.size(1))
        return y, q


class MLP(nn.Module):
    """SwiGLU feed-forward."""

    def __init__(self, config):
        super().__init__()
        self.w1 = nn.Linear(config.n_embd, config.intermediate_size, bias=False)
        self.w3 = nn.Linear(config.n_embd, config.intermediate_size, bias=False)
        self.w2 = nn.Linear(config.intermediate_size, config.n_embd, bias=False)

    def forward(self, x):
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Memory(nn.Module):
    """How a block writes and reads its bank M (B, N, C), slot 0 the youngest."""

    def __init__(self, config, claims=True):
        super().__init__()
        C, N = config.n_embd, config.memory_slots
        self.chunk_size, self.top_k = config.chunk_size, config.memory_top_k
        self.bptt_segments = config.bptt_segments
        self.threshold = math.log(config.claim_threshold / (1 - config.claim_threshold))
        kv = C // config.n_head * config.n_kv_head
        self.wk = nn.Linear(C, kv, bias=False)  # W_K
        self.wv = nn.Linear(C, kv, bias=False)  # W_V
        self.w_out = nn.Linear(C, C, bias=False)
        self.w_in, self.u_in = nn.Linear(C, C, bias=False), nn.Linear(C, C, bias=False)
        self.w_forget, self.u_forget = nn.Linear(C, C, bias=False), nn.Linear(C, C, bias=False)
        self.w_cand = nn.Linear(C, C, bias=False)  # W_c, starts as the identity
        # w_sal, at first all tokens alike. None: the block takes the saliences of the one before
        self.salience = nn.Parameter(torch.zeros(C)) if claims else None
        # slot i is read as if it lay i + 1/2 chunks before the segment, but at most T tokens: slots
        # from T/w on share the last position
        place = -((torch.arange(N) + 0.5) * self.chunk_size).clamp(max=config.block_size)
        self.register_buffer("rope", rope_table(config, place), persistent=False)  # (2, N, D)
        # a prior of (i + 1)^-3: of two facts about one person the younger is likelier the answer
        self.register_buffer("recency", -3.0 * torch.log1p(torch.arange(N)), persistent=False)

    def pool(self, h, s):
        """
        h (B, S, T, C) -> a row for each chunk (B, S, J, C), and the tokens' saliences s
        (B, S, J, w): the block's own, or those of the block before, which come in.
        """
        h = h.unflatten(2, (-1, self.chunk_size))  # (B, S, J, w, C)
        # s = 8 h w_sal, a salience for each token; 8: a larger step for this one vector
        if self.salience is not None:
            s = 8.0 * (h * self.salience).sum(dim=-1)  # (B, S, J, w)
            if self.training and self.noise:  # of set_noise; one a chunk: softmax(s) stays
                s = s + torch.empty_like(s[..., :1]).uniform_(-self.noise, self.noise)
        # c = sum over the chunk of softmax(s) h
        return (s.softmax(dim=-1)[..., None] * h).sum(dim=3), s

    def log_odds(self, s):
        """The claims' log-odds (B, S, J) less the threshold's: a chunk above 0 is written."""
        # claim = sigmoid(logsumexp(s)) = sum e^s / (1 + sum e^s); at first w / (w + 1)
        return s.logsumexp(dim=-1) - (0.0 if self.training else self.threshold)

    def write(self, h, M, s=None):
        """
        h (B, S, T, C) of S full segments, M (B, N, C) before them, s as in pool. Returns the
        bank as each segment finds it (B, S, N, C), as the last one leaves it (B, N, C), and s.
        """
        c, s = self.pool(h, s)
        log_odds = self.log_odds(s)  # (B, S, J)
        written = log_odds > 0  # (B, S, J)
        # in training every row counts as far as its claim, so that claims have a gradient
        claim = log_odds.sigmoid() if self.training else written.type_as(log_odds)
        # unwritten chunks first, then written ones, each in text order. The last P are paired with
        # the P oldest slots: the last one written meets the oldest of all, slot N - 1
        N = M.size(1)
        order = written.int().argsort(dim=2, stable=True)[..., -N:]  # (B, S, P)
        c = c.gather(2, order[..., None].expand(-1, -1, -1, c.size(3)))  # (B, S, P, C)
        claim = claim.gather(2, order)[..., None]  # (B, S, P, 1)
        # the n rows written then move to the front, in reverse: the last of the text is slot 0
        i, n = torch.arange(N, device=h.device), written.sum(dim=2, keepdim=True)
        source = torch.where(i < n, N - 1 - i, i - n)[..., None].expand(-1, -1, -1, M.size(2))
        c_in, c_forget, c_new = self.w_in(c), self.w_forget(c), self.w_cand(c).tanh()
        banks, M = self.recurrence(M, c_in, c_forget, c_new, claim, source)
        return banks, M, s

    @torch.compiler.disable  # not compiled: that would make one graph for each S
    def recurrence(self, M, c_in, c_forget, c_new, claim, source):
        """All that is sequential: M (B, N, C) through S segments. Returns banks and M, as write."""
        banks, N, P = [], M.size(1), claim.size(2)
        parts = (x.unbind(1) for x in (c_in, c_forget, c_new, claim, source))
        for c_in, c_forget, c_new, claim, source in zip(*parts):
            if self.bptt_segments and banks and len(banks) % self.bptt_segments == 0:
                M = M.detach()
            banks.append(M)
            rest, old = M.split((N - P, P), dim=1)  # (B, N - P, C), (B, P, C)
            m = rms_norm(old, 1e-20)  # tiny eps: a small row is scaled up, too
            # (4)  g_in = sigmoid(c W_in + m U_in)              printed: sigmoid(E W_in)
            g_in = torch.sigmoid(c_in + self.u_in(m))  # (B, P, C)
            # (5)  g_forget = sigmoid(c W_forget + m U_forget)  printed: sigmoid(E_mem W_forget)
            g_forget = torch.sigmoid(c_forget + self.u_forget(m))  # (B, P, C)
            # (6)  M' = g_in tanh(c W_c) + g_forget M           printed: tanh(E_mem)
            new = g_in * c_new + g_forget * old  # (B, P, C)
            row = torch.lerp(old, new, claim)  # (B, P, C), at claim 1 the new row, at 0 the old one
            M = torch.cat((rest, row), dim=1).gather(1, source)  # (B, N, C)
        return torch.stack(banks, dim=1), M

    def attention(self, q, m, attn):
        """A (B*S, H, T, N): queries q (B*S, H, T, D) of `attn`, slots m (B, S, N, C)."""
        # (1)  K = m W_K; Q = E W_Q is self-attention's         printed: K = M W_K
        k = rotate(attn.heads(self.wk(m), norm=True), self.rope)  # (B*S, K, N, D)
        k = k.repeat_interleave(q.size(1) // k.size(1), dim=1)  # (B*S, H, N, D)
        # (1)  A = softmax(Q K^T scale + recency)               printed: softmax(Q K^T / sqrt(d))
        scores = q @ k.mT * attn.scale + self.recency  # (B*S, H, T, N)
        if self.top_k:
            least = scores.topk(min(self.top_k, scores.size(-1)), dim=-1).values[..., -1:]
            scores = scores.masked_fill(scores < least, -math.inf)
        return scores.softmax(dim=-1).type_as(q)

    def read(self, q, M, attn):
        """E_gated (B, S, T, C), what queries q (B*S, H, T, D) of `attn` read in M (B, S, N, C)."""
        m = rms_norm(M, 1e-20)  # (B, S, N, C)
        A = self.attention(q, m, attn)  # (B*S, H, T, N)
        # (1)  V = m W_V, E_mem = A V                           printed: V = M W_V
        v = attn.heads(self.wv(m))  # (B*S, K, N, D)
        E_mem = A @ v.repeat_interleave(q.size(1) // v.size(1), dim=1)  # (B*S, H, T, D)
        E_mem = E_mem.transpose(1, 2).flatten(2).unflatten(0, M.shape[:2])  # (B, S, T, C)
        # (2)  g_out = sigmoid(E_mem W_out)
        g_out = torch.sigmoid(self.w_out(E_mem))  # (B, S, T, C)
        # (2)  E_gated = g_out E_mem                            printed: g_out M
        return g_out * E_mem


class Block(nn.Module):
    def __init__(self, config, has_memory, claims=True):
        super().__init__()
        self.block_size = config.block_size
        self.norm1 = nn.RMSNorm(config.n_embd, eps=config.norm_eps)
        self.attn = Attention(config)
        self.memory = Memory(config, claims) if has_memory else None
        self.norm2 = nn.RMSNorm(config.n_embd, eps=config.norm_eps)
        self.mlp = MLP(config)
        self.shift = nn.Parameter(torch.full((config.n_embd,), 0.5)) if config.token_shift else None

    def forward(self, x, rope, M=None, s=None):
        """
        Writing needs h, not what the block reads: so the banks of all segments are made first, then
        all segments read at once. x (B, S, T, C), M (B, N, C) if there is a memory, s (B, S, J, w)
        the saliences of the block before. Returns x, M after the text and the saliences that it
        wrote by; a segment that is not full (S = 1) only reads.
        """
        h = self.norm1(x)  # (B, S, T, C)
        if self.shift is not None:
            h = h + self.shift * F.pad(h[:, :, :-1], (0, 0, 1, 0))
        y, q = self.attn(h, rope)
        y = y.transpose(1, 2).flatten(2).view_as(x)  # (B, S, T, C)
        if self.memory is not None:
            banks = M[:, None]  # (B, 1, N, C)
            if x.size(2) == self.block_size:
                banks, M, s = self.memory.write(h, M, s)  # banks (B, S, N, C)
            # (3)  E_next = E_attn + E_gated
            y = y + self.memory.read(q, banks, self.attn)
        x = x + self.attn.wo(y)
        return x + self.mlp(self.norm2(x)), M, s


class LM2(nn.Module):
    """The decoder and its banks; with memory_type="none" the decoder alone."""

    def __init__(self, config):
        super().__init__()
        self.config = c = config
        L = (c.n_memory_layers or c.n_layer) if c.memory_type == "lm2" else 0
        self.embed = nn.Embedding(c.vocab_size, c.n_embd)
        # blocks 3 and later write what block 2 claims
        self.blocks = nn.ModuleList(Block(c, has_memory=i < L, claims=i < 2)
                                    for i in range(c.n_layer))
        self.norm = nn.RMSNorm(c.n_embd, eps=c.norm_eps)
        self.head = nn.Linear(c.n_embd, c.vocab_size, bias=False)
        if c.tie_embeddings:
            self.head.weight = self.embed.weight
        rope = rope_table(c, torch.arange(c.block_size))  # (2, T, D)
        self.register_buffer("rope", rope, persistent=False)
        self.set_noise(0.0)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        """Draws the matrices, the decoder's first: a seed gives LM2, RMT and none the same one."""
        tied, g = self.config.tie_embeddings, torch.Generator().manual_seed(torch.initial_seed())

        def normal(weight, std):  # drawn on the CPU: the same numbers on every device
            weight.copy_(torch.randn(weight.shape, generator=g) * std)

        normal(self.embed.weight, 0.02 if tied else 1.0)  # a tied one makes the logits, too
        if not tied:
            self.head.weight.zero_()  # at first all tokens are equally likely
        for name, module in sorted(self.named_modules(), key=lambda named: "memory" in named[0]):
            if isinstance(module, nn.Linear) and name != "head":
                normal(module.weight, module.in_features**-0.5)
            if name.endswith("w_cand"):
                nn.init.eye_(module.weight)

    def set_noise(self, noise):
        """In training, noise on the claims' log-odds: uniform, from -noise to noise."""
        self.noise = noise
        for block in self.blocks:
            if block.memory is not None:
                block.memory.noise = noise

    def num_params(self, memory=True):
        """How many parameters; memory=False: those of the decoder alone."""
        return sum(p.numel() for n, p in self.named_parameters() if memory or "memory" not in n)

    def initial_memory(self, batch_size):
        """
        The memory before any text: banks (L, B, N, C), in RMT tokens (1, B, N, C), of the weights'
        dtype. A plain tensor: detach it, move it, save it.
        """
        L = sum(block.memory is not None for block in self.blocks)
        # M_0 = I: slots must start different. Row i is e_(i mod C): a zero row has no direction
        rows = torch.arange(self.config.memory_slots, device=self.rope.device) % self.config.n_embd
        rows = F.one_hot(rows, self.config.n_embd).to(self.embed.weight.dtype)  # (N, C)
        return rows.expand(L, batch_size, -1, -1)

    def segments(self, x, memory):
        """
        Reads embedded tokens x (B, S, T, C), S segments of one length. Returns states (B, S*T, C),
        the memory, written if the segments are full, and log_odds (L, B, S, J), or None.
        """
        rope, s, banks, log_odds = self.rope[:, : x.size(2)], None, [], []
        for i, block in enumerate(self.blocks):
            M = memory[i] if block.memory is not None else None  # (B, N, C)
            if self.training and self.config.activation_checkpointing:
                x, M, s = checkpoint(block, x, rope, M, s, use_reentrant=False)
            else:
                x, M, s = block(x, rope, M, s)
            if s is not None and M is not None:  # the block has written
                banks.append(M)
                log_odds.append(block.memory.log_odds(s))
        x = self.norm(x).flatten(1, 2)
        if not banks:
            return x, memory, None
        return x, torch.stack(banks), torch.stack(log_odds)

    def forward(self, idx, targets=None, memory=None, weights=None):
        """
        idx (B, n) int64, any number of segments, the last one perhaps not full; targets (B, n)
        int64, -1 where there is none; memory as of initial_memory, the default; weights (B, n) of
        the targets in the loss, 1 / their number by default. Returns states (B, n, C), which `head`
        makes logits of, loss (scalar; None without targets) and memory.
        """
        B, T, full = idx.size(0), self.config.block_size, idx.size(1) // self.config.block_size
        memory = self.initial_memory(B) if memory is None else memory
        if memory.size(1) != B:
            raise ValueError(f"a memory of {memory.size(1)} texts does not fit {B} texts")
        x, rest = self.embed(idx).tensor_split([full * T], dim=1)  # (B, S*T, C), (B, less, C)
        log_odds = loss = None
        if full:
            x, memory, log_odds = self.segments(x.unflatten(1, (full, T)), memory)
        if rest.numel():
            x = torch.cat((x, self.segments(rest[:, None], memory)[0]), dim=1)  # (B, n, C)
        if targets is not None:
            if weights is None:
                weights = (targets != -1) / (targets != -1).sum().clamp(min=1)
            loss = 0.0
            # in pieces: one array of all the logits would be slow, and the largest of all
            pieces = (y.flatten(0, 1).split(1024) for y in (x, targets, weights))
            for state, target, weight in zip(*pieces):
                nll = F.cross_entropy(self.head(state), target, ignore_index=-1, reduction="none")
                loss = loss + (nll * weight).sum()
            if self.training and log_odds is not None and not self.noise:
                # a claim that is all but certain, yes or no, has no gradient that could change it:
                # beyond log-odds of 6 it is pulled back; not while noise puts it there
                pull = 0.05 * (log_odds.abs() - 6.0).clamp(min=0).square()  # (L, B, S, J)
                # each text's pull has the weight of its targets
                loss = loss + (pull.mean(dim=(2, 3)) * weights.sum(dim=1)).sum()
        return x, loss, memory

    @torch.no_grad()
    def read(self, idx, state=None):
        """
        Continues a text by idx (B, n), n > 0, in pieces, so in constant memory. state: (memory, the
        tokens (B, t) since it was written), None where the text starts. Returns logits (B, V) and
        state. The segment at hand is computed again each time: there is no cache.
        """
        T = self.config.block_size
        memory, tail = state or (self.initial_memory(idx.size(0)), idx[:, :0])
        tail = torch.cat((tail, idx), dim=1)
        for part in tail.split(max(1, 2**15 // (T * idx.size(0))) * T, dim=1):
            x, _, memory = self(part, memory=memory)
        return self.head(x[:, -1]), (memory, tail[:, tail.size(1) // T * T :])

    @torch.no_grad()
    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None, state=None):
        """Reads idx (B, n), adds max_new_tokens. Returns idx with them and the state after them."""
        logits, state = self.read(idx, state)
        for _ in range(max_new_tokens):
            token = sample(logits, temperature, top_k)
            idx = torch.cat((idx, token), dim=1)
            logits, state = self.read(token, state)
        return idx, state


def sample(logits, temperature=1.0, top_k=None):
    """A token (B, 1) of logits (B, V): the likeliest at temperature 0, else one of the top k."""
    if temperature < 1e-5:
        return logits.argmax(dim=-1, keepdim=True)
    logits = logits.float() / temperature
    if top_k:
        least = logits.topk(min(top_k, logits.size(-1))).values[:, -1:]
        logits = logits.masked_fill(logits < least, -math.inf)
    return torch.multinomial(logits.softmax(dim=-1), num_samples=1)


class RMT(LM2):
    """
    The Recurrent Memory Transformer, as a baseline: [M | segment | M], memory tokens to read before
    the segment, and to write after it, where they become the next one's. They pass through all
    blocks, so segments wait for each other: there is no pass over a whole text at once.
    """

    def __init__(self, config):
        super().__init__(config)
        N, C = config.memory_slots, config.n_embd
        std = 0.02 if config.tie_embeddings else 1.0
        self.memory_tokens = nn.Parameter(torch.randn(N, C) * std)
        # a segment and its two copies of the memory need more positions
        self.rope = rope_table(config, torch.arange(config.block_size + 2 * N))

    def initial_memory(self, batch_size):
        """The memory tokens (1, B, N, C) before any text."""
        return self.memory_tokens.expand(1, batch_size, -1, -1)

    def segments(self, x, memory):
        """As LM2's."""
        N, xs = self.config.memory_slots, []
        full = x.size(2) == self.config.block_size
        for i, part in enumerate(x.unbind(1)):
            if self.config.bptt_segments and i and i % self.config.bptt_segments == 0:
                memory = memory.detach()
            wrapped = torch.cat((memory[0], part, memory[0][:, : N * full]), dim=1)
            states, _, _ = super().segments(wrapped[:, None], memory)  # (B, N + T + N, C)
            memory = states[None, :, -N:].type_as(memory) if full else memory
            xs.append(states[:, N : N + x.size(2)])
        return torch.cat(xs, dim=1), memory, None


def build(config):
    """The model of a config: an LM2, with memory_type="none" too, or an RMT."""
    return (RMT if config.memory_type == "rmt" else LM2)(config)


# -----------------------------------------------------------------------------
# the decoder of a Llama, from files in Hugging Face's format

NAMES = {"model.": "", "embed_tokens": "embed", "layers": "blocks", "self_attn": "attn",
         "q_proj": "wq", "k_proj": "wk", "v_proj": "wv", "o_proj": "wo", "gate_proj": "w1",
         "up_proj": "w3", "down_proj": "w2", "input_layernorm": "norm1",
         "post_attention_layernorm": "norm2", "lm_head": "head"}
SCALING = "factor low_freq_factor high_freq_factor original_max_position_embeddings".split()
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def llama_config(folder):
    """LM2Config's fields of the Llama in a folder. ValueError: its config.json is not a Llama's."""
    path = Path(folder, "config.json")
    try:
        c = json.loads(path.read_text(encoding="utf-8"))
        rope = c.get("rope_parameters") or c.get("rope_scaling") or {}
        kind = rope.get("rope_type", rope.get("type", "default"))
        known = c["model_type"], c.get("hidden_act", "silu"), kind in ("default", "llama3")
        if known != ("llama", "silu", True):
            raise ValueError("another model_type, hidden_act or rope_type")
        return {"n_embd": int(c["hidden_size"]), "n_layer": int(c["num_hidden_layers"]),
                "n_head": int(c["num_attention_heads"]), "vocab_size": int(c["vocab_size"]),
                "n_kv_head": int(c.get("num_key_value_heads") or c["num_attention_heads"]),
                "intermediate_size": int(c["intermediate_size"]),
                "norm_eps": float(c.get("rms_norm_eps", 1e-6)),
                "rope_theta": float(rope.get("rope_theta", c.get("rope_theta", 1e4))),
                "rope_scaling": tuple(float(rope[n]) for n in SCALING if kind == "llama3"),
                "tie_embeddings": bool(c.get("tie_word_embeddings", False))}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise ValueError(f"{path} is not a Llama's ({type(e).__name__}, {e})") from None


def read_safetensors(path):
    """The tensors of a .safetensors file, as {name: tensor}."""
    data = torch.from_file(str(path), size=path.stat().st_size, dtype=torch.uint8)
    start = 8 + data[:8].view(torch.int64).item()
    header = json.loads(data[8:start].numpy().tobytes())
    header.pop("__metadata__", None)
    return {name: data[slice(*(start + at for at in entry["data_offsets"]))].clone()
            .view(DTYPES[entry["dtype"]]).view(entry["shape"]) for name, entry in header.items()}


def load_llama(folder, **overrides):
    """
    The decoder of the Llama in a folder (config.json, .safetensors), in float32. overrides: fields
    of LM2Config; LM2's memory of memory_slots is grafted on so that the logits stay as they were; a
    smaller vocab_size keeps the first tokens. ValueError: files that do not fit each other.
    """
    theirs = llama_config(folder)
    model = build(LM2Config(**{**theirs, "memory_slots": 0, **overrides}))
    V, weights = model.config.vocab_size, {}
    if V > theirs["vocab_size"]:
        raise ValueError(f"{folder} has {theirs['vocab_size']} tokens, the text {V}: prepare the "
                         "data with its tokenizer")
    try:
        for path in sorted(Path(folder).glob("*.safetensors")):
            for name, weight in read_safetensors(path).items():
                for part, here in NAMES.items():
                    name = name.replace(part, here)
                weights[name] = weight[:V] if name in ("embed.weight", "head.weight") else weight
        if theirs["tie_embeddings"]:  # some files have the one, some the other
            tied = weights.get("embed.weight", weights.get("head.weight"))
            weights["embed.weight"] = weights["head.weight"] = tied
        own = {n: p for n, p in model.state_dict().items() if "memory" in n}
        weights = {n: w for n, w in weights.items() if not n.endswith("inv_freq")}
        model.load_state_dict({**weights, **own})
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError) as e:
        raise ValueError(f"{folder}: .safetensors files that are damaged, or not of config.json: "
                         f"{' '.join(str(e).split())[:200]}") from None
    for block in model.blocks:
        if block.memory is not None:
            # (1)  V = 0: nothing is read until it is learned
            nn.init.zeros_(block.memory.wv.weight)
    return model
