"""The simulator against the rules of the published bAbI tasks, and the samples made from its stories."""
import base64
import http.server
import json
import os
import random
import re
import subprocess
import sys
import threading
import unicodedata
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import tiktoken

import prepare_babilong as babilong
from prepare_babilong import TASKS, Line, simulate

MOVES = "moved|went back|went|journeyed|travelled"
GETS, DROPS, GIVES = "picked up|grabbed|took|got", "put down|dropped|left|discarded", "gave|handed|passed"


@pytest.fixture(scope="module")
def stories():
    return {task: [simulate(task, random.Random(f"{task}{i}")) for i in range(300 if task == "qa3" else 1500)] for task in TASKS}


def questions(stories):
    """(statements before it with their line numbers, question) of every question."""
    for story in stories:
        for i, line in enumerate(story):
            if line.answer is not None:
                yield [(n, s.text) for n, s in enumerate(story[:i], 1) if s.answer is None], line


def read(facts):
    """Replays statements from their text alone: each person's and object's history."""
    where, history, holder, told = {}, {}, {}, {}
    for n, text in facts:
        if m := re.fullmatch(rf"(\w+) (?:{MOVES}) to the (\w+)\.", text):
            who, place = m.groups()
            where.setdefault(who, []).append((n, place))
            told[who] = (n, "at", {place})
        elif m := re.fullmatch(rf"(\w+) (?:{GETS}) the (\w+)(?: there)?\.", text):
            who, thing = m.groups()
            assert holder.get(thing) is None, "an object that somebody holds is not picked up"
            holder[thing] = who
            history.setdefault(thing, []).append((n, "get", who, None))
        elif m := re.fullmatch(rf"(\w+) (?:{DROPS}) the (\w+)(?: there)?\.", text):
            who, thing = m.groups()
            assert holder[thing] == who, "only the holder drops an object"
            holder[thing] = None
            history.setdefault(thing, []).append((n, "drop", who, None))
        elif m := re.fullmatch(rf"(\w+) (?:{GIVES}) the (\w+) to (\w+)\.", text):
            who, thing, to = m.groups()
            assert holder[thing] == who != to
            holder[thing] = to
            history.setdefault(thing, []).append((n, "give", who, to))
        elif m := re.fullmatch(r"(\w+) is in the (\w+)\.", text):
            told[m[1]] = (n, "at", {m[2]})
        elif m := re.fullmatch(r"(\w+) is (?:not|no longer) in the (\w+)\.", text):
            told[m[1]] = (n, "not", {m[2]})
        elif m := re.fullmatch(r"(\w+) is either in the (\w+) or the (\w+)\.", text):
            told[m[1]] = (n, "either", {m[2], m[3]})
        else:
            raise AssertionError(f"not a statement of bAbI: {text}")
    return where, history, holder, told


def expected(task, facts, question):
    """The answer and support that a careful reader of `facts` gives; for qa5 a set of answers that can be meant."""
    where, history, holder, told = read(facts)
    if task == "qa1":
        who = re.fullmatch(r"Where is (\w+)\?", question)[1]
        return where[who][-1][1], (where[who][-1][0],)
    if task == "qa2":
        thing = re.fullmatch(r"Where is the (\w+)\?", question)[1]
        n, kind, who, _ = history[thing][-1]
        last = [m for m in where[who] if kind == "get" or m[0] < n][-1]
        assert kind == "drop" or last[0] > n
        return last[1], (n, last[0])
    if task == "qa3":
        thing, place = re.fullmatch(r"Where was the (\w+) before the (\w+)\?", question).groups()
        got = [h for h in history[thing] if h[1] == "get"][-1]
        n, kind = history[thing][-1][:2]
        way = [m for m in where[got[2]] if m[0] > got[0] and (kind == "get" or m[0] < n)]
        i = max(i for i, m in enumerate(way) if m[1] == place)
        return way[i - 1][1], (n, way[i][0], way[i - 1][0])
    if task == "qa6":
        who, place = re.fullmatch(r"Is (\w+) in the (\w+)\?", question).groups()
        return "yes" if where[who][-1][1] == place else "no", (where[who][-1][0],)
    if task in ("qa9", "qa10"):
        who, place = re.fullmatch(r"Is (\w+) in the (\w+)\?", question).groups()
        n, kind, places = told[who]
        answer = {"at": "yes", "not": "no", "either": "maybe"}[kind] if place in places else "no"
        assert kind != "not" or place in places, "after a denial only the denied place is asked about"
        return answer, (n,)
    who = re.search(r"is (\w+) carrying", question)[1]
    lines = sorted((h[0], thing, h) for thing, hs in history.items() for h in hs if who in h[2:])
    if task == "qa7":
        return ("none", "one", "two", "three")[list(holder.values()).count(who)], tuple(n for n, _, _ in lines)
    order = list(dict.fromkeys(thing for _, thing, _ in lines))
    answer = ",".join(t for t in order if holder[t] == who) or "nothing"
    return answer, tuple(n for t in order for n, thing, _ in lines if thing == t)


