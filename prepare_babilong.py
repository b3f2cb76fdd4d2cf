"""
The data: facts of bAbI stories (qa1..qa10) hidden in a haystack of English, as BABILong hides them.

$ python prepare_babilong.py                                 # writes data/babilong, with no network and no download
$ python prepare_babilong.py --show=qa2 --length=1k          # prints one sample, its facts marked
$ python prepare_babilong.py --babi_dir=DIR --background=BOOK.txt,FOLDER   # published stories, your own haystack

What is written are the sources, plain files to look into: stories, sentences, tokenizer. The samples are composed
from them on the fly by (seed, index, task, length); training never sees one twice.

References:
1) bAbI: Weston et al. 2015, https://arxiv.org/abs/1502.05698. The simulator writes the published v1.2 format.
2) BABILong: Kuratov et al. 2024, https://arxiv.org/abs/2406.10149. Composition, lengths and scoring.
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

PLACES = ("bathroom", "bedroom", "garden", "hallway", "kitchen", "office")
PLACES_QA10 = ("bedroom", "cinema", "kitchen", "office", "park", "school")
OBJECTS = ("apple", "football", "milk")
PEOPLE = {"qa5": ("Mary", "Fred", "Bill", "Jeff"), "qa7": ("John", "Mary", "Sandra", "Daniel"),
          "qa10": ("Fred", "Bill", "Mary", "Julie")}  # their order decides who receives; elsewhere it means nothing
ALL_PEOPLE = sorted({"Mary", "John", "Daniel", "Sandra"}.union(*PEOPLE.values()))
KINDS = {"qa1": ("move",), "qa2": ("move", "get", "drop"), "qa3": ("move", "get", "drop"),
         "qa5": ("move", "get", "drop", "give"), "qa6": ("move", "get", "drop"),
         "qa7": ("move", "get", "drop", "give"), "qa8": ("move", "get", "drop")}
VERBS = {"move": ("moved", "went", "went back", "journeyed", "travelled"),
         "get": ("picked up", "grabbed", "took", "got"),
         "drop": ("put down", "dropped", "left", "discarded"),
         "give": ("gave", "handed", "passed")}
NUMBERS = ("none", "one", "two", "three")
LABELS = {"qa5": ("Mary", "Fred", "Bill", "Jeff", *OBJECTS), "qa6": ("yes", "no"), "qa7": NUMBERS,
          "qa8": (*OBJECTS, "nothing"), "qa9": ("yes", "no"), "qa10": ("yes", "no", "maybe")}
LABELS = {task: LABELS.get(task, PLACES) for task in TASKS}
LISTS = {"qa8": (",".join(OBJECTS),)}  # the longest answer that is made of several labels

# a line of a story: a statement (answer None), or a question with its answer and the numbers of the lines it rests on
Line = namedtuple("Line", "text answer support", defaults=(None, ()))
# what a statement did: `line` its number from 1; `what` a place for a move, else an object; `to` who received it
Event = namedtuple("Event", "line kind who what to", defaults=(None,))


class World:
    """People who walk about a fixed set of places and carry objects: qa1, 2, 3, 5, 6, 7 and 8."""

    def __init__(self, task, rng):
        self.task, self.rng = task, rng
        self.people = PEOPLE.get(task, ("Mary", "John", "Daniel", "Sandra"))
        self.place = {x: rng.choice(PLACES) for x in self.people + OBJECTS}  # hidden from the reader at first
        self.holder = dict.fromkeys(OBJECTS)

    def step(self, line):
        """One statement. Returns (text, Event). What cannot happen is drawn again, whole."""
        rng = self.rng
        while True:
            kind, who, to = rng.choice(KINDS[self.task]), rng.choice(self.people), None
            if kind == "move":
                what = rng.choice(PLACES)
                if what == self.place[who]:
                    continue
                self.place[who] = what
                return f"{who} {rng.choice(VERBS[kind])} to the {what}.", Event(line, kind, who, what)
            if kind == "give":  # not random at all: the first object and the first person that will do
                pairs = [(o, p) for o in OBJECTS for p in self.people
                         if self.holder[o] not in (None, p) and self.place[p] == self.place[self.holder[o]]]
                if not pairs:
                    continue
                what, to = pairs[0]
                who, self.holder[what] = self.holder[what], to
                return f"{who} {rng.choice(VERBS[kind])} the {what} to {to}.", Event(line, kind, who, what, to)
            if kind == "get":
                within_reach = [o for o in OBJECTS if self.holder[o] is None and self.place[o] == self.place[who]]
            else:
                within_reach = [o for o in OBJECTS if self.holder[o] == who]
            if within_reach:
                what = rng.choice(within_reach)
                self.holder[what], self.place[what] = (who if kind == "get" else None), self.place[who]
                there = " there" if rng.random() < (1.0 if kind == "get" and self.task != "qa3" else 0.2) else ""
                return f"{who} {rng.choice(VERBS[kind])} the {what}{there}.", Event(line, kind, who, what)

    def ask(self, focus, events):
        """A question about the event `focus`: (text, answer, support), or None where a reader could not know."""
        rng, task, who, thing = self.rng, self.task, focus.who, focus.what
        if (focus.kind == "move") != (task in ("qa1", "qa6")) or (task == "qa5" and focus.kind != "give"):
            return None

        def moves(person, after=0, before=math.inf):
            return [e for e in events if e.kind == "move" and e.who == person and after < e.line < before]

        if task == "qa1":
            last = moves(who)[-1]
            return f"Where is {who}?", last.what, (last.line,)
        if task == "qa6":
            last = moves(who)[-1]
            place = last.what if rng.random() < 0.5 else rng.choice([p for p in PLACES if p != last.what])
            return f"Is {who} in the {place}?", "yes" if place == last.what else "no", (last.line,)
        handled = [e for e in events if e.kind != "move" and e.what == thing]
        if task == "qa2":
            last = handled[-1]
            known = moves(last.who, before=last.line) if last.kind == "drop" else moves(last.who, after=last.line)
            return (f"Where is the {thing}?", known[-1].what, (last.line, known[-1].line)) if known else None
        if task == "qa3":
            got = [e for e in handled if e.kind == "get"][-1]
            way = moves(got.who, got.line, handled[-1].line if handled[-1].kind == "drop" else math.inf)
            place = rng.choice(way).what if len(way) > 1 else None
            if place is None or (last := max(i for i, e in enumerate(way) if e.what == place)) == 0:
                return None
            support = handled[-1].line, way[last].line, way[last - 1].line
            return f"Where was the {thing} before the {place}?", way[last - 1].what, support
        if task == "qa5":
            line, _, a, o, b = [e for e in handled if e.kind == "give"][-1]
            questions = [(f"What did {a} give to {b}?", o)] * 2 + [
                (f"Who gave the {o}?", a), (f"Who gave the {o} to {b}?", a),
                (f"Who received the {o}?", b), (f"Who did {a} give the {o} to?", b)]
            return *rng.choice(questions), (line,)
        mine = [e for e in events if e.kind != "move" and who in (e.who, e.to)]
        if task == "qa7":
            count = sum(holder == who for holder in self.holder.values())
            return f"How many objects is {who} carrying?", NUMBERS[count], tuple(e.line for e in mine)
        order = list(dict.fromkeys(e.what for e in mine))  # qa8: in which the person first ever took them
        answer = ",".join(o for o in order if self.holder[o] == who) or "nothing"
        return f"What is {who} carrying?", answer, tuple(e.line for o in order for e in mine if e.what == o)


class VagueWorld:
    """People who move with every statement, which may only deny (qa9) or narrow down (qa10) where they are."""

    def __init__(self, task, rng):
        self.task, self.rng = task, rng
        self.people = PEOPLE.get(task, ("Mary", "John", "Daniel", "Sandra"))
        self.places = PLACES_QA10 if task == "qa10" else PLACES
        self.place = {p: rng.choice(self.places) for p in self.people}

    def step(self, line):
        rng, who = self.rng, self.rng.choice(self.people)
        old = self.place[who]
        new = self.place[who] = rng.choice([p for p in self.places if p != old])
        draw = rng.random()
        if draw < 0.5:
            return f"{who} {rng.choice(VERBS['move'])} to the {new}.", Event(line, "at", who, (new,))
        if draw < 0.75:
            return f"{who} is in the {new}.", Event(line, "at", who, (new,))
        if self.task == "qa9":
            return f"{who} is {rng.choice(('not', 'no longer'))} in the {old}.", Event(line, "not", who, (old,))
        pair = [new, rng.choice(self.places)]
        rng.shuffle(pair)
        return f"{who} is either in the {pair[0]} or the {pair[1]}.", Event(line, "either", who, tuple(pair))

    def ask(self, focus, events):
        rng, who = self.rng, focus.who
        last = [e for e in events if e.who == who][-1]
        here = self.place[who]
        place = here if rng.random() < 0.5 else rng.choice([p for p in self.places if p != here])
        if last.kind == "not":
            place = last.what[0]
        named = place in last.what
        answer = {"at": "yes" if named else "no", "not": "no", "either": "maybe" if named else "no"}[last.kind]
        return f"Is {who} in the {place}?", answer, (last.line,)


def line_up_places(rng):
    """A story of qa4: three places in a row, told by two statements. Returns its three lines."""
    places, axis = rng.sample(PLACES, 3), rng.choice((("north", "south"), ("west", "east")))
    facts = []
    for i in (0, 1):  # places[i] lies next to places[i + 1], in direction axis[0] of it
        outer, middle = (i, i + 1) if i == 0 else (i + 1, i)
        subject, other = (outer, middle) if rng.random() < 2 / 3 else (middle, outer)
        facts.append((places[subject], axis[subject > other], axis[subject < other], places[other]))
    rng.shuffle(facts)
    line = rng.choice((0, 1))
    subject, direction, opposite, other = facts[line]
    question = rng.choice((f"What is {direction} of the {other}?", f"What is the {other} {opposite} of?"))
    return [Line(f"The {x} is {d} of the {y}.") for x, d, _, y in facts] + [Line(question, subject, (line + 1,))]


def simulate(task, rng, questions=5, at_end=0, limit=math.inf):
    """
    One story of `task` as a list of Lines: `questions` times two statements or more and a question, as published;
    then up to `at_end` further questions, each different from the ones since the last statement. None if it grows
    beyond `limit` lines.
    """
    if task == "qa4":
        return line_up_places(rng)
    world, lines, events = (VagueWorld if task in ("qa9", "qa10") else World)(task, rng), [], []

    def ask():
        for focus in rng.sample(events[-5:], min(5, len(events))) * 10:  # one of the last five statements
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
    """Stories as text in bAbI's format: 'ID text', or 'ID question<TAB>answer<TAB>support'; IDs restart at 1."""
    space = "" if task == "qa4" else " "  # between a question and its tab
    return "".join(
        f"{i} {text}\n" if answer is None else f"{i} {text}{space}\t{answer}\t{' '.join(map(str, support))}\n"
        for story in stories for i, (text, answer, support) in enumerate(story, 1))


