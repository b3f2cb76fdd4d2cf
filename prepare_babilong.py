"""
The data: facts of bAbI stories (qa1..qa10) hidden in a haystack of English, as BABILong hides them.

$ python prepare_babilong.py                            # writes data/babilong, without a network
$ python prepare_babilong.py --show=qa2 --length=1k     # prints a sample, its facts marked
$ python prepare_babilong.py --babi_dir=DIR --background=BOOK.txt,FOLDER   # your own texts

What is written are the sources, plain files to look into: stories, sentences, tokenizer. Samples
are composed from them by (seed, index, task, length) as they are needed; training sees none twice.

References:
1) bAbI: Weston et al. 2015, https://arxiv.org/abs/1502.05698, simulated here as published (v1.2)
2) BABILong: Kuratov et al. 2024, https://arxiv.org/abs/2406.10149: composition, lengths, scoring
"""
import argparse
import ast
import base64
import hashlib
import http.client
import json
import math
import os
import random
import re
import shutil
import sys
import sysconfig
import urllib.request
from bisect import bisect
from collections import Counter, defaultdict, namedtuple
from functools import lru_cache
from itertools import accumulate, chain, product
from pathlib import Path

import numpy as np
import tiktoken
from tqdm import tqdm

TASKS = tuple(f"qa{i}" for i in range(1, 11))
CHARS_PER_1K = 4200  # characters of English in 1,000 GPT-2 tokens, the unit of BABILong's lengths
MIN_TOKENS = 10  # shorter background sentences are dropped, as in BABILong

# -----------------------------------------------------------------------------
# the simulator of bAbI v1.2

PLACES = "bathroom", "bedroom", "garden", "hallway", "kitchen", "office"
PLACES_QA10 = "bedroom", "cinema", "kitchen", "office", "park", "school"
OBJECTS = "apple", "football", "milk"
# their order decides who receives
PEOPLE = {task: ("Mary", "John", "Daniel", "Sandra") for task in TASKS} | {
    "qa5": ("Mary", "Fred", "Bill", "Jeff"), "qa7": ("John", "Mary", "Sandra", "Daniel"),
    "qa10": ("Fred", "Bill", "Mary", "Julie")}
KINDS = {"qa1": ("move",), "qa2": ("move", "get", "drop"), "qa3": ("move", "get", "drop"),
         "qa5": ("move", "get", "drop", "give"), "qa6": ("move", "get", "drop"),
         "qa7": ("move", "get", "drop", "give"), "qa8": ("move", "get", "drop")}
VERBS = {"move": ("moved", "went", "went back", "journeyed", "travelled"),
         "get": ("picked up", "grabbed", "took", "got"),
         "drop": ("put down", "dropped", "left", "discarded"),
         "give": ("gave", "handed", "passed")}
ALL_PEOPLE = sorted(set(chain(*PEOPLE.values())))
NUMBERS = "none", "one", "two", "three"
LABELS = {task: PLACES for task in TASKS} | {
    "qa5": (*PEOPLE["qa5"], *OBJECTS), "qa6": ("yes", "no"), "qa7": NUMBERS,
    "qa8": (*OBJECTS, "nothing"), "qa9": ("yes", "no"), "qa10": ("yes", "no", "maybe")}

# a line of a story: a statement (answer None), or a question, its answer and the lines it rests on
Line = namedtuple("Line", "text answer support", defaults=(None, ()))
# what a statement did: its line's number, from 1; what: a place for a move, else an object; to: who
# received it
Event = namedtuple("Event", "line kind who what to", defaults=(None,))


def this_or_another(rng, place, places):
    """`place` in half of the cases, else another one of `places`."""
    return place if rng.random() < 0.5 else rng.choice([p for p in places if p != place])