@pytest.mark.parametrize("task", ["qa1", "qa2", "qa3", "qa6", "qa7", "qa8", "qa9", "qa10"])
def test_answers_and_support_follow_from_the_text(task, stories):
    for facts, (text, answer, support) in questions(stories[task]):
        assert (answer, support) == expected(task, facts, text)


def test_qa5_answers_follow_from_the_support(stories):
    kinds = Counter()
    for facts, (text, answer, (n,)) in questions(stories["qa5"]):
        a, thing, b = re.fullmatch(rf"(\w+) (?:{GIVES}) the (\w+) to (\w+)\.", dict(facts)[n]).groups()
        assert [h for h in read(facts)[1][thing] if h[1] == "give"][-1] == (n, "give", a, b)
        meant = {f"What did {a} give to {b}?": thing, f"Who gave the {thing}?": a, f"Who gave the {thing} to {b}?": a,
                 f"Who received the {thing}?": b, f"Who did {a} give the {thing} to?": b}
        assert answer == meant[text]
        kinds[list(meant).index(text)] += 1
    shares = [kinds[i] / sum(kinds.values()) for i in range(5)]
    assert shares == pytest.approx([1 / 3] + [1 / 6] * 4, abs=0.02)


def test_qa4_answers_follow_from_the_map(stories):
    step = {"north": (0, 1), "south": (0, -1), "east": (1, 0), "west": (-1, 0)}
    for story in stories["qa4"]:
        at, subjects = {}, []
        for line in story[:2]:
            subject, direction, other = re.fullmatch(r"The (\w+) is (\w+) of the (\w+)\.", line.text).groups()
            subjects.append((subject, direction, other))
        (s, d, o), (s2, d2, o2) = subjects
        at[o] = (0, 0)
        at[s] = step[d]
        known, unknown, sign = (o2, s2, 1) if o2 in at else (s2, o2, -1)
        at[unknown] = tuple(k + sign * x for k, x in zip(at[known], step[d2]))
        assert len(set(at.values())) == 3 and len({x for x, _ in at.values()} | {9}) in (2, 4)  # three in one line
        text, answer, (n,) = story[2]
        if m := re.fullmatch(r"What is (\w+) of the (\w+)\?", text):
            place = tuple(k + x for k, x in zip(at[m[2]], step[m[1]]))
        else:
            m = re.fullmatch(r"What is the (\w+) (\w+) of\?", text)
            place = tuple(k - x for k, x in zip(at[m[1]], step[m[2]]))
        assert at[answer] == place and subjects[n - 1][0] == answer


# measured on the published training files (10,000 questions a task, qa3 1,000): mean number of statements before a question
@pytest.mark.parametrize("task, mean", [("qa1", 6.0), ("qa2", 15.6), ("qa3", 50.0), ("qa4", 2), ("qa5", 20.1), ("qa6", 6.3),
                                        ("qa7", 8.7), ("qa8", 8.8), ("qa9", 6.0), ("qa10", 6.0)])
def test_length_of_stories(task, mean, stories):
    facts = [len(facts) for facts, _ in questions(stories[task])]
    assert np.mean(facts) == pytest.approx(mean, rel=0.15 if task == "qa3" else 0.06)
    assert all(sum(line.answer is not None for line in story) == (1 if task == "qa4" else 5) for story in stories[task])
    if task != "qa4":
        gaps = [n for story in stories[task] for n in np.diff([0] + [i - k for k, i in enumerate(
                i for i, line in enumerate(story) if line.answer is not None)])]
        assert set(n % 2 for n in gaps) == {0}


