"""
Reads a text of any length, segment by segment, and answers its question or continues it.

$ python sample.py --start="Mary went to the office. John took the milk. Where is Mary?"
$ python sample.py --start=FILE:story.txt --save_memory=story.mem      # read a story today,
$ python sample.py --memory_file=story.mem --start="Where is Mary?"    # ask tomorrow
$ python sample.py --interactive                                       # type a story, and ask
$ python sample.py --start=FILE:story.txt --show_memory --heatmap=memory.svg
"""
import codecs
import hashlib
import io
import sys
from functools import partial
from html import escape
from pathlib import Path

import torch

from model import sample
from prepare_babilong import (Parser, encode, number, out_file, read_text, several,
                              split_sentences, write_file)
from train import first_line, load_checkpoint, load_model, pick_device

# the model that answers before there is a trained one
MODEL = Path(__file__).with_name("assets") / "ten-tasks.pt"
STORY = "Mary went to the office. John moved to the garden. Where is Mary?"


def svg(width, height, title, body):
    """A picture of lines of SVG on white, in plain attributes, which every viewer knows."""
    return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
            f'width="{width}" height="{height}" font-family="monospace" font-size="12" '
            f'fill="#1f2328"><title>{escape(title)}</title>\n'
            f'<rect width="{width}" height="{height}" fill="#ffffff"/>\n{body}\n</svg>\n')


def label(text, most=14):
    """A text in quotes, cut if it is long, in characters that every viewer can show."""
    return repr(text if len(text) <= most else text[: most - 1] + "\u2026")


