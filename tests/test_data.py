"""The simulator against the rules of the published bAbI tasks; the files; the samples."""
import base64
import http.server
import json
import os
import random
import re
import threading
import unicodedata
from collections import Counter, defaultdict
from functools import partial

import numpy as np
import pytest
import tiktoken

import prepare_babilong as babilong
from prepare_babilong import PLACES, TASKS, simulate

MOVES = "moved|went back|went|journeyed|travelled"
STATEMENTS = {
    "move": rf"(\w+) (?:{MOVES}) to the (\w+)\.",
    "get": r"(\w+) (?:picked up|grabbed|took|got) the (\w+)(?: there)?\.",
    "drop": r"(\w+) (?:put down|dropped|left|discarded) the (\w+)(?: there)?\.",
    "give": r"(\w+) (?:gave|handed|passed) the (\w+) to (\w+)\.",
    "at": r"(\w+) is in the (\w+)\.",
    "not": r"(\w+) is (?:not|no longer) in the (\w+)\.",
    "either": r"(\w+) is either in the (\w+) or the (\w+)\.",
    "map": r"The (\w+) is (\w+) of the (\w+)\."}


@pytest.fixture(scope="module")
def stories():
    return {task: [simulate(task, random.Random(f"{task}{i}"))
                   for i in range(300 if task == "qa3" else 1500)] for task in TASKS}


def questions(stories):
    """(statements before it with their line numbers, question) of every question."""
    for story in stories:
        for i, line in enumerate(story):
            if line.answer is not None:
                yield [(n, s.text) for n, s in enumerate(story[:i], 1) if s.answer is None], line


def parse(text):
    """(kind, names) of a statement."""
    (found,) = [(kind, match.groups()) for kind, pattern in STATEMENTS.items()
                if (match := re.fullmatch(pattern, text))]
    return found


def read(facts):
    """
    Replays statements from their text alone. Returns what was said of everybody's place, and what
    happened to every object: its last number is who holds it then.
    """
    told, history = defaultdict(list), defaultdict(list)
    for n, text in facts:
        kind, (who, what, *to) = parse(text)
        if kind in ("get", "drop", "give"):
            # only what lies about is taken; only its holder drops it, or gives it to another
            before = history[what][-1][3] if history[what] else None
            after = {"get": who, "drop": None}[kind] if kind != "give" else to[0]
            assert before == (None if kind == "get" else who) and before != after
            history[what].append((n, kind, who, after))
        else:
            # nobody moves to where they are
            assert kind != "move" or not told[who] or told[who][-1][1:] != ("at", {what})
            told[who].append((n, "at" if kind == "move" else kind, {what, *to}))
    return told, history


def expected(task, facts, question):
    """The answer and support that a careful reader of `facts` gives. Not for qa4 and qa5."""
    told, history = read(facts)
    if task in ("qa1", "qa6", "qa9", "qa10"):
        who, place = re.fullmatch(r"(?:Where i|I)s (\w+)(?: in the (\w+))?\?", question).groups()
        n, kind, places = told[who][-1]
        if task == "qa1":
            return *places, (n,)
        # after a denial only the denied place is asked about
        assert kind != "not" or place in places
        answer = {"at": "yes", "not": "no", "either": "maybe"}[kind]
        return answer if place in places else "no", (n,)
    if task in ("qa2", "qa3"):
        pattern = r"Where (?:is|was) the (\w+)(?: before the (\w+))?\?"
        thing, place = re.fullmatch(pattern, question).groups()
        n, kind, who, _ = history[thing][-1]
        moves = [(line, *places) for line, _, places in told[who] if kind == "get" or line < n]
        if task == "qa2":
            assert kind == "drop" or moves[-1][0] > n
            return moves[-1][1], (n, moves[-1][0])
        start = [h[0] for h in history[thing] if h[1] == "get"][-1]
        i = max(i for i, (line, to) in enumerate(moves) if to == place)
        assert moves[i - 1][0] > start
        return moves[i - 1][1], (n, moves[i][0], moves[i - 1][0])
    (who,) = re.search(r"is (\w+) carrying", question).groups()
    lines = sorted((h[0], thing) for thing in history for h in history[thing] if who in h[2:])
    held = [thing for thing in history if history[thing][-1][3] == who]
    if task == "qa7":
        return ("none", "one", "two", "three")[len(held)], tuple(n for n, _ in lines)
    order = dict.fromkeys(thing for _, thing in lines)
    support = tuple(n for t in order for n, thing in lines if thing == t)
    return ",".join(t for t in order if t in held) or "nothing", support