def read_text(path):
    """The text of a file. Raises OSError where it cannot be read, ValueError where it is not UTF-8."""
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as e:
        raise ValueError(f"{path} is not text in UTF-8 ({e.reason} at byte {e.start})") from None


def read_documents(path):
    """The texts of a file, or of a folder's *.txt files. Raises ValueError or OSError for none."""
    files = sorted(Path(path).rglob("*.txt")) if Path(path).is_dir() else [Path(path)]
    texts = [text for text in map(read_text, files) if text.strip()]
    if not texts:
        raise ValueError(f"{path} holds no text")
    return texts


def read_babi(path):
    """Stories (lists of Lines) of a bAbI file. Raises ValueError, with the line's number, for anything else."""
    stories = []
    for number, row in enumerate(read_text(path).split("\n"), 1):
        if not row.strip():
            continue
        match = re.fullmatch(r"(\d+) ([^\t]+?) *(?:\t([^\t]+)\t([\d ]+))?\r?", row)
        if not match:
            raise ValueError(f"{path}, line {number}: not 'ID text' or 'ID question<TAB>answer<TAB>support ids'")
        i, text, answer, support = match.groups()
        if i == "1":
            stories.append([])
        support = tuple(map(int, (support or "").split()))
        if not stories or int(i) != len(stories[-1]) + 1:
            raise ValueError(f"{path}, line {number}: line IDs must count from 1")
        if any(not 0 < s < int(i) or stories[-1][s - 1].answer for s in support):
            raise ValueError(f"{path}, line {number}: support must name earlier statements")
        stories[-1].append(Line(text, answer, support))
    stories = [story for story in stories if any(line.answer for line in story)]
    if not stories:
        raise ValueError(f"{path} holds no story with a question")
    return stories