# measured likewise: shares of answers in percent
@pytest.mark.parametrize("task, shares", [
    ("qa5", {"Mary": 18.5, "Fred": 17.5, "Bill": 15.9, "Jeff": 14.5, "apple": 13.7, "milk": 9.1, "football": 10.8}),
    ("qa6", {"no": 49.9, "yes": 50.1}), ("qa7", {"one": 48.7, "none": 47.0, "two": 4.1, "three": 0.2}),
    ("qa8", {"nothing": 36.2, "milk": 19.9, "apple": 18.9, "football": 18.6}), ("qa9", {"no": 62.5, "yes": 37.5}),
    ("qa10", {"no": 47.5, "yes": 37.7, "maybe": 14.7}), ("qa1", dict.fromkeys(babilong.PLACES, 16.7))])
def test_shares_of_answers(task, shares, stories):
    answers = Counter(line.answer for _, line in questions(stories[task]))
    measured = {a: 100 * answers[a] / sum(answers.values()) for a in shares}
    assert measured == pytest.approx(shares, abs=3.0)


def test_surface_of_statements(stories):
    texts = {task: [line.text for story in stories[task] for line in story if line.answer is None] for task in TASKS}
    verbs = Counter(re.search(MOVES, t)[0] for t in texts["qa1"])
    assert [verbs[v] / len(texts["qa1"]) for v in MOVES.split("|")] == pytest.approx([0.2] * 5, abs=0.02)
    for task, share in (("qa2", 1.0), ("qa3", 0.2), ("qa5", 1.0), ("qa8", 1.0)):
        got = [t.endswith(" there.") for t in texts[task] if re.search(rf" (?:{GETS}) ", t)]
        assert np.mean(got) == pytest.approx(share, abs=0.03)
    dropped = [t.endswith(" there.") for t in texts["qa2"] if re.search(rf" (?:{DROPS}) ", t)]
    assert np.mean(dropped) == pytest.approx(0.2, abs=0.03)
    kinds = Counter("move" if re.search(MOVES, t) else "in" if " is in " in t else "either" if "either" in t else "not" for t in texts["qa9"])
    assert [kinds[k] / len(texts["qa9"]) for k in ("move", "in", "not")] == pytest.approx([0.5, 0.25, 0.25], abs=0.02)
    either = [re.findall(r"the (\w+)", t) for t in texts["qa10"] if "either" in t]
    assert np.mean([a == b for a, b in either]) == pytest.approx(1 / 6, abs=0.03)


def test_nobody_moves_to_where_they_are(stories):
    for task in ("qa1", "qa2", "qa5"):
        for story in stories[task][:300]:
            where, *_ = read([(n, line.text) for n, line in enumerate(story, 1) if line.answer is None])
            assert all(a[1] != b[1] for moves in where.values() for a, b in zip(moves, moves[1:]))


def test_stories_are_seeded():
    assert simulate("qa5", random.Random(7)) == simulate("qa5", random.Random(7)) != simulate("qa5", random.Random(8))


# ----------------------------------------------------------------------------- files

PUBLISHED = """1 Mary moved to the bathroom.
2 John went to the hallway.
3 Where is Mary? \tbathroom\t1
4 Daniel went back to the hallway.
5 Where is Daniel? \thallway\t4
1 Mary got the milk there.
2 Mary moved to the garden.
3 Where is the milk? \tgarden\t1 2
"""


def test_published_format_is_read_and_written(tmp_path, stories):
    (tmp_path / "qa1_single-supporting-fact_train.txt").write_text(PUBLISHED)
    read_stories = babilong.find_babi(tmp_path, "qa1")
    assert [len(s) for s in read_stories] == [5, 3]
    assert read_stories[0][2] == Line("Where is Mary?", "bathroom", (1,)) and read_stories[1][2].support == (1, 2)
    assert babilong.format_babi("qa1", read_stories) == PUBLISHED
    assert babilong.format_babi("qa4", stories["qa4"][:1]).split("\n")[2][-4:-2].count(" ") == 0
    for task in TASKS:
        path = tmp_path / f"{task}.txt"
        path.write_text(babilong.format_babi(task, stories[task][:50]))
        assert babilong.read_babi(path) == stories[task][:50]