class World:
    """People who walk about and carry objects: qa1, 2, 3, 5, 6, 7 and 8."""

    def __init__(self, task, rng):
        self.task, self.rng, self.people = task, rng, PEOPLE[task]
        # the reader is not told at first
        self.place = {x: rng.choice(PLACES) for x in self.people + OBJECTS}
        self.holder = dict.fromkeys(OBJECTS)

    def step(self, line):
        """One statement: (text, Event). What cannot happen is drawn again, whole."""
        rng, place, holder = self.rng, self.place, self.holder
        while True:
            kind, who, to = rng.choice(KINDS[self.task]), rng.choice(self.people), None
            if kind == "move":
                what = rng.choice(PLACES)
                if what == place[who]:
                    continue
                place[who], rest = what, f"to the {what}"
            elif kind == "give":
                # not random at all: the first object and the first person that will do
                pairs = [(o, p) for o in OBJECTS for p in self.people
                         if holder[o] not in (None, p) and place[p] == place[holder[o]]]
                if not pairs:
                    continue
                what, to = pairs[0]
                who, holder[what], rest = holder[what], to, f"the {what} to {to}"
            else:
                free = [o for o in OBJECTS if holder[o] is None and place[o] == place[who]]
                near = free if kind == "get" else [o for o in OBJECTS if holder[o] == who]
                if not near:
                    continue
                what = rng.choice(near)
                holder[what], place[what] = who if kind == "get" else None, place[who]
                share = 1.0 if kind == "get" and self.task != "qa3" else 0.2
                rest = f"the {what}" + " there" * (rng.random() < share)
            text = f"{who} {rng.choice(VERBS[kind])} {rest}."
            return text, Event(line, kind, who, what, to)

    def ask(self, focus, events):
        """A question on the event `focus`: (text, answer, support). None: a reader cannot know."""
        rng, task, who, thing = self.rng, self.task, focus.who, focus.what
        about_moves = task in ("qa1", "qa6")
        if (focus.kind == "move") != about_moves or (task == "qa5" and focus.kind != "give"):
            return None

        def moves(person, after=0, before=math.inf):
            return [e for e in events
                    if e.kind == "move" and e.who == person and after < e.line < before]

        if about_moves:
            last = moves(who)[-1]
            if task == "qa1":
                return f"Where is {who}?", last.what, (last.line,)
            place = this_or_another(rng, last.what, PLACES)
            answer = "yes" if place == last.what else "no"
            return f"Is {who} in the {place}?", answer, (last.line,)
        handled = [e for e in events if e.kind != "move" and e.what == thing]
        last = handled[-1]
        dropped = last.line if last.kind == "drop" else math.inf
        if task == "qa2":
            after = 0 if last.kind == "drop" else last.line
            known = moves(last.who, after, dropped)
            if not known:
                return None
            return f"Where is the {thing}?", known[-1].what, (last.line, known[-1].line)
        if task == "qa3":
            got = [e for e in handled if e.kind == "get"][-1]
            way = moves(got.who, got.line, dropped)
            place = rng.choice(way).what if len(way) > 1 else None
            at = max((i for i, e in enumerate(way) if e.what == place), default=0)
            if at == 0:
                return None
            support = last.line, way[at].line, way[at - 1].line
            return f"Where was the {thing} before the {place}?", way[at - 1].what, support
        if task == "qa5":
            line, _, a, o, b = [e for e in handled if e.kind == "give"][-1]
            text, answer = rng.choice([(f"What did {a} give to {b}?", o)] * 2 + [
                (f"Who gave the {o}?", a), (f"Who gave the {o} to {b}?", a),
                (f"Who received the {o}?", b), (f"Who did {a} give the {o} to?", b)])
            return text, answer, (line,)
        mine = [e for e in events if e.kind != "move" and who in (e.who, e.to)]
        if task == "qa7":
            count = NUMBERS[sum(holder == who for holder in self.holder.values())]
            return f"How many objects is {who} carrying?", count, tuple(e.line for e in mine)
        # qa8 names them in the order in which the person first had them
        order = list(dict.fromkeys(e.what for e in mine))
        answer = ",".join(o for o in order if self.holder[o] == who) or "nothing"
        support = tuple(e.line for o in order for e in mine if e.what == o)
        return f"What is {who} carrying?", answer, support


class VagueWorld:
    """People who move with every statement, which may only deny (qa9) or narrow it down (qa10)."""

    def __init__(self, task, rng):
        self.task, self.rng, self.people = task, rng, PEOPLE[task]
        self.places = PLACES_QA10 if task == "qa10" else PLACES
        self.place = {p: rng.choice(self.places) for p in self.people}

    def step(self, line):
        rng, who = self.rng, self.rng.choice(self.people)
        old = self.place[who]
        new = self.place[who] = rng.choice([p for p in self.places if p != old])
        draw, kind, named = rng.random(), "at", (new,)
        if draw < 0.5:
            rest = f"{rng.choice(VERBS['move'])} to the {new}"
        elif draw < 0.75:
            rest = f"is in the {new}"
        elif self.task == "qa9":
            rest, kind, named = f"is {rng.choice(('not', 'no longer'))} in the {old}", "not", (old,)
        else:
            named = [new, rng.choice(self.places)]
            rng.shuffle(named)
            rest, kind = "is either in the {} or the {}".format(*named), "either"
        return f"{who} {rest}.", Event(line, kind, who, tuple(named))

    def ask(self, focus, events):
        who = focus.who
        last = [e for e in events if e.who == who][-1]
        place = this_or_another(self.rng, self.place[who], self.places)
        if last.kind == "not":
            place = last.what[0]
        named = {"at": "yes", "not": "no", "either": "maybe"}[last.kind]
        answer = named if place in last.what else "no"
        return f"Is {who} in the {place}?", answer, (last.line,)


def line_up_places(rng):
    """A story of qa4: three places in a row, in two statements, and a question. Three lines."""
    places, axis = rng.sample(PLACES, 3), rng.choice((("north", "south"), ("west", "east")))
    facts = []
    for outer, middle in (0, 1), (2, 1):  # the one before lies in direction axis[0] of the next
        one, other = (outer, middle) if rng.random() < 2 / 3 else (middle, outer)
        facts.append((places[one], axis[one > other], axis[one < other], places[other]))
    rng.shuffle(facts)
    line = rng.choice((0, 1))
    one, direction, opposite, other = facts[line]
    question = rng.choice((f"What is {direction} of the {other}?",
                           f"What is the {other} {opposite} of?"))
    statements = [Line(f"The {x} is {d} of the {y}.") for x, d, _, y in facts]
    return [*statements, Line(question, one, (line + 1,))]


def simulate(task, rng, questions=5, at_end=0, limit=math.inf):
    """
    One story of `task`, a list of Lines: `questions` times two statements or more and a question,
    as published; then up to `at_end` other questions. None if it exceeds `limit` lines.
    """
    if task == "qa4":
        return line_up_places(rng)
    world, lines, events = (VagueWorld if task in ("qa9", "qa10") else World)(task, rng), [], []

    def ask():
        for focus in rng.sample(events[-5:], min(5, len(events))) * 10:  # on one of the last five
            if question := world.ask(focus, events):
                return question

    for _ in range(questions):
        question = None
        while question is None:
            if len(lines) > limit:
                return None
            for _ in range(2):
                text, event = world.step(len(lines) + 1)
                lines.append(Line(text))
                events.append(event)
            question = ask()
        lines.append(Line(*question))
    asked = {lines[-1].text}
    for _ in range(at_end):
        question = ask()
        if question and question[0] not in asked:
            asked.add(question[0])
            lines.append(Line(*question))
    return lines


# -----------------------------------------------------------------------------
# the published file format