@pytest.mark.parametrize("task", [task for task in TASKS if task not in ("qa4", "qa5")])
def test_answers_and_support_follow_from_the_text(task, stories):
    for facts, (text, answer, support) in questions(stories[task]):
        assert (answer, support) == expected(task, facts, text)


def test_qa5_answers_follow_from_the_support(stories):
    kinds = []
    for facts, (text, answer, (n,)) in questions(stories["qa5"]):
        _, (a, o, b) = parse(dict(facts)[n])
        assert [h for h in read(facts)[1][o] if h[1] == "give"][-1] == (n, "give", a, b)
        meant = {f"What did {a} give to {b}?": o, f"Who gave the {o}?": a,
                 f"Who gave the {o} to {b}?": a, f"Who received the {o}?": b,
                 f"Who did {a} give the {o} to?": b}
        assert answer == meant[text]
        kinds.append(list(meant).index(text))
    shares = np.bincount(kinds) / len(kinds)
    assert shares == pytest.approx([1 / 3] + [1 / 6] * 4, abs=0.02)


def test_qa4_answers_follow_from_the_map(stories):
    step = {"north": 1j, "south": -1j, "east": 1, "west": -1}
    more = [babilong.simulate("qa4", random.Random(i), at_end=3) for i in range(100)]
    assert all(len({text for text, *_ in story}) == 6 for story in more)
    for *lines, (text, answer, (n,)) in stories["qa4"] + [s[:2] + [q] for s in more for q in s[2:]]:
        facts = [parse(line.text)[1] for line in lines]
        (a, direction, b), (c, direction2, d) = facts
        at = {b: 0, a: step[direction]}
        at |= {c: at[d] + step[direction2]} if d in at else {d: at[c] - step[direction2]}
        # three places in one line
        assert len({z.real for z in at.values()}) * len({z.imag for z in at.values()}) == 3
        pattern = r"What is(?: the (\w+))? (\w+) of(?: the (\w+))?\?"
        after, direction, before = re.fullmatch(pattern, text).groups()
        spot = at[after] - step[direction] if after else at[before] + step[direction]
        assert at[answer] == spot and facts[n - 1][0] == answer


# of the published training files (10,000 questions a task, qa3 1,000): the mean number of
# statements before a question, and shares of answers in percent
@pytest.mark.parametrize("task, mean, shares", [
    ("qa1", 6.0, dict.fromkeys(PLACES, 16.7)), ("qa2", 15.6, {}), ("qa3", 50.0, {}), ("qa4", 2, {}),
    ("qa5", 20.1, {"Mary": 18.5, "Fred": 17.5, "Bill": 15.9, "Jeff": 14.5, "apple": 13.7,
                   "milk": 9.1, "football": 10.8}),
    ("qa6", 6.3, {"no": 49.9, "yes": 50.1}),
    ("qa7", 8.7, {"one": 48.7, "none": 47.0, "two": 4.1, "three": 0.2}),
    ("qa8", 8.8, {"nothing": 36.2, "milk": 19.9, "apple": 18.9, "football": 18.6}),
    ("qa9", 6.0, {"no": 62.5, "yes": 37.5}),
    ("qa10", 6.0, {"no": 47.5, "yes": 37.7, "maybe": 14.7})])
def test_stories_are_like_the_published_ones(task, mean, shares, stories):
    counts = [len(facts) for facts, _ in questions(stories[task])]
    answers = Counter(line.answer for _, line in questions(stories[task]))
    assert np.mean(counts) == pytest.approx(mean, rel=0.15 if task == "qa3" else 0.06)
    assert not any(n % 2 for n in counts)
    assert len(counts) == len(stories[task]) * (1 if task == "qa4" else 5)
    assert {a: 100 * answers[a] / len(counts) for a in shares} == pytest.approx(shares, abs=3.0)


