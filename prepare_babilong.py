"""
The data: facts of bAbI stories (qa1..qa10) hidden in a haystack of English, as BABILong does.

$ python prepare_babilong.py                           # writes data/babilong, offline
$ python prepare_babilong.py --show=qa2 --length=1k    # prints one sample, its facts marked
$ python prepare_babilong.py --babi_dir=DIR --background=BOOK.txt,FOLDER    # your own sources

The files hold the sources: sentences, tokenizer, and stories to evaluate with (those to train on
only with --babi_dir: they are simulated as they are needed). Samples are composed on the fly by
(seed, index, task, length); training never sees one twice.

bAbI: Weston et al. 2015, https://arxiv.org/abs/1502.05698, simulated as published (v1.2).
BABILong: Kuratov et al. 2024, https://arxiv.org/abs/2406.10149: composition, lengths, scoring.
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
import sys
import urllib.request
from argparse import ArgumentTypeError
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
HUB = "https://huggingface.co"

# -----------------------------------------------------------------------------
# the simulator of bAbI v1.2

PLACES = ("bathroom", "bedroom", "garden", "hallway", "kitchen", "office")
PLACES_QA10 = ("bedroom", "cinema", "kitchen", "office", "park", "school")
OBJECTS = ("apple", "football", "milk")
PEOPLE = dict.fromkeys(TASKS, ("Mary", "John", "Daniel", "Sandra")) | {
    "qa5": ("Mary", "Fred", "Bill", "Jeff"),  # in qa5 and qa7 the order decides who receives
    "qa7": ("John", "Mary", "Sandra", "Daniel"),
    "qa10": ("Fred", "Bill", "Mary", "Julie")}
NUMBERS = ("none", "one", "two", "three")
LABELS = dict.fromkeys(TASKS, PLACES) | {
    "qa5": PEOPLE["qa5"] + OBJECTS, "qa6": ("yes", "no"), "qa7": NUMBERS,
    "qa8": (*OBJECTS, "nothing"), "qa9": ("yes", "no"), "qa10": ("yes", "no", "maybe")}
KINDS = {  # of what happens; qa4, qa9 and qa10 have their own rules
    "qa1": ("move",), **dict.fromkeys(("qa2", "qa3", "qa6", "qa8"), ("move", "get", "drop")),
    **dict.fromkeys(("qa5", "qa7"), ("move", "get", "drop", "give"))}
FOCUS = {  # the kinds that are asked about
    "qa1": ("move",), **dict.fromkeys(("qa2", "qa3", "qa7", "qa8"), ("get", "drop", "give")),
    "qa5": ("give",), "qa6": ("move",), "qa9": ("move", "not"), "qa10": ("move", "either")}
VERBS = {"move": ("moved", "went", "went back", "journeyed", "travelled"),
         "get": ("picked up", "grabbed", "took", "got"),
         "drop": ("put down", "dropped", "left", "discarded"),
         "give": ("gave", "handed", "passed")}

# a statement (answer None), or a question with its answer and the numbers of its supporting lines
Line = namedtuple("Line", "text answer support", defaults=(None, ()))
# what line number `line` says; what: a place or an object; to: who received it, or another place
Event = namedtuple("Event", "line kind who what to", defaults=(None,))


class World:
    """People who walk about and carry objects: qa1, 2, 3, 5, 6, 7 and 8."""

    objects = OBJECTS

    def __init__(self, task, rng):
        self.task, self.rng, self.people, self.events = task, rng, PEOPLE[task], []
        self.places = PLACES_QA10 if task == "qa10" else PLACES
        # hidden from the reader at first
        self.place = {x: rng.choice(self.places) for x in self.people + self.objects}
        self.holder = dict.fromkeys(self.objects)

    def another(self, place):
        return self.rng.choice([p for p in self.places if p != place])

    def step(self, line):
        """Makes something happen. Returns the statement that tells it."""
        rng, place, holder = self.rng, self.place, self.holder
        while True:  # what cannot happen is drawn again, whole
            kind, who, to = rng.choice(KINDS[self.task]), rng.choice(self.people), None
            if kind == "move":
                what = rng.choice(PLACES)
                if what == place[who]:
                    continue
                for x in who, *(o for o in OBJECTS if holder[o] == who):
                    place[x] = what
                end = f"to the {what}"
            elif kind == "give":
                # not random at all: the first object and the first person that will do
                pairs = [(o, p) for o in OBJECTS for p in self.people
                         if holder[o] not in (None, p) and place[o] == place[p]]
                if not pairs:
                    continue
                what, to = pairs[0]
                who, holder[what] = holder[what], to
                end = f"the {what} to {to}"
            else:
                old, new = (None, who) if kind == "get" else (who, None)
                objects = [o for o in OBJECTS if holder[o] == old and place[o] == place[who]]
                if not objects:
                    continue
                what = rng.choice(objects)
                holder[what] = new
                there = rng.random() < 0.2 or (kind == "get" and self.task != "qa3")
                end = f"the {what} there" if there else f"the {what}"
            self.events.append(Event(line, kind, who, what, to))
            return f"{who} {rng.choice(VERBS[kind])} {end}."

    def ask(self, last=5):
        """(question, answer, support) about one of the last statements, or None."""
        recent = self.events[-last:]
        # in qa3 the place is drawn, and can be one that a reader cannot know: ten times
        times = 10 if self.task == "qa3" else 1
        for focus in self.rng.sample(recent, len(recent)) * times:
            if focus.kind in FOCUS[self.task] and (question := self.ask_about(focus)):
                return question

    def ask_about(self, focus):
        """(question, answer, support) about an event; None if a reader cannot know."""
        rng, task, who, what = self.rng, self.task, focus.who, focus.what
        events = [e for e in self.events if e.kind in FOCUS[task]]
        if task in ("qa1", "qa6", "qa9", "qa10"):
            last = [e for e in events if e.who == who][-1]
            if task == "qa1":
                return f"Where is {who}?", last.what, (last.line,)
            here = self.place[who]
            place = here if rng.random() < 0.5 else self.another(here)
            if last.kind == "not":
                place = last.what
            answer = {"move": "yes", "not": "no", "either": "maybe"}[last.kind]
            named = place in (last.what, last.to)
            return f"Is {who} in the {place}?", answer if named else "no", (last.line,)
        if task in ("qa7", "qa8"):
            mine = [e for e in events if who in (e.who, e.to)]
            held = [o for o in OBJECTS if self.holder[o] == who]
            if task == "qa7":
                support = tuple(e.line for e in mine)
                return f"How many objects is {who} carrying?", NUMBERS[len(held)], support
            order = dict.fromkeys(e.what for e in mine)  # in which the person first took them
            answer = ",".join(o for o in order if o in held) or "nothing"
            support = tuple(e.line for o in order for e in mine if e.what == o)
            return f"What is {who} carrying?", answer, support
        handled = [e for e in events if e.what == what]
        last = handled[-1]
        if task == "qa5":
            a, b = last.who, last.to
            text, answer = rng.choice(
                [(f"What did {a} give to {b}?", what)] * 2 +
                [(f"Who gave the {what}?", a), (f"Who gave the {what} to {b}?", a),
                 (f"Who received the {what}?", b), (f"Who did {a} give the {what} to?", b)])
            return text, answer, (last.line,)
        # qa2 and qa3: the moves of who had the object last, up to the drop or to now
        got = [e for e in handled if e.kind == "get"][-1]
        moves = [e for e in self.events if e.kind == "move" and e.who == last.who
                 and (last == got or e.line < last.line)]
        carried = [e for e in moves if e.line > got.line]
        if task == "qa2":
            known = carried if last == got else moves
            if not known:
                return None
            return f"Where is the {what}?", known[-1].what, (last.line, known[-1].line)
        place = rng.choice(carried).what if len(carried) > 1 else None
        i = max((i for i, e in enumerate(carried) if e.what == place), default=0)
        if i == 0:
            return None
        support = last.line, carried[i].line, carried[i - 1].line
        return f"Where was the {what} before the {place}?", carried[i - 1].what, support


class VagueWorld(World):
    """People who only move, which a statement may deny (qa9) or leave open (qa10)."""

    objects = ()

    def step(self, line):
        rng, who = self.rng, self.rng.choice(self.people)
        old = self.place[who]
        new = self.place[who] = self.another(old)
        draw, kind, places = rng.random(), "move", [new]
        if draw < 0.5:
            text = f"{rng.choice(VERBS['move'])} to the {new}"
        elif draw < 0.75:
            text = f"is in the {new}"
        elif self.task == "qa9":
            kind, places = "not", [old]
            text = f"is {rng.choice(('not', 'no longer'))} in the {old}"
        else:
            # perhaps twice the same, as published
            kind, places = "either", [new, rng.choice(self.places)]
            rng.shuffle(places)
            text = f"is either in the {places[0]} or the {places[1]}"
        self.events.append(Event(line, kind, who, *places))
        return f"{who} {text}."


def line_up_places(rng, at_end):
    """A story of qa4: Lines on three places in a row, two statements and 1 + at_end questions."""
    places, axis = rng.sample(PLACES, 3), rng.choice((("north", "south"), ("west", "east")))
    facts = []
    for outer in 0, 2:  # the place that lies next to the middle one, 1
        subject, other = (outer, 1) if rng.random() < 2 / 3 else (1, outer)
        direction, opposite = axis if subject < other else axis[::-1]
        facts.append((places[subject], direction, opposite, places[other]))
    rng.shuffle(facts)
    lines = [Line(f"The {x} is {d} of the {y}.") for x, d, _, y in facts]
    questions = [Line(question, x, (i,)) for i, (x, d, opposite, y) in enumerate(facts, 1)
                 for question in (f"What is {d} of the {y}?", f"What is the {y} {opposite} of?")]
    question = questions.pop(2 * rng.choice((0, 1)) + rng.choice((0, 1)))
    return lines + [question] + rng.sample(questions, min(at_end, 3))


def simulate(task, rng, questions=5, at_end=0, last=5, limit=math.inf):
    """
    A story of `task`, a list of Lines: `questions` times some statements and a question, then up
    to `at_end` other ones, on the `last` statements. None if it grows beyond `limit` lines.
    """
    if task == "qa4":
        return line_up_places(rng, at_end)
    world, lines = (VagueWorld if task in ("qa9", "qa10") else World)(task, rng), []
    for _ in range(questions):
        question = None
        while not question:
            if len(lines) > limit:
                return None
            for _ in range(2):
                lines.append(Line(world.step(len(lines) + 1)))
            question = world.ask()
        lines.append(Line(*question))
    asked = {lines[-1].text}
    for _ in range(at_end):
        question = world.ask(last)
        if question and question[0] not in asked:
            asked.add(question[0])
            lines.append(Line(*question))
    return lines


# -----------------------------------------------------------------------------
# reading and writing files

def read_text(path):
    """The text of a file. Raises OSError, or ValueError where it is not UTF-8."""
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as e:
        raise ValueError(f"{path} is not text in UTF-8 ({e.reason} at byte {e.start})") from None


def read_documents(path):
    """The texts of a file, or of a folder's *.txt files. Raises ValueError or OSError for none."""
    files = sorted(Path(path).rglob("*.txt")) if Path(path).is_dir() else [path]
    texts = [text for text in map(read_text, files) if text.strip()]
    if not texts:
        raise ValueError(f"{path} holds no text")
    return texts