def format_babi(task, stories):
    """
    Stories as text in bAbI's format: 'ID text' or 'ID question<TAB>answer<TAB>support'; IDs restart
    at 1.
    """
    space, rows = "" if task == "qa4" else " ", []  # between a question and its tab
    for story in stories:
        for i, (text, answer, support) in enumerate(story, 1):
            end = f"{space}\t{answer}\t{' '.join(map(str, support))}" if answer else ""
            rows.append(f"{i} {text}{end}\n")
    return "".join(rows)


def read_text(path):
    """The text of a file. OSError: it cannot be read. ValueError: it is not UTF-8."""
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as e:
        raise ValueError(f"{path} is not text in UTF-8 ({e.reason} at byte {e.start})") from None


def read_documents(path):
    """The texts of a file, or of a folder's *.txt files. ValueError, OSError: there are none."""
    files = sorted(Path(path).rglob("*.txt")) if Path(path).is_dir() else [Path(path)]
    texts = [text for text in map(read_text, files) if text.strip()]
    if not texts:
        raise ValueError(f"{path} holds no text")
    return texts


def read_babi(path):
    """Stories (lists of Lines) of a bAbI file. ValueError, with the line's number: another file."""
    stories = []
    for number, row in enumerate(read_text(path).split("\n"), 1):
        if not row.strip():
            continue
        match = re.fullmatch(r"(\d+) ([^\t]+?) *(?:\t([^\t]+)\t([\d ]+))?\r?", row)
        i, text, answer, support = match.groups() if match else (None,) * 4
        stories += [[]] if i == "1" else []
        support, wrong = tuple(map(int, (support or "").split())), None
        if not match:
            wrong = "not 'ID text' or 'ID question<TAB>answer<TAB>support ids'"
        elif not stories or int(i) != len(stories[-1]) + 1:
            wrong = "line IDs must count from 1"
        elif any(not 0 < s < int(i) or stories[-1][s - 1].answer for s in support):
            wrong = "support must name earlier statements"
        if wrong:
            raise ValueError(f"{path}, line {number}: {wrong}")
        stories[-1].append(Line(text, answer, support))
    stories = [story for story in stories if any(line.answer for line in story)]
    if not stories:
        raise ValueError(f"{path} holds no story with a question")
    return stories


def find_babi(folder, task, split=None):
    """
    Stories of `task` in a folder's qa1.txt, or in its published qa1_..._train.txt and _test.txt.
    split: "train" or "test": that file or, where there is one file in all, its first nine tenths or
    the rest; None: all of it. ValueError: it is not clear which file, or a single story.
    """
    files = sorted(p for p in Path(folder).rglob("qa*.txt")
                   if re.match(rf"{task}(_|\.txt$)", p.name))
    parts = {re.search(r"(_train|_valid|_test)?\.txt$", path.name)[1]: path for path in files}
    if not files:
        raise ValueError(f"{folder} holds no file for {task}, like {task}_name.txt or {task}.txt")
    if len(parts) < len(files):
        names = ", ".join(sorted({str(path.parent.relative_to(folder)) for path in files}))
        raise ValueError(f"{folder} holds {task} several times: name one of its folders ({names})")
    if split and {"_train", "_test"} <= parts.keys():
        return read_babi(parts[f"_{split}"])
    stories = read_babi(files[0])
    if split is None or len(files) > 1:
        return stories
    if len(stories) < 2:
        raise ValueError(f"{files[0]} has one story: it takes two, to learn from and to be asked")
    at = len(stories) * 9 // 10
    return stories[:at] if split == "train" else stories[at:]


# -----------------------------------------------------------------------------
# BABILong's published samples

HUB = "https://huggingface.co"
HUB_FILE = "{hub}/datasets/RMT-team/{dataset}/resolve/main/data/{task}/{length}.json"


def parse_records(text):
    """A list of {"input", "question", "target"}, of JSON. ValueError: anything else."""
    try:
        names = "input", "question", "target"
        records = [{name: record[name].strip() for name in names} for record in json.loads(text)]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as e:
        raise ValueError(f"no list of input, question and target ({type(e).__name__})") from None
    if not records:
        raise ValueError("an empty list")
    return records


def fetch_babilong(folder, tasks, lengths, dataset="babilong", hub=HUB):
    """Downloads what is missing of folder/task/length.json. ValueError: it is not to be had."""
    for task, length in tqdm([*product(tasks, lengths)], "downloading", leave=False, disable=None):
        path = Path(folder, task, f"{length}.json")
        if path.exists():
            continue
        url = HUB_FILE.format(hub=hub, dataset=dataset, task=task, length=length)
        try:
            with urllib.request.urlopen(url, timeout=30) as response:
                text = response.read().decode()
            parse_records(text)
        except (OSError, ValueError, http.client.HTTPException) as e:
            raise ValueError(f"{url} is not to be had: {e or type(e).__name__}") from None
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, text)


def write_file(path, content):
    """
    Writes text, or bytes: a file whole or not at all, with the mode that it had; a link where it
    points to; a device, or a pipe, as it is.
    """
    path = Path(os.path.realpath(path))
    content = content if isinstance(content, bytes) else content.encode()
    if path.exists() and not path.is_file():
        return path.write_bytes(content)
    new = Path(f"{path}.tmp")
    try:
        new.write_bytes(content)
        if path.exists():
            shutil.copymode(path, new)
        os.replace(new, path)
    finally:
        new.unlink(missing_ok=True)


# -----------------------------------------------------------------------------
# the haystack and the tokenizer

def split_sentences(text):
    """The sentences of plain text, white space normalised."""
    return re.split(r"(?<=[.!?])[\"'”’)]*\s+(?=[\"'“‘(]?[A-Z])", " ".join(text.split()))


