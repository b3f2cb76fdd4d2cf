"""The command line of sample.py, with a tiny untrained model: what it reads, carries, answers and refuses."""
import io
import os
import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

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


# ----------------------------------------------------------------------------- the memory, looked at

KNOWN = torch.tensor([[0.04, 0.05, 0.1, 0.81], [0.6, 0.4, 0.0, 0.0]])  # attention of two tokens to four slots


def test_known_attention_is_drawn_in_known_colours():
    rows = [("block 2", {"before": KNOWN, "after": KNOWN.flip(0)})]
    drawn = sample.heatmap(rows, ["<a&", "\n\x00"])
    paths = re.findall(r'<path class="a(\d)" d="(.*?)"/>', drawn)
    cells = {int(level): d for level, d in paths[:6]}
    assert cells == {1: "M1 0.5h1", 2: "M2 0.5h1", 3: "", 4: "M1 1.5h1", 5: "M0 1.5h1", 6: "M3 0.5h1"}
    assert dict(paths[6:])["6"] == "M3 1.5h1"
    texts = [e.text for e in ElementTree.fromstring(drawn).iter("{http://www.w3.org/2000/svg}text")]
    assert {"<a&", "\u21b5\ufffd", "block 2", "before", "after", "5%", "80%"} <= set(texts)


def test_known_attention_is_printed_in_known_shades():
    rows = [("block 2", {"before": KNOWN, "after": KNOWN})]
    title, first, second = sample.blocks(rows, [" a", "b"], colour=False)
    assert first == "             a |  ..::##| |  ..::##|" and second == "             b |++==    | |++==    |" and "slots 0 to 3" in title
    _, first, _ = sample.blocks(rows, [" a", "b"], colour=True)
    assert "\x1b[48;5;51m##\x1b[0m" in first


def test_of_many_slots_the_most_read_are_shown():
    A = torch.zeros(1, 300)
    A[0, 200:] = torch.linspace(0.1, 0.9, 100)
    panels, slots = sample.levels([A, A])
    assert slots == list(range(236, 300)) and panels[0].shape == (1, 64) and panels[0][0, -1] == 6


@pytest.mark.parametrize("slots", [16, 2048])
def test_picture_of_a_long_segment_stays_small(slots):
    A = (8 * torch.randn(512, slots, generator=torch.Generator().manual_seed(0)).abs()).softmax(dim=-1)
    drawn = sample.heatmap([("block 1", {"before": A, "after": A})], ["\U0001f642 <&>"] * 512)
    assert len(drawn.encode()) < 500_000 and ElementTree.fromstring(drawn) is not None


def test_heatmap_of_a_text(out_dir, tmp_path, capsys):
    call(f"--out_dir={out_dir}", f"--start={STORY}Where is Mary?", f"--heatmap={tmp_path / 'a.svg'}", "--show_memory", "--heatmap_layer=1,2")
    printed, drawn = capsys.readouterr().out, (tmp_path / "a.svg").read_text()
    written = re.findall(r"^\[block (\d): \d of 4 slots written, gates there: in [\d.-]+, forget [\d.-]+ \(elsewhere [\d.-]+\), out 0\.\d+; "
                         r"most changed: \d by '.*'", printed, re.M)
    segments = len(train.load_model(train.load_checkpoint(out_dir), "cpu")[1].encode_ordinary(" " + STORY)) // 32
    assert len(written) >= 2 * segments > 2 and written[:2] == ["1", "2"] and "block 2, slots 0 to 3" in printed
    texts = [e.text for e in ElementTree.fromstring(drawn).iter("{http://www.w3.org/2000/svg}text")]
    assert {"block 1", "block 2", "before any update", "after the updates", "Mary", "?"} <= {t.strip() for t in texts}


def test_looking_changes_nothing(out_dir, tmp_path, capsys):
    answers = []
    for extra in [], [f"--heatmap={tmp_path / 'a.svg'}"]:
        call(f"--out_dir={out_dir}", "--start=Mary went to the office. Where is Mary?", f"--save_memory={tmp_path / 'memory'}{len(extra)}", *extra)
        answers.append(capsys.readouterr().out.splitlines()[0])
    a, b = (torch.load(tmp_path / f"memory{i}") for i in (0, 1))
    assert answers[0] == answers[1] and torch.equal(a["memory"], b["memory"]) and torch.equal(a["tail"], b["tail"])
    assert "after its update" in (tmp_path / "a.svg").read_text()  # shorter than a segment


def test_commands(out_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    typed = ["/memory", STORY, "/save story.mem", "/forget", "/memory", "/load story.mem", "/memory", "/load nowhere", "/save no/where/x", "/lost",
             "/save", "/help", "Where is Mary?"]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(typed)))
    call(f"--out_dir={out_dir}", "--interactive")
    out = capsys.readouterr().out
    assert out.count("nothing has been read yet") == 2 and out.count("block 2, slots 0 to 3: before any update | after the updates") == 1
    assert "there is no memory file nowhere" in out and "/lost is no command" in out and "/save is no command" in out and "no/where" in out
    assert out.count("/forget ") == 2 and "Where is Mary?" in out and os.listdir() == ["story.mem"]


def test_interactive_begins_with_what_is_given(out_dir, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    call(f"--out_dir={out_dir}", "--interactive", "--start=John left. Where is John?")
    assert "Where is John?" in capsys.readouterr().out


def test_lookups_are_counted(data_dir, tmp_path):
    run(*flags(data_dir, tmp_path, max_iters=1, eval_segments="1", eval_samples=2, memory_slots=1))
    done = subprocess.run([sys.executable, Path(__file__).with_name("lookup.py"), f"--out_dir={tmp_path}", "--segments=4", "--samples=20"],
                          capture_output=True, text=True)
    rows = [line.split() for line in done.stdout.splitlines()]
    ages, kinds = [r for r in rows if r[1] == "segments"], {r[0]: int(r[2]) for r in rows if r[1] == "fact"}
    assert done.returncode == 0 and sum(int(r[2]) for r in ages) == sum(kinds.values()) == 20
    # there is but one slot, and each segment writes it
    assert all(row[-4:] == (["100.0"] * 4 if row[0] == "1" else ["0.0"] * 4) for row in ages)  # looked up, and still there
    blocks = [[float(word) for word in row if "." in word] for row in rows if row[0] == "block"]
    assert blocks and all(written == 3 >= needless == first > 0 for written, needless, first in blocks)  # a segment is one chunk


def test_memory_of_another_kind_cannot_be_looked_at(data_dir, tmp_path):
    run(*flags(data_dir, tmp_path, max_iters=1, eval_segments="1", eval_samples=2, memory_type="rmt"))
    with pytest.raises(ValueError, match="no memory bank to look at"):
        call(f"--out_dir={tmp_path}", "--show_memory")


@pytest.mark.parametrize("args, complaint", [
    (["--heatmap=a.svg", "--heatmap_layer=3"], "--heatmap_layer=3: the blocks with a memory bank are 1, 2"),
    (["--heatmap=no/where.svg"], "--heatmap=no/where.svg: there is no such folder"),
    (["--save_memory=no/where"], "--save_memory=no/where: there is no such folder"),
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