def write_file(path, content):
    """Writes text or bytes: a file whole or not at all, its mode kept; through links and pipes."""
    content = content.encode() if isinstance(content, str) else content
    if Path(path).exists() and not Path(path).is_file():
        return Path(path).write_bytes(content)
    path = Path(os.path.realpath(path))
    new = path.with_name(f".{path.name}.{os.getpid()}.tmp")  # of this process alone
    try:
        new.write_bytes(content)
        if path.exists():
            new.chmod(path.stat().st_mode)
        os.replace(new, path)
    finally:
        new.unlink(missing_ok=True)


def format_babi(task, stories):
    """Stories in bAbI's format: 'ID text', or 'ID question<TAB>answer<TAB>IDs of its support'."""
    space = "" if task == "qa4" else " "  # between a question and its tab
    return "".join(
        f"{i} {text}\n" if answer is None else
        f"{i} {text}{space}\t{answer}\t{' '.join(map(str, support))}\n"
        for story in stories for i, (text, answer, support) in enumerate(story, 1))


def read_babi(path):
    """The stories of a file in bAbI's format, lists of Lines. Raises ValueError."""
    stories = []
    for number, row in enumerate(read_text(path).split("\n"), 1):
        if not row.strip():
            continue
        match = re.fullmatch(r"(\d+) ([^\t]+?) *(?:\t([^\t]+)\t(\d[\d ]*))?", row)
        i, text, answer, support = match.groups() if match else ("0", None, None, None)
        if int(i) == 1:
            stories.append([])
        story, support = stories[-1] if stories else [], tuple(map(int, (support or "").split()))
        facts = [n for n, line in enumerate(story, 1) if line.answer is None]
        if int(i) != len(story) + 1 or not set(support) <= set(facts):
            raise ValueError(f"{path}, line {number}: not 'ID text' or 'ID question<TAB>answer<TAB>"
                             "IDs of earlier statements', with IDs that count from 1")
        story.append(Line(text, answer, support))
    stories = [story for story in stories if any(line.answer for line in story)]
    if not stories:
        raise ValueError(f"{path} holds no story with a question")
    return stories