def find_babi(folder, task, split=None):
    """
    Stories of `task` in a folder's file qa1.txt, or in its published ones, qa1_..._train.txt and
    _test.txt. split: "train" or "test", the one file or, where there is but one in all, its first
    nine tenths or the rest; None: that one file whole. Raises ValueError where it is not clear
    which file is meant, or where there are too few stories to split.
    """
    files = sorted(p for p in Path(folder).rglob("qa*.txt") if re.match(rf"{task}(_|\.txt$)", p.name))
    parts = {}
    for path in files:
        part = re.search(r"(_train|_valid|_test)?\.txt$", path.name)[1] or ""
        if part in parts:
            names = sorted({str(p.parent.relative_to(folder)) for p in files})
            raise ValueError(f"{folder} holds {task} several times: name one of its folders "
                             f"({', '.join(names)})")
        parts[part] = path
    if not parts:
        raise ValueError(f"{folder} holds no file for {task}, like {task}_something.txt or {task}.txt")
    if {"_train", "_test"} <= parts.keys() and split:
        return read_babi(parts[f"_{split}"])
    stories = read_babi(next(iter(parts.values())))
    if split is None or len(parts) > 1:
        return stories
    if len(stories) < 2:
        raise ValueError(f"{files[0]} has one story: it takes two, one to learn from, one to be asked")
    at = min(len(stories) * 9 // 10, len(stories) - 1)
    return stories[:at] if split == "train" else stories[at:]


# -----------------------------------------------------------------------------
# BABILong's published samples

HUB = "https://huggingface.co"
HUB_FILE = "{hub}/datasets/RMT-team/{dataset}/resolve/main/data/{task}/{length}.json"


def parse_records(text):
    """A list of {"input", "question", "target"}, of JSON. Raises ValueError for anything else."""
    try:
        records = [{n: r[n].strip() for n in ("input", "question", "target")} for r in json.loads(text)]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as e:
        raise ValueError(f"no list of input, question and target in JSON ({type(e).__name__})") from None
    if not records:
        raise ValueError("an empty list")
    return records


def fetch_babilong(folder, tasks, lengths, dataset="babilong", hub=HUB):
    """Downloads what is missing of folder/task/length.json. Raises ValueError, leaving no half."""
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
    Writes text, or bytes: a file whole or not at all, with the mode it had; a link where it points
    to; a device, or a pipe, as it is.
    """
    path, content = Path(os.path.realpath(path)), content if isinstance(content, bytes) else content.encode()
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
    """English sentences of the documentation every Python carries: pydoc's topics, the standard library's docstrings."""
    from pydoc_data.topics import topics
    docs = [topics[name] for name in sorted(topics)]
    library = Path(sysconfig.get_paths()["stdlib"])
    skip = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
    for path in tqdm(sorted(p for p in library.rglob("*.py") if not skip & set(p.relative_to(library).parts)),
                     desc="reading Python's own documentation", unit="file", leave=False, disable=None):
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError, OSError):
            continue  # some files of the library are not meant to be parsed
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        docs += [ast.get_docstring(node) or "" for node in ast.walk(tree) if isinstance(node, kinds)]
    prose = re.compile(r"[A-Z][A-Za-z0-9 ,;:'()-]*[.!?]")  # leaves out tables, code and signatures
    return [s for doc in docs for par in re.split(r"\n\s*\n", doc) for s in split_sentences(par) if prose.fullmatch(s)]


def read_background(paths=None):
    """
    The haystack: sentences of text files and of folders of *.txt, by default of Python's own
    documentation; every one once, and none that names a person of any task. Raises ValueError or
    OSError for paths that do not give a hundred.
    """
    texts = [text for path in paths or () for text in read_documents(path)]
    sentences = [s for text in texts for s in split_sentences(text)] if paths else python_documentation()
    person = re.compile(rf"\b({'|'.join(ALL_PEOPLE)})\b")
    sentences = [s for s in dict.fromkeys(sentences) if len(s.split()) > 3 and not person.search(s)]
    if len(sentences) < 100:
        name = ", ".join(paths or ["the documentation of Python"])
        raise ValueError(f"{name}: {len(sentences)} usable sentences, a haystack needs 100")
    return sentences


# a newline is always a token of its own; a word takes along the space before it; every character matches something;
# the bound is for the regular expressions of tiktoken, which a million spaces in a row would overflow
PATTERN = r"\n| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|[^\S\n]{1,64}(?=[^\S\n])|[^\S\n]"


def train_tokenizer(sentences, vocab_size):
    """Byte-level BPE on `sentences`, each bAbI word one token with and without a space. Returns a tiktoken.Encoding."""
    stories = [line for task in TASKS for i in range(300) for line in simulate(task, random.Random(i))]
    babi = {w for text, answer, _ in stories for w in re.findall(r"\w+", f"{text} {answer}")}.union(*LABELS.values())
    babi = sorted(w.encode() for word in babi for w in (word, " " + word))
    pattern = PATTERN.replace(r"\p{L}", r"[^\W\d_]").replace(r"\p{N}", r"\d")  # near enough, for Python's re
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
    The tiktoken.Encoding of {bytes: rank}. It has no special tokens: what a user types is always text. Raises ValueError
    where a rank or a byte is missing.
    """
    if sorted(ranks.values()) != list(range(len(ranks))) or not {bytes([b]) for b in range(256)} <= ranks.keys():
        raise ValueError("the tokenizer is not whole: a token is there twice, or a byte is missing")
    return tiktoken.Encoding("babilong", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})


