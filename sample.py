"""
Reads a text of any length segment by segment, carries the memory, and continues it; a question it answers.

$ python sample.py --start="Mary went to the office. John took the milk. Where is Mary?"
$ python sample.py --start=FILE:story.txt --save_memory=story.mem      # read a story today,
$ python sample.py --memory_file=story.mem --start="Where is Mary?"    # ask tomorrow
$ python sample.py --interactive                                       # read what is typed, answer lines that end in ?
"""
import codecs
import hashlib
import os
import sys
from pathlib import Path

import torch

import prepare_babilong as babilong
from prepare_babilong import Parser, number
from train import load_checkpoint, load_model, pick_device

try:
    import readline  # noqa: F401  history and line editing for input(), where the platform has them
except ImportError:
    pass


class Reader:
    """A model and the state of what it has read: the memory, and the tokens since the memory was last written."""

    def __init__(self, model, encoding):
        self.model, self.encoding, self.state = model, encoding, None

    def read(self, text):
        """Reads text, without an answer."""
        # as in training: sentences in one line, each with a space before it. A line break would look like padding
        self._read(self.encoding.encode_ordinary(" " + " ".join(text.split())) if text.strip() else [])

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
        """Yields the continuation, piece by piece as text, up to a token whose text is `stop`."""
        decoder, pieces = codecs.getincrementaldecoder("utf-8")(errors="replace"), []

        def on_token(token):
            piece = decoder.decode(self.encoding.decode_single_token_bytes(token.item()))
            print(piece, end="", flush=True)
            pieces.append(piece)
            return piece == stop

        nothing = torch.zeros(1, 0, dtype=torch.int64, device=self.device)
        _, self.state = self.model.generate(nothing, max_new_tokens, self.state, temperature, top_k, on_token)
        print(decoder.decode(b"", final=True))

    def respond(self, text, args):
        """Reads text; answers its last sentence if that is a question, up to a full stop, else continues it."""
        *before, last = babilong.split_sentences(text)
        self.read(" ".join(before))
        question = last.endswith("?")
        if question:
            self.make_room(len(self.encoding.encode_ordinary(" " + last)) + args.answer_tokens)
        print(last, end="", flush=True)
        self.read(last)
        temperature = args.temperature if args.temperature is not None else 0.0 if question else 0.8
        length, stop = (args.answer_tokens, ".") if question else (args.max_new_tokens, None)
        self.go_on(length, temperature, args.top_k, stop)

    def fingerprint(self):
        """A hash of the weights: a memory means something only to the model that wrote it."""
        digest = hashlib.sha256()
        for weight in self.model.state_dict().values():
            digest.update(weight.cpu().contiguous().view(torch.uint8).numpy())
        return digest.hexdigest()[:16]

    def save(self, path):
        """Writes the state to a file, whole or not at all."""
        memory, tail = self.state or (self.model.initial_memory(1), torch.zeros(1, 0, dtype=torch.int64))
        torch.save({"memory": memory.cpu().contiguous(), "tail": tail.cpu().contiguous(), "model": self.fingerprint()}, f"{path}.tmp")
        os.replace(f"{path}.tmp", path)

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
    parser.add_argument("--start", default="Mary went to the office. John moved to the garden. Where is Mary?",
                        help="the text to read, or FILE:path; a question at its end is answered")
    parser.add_argument("--interactive", action="store_true", help="read the lines that are typed, answer those that end in ?")
    parser.add_argument("--max_new_tokens", type=number(int, 0, 10**9), default=100, help="how far a text is continued")
    parser.add_argument("--answer_tokens", type=number(int, 1, 10**9), default=8, help="how long an answer can get")
    parser.add_argument("--temperature", type=number(float, 0, 100),
                        help="0: always the likeliest token; default: 0 for a question, else 0.8")
    parser.add_argument("--top_k", type=number(int, 0, 10**9), default=50, help="sample from the k likeliest tokens; 0: from all")
    parser.add_argument("--memory_file", metavar="FILE", help="start from a memory saved earlier")
    parser.add_argument("--save_memory", metavar="FILE", help="save the memory at the end")
    parser.add_argument("--device", default="auto", help="cuda, mps, cpu, ...; auto: the best there is")
    parser.add_argument("--seed", type=number(int, 0, 2**63 - 1), default=1337, help="of the sampling")
    return parser


def main(args):
    text = args.start
    if text.startswith("FILE:") and not args.interactive:
        text = babilong.read_text(text[5:])
    if not text.strip() and not args.interactive:
        raise ValueError("--start holds no text")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("--start is not text in UTF-8") from None
    torch.manual_seed(args.seed)
    reader = Reader(*load_model(load_checkpoint(args.out_dir), pick_device(args.device)))
    if args.memory_file:
        reader.load(args.memory_file)
    if not args.interactive:
        reader.respond(text, args)
    else:
        print("Type a story, line by line; a line that ends in ? is answered. Ctrl-D ends.")
        while True:
            try:
                line = input("> ").strip()
            except (EOFError, KeyboardInterrupt):
                print()
                break
            if line.endswith("?"):
                reader.respond(line, args)
            elif line:
                reader.read(line)
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