@pytest.mark.parametrize("text, complaint", [
    ("hello\n", "line 1: not 'ID text'"), ("1 A went.\n3 B went.\n", "line 2: line IDs must count"), ("", "no story with a question"),
    ("1 A went.\n2 Where? \tx\n", "line 2: not"), ("1 A went.\n2 Where? \tx\t5\n", "support must name earlier"),
    ("1 A went.\n2 Where? \tx\t1\n3 Where? \tx\t2\n", "line 3: support must name earlier"), ("2 A went.\n", "line 1: line IDs")])
def test_foreign_babi_file_is_refused_with_its_line(tmp_path, text, complaint):
    (tmp_path / "qa1.txt").write_text(text)
    with pytest.raises(ValueError, match=complaint):
        babilong.find_babi(tmp_path, "qa1")


def test_binary_and_missing_files_are_refused(tmp_path):
    (tmp_path / "qa1.txt").write_bytes(b"1 caf\xe9\n")
    with pytest.raises(ValueError, match="not text in UTF-8"):
        babilong.find_babi(tmp_path, "qa1")
    with pytest.raises(ValueError, match="no file for qa2"):
        babilong.find_babi(tmp_path, "qa2")
    (tmp_path / "few.txt").write_text("This is a sentence. " * 500)
    for path in (tmp_path / "few.txt", tmp_path):
        with pytest.raises(ValueError, match="usable sentences|not text"):
            babilong.read_background([str(path)])
    with pytest.raises(OSError, match="nowhere"):
        babilong.read_background([str(tmp_path / "nowhere")])


def test_written_folder(data_dir):
    names = {str(p.relative_to(data_dir)) for p in data_dir.rglob("*") if p.is_file()}
    assert names == {"meta.json", "tokenizer.json", "train/background.txt", "eval/background.txt"} | {f"eval/{t}.txt" for t in TASKS}
    train, held_out = (set((data_dir / split / "background.txt").read_text().splitlines()) for split in ("train", "eval"))
    assert train and held_out and not train & held_out
    assert not any(re.search(r"\b(Mary|John|Daniel|Sandra|Fred|Bill|Jeff|Julie)\b", s) for s in train | held_out)


def test_foreign_folder_is_not_overwritten(tmp_path, haystack):
    (tmp_path / "thesis.txt").write_text("do not delete")
    with pytest.raises(ValueError, match="holds thesis.txt, which is not of"):
        babilong.write_data(tmp_path, ("qa1",), background=[str(haystack)], eval_stories=2)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize("kind", ["link", "dot", "again"])
def test_any_folder_is_written_into(kind, tmp_path, haystack, monkeypatch):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    monkeypatch.chdir(tmp_path / "real")
    for seed in (1, 2) if kind == "again" else (1,):
        babilong.write_data("." if kind == "dot" else tmp_path / "link", ("qa1",), vocab_size=600,
                            background=[str(haystack)], eval_stories=5, seed=seed)
    assert (tmp_path / "link").is_symlink() and babilong.load_data(tmp_path / "real", 32)[2]["seed"] == seed


def babi(count, first=0):
    """`count` stories, each another one, in bAbI's format."""
    return "".join(f"1 Mary went to the {babilong.PLACES[i % 6]}.\n2 John went to the {babilong.PLACES[i // 6]}.\n"
                   f"3 Where is Mary? \t{babilong.PLACES[i % 6]}\t1\n" for i in range(first, first + count))


@pytest.mark.parametrize("files, learned, asked", [
    ({"train": babi(30)}, 27, 3), ({"train": babi(9)}, 8, 1), ({"train": babi(20), "test": babi(10, 20)}, 20, 10),
    ({"train": babi(20), "test": babi(10, 15)}, 15, 10), ({"train": babi(20), "valid": babi(3), "test": babi(2, 25)}, 20, 2)])
