"""
Reads a text of any length segment by segment, carries the memory, and continues it; a question it answers.

$ python sample.py --start="Mary went to the office. John took the milk. Where is Mary?"
$ python sample.py --start=FILE:story.txt --save_memory=story.mem      # read a story today,
$ python sample.py --memory_file=story.mem --start="Where is Mary?"    # ask tomorrow
$ python sample.py --interactive                                       # read what is typed, answer lines that end in ?
$ python sample.py --heatmap=memory.svg --show_memory                  # which slots do the tokens read?
"""
import codecs
import hashlib
import io
import os
import sys
from functools import partial
from html import escape
from pathlib import Path

import torch

import prepare_babilong as babilong
from prepare_babilong import Parser, number, write_file
from train import load_checkpoint, load_model, pick_device, several, svg

STORY = "Mary went to the office. John moved to the garden. Where is Mary?"

try:
    import readline  # noqa: F401  history and line editing for input(), where the platform has them
except ImportError:
    pass


# -----------------------------------------------------------------------------
# pictures of what the tokens read: the paper's Figure 6

STEPS = (0.05, 0.1, 0.2, 0.4, 0.6, 0.8)  # shares of a token's attention from which on a cell has the next colour
SHADES, BLUES = " .:-=+#", (0, 17, 18, 25, 32, 39, 51)  # in a terminal: characters, and the colours behind them
MOST = 64  # slots; of more, those that are read most


def levels(attentions):
    """Tensors (T, N) of shares, 0 to 1, as integers (T, n), 0 to 6, of the n slots that are shown; and which these are."""
    most = sum(A.sum(dim=0) for A in attentions).topk(min(MOST, attentions[0].size(1))).indices.sort().values
    return [torch.bucketize(A[:, most], torch.tensor(STEPS), right=True) for A in attentions], most.tolist()


def label(text):
    """A token's text, short, in characters that every viewer can show."""
    text = "".join(c if c.isprintable() else "\u21b5" if c == "\n" else "\ufffd" for c in text)
    return text if len(text) <= 14 else text[:13] + "\u2026"


