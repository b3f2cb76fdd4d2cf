"""
Does the memory work as a memory? How often the question mark of a held-out question reads, most of all slots, one that the fact
it asks about was written into.

$ python tests/lookup.py --out_dir=out --segments=8
"""
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

import prepare_babilong as babilong  # noqa: E402
from prepare_babilong import Parser, number  # noqa: E402
from sample import Watch  # noqa: E402
from train import load_checkpoint, load_model  # noqa: E402


def look_up(model, data, task, seed, i, segments, watch):
    """One held-out question: (how many segments ago its fact was, right, {block: whether '?' looks there}, whether a border cuts
    the fact, {block: whether a slot still holds it}, {block: (chunks written, how many of them hold nothing of a fact, how many
    of these are the first of a segment)})."""
    sample, T = data.sample(task, seed, i, segments=segments), model.config.block_size
    idx = torch.from_numpy(sample.tokens[: sample.prompt])[None]
    for written in watch.written.values():
        written.clear()
    _, (memory, tail) = model.generate(idx, 0)
    out, _ = model.generate(idx[:, :0], data.room[task], (memory, tail), temperature=0)
    right = babilong.score(task, sample.question, sample.target, data.encoding.decode(out[0].tolist()))
    start, end = sample.facts[sample.support[-1]]
    segment = (end - 1) // T  # where the fact ends, there is the place
    places = set(range(max(start - segment * T, 0), end - segment * T))
    model.segment(tail, memory)
    looked, kept, needless = {}, {}, {}
    facts = {t for a, b in sample.facts.values() for t in range(a, b)}
    for n, A in watch.attention.items():
        written, place = watch.written[n][:segments - 1], model.blocks[n - 1].memory.chunks.tolist()
        claims = [(s, chunk) for s, slots in enumerate(written) for chunk in slots.tolist() if chunk >= 0]
        without = [chunk for s, chunk in claims if not any(s * T + t in facts for t in place[chunk])]
        needless[n] = len(claims), len(without), without.count(0)
        chunks = [] if segment == segments - 1 else written[segment].tolist()
        slots = [slot for slot, chunk in enumerate(chunks) if chunk >= 0 and places & set(place[chunk])
                 and all(later[slot] < 0 for later in written[segment + 1 :])]
        looked[n], kept[n] = A[-1].argmax().item() in slots, bool(slots)
    return segments - 1 - segment, bool(right), looked, start // T != segment, kept, needless


@torch.no_grad()
def main():
    parser = Parser("How often a question reads the slot of the fact that it asks about.")
    parser.add_argument("--out_dir", default="out", help="folder that train.py left")
    parser.add_argument("--segments", type=number(int, 2, 1000), default=8, help="of each text")
    parser.add_argument("--samples", type=number(int, 1, 10**6), default=500, help="held-out questions of the first task it was trained on")
    args = parser.parse_args()
    checkpoint = load_checkpoint(args.out_dir)
    model, encoding = load_model(checkpoint, "cpu")
    _, data, meta = babilong.load_data(checkpoint["args"]["data_dir"], model.config.block_size)
    banks = [n for n, block in enumerate(model.blocks, start=1) if block.memory is not None]
    watch, task = Watch(model, encoding, banks, False), checkpoint["args"]["tasks"][0]
    found = [look_up(model, data, task, meta["seed"], i, args.segments, watch) for i in range(args.samples)]
    blocks = "".join(f"  block {n}" for n in banks)
    print(f"fact lies back  questions  right in %  its slot looked up, in %:{blocks}  still in a slot, in %:{blocks}")
    for title, rows in [*((f"{age} segments", [r for r in found if r[0] == age]) for age in range(args.segments)),
                        ("1 or more", [r for r in found if r[0]]), ("whole fact", [r for r in found if not r[3]]),
                        ("cut fact", [r for r in found if r[3]]), ("whole, wrong", [r for r in found if r[0] and not r[3] and not r[1]])]:
        if rows:
            looked, kept = ("".join(f"{100 * sum(r[i][n] for r in rows) / len(rows):9.1f}" for n in banks) for i in (2, 4))
            print(f"{title:<14}{len(rows):11d}  {100 * sum(r[1] for r in rows) / len(rows):10.1f}{'':27}{looked}{'':25}{kept}")
    for n in banks:
        written, needless, first = (sum(r[5][n][i] for r in found) / len(found) for i in range(3))
        print(f"block {n} writes {written:.1f} chunks of a text, {needless:.1f} of them without a word of a fact, "
              f"{first:.1f} of these the first of a segment")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as e:
        sys.exit(f"lookup.py: error: {e}")
