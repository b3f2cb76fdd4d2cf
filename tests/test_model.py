"""The model against plain loops, and what its docstrings promise."""
import cmath
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from bench import estimate_mfu
from model import DTYPES, LM2, LM2Config

ROOT = Path(__file__).parent.parent

TYPES = ("lm2", "rmt", "none")


def make(seed=0, dtype=torch.float64, **kwargs):
    """A small model with nothing left at zero, so that every path shows in the logits."""
    torch.manual_seed(seed)
    config = dict(block_size=8, vocab_size=40, n_layer=2, n_head=4, n_kv_head=2, n_embd=16, memory_slots=3,
                  tie_embeddings=False, qk_norm=True, token_shift=True)
    model = LM2(LM2Config(**{**config, **kwargs})).to(dtype)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "salience" in name or "bias" in name or name == "head.weight":
                p.copy_(torch.randn_like(p) / (8 if "salience" in name else 1))
            if ".d_" in name:
                p.copy_(0.2 * torch.randn_like(p))
    return model.eval()


def tokens(*shape, seed=1):
    return torch.randint(40, shape, generator=torch.Generator().manual_seed(seed))


# ----------------------------------------------------------------------------- the equations

def rms(v, eps=1e-5):
    return v / (v.pow(2).mean() + eps).sqrt()


def bank(B, N):
    """Slots of width 16 and, last, their ages."""
    return torch.cat((torch.randn(B, N, 16, dtype=torch.float64), torch.randint(9, (B, N, 1)).double()), dim=-1)


def turn(v, position, theta=500000.0):
    """Rotary position embedding of one vector: dimensions j and D/2 + j by position * theta^(-2j/D)."""
    half = len(v) // 2
    z = torch.complex(v[:half], v[half:]) * torch.tensor([cmath.exp(1j * position * theta ** (-j / half)) for j in range(half)])
    return torch.cat((z.real, z.imag))