def python_documentation():
    """English sentences that every Python carries: pydoc's topics, its library's docstrings."""
    from pydoc_data.topics import topics
    docs = [topics[name] for name in sorted(topics)]
    library = Path(sysconfig.get_paths()["stdlib"])
    skip = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
    files = sorted(p for p in library.rglob("*.py") if not skip & set(p.relative_to(library).parts))
    kinds = ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef
    for path in tqdm(files, "reading Python's documentation", leave=False, disable=None):
        try:
            nodes = ast.walk(ast.parse(path.read_bytes()))
        except (SyntaxError, ValueError, OSError):
            continue  # some files of the library are not meant to be parsed
        docs += [ast.get_docstring(node) or "" for node in nodes if isinstance(node, kinds)]
    prose = re.compile(r"[A-Z][A-Za-z0-9 ,;:'()-]*[.!?]")  # leaves out tables, code and signatures
    paragraphs = chain(*(re.split(r"\n\s*\n", doc) for doc in docs))
    return [s for par in paragraphs for s in split_sentences(par) if prose.fullmatch(s)]


def read_background(paths=None):
    """
    The haystack: sentences of text files and of folders of *.txt, by default of Python's own
    documentation; each once, and none that names a person of any task. ValueError, OSError: paths
    that do not give a hundred.
    """
    texts = [text for path in paths or () for text in read_documents(path)]
    found = chain(*map(split_sentences, texts)) if paths else python_documentation()
    person = re.compile(rf"\b({'|'.join(ALL_PEOPLE)})\b")
    sentences = [s for s in dict.fromkeys(found) if len(s.split()) > 3 and not person.search(s)]
    if len(sentences) < 100:
        name = ", ".join(paths or ["the documentation of Python"])
        raise ValueError(f"{name}: {len(sentences)} usable sentences, a haystack needs 100")
    return sentences


# a newline is always a token of its own; a word takes along the space before it; every character
# matches something; tiktoken's regular expressions would not survive a million spaces in one piece
PATTERN = r"\n| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|[^\S\n]{1,64}(?=[^\S\n])|[^\S\n]"
# how Llama 3 cuts text before it merges bytes; its file holds the ranks alone
LLAMA_PATTERN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
                 r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")


def train_tokenizer(sentences, vocab_size):
    """
    Byte-level BPE on `sentences`, as a tiktoken.Encoding; each bAbI word is one token, with and
    without a space.
    """
    stories = [simulate(task, random.Random(i)) for task in TASKS for i in range(300)]
    babi = set(chain(*LABELS.values()))
    babi.update(*(re.findall(r"\w+", f"{line.text} {line.answer}") for line in chain(*stories)))
    babi = sorted(w.encode() for word in babi for w in (word, " " + word))
    # near enough, for Python's re
    pattern = PATTERN.replace(r"\p{L}", r"[^\W\d_]").replace(r"\p{N}", r"\d")
    counts = Counter(piece.encode() for s in sentences for piece in re.findall(pattern, " " + s))
    pieces = [[bytes([b]) for b in piece] for piece in counts]
    counts, pairs, where = list(counts.values()), Counter(), defaultdict(set)

    def count(i, sign):
        for pair in zip(pieces[i], pieces[i][1:]):
            pairs[pair] += sign * counts[i]
            where[pair].add(i)

    for i in range(len(pieces)):
        count(i, +1)
    ranks = {bytes([b]): b for b in range(256)}
    while pairs and len(ranks) + sum(w not in ranks for w in babi) < vocab_size:
        pair = max(pairs, key=lambda p: (pairs[p], p))
        if pairs[pair] < 2:
            break
        ranks.setdefault(b"".join(pair), len(ranks))
        for i in where.pop(pair):
            count(i, -1)
            merged = []
            for token in pieces[i]:
                if merged and (merged[-1], token) == pair:
                    merged[-1] += token
                else:
                    merged.append(token)
            pieces[i] = merged
            count(i, +1)
        del pairs[pair]
    for word in babi:  # last: a whole word is looked up first, so its rank needs no path of merges
        ranks.setdefault(word, len(ranks))
    return make_encoding(ranks)


def make_encoding(ranks, pattern=PATTERN):
    """
    The tiktoken.Encoding of {bytes: rank}, without special tokens: what a user types is always
    text. ValueError: a rank or a byte is missing.
    """
    whole = sorted(ranks.values()) == list(range(len(ranks)))
    if not (whole and {bytes([b]) for b in range(256)} <= ranks.keys()):
        raise ValueError("the tokenizer is not whole: a token is there twice, or a byte is missing")
    return tiktoken.Encoding("babilong", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})


def encode(encoding, text):
    """The tokens of any text, a list. A very long run of white space, which the regular
    expressions of some tokenizers would not survive, is cut."""
    long = re.search(r"\s{1000}", text)
    parts = re.findall(r"\s{1,1000}|(?:(?!\s{1000})[\s\S])+", text) if long else [text]
    return [token for part in parts for token in encoding.encode_ordinary(part)]


def dump_tokenizer(encoding):
    """The tokens of an encoding as JSON, by rank, each byte one character (Latin-1)."""
    tokens = [encoding.decode_single_token_bytes(i).decode("latin-1")
              for i in range(encoding.n_vocab)]
    other = {"pattern": encoding._pat_str, "tokens": tokens}
    return json.dumps(tokens if encoding._pat_str == PATTERN else other, indent=0)


def parse_tokenizer(text):
    """The encoding that dump_tokenizer wrote. ValueError: anything else."""
    try:
        tokens, pattern = json.loads(text), PATTERN
        if isinstance(tokens, dict):
            tokens, pattern = tokens["tokens"], tokens["pattern"]
        return make_encoding({t.encode("latin-1"): i for i, t in enumerate(tokens)}, pattern)
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise ValueError(f"the tokenizer is not a list of tokens in JSON ({e})") from None


