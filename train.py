"""
Trains LM2, or a baseline, to answer questions about facts that lie outside its attention window.

$ python train.py --memory_slots=16                       # the main job: prepares data, trains, ends with a table
$ python train.py --memory_type=none --out_dir=out-none   # the same decoder without memory; or --memory_type=rmt
$ python train.py --init_from=resume                      # goes on where out_dir/ckpt.pt stopped
$ python train.py --eval_only --eval_lengths=0k,1k        # the table again, for other lengths, tasks or texts
$ torchrun --standalone --nproc_per_node=4 train.py       # data parallel
$ python train.py --init_from=LLAMA_DIR --freeze_decoder  # grafts a memory onto a Llama, and trains it

Everything lands in out_dir: ckpt.pt, log.jsonl (a line each --log_interval steps), curves.svg and results.json.
"""
import argparse
import json
import math
import os
import random
import signal
import sys
import time
from collections import Counter
from contextlib import nullcontext, suppress
from dataclasses import asdict, fields, replace
from html import escape
from itertools import chain, cycle, product
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

import prepare_babilong as babilong
from model import LM2, LM2Config, llama_config
from prepare_babilong import Parser, number, write_file

# -----------------------------------------------------------------------------
# flags

def several(kind):
    """An argparse type: what is separated by commas, each part of type `kind`, as a list."""
    return lambda text: [kind(part) for part in text.split(",") if part]


def get_parser():
    parser = Parser("Trains LM2, or a baseline, and evaluates it.")
    count, positive, share, switch = number(int, 0, 10**9), number(int, 1, 10**9), number(float, 0, 1), argparse.BooleanOptionalAction
    small, wide = number(int, 1, 1000), number(int, 1, 2**16)
    g = parser.add_argument_group("run")
    g.add_argument("--out_dir", default="out", help="folder for checkpoint, log and results")
    g.add_argument("--init_from", default="scratch", metavar="scratch|resume|DIR", help="start anew, go on from out_dir, or graft the "
                   "memory onto the Llama in this folder (config.json and .safetensors files)")
    g.add_argument("--checkpoint_interval", type=positive, default=200, help="steps between checkpoints")
    g.add_argument("--log_interval", type=positive, default=10, help="steps between log lines")
    g.add_argument("--eval_interval", type=count, default=500, help="steps between short evaluations; 0: none")
    g.add_argument("--device", default="auto", help="cuda, mps, cpu, cuda:1, ...; auto: the best there is")
    g.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float64"), help="auto: bfloat16 on cuda, else float32")
    g.add_argument("--compile", default="auto", choices=("auto", "on", "off"), help="torch.compile; auto: on cuda")
    g.add_argument("--data_workers", type=number(int, 0, 64), help="processes that compose the coming batches meanwhile; default: 4 on cuda, else 0, "
                   "where they would take what the model computes on")
    g = parser.add_argument_group("evaluation")
    g.add_argument("--eval_only", action="store_true", help="do not train: load out_dir and print the table")
    g.add_argument("--eval_lengths", type=several(babilong.length), default="0k", metavar="0k,4k", help="rows of the table: lengths as in BABILong")
    g.add_argument("--eval_segments", type=several(number(int, 1, 10**6)), default="1,2,4,8,16,32", metavar="1,2",
                   help="rows of the table: segments")
    g.add_argument("--eval_samples", type=positive, default=500, help="samples of each task and row; a tenth beyond 8k")
    g.add_argument("--intervention", default="none", choices=("none", "reset", "swap"), help="before the last segment, reset the "
                   "memory or swap it between samples: what is then still right was not answered from memory")
    g.add_argument("--retrieve", type=count, default=0, metavar="K", help="instead of the text, give the K sentences that BM25 ranks "
                   "closest to the question; 0: the text")
    g.add_argument("--results", metavar="FILE", help="where the table goes as JSON; default: results.json in out_dir, or "
                   "results-reset.json, results-retrieve4.json and the like")
    g.add_argument("--babi_dir", help="evaluate on the bAbI files of this folder instead of data_dir's stories")
    g.add_argument("--babilong_dir", help="evaluate on BABILong's published samples, which prepare_babilong.py --source=hub fetches; writes "
                   "predictions.jsonl to out_dir")
    g.add_argument("--background", help="evaluate in these text files or folders, by commas, instead of data_dir's haystack")
    g = parser.add_argument_group("data")
    g.add_argument("--data_dir", default="data/babilong", help="folder of prepare_babilong.py; written with its defaults if missing")
    g.add_argument("--data", metavar="FILE|DIR", help="train on this text, or on the *.txt files of this folder, instead of stories; the last "
                   "tenth of each is held out. data_dir gives the tokenizer")
    g.add_argument("--tasks", default="qa1", help="bAbI tasks, like qa1,qa2, or all")
    g.add_argument("--data_block_size", type=number(int, 0, 2**20), default=0,
                   help="tokens of a segment in curriculum and table, for a window (block_size) of several; 0: block_size")
    g.add_argument("--seed", type=number(int, 0, 2**63 - 1), default=1337, help="of weights and training samples")
    g = parser.add_argument_group("model")
    g.add_argument("--preset", choices=PRESETS, help="the sizes of a published model, where no flag says otherwise")
    g.add_argument("--block_size", type=number(int, 1, 2**20), default=64, help="tokens of a segment, all that self-attention sees")
    g.add_argument("--n_layer", type=small, default=3, help="decoder blocks")
    g.add_argument("--n_head", type=wide, default=4, help="attention heads")
    g.add_argument("--n_kv_head", type=count, default=0, help="key-value heads; 0: n_head")
    g.add_argument("--n_embd", type=wide, default=96, help="width")
    g.add_argument("--memory_type", default="lm2", choices=("lm2", "rmt", "none"), help="the memory, or a baseline")
    g.add_argument("--memory_slots", type=number(int, 0, 2**16), default=16, help="slots of each bank, or memory tokens of RMT; 0: no memory")
    g.add_argument("--n_memory_layers", type=count, default=0, help="blocks with a bank, from the first on; 0: all")
    g.add_argument("--memory_top_k", type=count, default=0, help="a token reads its k best slots; 0: all")
    g.add_argument("--forget_bias", type=number(float, -20, 20), default=0.0, help="of the forget gate, at the start")
    g.add_argument("--tie_embeddings", action=switch, default=False, help="one matrix for embedding and head, as in small Llamas")
    g.add_argument("--qk_norm", action=switch, default=True, help="normalise queries and keys; Llama does not")
    g.add_argument("--token_shift", action=switch, default=True, help="mix in the token before; Llama does not")
    g = parser.add_argument_group("optimization")
    g.add_argument("--max_iters", type=positive, default=2000, help="training steps")
    g.add_argument("--batch_size", type=positive, default=64, help="segments per step: batch_size // S samples of S segments")
    g.add_argument("--gradient_accumulation_steps", type=positive, default=1, help="parts that a step's batch is computed in")
    g.add_argument("--learning_rate", type=number(float, 0, 10), default=2e-3, help="AdamW's, at its peak")
    g.add_argument("--muon_lr", type=number(float, 0, 10), default=0.005,
                   help="Muon's, for the matrices inside the blocks; 0: AdamW for all")
    g.add_argument("--weight_decay", type=number(float, 0, 10), default=0.0, help="of matrices")
    g.add_argument("--beta1", type=number(float, 0, 0.9999), default=0.9, help="AdamW's")
    g.add_argument("--beta2", type=number(float, 0, 0.9999), default=0.98, help="AdamW's")
    g.add_argument("--grad_clip", type=number(float, 0, 1e9), default=1.0, help="largest norm of the gradient; 0: no limit")
    g.add_argument("--warmup_iters", type=count, default=50, help="steps until the learning rate is at its peak")
    g.add_argument("--decay_share", type=share, default=0.4, help="share of the steps, at the end, in which it falls to zero")
    g.add_argument("--answer_weight", type=number(float, 0, 1e6), default=5.0,
                   help="of the answers' loss, beside the language model's 1")
    g.add_argument("--freeze_decoder", action=switch, default=False, help="train the memory alone")
    g = parser.add_argument_group("curriculum")
    g.add_argument("--curriculum", type=several(positive), default="1,2,3,4,6,8,12,16", help="most segments of a sample, stage by stage")
    g.add_argument("--stage_accuracy", type=share, default=0.94, help="running accuracy that ends a stage")
    g.add_argument("--stage_iters", type=count, default=0, help="steps that end a stage at the latest; 0: no limit")
    g.add_argument("--bptt_segments", type=count, default=0, help="cut the gradient after so many segments; 0: never")
    g.add_argument("--checkpoint_segments", action=switch, default=False,
                   help="compute every segment twice rather than keep what the backward pass needs of all")
    return parser