def test_surface_of_statements(stories):
    texts = defaultdict(list)
    for task in TASKS:
        for text in (line.text for story in stories[task] for line in story if not line.answer):
            texts[task, parse(text)[0]].append(text)
    verbs = Counter(re.search(MOVES, text)[0] for text in texts["qa1", "move"])
    assert [n / verbs.total() for n in verbs.values()] == pytest.approx([0.2] * 5, abs=0.02)
    for task, kind, share in (("qa2", "get", 1.0), ("qa3", "get", 0.2), ("qa5", "get", 1.0),
                              ("qa8", "get", 1.0), ("qa2", "drop", 0.2)):
        there = [text.endswith(" there.") for text in texts[task, kind]]
        assert np.mean(there) == pytest.approx(share, abs=0.03)
    counts = np.array([len(texts["qa9", kind]) for kind in ("move", "at", "not")])
    assert counts / counts.sum() == pytest.approx([0.5, 0.25, 0.25], abs=0.02)
    same = [a == b for _, (_, a, b) in map(parse, texts["qa10", "either"])]
    assert np.mean(same) == pytest.approx(1 / 6, abs=0.03)


# ----------------------------------------------------------------------------- files

def test_published_format_is_read_and_written(tmp_path, stories):
    path = tmp_path / "qa2_two-supporting-facts_train.txt"
    story = ("1 Mary got the milk there.\n2 Mary moved to the garden.\n"
             "3 Where is the milk? \tgarden\t1 2\n")
    path.write_text(story * 2)
    first, second = babilong.find_babi(tmp_path, "qa2")
    assert first == second and first[2] == ("Where is the milk?", "garden", (1, 2))
    assert babilong.format_babi("qa2", [first, second]) == story * 2
    assert "?\t" in babilong.format_babi("qa4", stories["qa4"][:1])
    for task in TASKS:
        path.write_text(babilong.format_babi(task, stories[task][:50]))
        assert babilong.read_babi(path) == stories[task][:50]


@pytest.mark.parametrize("text, complaint", [
    (b"hello\n", "line 1:"), (b"2 A went.\n", "line 1:"), (b"1 A went.\n3 B went.\n", "line 2:"),
    (b"1 A went.\n2 Where? \tx\n", "line 2:"), (b"1 A went.\n2 Where? \tx\t5\n", "line 2:"),
    (b"1 A went.\n2 Where? \tx\t1\n3 Where? \tx\t2\n", "line 3:"),
    (b"1 A went.\n2 Where? \tx\t \n", "line 2:"), (b"1 A went.\n2 Where? \thut\t1\n", "'hut' is no answer"),
    (b"", "no story with a question"), (b"1 caf\xe9\n", "not text in UTF-8")])
def test_foreign_babi_file_is_refused(text, complaint, tmp_path):
    (tmp_path / "qa1.txt").write_bytes(text)
    with pytest.raises(ValueError, match=complaint):
        babilong.find_babi(tmp_path, "qa1")


@pytest.fixture
def write(tmp_path, haystack):
    """Writes a small tmp_path/data, and loads it."""
    def write(data_dir=tmp_path / "data", **how):
        common = {"background": [str(haystack)], "vocab_size": 600, "eval_stories": 5}
        babilong.write_data(data_dir, ["qa1"], **{**common, **how})
        return babilong.load_data(data_dir, block_size=32)
    return write


def test_written_folder(data_dir):
    files = {str(path.relative_to(data_dir)): path.read_text() for path in data_dir.rglob("*.*")}
    assert files.keys() == {"meta.json", "tokenizer.json", "train/background.txt",
                            "eval/background.txt", *(f"eval/{task}.txt" for task in TASKS)}
    train, held_out = (files[f"{s}/background.txt"].splitlines() for s in ("train", "eval"))
    assert train and held_out and not set(train) & set(held_out)


