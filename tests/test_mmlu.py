"""tests/mmlu.py on a small made-up set in MMLU's published form."""
import csv
import random
import sys
from pathlib import Path

import pytest
import torch

import mmlu
import prepare_babilong as babilong
from model import load_llama
from test_model import llama_folder

ENCODING = babilong.make_encoding({bytes([b]): b for b in range(256)} | {
    f" {letter}".encode(): 256 + i for i, letter in enumerate("ABCD")})


@pytest.fixture
def folder():
    """MMLU in small: 5 examples and 40 questions each, the answers evenly spread."""
    for part, n in ("dev", 5), ("test", 40):
        Path("data", part).mkdir(parents=True)
        for subject in "college_physics", "high_school_us_history", "virology":
            rng = random.Random(part + subject)
            with open(f"data/{part}/{subject}_{part}.csv", "w", newline="") as f:
                csv.writer(f).writerows(
                    [f'Which, "{rng.random()}",\nis it?', *rng.choices(range(99), k=4), "ABCD"[i % 4]]
                    for i in range(n))
    return "data"


def llama(**config):
    llama_folder(Path("llama"), vocab_size=260)
    return load_llama("llama", **config).eval()


def test_scores_are_those_of_whole_prompts(folder):
    model, right = llama(block_size=2048), 0
    dev, test = (list(csv.reader(open(f"data/{part}/virology_{part}.csv", newline="")))
                 for part in ("dev", "test"))
    for *asked, answer in test:
        text = "The following are multiple choice questions (with answers) about virology.\n\n"
        for q, a, b, c, d, letter in [*dev, (*asked, "")]:
            text += f"{q}\nA. {a}\nB. {b}\nC. {c}\nD. {d}\nAnswer:" + (f" {letter}\n\n" if letter else "")
        logits = model.head(model(torch.tensor([ENCODING.encode(text)]))[0])[0, -1, 256:260]
        right += "ABCD"[logits.argmax()] == answer
    assert mmlu.accuracy(model, ENCODING, folder, "virology", 5) == (right, 40)


def test_a_graft_that_adds_nothing_scores_as_the_llama(folder):
    for shots in 0, 5:
        plain, graft = (mmlu.accuracy(llama(block_size=64, memory_slots=n), ENCODING, folder, "virology", shots)
                        for n in (0, 4))
        assert plain == graft
    torch.manual_seed(0)
    model = llama(block_size=64, memory_slots=4)
    torch.nn.init.normal_(model.blocks[0].memory.wv.weight)

    def scores(forget):
        seen, read = [], type(model).read

        def spied(idx, state=None):
            if state and forget:
                state = model.initial_memory(1), state[1]
            logits, state = read(model, idx, state)
            seen.append(logits)
            return logits, state

        model.read = spied
        mmlu.accuracy(model, ENCODING, folder, "virology", 5)
        return torch.cat(seen)

    assert not torch.allclose(scores(False), scores(True)), "the memory carries the examples"


def test_table_and_errors(folder, monkeypatch, capsys):
    model, rest = llama(block_size=64, memory_slots=4), "optimizers iter_num stage began running"
    Path("out").mkdir()
    torch.save({**dict.fromkeys(f"{rest} log_size data".split()), "args": {}, "model": model.state_dict(),
                "config": vars(model.config), "tokenizer": babilong.dump_tokenizer(ENCODING)}, "out/ckpt.pt")
    monkeypatch.setattr(sys, "argv", ["mmlu.py", folder])
    mmlu.main()
    rows = [line.split("  ")[0] for line in capsys.readouterr().out.splitlines()]
    assert rows == ["STEM", "Humanities", "Other", "High School", "College", "General Knowledge", "Average"]
    Path("data/dev/virology_dev.csv").write_text("of two\u2028lines,1,2,3,4,A\n\n", encoding="utf-8")
    assert len(mmlu.read_csv("data/dev/virology_dev.csv")) == 1
    Path("data/dev/virology_dev.csv").write_text("a question,1,2,3,4,E\n")
    with pytest.raises(ValueError, match="virology_dev.csv: not rows of"):
        mmlu.main()
    monkeypatch.setattr(sys, "argv", ["mmlu.py", "nowhere"])
    with pytest.raises(SystemExit):
        mmlu.main()
    assert "error: no test/*.csv in nowhere" in capsys.readouterr().err