def encode(encoding, text):
    """
    The tokens of any text, a list. A very long run of white space is cut, which the regular
    expressions of some tokenizers would not survive.
    """
    parts = re.findall(r"\s{1,1000}|(?:(?!\s{1000})[\s\S])+", text) if re.search(r"\s{1000}", text) else [text]
    return [token for part in parts for token in encoding.encode_ordinary(part)]


def dump_tokenizer(encoding):
    """The tokens of an encoding as JSON, in the order of their ranks, each byte one character (Latin-1)."""
    tokens = [encoding.decode_single_token_bytes(i).decode("latin-1") for i in range(encoding.n_vocab)]
    return json.dumps(tokens if encoding._pat_str == PATTERN else {"pattern": encoding._pat_str, "tokens": tokens}, indent=0)


def parse_tokenizer(text):
    """The encoding that dump_tokenizer wrote. Raises ValueError for anything else."""
    try:
        tokens = json.loads(text)
        pattern, tokens = (tokens["pattern"], tokens["tokens"]) if isinstance(tokens, dict) else (PATTERN, tokens)
        return make_encoding({token.encode("latin-1"): rank for rank, token in enumerate(tokens)}, pattern)
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise ValueError(f"the tokenizer is not a list of tokens in JSON ({e})") from None


# how the tokenizer of Llama 3 cuts text before it merges bytes; its file holds the ranks alone
LLAMA_PATTERN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")


def find_tokenizer(name):
    """
    The encoding of tiktoken that has this name, less its special tokens, or of a file like Llama 3's tokenizer.model (a line: a token
    in base64, its rank). Raises ValueError where there is none, or where it cannot be fetched.
    """
    if name in ("gpt2", "cl100k_base", "o200k_base"):
        try:
            encoding = tiktoken.get_encoding(name)
        except Exception as e:  # tiktoken lets through whatever its http library raises
            raise ValueError(f"tiktoken could not fetch {name} ({type(e).__name__}): without --tokenizer one is trained here, offline") from None
        return make_encoding(encoding._mergeable_ranks, encoding._pat_str)
    try:
        pairs = [line.split() for line in Path(name).read_bytes().splitlines() if line]
        return make_encoding({base64.b64decode(token, validate=True): int(rank) for token, rank in pairs}, LLAMA_PATTERN)
    except (OSError, ValueError) as e:
        raise ValueError(f"--tokenizer={name} is neither gpt2, cl100k_base, o200k_base nor a file of tokens and ranks like Llama's "
                         f"tokenizer.model ({e})") from None