# the paper's own; LM2Config has the meaning of the names that are no flags
PRESETS = {"lm2-1.7b": {"block_size": 2048, "n_layer": 16, "n_head": 32, "n_kv_head": 8, "n_embd": 2048, "intermediate_size": 8192,
                        "memory_slots": 2048, "tie_embeddings": True, "qk_norm": False, "token_shift": False}}


def kept_flags():
    """The names of the flags that a checkpoint remembers."""
    groups = ("data", "model", "optimization", "curriculum")
    return [action.dest for group in get_parser()._action_groups if group.title in groups for action in group._group_actions]


def parse_args(argv=None):
    """
    The flags, and the checkpoint of out_dir where they ask for one (else None); what is not on the command line then
    comes from the checkpoint. Ends with exit code 2 and one line for flags that cannot work.
    """
    parser = get_parser()
    args, checkpoint = parser.parse_args(argv), None
    try:
        fixed, source = {}, f"the checkpoint in {args.out_dir}"  # what flags cannot change any more
        if args.eval_only or args.init_from == "resume":
            checkpoint = load_checkpoint(args.out_dir)
            fixed = {name: value for name, value in checkpoint["config"].items() if name != "vocab_size"}
            parser.set_defaults(**checkpoint["args"])
        elif args.init_from != "scratch":
            fixed, source = llama_config(Path(args.init_from, "config.json")), args.init_from
            del fixed["vocab_size"]
            fixed.update(qk_norm=False, token_shift=False, memory_gain=True)
        elif args.preset:
            parser.set_defaults(**PRESETS[args.preset])
        parser.set_defaults(**fixed)
        args = parser.parse_args(argv)
        config = model_config(args, vocab_size=1)
        for name, value in fixed.items():
            if (here := getattr(config, name, None)) != value:
                raise ValueError(f"--{name}={here}, but {source} has {value}")
        if args.preset and fixed and not checkpoint:
            raise ValueError(f"--preset={args.preset} is for a new model, but {source} has its own sizes")
        args.tasks = [] if args.data else babilong.parse_tasks(args.tasks) if isinstance(args.tasks, str) else args.tasks
        if args.data and (args.intervention != "none" or args.retrieve or args.babi_dir or args.background or args.babilong_dir):
            raise ValueError("--data is text without questions: --intervention, --retrieve, --babi_dir, --babilong_dir and --background do not "
                             "go with it")
        if args.babilong_dir and (args.babi_dir or args.background):
            raise ValueError("--babilong_dir holds whole samples: --babi_dir and --background do not go with it")
        if not args.curriculum:
            raise ValueError("--curriculum must name at least one number of segments")
        if checkpoint and len(args.curriculum) < checkpoint["stage"]:
            raise ValueError(f"--curriculum has {len(args.curriculum)} stages, but the checkpoint is in stage {checkpoint['stage']}")
        if args.results and not Path(args.results).absolute().parent.is_dir():
            raise ValueError(f"--results={args.results}: there is no such folder")
        share = args.gradient_accumulation_steps * int(os.environ.get("WORLD_SIZE", 1))
        if not args.eval_only and args.batch_size < max(args.curriculum) * share:
            raise ValueError(f"--batch_size must be at least {max(args.curriculum) * share}: the curriculum's most segments, times "
                             "gradient_accumulation_steps, times processes")
        if args.intervention != "none" and (args.memory_slots == 0 or args.memory_type == "none" or args.eval_samples < 2):
            raise ValueError("--intervention needs a model with memory and --eval_samples of at least 2")
        if args.freeze_decoder and config.memory_type == "none":
            raise ValueError("--freeze_decoder leaves nothing to train in a model without memory")
        if args.data:
            args.answer_weight = 0.0
        if args.intervention != "none" and args.retrieve:
            raise ValueError("--intervention and --retrieve do not go together: what is retrieved fits one segment")
    except ValueError as e:
        parser.error(str(e))
    return args, checkpoint