def find_babi(folder, task, split=None):
    """
    The stories of `task` in a folder: of its file for `split`, "train" or "test", if there are
    both; else of its one file, of which split is the first nine tenths or the rest.
    """
    files = [p for p in sorted(Path(folder).rglob("qa*.txt")) if re.match(rf"{task}(_|\Z)", p.stem)]
    parts = {part: [p for p in files if p.stem.endswith(f"_{part}")] for part in ("train", "test")}
    if published := split and all(parts.values()):
        files = parts[split]
    if len(files) != 1:
        where = ", ".join(sorted({str(p.parent.relative_to(folder)) for p in files})) or "none"
        raise ValueError(f"{folder} holds {len(files)} files for {task} (in {where}): name a "
                         f"folder with one, or with {task}_*_train.txt and {task}_*_test.txt")
    stories = read_babi(files[0])
    for line in chain(*stories):
        if line.answer:
            check_target(files[0], task, line.text, line.answer)
    if split and not published:
        at = len(stories) * 9 // 10
        return stories[:at] if split == "train" else stories[at:]
    return stories


def parse_records(text):
    """A list of {"input", "question", "target"}, of JSON. Raises ValueError for another text."""
    names = "input", "question", "target"
    try:
        records = [{name: record[name].strip() for name in names} for record in json.loads(text)]
    except (ValueError, TypeError, KeyError, AttributeError) as e:
        raise ValueError(f"no list of input, question, target in JSON ({e!r})") from None
    if not records:
        raise ValueError("an empty list")
    return records


def fetch_babilong(folder, tasks, lengths, dataset="babilong", hub=HUB):
    """Downloads what is missing of folder/task/length.json. Raises ValueError, leaving no half."""
    for task, length in tqdm([*product(tasks, lengths)], "downloading", leave=False, disable=None):
        path = Path(folder, task, f"{length}.json")
        url = f"{hub}/datasets/RMT-team/{dataset}/resolve/main/data/{task}/{length}.json"
        if path.exists():
            continue
        try:
            with urllib.request.urlopen(url, timeout=30) as response:
                text = response.read().decode()
            parse_records(text)
        except (OSError, ValueError, http.client.HTTPException) as e:
            raise ValueError(f"{url} is not to be had: {e!r}") from None
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, text)


# -----------------------------------------------------------------------------
# the haystack and the tokenizer

def split_sentences(text):
    """The sentences of plain text, white space normalised, without quotes that close them."""
    return re.split(r"(?<=[.!?])[\"'”’)]*\s+(?=[\"'“‘(]?[A-Z])", " ".join(text.split()))


