"""
How fast it is, and where the time goes: one table after the other, on the CPU or a GPU.

$ python tests/bench.py --rounds=4             # all of it: about 15 minutes on two cores
$ python tests/bench.py train block            # some of it: train, block, segments, stream, generate, data, profile
$ python tests/bench.py gpt2 --device=cuda     # 124 M parameters, compiled, bfloat16: the share of the GPU's peak

What is compared runs in turns in one process: each figure is the median of the rounds, with the lowest and the highest, and a
ratio is the median of the rounds' ratios. Peak memory on a CPU is that of a process of its own that does nothing else.
"""
import multiprocessing
import os
import resource
import statistics
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch

COMPILED = tempfile.TemporaryDirectory()  # an empty cache: what a first compilation costs shall show
os.environ["TORCHINDUCTOR_CACHE_DIR"] = COMPILED.name

sys.path.insert(0, str(Path(__file__).parent.parent))

import prepare_babilong as babilong  # noqa: E402
import train  # noqa: E402
from model import LM2, Block, LM2Config  # noqa: E402

PEAK = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "4090": 165e12}  # dense bfloat16, FLOP/s
PAPER = dict(block_size=512, n_layer=6, n_head=6, n_embd=384, vocab_size=2048, memory_slots=16, tie_embeddings=False)
MAIN = dict(block_size=64, n_layer=3, n_head=4, n_embd=96, vocab_size=2048, memory_slots=16, tie_embeddings=False,
            qk_norm=True, token_shift=True)
GPT2 = dict(block_size=1024, n_layer=12, n_head=12, n_embd=768, vocab_size=50304, memory_slots=16)


def sync(device):
    if device.type == "cuda":
        torch.cuda.synchronize()


def build(device, compiled=False, **config):
    torch.manual_seed(0)
    model = LM2(LM2Config(**config)).to(device)
    if compiled:
        model.compile()
    return model


def training_step(model, B, S, bfloat16=False, **how):
    """A function of one forward and backward pass over B texts of S segments, without an optimizer."""
    device, c = model.embed.weight.device, model.config
    idx = torch.randint(c.vocab_size, (B, S * c.block_size), generator=torch.Generator().manual_seed(0)).to(device)
    targets = idx.roll(-1, dims=1)
    nowhere = torch.zeros_like(idx, dtype=torch.bool)

    def step():
        with torch.autocast(device.type, dtype=torch.bfloat16) if bfloat16 else nullcontext():
            loss = model.unroll(idx, targets, logits_at=nowhere, **how)[1]
        loss.backward()
        model.zero_grad(set_to_none=True)
        sync(device)

    step.tokens = idx.numel()
    return step


def in_turns(steps, rounds):
    """Seconds of each step function of {name: function}, {name: [one per round]}, and of its first call, {name: seconds}."""
    seconds, first = {name: [] for name in steps}, {}
    for r in range(rounds + 1):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            if r:
                seconds[name].append(time.perf_counter() - start)
            else:
                first[name] = time.perf_counter() - start
    return seconds, first


def spread(values, digits=0):
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f}-{max(values):.{digits}f})"


def ratio(a, b, digits=2):
    return spread([x / y for x, y in zip(a, b)], digits)


def table(title, header, rows):
    rows = [header, ["---"] * len(header), *rows]
    print(f"\n{title}\n\n" + "\n".join("| " + " | ".join(map(str, row)) + " |" for row in rows), flush=True)


def megabytes():
    """The most that this process has taken so far. Linux hands getrusage's figure on to children, so the other one is better."""
    status = Path("/proc/self/status")
    if status.exists():
        return int(status.read_text().split("VmHWM:")[1].split()[0]) / 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def beyond(function, args):
    before = megabytes()
    function(*args)
    return megabytes() - before