def test_haystack_names_nobody(tmp_path, haystack):
    names = "Mary John Daniel Sandra Fred Bill Jeff Julie Marybel".split()
    text = " ".join(f"One day {name} met a king." for name in names)
    (tmp_path / "book.txt").write_text(haystack.read_text() + " " + text)
    found = [s for s in babilong.read_background([str(tmp_path)]) if "met a king" in s]
    assert found == ["One day Marybel met a king."]


def test_any_folder_but_a_foreign_one_is_written_into(write, tmp_path, monkeypatch):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    monkeypatch.chdir(tmp_path / "real")
    for seed, folder in enumerate((tmp_path / "link", ".")):
        assert write(folder, seed=seed)[2]["seed"] == seed and (tmp_path / "link").is_symlink()
    with pytest.raises(ValueError, match="holds (link|real)"):
        write(tmp_path)
    assert len(list(tmp_path.iterdir())) == 2
    published = tmp_path / "real" / "train" / "qa1_single-supporting-fact_train.txt"
    published.write_text("1 Mary went to the office.\n2 Where is Mary?\toffice\t1\n")
    with pytest.raises(ValueError, match="holds qa1_single"):
        write(".")
    assert published.exists()


def test_the_same_data_can_be_read_while_they_are_written_once_more(write, tmp_path, monkeypatch):
    """As by two runs that begin together."""
    def read_first(path, content):
        assert babilong.load_data(tmp_path / "data", 32)[2] == meta
        write_file(path, content)

    (*_, meta), write_file = write(), babilong.write_file
    monkeypatch.setattr(babilong, "write_file", read_first)
    assert write()[2] == meta


def test_a_half_written_folder_is_known_as_such(write, tmp_path, monkeypatch):
    def full(path, content):
        if path.name == "meta.json":
            raise OSError(28, "No space left on device")
        write_file(path, content)

    write()
    write_file = babilong.write_file
    monkeypatch.setattr(babilong, "write_file", full)
    with pytest.raises(OSError, match="No space"):
        write(seed=2)
    with pytest.raises(ValueError, match="run prepare_babilong.py again"):
        babilong.load_data(tmp_path / "data", 32)


def babi(count, first=0):
    """`count` stories, each another one, in bAbI's format."""
    return "".join(f"1 Mary went to the {PLACES[i % 6]}.\n2 John went to the {PLACES[i // 6]}.\n"
                   f"3 Where is Mary? \t{PLACES[i % 6]}\t1\n" for i in range(first, first + count))


@pytest.mark.parametrize("files, learned, asked", [
    ({"train": babi(30)}, 27, 3), ({"train": babi(9)}, 8, 1),
    ({"train": babi(20), "test": babi(10, 15)}, 15, 10),
    ({"train": babi(20), "valid": babi(3), "test": babi(2, 25)}, 20, 2)])
def test_nothing_that_is_asked_was_learned(files, learned, asked, write, tmp_path):
    for part, text in files.items():
        (tmp_path / f"qa1_one_{part}.txt").write_text("\ufeff" + text)
    train, held_out, _ = write(babi_dir=str(tmp_path))
    known, new = (set(map(str, data.stories["qa1"])) for data in (train, held_out))
    assert (len(known), len(new)) == (learned, asked) and not known & new
    assert train.sample("qa1", 0, 0, segments=2, dense=1).question == "Where is Mary?"


def test_stories_without_clear_parts_are_refused(write, tmp_path):
    for folder in tmp_path / "en", tmp_path / "en-10k":
        folder.mkdir()
        (folder / "qa1_one_train.txt").write_text(babi(1))
    for folder, complaint in (tmp_path, "holds .*qa1"), (folder, "story"), (__file__, "qa1"):
        with pytest.raises(ValueError, match=complaint):
            write(babi_dir=str(folder))