def python_documentation():
    """Sentences of the documentation in every Python: pydoc's topics, the library's docstrings."""
    from pydoc_data.topics import topics
    docs, library = [topics[name] for name in sorted(topics)], Path(os.__file__).parent
    skip = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
    paths = [p for p in sorted(library.rglob("*.py"))
             if not skip & set(p.relative_to(library).parts)]
    for path in tqdm(paths, "reading Python's own documentation", leave=False, disable=None):
        try:
            nodes = ast.walk(ast.parse(path.read_bytes()))
        except (SyntaxError, ValueError, OSError):
            continue  # some files of the library are not meant to be parsed
        kinds = ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef
        docs += [ast.get_docstring(node) or "" for node in nodes if isinstance(node, kinds)]
    prose = re.compile(r"[A-Z][A-Za-z0-9 ,;:'()-]*[.!?]")  # leaves out tables, code and signatures
    return [s for doc in docs for paragraph in re.split(r"\n\s*\n", doc)
            for s in split_sentences(paragraph) if prose.fullmatch(s)]


def read_background(paths=None, least=100):
    """
    The haystack: sentences of text files and folders, or of Python's documentation, each once, of
    four words or more, without a person of any task. ValueError or OSError for less than `least`.
    """
    sentences = python_documentation() if not paths else [
        s for path in paths for text in read_documents(path) for s in split_sentences(text)]
    person = re.compile(rf"\b({'|'.join(set().union(*PEOPLE.values()))})\b")
    sentences = [s for s in dict.fromkeys(sentences) if len(s.split()) > 3 and not person.search(s)]
    if len(sentences) < least:
        name = ", ".join(paths or ["the documentation of Python"])
        raise ValueError(f"{name}: {len(sentences)} usable sentences, a haystack needs {least}")
    return sentences


# a newline is a token of its own, a word takes along the space before it, every character matches
# something. The bound of 64 is for tiktoken, which a million spaces in a row would overflow
PATTERN = r"\n| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|[^\S\n]{1,64}(?=[^\S\n])|[^\S\n]"
# how the tokenizer of Llama 3 cuts text; its file holds the ranks alone
LLAMA_PATTERN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
                 r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")


def train_tokenizer(sentences, vocab_size):
    """Byte-level BPE of `sentences`, with each bAbI word a token, after a space and without."""
    stories = [simulate(task, random.Random(i)) for task in TASKS for i in range(50)]
    text = " ".join(f"{line.text} {line.answer}" for story in stories for line in story)
    words = set(re.findall(r"\w+", text)).union(*LABELS.values())
    babi = sorted(w.encode() for word in words for w in (word, " " + word))
    # pieces to merge within: words and numbers; punctuation stays single bytes
    pieces = (piece for s in sentences for piece in re.findall(r" ?[^\W\d_]+| ?\d+", " " + s))
    counts = Counter(piece.encode() for piece in pieces)
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
            tokens, pieces[i] = pieces[i], []
            for token in tokens:
                if pieces[i] and (pieces[i][-1], token) == pair:
                    pieces[i][-1] += token
                else:
                    pieces[i].append(token)
            count(i, +1)
        del pairs[pair]
    for word in babi:  # last: a whole word is looked up first, so its rank needs no path of merges
        ranks.setdefault(word, len(ranks))
    return make_encoding(ranks)


def make_encoding(ranks, pattern=PATTERN):
    """The tiktoken.Encoding of {bytes: rank}, without special tokens. Raises ValueError."""
    whole = sorted(ranks.values()) == list(range(len(ranks)))
    if not whole or not {bytes([b]) for b in range(256)} <= ranks.keys():
        raise ValueError("the tokenizer is not whole: a token is there twice, or a byte is missing")
    return tiktoken.Encoding("babilong", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})


def encode(encoding, text):
    """The tokens of any text, a list. What would overflow tiktoken, endless white space, is cut."""
    parts = re.split(r"(\s{1000})", text)
    return [token for part in parts for token in encoding.encode_ordinary(part)]


def dump_tokenizer(encoding):
    """The tokens of an encoding as JSON, by rank, each byte a character (Latin-1)."""
    tokens = encoding.decode_tokens_bytes(range(encoding.n_vocab))
    tokens, pattern = [token.decode("latin-1") for token in tokens], encoding._pat_str
    content = tokens if pattern == PATTERN else {"pattern": pattern, "tokens": tokens}
    return json.dumps(content, indent=0)


def parse_tokenizer(text):
    """The encoding that dump_tokenizer wrote. Raises ValueError for another text."""
    try:
        tokens, pattern = json.loads(text), PATTERN
        if isinstance(tokens, dict):
            tokens, pattern = tokens["tokens"], tokens["pattern"]
        ranks = {token.encode("latin-1"): rank for rank, token in enumerate(tokens)}
        return make_encoding(ranks, pattern)
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise ValueError(f"the tokenizer is not a list of tokens in JSON ({e})") from None