def model_config(args, vocab_size):
    named = {f.name: getattr(args, f.name) for f in fields(LM2Config) if hasattr(args, f.name)}
    return LM2Config(**named, vocab_size=vocab_size)


# -----------------------------------------------------------------------------
# checkpoints

FORMAT = 1  # of the checkpoints
PARTS = {"model": dict, "config": dict, "iter_num": int, "stage": int, "began": int, "running": float, "optimizers": list,
         "rng": torch.Tensor, "args": dict, "tokenizer": str, "data": str, "log_size": int}


def save_checkpoint(out_dir, checkpoint):
    """
    Writes out_dir/ckpt.pt; the one before becomes ckpt.previous.pt. A kill at any moment leaves a whole ckpt.pt, the old one
    or the new one. Raises OSError, and leaves the old one, if the disk is full or the like.
    """
    path, new, previous = (Path(out_dir, name) for name in ("ckpt.pt", "ckpt.pt.tmp", "ckpt.previous.pt"))
    try:
        with open(new, "wb") as f:
            torch.save({"format": FORMAT, **checkpoint}, f)
            f.flush()
            os.fsync(f.fileno())
    except (OSError, RuntimeError) as e:  # torch.save has its own error for a full disk
        new.unlink(missing_ok=True)
        raise OSError(f"{path} cannot be written ({str(e).splitlines()[0]}); the checkpoint before it is kept") from None
    if path.exists():
        previous.unlink(missing_ok=True)
        with suppress(OSError):  # not every file system has links
            os.link(path, previous)
    os.replace(new, path)


def load_checkpoint(out_dir):
    """The dict of out_dir/ckpt.pt, on the CPU. Raises ValueError where there is none that can be used."""
    path, previous = Path(out_dir, "ckpt.pt"), Path(out_dir, "ckpt.previous.pt")
    if not path.exists():
        raise ValueError(f"there is no checkpoint {path}: train first, or name another --out_dir")
    advice = f". The one before it is {previous}: copy it to {path} to go on from there" if previous.exists() else ""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        version = checkpoint.get("format") if isinstance(checkpoint, dict) else None
        bad = [name for name, kind in PARTS.items() if not isinstance(checkpoint.get(name), kind)] if version == FORMAT else []
    except Exception as e:  # torch.load raises many kinds for a file that is damaged or not its own
        raise ValueError(f"{path} is not a checkpoint of train.py, or damaged ({type(e).__name__}){advice}") from None
    if version != FORMAT:
        raise ValueError(f"{path} is not a checkpoint of train.py, or one of another version (format {version}, not {FORMAT}){advice}")
    if bad:
        raise ValueError(f"{path} is not a checkpoint of train.py: it lacks {', '.join(bad)}{advice}")
    return checkpoint


def load_model(checkpoint, device):
    """(model, encoding) of a checkpoint. Raises ValueError if its parts do not fit each other."""
    try:
        model = LM2(LM2Config(**checkpoint["config"]))
        model.load_state_dict(checkpoint["model"])
    except (TypeError, ValueError, RuntimeError) as e:
        raise ValueError(f"the checkpoint's model does not fit its config: {str(e).splitlines()[0]}") from None
    return model.to(device).eval(), babilong.parse_tokenizer(checkpoint["tokenizer"])


def check_size(config, device):
    """Raises ValueError for a model that, with gradients and two moments a weight, is larger than the device's memory."""
    with torch.device("meta"):
        model = LM2(config)
    need = sum(16 * p.numel() for p in model.parameters()) + sum(4 * b.numel() for b in model.buffers())
    have = torch.cuda.mem_get_info(device)[1] if device.type == "cuda" else math.inf
    if device.type != "cuda" and hasattr(os, "sysconf"):  # not on Windows
        have = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if need > have:
        raise ValueError(f"the model, {size_of(model)}, needs {need / 2**30:.0f} GiB and {device} has {have / 2**30:.0f}: lower --n_embd, "
                         "--n_layer or --block_size")


def size_of(model):
    return f"{model.num_params():,} parameters ({model.num_params(memory=False):,} without memory)"