def test_command_line_writes_and_shows(tmp_path, haystack, monkeypatch, capsys):
    outputs = []
    for extra in "--seed=1337", "--seed=1337", "--seed=7", "--show=qa1":
        monkeypatch.setattr("sys.argv", [
            "prepare_babilong.py", f"--data_dir={tmp_path / 'data'}", "--vocab_size=600",
            f"--background={haystack}", "--tasks=qa1", "--length=1k", extra])
        babilong.main()
        outputs.append(capsys.readouterr().out)
    first, again, other, shown = outputs
    assert first == again != other and "hash" in first
    assert re.search(r"\[\[ \w+ [\w ]+\.\]\]", shown) and "target: " in shown
    monkeypatch.setattr("sys.argv", ["prepare_babilong.py", f"--data_dir={tmp_path / 'data'}", "--show=qa2"])
    with pytest.raises(ValueError, match="holds no qa2: prepare it with --tasks"):
        babilong.main()


def test_files_are_written_where_links_point_to_with_their_mode(tmp_path):
    target, link, pipe = tmp_path / "target", tmp_path / "link", tmp_path / "pipe"
    target.touch(0o600)
    link.symlink_to(target)
    babilong.write_file(link, "new")
    assert link.is_symlink() and target.read_text() == "new"
    assert target.stat().st_mode & 0o777 == 0o600
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    babilong.write_file(pipe, b"through")
    assert os.read(reader, 99) == b"through" and len(list(tmp_path.iterdir())) == 3
    os.close(reader)


class Hub(http.server.SimpleHTTPRequestHandler):
    def copyfile(self, source, outputfile):
        outputfile.write(source.read(9 if "qa4" in self.path else -1))  # of qa4 the line breaks


def test_published_samples_are_fetched_once_whole_or_not_at_all(tmp_path, data):
    record = {"input": "Mary went.", "question": "Where is Mary?", "target": " office "}
    good, root = json.dumps([record]), tmp_path / "hub"
    for task, text in ("qa1", good), ("qa3", "<html>"), ("qa4", good), ("qa5", "[]"):
        page = root / f"datasets/RMT-team/babilong/resolve/main/data/{task}/0k.json"
        page.parent.mkdir(parents=True)
        page.write_text(text)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Hub, directory=root))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    hub, tmp_path = f"http://127.0.0.1:{server.server_port}", tmp_path / "samples"
    babilong.fetch_babilong(tmp_path, ["qa1"], ["0k"], hub=hub)
    for task in "qa2", "qa3", "qa4", "qa5":
        with pytest.raises(ValueError, match=f"{task}/0k.json is not to be had"):
            babilong.fetch_babilong(tmp_path, [task], ["0k"], hub=hub)
    server.shutdown()
    babilong.fetch_babilong(tmp_path, ["qa1"], ["0k"], hub="http://nowhere.invalid")
    (path,) = (path for path in tmp_path.rglob("*") if path.is_file())
    sample = babilong.Published(data, tmp_path, ["0k"]).sample("qa1", 0, 0, "0k")
    assert data.encoding.decode(sample.tokens).split() == "Mary went. Where is Mary?".split()
    assert sample.target == "office" and len(sample.tokens) == sample.prompt + data.room["qa1"]
    # the majority is that of these questions, here of one
    assert data.guess(babilong.Published(data, tmp_path, ["0k"]), "qa1")["majority"] in (0, 100)
    path.write_text(json.dumps([{**record, "target": "cellar"}]))
    with pytest.raises(ValueError, match="'cellar' is no answer to a question of qa1"):
        babilong.Published(data, tmp_path, ["0k"]).read("qa1", "0k")


# ----------------------------------------------------------------------------- tokens

BYTES = [bytes([b]) for b in range(256)]
UNICODE = "".join(c for c in map(chr, range(0x110000)) if unicodedata.category(c) != "Cs")


def test_every_babi_word_is_one_token(encoding, stories):
    for line in (line for task in TASKS for story in stories[task][:100] for line in story):
        text = " " + line.text + (babilong.written(line.answer) if line.answer else "")
        words = re.findall(r" ?\w+|[^\w\s]", text)
        assert [encoding.decode([t]) for t in encoding.encode_ordinary(text)] == words


