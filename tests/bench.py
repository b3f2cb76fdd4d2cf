"""
How fast it is: one table after the other, on the CPU or a GPU.

$ python tests/bench.py --rounds=7            # all but gpt2: about 10 minutes on two cores
$ python tests/bench.py small large           # some of it; -h lists all
$ python tests/bench.py gpt2 --device=cuda    # 124 M parameters, compiled, bfloat16

What is compared runs in turns in one process: a figure is the median of the rounds, with the lowest
and the highest, and a ratio is the median of the rounds' ratios.
"""
import resource
import statistics
import sys
import time
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parent.parent))

import prepare_babilong as babilong  # noqa: E402
import train  # noqa: E402
from model import LM2Config, build  # noqa: E402

SMALL = dict(block_size=64, n_layer=3, n_head=4, n_embd=96, vocab_size=2048, memory_slots=16,
             tie_embeddings=False, qk_norm=True, token_shift=True)  # the main job's
LARGE = dict(block_size=512, n_layer=6, n_head=6, n_embd=384, vocab_size=2048, memory_slots=16,
             tie_embeddings=False)
GPT2 = dict(block_size=1024, n_layer=12, n_head=12, n_embd=768, vocab_size=50304, memory_slots=16)


def make(device, compiled=False, **config):
    torch.manual_seed(0)
    model = build(LM2Config(**config)).to(device)
    for block in model.blocks if compiled else ():
        block.compile(dynamic=True)
    return model


def step_of(model, B, S, T, bfloat16=False):
    """A function of one forward and backward pass over B texts of S segments."""
    device = next(model.parameters()).device
    idx = torch.randint(2048, (B, S * T), generator=torch.Generator().manual_seed(0)).to(device)
    llama = hasattr(model, "generation_config")  # transformers' takes segments as a batch

    def step():
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=bfloat16):
            if llama:
                segments = idx.view(B * S, T)
                loss = model(segments, labels=segments, use_cache=False).loss
            else:
                loss = model(idx, idx.roll(-1, dims=1))[1]
        loss.backward()
        model.zero_grad(set_to_none=True)
        if device.type == "cuda":
            torch.cuda.synchronize()

    step.tokens = B * S * T
    return step


def generation_of(model, n=64):
    """A function that continues a text of two segments by n tokens, greedily."""
    idx = torch.randint(2048, (1, 2 * model.config.block_size)).to(model.rope.device)

    def step():
        model.generate(idx, n, temperature=0)

    model.eval()
    step.tokens = n
    return step


def operations(step):
    """Those of the matrix products of a step function."""
    with torch.compiler.set_stance("force_eager"), FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()


def peak(device):
    """Operations per second of a large product of float32 matrices, the most of five."""
    a = torch.randn(2048, 2048, device=device)
    seconds = []
    for _ in range(6):
        start = time.perf_counter()
        (a @ a)[0, 0].item()  # waits for a GPU
        seconds.append(time.perf_counter() - start)
    return 2 * 2048**3 / min(seconds)


def in_turns(steps, rounds):
    """Seconds of each step function of {name: function}, as {name: [one per round]}."""
    seconds = {name: [] for name in steps}
    for r in range(rounds + 1):  # the first does not count
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            seconds[name] += [time.perf_counter() - start] if r else []
    return seconds


def spread(values, digits=0):
    low, high = min(values), max(values)
    return f"{statistics.median(values):.{digits}f} ({low:.{digits}f}-{high:.{digits}f})"


def table(title, header, rows):
    lines = [header, ["---"] * len(header), *rows]
    print(f"\n{title}\n\n" + "\n".join(f"| {' | '.join(map(str, row))} |" for row in lines), flush=True)


def compare(title, steps, rounds, device):
    """A table of {name: step function}: tokens/s, ratios to the first two, share of float32's peak."""
    seconds, most = in_turns(steps, rounds), peak(device)
    first, second = list(steps)[:2]
    ratios = {name: [[x / y for x, y in zip(seconds[of], s)] for of in (first, second)]
              for name, s in seconds.items()}
    table(title, ["", "tokens/s", f"of {first}", f"of {second}", f"of {most / 1e9:.0f} GFLOP/s"],
          [[name, spread([steps[name].tokens / x for x in s]), *(spread(r, 2) for r in ratios[name]),
            f"{operations(steps[name]) / statistics.median(s) / most:.0%}"]
           for name, s in seconds.items()])


def bench_small(device, rounds):
    steps = {kind: step_of(make(device, **{**SMALL, "memory_type": kind}), 4, 16, 64)
             for kind in ("none", "rmt", "lm2")}
    compare("The main job's model, 4 texts of 16 segments of 64 tokens", steps, rounds, device)