def test_published_stories_keep_their_part_and_nothing_asked_was_learned(files, learned, asked, tmp_path, haystack):
    (tmp_path / "babi").mkdir()
    for part, text in files.items():
        (tmp_path / "babi" / f"qa1_one_{part}.txt").write_text("\ufeff" + text)
    babilong.write_data(tmp_path / "data", ("qa1",), babi_dir=str(tmp_path / "babi"), background=[str(haystack)])
    train, held_out, meta = babilong.load_data(tmp_path / "data", 32)
    assert (len(train.stories["qa1"]), len(held_out.stories["qa1"])) == (learned, asked)
    assert not set(map(str, train.stories["qa1"])) & set(map(str, held_out.stories["qa1"]))
    assert train.sample("qa1", 0, 0, segments=2, dense=True).question == "Where is Mary?"


def test_the_whole_archive_is_refused_and_a_lone_story_too(tmp_path):
    for folder in ("en", "en-10k", "shuffled"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "qa1_one_train.txt").write_text(babi(1))
    with pytest.raises(ValueError, match=r"holds qa1 several times: name one of its folders \(en, en-10k, shuffled\)"):
        babilong.find_babi(tmp_path, "qa1", "train")
    with pytest.raises(ValueError, match="it takes two"):
        babilong.find_babi(tmp_path / "en", "qa1", "test")


def call(monkeypatch, *args):
    monkeypatch.setattr("sys.argv", ["prepare_babilong.py", *args])
    babilong.main()


def test_command_line_writes_and_shows(tmp_path, haystack, monkeypatch, capsys):
    common = [f"--data_dir={tmp_path / 'data'}", "--vocab_size=600", f"--background={haystack}", "--tasks=qa1"]
    call(monkeypatch, *common)
    first = capsys.readouterr().out
    call(monkeypatch, *common)
    assert capsys.readouterr().out == first and "hash" in first  # the same input gives the same data
    call(monkeypatch, *common, "--show=qa1", "--length=1k")
    shown = capsys.readouterr().out
    assert re.search(r"\[\[ \w+ [\w ]+\.\]\]", shown) and "target: " in shown and "Where is" in shown
    call(monkeypatch, *common, "--seed=7")
    assert capsys.readouterr().out != first


@pytest.mark.parametrize("args, word", [(["--tasks=qa12"], "--tasks"), (["--vocab_size=10"], "--vocab_size"), (["--show=qa0"], "--show"),
                                        (["--length=7"], "a length is"), (["--block_size=0"], "--block_size"), (["--sed=1"], "--sed")])
def test_bad_flags_are_named_in_one_line(args, word, monkeypatch, capsys):
    with pytest.raises(SystemExit) as e:
        call(monkeypatch, *args)
    (line,) = capsys.readouterr().err.splitlines()
    assert e.value.code == 2 and word in line


def test_a_half_written_folder_is_known_as_such(tmp_path, haystack, monkeypatch):
    """A disk that fills up while the last file is written: the folder is refused until it is made good."""
    common = dict(tasks=("qa1",), background=[str(haystack)], vocab_size=600, eval_stories=5)
    babilong.write_data(tmp_path / "data", **common)
    write = babilong.write_file

    def full(path, content):
        if path.name == "meta.json":
            raise OSError(28, "No space left on device")
        write(path, content)

    with monkeypatch.context() as patch:
        patch.setattr(babilong, "write_file", full)
        with pytest.raises(OSError, match="No space"):
            babilong.write_data(tmp_path / "data", seed=2, **common)
    with pytest.raises(ValueError, match="run prepare_babilong.py again"):
        babilong.load_data(tmp_path / "data", 32)
    babilong.write_data(tmp_path / "data", **common)
    assert babilong.load_data(tmp_path / "data", 32)


def test_files_are_written_where_links_point_to_with_their_mode(tmp_path):
    target, link, pipe = tmp_path / "target", tmp_path / "link", tmp_path / "pipe"
    target.write_text("old")
    target.chmod(0o600)
    link.symlink_to(target)
    babilong.write_file(link, "new")
    assert link.is_symlink() and target.read_text() == "new" and target.stat().st_mode & 0o777 == 0o600
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    babilong.write_file(pipe, b"through")
    assert os.read(reader, 99) == b"through" and pipe.is_fifo() and not list(tmp_path.glob("*.tmp"))
    os.close(reader)