@pytest.mark.parametrize("pattern", [babilong.PATTERN, babilong.LLAMA_PATTERN])
@pytest.mark.parametrize("text", [
    "", "\n\n \t\r\n", "Mary  went.\n\n to", "a\0b", "<|endoftext|>", "naïve 東京 🦜‍🔥 e\u0301 \u202e",
    "".join(random.Random(0).choices(UNICODE, k=10_000)), "a" + " " * 1_500_000,
    "a" + "\t" * 1_500_000, " " * 3000 + "b"], ids=lambda text: repr(text[:12]))
def test_any_text_survives(pattern, text, encoding):
    encoding = babilong.make_encoding(encoding._mergeable_ranks, pattern)
    tokens = babilong.encode(encoding, text)
    assert encoding.decode(tokens) == text
    assert len(text) > 10_000 or "   " in text or tokens == encoding.encode_ordinary(text)


def test_tokenizer_of_llama(write, tmp_path):
    tokens = BYTES + [b"12", b"123", b" 1", b"th", b"the", b" the", b"'m", b"45"]
    path = tmp_path / "tokenizer.model"
    path.write_bytes(b"".join(base64.b64encode(t) + b" %d\n" % i for i, t in enumerate(tokens)))
    encoding = write(tokenizer=str(path))[0].encoding
    pieces = [tokens[t] for t in encoding.encode_ordinary("I'm the 12345")]
    # at most three digits a piece
    assert pieces == [b"I", b"'m", b" the", b" ", b"123", b"45"] and encoding.n_vocab == 264
    for content in b"", b"AA== 0\n", b"!!! 0\n", b"AA== 0 1\n", b"AA== x\n":
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"\A--tokenizer=.* is neither gpt2.*\Z"):
            babilong.find_tokenizer(str(path))


def test_tokenizer_of_tiktoken_without_its_special_tokens(monkeypatch):
    ranks = {token: rank for rank, token in enumerate([*BYTES, b" a"])}
    theirs = tiktoken.Encoding("gpt2", pat_str=r" ?\w+|\s+|.", mergeable_ranks=ranks,
                               special_tokens={"<|endoftext|>": 257})
    monkeypatch.setattr(tiktoken, "get_encoding", {"gpt2": theirs}.__getitem__)
    encoding = babilong.find_tokenizer("gpt2")
    assert encoding.n_vocab == 257 and encoding.encode_ordinary("b a") == [98, 256]
    assert encoding.decode(encoding.encode_ordinary("<|endoftext|>")) == "<|endoftext|>"
    with pytest.raises(ValueError, match="could not fetch o200k_base"):
        babilong.find_tokenizer("o200k_base")


def test_tokenizer_file_round_trip_and_damage(encoding):
    text = babilong.dump_tokenizer(encoding)
    assert babilong.dump_tokenizer(babilong.parse_tokenizer(text)) == text
    for damaged in "", "{}", "[1, 2]", '["a", "a"]', '["\u4e00"]', text[:-20]:
        with pytest.raises(ValueError, match="tokenizer"):
            babilong.parse_tokenizer(damaged)


# ----------------------------------------------------------------------------- samples

@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("size", [
    {"segments": 12}, {"length": "0k"}, {"length": "2k"}, {"segments": 12, "dense": 1},
    {"segments": 12, "dense": 2}, {"segments": 12, "dense": 1, "noise": False}])
def test_samples_are_whole(task, size, data):
    T, decode = data.block_size, data.encoding.decode
    for i in range(20):
        s = data.sample(task, 3, i, **size)
        assert len(s.tokens) % T == 0 and ("length" in size or len(s.tokens) == 12 * T)
        assert len(s.answers) == 1 or size.get("dense")
        # questions with their answers stay within a segment
        for start, end in s.answers:
            asked = re.findall(r" (?:Where|What|Who|How|Is) [^.?]*\?", decode(s.tokens[:end]))[-1]
            assert (start - len(data.encode(asked))) // T == (end - 1) // T
        # what the sample says of itself; whatever the answer, the prompt has one length
        assert decode(s.tokens[s.prompt :]).rstrip("\n") == babilong.written(s.target)
        assert len(s.tokens) - s.prompt == data.room[task]
        assert decode(s.tokens[: s.prompt]).endswith(" " + s.question)
        spans = [s.facts[n] for n in sorted(s.facts)]
        assert spans == sorted(spans) and set(s.support) <= s.facts.keys()
        if task not in ("qa4", "qa5"):
            facts = [(n, decode(s.tokens[slice(*s.facts[n])]).strip()) for n in sorted(s.facts)]
            assert (s.target, s.support) == expected(task, facts, s.question)