# -----------------------------------------------------------------------------
# samples

# tokens (S*T,) int64; answers: spans of all answers in them; prompt: where the last answer starts; its question and
# target; facts: {line number: span}; support: the line numbers the answer rests on
Sample = namedtuple("Sample", "tokens answers prompt question target facts support")


def parse_length(length):
    """Characters of text in a length like '0k', '4k' or '1M'. Raises ValueError for anything else."""
    match = re.fullmatch(r"(\d{1,3})([kM])", length, re.ASCII)
    if not match:
        raise ValueError(f"a length is up to three digits and k or M, like 0k, 4k or 1M, not {length!r}")
    return int(match[1]) * CHARS_PER_1K * (1000 if match[2] == "M" else 1)


def written(answer):
    """An answer as the model writes it: 'milk,football' becomes ' milk, football.'"""
    return " " + answer.replace(",", ", ") + "."


def score(task, question, target, output):
    """BABILong's rule: up to the first full stop, `output` names the target's labels and no other of the task's."""
    labels = {label.lower() for label in LABELS[task]}
    named = labels & set(re.findall(r"\w+", output.split(".")[0].lower()))
    target = set(target.lower().split(","))
    return named - (set(re.findall(r"\w+", question.lower())) - target) == target


class Babilong:
    """
    Composes samples. stories: {task: [story, ...]} to draw from, or None to simulate fresh ones; sentences: the
    haystack, in order; a sample is a whole number of segments of block_size tokens.
    """

    def __init__(self, encoding, stories, sentences, block_size):
        self.encoding, self.stories, self.sentences, self.block_size = encoding, stories, sentences, block_size
        self.encode = lru_cache(maxsize=100_000)(lambda text: tuple(encode(encoding, text)))
        (self.newline,) = self.encode("\n")
        haystack = encoding.encode_ordinary_batch([" " + s for s in sentences])
        self.haystack = [tokens for tokens in haystack if len(tokens) >= MIN_TOKENS]
        if not self.haystack:
            raise ValueError(f"the background has no sentence of {MIN_TOKENS} tokens or more")
        self.documents = [np.fromiter(chain(*self.haystack), dtype=np.int64)]  # for the perplexity of its text
        self.chars = [len(encoding.decode_single_token_bytes(i)) for i in range(encoding.n_vocab)]
        self.ones = [1] * encoding.n_vocab
        # every answer of a task takes the room of the longest: its position must not tell how long it is
        self.room = {task: max(len(self.encode(written(a))) for a in (*LABELS[task], *LISTS.get(task, ()))) for task in TASKS}

    def digest(self):
        """A hash of everything that samples are made of."""
        return hashlib.sha256(repr((self.stories, self.sentences)).encode()).hexdigest()[:16]

    def noise(self, rng, budget, cost):
        """Consecutive sentences from a random place on whose tokens' costs add up to budget; the last one is cut."""
        at, sentences = rng.randrange(len(self.haystack)), []
        while budget > 0:
            sentence = self.haystack[at % len(self.haystack)]
            ends = list(accumulate(cost[t] for t in sentence))
            sentences.append(sentence[: bisect(ends, budget)])
            at, budget = at + 1, budget - ends[-1]
        return sentences

    def story(self, task, rng, dense=False, limit=math.inf):
        """A story that ends with a question, or with up to four if dense; None if a simulated one exceeds `limit` lines."""
        if self.stories is None:
            return simulate(task, rng, rng.randint(1, 5), rng.randint(0, 3) if dense else 0, limit)
        story = rng.choice(self.stories[task])  # one of its questions, and what comes before it
        return story[: rng.choice([i for i, line in enumerate(story, 1) if line.answer])]

    def guess(self, asked, task, n=2000):
        """
        Accuracies in % of two that never read the story: one gives the commonest answer of the task,
        one the commonest to the question's words. They learn n of these stories, are asked n others.
        """
        rng, counts = random.Random(task), {}
        learn, ask = ([source.story(task, rng)[-1] for _ in range(n)] for source in (self, asked))
        for line in learn:
            for words in "", line.text:
                counts.setdefault(words, Counter())[line.answer] += 1
        best = {words: counter.most_common(1)[0][0] for words, counter in counts.items()}
        right = [[best[""] == line.answer, best.get(line.text, best[""]) == line.answer] for line in ask]
        majority, question_only = (100 * np.mean(right, axis=0)).round(1).tolist()
        return {"task": task, "majority": majority, "question_only": question_only}

    def sample(self, task, seed, index, segments=None, length=None, dense=False, noise=True):
        """
        Sample `index` of `task`: of `segments` segments, or of a BABILong length such as "4k", rounded up to whole
        segments. dense: with further questions, in between and at the end, for training. noise=False: newlines in
        place of a haystack. Raises ValueError if no story fits.
        """
        rng = random.Random(f"{seed}/{task}/{segments}/{length}/{index}")
        limit = segments * self.block_size // 5 if segments else math.inf  # a line has five tokens or more
        for _ in range(10_000):
            story = self.story(task, rng, dense, limit)
            sample = self.compose(task, rng, story, segments, length, dense, noise) if story else None
            if sample:
                return sample
        raise ValueError(f"no story of {task} fits {segments} segments of {self.block_size} tokens: take more, or longer ones")

    def pieces(self, line):
        """The tokens of a line's text, and of its answer."""
        return self.encode(" " + line.text), self.encode(written(line.answer)) if line.answer else ()

    def compose(self, task, rng, story, segments, length, dense, noise):
        """The Sample of a story that ends with a question, or None if it does not fit."""
        T = self.block_size
        n = 1  # how many questions end the story
        while dense and story[-n - 1].answer:
            n += 1
        between = dense and rng.random() < 0.5
        parts = [(i, *self.pieces(line)) for i, line in enumerate(story[:-n], 1) if between or not line.answer]
        end, spans = [], []
        for text, answer in map(self.pieces, story[-n:]):
            end += text + answer
            spans.append((len(end) - len(answer), len(end)))
        end += [self.newline] * (self.room[task] - len(answer))
        # what the haystack may cost, in characters or tokens; keeping the questions in between whole takes up to `slack`
        cost, slack = self.chars if length else self.ones, sum(len(text + answer) - 1 for _, text, answer in parts if answer)
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
        gap = -(len(tokens) + len(end)) % T if length else segments * T - len(tokens) - len(end)
        tokens += chain(*self.noise(rng, gap, self.ones)) if noise and not length else [self.newline] * gap
        answers += [(len(tokens) + a, len(tokens) + b) for a, b in spans]
        question, target, support = story[-1]
        return Sample(np.array(tokens + end), answers, answers[-1][0], question, target, facts, support)

    def retrieve(self, sample, k):
        """
        A prompt of one segment, less the answer's room, in place of the sample's own, as tokens (T - room,): of the k
        sentences that BM25 (k1 = 1.5, b = 0.75) ranks closest to the question those that fit, in text order, and the question.
        """
        question = self.encode(" " + sample.question)
        sentences = split_sentences(self.encoding.decode(sample.tokens[: sample.prompt - len(question)]))
        words = [re.findall(r"\w+", s.lower()) for s in sentences]
        counts = np.array([[w.count(q) for q in set(re.findall(r"\w+", sample.question.lower()))] for w in words])
        length, n = np.array([len(w) for w in words]), (counts > 0).sum(axis=0)
        idf = np.log(1 + (len(words) - n + 0.5) / (n + 0.5))
        scores = (idf * counts * 2.5 / (counts + (0.375 + 1.125 * length / length.mean())[:, None])).sum(axis=1)
        pieces, room = {}, self.block_size - (len(sample.tokens) - sample.prompt) - len(question)
        for i in sorted(range(len(words)), key=lambda i: (-scores[i], -i))[:k]:  # of equals the later one
            piece = encode(self.encoding, " " + sentences[i])
            if len(piece) <= room:
                pieces[i], room = piece, room - len(piece)
        return np.array(list(chain(*(pieces[i] for i in sorted(pieces)))) + [self.newline] * room + list(question))