def find_tokenizer(name):
    """tiktoken's encoding of this name, or that of a file like Llama 3's. Raises ValueError."""
    if name in ("gpt2", "cl100k_base", "o200k_base"):
        try:
            encoding = tiktoken.get_encoding(name)
        except Exception as e:  # tiktoken lets through whatever its http library raises
            raise ValueError(f"tiktoken could not fetch {name} ({type(e).__name__}): without "
                             "--tokenizer one is trained here, offline") from None
        return make_encoding(encoding._mergeable_ranks, encoding._pat_str)
    try:  # a line is a token in base64 and its rank
        pairs = [line.split() for line in Path(name).read_bytes().splitlines() if line]
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in pairs}
        return make_encoding(ranks, LLAMA_PATTERN)
    except (OSError, ValueError) as e:
        raise ValueError(f"--tokenizer={name} is neither gpt2, cl100k_base, o200k_base nor a file "
                         f"like Llama's tokenizer.model ({e})") from None


# -----------------------------------------------------------------------------
# samples

# tokens (S*T,) int64; answers: spans of all answers in them; prompt: where the last one starts;
# facts: {line number: span}; support: the numbers of the facts that the last answer rests on
Sample = namedtuple("Sample", "tokens answers prompt question target facts support")


def characters(length):
    """Characters (bytes, if not English) of text in a length of BABILong: '0k', '4k' or '1M'."""
    return int(length[:-1]) * CHARS_PER_1K * {"k": 1, "M": 1000}[length[-1]]


def written(answer):
    """An answer as the model writes it: 'milk,football' becomes ' milk, football.'"""
    return " " + answer.replace(",", ", ") + "."


def score(task, question, target, output):
    """BABILong's rule: up to a full stop `output` names the target, and else only what is asked."""
    output, question = (set(re.findall(r"\w+", text.lower()))
                        for text in (output.split(".")[0], question))
    target, labels = set(target.lower().split(",")), {label.lower() for label in LABELS[task]}
    return (labels & output) - (question - target) == target


def check_target(path, task, question, target):
    """Raises ValueError for a target, of a file, that no answer could match."""
    if not score(task, question, target, written(target)):
        raise ValueError(f"{path}: {target!r} is no answer to a question of {task}")


def digest(content):
    """The first 16 characters of a hash of bytes."""
    return hashlib.sha256(content).hexdigest()[:16]