@pytest.mark.parametrize("task", TASKS)
def test_many_questions(task, data):
    train = babilong.Babilong(data.encoding, None, data.sentences, 64)
    one, more, many = ([train.sample(task, 3, i, segments=12, dense=dense) for i in range(100)]
                       for dense in range(3))
    answers = [sum(len(s.answers) for s in samples) for samples in (one, more, many)]
    assert answers[0] == 100 and answers[1] > 150 and answers[2] > 1.1 * answers[1]


def test_questions_on_older_statements():
    def oldest(last):
        """How far back, in statements, the last question of a story goes at most."""
        stories = [babilong.simulate("qa1", random.Random(i), at_end=6, last=last)
                   for i in range(200)]
        return max(sum(line.answer is None for line in story[story[-1].support[0] :])
                   for story in stories)

    assert oldest(5) < 5 < oldest(1000)


def test_sizes(data):
    for k in (1, 4, 16):
        text = data.encoding.decode(data.sample("qa1", 0, k, length=f"{k}k").tokens)
        assert len(text.replace("\n", "")) == pytest.approx(4200 * k, abs=60)
    assert babilong.characters("1M") == 4_200_000
    for bad in "4", "k", "-1k", "4kk", "", "1.5k":
        with pytest.raises(babilong.ArgumentTypeError, match="like 0k"):
            babilong.length(bad)
    small = babilong.Babilong(data.encoding, None, data.sentences, 8)
    with pytest.raises(ValueError, match="no story of qa5 fits 1 segments of 8 tokens"):
        small.sample("qa5", 0, 0, segments=1)


def test_samples_are_seeded(data):
    samples = [data.sample("qa2", seed, i, segments=6).tokens.tolist()
               for seed, i in ((1, 5), (1, 5), (2, 5), (1, 6))]
    assert samples[0] == samples[1] and samples[0] not in samples[2:]


@pytest.mark.parametrize("task, question, target, right, wrong", [
    ("qa1", "Where is Mary?", "office", [" office.", " The Office. kitchen"],
     [" kitchen. office.", " office or kitchen.", ""]),
    ("qa3", "Where was the milk before the garden?", "office", [" garden office."], [" garden."]),
    ("qa5", "Who gave the milk to Fred?", "Mary", [" Mary gave it to Fred."], [" Fred."]),
    ("qa6", "Is Mary in the office?", "no", [" no."], [" not in the office."]),
    ("qa7", "How many objects is Mary carrying?", "none", [" none."], [" one."]),
    ("qa8", "What is Mary carrying?", "milk,apple", [" apple, milk."], [" milk."]),
    ("qa8", "What is Mary carrying?", "milk", [" milk."], [" milk, apple."]),
    ("qa10", "Is Bill in the park?", "maybe", [" Maybe."], [" yes."])])
def test_scoring(task, question, target, right, wrong):
    for output in right + wrong:
        assert babilong.score(task, question, target, output) == (output in right)


def test_retrieval_keeps_the_closest_sentences_in_text_order(data):
    sample, decode = data.sample("qa1", 0, 3, segments=8), data.encoding.decode
    facts = [decode(sample.tokens[a:b]).strip() for a, b in sample.facts.values()]
    named = [fact for fact in facts if fact.split()[0] in sample.question]
    for k in (1, 3, 100):
        prompt = data.retrieve(sample, k)
        before, after = decode(prompt).split(" " + sample.question)
        found = [s.strip() for s in babilong.split_sentences(before)]
        assert len(prompt) == data.block_size - data.room["qa1"] and not after
        assert len(found) <= k and [s for s in found if s in named] == named[-k:]
