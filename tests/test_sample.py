"""sample.py with tiny untrained models: what it reads, carries, answers, shows and refuses."""
import os
import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

import prepare_babilong as babilong
import sample
from model import LM2Config, build

STORY = "Mary went to the office. John moved to the garden. " * 9


def tiny(encoding, **memory_type):
    torch.manual_seed(0)
    model = build(LM2Config(block_size=32, vocab_size=encoding.n_vocab, n_layer=2, n_head=2,
                            n_embd=32, memory_slots=4, **memory_type)).eval()
    for memory in filter(None, (block.memory for block in model.blocks)):
        torch.nn.init.normal_(memory.salience)  # untrained: every chunk would be written
    return model


@pytest.fixture
def reader(encoding):
    return sample.Reader(tiny(encoding), encoding, layers=[1, 2])


@pytest.fixture(params=["lm2"])
def out_dir(request, encoding):
    model, rest = tiny(encoding, memory_type=request.param), "optimizers iter_num stage began"
    Path("out").mkdir()
    torch.save({**dict.fromkeys(f"{rest} running log_size data".split()), "args": {},
                "model": model.state_dict(), "config": vars(model.config),
                "tokenizer": babilong.dump_tokenizer(encoding)}, "out/ckpt.pt")


def call(*args):
    sample.main(sample.get_parser().parse_args(["--device=cpu", *args]))


def test_answer_is_the_models_and_looking_changes_nothing(out_dir, encoding, capsys):
    model, encode = tiny(encoding), encoding.encode_ordinary
    story, question = encode(" " + STORY.strip()), encode(" Where is Mary?")
    story += encode("\n") * (-len(story) % 32 if len(story) % 32 + len(question) + 8 > 32 else 0)
    idx, (memory, tail) = model.generate(torch.tensor([story + question]), 8, temperature=0)
    Path("text").write_text(STORY.replace(". ", ".\n") + "Where is Mary?\n")
    for start, *look in [STORY + "Where is Mary?"], ["FILE:text", "--show_memory", "--heatmap=svg"]:
        call("--save_memory=saved", f"--start={start}", *look)
        assert f"Where is Mary?{encoding.decode(idx[0, -8:].tolist())}\n" in capsys.readouterr().out
        saved = torch.load("saved")
        assert torch.allclose(saved["memory"], memory, atol=1e-5) and saved["tail"].equal(tail)
        assert saved["tail"].untyped_storage().nbytes() == 8 * tail.numel()  # no other text in the file


def test_the_model_that_comes_along_answers(capsys):
    noise = "The default value is the empty string, which means that nothing is left out. " * 20
    for story, answer in (("Mary went to the office. John moved to the garden. Where is Mary?", "office"),
                          (f"Sandra got the milk. {noise}What is Sandra carrying?", "milk"),
                          (f"John moved to the garden. {noise}Is John in the garden?", "yes")):
        call(f"--start={story}")  # no out/ here, so it is assets/ten-tasks.pt
        assert capsys.readouterr().out.endswith(f"? {answer}.\n")


def test_question_and_answer_share_a_segment(reader, capsys):
    for n in range(1, 33):
        reader.begin()
        reader.feed(reader.encode("\n") * n)
        reader.respond("Where is Mary?", sample.get_parser().parse_args([]))
        answered = " " + capsys.readouterr().out[:-1]
        assert reader.encoding.decode(reader.last[0].tolist()).endswith(answered)


def test_queues_name_what_was_written_and_who_reads_it(reader, capsys, monkeypatch):
    reader.show_memory = True
    reader.read(STORY)
    lines = re.findall(r"^\[block 2: \d of 8 (.*)", capsys.readouterr().out, re.M)
    texts = re.findall(r"'[^']*'", "".join(lines))
    assert len(texts) > 4 and [sample.label(text) for text in reader.queues[2]] == texts[-4:][::-1]
    known = 0.81 * torch.eye(reader.last.size(1), 4)  # token i looks at slot i
    monkeypatch.setattr(reader, "look", lambda memory: {1: known, 2: known})
    reader.show()
    by = re.findall(r"^slot \d: '.*', read most by ('.*'): 81%$", capsys.readouterr().out, re.M)
    assert by == 2 * [sample.label(reader.encoding.decode([t])) for t in reader.last[0, :4].tolist()]