def find_tokenizer(name):
    """
    tiktoken's encoding of this name, less its special tokens, or that of a file like Llama 3's
    tokenizer.model (a line: a token in base64, its rank). ValueError: there is none.
    """
    if name in ("gpt2", "cl100k_base", "o200k_base"):
        try:
            encoding = tiktoken.get_encoding(name)
        except Exception as e:  # tiktoken lets through whatever its http library raises
            raise ValueError(f"tiktoken could not fetch {name} ({type(e).__name__}): without "
                             "--tokenizer one is trained here, offline") from None
        return make_encoding(encoding._mergeable_ranks, encoding._pat_str)
    try:
        pairs = [line.split() for line in Path(name).read_bytes().splitlines() if line]
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in pairs}
        return make_encoding(ranks, LLAMA_PATTERN)
    except (OSError, ValueError) as e:
        raise ValueError(f"--tokenizer={name} is neither gpt2, cl100k_base, o200k_base nor a file "
                         f"like Llama 3's tokenizer.model ({e})") from None


# -----------------------------------------------------------------------------
# samples

# tokens (S*T,) int64; answers: where all answers in them lie, (start, end); prompt: where the last
# answer starts, with its question and target; facts: {line number: (start, end)}; support: the
# numbers of the lines that the answer rests on
Sample = namedtuple("Sample", "tokens answers prompt question target facts support")


def parse_length(length):
    """Characters of text in a length like '0k', '4k' or '1M'. BadValue: anything else."""
    match = re.fullmatch(r"(\d{1,3})([kM])", length, re.ASCII)
    if not match:
        raise BadValue(f"takes up to three digits and k or M, like 0k, 4k or 1M, not {length!r}")
    return int(match[1]) * CHARS_PER_1K * (1000 if match[2] == "M" else 1)


def written(answer):
    """An answer as the model writes it: 'milk,football' becomes ' milk, football.'"""
    return " " + answer.replace(",", ", ") + "."


def score(task, question, target, output):
    """BABILong's rule: up to the first full stop, `output` names target's labels and no others."""
    labels = {label.lower() for label in LABELS[task]}
    named = labels & set(re.findall(r"\w+", output.split(".")[0].lower()))
    target = set(target.lower().split(","))
    return named - (set(re.findall(r"\w+", question.lower())) - target) == target