def peak(device, function, *args):
    """MB that function(*args) takes at most: of the GPU, or of a fresh process beyond what importing everything took."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        function(*args)
        return torch.cuda.max_memory_allocated() / 2**20
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(beyond, function, args).result()


def estimate_mfu(model, tokens, seconds, peak_flops):
    """Model FLOPs utilisation: the share of peak_flops (a second's) that training took. RMT's own tokens do not count."""
    c, attn = model.config, model.blocks[0].attn
    banks = [block.memory for block in model.blocks if block.memory is not None]
    L, chunks = len(banks), len(banks[0].chunks) if banks else 0
    decoder = model.num_params(memory=False) - (0 if c.tie_embeddings else model.embed.weight.numel())
    write, keys_and_values = 5 * c.n_embd**2 * chunks, (attn.wk.weight.numel() + attn.wv.weight.numel()) * c.memory_slots
    per_token = decoder + L * (c.n_embd**2 + (write + keys_and_values) / c.block_size)  # with the output gate
    attended = c.n_layer * c.block_size + L * c.memory_slots  # self-attention; read
    return (6 * per_token + 12 * attended * c.n_embd) * tokens / seconds / peak_flops


def train_once(device, config, B, S, bfloat16, how):
    step = training_step(build(device, **config), B, S, bfloat16, **how)
    step()
    step()


# -----------------------------------------------------------------------------

def compare_training(device, rounds, config, B, S, compiled=(False, True), dtypes=(False, True)):
    steps, rows, models = {}, [], {}
    for bfloat16 in dtypes:
        for c in compiled:
            for kind in "none", "lm2", "rmt":
                models[kind, c, bfloat16] = build(device, c, **{**config, "memory_type": kind})
                steps[kind, c, bfloat16] = training_step(models[kind, c, bfloat16], B, S, bfloat16)
    seconds, first = in_turns(steps, rounds)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    flops = next((f for gpu, f in PEAK.items() if gpu in name), None)
    for (kind, c, bfloat16), s in seconds.items():
        eager = seconds.get((kind, False, bfloat16))
        gain = statistics.median(eager) - statistics.median(s) if c and eager else 0
        tokens, model = steps[kind, c, bfloat16].tokens, models[kind, c, bfloat16]
        rows.append([kind, "bfloat16" if bfloat16 else "float32", "compiled" if c else "eager", f"{model.num_params() / 1e6:.1f} M",
                     spread([1000 * x for x in s]), spread([tokens / x for x in s]), ratio(seconds["none", c, bfloat16], s),
                     f"{100 * estimate_mfu(model, tokens, statistics.median(s), flops):.0f} %" if flops and bfloat16 else "-",
                     f"{peak(device, train_once, device, {**config, 'memory_type': kind}, B, S, bfloat16, {}):.0f}" if not c else "-",
                     f"{first[kind, c, bfloat16]:.0f} s" if c else "-",
                     f"{first[kind, c, bfloat16] / gain:.0f}" if gain > 0 else "never" if c and eager else "-"])
    c = LM2Config(**config)
    table(f"Training: {c.n_layer} blocks, width {c.n_embd}, block {c.block_size}, {c.memory_slots} slots, vocabulary {c.vocab_size}, {B} texts of "
          f"{S} segments, forward and backward", ["memory", "dtype", "how", "parameters", "ms", "tokens/s", "tokens/s, of none's", "MFU",
                                                  "peak MB", "first step", "pays after steps"], rows)


def bench_train(device, rounds):
    compare_training(device, rounds, PAPER, 2, 2)
    compare_training(device, rounds, MAIN, 16, 4, dtypes=(False,))


def bench_gpt2(device, rounds):
    cuda = device.type == "cuda"
    compare_training(device, rounds, GPT2, 16 if cuda else 1, 2, (cuda,), (True,))


def block_step(device, memory_slots, intermediate_size, C=2048, T=2048):
    """Forward and backward of one block, with a memory that is read and written or without one."""
    torch.manual_seed(0)
    config = LM2Config(block_size=T, n_layer=1, n_head=32, n_kv_head=8, n_embd=C, vocab_size=256, memory_slots=memory_slots,
                       intermediate_size=intermediate_size)
    model = LM2(config).to(device)
    block, rope = model.blocks[0], (model.cos, model.sin)
    x = torch.randn(1, T, C, device=device, requires_grad=True)
    M = model.initial_memory(1)[0].clone().requires_grad_() if memory_slots else None  # as one carried over

    def step():
        y, h = block(x, rope, M)
        (y.sum() + (block.memory.write(h, M).sum() if memory_slots else 0)).backward()
        model.zero_grad(set_to_none=True)
        x.grad = None
        sync(device)

    return step


def block_once(*args):
    block_step(*args)()


def bench_block(device, rounds):
    rows = []
    for wide in 8192, 0:  # the paper's feed-forward, and ours at this width
        seconds, _ = in_turns({slots: block_step(device, slots, wide) for slots in (0, 2048)}, rounds)
        rows += [[name, wide or 5472, spread([1000 * x for x in seconds[slots]]), ratio(seconds[slots], seconds[0]),
                  f"{peak(device, block_once, device, slots, wide):.0f}"] for name, slots in (("vanilla", 0), ("LM2", 2048))]
    table("One block as large as the paper's: width 2,048, 2,048 slots, one text of 2,048 tokens, forward and backward, float32",
          ["block", "feed-forward", "ms", "time, of vanilla's", "peak MB"], rows)


def bench_segments(device, rounds):
    model, rows = build(device, **MAIN), []
    steps = {(S, cp): training_step(model, 8, S, checkpoint_segments=cp) for cp in (False, True) for S in (2, 8, 32)}
    seconds, _ = in_turns(steps, rounds)
    each = {key: [1e6 * x / steps[key].tokens for x in s] for key, s in seconds.items()}
    for (S, cp), s in each.items():
        megabytes = peak(device, train_once, device, MAIN, 8, S, False, {"checkpoint_segments": cp})
        rows.append([S, "yes" if cp else "no", spread(s, 1), ratio(s, each[2, cp]), f"{megabytes:.0f}"])
    table("Training on more segments: the main job's model, 8 texts", ["segments", "--checkpoint_segments", "microseconds per token",
                                                                      "of that of 2 segments", "peak MB"], rows)


def read(device, tokens, at_once=2**15):
    """Streams so many tokens through the main job's model."""
    model, state, piece = build(device, **MAIN).eval(), None, torch.randint(2048, (1, at_once), device=device)
    for start in range(0, tokens, at_once):
        _, state = model.generate(piece[:, : tokens - start], 0, state)
    assert state[0].isfinite().all()
    return model, state


def bench_stream(device, rounds):
    rows, megabytes = [], {}
    for tokens in 4096, 2**20:
        start = time.perf_counter()
        read(device, tokens)
        sync(device)
        seconds = time.perf_counter() - start
        megabytes[tokens] = peak(device, read, device, tokens)
        rows.append([f"{tokens:,}", f"{tokens / seconds:.0f}", f"{megabytes[tokens]:.0f}", f"{megabytes[tokens] / megabytes[4096]:.3f}"])
    table("Reading one text as a stream, the main job's model", ["tokens", "tokens/s", "peak MB", "of that of 4,096"], rows)


def bench_generate(device, rounds):
    states = {f"{n // 1024}k": read(device, n) for n in (2**10, 2**14, 2**17)}

    def steps(model, state):
        model.generate(torch.ones(1, 1, dtype=torch.int64, device=device), 256, state)
        sync(device)

    seconds, _ = in_turns({name: partial(steps, *state) for name, state in states.items()}, rounds)
    table("Generating 256 tokens after a context, one text, the main job's model", ["context", "ms per token", "tokens/s", "time, of that after 1k"],
          [[name, spread([1000 * x / 256 for x in s], 2), spread([256 / x for x in s]), ratio(s, seconds["1k"])] for name, s in seconds.items()])


def bench_data(device, rounds):
    """Composing against computing a step of the main job, by number of segments."""
    folder = Path("data/babilong")
    if not (folder / "meta.json").exists():
        babilong.write_data(folder)
    args, _ = train.parse_args(["--data_dir=data/babilong"])
    batches, model, rows = train.Batches(babilong.load_data(folder, 64)[0], args, 0, 1), build(device, **MAIN), []
    optimizers = model.configure_optimizers(0.0, args.learning_rate, (args.beta1, args.beta2), args.muon_lr)
    for S in 1, 4, 16:
        composing, computing = [], []
        for r in range(rounds + 1):
            start = time.perf_counter()
            idx, targets, _, first = (part.to(device) for part in batches[r, S, S > 1][1])
            middle = time.perf_counter()
            model.unroll(idx, targets, logits_at=first)[1].backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            sync(device)
            composing.append(middle - start)
            computing.append(time.perf_counter() - middle)
        composing, computing = composing[1:], computing[1:]
        rows.append([S, spread([1000 * x for x in composing], 1), spread([1000 * x for x in computing]),
                     f"{100 * sum(composing) / sum(composing + computing):.1f} %"])
    table("Composing 64 segments of qa1 in the process that trains (--data_workers=0)", ["segments of a sample", "composing, ms",
                                                                                     "computing the step, ms", "share"], rows)


def bench_profile(device, rounds):
    """Where the time of a training step of the main job goes."""
    model = build(device, **MAIN)
    step = training_step(model, 16, 4)
    step()
    activities = [torch.profiler.ProfilerActivity.CPU] + [torch.profiler.ProfilerActivity.CUDA] * (device.type == "cuda")
    with torch.profiler.profile(activities=activities) as profiler:
        for _ in range(rounds):
            step()
    name = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    events = sorted(profiler.key_averages(), key=lambda e: -getattr(e, name))
    total = sum(getattr(e, name) for e in events)
    table("Where a step goes: the main job's model, 16 texts of 4 segments, forward and backward", ["operation", "calls", "share"],
          [[f"`{e.key[:60]}`", e.count // rounds, f"{100 * getattr(e, name) / total:.1f} %"] for e in events[:12]])


BENCHES = {"train": bench_train, "block": bench_block, "segments": bench_segments, "stream": bench_stream, "generate": bench_generate,
           "data": bench_data, "profile": bench_profile, "gpt2": bench_gpt2}


def main():
    parser = babilong.Parser(__doc__.split("\n\n")[0].strip())
    parser.add_argument("what", nargs="*", help=f"of {', '.join(BENCHES)}; default: all but gpt2")
    parser.add_argument("--device", default="auto", help="cuda, mps, cpu, ...; auto: the best there is")
    parser.add_argument("--rounds", type=babilong.number(int, 1), default=7, help="of each comparison, after one that does not count")
    args = parser.parse_args()
    if unknown := [w for w in args.what if w not in BENCHES]:
        parser.error(f"there is no {unknown[0]!r}: take some of {', '.join(BENCHES)}")
    device = train.pick_device(args.device)
    torch.set_float32_matmul_precision("high")
    torch._dynamo.config.recompile_limit = 64  # the models that are compared share their code
    print(f"torch {torch.__version__}, {device}, {torch.get_num_threads()} threads, {args.rounds} rounds: median (lowest-highest)")
    for what in args.what or [b for b in BENCHES if b != "gpt2"]:
        BENCHES[what](device, args.rounds)


if __name__ == "__main__":
    main()