class Reader:
    """
    A model, and what it has read. state: as of model.read; last: the tokens of the last segment;
    queues: {block, from 1: texts of the chunks in its slots}; plain: not trained on stories.
    """
    def __init__(self, model, encoding, layers=(), show_memory=False, plain=False):
        self.model, self.encoding, self.layers = model.requires_grad_(False), encoding, layers
        self.encode, self.show_memory, self.plain = partial(encode, encoding), show_memory, plain
        for n in layers:
            memory = model.blocks[n - 1].memory
            memory.attention = partial(self.keep, n, memory.attention)
        self.begin()

    def keep(self, n, attention, *args):
        """Block n's attention (1, H, T, N), kept to be looked at."""
        self.A[n] = attention(*args)
        return self.A[n]

    def begin(self, *state):
        """Forgets everything, or begins from a state."""
        self.state = state or (self.model.initial_memory(1), self.model.rope.new_zeros(1, 0).long())
        self.last, self.queues, self.A = self.state[1], {n: [] for n in self.layers}, {}

    def feed(self, tokens):
        """Reads a list of tokens as model.read does, a segment at a time, to see what it writes."""
        if not tokens:
            return
        (memory, tail), c = self.state, self.model.config
        idx = torch.cat((tail, torch.tensor([tokens]).to(tail)), dim=1)  # (1, t + n)
        for part in idx.split(c.block_size, dim=1):
            states, memory, log_odds = self.model.segments(self.model.embed(part)[:, None], memory)
            self.logits = self.model.head(states[:, -1])  # (1, V)
            self.state, self.last = (memory, part[:, : part.size(1) % c.block_size]), part
            for n in self.layers if log_odds is not None else ():
                written = part.view(-1, c.chunk_size)[log_odds[n - 1, 0, 0] > 0]  # (j, w)
                texts = [self.encoding.decode(chunk) for chunk in written.tolist()]
                self.queues[n] = (texts[::-1] + self.queues[n])[: c.memory_slots]
                if self.show_memory:
                    print("\n" * (len(tokens) == 1) + f"[block {n}: {len(texts)} of "
                          f"{log_odds.size(-1)} chunks written: {', '.join(map(label, texts))}]")

    def read(self, text):
        # as in training: sentences in one line, a space before each. Newlines would be padding
        text = text if self.plain else "".join(" " + word for word in text.split())
        self.feed(self.encode(text))

    def respond(self, text, args):
        """Reads text; answers its last sentence if that is a question, else continues it."""
        *before, last = [text] if self.plain else split_sentences(text)
        self.read(" ".join(before))
        # a continuation is made up, so it may not enter a memory that is saved; an answer may
        most, temperature, stop = 0 if args.save_memory else args.max_new_tokens, 0.8, None
        if last.endswith("?") and not self.plain:
            most, temperature, stop = args.answer_tokens, 0.0, "."
            # as in training, newlines fill a segment that cannot hold question and answer
            used, T = self.state[1].size(1), self.model.config.block_size
            if used + len(self.encode(" " + last)) + most > T:
                self.feed(self.encode("\n") * (-used % T))
        temperature = temperature if args.temperature is None else args.temperature
        self.read(last)
        print(last, end="", flush=True)
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        for _ in range(most):
            token = sample(self.logits, temperature, args.top_k).item()
            piece = decoder.decode(self.encoding.decode_single_token_bytes(token))
            print(piece, end="", flush=True)
            self.feed([token])
            if piece == stop:
                break
        print(decoder.decode(b"", final=True))

    def look(self, memory):
        """{block: A (T, N)}: what the last segment's tokens read in a memory, mean of the heads."""
        if not self.layers or not self.last.numel():
            raise ValueError("nothing has been read yet, or the model has no memory bank")
        self.model.segments(self.model.embed(self.last)[:, None], memory)
        return {n: A[0].mean(dim=0).float().cpu() for n, A in self.A.items()}

    def show(self):
        """Prints what the slots hold, and which token of the last segment attends most to each."""
        # a full segment is read once more, with its own chunks in the bank
        for n, A in self.look(self.state[0]).items():
            print(f"block {n}: {len(self.queues[n])} of {A.size(1)} slots written in this session")
            for i, text in enumerate(self.queues[n]):
                most, t = A[:, i].max(dim=0)
                token = label(self.encoding.decode([self.last[0, t].item()]))
                print(f"slot {i}: {label(text, 40)}, read most by {token}: {most:.0%}")

    def draw(self):
        """Figure 6 of the paper as SVG: the last segment's tokens down, a bank's slots across."""
        x, body = 110, ['<text x="8" y="16">darker: more attention; left: younger slots</text>']
        for t, token in enumerate(self.last[0].tolist()):
            text = escape(label(self.encoding.decode([token])))
            body.append(f'<text x="102" y="{58 + 16 * t}" text-anchor="end">{text}</text>')
        fresh, written = self.look(self.model.initial_memory(1)), self.look(self.state[0])
        for n in self.layers:
            for name, A in ("fresh bank", fresh[n]), ("bank as written", written[n]):
                T, N = A.shape
                w = max(3, 200 // N)
                body += [f'<text x="{x}" y="38">block {n}, {name}</text>',
                         f'<path fill="#eee" d="M{x} 46h{w * N}v{16 * T}h{-w * N}z"/>']
                for i in range(1, 11):  # all cells of one darkness are one path
                    cells = "".join(f"M{x + w * slot} {46 + 16 * t}h{w}v15h{-w}z"
                                    for t, slot in ((10 * A).round() == i).nonzero().tolist())
                    body.append(f'<path fill="#08306b" fill-opacity="{i / 10}" d="{cells}"/>')
                x += w * N + 12
        return svg(x, 54 + 16 * T, "what the tokens read", "\n".join(body))

    def fingerprint(self):
        """A hash of the weights: a memory means something only to the model that wrote it."""
        hashes = [hashlib.sha256(w.cpu().numpy()).digest() for w in self.model.parameters()]
        return hashlib.sha256(b"".join(hashes)).hexdigest()[:16]

    def save(self, path):
        (memory, tail), content = self.state, io.BytesIO()
        # clone: else the file would hold all the text that the tail is the end of
        saved = {"memory": memory, "tail": tail.clone(), "model": self.fingerprint()}
        torch.save(saved, content)
        write_file(path, content.getvalue())

    def load(self, path):
        """Begins from a file of save. ValueError: another file, or a memory of another model."""
        fresh, c = self.model.initial_memory(1), self.model.config
        try:
            saved = torch.load(path, map_location=fresh.device, weights_only=True)
            memory, tail = saved["memory"], saved["tail"]
            if not (saved["model"] == self.fingerprint() and memory.isfinite().all()
                    and memory.shape == fresh.shape and memory.dtype == fresh.dtype
                    and tail.shape == (1, tail.size(-1)) and tail.size(1) < c.block_size
                    and tail.dtype == torch.int64 and ((0 <= tail) & (tail < c.vocab_size)).all()):
                raise ValueError("another model wrote it, or it is damaged")
        except Exception as e:  # torch.load raises many kinds for a file that is not its own
            raise ValueError(f"{path} is no memory of this model ({first_line(e)})") from None
        self.begin(memory, tail)


def get_parser():
    parser = Parser("Reads a text with a trained model, and answers its question or continues it.")
    parser.add_group("flags")
    flag, count, size = parser.flag, number(int, 0, 10**9), number(int, 1, 10**9)
    flag("out_dir", None, "folder that train.py left, or a model's file; default: out, and before "
         "there is one assets/ten-tasks.pt")
    flag("start", STORY, "the text to read, or FILE:path", str)
    flag("interactive", False, "read the lines that are typed, answer those that end in ?")
    flag("max_new_tokens", 100, "how far a text is continued; with --save_memory: not", count)
    flag("answer_tokens", 8, "how long an answer can get", size)
    flag("temperature", None, "default: 0 for a question, else 0.8", number(float, 0, 100))
    flag("top_k", 50, "sample from the k likeliest tokens; 0: from all", count)
    flag("memory_file", None, "start from a memory saved earlier")
    flag("save_memory", None, "file for the memory at the end", out_file)
    flag("heatmap", None, "SVG file: which slots the last segment's tokens read", out_file)
    flag("heatmap_layer", None, "blocks to look at, like 1,2; default: the middle", several(size))
    flag("show_memory", False, "say what each segment writes and, at the end, what the slots hold")
    flag("device", "auto", "cuda, mps, cpu, ...; auto: the best there is")
    flag("seed", 1337, "of the sampling", number(int, 0, 2**63 - 1))
    return parser


def chat(reader, args):
    """A story is read line by line; a line that ends in ? is answered.
    /memory  what the slots hold    /save FILE  save the memory    /help   this
    /forget  empty the memory       /load FILE  load a memory      Ctrl-D  ends"""
    known = {("/memory", 0): reader.show, ("/forget", 0): reader.begin, ("/load", 1): reader.load,
             ("/save", 1): reader.save, ("/help", 0): lambda: print(chat.__doc__)}
    print(chat.__doc__)
    while True:
        try:
            line = input("> ").lstrip("\ufeff").strip()
            name, *path = line.split(maxsplit=1) or [""]
            if (name, len(path)) in known:
                known[name, len(path)](*path)
            elif line.startswith("/") or "\ufffd" in line:
                print(f"not understood: {line}. /help lists the commands")
            elif line.endswith("?"):
                reader.respond(line, args)
            else:
                reader.read(line + "\n")
        except EOFError:
            return print()
        except (ValueError, OSError, KeyboardInterrupt) as e:
            print(e)


def main(args):
    text = read_text(args.start[5:]) if args.start.startswith("FILE:") else args.start
    if not text.strip() or text != text.encode(errors="replace").decode():
        raise ValueError("--start holds no text, or it is not in UTF-8")
    torch.manual_seed(args.seed)
    default = "out" if Path("out/ckpt.pt").exists() else MODEL
    checkpoint = load_checkpoint(args.out_dir or default)
    model, encoding = load_model(checkpoint, pick_device(args.device))
    banks = [n for n, block in enumerate(model.blocks, start=1) if block.memory is not None]
    layers = args.heatmap_layer or banks[len(banks) // 2 :][:1]
    if not set(layers) <= set(banks) or (args.heatmap or args.show_memory) and not banks:
        raise ValueError(f"there is no such bank to look at: the blocks with one are {banks}")
    reader = Reader(model, encoding, layers, args.show_memory, checkpoint["args"].get("data"))
    if args.memory_file:
        reader.load(args.memory_file)
    if not args.interactive or args.start != STORY:
        reader.respond(text, args)
    if args.interactive:
        chat(reader, args)
    if args.save_memory:
        reader.save(args.save_memory)
    if args.show_memory:
        reader.show()
    if args.heatmap:
        write_file(args.heatmap, reader.draw())


if __name__ == "__main__":
    try:
        main(get_parser().parse_args())
    except (ValueError, OSError) as e:
        sys.exit(f"sample.py: error: {e}")
    except KeyboardInterrupt:
        sys.exit(130)