class Babilong:
    """
    Composes samples, each a whole number of segments of block_size tokens. stories: {task: list}
    to draw from, or None: simulated afresh; sentences: the haystack, in order.
    """

    def __init__(self, encoding, stories, sentences, block_size):
        self.encoding, self.stories, self.sentences = encoding, stories, sentences
        self.block_size = block_size
        self.encode = lru_cache(maxsize=100_000)(lambda text: tuple(encode(encoding, text)))
        (self.newline,) = self.encode("\n")
        haystack = encoding.encode_ordinary_batch([" " + s for s in sentences])
        self.haystack = [tokens for tokens in haystack if len(tokens) >= MIN_TOKENS]
        if not self.haystack:
            raise ValueError(f"the background has no sentence of {MIN_TOKENS} tokens or more")
        # for the perplexity of its text
        self.documents = [np.fromiter(chain(*self.haystack), dtype=np.int64)]
        # what a token costs, in characters or in tokens
        self.chars = list(map(len, encoding.decode_tokens_bytes(range(encoding.n_vocab))))
        self.ones = [1] * encoding.n_vocab
        # every answer of a task takes the room of the longest: its place must not tell its length
        longest = {**LABELS, "qa8": (*LABELS["qa8"], ",".join(OBJECTS))}
        self.room = {task: max(len(self.encode(written(answer))) for answer in longest[task])
                     for task in TASKS}

    def digest(self):
        """A hash of everything that samples are made of."""
        return sha256(repr((self.stories, self.sentences)).encode())

    def noise(self, rng, budget, cost):
        """Sentences from a random place on, whose tokens cost `budget`; the last one is cut."""
        at, sentences = rng.randrange(len(self.haystack)), []
        while budget > 0:
            sentence = self.haystack[at % len(self.haystack)]
            ends = list(accumulate(cost[t] for t in sentence))
            sentences.append(sentence[: bisect(ends, budget)])
            at, budget = at + 1, budget - ends[-1]
        return sentences

    def story(self, task, rng, dense=False, limit=math.inf):
        """A story that ends with a question, or up to four if dense. None: longer than `limit`."""
        if self.stories is None:
            return simulate(task, rng, rng.randint(1, 5), rng.randint(0, 3) if dense else 0, limit)
        story = rng.choice(self.stories[task])  # one of its questions, and what comes before it
        return story[: rng.choice([i for i, line in enumerate(story, 1) if line.answer])]

    def guess(self, asked, task, n=2000):
        """
        Accuracies in % of two that never read the story: one gives the commonest answer of the
        task, one the commonest to the question's words. They learn n of these stories, and answer
        n of `asked`.
        """
        rng, counts = random.Random(task), defaultdict(Counter)
        learn, ask = ([source.story(task, rng)[-1] for _ in range(n)] for source in (self, asked))
        for line in learn:
            for words in "", line.text:
                counts[words][line.answer] += 1
        best = {words: counter.most_common(1)[0][0] for words, counter in counts.items()}
        right = [[best[""] == line.answer, best.get(line.text, best[""]) == line.answer]
                 for line in ask]
        majority, question_only = (100 * np.mean(right, axis=0)).round(1).tolist()
        return {"task": task, "majority": majority, "question_only": question_only}

    def sample(self, task, seed, index, segments=None, length=None, dense=False, noise=True):
        """
        Sample `index` of `task`: of `segments` segments, or of a BABILong length such as "4k",
        rounded up to whole segments. dense: with further questions, in between and at the end, for
        training. noise=False: newlines in place of a haystack. ValueError: no story fits.
        """
        rng = random.Random(f"{seed}/{task}/{segments}/{length}/{index}")
        # a line has five tokens or more
        limit = segments * self.block_size // 5 if segments else math.inf
        for _ in range(10_000):
            story = self.story(task, rng, dense, limit)
            sample = story and self.compose(task, rng, story, segments, length, dense, noise)
            if sample:
                return sample
        raise ValueError(f"no story of {task} fits {segments} segments of {self.block_size} "
                         "tokens: take more, or longer ones")

    def pieces(self, line):
        """The tokens of a line's text, and of its answer."""
        answer = self.encode(written(line.answer)) if line.answer else ()
        return self.encode(" " + line.text), answer

    def compose(self, task, rng, story, segments, length, dense, noise):
        """The Sample of a story that ends with a question, or None if it does not fit."""
        T, n = self.block_size, 1  # n questions end the story
        while dense and story[-n - 1].answer:
            n += 1
        between = dense and rng.random() < 0.5
        parts = [(i, *self.pieces(line)) for i, line in enumerate(story[:-n], 1)
                 if between or not line.answer]
        end, last = [], []
        for text, answer in map(self.pieces, story[-n:]):
            end += text + answer
            last.append((len(end) - len(answer), len(end)))
        end += [self.newline] * (self.room[task] - len(answer))
        # what is left for the haystack; to keep questions in between whole can take up to `slack`
        cost = self.chars if length else self.ones
        slack = sum(len(text + answer) - 1 for _, text, answer in parts if answer)
        budget = parse_length(length) if length else segments * T - slack
        budget -= sum(cost[t] for t in chain(end, *(text + answer for _, text, answer in parts)))
        if len(end) > T or (budget < 0 and not length):
            return None
        sentences = self.noise(rng, budget, cost) if noise else []
        places = sorted(rng.choices(range(len(sentences) + 1), k=len(parts)))
        tokens, facts, answers, done = [], {}, [], 0
        for place, (i, text, answer) in zip(places, parts):
            tokens += chain(*sentences[done:place])
            done, start = place, len(tokens)
            if answer and start // T != (start + len(text + answer) - 1) // T:
                tokens += [self.newline] * (-start % T)
                start = len(tokens)
            tokens += text + answer
            if answer:
                answers.append((start + len(text), len(tokens)))
            else:
                facts[i] = (start, len(tokens))
        tokens += chain(*sentences[done:])
        used = len(tokens) + len(end)
        gap = -used % T if length else segments * T - used
        sentences = self.noise(rng, gap, self.ones) if noise and not length else []
        tokens += chain(*sentences or [[self.newline] * gap])
        answers += [(len(tokens) + a, len(tokens) + b) for a, b in last]
        question, target, support = story[-1]
        tokens = np.array(tokens + end)
        return Sample(tokens, answers, answers[-1][0], question, target, facts, support)

    def retrieve(self, sample, k):
        """
        A prompt of one segment, less the answer's room, in place of the sample's own, as tokens
        (T - room,): of the k sentences that BM25 (k1 = 1.5, b = 0.75) ranks closest to the question
        those that fit, in the text's order, and the question.
        """
        question = self.encode(" " + sample.question)
        text = self.encoding.decode(sample.tokens[: sample.prompt - len(question)])
        sentences = split_sentences(text)
        words = [re.findall(r"\w+", s.lower()) for s in sentences]
        asked = dict.fromkeys(re.findall(r"\w+", sample.question.lower()))
        counts = np.array([[w.count(q) for q in asked] for w in words])
        length, n = np.array([len(w) for w in words]), (counts > 0).sum(axis=0)
        idf = np.log(1 + (len(words) - n + 0.5) / (n + 0.5))
        norm = (0.375 + 1.125 * length / length.mean())[:, None]
        scores = (idf * counts * 2.5 / (counts + norm)).sum(axis=1)
        pieces, room = {}, self.block_size - (len(sample.tokens) - sample.prompt) - len(question)
        # of equals the later one
        for i in sorted(range(len(words)), key=lambda i: (-scores[i], -i))[:k]:
            piece = encode(self.encoding, " " + sentences[i])
            if len(piece) <= room:
                pieces[i], room = piece, room - len(piece)
        found = chain(*(pieces[i] for i in sorted(pieces)))
        return np.array([*found, *[self.newline] * room, *question])


class Published(Babilong):
    """BABILong's published samples, of folder/task/length.json. Their facts are not marked."""

    def __init__(self, like, folder):
        super().__init__(like.encoding, None, like.sentences, like.block_size)
        self.folder = folder
        self.read = lru_cache()(self.read)

    def read(self, task, length):
        """The records of a file. ValueError: a target that no answer could match."""
        path = Path(self.folder, task, f"{length}.json")
        records = parse_records(read_text(path))
        for record in records:
            target = record["target"]
            if not score(task, record["question"], target, written(target)):
                raise ValueError(f"{path}: {target!r} is no answer to a question of {task}")
        return records

    def digest(self):
        files = sorted(Path(self.folder).rglob("*.json"))
        return sha256(b"".join(path.read_bytes() for path in files))

    def sample(self, task, seed, index, length):
        """Sample `index` of a file: text, newlines up to a border, question, room for an answer."""
        record, T, room = self.read(task, length)[index], self.block_size, self.room[task]
        text = encode(self.encoding, "".join(" " + s for s in split_sentences(record["input"])))
        question = list(self.encode(" " + " ".join(record["question"].split())))
        end = len(question) + room
        if end > T:
            raise ValueError(f"a question of {len(question)} tokens and its answer do not fit a "
                             f"segment of {T}")
        tokens = text + [self.newline] * (-(len(text) + end) % T) + question
        prompt, tokens = len(tokens), np.array(tokens + [self.newline] * room)
        return Sample(tokens, [], prompt, record["question"], record["target"], {}, ())