@pytest.mark.parametrize("pattern", [babilong.PATTERN, babilong.LLAMA_PATTERN])
@pytest.mark.parametrize("text", ["a" + " " * 1_500_000, "a" + "\t" * 1_500_000, " " * 3000 + "b", "Mary  went.\n\n to"])
def test_white_space_without_end_is_read(pattern, text, encoding):
    other = babilong.make_encoding(encoding._mergeable_ranks, pattern)
    tokens = babilong.encode(other, text)
    assert other.decode(tokens) == text
    if len(text) < 1000:
        assert tokens == other.encode_ordinary(text)


class Hub(http.server.BaseHTTPRequestHandler):
    """Serves self.server.pages, {path: (status, body, length that the header says)}."""

    def do_GET(self):
        self.server.asked.append(self.path)
        status, body, length = self.server.pages[self.path.split("/")[-2]]
        self.send_response(status)
        self.send_header("Content-Length", str(length or len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


def test_published_samples_are_fetched_once_whole_or_not_at_all(tmp_path):
    record = [{"input": "Mary went to the office.", "question": "Where is Mary?", "target": " office "}]
    good = json.dumps(record).encode()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.asked, server.pages = [], {"qa1": (200, good, None), "qa2": (404, b"", None), "qa3": (200, b"<html>", None),
                                      "qa4": (200, good, len(good) + 9), "qa5": (200, b"[]", None)}
    threading.Thread(target=server.serve_forever, daemon=True).start()
    hub = f"http://127.0.0.1:{server.server_port}"
    for _ in range(2):
        babilong.fetch_babilong(tmp_path, ["qa1"], ["0k"], hub=hub)
    assert server.asked == ["/datasets/RMT-team/babilong/resolve/main/data/qa1/0k.json"]
    for task in ("qa2", "qa3", "qa4", "qa5"):
        with pytest.raises(ValueError, match=f"{task}/0k.json is not to be had"):
            babilong.fetch_babilong(tmp_path, [task], ["0k"], hub=hub)
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["0k.json"]
    server.shutdown()
    published = babilong.Published(babilong.Babilong(babilong.make_encoding({bytes([b]): b for b in range(256)}), None, ["x" * 99], 128), tmp_path)
    assert published.sample("qa1", 0, 0, "0k").target == "office"
    (tmp_path / "qa1" / "0k.json").write_text(json.dumps([{**record[0], "target": "cellar"}]))
    with pytest.raises(ValueError, match="'cellar' is no answer to a question of qa1"):
        babilong.Published(published, tmp_path).read("qa1", "0k")


# ----------------------------------------------------------------------------- tokens

def test_every_babi_word_is_one_token(encoding, stories):
    for task in TASKS:
        for story in stories[task][:100]:
            for line in story:
                text = " " + line.text + (babilong.written(line.answer) if line.answer else "")
                words = re.findall(r" ?\w+|[^\w\s]", text)
                assert [encoding.decode([t]) for t in encoding.encode_ordinary(text)] == words


def test_any_unicode_survives(encoding):
    rng = random.Random(0)
    texts = ["", " ", "\n\n \t\r\n", "a\x00b", "<|endoftext|>", "   x  ", "naïve 東京 🦜‍🔥 e\u0301 \u202e ﷽", "Mary's \u2028 word"]
    valid = [c for c in map(chr, range(0x110000)) if unicodedata.category(c) != "Cs"]
    texts += ["".join(rng.choices(valid, k=200)) for _ in range(50)]
    for text in texts:
        assert encoding.decode(encoding.encode_ordinary(text)) == text


def rank_file(path, *tokens):
    """A file like Llama 3's tokenizer.model: the bytes, then the given tokens."""
    tokens = [bytes([b]) for b in range(256)] + list(tokens)
    path.write_bytes(b"".join(base64.b64encode(token) + f" {rank}\n".encode() for rank, token in enumerate(tokens)))
    return path


def test_tokenizer_of_llama(tmp_path, haystack):
    path = rank_file(tmp_path / "tokenizer.model", b"12", b"123", b" 1", b"th", b"the", b" the", b"'m", b"45")
    meta = babilong.write_data(tmp_path / "data", ["qa1"], background=[str(haystack)], eval_stories=5, tokenizer=str(path))
    encoding = babilong.load_data(tmp_path / "data", block_size=256)[1].encoding
    pieces = [encoding.decode_single_token_bytes(t) for t in encoding.encode_ordinary("I'm the 12345")]
    assert pieces == [b"I", b"'m", b" the", b" ", b"123", b"45"] and encoding.n_vocab == 264 and meta["hash"]  # at most three digits a piece
    assert babilong.dump_tokenizer(babilong.parse_tokenizer(babilong.dump_tokenizer(encoding))) == babilong.dump_tokenizer(encoding)


@pytest.mark.parametrize("content, complaint", [(b"", "not whole"), (b"AA== 0\n", "not whole"), (b"!!! 0\n", "neither gpt2"), (b"AA== 0 1\n", "neither gpt2"),
                                                (b"AA== x\n", "neither gpt2"), (None, "neither gpt2")])
def test_a_file_that_is_no_tokenizer_is_refused(content, complaint, tmp_path):
    path = tmp_path / "tokenizer.model"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=complaint) as e:
        babilong.find_tokenizer(str(path))
    assert "\n" not in str(e.value)


def test_tokenizer_of_tiktoken_without_its_special_tokens(monkeypatch):
    ranks = {bytes([b]): b for b in range(256)} | {b" a": 256}
    theirs = tiktoken.Encoding("gpt2", pat_str=r" ?\w+|\s+|.", mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 257})
    monkeypatch.setattr(tiktoken, "get_encoding", {"gpt2": theirs}.get)
    encoding = babilong.find_tokenizer("gpt2")
    assert encoding.n_vocab == 257 and encoding.encode_ordinary("b a") == [98, 256] == theirs.encode_ordinary("b a")
    assert encoding.decode(encoding.encode_ordinary("<|endoftext|>")) == "<|endoftext|>"