class Babilong:
    """
    Composes samples of segments of block_size tokens. stories: {task: [story, ...]} to draw from,
    or None to simulate fresh ones; sentences: the haystack, in order.
    """

    def __init__(self, encoding, stories, sentences, block_size):
        self.encoding, self.block_size = encoding, block_size
        self.stories, self.sentences = stories, sentences
        self.encode = lru_cache(maxsize=100_000)(lambda text: tuple(encode(encoding, text)))
        (self.newline,) = self.encode("\n")
        haystack = encoding.encode_ordinary_batch([" " + s for s in sentences])
        self.haystack = [tokens for tokens in haystack if len(tokens) >= MIN_TOKENS]
        if not self.haystack:
            raise ValueError(f"the background has no sentence of {MIN_TOKENS} tokens or more")
        # for the perplexity of its text
        self.documents = [np.concatenate(self.haystack)]
        self.chars = list(map(len, encoding.decode_tokens_bytes(range(encoding.n_vocab))))
        self.ones = [1] * encoding.n_vocab
        # a task's answers all take the room of its longest: the place must not tell the length
        answers = LABELS | {"qa8": (",".join(OBJECTS), "nothing")}
        self.room = {t: max(len(self.encode(written(a))) for a in answers[t]) for t in TASKS}

    def noise(self, rng, budget, cost):
        """Sentences from a random place on, whose tokens cost `budget` at most; the last is cut."""
        at, sentences = rng.randrange(len(self.haystack)), []
        while budget > 0:
            sentence = self.haystack[at % len(self.haystack)]
            ends = list(accumulate(cost[t] for t in sentence))
            sentences.append(sentence[: bisect(ends, budget)])
            at, budget = at + 1, budget - ends[-1]
        return sentences

    def story(self, task, rng, dense=0, limit=math.inf):
        """A story that ends with a question, or more if dense. None beyond `limit` lines."""
        if self.stories is None:
            questions, at_end = rng.randint(1, 5), rng.randint(0, 3 * dense) if dense else 0
            last = 5 if dense < 2 else 1000  # 1000: ask about any statement of the story
            return simulate(task, rng, questions, at_end, last, limit)
        # one from a file is taken as it is, up to a question
        story = rng.choice(self.stories[task])
        return story[: rng.choice([i for i, line in enumerate(story, 1) if line.answer])]

    def guess(self, asked, task, n=2000):
        """Accuracies in % of the commonest answer, and of the commonest to the same question."""
        rng, counts = random.Random(task), defaultdict(Counter)
        learn, ask = ([data.story(task, rng)[-1] for _ in range(n)] for data in (self, asked))
        for line in learn:
            for words in "", line.text:
                counts[words][line.answer] += 1
        best = {words: counter.most_common(1)[0][0] for words, counter in counts.items()}
        right = [(best[""] == line.answer, best.get(line.text, best[""]) == line.answer)
                 for line in ask]
        majority, question_only = (100 * np.mean(right, axis=0)).round(1).tolist()
        return {"task": task, "majority": majority, "question_only": question_only}

    def sample(self, task, seed, index, segments=None, length=None, dense=0, noise=True):
        """
        Sample `index`, of `segments` segments or a BABILong length, like "4k". dense: 1 with more
        questions, to train on, 2 with many; noise=False: newlines as haystack. Raises ValueError:
        too short.
        """
        rng, T = random.Random(f"{seed}/{task}/{segments}/{length}/{index}"), self.block_size
        limit = segments * T // 5 if segments else math.inf  # a line has five tokens or more
        for _ in range(10_000):
            story = self.story(task, rng, dense, limit)
            sample = story and self.compose(task, rng, story, segments, length, dense, noise)
            if sample:
                return sample
        size = f"{length} in segments" if length else f"{segments} segments"
        raise ValueError(f"no story of {task} fits {size} of {T} tokens: take more")

    def compose(self, task, rng, story, segments, length, dense, noise):
        """The Sample of a story that ends with a question, or None if it does not fit."""
        T, n = self.block_size, 1  # n questions end the story
        while dense and story[-n - 1].answer:
            n += 1
        between = dense and rng.random() < (0.5 if dense == 1 else 0.8)
        lines = [(i, self.encode(" " + text), self.encode(written(answer)) if answer else ())
                 for i, (text, answer, _) in enumerate(story, 1)]
        body, end = [line for line in lines[:-n] if between or not line[2]], lines[-n:]
        padding = [self.newline] * (self.room[task] - len(end[-1][2]))
        size = len(padding) + sum(len(text + answer) for _, text, answer in end)
        # the haystack costs what is left, in characters or tokens; a question in between may push
        # `slack` tokens to the next segment
        cost = self.chars if length else self.ones
        slack = sum(len(text + answer) - 1 for _, text, answer in body if answer)
        budget = characters(length) if length else segments * T - slack
        budget -= sum(cost[t] for _, text, answer in body + end for t in text + answer)
        budget -= sum(cost[t] for t in padding)
        if size > T or (budget < 0 and not length):
            return None
        sentences = self.noise(rng, budget, cost) if noise else []
        places = [0, *sorted(rng.choices(range(len(sentences) + 1), k=len(body)))]
        tokens, facts, answers = [], {}, []
        for start, place, (i, text, answer) in zip(places, places[1:], body):
            tokens += chain(*sentences[start:place])
            if answer and len(tokens) % T + len(text + answer) > T:
                tokens += [self.newline] * (-len(tokens) % T)
            tokens += text + answer
            if answer:
                answers.append((len(tokens) - len(answer), len(tokens)))
            else:
                facts[i] = (len(tokens) - len(text), len(tokens))
        tokens += chain(*sentences[places[-1]:])
        gap = -(len(tokens) + size) % T if length else segments * T - len(tokens) - size
        more = noise and not length
        tokens += chain(*self.noise(rng, gap, self.ones)) if more else [self.newline] * gap
        for _, text, answer in end:
            tokens += text + answer
            answers.append((len(tokens) - len(answer), len(tokens)))
        question, target, support = story[-1]
        return Sample(np.array(tokens + padding), answers, answers[-1][0],
                      question, target, facts, support)

    def retrieve(self, sample, k):
        """
        A prompt (T - room,) in place of the sample's own: those of the k sentences that BM25 ranks
        closest to the question (k1 = 1.5, b = 0.75) that fit, in text order; then the question.
        """
        question = self.encode(" " + sample.question)
        text = self.encoding.decode(sample.tokens[: sample.prompt - len(question)])
        sentences = split_sentences(text)
        words = [re.findall(r"\w+", s.lower()) for s in sentences]
        asked = sorted(set(re.findall(r"\w+", sample.question.lower())))
        counts = np.array([[w.count(a) for a in asked] for w in words])
        size, n = np.array([[len(w)] for w in words]), (counts > 0).sum(axis=0)
        idf = np.log(1 + (len(words) - n + 0.5) / (n + 0.5))
        smooth = 0.375 + 1.125 * size / size.mean()
        scores = (idf * counts * 2.5 / (counts + smooth)).sum(axis=1)
        room, pieces = self.block_size - (len(sample.tokens) - sample.prompt) - len(question), {}
        for i in sorted(range(len(words)), key=lambda i: (-scores[i], -i))[:k]:
            piece = encode(self.encoding, " " + sentences[i])
            if len(piece) <= room:
                pieces[i], room = piece, room - len(piece)
        found = chain(*(pieces[i] for i in sorted(pieces)))
        return np.array([*found, *[self.newline] * room, *question])


class Published(Babilong):
    """BABILong's published samples, folder/task/length.json; their support is not known."""

    def __init__(self, like, folder, lengths):
        super().__init__(like.encoding, like.stories, like.sentences, like.block_size)
        self.folder, self.lengths = folder, lengths

    @lru_cache
    def read(self, task, length):
        """The records of a file. Raises ValueError for a target that no answer could match."""
        path = Path(self.folder, task, f"{length}.json")
        records = parse_records(read_text(path))
        for record in records:
            check_target(path, task, record["question"], record["target"])
        return records

    def story(self, task, rng):
        """The question of a sample, for `guess`."""
        record = rng.choice(self.read(task, rng.choice(self.lengths)))
        return [Line(record["question"], record["target"])]

    def sample(self, task, seed, index, length):
        """Sample `index` of a file. Newlines before the question fill the segments up."""
        record, T = self.read(task, length)[index], self.block_size
        text = "".join(" " + s for s in split_sentences(record["input"]))
        tokens, newline = encode(self.encoding, text), [self.newline]
        end = encode(self.encoding, " " + " ".join(record["question"].split()))
        end += newline * self.room[task]
        if len(end) > T:
            raise ValueError(f"a question and its answer, {len(end)} tokens, do not fit {T}")
        tokens += newline * (-len(tokens + end) % T) + end
        prompt = len(tokens) - self.room[task]
        return Sample(np.array(tokens), [], prompt, record["question"], record["target"], {}, ())