class Documents:
    """
    Plain text in place of stories. texts: documents; share: which part of each, from and to, 0 to
    1. A sample is consecutive segments of one document.
    """

    newline = -1  # is a token like any other here

    def __init__(self, encoding, texts, block_size, share=(0.0, 1.0)):
        self.encoding, self.block_size = encoding, block_size
        parts = [text[int(share[0] * len(text)) : int(share[1] * len(text))] for text in texts]
        documents = [np.array(encode(encoding, part)) for part in parts]
        self.documents = [tokens for tokens in documents if len(tokens) > 1]
        self.ends = list(accumulate(map(len, self.documents)))
        if not self.ends or self.ends[-1] < block_size:
            raise ValueError(f"the text is too short: {share[1] - share[0]:.0%} of it must fill a "
                             f"segment of {block_size} tokens")

    def digest(self):
        return sha256(b"".join(document.tobytes() + b"|" for document in self.documents))

    def sample(self, task, seed, index, segments, **which):
        """Sample `index`, of `segments` segments; prompt: so many tokens are text, the rest 0."""
        rng, size = random.Random(f"{seed}/{segments}/{index}"), segments * self.block_size
        at = rng.randrange(self.ends[-1])
        i = bisect(self.ends, at)
        document = self.documents[i]
        start = max(0, min(at - self.ends[i] + len(document), len(document) - size))
        tokens = document[start : start + size]
        padded = np.pad(tokens, (0, size - len(tokens)))
        return Sample(padded, [], len(tokens), None, None, {}, ())


# -----------------------------------------------------------------------------
# the files

def sha256(content):
    """The first 16 characters of the hash of bytes."""
    return hashlib.sha256(content).hexdigest()[:16]