def test_tokenizer_that_cannot_be_fetched_is_one_clear_line(tmp_path):
    env = {**os.environ, "HTTPS_PROXY": "http://127.0.0.1:1", "TIKTOKEN_CACHE_DIR": str(tmp_path / "cache"), "NO_PROXY": "", "no_proxy": ""}
    done = subprocess.run([sys.executable, str(Path(babilong.__file__)), "--tokenizer=o200k_base", f"--data_dir={tmp_path / 'data'}", "--tasks=qa1"],
                          capture_output=True, text=True, env=env)
    assert done.returncode == 1 and done.stderr.splitlines()[-1].startswith("prepare_babilong.py: error: tiktoken could not fetch o200k_base")
    assert "Traceback" not in done.stderr and not (tmp_path / "data" / "meta.json").exists()


def test_tokenizer_file_round_trip_and_damage(encoding):
    text = babilong.dump_tokenizer(encoding)
    assert babilong.dump_tokenizer(babilong.parse_tokenizer(text)) == text
    for damaged in ("", "{}", "[1, 2]", '["a", "a"]', '["\u4e00"]', text[:-20]):
        with pytest.raises(ValueError, match="tokenizer"):
            babilong.parse_tokenizer(damaged)


# ----------------------------------------------------------------------------- samples

@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("size", [{"segments": 12}, {"length": "0k"}, {"length": "2k"}, {"segments": 12, "dense": True},
                                  {"segments": 12, "dense": True, "noise": False}])
