"""
Holds the published bAbI v1.2 training files against our reading of them; not part of the test suite, which needs no file.

$ python tests/check_published.py DIR        # with DIR/qa1_single-supporting-fact_train.txt and so on
"""
import random
import sys
from collections import Counter
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

import prepare_babilong as babilong  # noqa: E402
from test_data import expected, questions  # noqa: E402


def shares(stories):
    answers = Counter(line.answer for _, line in questions(stories))
    return {answer: 100 * n / sum(answers.values()) for answer, n in answers.items()}


def check(folder, task):
    """One line of figures. Raises AssertionError where the files break a rule that the simulator follows."""
    (path,) = Path(folder).glob(f"{task}_*.txt")
    published = babilong.read_babi(path)
    assert babilong.format_babi(task, published) == path.read_text(), "written again, the file is not the same"
    asked = list(questions(published))
    if task not in ("qa4", "qa5"):  # whose answers the test suite derives from the supporting facts instead
        wrong = sum((line.answer, line.support) != expected(task, facts, line.text) for facts, line in asked)
        assert wrong == 0, f"{wrong} answers or supports do not follow from the text"
    simulated = [babilong.simulate(task, random.Random(f"check{i}")) for i in range(min(1000, len(published)))]
    lengths = [sum(len(facts) for facts, _ in qs) / len(qs) for qs in (asked, list(questions(simulated)))]
    ours, theirs = shares(simulated), shares(published)
    gap = max(abs(ours.get(a, 0) - theirs.get(a, 0)) for a in ours | theirs)
    assert gap < (8 if task == "qa3" else 4) and abs(lengths[1] / lengths[0] - 1) < 0.2, (lengths, ours, theirs)
    print(f"{task:<5} {len(published):6d} stories {len(asked):6d} questions: all follow from the text; facts before a question: published "
          f"{lengths[0]:5.2f}, simulated {lengths[1]:5.2f}; largest gap in the share of an answer {gap:.1f} points")


if __name__ == "__main__":
    for task in babilong.TASKS:
        check(sys.argv[1], task)