class Published(Babilong):
    """BABILong's published samples, of folder/task/length.json, in place of our own. Which facts an answer rests on they do not say."""

    def __init__(self, like, folder):
        super().__init__(like.encoding, None, like.sentences, like.block_size)
        self.folder = folder
        self.read = lru_cache()(self.read)

    def read(self, task, length):
        """The records of a file. Raises ValueError for a target that no answer could match."""
        path = Path(self.folder, task, f"{length}.json")
        records = parse_records(read_text(path))
        for record in records:
            if not score(task, record["question"], record["target"], written(record["target"])):
                raise ValueError(f"{path}: {record['target']!r} is no answer to a question of {task}")
        return records

    def digest(self):
        """A hash of the files."""
        return hashlib.sha256(b"".join(path.read_bytes() for path in sorted(Path(self.folder).rglob("*.json")))).hexdigest()[:16]

    def sample(self, task, seed, index, length):
        """Sample `index` of a file: the text, newlines up to a border, the question, and room for its answer."""
        record, T = self.read(task, length)[index], self.block_size
        text = encode(self.encoding, "".join(" " + s for s in split_sentences(record["input"])))
        question = list(self.encode(" " + " ".join(record["question"].split())))
        end = len(question) + self.room[task]
        if end > T:
            raise ValueError(f"a question of {len(question)} tokens and its answer do not fit a segment of {T}")
        tokens = text + [self.newline] * (-(len(text) + end) % T) + question
        tokens = np.array(tokens + [self.newline] * self.room[task])
        return Sample(tokens, [], len(tokens) - self.room[task], record["question"], record["target"], {}, ())