class Documents:
    """Plain text in place of stories; share: which part of every text, from and to."""

    newline = -1  # is a token to learn here, not what fills a sample up

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
        """A hash of everything that samples are made of."""
        return digest(b"".join(document.tobytes() + b"|" for document in self.documents))

    def sample(self, task, seed, index, segments, **which):
        """Sample `index`, `segments` segments of one document; at `prompt` its text has ended."""
        rng, size = random.Random(f"{seed}/{segments}/{index}"), segments * self.block_size
        at = rng.randrange(self.ends[-1])
        i = bisect(self.ends, at)
        document = self.documents[i]
        at -= self.ends[i] - len(document)
        start = max(0, min(at, len(document) - size))
        tokens = document[start : start + size]
        return Sample(np.pad(tokens, (0, size - len(tokens))), [], len(tokens), None, None, {}, ())


# -----------------------------------------------------------------------------
# the data folder

def write_data(data_dir, tasks=TASKS, babi_dir=None, background=None, vocab_size=2048, seed=1337,
               eval_stories=1000, tokenizer=None):
    """
    Writes data_dir: tokenizer.json, train/ and eval/ with background.txt and qa*.txt (none to train
    on if simulated), and last meta.json, without which it is not used. Raises ValueError, OSError.
    """
    data_dir = Path(data_dir)
    ours = {"tokenizer.json", "meta.json", "train", "eval", "background.txt",
            *(f"{task}.txt" for task in TASKS)}
    found = chain(data_dir.glob("[!.]*"), data_dir.glob("[!.]*/[!.]*"))
    if foreign := {p.name for p in found} - ours:
        raise ValueError(f"{data_dir} holds {min(foreign)}, which is not of prepare_babilong.py: "
                         "name another --data_dir")
    for split in "train", "eval":  # before the work, so that a mistake shows at once
        (data_dir / split).mkdir(parents=True, exist_ok=True)
    # the part to evaluate with begins at sentence 450
    sentences, files = read_background(background, least=500), {}
    for split, held_out in ("train", False), ("eval", True):  # a tenth, in runs of 50 sentences
        part = [s for i, s in enumerate(sentences) if (i // 50 % 10 == 9) == held_out]
        files[f"{split}/background.txt"] = "".join(s + "\n" for s in part)
    for task in tqdm(tasks, "stories", leave=False, disable=None):
        if babi_dir:
            test = find_babi(babi_dir, task, "test")
            seen = set(map(str, test))  # what is asked must not have been learned
            train = [s for s in find_babi(babi_dir, task, "train") if str(s) not in seen]
            if not train:
                raise ValueError(f"{babi_dir} holds no story of {task} that is not in its test")
            files[f"train/{task}.txt"] = format_babi(task, train)
        else:
            seeds = [f"{seed}/eval/{task}/{i}" for i in range(eval_stories)]
            test = [simulate(task, random.Random(s)) for s in seeds]
        files[f"eval/{task}.txt"] = format_babi(task, test)
    haystack = files["train/background.txt"].splitlines()
    encoding = find_tokenizer(tokenizer) if tokenizer else train_tokenizer(haystack, vocab_size)
    files["tokenizer.json"] = dump_tokenizer(encoding)
    source = ",".join(background or [f"documentation of Python {sys.version.split()[0]}"])
    meta = {"hash": digest("".join(name + files[name] for name in sorted(files)).encode()),
            "tasks": ",".join(tasks), "stories": babi_dir or "simulated", "background": source,
            "seed": seed}
    old = data_dir / "meta.json"
    # the same data may have been written, and be read, by another process that began with this one
    if old.exists() and meta["hash"].encode() not in old.read_bytes():
        old.unlink()
    for path in set(data_dir.glob("*/qa*.txt")) - {data_dir / name for name in files}:
        path.unlink(missing_ok=True)
    for name, text in files.items():
        write_file(data_dir / name, text)
    write_file(data_dir / "meta.json", json.dumps(meta, indent=2) + "\n")
    return meta


def load_data(data_dir, block_size, tokenizer=None):
    """
    (train Babilong, eval Babilong, meta) of a folder of write_data, in its tokens or in those of a
    tokenizer as of dump_tokenizer. Raises ValueError.
    """
    try:
        meta = json.loads(read_text(Path(data_dir, "meta.json")))
        encoding = parse_tokenizer(tokenizer or read_text(Path(data_dir, "tokenizer.json")))
        splits = []
        for split in Path(data_dir, "train"), Path(data_dir, "eval"):
            stories = {task: find_babi(split, task) for task in meta["tasks"].split(",")
                       if split.name == "eval" or meta["stories"] != "simulated"}
            sentences = read_text(split / "background.txt").splitlines()
            splits.append(Babilong(encoding, stories or None, sentences, block_size))
    except (OSError, KeyError, TypeError, ValueError) as e:
        raise ValueError(
            f"{data_dir} cannot be used ({e}): run prepare_babilong.py again") from None
    return *splits, meta


def show(data, task, **which):
    """Prints a sample, its facts in [brackets], those the answer rests on in [[double ones]]."""
    sample, marks = data.sample(task, seed=0, index=0, **which), defaultdict(bytes)
    for i, (start, end) in sample.facts.items():
        brackets = 1 + (i in sample.support)
        marks[start] += b"[" * brackets
        marks[end] += b"]" * brackets
    tokens = enumerate(data.encoding.decode_tokens_bytes(sample.tokens))
    text = b"".join(marks[i] + token for i, token in tokens)
    print(text.decode(errors="replace").strip())
    print(f"\n{len(sample.tokens)} tokens, {len(sample.tokens) // data.block_size} segments of "
          f"{data.block_size}; {len(sample.facts)} facts; target: {sample.target}")


# -----------------------------------------------------------------------------
# the command line

def filled(text):
    """An argparse type: any text but an empty one, as of a shell variable that is not set."""
    if not text.strip():
        raise ArgumentTypeError("takes a value, not an empty one")
    return text


class Parser(argparse.ArgumentParser):
    """Takes no abbreviated flags, lists defaults under -h, and complains in one line."""

    def __init__(self, description):
        super().__init__(description=description, allow_abbrev=False,
                         formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        # what a terminal or a pipe cannot show, or is no text, becomes a mark
        for stream in sys.stdin, sys.stdout, sys.stderr:
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(errors="replace")

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message}\n")

    def add_group(self, title):
        """The flags that follow are listed under this title."""
        self.group = self.add_argument_group(title)

    def flag(self, name, default, help, kind=filled, choices=None):
        """Adds --name to the group; with a bool as default --name and --no-name."""
        how = {"type": kind, "choices": choices}
        if isinstance(default, bool):
            how = {"action": argparse.BooleanOptionalAction}
        help += "%(default).0s" * (default is None)  # else -h adds "(default: None)"
        self.group.add_argument(f"--{name}", default=default, help=help, **how)


def number(kind, low, high):
    """An argparse type: an int or a float from low to high."""
    def parse(text):
        try:
            if low <= kind(text) <= high:
                return kind(text)
        except ValueError:
            pass
        name = "a whole number" if kind is int else "a number"
        raise ArgumentTypeError(f"takes {name} from {low} to {high}, not {text!r}")
    return parse


def several(kind):
    """An argparse type: what is separated by commas, each part of type `kind` and taken once."""
    def parse(text):
        parts = list(dict.fromkeys(kind(part.strip()) for part in text.split(",") if part.strip()))
        if not parts:
            raise ArgumentTypeError(f"takes values, separated by commas, not {text!r}")
        return parts
    return parse


def out_file(text):
    """An argparse type: a file that can be written when the work is done."""
    if Path(text).is_dir() or not Path(text).absolute().parent.is_dir():
        raise ArgumentTypeError(f"cannot write {text}: a folder, or its folder is missing")
    return text


def length(text):
    """An argparse type: a length like 4k."""
    if not re.fullmatch(r"[0-9]{1,3}[kM]", text):
        raise ArgumentTypeError(f"takes a length like 0k, 4k or 1M, not {text!r}")
    return text


def parse_tasks(text):
    """An argparse type: ['qa1', 'qa2'] from 'qa1,qa2', or all of them."""
    tasks = list(TASKS) if text == "all" else several(str)(text)
    if unknown := set(tasks) - set(TASKS):
        raise ArgumentTypeError(f"takes qa1 to qa10, or all, not {min(unknown)!r}")
    return tasks


def get_parser():
    parser = Parser("Writes the data, or shows a sample of it.")
    flag, group = parser.flag, parser.add_group
    group("data")
    flag("data_dir", "data/babilong", "folder to write")
    flag("tasks", "all", "bAbI tasks, like qa1,qa2, or all", parse_tasks)
    flag("babi_dir", None, "folder of published bAbI files, instead of the simulator")
    flag("background", None, "haystack: text files and folders of them, by commas", several(str))
    flag("vocab_size", 2048, "most tokens of the tokenizer trained on it", number(int, 512, 65536))
    flag("tokenizer", None, "gpt2, cl100k_base, o200k_base or Llama 3's tokenizer.model instead")
    flag("seed", 1337, "of the evaluation stories", number(int, 0, 2**63 - 1))
    group("BABILong's published samples, for train.py --eval_only --babilong_dir=CACHE_DIR/DATASET")
    flag("source", "local", "hub: download them instead", choices=("local", "hub"))
    flag("lengths", "0k,1k,2k,4k", "of their texts", several(length))
    flag("dataset", "babilong", "100 or 1,000 of each", choices=("babilong", "babilong-1k-samples"))
    flag("hub_url", HUB, "where they are")
    flag("cache_dir", "data/cache", "where they go")
    group("show")
    flag("show", None, "print a sample; data_dir is written only if missing", choices=TASKS)
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
        meta = write_data(args.data_dir, args.tasks, args.babi_dir, args.background,
                          args.vocab_size, args.seed, tokenizer=args.tokenizer)
        print(f"wrote {args.data_dir}: {', '.join(f'{k} {v}' for k, v in meta.items())}")
    if args.show:
        data = load_data(args.data_dir, args.block_size)[1]
        if args.show not in data.stories:
            raise ValueError(f"{args.data_dir} holds no {args.show}: prepare it with --tasks")
        size = {"length": args.length} if args.length else {"segments": args.segments}
        show(data, args.show, **size)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as e:
        sys.exit(f"prepare_babilong.py: error: {e}")
    except KeyboardInterrupt:
        sys.exit(130)