@pytest.mark.parametrize("n_kv_head, top_k, qk_norm", [(4, 0, False), (2, 0, True), (2, 2, False), (1, 1, True)])
def test_read_is_equations_1_and_2(n_kv_head, top_k, qk_norm):
    model = make(n_kv_head=n_kv_head, memory_slots=5, memory_top_k=top_k, qk_norm=qk_norm)
    block, B, T, H, D = model.blocks[0], 2, 8, 4, 4
    h, M = torch.randn(B, T, 16, dtype=torch.float64), bank(B, 5)
    W = {"w" + x: getattr(block.attn, "w" + x).weight + getattr(block.memory, "d_" + x).weight for x in "kv"}
    W["wq"] = block.attn.wq.weight
    expected, A = torch.zeros(B, T, 16, dtype=torch.float64), torch.zeros(B, H, T, 5, dtype=torch.float64)
    for b in range(B):
        for t in range(T):
            read = []
            for head in range(H):
                q, shared = turn((W["wq"] @ h[b, t])[head * D : head * D + D], t), head // (H // n_kv_head)
                keys = [(W["wk"] @ rms(m[:-1], 1e-20))[shared * D : shared * D + D] for m in M[b]]
                values = [(W["wv"] @ rms(m[:-1], 1e-20))[shared * D : shared * D + D] for m in M[b]]
                if qk_norm:
                    q, keys = rms(q), [rms(k) for k in keys]
                # a chunk is 8/2 tokens; the middle of a slot's lies so far before the segment, at most a whole one
                keys = [turn(k, -min((m[-1].item() + 0.5) * 8 / 2, 8)) for k, m in zip(keys, M[b])]
                old = [block.memory.recency * math.log(1 + m[-1].item()) for m in M[b]]
                scores = [(q @ k).item() * (2 if qk_norm else 1) / math.sqrt(D) - o for k, o in zip(keys, old)]
                best = sorted(scores)[-top_k:] if top_k else scores
                e = [math.exp(s) if s in best else 0.0 for s in scores]
                A[b, head, t] = torch.tensor(e) / sum(e)
                read.append(sum(x / sum(e) * v for x, v in zip(e, values)))
            E_mem = torch.cat(read)
            gate = torch.sigmoid(block.memory.w_out.weight @ E_mem + block.memory.w_out.bias)
            expected[b, t] = gate * E_mem
    _, q = block.attn(h, (model.cos[:T], model.sin[:T]))
    # the rotary tables are float32
    torch.testing.assert_close(block.memory.read(q, M, block.attn), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(block.memory.attention(q, M, block.attn), A, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("T, N", [(8, 2), (16, 4), (23, 4), (23, 3), (8, 1), (7, 1), (16, 9), (3, 4), (21, 40)])
def test_write_is_equations_4_to_6_on_chunks(T, N, training):
    model = make(block_size=T, memory_slots=N)
    w, B = model.blocks[1].memory, 2
    J = min(N, max(1, T // 4))  # chunks, of four tokens at least
    h, M = torch.randn(B, T, 16, dtype=torch.float64), bank(B, N)
    expected, covered = M.clone(), set()
    h[:, -4:] = -4 * w.salience / w.salience.norm()  # the last chunk will claim little
    usable = torch.rand(B, N) < 0.5 if training else None
    for b in range(B):
        claims = []
        for j in range(J):
            chunk = range(j * T // J, (j + 1) * T // J)
            e = sum(math.exp(8 * (w.salience @ h[b, t]).item()) for t in chunk)
            claims.append(e / (1 + e))
        order = sorted(range(J), key=lambda j: -round(8 * claims[j]))
        ages = (M[b, :, -1] * usable[b] if training else M[b, :, -1]).tolist()
        slots = sorted(range(N), key=lambda i: -ages[i])  # the oldest first; Python's sort is stable
        written = [j for j in range(J) if claims[j] > 0.25]
        expected[b, :, -1] += len(written)
        for j, i in zip(order, slots):
            chunk = list(range(j * T // J, (j + 1) * T // J))
            covered.update(chunk)
            e = [math.exp(8 * (w.salience @ h[b, t]).item()) for t in chunk]
            c = sum(x / (1 + sum(e)) * h[b, t] for x, t in zip(e, chunk))
            m = rms(M[b, i, :-1], 1e-20)
            g_in = torch.sigmoid(w.w_in.weight @ c + w.w_in.bias + w.u_in.weight @ m)
            g_forget = torch.sigmoid(w.w_forget.weight @ c + w.w_forget.bias + w.u_forget.weight @ m)
            kept = 1 - claims[j] * (1 - g_forget)
            expected[b, i, :-1] = g_in * torch.tanh(w.w_cand.weight @ c) + kept * M[b, i, :-1]
            if j in written:
                expected[b, i, -1] = sum(k > j for k in written)
    assert covered == set(range(T))
    # the gates are computed in float32
    torch.testing.assert_close(w.write(h, M, usable), expected, rtol=1e-5, atol=1e-5)


def test_in_training_logits_above_the_limit_are_drawn_back():
    model = make(block_size=23, memory_slots=4)  # uneven chunks: 5, 6, 6 and 6 tokens
    memory, M = model.blocks[0].memory, bank(2, 4)
    h = torch.randn(2, 23, 16, dtype=torch.float64)
    h += (torch.linspace(-10, 15, 23) / 8 / memory.salience.norm() ** 2)[:, None] * memory.salience

    def gradient(pull):
        memory.pull, x = pull, h.detach().requires_grad_()
        c, claimed = memory.gather(x, M[..., :-1])
        (c.sum() + claimed.sum()).backward()
        return x.grad

    logits = 8 * h @ memory.salience  # (B, T)
    assert (logits > 6).any() and (logits < 6).any()
    expected = 0.5 * (logits - 6).clamp(min=0)[..., None] * 8 * memory.salience
    model.train()
    torch.testing.assert_close(gradient(0.5) - gradient(0.0), expected, rtol=1e-4, atol=1e-5)  # float32 within
    model.eval()
    assert torch.equal(gradient(0.5), gradient(0.0))


def test_what_nobody_claims_stays_exactly():
    model = make(dtype=torch.float32)
    memory, M = model.blocks[0].memory, bank(2, 3).float()
    h = -100 * (memory.salience / memory.salience.norm()).expand(2, 8, 16)
    for _ in range(5):
        assert torch.equal(memory.write(h, M), M)


def test_training_texts_have_a_part_of_the_bank_that_their_tokens_say():
    model, idx = make(memory_slots=16), tokens(2000, 24)
    usable = model.usable(idx)
    assert usable.shape == (2000, 16) and usable.dtype == torch.bool
    share = usable.double().mean(dim=1)
    assert abs(share.mean() - 0.625) < 0.02 and 0.15 < (share < 0.44).double().mean() < 0.35 and (share == 1).any()
    assert (usable.double().mean(dim=0) - 0.625).abs().max() < 0.05  # all slots alike
    assert torch.equal(model.usable(idx[7:9]), usable[7:9])
    text = tokens(4, 64)
    read = [model.train(mode).unroll(text)[2] for mode in (False, True, False, True)]
    assert torch.equal(read[0], read[2]) and torch.equal(read[1], read[3]) and not torch.equal(read[0], read[1])


def test_slots_a_training_text_does_not_have_stay_as_they_were():
    model = make(block_size=32, memory_slots=8)  # as many chunks
    memory, M = model.blocks[0].memory, model.initial_memory(1)[0]
    direction = memory.salience / memory.salience.norm()
    h = torch.randn(1, 32, 16, dtype=torch.float64) - 100 * direction
    usable = torch.tensor([[False, True, False, False, True, True, False, False]])
    for i in range(6):
        claiming = h.clone()
        claiming[0, 4 * i] += 200 * direction
        M = memory.write(claiming, M, usable)
    assert torch.equal((M != model.initial_memory(1)[0])[0, :, :-1].any(dim=-1), usable[0])


def test_equation_3_adds_the_gated_read_to_the_attention_output():
    model = make()
    block, x, M = model.blocks[0], torch.randn(2, 8, 16, dtype=torch.float64), bank(2, 3)
    out, h = block(x, (model.cos, model.sin), M)
    y, q = block.attn(h, (model.cos, model.sin))
    after = x + block.attn.wo(y + block.memory.read(q, M, block.attn))
    torch.testing.assert_close(out, after + block.mlp(block.norm2(after)))


@pytest.mark.parametrize("N", [1, 16, 40])
def test_memory_starts_as_wrapped_identity(N):
    memory = make(memory_slots=N).initial_memory(3)
    assert memory.shape == (2, 3, N, 17) and memory.dtype == torch.float32
    for i in range(N):
        assert memory[1, 2, i].tolist() == [float(j == i % 16) for j in range(16)] + [N]


def test_memory_layers_are_the_first_ones():
    model = make(n_layer=3, n_memory_layers=2)
    assert [block.memory is not None for block in model.blocks] == [True, True, False]
    assert model.unroll(tokens(1, 16))[2].shape == (2, 1, 3, 17)


# ----------------------------------------------------------------------------- the decoder

def plain_decoder(model, idx):
    """A decoder that never had a memory, from the same weights."""
    x, T = model.embed(idx), idx.size(1)
    D, scale = 4, (2.0 if model.config.qk_norm else 1.0) / 2

    def heads(v):
        return v.unflatten(-1, (-1, D)).transpose(1, 2)

    def turn(v):
        v = F.rms_norm(v, (D,), eps=1e-5) if model.config.qk_norm else v
        return v * model.cos[:T] + torch.cat((-v[..., D // 2 :], v[..., : D // 2]), dim=-1) * model.sin[:T]

    for block in model.blocks:
        h = block.norm1(x)
        if block.shift is not None:
            h = h + block.shift * torch.cat((torch.zeros_like(h[:, :1]), h[:, :-1]), dim=1)
        q, k, v = turn(heads(block.attn.wq(h))), turn(heads(block.attn.wk(h))), heads(block.attn.wv(h))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)
        x = x + block.attn.wo(y.transpose(1, 2).flatten(2))
        u = block.norm2(x)
        x = x + block.mlp.w2(F.silu(block.mlp.w1(u)) * block.mlp.w3(u))
    return model.head(model.norm(x))


@pytest.mark.parametrize("switches", [{}, {"qk_norm": False, "token_shift": False}])
def test_memory_off_is_the_plain_decoder_bit_for_bit(switches):
    lm2, off = make(dtype=torch.float32, **switches), make(dtype=torch.float32, memory_slots=0, **switches)
    off.load_state_dict({k: v for k, v in lm2.state_dict().items() if ".memory." not in k})
    idx = tokens(2, 8)
    assert off.config.memory_type == "none" and torch.equal(off(idx)[0], plain_decoder(lm2, idx))
    assert not torch.equal(lm2(idx)[0], off(idx)[0])


def test_one_seed_gives_every_type_the_same_decoder():
    models = []
    for memory_type in TYPES:
        torch.manual_seed(5)
        models.append(LM2(LM2Config(block_size=8, vocab_size=40, n_layer=2, n_head=2, n_embd=16, memory_type=memory_type)))
    for name, weight in models[2].state_dict().items():
        assert all(torch.equal(weight, m.state_dict()[name]) for m in models), name


# ----------------------------------------------------------------------------- Llama's files

@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied, kv, scaled", [(True, 4, False), (False, 2, True), (True, 1, True)])
def test_from_llama_is_the_llama_that_transformers_saved(tied, kv, scaled, dtype, tmp_path):
    transformers = pytest.importorskip("transformers", reason="compares with transformers' Llama where it is installed")
    rope = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    torch.manual_seed(0)
    llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=300, hidden_size=64, intermediate_size=160, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=kv,
        tie_word_embeddings=tied, max_position_embeddings=512, rope_parameters={"rope_theta": 10000.0, **(rope if scaled else {"rope_type": "default"})}))
    llama.to(dtype).save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    llama = transformers.LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    model, idx = LM2.from_llama(tmp_path, block_size=200), torch.randint(300, (2, 200))
    torch.testing.assert_close(model(idx)[0], llama(idx).logits, rtol=1e-5, atol=1e-5)


def llama_folder(path, dtype="F32", **config):
    """A random Llama as Hugging Face would keep it, written here; and its weights under their names."""
    path.mkdir(exist_ok=True)
    config = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
              "num_key_value_heads": 2, "vocab_size": 50, "rope_theta": 10000.0, "tie_word_embeddings": False, **config}
    (path / "config.json").write_text(json.dumps(config))
    C, F, kv, V = 32, 48, 16, config["vocab_size"]
    shapes = {"model.embed_tokens.weight": (V, C), "model.norm.weight": (C,), "lm_head.weight": (V, C)}
    for i in range(2):
        for name, shape in {"self_attn.q_proj": (C, C), "self_attn.k_proj": (kv, C), "self_attn.v_proj": (kv, C), "self_attn.o_proj": (C, C),
                            "mlp.gate_proj": (F, C), "mlp.up_proj": (F, C), "mlp.down_proj": (C, F), "input_layernorm": (C,),
                            "post_attention_layernorm": (C,)}.items():
            shapes[f"model.layers.{i}.{name}.weight"] = shape
    g = torch.Generator().manual_seed(1)
    weights = {name: torch.randn(shape, generator=g) * 0.2 for name, shape in shapes.items()}
    header, data = {"__metadata__": {"format": "pt"}}, b""
    for name, w in weights.items():
        raw = w.to(DTYPES[dtype]).view(torch.uint8).numpy().tobytes()
        header[name] = {"dtype": dtype, "shape": list(w.shape), "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    safetensors(path / "model.safetensors", header, data)
    return header, data, weights


def safetensors(path, header, data, length=None):
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(header) if length is None else length).to_bytes(8, "little") + header + data)


@pytest.mark.parametrize("dtype", DTYPES)
def test_grafted_memory_changes_no_logit_and_learns(dtype, tmp_path):
    _, _, weights = llama_folder(tmp_path, dtype)
    idx = torch.randint(50, (2, 48), generator=torch.Generator().manual_seed(0))
    plain, grafted = LM2.from_llama(tmp_path, block_size=16), LM2.from_llama(tmp_path, block_size=16, memory_slots=4)
    assert torch.equal(plain.blocks[1].mlp.w3.weight, weights["model.layers.1.mlp.up_proj.weight"].to(DTYPES[dtype]).float())
    assert (grafted.unroll(idx)[0] - plain.unroll(idx)[0]).abs().max() <= 1e-3
    for steps in range(2):  # the gain learns at once, and everything behind it from the second step on
        _, loss, _ = grafted.unroll(idx, idx.roll(-1, 1))
        loss.backward()
        for name, p in grafted.named_parameters():
            assert p.grad is not None and (bool(p.grad.abs().sum() > 0) == (steps == 1 or "memory" not in name or name.endswith("gain"))), name
        with torch.no_grad():
            for p in grafted.parameters():
                p -= 0.1 * p.grad
                p.grad = None


def test_llama_with_fewer_tokens_keeps_the_first(tmp_path):
    llama_folder(tmp_path)
    whole, part = LM2.from_llama(tmp_path, block_size=8), LM2.from_llama(tmp_path, block_size=8, vocab_size=40)
    idx = torch.arange(8)[None]
    torch.testing.assert_close(part(idx)[0], whole(idx)[0][..., :40])
    with pytest.raises(ValueError, match="knows 50 tokens, and the text 60"):
        LM2.from_llama(tmp_path, vocab_size=60)


BIG = 2**60


@pytest.mark.parametrize("lie", [
    lambda h, d: (h, d[:-1]), lambda h, d: (h, d + b"x"), lambda h, d: (h, b""), lambda h, d: (b"", d), lambda h, d: (b"[" * 10**5, d), lambda h, d: (b"[]", d),
    lambda h, d: (b"{not json", d), lambda h, d: (b"\xff", d), lambda h, d: ({**h, "a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}, d),
    lambda h, d: ({**h, "a": {"dtype": "F32", "shape": [BIG], "data_offsets": [len(d), len(d) + 4 * BIG]}}, d),
    lambda h, d: ({**h, "a": {"dtype": "F32", "shape": [BIG, BIG, 0], "data_offsets": [len(d) + 8, len(d) + 8]}}, d),
    lambda h, d: ({**h, "a": {"dtype": "F64", "shape": [1], "data_offsets": [len(d), len(d) + 8]}}, d + bytes(8)),
    lambda h, d: ({**h, "a": {"dtype": "F32", "shape": [-1], "data_offsets": [len(d), len(d) - 4]}}, d),
    lambda h, d: ({**h, "a": {"dtype": "F32", "shape": 1, "data_offsets": [len(d), len(d) + 4]}}, d + bytes(4)),
    lambda h, d: ({**h, "a": {"dtype": "F32", "shape": [1.0], "data_offsets": [len(d), len(d) + 4]}}, d + bytes(4)),
    lambda h, d: ({**h, "a": {"dtype": "F32", "shape": [1], "data_offsets": ["0", None]}}, d), lambda h, d: ({**h, "a": 1}, d),
    lambda h, d: ({**h, "a": {"dtype": "F32", "shape": [1], "data_offsets": [len(d), len(d) + 4]}}, d + bytes(4)),
    lambda h, d: ({k: v for k, v in h.items() if "lm_head" not in k}, d[: -50 * 32 * 4 * 2])])
def test_safetensors_that_lie_are_refused_in_one_line(lie, tmp_path):
    header, data, _ = llama_folder(tmp_path)
    safetensors(tmp_path / "model.safetensors", *lie(header, data))
    with pytest.raises(ValueError, match="model.safetensors") as e:
        LM2.from_llama(tmp_path, block_size=8)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("length", [0, BIG, 2**64 - 1, 10**8])
def test_safetensors_whose_header_has_another_length_are_refused(length, tmp_path):
    header, data, _ = llama_folder(tmp_path)
    safetensors(tmp_path / "model.safetensors", header, data, length)
    with pytest.raises(ValueError, match="header would end at byte"):
        LM2.from_llama(tmp_path, block_size=8)
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="is not a whole .safetensors file"):
        LM2.from_llama(tmp_path, block_size=8)


@pytest.mark.parametrize("change, complaint", [
    ({"model_type": "mistral"}, "model_type"), ({"head_dim": 4}, "head_dim"), ({"attention_bias": True}, "attention_bias"),
    ({"rope_scaling": {"type": "yarn"}}, "rope_type"), ({"hidden_act": "gelu"}, "hidden_act"), ({"hidden_size": "x"}, "TypeError|ValueError"),
    ({"hidden_size": 64}, "has shape"), ({"num_hidden_layers": 3}, "none holds blocks.2"), ({"num_hidden_layers": 1}, "no weight of this Llama")])
def test_another_model_than_a_llama_is_refused(change, complaint, tmp_path):
    llama_folder(tmp_path, **change)
    with pytest.raises(ValueError, match=complaint) as e:
        LM2.from_llama(tmp_path, block_size=8)
    assert "\n" not in str(e.value)


LOAD = """
import re, sys
sys.path.insert(0, sys.argv[1])
from model import LM2, LM2Config
def peak():
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
LM2(LM2Config(block_size=8, n_layer=1, n_embd=64, n_head=4, vocab_size=50))  # whatever the first model loads besides
before = peak()
model = LM2.from_llama(sys.argv[2], block_size=8)
print((peak() - before) / (4 * model.num_params()))
"""


@pytest.mark.parametrize("dtype", ["F32", "BF16"])
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_loading_takes_little_more_than_the_weights(dtype, tmp_path):
    C, F, L, V = 1024, 4096, 4, 4096
    config = {"model_type": "llama", "hidden_size": C, "intermediate_size": F, "num_hidden_layers": L, "num_attention_heads": 16, "vocab_size": V,
              "tie_word_embeddings": True}
    (tmp_path / "config.json").write_text(json.dumps(config))
    names = {"model.embed_tokens": (V, C), "model.norm": (C,)}
    for i in range(L):
        names.update({f"model.layers.{i}.self_attn.{x}_proj": (C, C) for x in "qkvo"})
        names.update({f"model.layers.{i}.mlp.{x}_proj": (F, C) if x != "down" else (C, F) for x in ("gate", "up", "down")})
        names.update({f"model.layers.{i}.{x}_layernorm": (C,) for x in ("input", "post_attention")})
    header, end, item = {}, 0, DTYPES[dtype].itemsize
    for name, shape in names.items():
        header[name + ".weight"] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end := end + math.prod(shape) * item]}
    safetensors(tmp_path / "model.safetensors", header, bytes(end))
    done = subprocess.run([sys.executable, "-c", LOAD, str(ROOT), str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert 0.9 < float(done.stdout) < 1.3


def test_the_papers_size():
    with torch.device("meta"):
        model = LM2(LM2Config(block_size=2048, n_layer=16, n_head=32, n_kv_head=8, n_embd=2048, intermediate_size=8192, memory_slots=2048, vocab_size=128256))
    d, kv = 2048, 512
    block = 2 * d * d + 2 * d * kv + 3 * d * 8192 + 2 * d  # W_Q, W_O; W_K, W_V; feed-forward; norms
    memory = 6 * d * d + 2 * d * kv + 4 * d  # W_out, W_c, W_in, U_in, W_forget, U_forget; D_K, D_V; three biases, salience
    assert model.num_params(memory=False) == 128256 * d + 16 * block + d == 1_235_814_400
    assert model.num_params() - model.num_params(memory=False) == 16 * memory == 436_338_688


# ----------------------------------------------------------------------------- segments and memory

@pytest.mark.parametrize("memory_type", TYPES)
def test_causality_within_and_across_segments(memory_type):
    model, idx = make(memory_type=memory_type), tokens(1, 27)
    logits, _, _ = model.unroll(idx)
    for t in (0, 5, 7, 8, 13, 16, 26):
        changed = idx.clone()
        changed[0, t] = (changed[0, t] + 1) % 40
        other, _, _ = model.unroll(changed)
        assert torch.equal(logits[:, :t], other[:, :t])
        assert not torch.equal(logits[:, t], other[:, t])
        assert t // 8 == 3 or (memory_type == "none") == torch.equal(logits[:, 24:], other[:, 24:])
        if t >= 8:  # and the memory that earlier segments wrote does not change
            assert torch.equal(model.unroll(idx[:, : t // 8 * 8])[2], model.unroll(changed[:, : t // 8 * 8])[2])


@pytest.mark.parametrize("memory_type, bptt, arrives", [("lm2", 0, True), ("rmt", 0, True), ("none", 0, False),
                                                        ("lm2", 1, False), ("lm2", 3, False), ("lm2", 4, True)])
def test_gradient_reaches_the_first_segment(memory_type, bptt, arrives):
    model = make(memory_type=memory_type)
    first = torch.arange(8)[None]  # tokens that appear in the first of four segments only
    idx = torch.cat((first, 8 + tokens(1, 24) % 32), dim=1)
    targets = torch.full_like(idx, -1)
    targets[:, -4:] = 3
    _, loss, _ = model.unroll(idx, targets, bptt_segments=bptt)
    loss.backward()
    assert bool(model.embed.weight.grad[:8].abs().sum() > 0) == arrives


@pytest.mark.parametrize("memory_type", TYPES)
def test_unroll_equals_two_calls_cut_at_a_border(memory_type, tmp_path):
    model, idx = make(memory_type=memory_type), tokens(2, 30)
    logits, _, memory = model.unroll(idx)
    first, _, carried = model.unroll(idx[:, :16])
    torch.save(carried, tmp_path / "memory.pt")
    second, _, end = model.unroll(idx[:, 16:], memory=torch.load(tmp_path / "memory.pt", weights_only=True))
    assert torch.equal(logits, torch.cat((first, second), dim=1)) and torch.equal(memory, end)
    assert torch.equal(memory, model.unroll(idx[:, :24])[2])  # the unfinished segment has not written


@pytest.mark.parametrize("memory_type", TYPES)
def test_only_a_full_segment_writes(memory_type):
    model = make(memory_type=memory_type)
    memory = model.initial_memory(2)
    assert torch.equal(model(tokens(2, 7), memory=memory)[2], memory)
    assert torch.equal(model(tokens(2, 8), memory=memory)[2], memory) == (memory_type == "none")


def test_rmt_is_memory_tokens_around_the_segment():
    model, idx = make(memory_type="rmt"), tokens(2, 8)
    M = torch.randn(1, 2, 3, 16)
    x = torch.cat((M[0].double(), model.embed(idx), M[0].double()), dim=1)
    for block in model.blocks:
        x, _ = block(x, (model.cos, model.sin))
    x = model.norm(x)
    logits, _, memory = model(idx, memory=M)
    torch.testing.assert_close(logits, model.head(x[:, 3:11]))
    torch.testing.assert_close(memory[0], x[:, 11:].float())


def test_memory_stays_float32_under_bfloat16():
    model = make(dtype=torch.float32)
    for block in model.blocks:  # all claims are equal then: where two are close, rounding may decide who gets which slot
        block.memory.salience.data.zero_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits, loss, memory = model.unroll(tokens(2, 16), tokens(2, 16))
    assert memory.dtype == torch.float32 and logits.dtype == torch.bfloat16 and loss.dtype == torch.float32
    exact = model.unroll(tokens(2, 16))[2]
    assert (memory - exact)[..., :-1].abs().max() < 0.05
    assert torch.equal(memory[..., -1], exact[..., -1])  # ages are whole numbers


def test_segment_longer_than_block_size_is_refused():
    with pytest.raises(ValueError, match="holds 8 tokens, not 9"):
        make()(tokens(1, 9))


# ----------------------------------------------------------------------------- loss

def test_loss_ignores_minus_one_and_weighs_the_rest():
    model, idx, targets = make(), tokens(2, 16), tokens(2, 16, seed=2)
    targets[0, 3:9] = -1
    weights = torch.rand(2, 16, dtype=torch.float64)
    logits, loss, _ = model.unroll(idx, targets, weights=weights)
    total = norm = 0.0
    for b in range(2):
        for t in range(16):
            if targets[b, t] >= 0:
                total += (weights[b, t] * -logits[b, t].log_softmax(0)[targets[b, t]]).item()
                norm += float(weights[b, t])
    assert loss.item() == pytest.approx(total / norm, rel=1e-5)
    plain = model.unroll(idx, targets)[1]
    assert torch.equal(plain, model.unroll(idx, targets, weights=torch.full((2, 16), 2.0))[1])


def gradients(model, *args, **kwargs):
    model.zero_grad()
    logits, loss, memory = model.unroll(*args, **kwargs)
    (loss + memory.sum()).backward()
    return logits, loss, memory, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("memory_type", ["lm2", "rmt", "none"])
def test_cheaper_ways_compute_the_same(memory_type):
    model, idx, targets = make(memory_type=memory_type), tokens(2, 32), tokens(2, 32, seed=2)
    targets[:, ::3] = -1
    weights = torch.rand(2, 32, dtype=torch.float64)
    logits, loss, memory, grads = gradients(model, idx, targets, weights=weights)
    again = gradients(model, idx, targets, weights=weights, checkpoint_segments=True)
    assert torch.equal(logits, again[0]) and torch.equal(memory, again[2])
    some = tokens(2, 32, seed=3) < 5
    few = gradients(model, idx, targets, weights=weights, logits_at=some)
    both = gradients(model, idx, targets, weights=weights, logits_at=some, checkpoint_segments=True)
    torch.testing.assert_close(few[0], logits[some])
    model.compile(backend="eager")
    compiled = gradients(model, idx, targets, weights=weights)
    torch.testing.assert_close(compiled[0], logits)
    for _, other, _, others in (again, few, both, compiled):
        torch.testing.assert_close(other, loss)
        torch.testing.assert_close(others, grads)


def test_checkpointed_segments_keep_less():
    """What the backward pass keeps grows with the number of segments by their last states alone."""
    def kept(S, **kwargs):
        sizes = {}
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.update({t.data_ptr(): t.numel()}) or t, lambda t: t):
            model.unroll(tokens(2, 8 * S), tokens(2, 8 * S), **kwargs)
        return sum(sizes.values())

    model = make()
    plain, checkpointed = (kept(9, **kwargs) - kept(5, **kwargs) for kwargs in ({}, {"checkpoint_segments": True}))
    assert checkpointed < 0.2 * plain


@pytest.mark.parametrize("memory_type", ["lm2", "rmt", "none"])  # in one process: they share their code
@torch._dynamo.config.patch(recompile_limit=64)
def test_compiled_once_for_all_segments_batches_and_memories(memory_type):
    graphs, model = [], make(memory_type=memory_type)

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    model.compile(backend=backend)
    for B, S in (4, 1), (2, 3), (5, 2), (3, 4):
        loss = gradients(model, tokens(B, 8 * S), tokens(B, 8 * S))[1]
    loaded = model.unroll(tokens(3, 16))[2].detach().clone()
    gradients(model, tokens(3, 8), tokens(3, 8), memory=loaded)
    assert loss.isfinite() and len(graphs) == 2  # a segment, the loss
    with torch.no_grad():
        model.unroll(tokens(3, 16))
        model.unroll(tokens(4, 8), memory=model.unroll(tokens(4, 32))[2])
        model.generate(tokens(2, 21), 3)
    assert len(graphs) == 3


def test_loss_without_a_target_is_zero_with_zero_gradient():
    model = make()
    _, loss, _ = model(tokens(2, 8), torch.full((2, 8), -1))
    loss.backward()
    assert loss.item() == 0 and model.embed.weight.grad.abs().sum() == 0


# ----------------------------------------------------------------------------- generation

@pytest.mark.parametrize("memory_type", TYPES)
@pytest.mark.parametrize("length", [1, 7, 8, 9, 24, 29])
def test_greedy_generation_is_the_argmax_of_unroll(memory_type, length):
    model, idx = make(memory_type=memory_type), tokens(2, length)
    out, (memory, tail) = model.generate(idx, 20, temperature=0)
    logits, _, _ = model.unroll(out)
    assert torch.equal(out[:, :length], idx) and out.shape == (2, length + 20)
    assert torch.equal(out[:, length:], logits[:, length - 1 : -1].argmax(-1))
    written = (out.size(1) - 1) // 8 * 8
    assert torch.equal(tail, out[:, written:])
    torch.testing.assert_close(memory, model.unroll(out[:, :written])[2] if written else model.initial_memory(2))


@pytest.mark.parametrize("memory_type", TYPES)
def test_generation_in_pieces_is_generation_at_once(memory_type):
    model, idx = make(memory_type=memory_type), tokens(2, 13)
    whole, _ = model.generate(idx, 12, temperature=0)
    _, state = model.generate(idx[:, :5], 0)
    out, state = model.generate(idx[:, 5:], 3, state, temperature=0)
    for _ in range(9):
        token, state = model.generate(idx[:, :0], 1, state, temperature=0)
        out = torch.cat((out, token), dim=1)
    assert torch.equal(whole[:, 5:], out)


def test_sampling_options():
    model, idx, seen = make(), tokens(2, 5), []
    assert torch.equal(model.generate(idx, 9, top_k=1)[0], model.generate(idx, 9, temperature=0)[0])
    torch.manual_seed(0)
    a = model.generate(idx, 30)[0]
    torch.manual_seed(0)
    assert torch.equal(a, model.generate(idx, 30)[0]) and not torch.equal(a, model.generate(idx, 30)[0])
    out, _ = model.generate(idx, 30, temperature=0, on_token=lambda token: seen.append(token) or len(seen) == 4)
    assert out.size(1) == 9 and torch.equal(out[:, 5:], torch.cat(seen, dim=1))
    with pytest.raises(ValueError, match="nothing to continue"):
        model.generate(idx[:, :0], 1)


# ----------------------------------------------------------------------------- the rest

@pytest.mark.parametrize("bad, word", [
    ({"memory_type": "lstm"}, "memory_type"), ({"n_layer": 0}, "n_layer"), ({"memory_slots": -1}, "memory_slots"),
    ({"n_embd": 30, "n_head": 4}, "n_embd"), ({"n_head": 4, "n_kv_head": 3}, "n_kv_head"), ({"n_memory_layers": 9}, "n_memory_layers"),
    ({"memory_top_k": 17}, "memory_top_k"), ({"rope_theta": 0.0}, "rope_theta"), ({"forget_bias": math.nan}, "forget_bias")])
def test_bad_config_is_one_clear_sentence(bad, word):
    with pytest.raises(ValueError, match=word) as e:
        LM2Config(**{"n_embd": 64, "n_head": 4, **bad})
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("muon_lr", [0.0, 0.02])
@pytest.mark.parametrize("memory_type", TYPES)
def test_optimizers_hold_every_parameter_once(memory_type, muon_lr):
    model = make(memory_type=memory_type, dtype=torch.float32)
    optimizers = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), muon_lr)
    held = [p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
    assert len(held) == len({id(p) for p in held}) == len(list(model.parameters()))
    assert all(group["weight_decay"] == 0 for o in optimizers for group in o.param_groups if any(p.dim() < 2 for p in group["params"]))


@pytest.mark.parametrize("memory_slots", [0, 4, 16])
def test_mfu_counts_the_flops_of_the_matrix_products(memory_slots):
    """Against torch's own count of a training step."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode
    model, idx = make(dtype=torch.float32, n_embd=64, block_size=32, memory_slots=memory_slots), tokens(2, 32 * 8)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):  # it cannot count the fused kernel
        model.unroll(idx, idx)[1].backward()
    assert estimate_mfu(model, idx.numel(), 1.0, counter.get_total_flops()) == pytest.approx(1.0, rel=0.02)