def test_known_attention_is_drawn(reader, monkeypatch):
    reader.plain = True
    reader.read("<&\n went")
    known = 0.81 * torch.eye(reader.last.size(1), 4)
    monkeypatch.setattr(reader, "look", lambda memory: {1: known, 2: known})
    drawn = ElementTree.fromstring(reader.draw())
    cells = [e.get("d") for e in drawn if e.get("fill-opacity") == "0.8"]
    assert cells == ["".join(f"M{x + 50 * t} {46 + 16 * t}h50v15h-50z" for t in range(4))
                     for x in (110, 322, 534, 746)]
    assert {"block 1, fresh bank", "block 2, bank as written", r"'\n'"} <= {e.text for e in drawn}


@pytest.mark.parametrize("out_dir", ["lm2", "rmt", "none"], indirect=True)
def test_memory_is_carried_from_run_to_run(out_dir, capsys):
    call(f"--start={STORY}Sandra left. Where is Mary?")
    call(f"--start={STORY}Sandra left.", "--save_memory=story.mem")
    call("--memory_file=story.mem", "--start=Where is Mary?")
    assert len(set(capsys.readouterr().out.splitlines()[::2])) == 1


def test_only_whole_memories_of_this_model_are_loaded(reader, tmp_path):
    reader.save(tmp_path / "good")
    reader.load(tmp_path / "good")
    good, tail = torch.load(tmp_path / "good"), torch.zeros(1, 3).long()
    M, tails = good["memory"], [tail - 1, tail + 10**6, tail[0], tail.float(), tail.repeat(1, 11)]
    for wrong in [*({"memory": m} for m in (M[:1], M.double(), M / 0, 1)), {"model": "0"}, None,
                  *({"tail": t} for t in (*tails, tail.repeat(2, 1), None))]:
        torch.save({**good, **wrong} if wrong else 0, tmp_path / "bad")
        with pytest.raises(ValueError, match=r"bad is no memory of this model \([^\n]*\)\Z"):
            reader.load(tmp_path / "bad")


def test_interactive(out_dir):
    typed = ["/memory", "\ufeffMary went to the office.", "Where is Mary?", STORY, "/save a",
             "/lost", "/memory", "/forget", "/load a", "/load no", "/save", "/help", "", "Is it?"]
    done = subprocess.run([sys.executable, sample.__file__, "--interactive"], capture_output=True,
                          input="\n".join(typed).encode() + b"\n\xff\xfe\n")
    out = done.stdout.decode().replace("\ufffd", "?")
    for line in "nothing has", "Where is Mary?", "block 2: 4 of 4", "no is no", ": /lost.", ": ?":
        assert out.count(line) == 1, line
    assert out.count("/forget ") == 2 and "office.\n" not in out and not done.stderr


def test_what_a_pipe_cannot_show_is_a_question_mark(out_dir):
    for start, code, out, err in ("Привет", 0, br"\?{6}[^\0]*", b""), (" ", 1, b"", b"sample.py: error: .*\n"):
        done = subprocess.run([sys.executable, sample.__file__, f"--start={start}"], capture_output=True,
                              env={**os.environ, "PYTHONIOENCODING": "cp1252"})
        assert done.returncode == code and re.fullmatch(out, done.stdout) and re.fullmatch(err, done.stderr)


@pytest.mark.parametrize("flag, complaint", [
    ("--heatmap_layer=3", "with one are [1, 2]"), ("--heatmap=no/where.svg", "no/where.svg"),
    ("--save_memory=no/where", "no/where"), ("--start= ", "no text"), ("--start=FILE:no", "no"),
    ("--start=FILE:junk", "UTF-8"), ("--start=\udcff", "UTF-8"), ("--memory_file=junk", "Error")])
def test_bad_input_is_one_line(flag, complaint, out_dir, capsys):
    Path("junk").write_bytes(b"\xff\xfe\x00")
    with pytest.raises((ValueError, OSError, SystemExit)) as e:
        call(flag)
    out, err = capsys.readouterr()
    line = err if isinstance(e.value, SystemExit) else str(e.value)
    assert complaint in line and "\n" not in line.strip() and not out