def bench_profile(device, rounds):
    spent = []  # milliseconds of each operation in a step, without and with a memory
    for kind in "none", "lm2":
        step = step_of(make(device, **{**SMALL, "memory_type": kind}), 4, 16, 64)
        step()
        with torch.profiler.profile() as profile:
            for _ in range(rounds):
                step()
        of = f"self_{'cpu' if device.type == 'cpu' else 'device'}_time_total"
        spent.append({e.key: getattr(e, of) / 1000 / rounds for e in profile.key_averages()})
    none, lm2 = spent
    most = sorted(lm2, key=lambda name: none.get(name, 0) - lm2[name])[:8]
    rows = [[name, *(f"{part.get(name, 0):.1f}" for part in spent)] for name in most]
    rows.append(["all", *(f"{sum(part.values()):.1f}" for part in spent)])
    table("Where the time goes: the main job's model, ms of a step", ["", "none", "lm2"], rows)


def bench_large(device, rounds):
    steps = {kind: step_of(make(device, **{**LARGE, "memory_type": kind}), 2, 2, 512)
             for kind in ("none", "lm2")}
    try:
        from transformers import LlamaConfig, LlamaForCausalLM
        steps["transformers' Llama"] = step_of(LlamaForCausalLM(LlamaConfig(
            vocab_size=2048, hidden_size=384, intermediate_size=1024, num_hidden_layers=6,
            num_attention_heads=6, tie_word_embeddings=False)).to(device), 2, 2, 512)
    except ImportError:
        print("transformers is not installed: no comparison with its Llama")
    compare("6 blocks, width 384, 2 texts of 2 segments of 512 tokens", steps, rounds, device)


def bench_compiled(device, rounds):
    steps = {}
    for compiled in False, True:
        for kind in "none", "lm2":
            name = kind + ", compiled" * compiled
            model = make(device, compiled, **{**SMALL, "memory_type": kind})
            steps[name] = step_of(model, 4, 16, 64)
            start = time.perf_counter()
            steps[name]()
            print(f"{name}: first step {time.perf_counter() - start:.0f} s")
    compare("Compiled blocks: the main job's model, 4 texts of 16 segments", steps, rounds, device)


def bench_segments(device, rounds):
    steps = {}
    for again in False, True:
        for S in 2, 8, 32:
            model = make(device, **SMALL, activation_checkpointing=again)
            steps[f"{S} segments" + ", --activation_checkpointing" * again] = step_of(model, 8, S, 64)
    compare("More segments: the main job's model, 8 texts", steps, rounds, device)


def bench_generate(device, rounds):
    steps = {kind: generation_of(make(device, **{**SMALL, "memory_type": kind}))
             for kind in ("none", "rmt", "lm2")}
    compare("Generation after two segments, 64 tokens, one text", steps, rounds, device)


def bench_stream(device, rounds):
    model, rows = make(device, **SMALL).eval(), []
    for tokens in 4096, 2**20:
        state, start = None, time.perf_counter()
        for _ in range(tokens // 4096):
            _, state = model.read(torch.randint(2048, (1, 4096), device=device), state)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
        rows.append([f"{tokens:,}", f"{tokens / (time.perf_counter() - start):.0f}", peak])
    table("Reading one text as a stream", ["tokens", "tokens/s", "MB of the process so far"], rows)


def bench_gpt2(device, rounds):
    steps = {kind: step_of(make(device, True, **{**GPT2, "memory_type": kind}), 8, 4, 1024, True)
             for kind in ("none", "lm2")}
    compare("124 M parameters, compiled, bfloat16, 8 texts of 4 segments", steps, rounds, device)


BENCHES = {name.removeprefix("bench_"): function for name, function in list(globals().items())
           if name.startswith("bench_")}


def main():
    parser = babilong.Parser(__doc__.split("\n\n")[0].strip())
    parser.add_argument("what", nargs="*", help=f"of {', '.join(BENCHES)}; default: all but gpt2")
    parser.add_argument("--device", default="auto", help="cuda, mps, cpu, ...; auto: the best")
    parser.add_argument("--rounds", type=babilong.number(int, 1, 1000), default=7, help="of a comparison")
    args = parser.parse_args()
    if unknown := [what for what in args.what if what not in BENCHES]:
        parser.error(f"there is no {unknown[0]!r}: take some of {', '.join(BENCHES)}")
    device = train.pick_device(args.device)
    torch.set_float32_matmul_precision("high")
    print(f"torch {torch.__version__}, {device}, {torch.get_num_threads()} threads, "
          f"{args.rounds} rounds: median (lowest-highest)")
    for what in args.what or [name for name in BENCHES if name != "gpt2"]:
        BENCHES[what](device, args.rounds)


if __name__ == "__main__":
    try:
        main()
    except ValueError as e:
        sys.exit(f"bench.py: error: {e}")
