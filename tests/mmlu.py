"""
MMLU (Hendrycks et al. 2021, https://arxiv.org/abs/2009.03300) in the rows of the paper's Table 2.

$ python tests/mmlu.py DIR --out_dir=out-llama    # DIR/dev/NAME_dev.csv, DIR/test/NAME_test.csv

Examples and question are one text, read segment by segment; the memory carries the examples.
"""
import csv
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from prepare_babilong import Parser, encode, number, read_text  # noqa: E402
from train import load_checkpoint, load_model, pick_device  # noqa: E402

KINDS = {  # of subjects, by their names without a level; the rest are Other
    "STEM": "abstract_algebra astronomy biology chemistry computer_science computer_security "
    "conceptual_physics electrical_engineering elementary_mathematics machine_learning "
    "mathematics physics statistics",
    "Humanities": "european_history formal_logic international_law jurisprudence philosophy law "
    "logical_fallacies moral_disputes moral_scenarios prehistory us_history world_history world_religions",
    "Social Sciences": "econometrics geography government_and_politics human_sexuality psychology "
    "macroeconomics microeconomics public_relations security_studies sociology us_foreign_policy",
    "Other": ""}
LEVELS = {"high_school_": "High School", "college_": "College", "professional_": "Professional",
          "": "General Knowledge"}


def read_csv(path):
    """[question with its choices, letter that is right] of each row. Raises ValueError, OSError."""
    rows = [row for row in csv.reader(s + "\n" for s in read_text(path).split("\n")) if row]
    if not rows or any(len(row) != 6 or row[5] not in tuple("ABCD") for row in rows):
        raise ValueError(f"{path}: not rows of question, four choices and one of A, B, C and D")
    return [["\n".join([q, "A. " + a, "B. " + b, "C. " + c, "D. " + d, "Answer:"]), right]
            for q, a, b, c, d, right in rows]


def accuracy(model, encoding, folder, subject, shots):
    """(right answers, questions) of a subject. Raises ValueError, OSError."""
    def read(text, state=None):
        return model.read(torch.tensor([encode(encoding, text)], device=model.rope.device), state)

    dev, test = (read_csv(Path(folder, d, f"{subject}_{d}.csv")) for d in ("dev", "test"))
    text = f"The following are multiple choice questions (with answers) about {subject}.\n\n"
    text = text.replace("_", " ") + "".join(f"{q} {right}\n\n" for q, right in dev[:shots])
    letters = sum((encode(encoding, " " + letter) for letter in "ABCD"), [])
    if len(letters) > 4:
        raise ValueError("the model's tokenizer has no token for each of ' A', ' B', ' C' and ' D'")
    _, examples = read(text)  # once: each question is asked after the same memory
    answers = ["ABCD"[read(question, examples)[0][0, letters].argmax()] for question, _ in test]
    return sum(answer == right for answer, (_, right) in zip(answers, test)), len(test)


def main():
    parser = Parser("The accuracy of a model of train.py on MMLU.")
    parser.add_argument("data", type=Path, help="MMLU's folder, with dev/ and test/")
    parser.add_argument("--out_dir", default="out", help="of the model")
    parser.add_argument("--shots", type=number(int, 0, 5), default=5, help="examples before the question")
    args, rows = parser.parse_args(), {}
    model, encoding = load_model(load_checkpoint(args.out_dir), pick_device("auto"))
    for path in sorted(args.data.glob("test/*_test.csv")) or parser.error(f"no test/*.csv in {args.data}"):
        name = path.stem.removesuffix("_test")
        level = next(level for level in LEVELS if name.startswith(level))
        kind = next((k for k in KINDS if name.removeprefix(level) in KINDS[k].split()), "Other")
        found = np.array(accuracy(model, encoding, args.data, name, args.shots))
        for row in kind, LEVELS[level], "Average":
            rows[row] = rows.get(row, 0) + found
    for row in (row for row in (*KINDS, *LEVELS.values(), "Average") if row in rows):
        print(f"{row:<18}{100 * rows[row][0] / rows[row][1]:6.1f} % of {rows[row][1]}")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError, csv.Error) as e:
        sys.exit(f"mmlu.py: error: {e}")
