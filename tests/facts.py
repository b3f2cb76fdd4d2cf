"""
Which facts does each block write? Those that the answer needs, all others, and the haystack, in %,
task by task. A fact counts if one of its chunks is written.

$ python tests/facts.py assets/ten-tasks.pt --length=1k
"""
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

import prepare_babilong as babilong  # noqa: E402
from train import load_checkpoint, load_model, number, pick_device  # noqa: E402


@torch.no_grad()
def count(model, sample):
    """(3, 1 + L): needed facts, other facts, haystack's chunks; all, and those each block writes."""
    T, w = model.config.block_size, model.config.chunk_size
    S = sample.prompt // T  # the segments before the question's
    memory = model.initial_memory(1)
    written = [np.zeros((len(memory), 0), dtype=bool)]
    idx = torch.from_numpy(sample.tokens[: S * T]).to(memory.device).view(1, S, T)
    for at in range(0, S, 256):
        _, memory, log_odds = model.segments(model.embed(idx[:, at : at + 256]), memory)
        written.append(log_odds.flatten(1).cpu().numpy() > 0)
    written = np.concatenate(written, axis=1)  # (L, S*J)
    hay, counts = np.ones(written.shape[1], dtype=bool), np.zeros((3, 1 + len(written)), dtype=int)
    for i, (start, end) in sample.facts.items():
        chunks = slice(start // w, (end - 1) // w + 1)
        hay[chunks] = False
        if end <= S * T:
            counts[int(i not in sample.support)] += [1, *written[:, chunks].any(axis=1)]
    counts[2] = [hay.sum(), *written[:, hay].sum(axis=1)]
    return counts


def main():
    parser = babilong.Parser("Which facts does each block write?")
    parser.add_argument("out_dir", help="folder of a run of train.py, or a model's file")
    parser.add_group("flags")
    parser.flag("data_dir", "data/babilong", "folder of prepare_babilong.py")
    parser.flag("length", "1k", "of the samples, as in BABILong", babilong.length)
    parser.flag("samples", 50, "of each task", number(int, 1, 10**6))
    args = parser.parse_args()
    run = load_checkpoint(args.out_dir)
    model, _ = load_model(run, pick_device("auto"))
    if not run["args"]["tasks"] or run["config"]["memory_type"] != "lm2":
        raise ValueError(f"{args.out_dir} is no LM2 that learned stories")
    _, data, meta = babilong.load_data(args.data_dir, model.config.block_size, run["tokenizer"])
    if missing := set(run["args"]["tasks"]) - data.stories.keys():
        raise ValueError(f"{args.data_dir} holds no {min(missing)}: prepare it with --tasks")
    print("     needed    needed facts / others / haystack written, in %, block by block")
    for task in run["args"]["tasks"]:
        samples = (data.sample(task, meta["seed"], i, length=args.length) for i in range(args.samples))
        total, *blocks = sum(count(model, sample) for sample in samples).T
        shares = ["/".join(f"{100 * n / of:.1f}" if of else "-" for n, of in zip(block, total)) for block in blocks]
        print(f"{task:<5} {total[0]:5d}     {'  '.join(shares)}")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as e:
        sys.exit(f"facts.py: error: {e}")
