"""The command line of sample.py, with a tiny untrained model: what it reads, carries, answers and refuses."""
import io
from pathlib import Path

import pytest
import torch

import sample
import train
from test_train import flags, run


@pytest.fixture(scope="module")
def out_dir(data_dir, tmp_path_factory):
    path = tmp_path_factory.mktemp("trained")
    run(*flags(data_dir, path, max_iters=2, eval_segments="1", eval_samples=2))
    return path


def call(*args):
    sample.main(sample.get_parser().parse_args(["--device=cpu", *args]))


STORY = "Mary went to the office. John moved to the garden. " * 9


def test_answer_is_the_greedy_continuation(out_dir, capsys):
    call(f"--out_dir={out_dir}", f"--start={STORY}Where is Mary?")
    model, encoding = train.load_model(train.load_checkpoint(out_dir), "cpu")
    story, question = encoding.encode_ordinary(" " + STORY.strip()), encoding.encode_ordinary(" Where is Mary?")
    if len(story) % 32 + len(question) + 8 > 32:
        story += encoding.encode_ordinary("\n") * (-len(story) % 32)
    out, _ = model.generate(torch.tensor([story + question]), 8, temperature=0)
    answer = encoding.decode(out[0, len(story) + len(question) :].tolist())
    answer = answer[: answer.index(".") + 1] if "." in answer else answer
    assert capsys.readouterr().out == f"Where is Mary?{answer}\n"


def test_file_is_read_like_text(out_dir, tmp_path, capsys):
    (tmp_path / "story.txt").write_text(STORY.replace(". ", ".\n") + "Where is Mary?\n")
    call(f"--out_dir={out_dir}", f"--start={STORY}Where is Mary?")
    typed = capsys.readouterr().out
    call(f"--out_dir={out_dir}", f"--start=FILE:{tmp_path / 'story.txt'}")
    assert capsys.readouterr().out == typed


def test_memory_is_carried_from_run_to_run(out_dir, tmp_path):
    whole, half, later = (sample.Reader(*train.load_model(train.load_checkpoint(out_dir), "cpu")) for _ in range(3))
    for text in (STORY, "Sandra got the milk."):
        whole.read(text)
    half.read(STORY)
    half.save(tmp_path / "memory")
    later.load(tmp_path / "memory")
    later.read("Sandra got the milk.")
    assert torch.equal(whole.state[0], later.state[0]) and torch.equal(whole.state[1], later.state[1])
    assert not torch.equal(whole.state[0], whole.model.initial_memory(1))


def test_command_line_saves_and_takes_up_a_memory(out_dir, tmp_path, capsys):
    file = tmp_path / "story.mem"
    call(f"--out_dir={out_dir}", f"--start={STORY}", f"--save_memory={file}", "--max_new_tokens=0")
    call(f"--out_dir={out_dir}", f"--memory_file={file}", "--start=Where is Mary?")
    assert "Where is Mary?" in capsys.readouterr().out and [p.name for p in tmp_path.iterdir()] == ["story.mem"]


def test_interactive_reads_lines_and_answers_questions(out_dir, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO("Mary went to the office.\n\nWhere is Mary?\nJohn left.\nWhere is John?\n"))
    call(f"--out_dir={out_dir}", "--interactive")
    out = capsys.readouterr().out
    assert out.count("Where is Mary?") == 1 and out.count("Where is John?") == 1 and "John left." not in out


def test_sampling_is_seeded(out_dir, capsys):
    outs = []
    for seed in (1, 1, 2):
        call(f"--out_dir={out_dir}", "--start=Mary went to", f"--seed={seed}", "--max_new_tokens=20", "--temperature=1.5")
        outs.append(capsys.readouterr().out)
    assert outs[0] == outs[1] != outs[2] and outs[0].startswith("Mary went to")


def test_question_is_kept_whole(out_dir):
    reader = sample.Reader(*train.load_model(train.load_checkpoint(out_dir), "cpu"))
    reader.read("a b c d e f g h i j k l m n o")
    used = reader.state[1].size(1)
    reader.make_room(32 - used)
    assert reader.state[1].size(1) == used
    reader.make_room(33 - used)
    assert reader.state[1].size(1) == 32


@pytest.mark.parametrize("args, complaint", [
    (["--start= "], "holds no text"), (["--start=FILE:nowhere.txt"], "nowhere.txt"), (["--memory_file=nowhere"], "no memory file"),
    (["--memory_file=junk"], "is not a memory saved by sample.py"), (["--memory_file=foreign"], "written by another model"),
    (["--start=FILE:binary"], "not text in UTF-8"), (["--device=tpu9"], "--device=tpu9")])
def test_bad_input(args, complaint, out_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("junk").write_bytes(b"junk")
    Path("binary").write_bytes(b"\xff\xfe\x00")
    torch.save({"memory": torch.zeros(1), "tail": torch.zeros(1), "model": "0"}, "foreign")
    with pytest.raises((ValueError, OSError), match=complaint):
        call(f"--out_dir={out_dir}", *args)
