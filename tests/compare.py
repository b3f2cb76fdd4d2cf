"""
Puts several results.json of train.py side by side, as Markdown. Runs that differ in nothing but their seed are one column.

$ python tests/compare.py out/results.json out-none/results.json
$ python tests/compare.py --kind=outside out-*/results.json      # only questions about what lies outside the window
$ python tests/compare.py --task=qa1 out-*/results.json          # one task instead of the average
$ python tests/compare.py --curve out-*/results.json             # the learning curves, from log.jsonl beside each file
$ python tests/compare.py --plot=accuracy.svg out-*/results.json # accuracy by length, as a picture
$ python tests/compare.py --figure5=blocks.svg out-*/results.json        # perplexity by number of blocks with memory
"""
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from prepare_babilong import Parser, write_file  # noqa: E402
from train import average, chart, kept_flags, svg  # noqa: E402


def load(path):
    """A results.json with the folder it lies in. Raises ValueError for another file."""
    try:
        results = json.loads(Path(path).read_text())
        return {"folder": Path(path).parent, "name": Path(path).stem, **{k: results[k] for k in ("config", "results", "guesses", "perplexity")}}
    except (ValueError, KeyError, TypeError) as e:
        raise ValueError(f"{path} is not a results.json of train.py ({type(e).__name__}: {e})") from None


def columns(files):
    """{name of a column: its files}. The same flags with several seeds make one column."""
    groups = {}
    for file in files:
        config = file["config"]
        same = {k: config.get(k) for k in (*kept_flags(), "intervention", "retrieve", "rule") if k != "seed"}
        groups.setdefault(json.dumps(same), []).append(file)
    return {group[0]["folder"].name + group[0]["name"].removeprefix("results"): group for group in groups.values()}


def spread(values, digits=1):
    """'mean (lowest–highest)', or the value where there is but one, and how many there are if some are None."""
    known = [v for v in values if v is not None]
    if not known:
        return "–"
    mean = f"{sum(known) / len(known):.{digits}f}"
    text = mean if len(known) == 1 else f"{mean} ({min(known):.{digits}f}–{max(known):.{digits}f})"
    return text if len(known) == len(values) else f"{text}, {len(known)} of {len(values)}"


def table(head, rows):
    print("| " + " | ".join(head) + " |\n|" + "---|" * len(head))
    for row in rows:
        print("| " + " | ".join(row) + " |")


def point(x, values):
    """x, the mean of the values that are known, the lowest and the highest."""
    values = [v for v in values if v is not None]
    return x, sum(values) / len(values), min(values), max(values)


def figure5(files):
    """The paper's Figure 5 as SVG: {number of blocks that own a bank: perplexity}."""
    found = {}
    for file in files:
        config = file["config"]
        blocks = 0 if config["memory_type"] == "none" else config["n_memory_layers"] or config["n_layer"]
        if file["perplexity"]:
            found.setdefault(blocks, []).append(file["perplexity"]["perplexity"])
    if not found:
        raise ValueError("none of these results has a perplexity")
    line = [point(blocks, values) for blocks, values in sorted(found.items())]
    body, height = chart("perplexity of held-out text", {"by number of blocks with a memory": line}, low=None, ticks={b: str(b) for b in found})
    return svg(480, height, "perplexity by number of blocks with memory", body)


def main():
    parser = Parser("Puts several results.json of train.py side by side.")
    parser.add_argument("files", nargs="+", help="results.json files")
    parser.add_argument("--kind", choices=("all", "outside", "earlier"), default="all", help="which questions")
    parser.add_argument("--task", help="one task; default: the average of all")
    parser.add_argument("--curve", action="store_true", help="learning curves instead of results")
    parser.add_argument("--plot", metavar="SVG", help="draw accuracy by length instead")
    parser.add_argument("--figure5", metavar="SVG", help="draw perplexity by number of blocks with memory instead")
    args = parser.parse_args()
    files = [load(path) for path in args.files]
    if args.figure5:
        return write_file(args.figure5, figure5(files))
    groups = columns(files)
    kind = "" if args.kind == "all" else f"_{args.kind}"

    def value(file, size):
        rows = [r for r in file["results"] if (r["length"] or f"{r['segments']} seg.") == size and args.task in (None, r["task"])]
        return average(rows, kind)[0] if any(r[f"n{kind}"] for r in rows) else None

    if args.curve:
        logs = {name: [[json.loads(line) for line in open(file["folder"] / "log.jsonl")] for file in group] for name, group in groups.items()}
        last = max(row["iter"] for group in logs.values() for log in group for row in log)
        stages = sorted({row["stage"] for group in logs.values() for log in group for row in log if "stage" in row})
        table(["reached stage at step", *groups], [
            [str(stage), *(spread([next((r["iter"] for r in log if r.get("stage", -1) >= stage), None) for log in group], 0)
                           for group in logs.values())] for stage in stages if stage])
        print(f"\n({last} steps in all)")
        return
    sizes = list(dict.fromkeys(r["length"] or f"{r['segments']} seg." for group in groups.values() for r in group[0]["results"]))
    if args.plot:
        series = {name: [point(i, known) for i, size in enumerate(sizes) if any(known := [value(file, size) for file in group])]
                  for name, group in groups.items()}
        body, height = chart(f"accuracy in %{', ' + args.kind if kind else ''}", series, ticks=dict(enumerate(sizes)))
        return write_file(args.plot, svg(480, height, "accuracy by length", body))
    rows = [[size, *(spread([value(file, size) for file in group]) for group in groups.values())] for size in sizes]
    rows.append(["perplexity", *(spread([f["perplexity"]["perplexity"] for f in group if f["perplexity"]], 2) for group in groups.values())])
    rows.append(["parameters", *(f"{group[0]['config']['parameters']:,}" for group in groups.values())])
    rows.append(["seeds", *(", ".join(str(f["config"]["seed"]) for f in group) for group in groups.values())])
    table([f"accuracy in %{', ' + args.kind if kind else ''}{', ' + args.task if args.task else ''}", *groups], rows)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as e:
        sys.exit(f"compare.py: error: {e}")