def heatmap(rows, tokens):
    """An SVG, tokens down and slots across. rows: (title, {name: A (T, N)}) of each block, two A a row; tokens: T texts."""
    left, wide, high, top, body = 116, 136, 16, 60, ['<text x="8" y="20">a token\u2019s attention to a slot, from</text>']
    for i, step in enumerate(STEPS):
        body.append(f'<path class="a{i + 1}" stroke-width="12" d="M{8 + 66 * i} 36h20"/><text x="{32 + 66 * i}" y="40">{step:.0%}</text>')
    for title, attentions in rows:
        panels, slots = levels([*attentions.values()])
        body.append(f'<g transform="translate(0 {top})"><text x="8" y="16" font-weight="bold">{title}</text>'
                    f'<text x="{left - 8}" y="36" text-anchor="end" class="small">slot</text>')
        for t, token in enumerate(tokens):
            body.append(f'<text x="{left - 8}" y="{56 + high * t}" text-anchor="end">{escape(label(token))}</text>')
        for x, name, panel in zip((left, left + wide + 12), attentions, panels):
            w = wide / len(slots)
            body.append(f'<text x="{x}" y="16">{name}</text><rect x="{x}" y="44" width="{wide}" height="{high * len(tokens)}" class="a0"/>')
            for n in range(0, len(slots), -(-len(slots) // 8)):
                body.append(f'<text x="{x + w * (n + 0.5):.1f}" y="36" text-anchor="middle" class="small">{slots[n]}</text>')
            body.append(f'<g transform="translate({x} 44) scale({w:.4f} {high})" stroke-width=".92">')
            for level in range(1, len(STEPS) + 1):
                cells = "".join(f"M{n} {t}.5h1" for t, n in (panel == level).nonzero().tolist())
                body.append(f'<path class="a{level}" d="{cells}"/>')
            body.append("</g>")
        body.append("</g>")
        top += 64 + high * len(tokens)
    return svg(left + 2 * wide + 20, top, "which slots the tokens read", "\n".join(body))


def blocks(rows, tokens, colour):
    """The same as lines of text."""
    for title, attentions in rows:
        panels, slots = levels([*attentions.values()])
        wide = 2 if len(slots) <= 16 else 1
        yield f"{title}, slots {slots[0]} to {slots[-1]}: " + " | ".join(attentions)
        for token, *cells in zip(tokens, *(panel.tolist() for panel in panels)):
            shades = ["".join((f"\x1b[48;5;{BLUES[v]}m" if colour else "") + SHADES[v] * wide for v in row) for row in cells]
            yield f"{label(token):>14} |" + "| |".join(row + ("\x1b[0m" if colour else "") for row in shades) + "|"


class Watch:
    """
    Looks on while blocks (counted from 1) read and write: attention[n] is A (T, N) of the last call, the mean over the
    heads; written[n] has, for each segment, the chunk that went into each slot, -1 for none. If `tell` is on, says in a line
    what each segment did to the bank.
    """

    def __init__(self, model, encoding, layers, tell):
        self.model, self.encoding, self.tell, self.attention, self.out = model, encoding, tell, {}, {}
        self.written = {n: [] for n in layers}
        model.embed.register_forward_hook(lambda module, args, out: setattr(self, "tokens", args[0][0].tolist()))
        for n in layers:
            block = model.blocks[n - 1]
            block.memory.w_out.register_forward_hook(lambda module, args, out, n=n: self.out.update({n: out.sigmoid().mean().item()}))
            block.register_forward_hook(partial(self.on_block, n))

    def on_block(self, n, block, args, out):
        (_, rope, M, cache), (_, h) = args, out
        self.attention[n] = block.memory.attention(block.attn.queries(h, rope), M, block.attn)[0].mean(dim=0).float().cpu()  # (T, N)
        if cache is not None or len(self.tokens) < self.model.config.block_size:
            return
        _, claimed, g_in, g_forget, slot = block.memory.gates(h, M)
        written, slot = claimed[0] > block.memory.threshold, slot[0]  # (J,)
        self.written[n].append(torch.full_like(M[0, :, 0], -1, dtype=torch.int64).scatter(0, slot[written], written.nonzero()[:, 0]))
        if not self.tell:
            return
        moved = (block.memory.write(h, M) - M)[0, slot, :-1].norm(dim=-1) * written  # (J,)
        means = [f"{gate[0, chunks].mean().item():.2f}" if chunks.any() else "-"
                 for gate, chunks in ((g_in, written), (g_forget, written), (g_forget, ~written))]
        most = [f"{slot[j]} by {label(self.encoding.decode([self.tokens[t] for t in block.memory.chunks[j].tolist()]))!r}"
                for j in moved.topk(min(3, int(written.sum()))).indices]
        print("[block {}: {} of {} slots written, gates there: in {}, forget {} (elsewhere {}), out {:.2f}; most changed: {}]".format(
            n, written.sum(), M.size(1), *means, self.out[n], ", ".join(most) or "-"))

    @torch.no_grad()
    def look(self, state):
        """What the tokens since the memory was last written read, for heatmap and blocks: rows, and the tokens' texts."""
        memory, tail = state
        tell, self.tell, fresh, name, views = self.tell, False, self.model.initial_memory(1), "after the updates", []
        if torch.equal(memory, fresh):  # no segment is full yet
            newlines = self.encoding.encode_ordinary("\n") * (self.model.config.block_size - tail.size(1))
            memory = self.model.segment(torch.cat((tail, torch.tensor([newlines]).to(tail)), dim=1), memory)[1]
            name = "after its update"
        for M in fresh, memory:
            self.model.segment(tail, M)
            views.append(dict(self.attention))
        self.tell = tell
        rows = [(f"block {n}", {"before any update": views[0][n], name: views[1][n]}) for n in views[0]]
        return rows, [self.encoding.decode([token]) for token in tail[0].tolist()]


# -----------------------------------------------------------------------------

class Reader:
    """
    A model and the state of what it has read: the memory, and the tokens since the memory was last written. plain: it learned from
    plain text (train.py --data), and text is read as it is.
    """

    def __init__(self, model, encoding, watch=None, plain=False):
        self.model, self.encoding, self.watch, self.plain, self.state = model, encoding, watch, plain, None

    def read(self, text):
        """Reads text, without an answer."""
        if not self.plain:  # as in training: sentences in one line, each with a space before it. A line break would look like padding
            text = " " + " ".join(text.split()) if text.strip() else ""
        self._read(self.encoding.encode_ordinary(text))

    def _read(self, tokens):
        _, self.state = self.model.generate(torch.tensor([tokens], dtype=torch.int64, device=self.device), 0, self.state)

    @property
    def device(self):
        return self.model.embed.weight.device

    def make_room(self, tokens):
        """If so many tokens would cross the segment's border, fills the segment with newlines, as in training."""
        used, size = 0 if self.state is None else self.state[1].size(1), self.model.config.block_size
        if 0 < used < size < used + tokens:
            self._read(self.encoding.encode_ordinary("\n") * (size - used))

    def go_on(self, max_new_tokens, temperature, top_k, stop=None):
        """Prints the continuation, piece by piece, up to a token whose text is `stop`."""
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

        def on_token(token):
            piece = decoder.decode(self.encoding.decode_single_token_bytes(token.item()))
            print(piece, end="", flush=True)
            return piece == stop

        nothing = torch.zeros(1, 0, dtype=torch.int64, device=self.device)
        _, self.state = self.model.generate(nothing, max_new_tokens, self.state, temperature, top_k, on_token)
        print(decoder.decode(b"", final=True))

    def respond(self, text, args):
        """Reads text; answers its last sentence if that is a question, up to a full stop, else continues it."""
        *before, last = [text] if self.plain else babilong.split_sentences(text)
        self.read(" ".join(before))
        question = last.endswith("?") and not self.plain
        if question:
            self.make_room(len(self.encoding.encode_ordinary(" " + last)) + args.answer_tokens)
        self.read(last)
        print(last, end="", flush=True)
        temperature = args.temperature if args.temperature is not None else 0.0 if question else 0.8
        length, stop = (args.answer_tokens, ".") if question else (args.max_new_tokens, None)
        self.go_on(length, temperature, args.top_k, stop)

    def show(self):
        """Prints which slots the tokens read."""
        if self.watch is None:
            raise ValueError("this model has no memory bank to look at")
        if self.state is None:
            raise ValueError("nothing has been read yet")
        print(*blocks(*self.watch.look(self.state), sys.stdout.isatty() and "NO_COLOR" not in os.environ), sep="\n")

    def fingerprint(self):
        """A hash of the weights: a memory means something only to the model that wrote it."""
        digest = hashlib.sha256()
        for weight in self.model.state_dict().values():
            digest.update(weight.cpu().contiguous().view(torch.uint8).numpy())
        return digest.hexdigest()[:16]

    def save(self, path):
        """Writes the state to a file, whole or not at all."""
        memory, tail = self.state or (self.model.initial_memory(1), torch.zeros(1, 0, dtype=torch.int64))
        content = io.BytesIO()
        torch.save({"memory": memory.cpu().contiguous(), "tail": tail.cpu().contiguous(), "model": self.fingerprint()}, content)
        write_file(path, content.getvalue())

    def load(self, path):
        """Reads the state from a file of save. Raises ValueError for another file, or a memory of another model."""
        if not Path(path).is_file():
            raise ValueError(f"there is no memory file {path}")
        try:
            saved = torch.load(path, map_location=self.device, weights_only=True)
            memory, tail, model = saved["memory"], saved["tail"], saved["model"]
        except Exception as e:  # torch.load raises many kinds for a file that is damaged or not its own
            raise ValueError(f"{path} is not a memory saved by sample.py, or damaged ({type(e).__name__})") from None
        if model != self.fingerprint():
            raise ValueError(f"the memory in {path} was written by another model: only that one can read it")
        self.state = memory, tail


def get_parser():
    parser = Parser("Reads a text with a trained model and continues it.")
    parser.add_argument("--out_dir", default="out", help="folder that train.py left")
    parser.add_argument("--start", help="the text to read, or FILE:path; a question at its end is answered. Default: two moves and a question")
    parser.add_argument("--interactive", action="store_true", help="read the lines that are typed, answer those that end in ?")
    parser.add_argument("--max_new_tokens", type=number(int, 0, 10**9), default=100, help="how far a text is continued")
    parser.add_argument("--answer_tokens", type=number(int, 1, 10**9), default=8, help="how long an answer can get")
    parser.add_argument("--temperature", type=number(float, 0, 100),
                        help="0: always the likeliest token; default: 0 for a question, else 0.8")
    parser.add_argument("--top_k", type=number(int, 0, 10**9), default=50, help="sample from the k likeliest tokens; 0: from all")
    parser.add_argument("--memory_file", metavar="FILE", help="start from a memory saved earlier")
    parser.add_argument("--save_memory", metavar="FILE", help="save the memory at the end")
    parser.add_argument("--heatmap", metavar="SVG", help="at the end, draw which slots the last segment's tokens read")
    parser.add_argument("--heatmap_layer", type=several(number(int, 1, 1000)), metavar="1,2",
                        help="blocks to look at, counted from 1; default: the middle one of those with a memory")
    parser.add_argument("--show_memory", action="store_true", help="the same in the terminal, and a line for each segment that is written")
    parser.add_argument("--device", default="auto", help="cuda, mps, cpu, ...; auto: the best there is")
    parser.add_argument("--seed", type=number(int, 0, 2**63 - 1), default=1337, help="of the sampling")
    return parser


HELP = """A story is read line by line; a line that ends in ? is answered.
/memory      show which slots the tokens read        /save FILE   save the memory        /help   this
/forget      start with an empty memory              /load FILE   load a memory          Ctrl-D  ends"""


def command(reader, line):
    """Does what a line that begins with / says. Raises ValueError or OSError where that cannot be done."""
    name, path = (*line.split(maxsplit=1), "")[:2]
    if name in ("/save", "/load") and path:
        (reader.save if name == "/save" else reader.load)(path)
        print(f"memory {'saved to' if name == '/save' else 'loaded from'} {path}")
    elif name == "/memory":
        reader.show()
    elif name == "/forget":
        reader.state = None
        print("all forgotten")
    elif name == "/help":
        print(HELP)
    else:
        raise ValueError(f"{line} is no command: /help lists them")


def chat(reader, args):
    """Reads, answers and obeys what is typed, until the input ends."""
    print(HELP)
    while True:
        try:
            line = input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            return print()
        try:
            if line.startswith("/"):
                command(reader, line)
            elif line.endswith("?"):
                reader.respond(line, args)
            elif line:
                reader.read(line)
        except (ValueError, OSError) as e:
            print(e)
        except KeyboardInterrupt:
            print("  (stopped)")


def main(args):
    text = args.start if args.start is not None else "" if args.interactive else STORY
    if text.startswith("FILE:"):
        text = babilong.read_text(text[5:])
    if not text.strip() and not (args.interactive and args.start is None):
        raise ValueError("--start holds no text")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("--start is not text in UTF-8") from None
    for name in "heatmap", "save_memory":  # before the text is read, not after
        if (path := getattr(args, name)) and not Path(path).absolute().parent.is_dir():
            raise ValueError(f"--{name}={path}: there is no such folder")
    torch.manual_seed(args.seed)
    checkpoint = load_checkpoint(args.out_dir)
    model, encoding = load_model(checkpoint, pick_device(args.device))
    banks = [n for n, block in enumerate(model.blocks, start=1) if block.memory is not None]
    if (args.heatmap or args.show_memory) and not banks:
        raise ValueError(f"the model in {args.out_dir} has no memory bank to look at: it was trained with "
                         f"--memory_type={model.config.memory_type}")
    if bad := [n for n in args.heatmap_layer or () if n not in banks]:
        raise ValueError(f"--heatmap_layer={bad[0]}: the blocks with a memory bank are {', '.join(map(str, banks))}")
    look = banks and (args.heatmap or args.show_memory or args.interactive)
    watch = Watch(model, encoding, args.heatmap_layer or [banks[len(banks) // 2]], args.show_memory) if look else None
    reader = Reader(model, encoding, watch, plain=bool(checkpoint["args"].get("data")))
    if args.memory_file:
        reader.load(args.memory_file)
    if text:
        reader.respond(text, args)
    if args.interactive:
        chat(reader, args)
    if args.show_memory:
        reader.show()
    if args.heatmap and reader.state:
        write_file(args.heatmap, heatmap(*reader.watch.look(reader.state)))
        print(f"drawn in {args.heatmap}")
    if args.save_memory:
        reader.save(args.save_memory)
        print(f"memory saved to {args.save_memory}")


if __name__ == "__main__":
    try:
        main(get_parser().parse_args())
    except (ValueError, OSError) as e:
        sys.exit(f"sample.py: error: {e}")
    except KeyboardInterrupt:
        sys.exit(130)
