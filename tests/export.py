"""
Makes one small file of a run of train.py: its weights in bfloat16, without the optimizer's state.

$ python tests/export.py out assets/ten-tasks.pt
$ python sample.py --out_dir=assets/ten-tasks.pt
"""
import io
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from prepare_babilong import Parser, out_file, write_file  # noqa: E402
from train import load_checkpoint  # noqa: E402


def main():
    parser = Parser("Makes one small file of a run of train.py.")
    parser.add_argument("out_dir", help="folder of the run")
    parser.add_argument("file", type=out_file, help="the file to write")
    args, content = parser.parse_args(), io.BytesIO()
    run = load_checkpoint(args.out_dir)
    weights = {name: weight.bfloat16() for name, weight in run["model"].items()}
    # the file goes to other machines, with other data and other evaluations
    gone = "data_dir", "babi_dir", "babilong_dir", "background", "retrieve", "intervention"
    kept = {name: value for name, value in run["args"].items()
            if name not in gone and not name.startswith("eval")}
    torch.save({**run, "model": weights, "args": kept, "optimizers": []}, content)
    write_file(args.file, content.getvalue())
    print(f"wrote {args.file}: {len(content.getvalue()):,} bytes")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as e:
        sys.exit(f"export.py: error: {e}")