class Documents:
    """
    Plain text in place of stories, for train.py --data. texts: documents; share: which part of each, from and to, 0 to 1. A sample is
    consecutive segments of one document.
    """

    newline = -1  # is a token like any other here: what fills a sample is told apart by its place

    def __init__(self, encoding, texts, block_size, share=(0.0, 1.0)):
        self.encoding, self.block_size = encoding, block_size
        parts = [text[int(share[0] * len(text)) : int(share[1] * len(text))] for text in texts]
        documents = [np.array(encode(encoding, part)) for part in parts]
        self.documents = [tokens for tokens in documents if len(tokens) > 1]
        self.ends = list(accumulate(map(len, self.documents)))
        if not self.ends or self.ends[-1] < block_size:
            raise ValueError(f"the text is too short: {share[1] - share[0]:.0%} of it must fill a segment of {block_size} tokens")

    def digest(self):
        """A hash of everything that samples are made of."""
        return hashlib.sha256(b"".join(document.tobytes() + b"|" for document in self.documents)).hexdigest()[:16]

    def sample(self, task, seed, index, segments, **which):
        """Sample `index`, of `segments` segments; prompt: how many of its tokens are text, the others fill it up."""
        rng, size = random.Random(f"{seed}/{segments}/{index}"), segments * self.block_size
        at = rng.randrange(self.ends[-1])
        document = self.documents[bisect(self.ends, at)]
        start = max(0, min(at - (self.ends[bisect(self.ends, at)] - len(document)), len(document) - size))
        tokens = document[start : start + size]
        return Sample(np.pad(tokens, (0, size - len(tokens))), [], len(tokens), None, None, {}, ())


# -----------------------------------------------------------------------------
# the files