def write_data(data_dir, tasks=TASKS, babi_dir=None, background=None, vocab_size=2048, seed=1337,
               eval_stories=1000, tokenizer=None):
    """
    Writes data_dir: tokenizer.json and, in train/ and eval/, background.txt (a sentence a line) and
    stories qa*.txt, but no train/qa*.txt where they are simulated: training simulates its own.
    meta.json comes last: without it the folder is not used. Returns it, a dict. ValueError,
    OSError: what cannot be used, read or written.
    """
    data_dir, ours = Path(data_dir), {"tokenizer.json", "meta.json", "train", "eval"}
    data_dir.mkdir(parents=True, exist_ok=True)
    if foreign := {path.name for path in data_dir.iterdir()} - ours - {"meta.json.tmp"}:
        raise ValueError(f"{data_dir} holds {min(foreign)}, which is not of prepare_babilong.py: "
                         "name another --data_dir")
    for split in "train", "eval":  # before the work, so that a mistake shows at once
        (data_dir / split).mkdir(exist_ok=True)
    sentences, files = read_background(background), {}  # name: text
    for split, held_out in ("train", False), ("eval", True):  # a tenth, in runs of 50 sentences
        part = [s for i, s in enumerate(sentences) if (i // 50 % 10 == 9) == held_out]
        files[f"{split}/background.txt"] = "".join(s + "\n" for s in part)
    for task in tqdm(tasks, desc="stories", leave=False, disable=None):
        if babi_dir:
            test = find_babi(babi_dir, task, "test")
            seen = set(map(str, test))  # what is asked must not have been learned
            train = [s for s in find_babi(babi_dir, task, "train") if str(s) not in seen]
            if not train:
                raise ValueError(f"{babi_dir}: all of {task}'s training stories are in its test")
            files[f"train/{task}.txt"] = format_babi(task, train)
        else:
            test = [simulate(task, random.Random(f"{seed}/eval/{task}/{i}"))
                    for i in range(eval_stories)]
        files[f"eval/{task}.txt"] = format_babi(task, test)
    if tokenizer:
        encoding = find_tokenizer(tokenizer)
    else:
        encoding = train_tokenizer(files["train/background.txt"].splitlines(), vocab_size)
    files["tokenizer.json"] = dump_tokenizer(encoding)
    digest = sha256("".join(name + files[name] for name in sorted(files)).encode())
    python = f"documentation of Python {sys.version.split()[0]}"
    meta = {"hash": digest, "tasks": ",".join(tasks), "stories": babi_dir or "simulated",
            "background": ",".join(background or [python]), "seed": seed}
    (data_dir / "meta.json").unlink(missing_ok=True)
    for old in data_dir.glob("*/qa*.txt"):
        old.unlink()
    for name, text in (files | {"meta.json": json.dumps(meta, indent=2) + "\n"}).items():
        write_file(data_dir / name, text)
    return meta


def load_data(data_dir, block_size):
    """(train Babilong, eval Babilong, meta) of a folder of write_data. ValueError: it is none."""
    data_dir, splits = Path(data_dir), []
    try:
        meta = json.loads(read_text(data_dir / "meta.json"))
        encoding = parse_tokenizer(read_text(data_dir / "tokenizer.json"))
        for split in "train", "eval":
            stories, folder = None, data_dir / split
            if split == "eval" or meta["stories"] != "simulated":
                stories = {task: find_babi(folder, task) for task in meta["tasks"].split(",")}
            sentences = read_text(folder / "background.txt").splitlines()
            splits.append(Babilong(encoding, stories, sentences, block_size))
    except (OSError, KeyError, ValueError) as e:
        why = f"{data_dir} cannot be used ({e}): run prepare_babilong.py again"
        raise ValueError(why) from None
    return *splits, meta


def show(data, task, **which):
    """Prints a sample: facts in [brackets], those that the answer rests on in [[double ones]]."""
    sample, marks = data.sample(task, seed=0, index=0, **which), defaultdict(bytes)
    for i, (start, end) in sample.facts.items():
        n = 2 if i in sample.support else 1
        marks[start], marks[end] = marks[start] + b"[" * n, b"]" * n + marks[end]
    tokens = enumerate(data.encoding.decode_tokens_bytes(sample.tokens))
    print(b"".join(marks[i] + token for i, token in tokens).decode(errors="replace").strip())
    T = data.block_size
    print(f"\n{len(sample.tokens)} tokens, {len(sample.tokens) // T} segments of {T}; "
          f"{len(sample.facts)} facts; target: {sample.target}")


# -----------------------------------------------------------------------------
# flags

class BadValue(ValueError, argparse.ArgumentTypeError):
    """A flag's value that cannot be used, and why."""


class Parser(argparse.ArgumentParser):
    """Lists defaults under -h, and says what is wrong with a flag in one line."""

    def __init__(self, description):
        super().__init__(description=description, allow_abbrev=False,
                         formatter_class=argparse.ArgumentDefaultsHelpFormatter)

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message}\n")

    def parse_args(self, args=None, namespace=None):
        """As argparse's; what a terminal or a pipe cannot show is then shown as ?"""
        for stream in sys.stdout, sys.stderr:
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(errors="replace")
        return super().parse_args(args, namespace)

    def add_group(self, title):
        """The flags that follow are listed under this title."""
        self.group = self.add_argument_group(title)

    def flag(self, name, default, help, kind=str, choices=None):
        """Adds --name to the group; with a bool as default --name and --no-name."""
        how = {"type": kind, "choices": choices}
        if isinstance(default, bool):
            how = {"action": argparse.BooleanOptionalAction}
        self.group.add_argument(f"--{name}", default=default, help=help, **how)


def number(kind, low, high=math.inf):
    """An argparse type: an int or a finite float from low to high."""
    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not (low <= value <= high and math.isfinite(value)):
            name = "a whole number" if kind is int else "a number"
            end = f"to {high}" if high < math.inf else "on"
            raise BadValue(f"takes {name} from {low} {end}, not {text!r}")
        return value
    return parse


def several(kind):
    """An argparse type: what is separated by commas, each part of type `kind` and taken once."""
    def parse(text):
        parts = [kind(part.strip()) for part in text.split(",") if part.strip()]
        if not parts:
            raise BadValue(f"takes one value or more, separated by commas, not {text!r}")
        return list(dict.fromkeys(parts))
    return parse


def out_file(text):
    """An argparse type: a file that can be written when the work is done."""
    if Path(text).is_dir() or not Path(text).absolute().parent.is_dir():
        raise BadValue(f"cannot write {text}: it is a folder, or its folder is missing")
    return text


def length(text):
    """An argparse type: a length like 4k, left as it is."""
    parse_length(text)
    return text


def parse_tasks(text):
    """An argparse type: ['qa1', 'qa2'] from 'qa1,qa2', or all of them."""
    tasks = list(TASKS) if text == "all" else several(str)(text)
    if unknown := set(tasks) - set(TASKS):
        raise BadValue(f"takes names of qa1 to qa10, by commas, or all, not {min(unknown)!r}")
    return tasks


def get_parser():
    parser = Parser("Writes the data, or shows a sample of it.")
    flag, group = parser.flag, parser.add_group
    group("data")
    flag("data_dir", "data/babilong", "folder to write")
    flag("tasks", "all", "bAbI tasks, like qa1,qa2, or all", parse_tasks)
    flag("babi_dir", None, "published bAbI files, in place of the simulator: their folder")
    flag("background", None, "haystack: text files and folders of *.txt, by commas", several(str))
    flag("vocab_size", 2048, "most tokens of the tokenizer trained here", number(int, 512, 65536))
    flag("tokenizer", None, "in its place: gpt2, cl100k_base or o200k_base, which tiktoken "
         "fetches, or a Llama 3's tokenizer.model")
    flag("seed", 1337, "of the evaluation stories", number(int, 0, 2**63 - 1))
    group("BABILong's own samples, for train.py --eval_only --babilong_dir=CACHE_DIR/DATASET")
    flag("source", "local", "hub: download them, and nothing else", choices=("local", "hub"))
    flag("lengths", "0k,1k,2k,4k", "of their texts", several(length))
    flag("dataset", "babilong", "100 or 1,000 samples each",
         choices=("babilong", "babilong-1k-samples"))
    flag("hub_url", HUB, "where they are")
    flag("cache_dir", "data/cache", "where they go")
    group("show")
    flag("show", None, "print a sample of this task; writes data_dir if missing", choices=TASKS)
    flag("length", None, "of the sample, like 0k or 4k; default: --segments", length)
    flag("segments", 4, "of the sample", number(int, 1, 10**6))
    flag("block_size", 64, "tokens of a segment", number(int, 1, 2**20))
    return parser


def main():
    args = get_parser().parse_args()
    if args.source == "hub":
        folder = Path(args.cache_dir, args.dataset)
        hub = args.hub_url.rstrip("/")
        fetch_babilong(folder, args.tasks, args.lengths, args.dataset, hub)
        return print(f"in {folder}: {', '.join(args.lengths)} of {', '.join(args.tasks)}")
    if not args.show or not Path(args.data_dir, "meta.json").exists():
        meta = write_data(args.data_dir, args.tasks, args.babi_dir, args.background,
                          args.vocab_size, args.seed, tokenizer=args.tokenizer)
        print(f"wrote {args.data_dir}: {', '.join(f'{k} {v}' for k, v in meta.items())}")
    if args.show:
        held_out = load_data(args.data_dir, args.block_size)[1]
        show(held_out, args.show, segments=args.segments, length=args.length)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as e:
        sys.exit(f"prepare_babilong.py: error: {e}")
    except KeyboardInterrupt:
        sys.exit(130)
