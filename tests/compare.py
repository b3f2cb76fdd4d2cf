"""
Several runs of train.py side by side, as Markdown. Runs that differ in their seed alone share a column,
as mean (lowest–highest); a single run has its 95 % interval.

$ python tests/compare.py out/results.json out/eval.json out-none/results.json
$ python tests/compare.py --kind=outside out*/results.json       # facts outside the window alone
$ python tests/compare.py --by_task out/results.json             # task by task
$ python tests/compare.py --plot=accuracy.svg out*/results.json  # accuracy by length, as a picture
$ python tests/compare.py --curves=curves.svg out/results.json   # the learning curves, of log.jsonl
"""
import json
import sys
from html import escape
from itertools import chain, groupby
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from prepare_babilong import Parser, out_file, write_file  # noqa: E402
from sample import svg  # noqa: E402
from train import NOT_KEPT  # noqa: E402

COLOURS = "#0072b2 #d55e00 #009e73 #cc79a7 #e69f00 #56b4e9 #808080 #9457c9".split()


def chart(title, series, top=0, ticks=None):
    """
    A panel 480 wide and 240 high, `top` from the top, as lines of SVG. series: {name: points}, each
    (x, y) or, with a range, (x, y, lowest, highest); ticks: {x: text}, by default five of the range.
    """
    points = list(chain(*series.values()))
    right, high = (max([1, *values]) for values in ([p[0] for p in points], [p[1] for p in points]))

    def place(x, y):
        return f"{56 + 392 * x / right:.1f} {top + 208 - 140 * y / high:.1f}"

    body = [f'<text x="8" y="{top + 16}" font-weight="bold">{escape(title)}</text>']
    for i in range(5):
        y = high * i / 4
        body.append(f'<path stroke="#d0d7de" d="M{place(0, y)}h392"/><text x="50" '
                    f'y="{place(0, y).split()[1]}" dy="4" text-anchor="end">{y:.3g}</text>')
    for x, text in (ticks or {right * i / 4: f"{right * i / 4:.0f}" for i in range(5)}).items():
        body.append(f'<text x="{place(x, 0).split()[0]}" y="{top + 226}" '
                    f'text-anchor="middle">{escape(text)}</text>')
    for i, (name, line) in enumerate(series.items()):
        stroke = f'fill="none" stroke-width="1.6" stroke="{COLOURS[i % len(COLOURS)]}"'
        x, y = 8 + i % 4 * 117, top + 34 + i // 4 * 16
        ranges = "".join(f"M{place(p[0], p[2])}L{place(p[0], p[3])}" for p in line if p[2:])
        body.append(f'<path {stroke} d="M{x} {y - 4}h16M{"L".join(place(*p[:2]) for p in line)}'
                    f'{ranges}"/><text x="{x + 20}" y="{y}">{escape(name)}</text>')
    return "\n".join(body) + "\n"


def curves(folder):
    """A picture of the accuracies and the loss in a folder's log.jsonl."""
    accuracy, loss = {}, []
    for entry in map(json.loads, Path(folder, "log.jsonl").read_text().splitlines()):
        loss += [(entry["iter"], entry["loss"])] if "loss" in entry else []
        for s, group in groupby(entry.get("eval", ()), key=lambda row: row["segments"]):
            group = [row["accuracy"] for row in group]
            accuracy.setdefault(f"{s} seg.", []).append((entry["iter"], sum(group) / len(group)))
    charts = {"training loss": {"loss": loss}, "accuracy in %, held out": accuracy}
    charts = [item for item in charts.items() if any(item[1].values())]
    body = "".join(chart(title, series, 240 * i) for i, (title, series) in enumerate(charts))
    return svg(480, 240 * len(charts), "learning curves", body)


def load(path):
    """A results.json, with its folder and a name. Raises ValueError for another file."""
    try:
        results, folder, stem = json.loads(Path(path).read_text()), Path(path).resolve().parent, Path(path).stem
        name = folder.name + f" {stem}" * (stem not in ("results", "eval"))
        return {"folder": folder, "name": name, "config": results["config"],
                "results": {(row["length"] or f"{row['segments']} seg.", row["task"]): row
                            for row in results["results"]}}
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise ValueError(f"{path} is not a results.json of train.py ({type(e).__name__})") from None