def write_data(data_dir, tasks=TASKS, babi_dir=None, background=None, vocab_size=2048, seed=1337,
               eval_stories=1000, tokenizer=None):
    """
    Writes data_dir: tokenizer.json, meta.json, and in train/ and eval/ background.txt (a sentence a
    line) and the stories qa*.txt; no train/qa*.txt where stories are simulated, because training
    simulates fresh ones. meta.json comes last: without it the folder is not used. Raises ValueError
    for input it cannot use, OSError for files it cannot read or write.
    """
    data_dir, ours = Path(data_dir), {"tokenizer.json", "meta.json", "train", "eval"}
    data_dir.mkdir(parents=True, exist_ok=True)
    if foreign := {path.name for path in data_dir.iterdir()} - ours - {"meta.json.tmp"}:
        raise ValueError(f"{data_dir} holds {min(foreign)}, which is not of prepare_babilong.py: name "
                         "another --data_dir")
    for split in "train", "eval":  # before the work, so that a mistake shows at once
        (data_dir / split).mkdir(exist_ok=True)
    sentences, files = read_background(background), {}  # name: text
    for split, held_out in ("train", False), ("eval", True):  # a tenth, in runs of 50 sentences
        part = [s for i, s in enumerate(sentences) if (i // 50 % 10 == 9) == held_out]
        files[f"{split}/background.txt"] = "".join(s + "\n" for s in part)
    for task in tqdm(tasks, desc="stories", unit="task", leave=False, disable=None):
        if babi_dir:
            test = find_babi(babi_dir, task, "test")
            seen = set(map(str, test))  # what is asked must not have been learned
            train = [story for story in find_babi(babi_dir, task, "train") if str(story) not in seen]
            if not train:
                raise ValueError(f"{babi_dir}: {task} has no story for training that is not in its test")
            files[f"train/{task}.txt"] = format_babi(task, train)
        else:
            test = [simulate(task, random.Random(f"{seed}/eval/{task}/{i}")) for i in range(eval_stories)]
        files[f"eval/{task}.txt"] = format_babi(task, test)
    train_sentences = files["train/background.txt"].splitlines()
    encoding = find_tokenizer(tokenizer) if tokenizer else train_tokenizer(train_sentences, vocab_size)
    files["tokenizer.json"] = dump_tokenizer(encoding)
    digest = hashlib.sha256("".join(name + files[name] for name in sorted(files)).encode()).hexdigest()[:16]
    source = ",".join(background) if background else f"documentation of Python {sys.version.split()[0]}"
    meta = {"hash": digest, "tasks": ",".join(tasks), "stories": babi_dir or "simulated",
            "background": source, "seed": seed}
    (data_dir / "meta.json").unlink(missing_ok=True)
    for old in data_dir.glob("*/qa*.txt"):
        old.unlink()
    for name, text in files.items():
        write_file(data_dir / name, text)
    write_file(data_dir / "meta.json", json.dumps(meta, indent=2) + "\n")
    return meta


def load_data(data_dir, block_size):
    """Returns (train Babilong, eval Babilong, meta) of a folder from write_data. Raises ValueError if it is not one."""
    data_dir = Path(data_dir)
    try:
        meta = json.loads(read_text(data_dir / "meta.json"))
        encoding = parse_tokenizer(read_text(data_dir / "tokenizer.json"))
        splits = []
        for split in ("train", "eval"):
            sentences = read_text(data_dir / split / "background.txt").splitlines()
            fresh = split == "train" and meta["stories"] == "simulated"
            stories = None if fresh else {task: find_babi(data_dir / split, task) for task in meta["tasks"].split(",")}
            splits.append(Babilong(encoding, stories, sentences, block_size))
    except (OSError, KeyError, ValueError) as e:
        raise ValueError(f"{data_dir} cannot be used ({e}): run prepare_babilong.py again") from None
    return *splits, meta


def show(data, task, **which):
    """Prints a sample as text, its facts in [brackets], the ones the answer rests on in [[double ones]]."""
    sample = data.sample(task, seed=0, index=0, **which)
    opening = {start: "[[" if i in sample.support else "[" for i, (start, _) in sample.facts.items()}
    closing = {end: "]]" if i in sample.support else "]" for i, (_, end) in sample.facts.items()}
    text = b"".join(closing.get(i, "").encode() + opening.get(i, "").encode() + data.encoding.decode_single_token_bytes(t)
                    for i, t in enumerate(sample.tokens)).decode(errors="replace")
    print(text.strip())
    print(f"\n{len(sample.tokens)} tokens, {len(sample.tokens) // data.block_size} segments of {data.block_size}; "
          f"{len(sample.facts)} facts; target: {sample.target}")


class Parser(argparse.ArgumentParser):
    """Takes no abbreviated flags, lists defaults under -h, and says what is wrong with a flag in one line."""

    def __init__(self, description):
        super().__init__(description=description, allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter)

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
        how = {"action": argparse.BooleanOptionalAction} if isinstance(default, bool) else {
            "type": kind, "choices": choices}
        self.group.add_argument(f"--{name}", default=default, help=help, **how)


def number(kind, low, high=math.inf):
    """An argparse type: an int or a finite float from low to high."""
    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not (low <= value <= high and math.isfinite(value)):
            name, end = "a whole number" if kind is int else "a number", f"to {high}" if high < math.inf else "on"
            raise argparse.ArgumentTypeError(f"takes {name} from {low} {end}, not {text!r}")
        return value
    return parse


def several(kind):
    """An argparse type: what is separated by commas, each part of type `kind` and taken once."""
    def parse(text):
        parts = list(dict.fromkeys(kind(part.strip()) for part in text.split(",") if part.strip()))
        if not parts:
            raise argparse.ArgumentTypeError(f"takes one value or more, separated by commas, not {text!r}")
        return parts
    return parse


def out_file(text):
    """An argparse type: a file that can be written when the work is done."""
    if Path(text).is_dir() or not Path(text).absolute().parent.is_dir():
        raise argparse.ArgumentTypeError(f"cannot write {text}: it is a folder, or its folder is missing")
    return text


def length(text):
    """An argparse type: a length like 4k, left as it is."""
    try:
        parse_length(text)
    except ValueError as e:
        raise argparse.ArgumentTypeError(str(e)) from None
    return text


def parse_tasks(text):
    """An argparse type: ['qa1', 'qa2'] from 'qa1,qa2', or all of them."""
    tasks = list(TASKS) if text == "all" else several(str)(text)
    if unknown := [t for t in tasks if t not in TASKS]:
        raise argparse.ArgumentTypeError(f"takes names of qa1 to qa10, by commas, or all, not {unknown[0]!r}")
    return tasks


def get_parser():
    parser = Parser("Writes the data, or shows a sample of it.")
    flag, group = parser.flag, parser.add_group
    group("data")
    flag("data_dir", "data/babilong", "folder to write")
    flag("tasks", "all", "bAbI tasks, like qa1,qa2, or all", parse_tasks)
    flag("babi_dir", None, "folder of published bAbI files to use instead of the simulator")
    flag("background", None, "text files and folders of .txt files, by commas, as haystack", several(str))
    flag("vocab_size", 2048, "tokens of the tokenizer trained on it, at most", number(int, 512, 65536))
    flag("tokenizer", None, "gpt2, cl100k_base or o200k_base, which tiktoken fetches, or a Llama 3's "
         "tokenizer.model, instead")
    flag("seed", 1337, "of the evaluation stories", number(int, 0, 2**63 - 1))
    group("BABILong's published samples, for train.py --eval_only --babilong_dir=CACHE_DIR/DATASET")
    flag("source", "local", "hub: download them instead", choices=("local", "hub"))
    flag("lengths", "0k,1k,2k,4k", "of their texts", several(length))
    flag("dataset", "babilong", "100 or 1,000 samples each", choices=("babilong", "babilong-1k-samples"))
    flag("hub_url", HUB, "where they are")
    flag("cache_dir", "data/cache", "where they go")
    group("show")
    flag("show", None, "print a sample of this task; data_dir is written only if missing", choices=TASKS)
    flag("length", None, "of the sample, like 0k or 4k; default: --segments", length)
    flag("segments", 4, "of the sample", number(int, 1, 10**6))
    flag("block_size", 64, "tokens of a segment", number(int, 1, 2**20))
    return parser


def main():
    args = get_parser().parse_args()
    if args.source == "hub":
        folder = Path(args.cache_dir, args.dataset)
        fetch_babilong(folder, args.tasks, args.lengths, args.dataset, args.hub_url.rstrip("/"))
        return print(f"in {folder}: {', '.join(args.lengths)} of {', '.join(args.tasks)}")
    if not args.show or not Path(args.data_dir, "meta.json").exists():
        meta = write_data(args.data_dir, args.tasks, args.babi_dir, args.background, args.vocab_size,
                          args.seed, tokenizer=args.tokenizer)
        print(f"wrote {args.data_dir}: {', '.join(f'{k} {v}' for k, v in meta.items())}")
    if args.show:
        show(load_data(args.data_dir, args.block_size)[1], args.show, segments=args.segments, length=args.length)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as e:
        sys.exit(f"prepare_babilong.py: error: {e}")
    except KeyboardInterrupt:
        sys.exit(130)