def test_samples_are_whole(task, size, data):
    T = data.block_size
    for i in range(20):
        s = data.sample(task, 3, i, **size)
        assert len(s.tokens) % T == 0 and ("segments" not in size or len(s.tokens) == 12 * T)
        # questions with their answers stay within a segment
        for start, end in s.answers:
            text = data.encoding.decode(s.tokens[:end])
            question = len(data.encode(re.findall(r" (?:Where|What|Who|How|Is) [^.?]*\?", text)[-1]))
            assert (start - question) // T == (end - 1) // T
        # what the sample says of itself
        assert data.encoding.decode(s.tokens[s.prompt :]).rstrip("\n") == babilong.written(s.target)
        assert len(s.tokens) - s.prompt == data.room[task]
        assert data.encoding.decode(s.tokens[: s.prompt]).endswith(" " + s.question)
        spans = [s.facts[n] for n in sorted(s.facts)]
        assert spans == sorted(spans) and set(s.support) <= s.facts.keys()
        facts = [(n, data.encoding.decode(s.tokens[slice(*s.facts[n])]).strip()) for n in sorted(s.facts)]
        if task not in ("qa4", "qa5"):
            assert (s.target, s.support) == expected(task, facts, s.question)
        if not size.get("dense"):
            assert len(s.answers) == 1


def test_lengths_are_those_of_babilong(data):
    for k in (1, 4, 16):
        s = data.sample("qa1", 0, k, length=f"{k}k")
        characters = len(data.encoding.decode(s.tokens).rstrip("\n").replace("\n", ""))
        assert characters == pytest.approx(4200 * k, abs=60)
    assert babilong.parse_length("1M") == 4_200_000
    for bad in ("4", "k", "-1k", "4kk", "", "1.5k"):
        with pytest.raises(ValueError, match="a length is"):
            babilong.parse_length(bad)


def test_samples_are_seeded_and_differ(data):
    a, b = (data.sample("qa2", 1, 5, segments=6) for _ in range(2))
    assert np.array_equal(a.tokens, b.tokens)
    for other in (data.sample("qa2", 2, 5, segments=6), data.sample("qa2", 1, 6, segments=6)):
        assert not np.array_equal(a.tokens, other.tokens)


def test_story_that_cannot_fit_is_named(data):
    with pytest.raises(ValueError, match="no story of qa5 fits 1 segments of 8 tokens"):
        babilong.Babilong(data.encoding, None, data.sentences, 8).sample("qa5", 0, 0, segments=1)


def test_position_does_not_tell_the_answer(data):
    """All prompts of a task have one length, whatever the answer's."""
    samples = [data.sample("qa8", 0, i, segments=8) for i in range(100)]
    assert len({s.prompt for s in samples}) == 1 and len({len(data.encode(s.target)) for s in samples}) > 1


@pytest.mark.parametrize("task, question, target, output, right", [
    ("qa1", "Where is Mary?", "office", " office.", True), ("qa1", "Where is Mary?", "office", " The Office. kitchen", True),
    ("qa1", "Where is Mary?", "office", " kitchen. office.", False), ("qa1", "Where is Mary?", "office", " office or kitchen.", False),
    ("qa1", "Where is Mary?", "office", "", False), ("qa3", "Where was the milk before the garden?", "office", " garden office.", True),
    ("qa7", "How many objects is Mary carrying?", "one", " none.", False), ("qa7", "How many objects is Mary carrying?", "none", " none.", True),
    ("qa8", "What is Mary carrying?", "milk,apple", " apple, milk.", True), ("qa8", "What is Mary carrying?", "milk,apple", " milk.", False),
    ("qa8", "What is Mary carrying?", "milk", " milk, apple.", False), ("qa6", "Is Mary in the office?", "no", " not in the office.", False),
    ("qa5", "Who gave the milk to Fred?", "Mary", " Mary gave it to Fred.", True), ("qa10", "Is Bill in the park?", "maybe", " Maybe.", True)])
def test_scoring(task, question, target, output, right):
    assert babilong.score(task, question, target, output) == right


def test_retrieval_keeps_the_closest_sentences_in_text_order(data):
    sample = data.sample("qa1", 0, 3, segments=8)
    for k in (1, 3, 100):
        prompt = data.retrieve(sample, k)
        assert len(prompt) == data.block_size - data.room["qa1"]
        text = data.encoding.decode(prompt)
        person = sample.question[9:-1]
        assert text.endswith(" " + sample.question)
        found = [s.strip() for s in babilong.split_sentences(text.replace(sample.question, ""))]
        facts = [data.encoding.decode(sample.tokens[a:b]).strip() for a, b in sample.facts.values()]
        named = [s for s in facts if s.startswith(person)]
        assert len(found) <= k and [s for s in found if s in named] == named[-k:]