def mean(rows, kind):
    """(mean accuracy of some tasks' rows in %, half of its 95 % interval, Agresti-Coull), or None."""
    found = [(row["correct" + kind], row["n" + kind]) for row in rows if row["n" + kind]]
    if found:
        shares = [((right + 2) / (n + 4), n + 4) for right, n in found]
        deviation = sum(p * (1 - p) / n for p, n in shares) ** 0.5 / len(found)
        return 100 * sum(right / n for right, n in found) / len(found), 196 * deviation


def spread(cell):
    """'mean (lowest–highest)' of several means, 'mean ± half of its interval' of one, or '–'."""
    if not cell:
        return "–"
    values, half = [value for value, _ in cell], cell[0][1]
    middle = f"{sum(values) / len(values):.1f}"
    if len(values) == 1:
        return f"{middle} ± {half:.1f}"
    return f"{middle} ({min(values):.1f}–{max(values):.1f})"


def table(rows):
    lines = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
    print("\n".join(f"| {' | '.join(row)} |" for row in lines))


def main():
    parser = Parser("Puts several results.json of train.py side by side.")
    parser.add_argument("files", nargs="+", help="results.json files")
    parser.add_argument("--kind", choices=("all", "outside"), default="all", help="which questions")
    parser.add_argument("--by_task", action="store_true", help="a table for each column, task by task")
    parser.add_argument("--plot", type=out_file, metavar="SVG", help="draw accuracy by length instead")
    parser.add_argument("--curves", type=out_file, metavar="SVG", help="draw the first file's run instead")
    args = parser.parse_args()
    files, kind, columns = [load(path) for path in args.files], "_outside" * (args.kind != "all"), {}
    if args.curves:
        return write_file(args.curves, curves(files[0]["folder"]))
    for file in files:
        other = *NOT_KEPT, "seed", "iter_num", "data_dir"
        key = str(sorted((k, str(v)) for k, v in file["config"].items() if k not in other and k[:5] != "eval_"))
        column = columns.setdefault(key, {"name": file["name"], "config": file["config"], "runs": {}})
        # of one seed and folder are the training's table and those of later evaluations
        column["runs"].setdefault((file["config"]["seed"], file["folder"]), {}).update(file["results"])
    columns = list(columns.values())
    runs = [run for column in columns for run in column["runs"].values()]
    tokens = {size: row["tokens"] for run in runs for (size, _), row in run.items()}
    sizes, tasks = sorted(tokens, key=tokens.get), list(dict.fromkeys(task for run in runs for _, task in run))

    def cell(column, size, task=None):
        """The mean of each run of a column, over its tasks or of one."""
        means = [mean([row for (s, t), row in run.items() if s == size and task in (None, t)], kind)
                 for run in column["runs"].values()]
        return [value for value in means if value]

    if args.plot:
        series = {column["name"]: [(i, sum(v) / len(v), min(v), max(v)) for i, size in enumerate(sizes)
                                   if (v := [value for value, _ in cell(column, size)])]
                  for column in columns}
        body = chart("accuracy in %", series, ticks=dict(enumerate(sizes)))
        return write_file(args.plot, svg(480, 240, "accuracy by length", body))
    if args.by_task:
        for column in columns:
            table([[f"{column['name']}, accuracy in %{kind}", *tasks, "all"]]
                  + [[size, *(spread(cell(column, size, task)) for task in (*tasks, None))] for size in sizes])
        return
    table([[f"accuracy in %{kind}", *(column["name"] for column in columns)]]
          + [[size, *(spread(cell(column, size)) for column in columns)] for size in sizes]
          + [["parameters", *(f"{column['config']['parameters']:,}" for column in columns)],
             ["seeds", *(", ".join(str(seed) for seed, _ in column["runs"]) for column in columns)]])


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as e:
        sys.exit(f"compare.py: error: {e}")