def pick_device(name):
    """A torch.device from --device. Raises ValueError where it does not exist or does not work."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.zeros(1, device=name)
        return torch.device(name)
    except (RuntimeError, AssertionError) as e:
        raise ValueError(f"--device={name} cannot be used here: {str(e).splitlines()[0]}") from None


# -----------------------------------------------------------------------------
# evaluation

def evaluate(model, data, task, seed, n, intervention="none", retrieve=0, rank=0, world=1, predictions=None, **size):
    """
    Answers n evaluation samples of `task`, greedily, and scores them. size: segments=4 or length="4k". Each of
    `world` processes takes every world-th sample. Returns the row for results.json; each answer is appended to predictions.
    """
    device, rows, told = model.embed.weight.device, [], []
    share = range(rank, n, world)
    tokens = len(data.sample(task, seed, 0, **size).tokens)
    most = max(1, min(2**15 // model.config.block_size, 2**25 // tokens))  # at once: bounds what a segment, and all texts, take
    for chunk in np.array_split(share, max(1, -(-len(share) // most))):
        groups = {}  # only prompts of one length share a batch
        for i in chunk:
            sample = data.sample(task, seed, int(i), **size)
            prompt = data.retrieve(sample, retrieve) if retrieve else sample.tokens[: sample.prompt]
            groups.setdefault(len(prompt), []).append((sample, prompt))
        for group in groups.values():
            samples, prompts = zip(*group)
            idx = torch.from_numpy(np.stack(prompts)).to(device)
            _, state = model.generate(idx, 0)
            if intervention == "reset":
                state = model.initial_memory(len(samples)), state[1]
            if intervention == "swap":
                state = state[0].roll(1, dims=1), state[1]
            out, _ = model.generate(idx[:, :0], data.room[task], state, temperature=0)
            for s, answer in zip(samples, out.tolist()):
                last_segment, output = len(s.tokens) - data.block_size, data.encoding.decode(answer)
                rows.append((babilong.score(task, s.question, s.target, output),
                             bool(s.facts) and all(s.facts[i][1] <= last_segment for i in s.support),  # outside the window
                             bool(s.facts) and max(s.facts) not in s.support,  # something else happened since
                             len(s.tokens)))
                told.append({"task": task, **size, "question": s.question, "target": s.target, "output": output,
                             "right": bool(rows[-1][0])})
    if world > 1:
        gathered = [None] * world
        dist.all_gather_object(gathered, (rows, told))
        rows, told = (sum(part, []) for part in zip(*gathered))
    if predictions is not None:
        predictions += told
    right, outside, earlier, tokens = np.array(rows).T
    row = {"task": task, "length": size.get("length"), "segments": size.get("segments"), "tokens": round(float(tokens.mean())),
           "intervention": intervention, "retrieve": retrieve}
    for kind, which in (("", right >= 0), ("_outside", outside == 1), ("_earlier", earlier == 1)):
        correct, of = int(right[which].sum()), int(which.sum())
        low, high = wilson(correct, of)
        values = {"n": of, "correct": correct, "accuracy": round(100 * correct / of, 1) if of else None, "low": low, "high": high}
        row.update((name + kind, value) for name, value in values.items())
    return row


def wilson(correct, n, z=1.96):
    """95 % interval of a proportion, in percent; all there is if n = 0."""
    p, d = correct / max(1, n), n + z * z
    centre, half = (n * p + z * z / 2) / d, z / d * math.sqrt(n * p * (1 - p) + z * z / 4)
    return round(100 * max(0, centre - half), 1), round(100 * min(1, centre + half), 1)


def guess(training, data, task, n=2000):
    """
    The accuracies, in percent, of two that never read the story: one gives the commonest answer of `task`, the other the
    commonest answer to the question's words. They learn from n training stories and are asked about n of data's.
    """
    rng, counts = random.Random(task), {}
    learn, ask = ([source.story(task, rng)[-1] for _ in range(n)] for source in (training, data))
    for line in learn:
        for words in ("", line.text):
            counts.setdefault(words, Counter())[line.answer] += 1
    best = {words: counter.most_common(1)[0][0] for words, counter in counts.items()}
    right = [[best[""] == line.answer, best.get(line.text, best[""]) == line.answer] for line in ask]
    majority, question_only = (100 * np.mean(right, axis=0)).round(1).tolist()
    return {"task": task, "majority": majority, "question_only": question_only}


@torch.no_grad()
def perplexity(model, data, segments):
    """exp of the mean loss over data's own text, each document cut into texts of so many segments; and how many tokens they have."""
    size = segments * data.block_size
    tokens = np.concatenate([document[: len(document) // size * size] for document in data.documents]).reshape(-1, size)
    if not len(tokens):
        return None
    tokens = torch.from_numpy(tokens).to(model.embed.weight.device)
    targets = tokens.roll(-1, dims=1)
    targets[:, -1] = -1
    losses = [model.unroll(i, t)[1].item() * len(i) for i, t in zip(tokens.split(16), targets.split(16))]
    return {"segments": segments, "perplexity": round(math.exp(sum(losses) / len(tokens)), 3), "tokens": tokens.numel()}


def average(rows, kind=""):
    """Mean accuracy over rows of several tasks and its 95 % interval, from theirs (squared distances add up)."""
    rows = [r for r in rows if r[f"n{kind}"]]
    mean = sum(r[f"accuracy{kind}"] for r in rows) / max(1, len(rows))
    low, high = (math.hypot(*(r[f"accuracy{kind}"] - r[end + kind] for r in rows)) / max(1, len(rows)) for end in ("low", "high"))
    return mean, mean - low, mean + high


def print_table(rows, guesses):
    """The layout of the paper's Table 1: tasks across, lengths down, the average last."""
    tasks, sizes = [g["task"] for g in guesses], {}
    for r in rows:
        sizes.setdefault(r["length"] or f"{r['segments']} seg.", []).append(r)
    print(f"\n{'accuracy in %':<15}{'tokens':>8} {'n':>6} " + "".join(f"{t:>7}" for t in tasks) + "  average  95% interval")
    for name in ("majority", "question_only"):
        values = [g[name] for g in guesses]
        print(f"{name.replace('_', ' '):<31}" + "".join(f"{v:7.1f}" for v in values) + f"  {sum(values) / len(values):7.1f}")
    for kind, title in (("", ""), ("_outside", "no fact that the answer rests on lies in the last segment:"),
                        ("_earlier", "something else has happened since:")):
        if title:
            print(title)
        for name, row in sizes.items():
            if any(r[f"n{kind}"] for r in row):
                cells = ["-" if r[f"accuracy{kind}"] is None else f"{r[f'accuracy{kind}']:.1f}" for r in row]
                mean, low, high = average(row, kind)
                print(f"{name:<15}{round(np.mean([r['tokens'] for r in row])):8d} {sum(r[f'n{kind}'] for r in row):6d} "
                      + "".join(f"{cell:>7}" for cell in cells) + f"  {mean:7.1f}  {low:5.1f} - {high:5.1f}")


# -----------------------------------------------------------------------------
# pictures

# colours that are told apart with any kind of sight, on white and on black; further lines are dashed
STROKES = [f'stroke="{colour}"{dash}' for dash in ("", ' stroke-dasharray="5 3"')
           for colour in "#2b8cd6 #d55e00 #009e73 #cc79a7 #e69f00 #56b4e9 #808080 #9457c9".split()]
STYLE = """svg{background:#fff;color:#1f2328;--ink:#0550ae;font:12px ui-monospace,Menlo,Consolas,monospace;width:100%;max-width:800px}
@media(prefers-color-scheme:dark){svg{background:#0d1117;color:#e6edf3;--ink:#79c0ff}}
text{fill:currentColor;stroke:none}.small{font-size:10px}.grid{stroke:currentColor;stroke-opacity:.15}.line{fill:none;stroke-width:1.6}
.a0{fill:var(--ink);fill-opacity:.05}""" + "".join(f".a{i}{{stroke:var(--ink);stroke-opacity:{o}}}" for i, o in enumerate(
    (0.16, 0.3, 0.45, 0.62, 0.8, 1), start=1))


def svg(width, height, title, body):
    """A self-contained picture, in light and dark, of lines of SVG."""
    return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img"><title>{escape(title)}</title>\n'
            f"<style>{STYLE}</style>\n{body}\n</svg>\n")


def chart(title, series, top=0, low=0.0, ticks=None):
    """
    A panel 480 wide, `top` from the top, as lines of SVG, and where it ends. series: {name: points}, each (x, y) or, with a
    range, (x, y, lowest, highest); low: where the y axis begins, None: with the data; ticks: {x: text}, default: round numbers.
    """
    points = list(chain(*series.values()))
    right, ys = max(1, *(point[0] for point in points)), [y for point in points for y in point[1:]]
    low = min(ys) if low is None else low
    high = max(ys) if max(ys) > low else low + 1
    body, across, down = [f'<text x="8" y="{top + 16}" font-weight="bold">{escape(title)}</text>'], 8, top + 34
    for stroke, name in zip(cycle(STROKES), series):
        wide = 40 + 7.3 * len(name)
        if across + wide > 480:
            across, down = 8, down + 18
        body.append(f'<path class="line" {stroke} d="M{across:.0f} {down - 4}h20"/><text x="{across + 25:.0f}" y="{down}">{escape(name)}</text>')
        across += wide
    down += 14

    def place(x, y):
        return f"{56 + 392 * x / right:.1f} {down + 110 * (high - y) / (high - low):.1f}"

    for y in round_numbers(low, high):
        body.append(f'<path class="grid" d="M{place(0, y)}h392"/><text x="50" y="{place(0, y).split()[1]}" dy="4" text-anchor="end">{y:g}</text>')
    for x, text in (ticks or {x: f"{x:g}" for x in round_numbers(0, right)}).items():
        body.append(f'<text x="{place(x, low).split()[0]}" y="{down + 128}" text-anchor="middle">{escape(text)}</text>')
    for stroke, line in zip(cycle(STROKES), series.values()):
        path = "L".join(place(*point[:2]) for point in line)
        path += "".join(f"M{place(x, lowest)}L{place(x, highest)}" for x, _, lowest, highest in (p for p in line if len(p) == 4))
        body.append(f'<path class="line" {stroke} d="M{path}"/>')
    return "\n".join(body) + "\n", down + 144


def round_numbers(low, high):
    """Up to six of them, from low to high."""
    step = 10 ** math.floor(math.log10((high - low) / 2.5))
    step *= next(m for m in (1, 2, 5, 10) if (high - low) / (m * step) <= 5)
    return [round(i * step, 12) for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def draw_curves(out_dir, *entries):
    """Writes out_dir/curves.svg from log.jsonl and further entries like its own."""
    entries = [*map(json.loads, Path(out_dir, "log.jsonl").read_text().splitlines()), *entries]
    steps, accuracies = [e for e in entries if "loss" in e], {}
    for e in entries:
        for segments in sorted({r["segments"] for r in e.get("eval", ()) if r["segments"]}):
            accuracy = np.mean([r["accuracy"] for r in e["eval"] if r["segments"] == segments])
            accuracies.setdefault(f"{segments} seg.", []).append((e["iter"], accuracy))
    charts = {"accuracy in %, held out": accuracies} if accuracies else {}
    if fluency := [(e["iter"], e["perplexity"]) for e in entries if e.get("perplexity")]:
        charts["perplexity of held-out text"] = {"by step": fluency}
    for title, name in ("training loss", "loss"), ("learning rate of AdamW", "lr"), ("stage of the curriculum", "stage"):
        charts[title] = {"by step": [(e["iter"], e[name]) for e in steps]}
    body, top = "", 0
    for title, series in charts.items() if steps else ():
        part, top = chart(title, series, top)
        body += part
    write_file(Path(out_dir, "curves.svg"), svg(480, top, "learning curves", body))


# -----------------------------------------------------------------------------
# training

class Unroll(nn.Module):
    """What DistributedDataParallel wraps: its forward is a model's unroll."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, *args, **kwargs):
        return self.model.unroll(*args, **kwargs)


class Batches(Dataset):
    """
    batches[it, segments, noise] is that key, and this process's share of the samples of step `it`: idx and targets (B, S*T)
    int64, targets -1 where the next token is padding; answer and first (B, S*T) bool: the targets that belong to an answer,
    and the first ones of each.
    """

    def __init__(self, data, args, rank, world):
        self.data, self.batch_size, self.tasks, self.seed = data, args.batch_size, args.tasks, args.seed
        self.rank, self.world = rank, world

    def __getitem__(self, key):
        it, segments, noise = key
        B = self.batch_size // segments
        tasks = self.tasks or [None]
        samples = [self.data.sample(tasks[(it * B + i) % len(tasks)], self.seed, f"{it}.{i}", segments=segments,
                                    dense=True, noise=noise) for i in range(self.rank, B, self.world)]
        idx = np.stack([s.tokens for s in samples])
        targets = np.roll(idx, -1, axis=1)
        targets[:, -1] = -1
        targets[targets == self.data.newline] = -1
        answer, first = np.zeros(idx.shape, dtype=bool), np.zeros(idx.shape, dtype=bool)
        for row, sample in enumerate(samples):
            if not sample.answers:  # plain text, perhaps shorter than the sample
                targets[row, sample.prompt - 1 :] = -1
            for start, end in sample.answers:
                answer[row, start - 1 : end - 1] = first[row, start - 1] = True
        return key, tuple(map(torch.from_numpy, (idx, targets, answer, first)))


def culprit(model):
    """Which parameter is not finite or, if all are, has a gradient that is not: the last one, where a backward pass begins."""
    named = list(model.named_parameters())
    bad = [name for name, p in named if not p.isfinite().all()]
    bad += [f"the gradient of {name}" for name, p in reversed(named) if p.grad is not None and not p.grad.isfinite().all()]
    return bad[0] if bad else "no single parameter"


def train(args, checkpoint, model, data, meta, device, amp, rank, world):
    """The loop. Returns True if it came to its end, False if a signal stopped it (with a checkpoint written)."""
    out, master = Path(args.out_dir), rank == 0
    training, held_out = data
    optimizers = model.configure_optimizers(args.weight_decay, args.learning_rate, (args.beta1, args.beta2), args.muon_lr)
    peaks = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]
    # the curriculum: stage 0 is one segment without a haystack, stage i at most curriculum[i - 1] segments
    stages, began, running, it = [1] + args.curriculum, 0, 0.0, 0
    stage = len(stages) - 1 if args.data else 0  # text has no answers that could tell when to go on
    if checkpoint:
        try:
            for optimizer, state in zip(optimizers, checkpoint["optimizers"], strict=True):
                optimizer.load_state_dict(state)
        except (ValueError, KeyError, TypeError) as e:
            raise ValueError(f"the checkpoint's optimizers are not these ({e}): --muon_lr cannot become zero, or more than "
                             "zero") from None
        stage, began, running, it = (checkpoint[name] for name in ("stage", "began", "running", "iter_num"))
        torch.set_rng_state(checkpoint["rng"])
    log = None
    if master:
        path = out / "log.jsonl"  # without what was logged since the checkpoint; a new file, for whoever reads it meanwhile
        write_file(path, path.read_bytes()[:checkpoint["log_size"]] if checkpoint and path.exists() else "")
        log = open(path, "a", buffering=1)  # a line at a time
    for block in model.blocks:
        if block.memory is not None:  # in proportion to the loss, a mean over the step
            block.memory.pull = 0.1 / (args.batch_size * len(block.memory.chunks))
    network = Unroll(model)
    if world > 1:  # batches of one segment leave the memory's write without gradient
        network = DistributedDataParallel(network, find_unused_parameters=True, broadcast_buffers=False)
    stopped = []
    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, lambda number, _: stopped.append(number))

    def save():
        os.fsync(log.fileno())  # what log_size counts shall be there after a power cut, too
        save_checkpoint(out, {
            "model": model.state_dict(), "config": asdict(model.config), "iter_num": it, "stage": stage, "began": began,
            "running": running, "optimizers": [optimizer.state_dict() for optimizer in optimizers], "rng": torch.get_rng_state(),
            "args": {name: getattr(args, name) for name in kept_flags()},
            "tokenizer": babilong.dump_tokenizer(training.encoding), "data": meta["hash"], "log_size": log.tell()})

    def report(**entry):
        log.write(json.dumps({"iter": it, **entry}) + "\n")

    def total(*values):  # over all processes
        values = torch.tensor(values, dtype=torch.float64)
        if world > 1:
            values = values.to(device)
            dist.all_reduce(values)
        return values.tolist()

    def shape(step):
        """What the batch of a step is like, if the stage is then what it is now: (step, segments, noise)."""
        # half of the batches are as long as the stage allows, the others shorter; one in five has no haystack
        rng, most = random.Random(f"{args.seed}/{step}"), stages[stage]
        return step, most if rng.random() < 0.5 else rng.randint(1, most), stage > 0 and rng.random() < 0.8

    batches = Batches(training, args, rank, world)
    workers = args.data_workers if args.data_workers is not None else 4 if device.type == "cuda" else 0
    ahead = iter(DataLoader(batches, batch_size=None, sampler=map(shape, range(it, args.max_iters)), num_workers=workers,
                            generator=torch.Generator()))  # its own, so that a resumed run finds torch's where it was
    if master and not checkpoint:
        save()  # so that there is something to resume from the first step on
    bar = tqdm(total=args.max_iters, initial=it, unit="step", disable=None if master else True)  # None: only on a terminal
    clock, seen, stop = time.perf_counter(), 0, False
    while it < args.max_iters:
        key, batch = next(ahead)
        if key != shape(it):  # composed before the stage changed
            key, batch = batches[shape(it)]
        _, segments, noise = key
        n_targets, n_answers, n_first = total((batch[1] != -1).sum(), batch[2].sum(), batch[3].sum())

        schedule = min(1, (it + 1) / max(1, args.warmup_iters), (args.max_iters - it) / max(1e-9, args.decay_share * args.max_iters))
        for optimizer, peak in zip(optimizers, peaks):
            for group, lr in zip(optimizer.param_groups, peak):
                group["lr"] = lr * schedule

        model.train()
        losses = right = 0.0
        parts = [part.tensor_split(args.gradient_accumulation_steps) for part in batch]
        for i, (idx, targets, answer, first) in enumerate(zip(*[[p.to(device) for p in part] for part in parts])):
            # mean over all targets + answer_weight * mean over the answers', the means taken over the whole step
            weights = ((targets != -1) / n_targets + args.answer_weight * answer / max(1, n_answers)) / (1 + args.answer_weight)
            last = i == args.gradient_accumulation_steps - 1
            with network.no_sync() if world > 1 and not last else nullcontext():
                with amp:
                    logits, loss, _ = network(idx, targets, weights=weights, bptt_segments=args.bptt_segments,
                                              checkpoint_segments=args.checkpoint_segments, logits_at=first)
                loss = loss * weights.sum()
                loss.backward()
            losses += loss.item()
            right += (logits.argmax(-1) == targets[first]).sum().item()
        if world > 1:  # DistributedDataParallel averages over the processes what is a sum
            for p in model.parameters():
                if p.grad is not None:
                    p.grad *= world
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.grad_clip or math.inf).item()
        losses, right = total(losses, right)
        accuracy = right / max(1, n_first)
        if not math.isfinite(losses + norm):
            raise ValueError(f"at step {it} (samples {args.seed}/{it}) the loss is {losses} and the gradient's norm {norm}, first "
                             f"in {culprit(model)}: lower the learning rates. The last checkpoint is kept")
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        it += 1
        seen += batch[0].numel() * world

        if segments == stages[stage] and (noise or stage == 0):
            running += 0.1 * (accuracy - running)
        late = args.stage_iters and it - began >= args.stage_iters
        if (running > args.stage_accuracy or late) and stage < len(stages) - 1:
            stage, began, running = stage + 1, it, 0.0
            if master:
                bar.write(f"step {it:5d}: stage {stage} of {len(stages) - 1}, samples of up to {stages[stage]} segments")
        stop = total(len(stopped))[0] > 0
        if master:
            bar.update()
            if it % args.log_interval == 0:
                seconds = time.perf_counter() - clock
                lr, ms, speed = args.learning_rate * schedule, 1000 * seconds / args.log_interval, seen / seconds
                report(loss=losses, accuracy=accuracy, segments=segments, stage=stage, running=running, lr=lr, norm=norm, ms=ms,
                       tokens_per_second=speed)
                bar.write(f"step {it:5d} | segments {segments:2d} of {stages[stage]:2d} | loss {losses:6.3f} | "
                          f"answers {100 * accuracy:5.1f} % | lr {lr:.1e} | norm {norm:5.2f} | {ms:5.0f} ms | {speed:6.0f} tok/s")
                clock, seen = time.perf_counter(), 0
        if args.eval_interval and it % args.eval_interval == 0 and it < args.max_iters:
            model.eval()
            rows = [evaluate(model, held_out, task, meta["seed"], 100, rank=rank, world=world, segments=s)
                    for task in args.tasks for s in sorted({1, *args.curriculum})]
            text = perplexity(model, held_out, max(args.curriculum)) if args.data else None  # None, too, if no document is so long
            if master and (rows or text):
                report(**({"perplexity": text["perplexity"]} if text else {"eval": rows}))
                draw_curves(out)
                found = [f"{r['task']} {r['segments']} seg. {r['accuracy']:.0f} %" for r in rows]
                bar.write(f"step {it:5d}: " + (f"perplexity {text['perplexity']}" if text else ", ".join(found)))
        if master and (it % args.checkpoint_interval == 0 or it == args.max_iters or stop):
            save()
        if stop:
            break
    bar.close()
    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, signal.SIG_DFL)
    return not stop


def main(args, checkpoint):
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # set by torchrun
    if world > 1 and args.device in ("auto", "cuda") and torch.cuda.is_available():
        args.device = f"cuda:{os.environ['LOCAL_RANK']}"
    device = pick_device(args.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if world > 1:
        # imported later, by DistributedDataParallel, it keeps the group's threads beyond the group, and a process can abort at its end
        from torch import _dynamo  # noqa: F401
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    torch.set_float32_matmul_precision("high")
    bfloat16 = args.dtype == "bfloat16" or (args.dtype == "auto" and device.type == "cuda")
    amp = torch.autocast(device.type, dtype=torch.bfloat16) if bfloat16 else nullcontext()

    for my_turn in rank == 0, os.environ.get("LOCAL_RANK", "0") == "0":  # once; then on every machine that has another disk
        if my_turn and not Path(args.data_dir, "meta.json").exists():
            print(f"preparing the data in {args.data_dir}")
            babilong.write_data(args.data_dir)
        if world > 1:
            dist.barrier()
    training, held_out, meta = babilong.load_data(args.data_dir, args.data_block_size or args.block_size)
    if world > 1:
        hashes = [None] * world
        dist.all_gather_object(hashes, meta["hash"])
        if set(hashes) != {meta["hash"]}:
            raise ValueError(f"the processes have different data in {args.data_dir} ({', '.join(sorted(set(hashes)))}): copy one "
                             "to all machines")
    evaluated, predictions = held_out, []
    if args.babilong_dir:
        evaluated = babilong.Published(held_out, args.babilong_dir)
        for task, length in product(args.tasks, args.eval_lengths):
            evaluated.read(task, length)  # before the training, so that a mistake in them shows at once
    elif args.data:
        texts = babilong.read_documents(args.data)
        training, held_out = (babilong.Documents(training.encoding, texts, args.block_size, share) for share in ((0, 0.9), (0.9, 1)))
        evaluated, meta = held_out, {"hash": training.digest(), "seed": 0, "tasks": ""}
    elif args.babi_dir or args.background:
        stories = {task: babilong.find_babi(args.babi_dir, task) for task in args.tasks} if args.babi_dir else held_out.stories
        sentences = babilong.read_background(args.background.split(",")) if args.background else held_out.sentences
        evaluated = babilong.Babilong(training.encoding, stories, sentences, training.block_size)
    if missing := [task for task in args.tasks if task not in meta["tasks"].split(",")]:
        raise ValueError(f"{args.data_dir} holds no {missing[0]}: prepare it with --tasks={','.join(args.tasks)}")
    torch.manual_seed(args.seed)
    if checkpoint:
        model, encoding = load_model(checkpoint, device)
        if babilong.dump_tokenizer(encoding) != babilong.dump_tokenizer(training.encoding):
            raise ValueError(f"{args.data_dir} has another tokenizer than the checkpoint in {args.out_dir}: name the right one")
        if not args.eval_only and checkpoint["data"] != meta["hash"]:
            raise ValueError(f"{args.data_dir} has changed since the checkpoint in {args.out_dir}: its hash was {checkpoint['data']}")
    else:
        config = model_config(args, training.encoding.n_vocab)
        if args.preset and rank == 0:
            with torch.device("meta"):
                size = size_of(LM2(replace(config, vocab_size=128256)))
            print(f"{args.preset} with the vocabulary of Llama 3: {size}; the paper says 1.7 B (1.2 B)")
        check_size(config, device)
        model = LM2(config) if args.init_from == "scratch" else LM2.from_llama(args.init_from, **asdict(config))
        model.to(device)
    if args.freeze_decoder:
        for name, weight in model.named_parameters():
            weight.requires_grad_("memory" in name)
    if args.dtype == "float64":
        model.double()
    if args.compile == "on" or (args.compile == "auto" and device.type == "cuda"):
        model.compile()  # in place: checkpoints keep their names

    if not args.eval_only:
        if rank == 0:
            out = Path(args.out_dir)
            out.mkdir(parents=True, exist_ok=True)
            if not checkpoint and (out / "ckpt.pt").exists():
                os.replace(out / "ckpt.pt", out / "ckpt.old.pt")
                (out / "ckpt.previous.pt").unlink(missing_ok=True)
                print(f"{out} holds an earlier run; its checkpoint is now {out}/ckpt.old.pt")
            c = model.config
            print(f"{size_of(model)}, memory {c.memory_type} with {c.memory_slots} slots, segments of {c.block_size} tokens, {device}, "
                  f"data {meta['hash']}")
        if not train(args, checkpoint, model, (training, held_out), meta, device, amp, rank, world):
            if rank == 0:
                print(f"stopped; go on with: python train.py --init_from=resume --out_dir={args.out_dir}")
            return 130

    model.eval()
    sizes = [{"length": length} for length in args.eval_lengths]
    sizes += [{"segments": s} for s in args.eval_segments if not args.babilong_dir]
    long, rows = babilong.parse_length("8k"), []
    for task in args.tasks:
        for size in tqdm(sizes, desc=f"evaluating {task}", unit="row", leave=False, disable=None if rank == 0 else True):
            n = args.eval_samples if babilong.parse_length(size.get("length", "0k")) <= long else -(-args.eval_samples // 10)
            if args.babilong_dir:
                n = min(args.eval_samples, len(evaluated.read(task, size["length"])))
            rows.append(evaluate(model, evaluated, task, meta["seed"], n, args.intervention, args.retrieve, rank, world, predictions,
                                 **size))
    if rank == 0:
        iter_num = checkpoint["iter_num"] if args.eval_only else args.max_iters
        config = {**vars(args), "parameters": model.num_params(), "iter_num": iter_num, "data_hash": evaluated.digest()}
        guesses = [guess(training, held_out if args.babilong_dir else evaluated, task) for task in args.tasks]
        fluency = [f for s in (args.eval_segments if args.data else [max(args.curriculum)]) if (f := perplexity(model, evaluated, s))]
        if rows:
            print_table(rows, guesses)
        for f in fluency:
            print(f"perplexity of held-out text, {f['segments']} segments at a time: {f['perplexity']} ({f['tokens']} tokens)")
        how = f"-{args.intervention}" * (args.intervention != "none") + f"-retrieve{args.retrieve}" * (args.retrieve > 0)
        path = args.results or Path(args.out_dir, f"results{how}.json")
        write_file(path, json.dumps({"config": config, "results": rows, "guesses": guesses,
                                     "perplexity": fluency[-1] if fluency else None, "perplexities": fluency}, indent=1))
        if not args.eval_only:
            draw_curves(args.out_dir, {"iter": iter_num, "eval": rows})
        if args.babilong_dir:
            write_file(Path(args.out_dir, "predictions.jsonl"), "".join(json.dumps(p) + "\n" for p in predictions))
        print(f"written to {path}")
    if world > 1:
        dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(*parse_args()))
    except (ValueError, OSError) as e:
        sys.exit(f"train.py: error: {e}")
    except RuntimeError as e:
        reason = str(e).splitlines()[0]
        if isinstance(e, torch.OutOfMemoryError) or "allocate memory" in reason:
            sys.exit(f"train.py: error: the memory is full: lower --batch_size, or raise --gradient_accumulation_steps ({reason})")
        if dist.is_initialized():
            sys.exit(f"train.py: error: another process has ended, or cannot be reached ({reason})")
        raise
    except KeyboardInterrupt:
        sys.exit(130)
