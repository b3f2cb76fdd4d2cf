"""
Trains LM2, or a baseline, to answer questions about facts that lie outside its attention window.

$ python train.py --memory_slots=16                       # the main job: data, training, a table
$ python train.py --memory_type=none --out_dir=out-none   # without memory; or --memory_type=rmt
$ python train.py --init_from=resume                      # goes on where out_dir/ckpt.pt stopped
$ python train.py --eval_only --eval_lengths=0k,1k        # another table; also of other texts
$ torchrun --standalone --nproc_per_node=4 train.py       # data parallel
$ python train.py --init_from=LLAMA_DIR --freeze_decoder --data_dir=DIR   # a memory on a Llama

In out_dir: ckpt.pt, log.jsonl (a line each log_interval steps, stage and evaluation), results.json,
and eval.json of --eval_only.
"""
import json
import math
import os
import random
import signal
import sys
import time
from dataclasses import asdict, fields
from itertools import groupby, product
from pathlib import Path

# else DistributedDataParallel warns at its first step that nothing is unused; later steps differ
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import prepare_babilong as babilong
from model import LM2Config, build, llama_config, load_llama
from prepare_babilong import Parser, number, out_file, several, write_file

RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # of torchrun

# the paper's own sizes
PRESETS = {"lm2-1.7b": {"block_size": 2048, "n_layer": 16, "n_head": 32, "n_kv_head": 8,
                        "n_embd": 2048, "intermediate_size": 8192, "memory_slots": 2048,
                        "tie_embeddings": True, "qk_norm": False, "token_shift": False}}
# flags that a resumed run does not take from its checkpoint, and those of its model that may change
NOT_KEPT = "out_dir", "init_from", "eval_only", "results", "device", "preset"
MAY_CHANGE = ("memory_slots", "claim_threshold", "memory_top_k", "bptt_segments",
              "activation_checkpointing")

# -----------------------------------------------------------------------------
# flags

def get_parser():
    parser = Parser("Trains LM2, or a baseline, and evaluates it.")
    flag, group = parser.flag, parser.add_group
    count, positive, size = number(int, 0, 10**9), number(int, 1, 10**9), number(int, 1, 2**20)
    share, rate, beta = number(float, 0, 1), number(float, 0, 10), number(float, 0, 0.9999)
    group("run")
    flag("out_dir", "out", "folder for checkpoint, log, results; to evaluate: or a model's file")
    flag("init_from", "scratch", "scratch, resume (go on from out_dir), or a Llama's folder: graft")
    flag("checkpoint_interval", 200, "steps between checkpoints", positive)
    flag("log_interval", 10, "steps between log lines", positive)
    flag("eval_interval", 500, "steps between evaluations of 100 samples a length; 0: none", count)
    flag("device", "auto", "cuda, mps, cpu, cuda:1, ...; auto: the best there is")
    flag("dtype", "auto", "of training; auto: bfloat16 on cuda, else float32",
         choices=("auto", "float32", "bfloat16", "float64"))
    flag("compile", "auto", "torch.compile; auto: on cuda", choices=("auto", "on", "off"))
    group("evaluation")
    flag("eval_only", False, "do not train: load out_dir and print the table")
    flag("eval_lengths", "0k", "rows: lengths as in BABILong, like 0k,4k", several(babilong.length))
    flag("eval_segments", "1,2,4,8,16,32", "rows: segments; 0: none", several(count))
    flag("eval_samples", 500, "samples of each task and row; a tenth beyond 8k", positive)
    flag("intervention", "none", "before the last segment, reset the memory or swap it between "
         "samples: what is then still right is not from memory", choices=("none", "reset", "swap"))
    flag("retrieve", 0, "K: give the K sentences BM25 ranks closest to the question", count)
    flag("results", None, "JSON file for the table; default: results.json in out_dir, or eval.json "
         "with eval_only", out_file)
    flag("babi_dir", None, "evaluate on the bAbI files of this folder, not on data_dir's stories")
    flag("babilong_dir", None, "evaluate on BABILong's samples of prepare_babilong.py --source=hub")
    flag("background", None, "evaluate in these text files or folders, by commas", several(str))
    group("data")
    flag("data_dir", "data/babilong", "folder of prepare_babilong.py; a new run makes it")
    flag("data", None, "train on this text, or on a folder's *.txt files, instead of stories; the "
         "last tenth is held out. data_dir gives the tokenizer")
    flag("tasks", "qa1", "bAbI tasks, like qa1,qa2, or all", babilong.parse_tasks)
    flag("many_questions", False, "ask more in training texts, of older statements too")
    flag("short_texts", 0.0, "share of the steps with one to four segments and no haystack", share)
    flag("seed", 1337, "of weights and training samples", number(int, 0, 2**63 - 1))
    group("model")
    flag("preset", None, "the sizes of a published model", choices=tuple(PRESETS))
    flag("block_size", 64, "T, tokens of a segment, all that self-attention sees", size)
    flag("n_layer", 3, "decoder blocks", number(int, 1, 1000))
    flag("n_head", 4, "attention heads", size)
    flag("n_kv_head", 0, "key-value heads; 0: n_head", count)
    flag("n_embd", 96, "C, width", size)
    flag("memory_type", "lm2", "the memory, or a baseline", choices=("lm2", "rmt", "none"))
    flag("memory_slots", 16, "N, slots of a bank; RMT: memory tokens", number(int, 0, 2**16))
    flag("chunk_size", 4, "w, tokens that share a slot", size)
    flag("claim_threshold", 0.75, "a chunk with a larger claim is written; in training 1/2", share)
    flag("n_memory_layers", 0, "L, blocks with a bank, from the first on; 0: all", count)
    flag("memory_top_k", 0, "a token reads its k best slots; 0: all", count)
    flag("tie_embeddings", False, "one matrix for embedding and head, as in small Llamas")
    flag("qk_norm", True, "normalise queries and keys; Llama does not")
    flag("token_shift", True, "mix in the token before; Llama does not")
    group("optimization")
    flag("max_iters", 2000, "training steps", positive)
    flag("batch_size", 64, "segments per step: batch_size // S samples of S segments", positive)
    flag("gradient_accumulation_steps", 1, "parts in which a batch is computed", positive)
    flag("learning_rate", 2e-3, "AdamW's, at its peak", rate)
    flag("muon_lr", 0.005, "Muon's, for the matrices in the blocks; 0: AdamW for all", rate)
    flag("weight_decay", 0.0, "of matrices", rate)
    flag("beta1", 0.9, "AdamW's", beta)
    flag("beta2", 0.98, "AdamW's", beta)
    flag("grad_clip", 1.0, "largest norm of the gradient; 0: no limit", number(float, 0, 1e9))
    flag("warmup_iters", 50, "steps until the learning rate is at its peak", count)
    flag("decay_share", 0.4, "share of the steps, at the end, in which it falls to zero", share)
    flag("answer_weight", 5.0, "of the answers' loss, beside the text's 1", number(float, 0, 1e6))
    flag("claim_noise", 3.0, "most noise on a claim's log-odds, while the rate falls", rate)
    flag("freeze_decoder", False, "train the memory alone")
    group("curriculum")
    flag("curriculum", "1,2,3,4,6,8,12,16", "most segments of a sample, stage by stage",
         several(positive))
    flag("stage_accuracy", 0.94, "running accuracy that ends a stage, tasks' mean", share)
    flag("stage_iters", 0, "steps that end a stage at the latest; 0: no limit", count)
    flag("bptt_segments", 0, "cut the gradient after so many segments; 0: never", count)
    flag("activation_checkpointing", False, "compute blocks twice, to save memory")
    return parser


def parse_args(argv=None):
    """
    The flags, and the checkpoint of out_dir if they ask for one, else None; what is not on the
    command line comes from it. Exit code 2 and one line for flags that cannot work.
    """
    parser = get_parser()
    args, checkpoint, fixed = parser.parse_args(argv), None, {}
    try:
        if args.eval_only or args.init_from == "resume":
            checkpoint = load_checkpoint(args.out_dir)
            parser.set_defaults(**checkpoint["args"])
            fixed = {n: v for n, v in checkpoint["config"].items() if n not in MAY_CHANGE}
            if fixed.get("memory_type") == "rmt":  # its memory tokens are weights
                fixed["memory_slots"] = checkpoint["config"]["memory_slots"]
        elif args.init_from != "scratch":
            if not Path(args.init_from).is_dir():
                raise ValueError(f"--init_from={args.init_from} is not scratch, resume or a folder")
            fixed = {**llama_config(args.init_from), "qk_norm": False, "token_shift": False}
        elif args.preset:
            parser.set_defaults(**PRESETS[args.preset])
        fixed.pop("vocab_size", None)
        # also fields of the config that are no flags, like rope_theta
        parser.set_defaults(**fixed)
        args = parser.parse_args(argv)
        config = model_config(args, 0)
        for name, value in fixed.items():
            if (given := getattr(config, name)) != value:
                raise ValueError(f"--{name}={given}, but the model it starts from has {value}")
        if args.data:
            args.tasks, args.answer_weight = [], 0.0
        stage, step = (checkpoint["stage"], checkpoint["iter_num"]) if checkpoint else (0, 0)
        least = max(args.curriculum) * args.gradient_accumulation_steps * WORLD
        about_stories = args.retrieve or args.babi_dir or args.background or args.babilong_dir
        for wrong, why in (
            (args.data and (about_stories or args.intervention != "none"),
             "--data is text without questions: flags about them do not go with it"),
            (args.babilong_dir and (args.babi_dir or args.background),
             "--babilong_dir holds whole samples: --babi_dir and --background do not go with it"),
            (args.intervention != "none" and (config.memory_type == "none" or args.retrieve),
             "--intervention needs a model with memory, and no --retrieve"),
            (args.freeze_decoder and config.memory_type == "none",
             "--freeze_decoder leaves nothing to train in a model without memory"),
            (args.preset and (checkpoint or args.init_from != "scratch"),
             "--preset is for a new model"),
            (args.eval_only and args.init_from not in ("scratch", "resume"),
             "--eval_only takes the model from --out_dir"),
            (Path(args.out_dir).is_file() and not args.eval_only,
             f"{args.out_dir} is a model, to evaluate or to read with: training needs a folder"),
            (len(args.curriculum) < stage, f"--curriculum ends before the run's stage {stage}"),
            (args.max_iters < step and not args.eval_only,
             f"--max_iters={args.max_iters}, but the run is at step {step}"),
            (args.batch_size < least and not args.eval_only,
             f"--batch_size must be at least {least}: the curriculum's most segments, times "
             "gradient_accumulation_steps, times processes"),
            (not checkpoint and Path(args.out_dir, "ckpt.pt").exists(),
             f"{args.out_dir} holds a run: --init_from=resume goes on, another --out_dir keeps it"),
        ):
            if wrong:
                raise ValueError(why)
    except ValueError as e:
        parser.error(str(e))
    return args, checkpoint


def model_config(args, vocab_size):
    named = {f.name: getattr(args, f.name) for f in fields(LM2Config) if hasattr(args, f.name)}
    return LM2Config(**named, vocab_size=vocab_size)


# -----------------------------------------------------------------------------
# checkpoints

def first_line(error):
    return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"


def save_checkpoint(out_dir, checkpoint):
    """Writes out_dir/ckpt.pt. A kill, or a full disk, leaves a whole one: the old or the new."""
    path, new = Path(out_dir, "ckpt.pt"), Path(out_dir, "ckpt.pt.tmp")
    try:
        with open(new, "wb") as f:
            torch.save(checkpoint, f)
            os.fsync(f.fileno())
    except (OSError, RuntimeError) as e:  # torch.save has its own error for a full disk
        new.unlink(missing_ok=True)
        raise OSError(f"{path} cannot be written, the last one is kept ({first_line(e)})") from None
    os.replace(new, path)


def load_checkpoint(out_dir):
    """The dict of out_dir/ckpt.pt, or of a file, on the CPU. ValueError: it cannot be used."""
    path = Path(out_dir) if Path(out_dir).is_file() else Path(out_dir, "ckpt.pt")
    if not path.exists():
        raise ValueError(f"there is no checkpoint {path}: train first, or name another --out_dir")
    parts = "model config args optimizers iter_num stage began running log_size tokenizer data"
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        LM2Config(**checkpoint["config"])
        return {name: checkpoint[name] for name in parts.split()}
    except Exception as e:  # torch.load raises many kinds for a file that is damaged or not its own
        raise ValueError(f"{path} is damaged, or not of this train.py ({first_line(e)})") from None


def load_model(checkpoint, device, **changed):
    """(model, encoding) of a checkpoint. changed: fields of its config that may change."""
    try:
        model = build(LM2Config(**{**checkpoint["config"], **changed}))
        dtype = torch.promote_types(checkpoint["model"]["embed.weight"].dtype, torch.float32)
        model.to(dtype).load_state_dict(checkpoint["model"])
        return model.to(device).eval(), babilong.parse_tokenizer(checkpoint["tokenizer"])
    except (RuntimeError, KeyError, AttributeError, TypeError) as e:
        raise ValueError(f"the checkpoint does not fit its config ({first_line(e)})") from None


def pick_device(name):
    """A torch.device from --device. ValueError: it does not exist or does not work."""
    if name == "auto":
        mps = torch.backends.mps.is_available()
        name = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    try:
        torch.zeros(1, device=name).item()
        return torch.device(name)
    except (RuntimeError, AssertionError, NotImplementedError, ImportError) as e:
        raise ValueError(f"--device={name} cannot be used here ({first_line(e)})") from None


# -----------------------------------------------------------------------------
# evaluation

@torch.no_grad()
@torch.compiler.set_stance("force_eager")  # compiling for each size takes longer than to answer
def evaluate(model, data, task, seed, n, intervention="none", retrieve=0, **size):
    """
    Answers n evaluation samples of `task`, greedily, each process its share. size: segments=4 or
    length="4k". Returns the row for results.json: accuracies and, for chunks of facts and of the
    haystack, how many there were and how many of them each block wrote.
    """
    T, room, device = model.config.block_size, data.room[task], model.embed.weight.device
    samples = [data.sample(task, seed, i, **size) for i in range(RANK, n, WORLD)]
    samples.sort(key=lambda s: len(s.tokens))  # texts of one length share a batch
    answers, chunks = [], np.zeros((2, 1 + len(model.initial_memory(1))), dtype=int)
    for _, group in groupby(samples, key=lambda s: len(s.tokens)):
        group = list(group)
        for batch in (group[i : i + 64] for i in range(0, len(group), 64)):
            prompts = [data.retrieve(s, retrieve) if retrieve else s.tokens[: s.prompt]
                       for s in batch]
            idx = torch.from_numpy(np.stack(prompts)).to(device)
            B, S = len(batch), idx.size(1) // T
            before, last = idx[:, : S * T].view(B, S, T), idx[:, S * T :]
            memory, written = model.initial_memory(B), []
            for part in before.split(max(1, 2**15 // (T * B)), dim=1) if S else ():
                _, memory, log_odds = model.segments(model.embed(part), memory)
                written += [] if log_odds is None else [log_odds.flatten(2).cpu() > 0]
            if written:
                written = torch.cat(written, dim=2).numpy()  # (L, B, S*J)
                fact = np.zeros((B, S * T), dtype=bool)
                for row, s in zip(fact, batch):
                    for start, end in s.facts.values():
                        row[start:end] = True
                fact = fact.reshape(*written.shape[1:], -1).any(axis=2)  # (B, S*J)
                for count, kind in zip(chunks, (fact, ~fact)):
                    count += [kind.sum(), *(written & kind).sum(axis=(1, 2))]
            if intervention == "reset":
                memory = model.initial_memory(B)
            elif intervention == "swap":
                memory = memory.roll(1, dims=1)
                batch = batch if len(batch) > 1 else []  # nobody to swap with: not counted
            out, _ = model.generate(last, room, temperature=0, state=(memory, last[:, :0]))
            for s, answer in zip(batch, out[:, -room:].tolist()):
                right = babilong.score(task, s.question, s.target, data.encoding.decode(answer))
                # do the facts that it takes lie before the last segment?
                outside = s.facts and all(s.facts[i][1] <= len(s.tokens) - T for i in s.support)
                answers.append((right, bool(outside), len(s.tokens)))
    if WORLD > 1:
        gathered = [None] * WORLD
        dist.all_gather_object(gathered, (answers, chunks))
        answers, chunks = (sum(part[1:], part[0]) for part in zip(*gathered))
    tokens = int(np.mean([tokens for _, _, tokens in answers] or [0]))
    row = {"task": task, "length": None, "segments": None, **size, "tokens": tokens,
           "fact_chunks": chunks[0].tolist(), "haystack_chunks": chunks[1].tolist()}
    for name, kind in ("", answers), ("_outside", [a for a in answers if a[1]]):
        n, correct = len(kind), sum(right for right, _, _ in kind)
        accuracy = round(100 * correct / n, 1) if n else None
        row.update({"n" + name: n, "correct" + name: correct, "accuracy" + name: accuracy})
    return row


def shares(rows):
    """What each block writes, a line; nothing where no block chooses, as in RMT."""
    names = "fact_chunks", "haystack_chunks"
    facts, hay = (np.sum([row[name] for row in rows], axis=0) for name in names)
    parts = " ".join(f"{100 * f / facts[0]:.0f}/{100 * h / max(1, hay[0]):.1f}"
                     for f, h in zip(facts[1:], hay[1:]) if facts[0])
    return parts and f"chunks written, of facts / of the haystack, in % by block: {parts}"


@torch.no_grad()
@torch.compiler.set_stance("force_eager")
def perplexity(model, data, segments):
    """{segments, perplexity, tokens} of data's documents in texts of so many segments, or None."""
    size, device = segments * model.config.block_size, model.embed.weight.device
    texts = [d[: len(d) // size * size] for d in data.documents]
    tokens = torch.from_numpy(np.concatenate(texts)).view(-1, size).to(device)
    if size == 1 or not len(tokens):  # nothing to predict
        return None
    targets = torch.nn.functional.pad(tokens[:, 1:], (0, 1), value=-1)
    losses = [model(i, t)[1].item() * len(i) for i, t in zip(tokens.split(16), targets.split(16))]
    value = round(math.exp(min(700, sum(losses) / len(tokens))), 3)  # a float ends at e^709
    return {"segments": segments, "perplexity": value, "tokens": tokens.numel()}


def print_table(rows, guesses):
    """The layout of the paper's Table 1: tasks across, lengths down, the average last."""
    def line(name, tokens, n, values):
        mean = np.mean([v for v in values if v is not None])
        cells = "".join("      -" if v is None else f"{v:7.1f}" for v in (*values, mean))
        print(f"{name:<15}{tokens:>8}{n:>7} {cells}")

    tasks = "".join(f"{g['task']:>7}" for g in guesses)
    print(f"\n{'accuracy in %':<15}  tokens      n {tasks}    all")
    for name in "majority", "question_only":
        line(name, "", "", [g[name] for g in guesses])
    for kind, title in ("", ""), ("_outside", "all facts needed lie before the last segment:\n"):
        if any(r["n" + kind] for r in rows):
            print(title, end="")
        for name, row in groupby(rows, key=lambda r: r["length"] or f"{r['segments']} seg."):
            row = list(row)
            if n := sum(r["n" + kind] for r in row):
                tokens = round(np.mean([r["tokens"] for r in row]))
                line(name, tokens, n, [r["accuracy" + kind] for r in row])
    if text := shares(rows):
        print(text)


def final_table(args, checkpoint, model, training, evaluated, meta):
    """Evaluates, prints the table and writes results.json, or eval.json."""
    sizes = [{"length": length} for length in args.eval_lengths]
    sizes += [{"segments": s} for s in args.eval_segments if s and not args.babilong_dir]
    plan, long, rows = [*product(sizes, args.tasks)], babilong.characters("8k"), []
    for size, task in tqdm(plan, "evaluating", leave=False, disable=None if RANK == 0 else True):
        n = args.eval_samples
        if args.babilong_dir:
            n = min(n, len(evaluated.read(task, size["length"])))
        elif babilong.characters(size.get("length", "0k")) > long:
            n = -(-n // 10)
        how = args.intervention, args.retrieve
        rows.append(evaluate(model, evaluated, task, meta["seed"], n, *how, **size))
    if RANK == 0:
        guesses = [training.guess(evaluated, task) for task in args.tasks]
        if rows:
            print_table(rows, guesses)
        lengths = [s for s in args.eval_segments if s] if args.data else [max(args.curriculum)]
        texts = [text for s in lengths if (text := perplexity(model, evaluated, s))]
        for text in texts:
            print(f"perplexity of held-out text, {text['segments']} segments at a time: "
                  f"{text['perplexity']} ({text['tokens']} tokens)")
        config = {**vars(args), **asdict(model.config), "parameters": model.num_params(),
                  "iter_num": checkpoint["iter_num"] if args.eval_only else args.max_iters}
        results = {"config": config, "data_hash": meta["hash"], "results": rows,
                   "guesses": guesses, "perplexities": texts}
        name = "eval.json" if args.eval_only else "results.json"
        path = args.results or Path(args.out_dir if Path(args.out_dir).is_dir() else "", name)
        write_file(path, json.dumps(results, indent=1))
        print(f"written to {path}")


# -----------------------------------------------------------------------------
# training

class Muon(torch.optim.Optimizer):
    """
    Moves each matrix by its momentum, made orthogonal: https://kellerjordan.github.io/posts/muon.
    As torch.optim.Muon, but not in bfloat16: a CPU without units for it would take longer for this
    than for all the rest of a step.
    """

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                momentum = self.state[p].setdefault("momentum_buffer", torch.zeros_like(p))
                momentum.lerp_(p.grad, 1 - 0.95)
                x = p.grad.lerp(momentum, 0.95)  # Nesterov's
                tall = x.size(0) > x.size(1)
                x = x.T if tall else x
                x = x / x.norm().clamp(min=1e-7)
                # five steps of Newton and Schulz take all singular values close to 1
                for _ in range(5):
                    gram = x @ x.T
                    x = 3.4445 * x + (-4.775 * gram + 2.0315 * gram @ gram) @ x
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.sub_(x.T if tall else x, alpha=group["lr"] * max(1, p.size(0) / p.size(1)) ** 0.5)


def make_optimizers(model, args):
    """AdamW and, if muon_lr > 0, Muon for the matrices inside the blocks."""
    muon = [p for p in model.blocks.parameters() if p.dim() == 2 and args.muon_lr]
    inside = set(muon)
    rest = [p for p in model.parameters() if p not in inside]
    groups = [{"params": [p for p in rest if p.dim() == 2], "weight_decay": args.weight_decay},
              {"params": [p for p in rest if p.dim() < 2], "weight_decay": 0.0}]
    optimizers = [torch.optim.AdamW(groups, args.learning_rate, (args.beta1, args.beta2))]
    if muon:
        optimizers.append(Muon(muon, dict(lr=args.muon_lr, weight_decay=args.weight_decay)))
    return optimizers


def get_batch(data, args, it, segments, noise, running):
    """
    This process's share of the samples of step `it`: idx and targets (B, n) int64, targets -1 where
    there is none; answer (B, n) bool: targets that belong to an answer; first (B, n) int64: the
    number of its task where a target begins an answer, else -1.
    """
    B, tasks = args.batch_size // segments, args.tasks or [None]
    # tasks are drawn by their errors; one that is known, with running accuracy 1, stays in practice
    drawn = random.Random(f"{args.seed}/{it}/tasks").choices(range(len(tasks)), 1.1 - running, k=B)
    samples = [data.sample(tasks[drawn[i]], args.seed, f"{it}.{i}", segments=segments, noise=noise,
                           dense=1 + args.many_questions) for i in range(RANK, B, WORLD)]
    idx = np.stack([s.tokens for s in samples])
    targets = np.pad(idx[:, 1:], ((0, 0), (0, 1)), constant_values=-1)
    targets[targets == data.newline] = -1
    answer, first = np.zeros(idx.shape, dtype=bool), np.full(idx.shape, -1)
    for row, (sample, task) in enumerate(zip(samples, drawn[RANK::WORLD])):
        if not sample.answers:  # plain text, perhaps shorter than the sample
            targets[row, sample.prompt - 1 :] = -1
        for start, end in sample.answers:
            answer[row, start - 1 : end - 1], first[row, start - 1] = True, task
    return [torch.from_numpy(part) for part in (idx, targets, answer, first)]


def train(args, checkpoint, model, training, held_out, meta):
    """The loop. Returns True at its end, False after a signal, with a checkpoint written."""
    device, optimizers = model.embed.weight.device, make_optimizers(model, args)
    bfloat16 = args.dtype == "bfloat16" or (args.dtype == "auto" and device.type == "cuda")
    amp = torch.autocast(device.type, dtype=torch.bfloat16, enabled=bfloat16)
    # stage 0 is one segment without a haystack, stage i at most curriculum[i - 1] segments; text
    # has no answers that could tell when to go on
    stages, it, began = [1] + args.curriculum, 0, 0
    running = np.zeros(max(1, len(args.tasks)))  # accuracies, a number for each task
    stage = len(stages) - 1 if args.data else 0
    if checkpoint:
        it, stage = checkpoint["iter_num"], checkpoint["stage"]
        known = dict(zip(checkpoint["args"]["tasks"], checkpoint["running"]))
        began, running[:] = checkpoint["began"], [known.get(t, 0.0) for t in args.tasks] or 0.0
        if len(checkpoint["optimizers"]) != len(optimizers):
            raise ValueError("the run had other optimizers: --muon_lr cannot become zero, or more "
                             "than zero, in the same run, and an exported model has none")
        for optimizer, kept in zip(optimizers, checkpoint["optimizers"]):
            # the moments are the checkpoint's; rates, betas and decays are the flags'
            optimizer.load_state_dict({**optimizer.state_dict(), "state": kept["state"]})
    # what the last segment writes is read by nobody: some weights can be without gradient
    network = DistributedDataParallel(model, find_unused_parameters=True) if WORLD > 1 else model
    stopped = []
    before = {name: signal.signal(name, lambda *_: stopped.append(True))
              for name in (signal.SIGINT, signal.SIGTERM)}
    if RANK == 0:
        if not checkpoint and Path(args.out_dir, "ckpt.pt").exists():
            raise ValueError(f"another run has begun in {args.out_dir}: name another --out_dir")
        path = Path(args.out_dir, "log.jsonl")  # less what was logged since the checkpoint
        old = path.read_bytes()[: checkpoint["log_size"]] if checkpoint and path.exists() else b""
        write_file(path, old)
        log = open(path, "a", buffering=1)

    def save():
        os.fsync(log.fileno())  # log_size must not count what is not yet on the disk
        save_checkpoint(args.out_dir, {
            "model": model.state_dict(), "config": asdict(model.config), "iter_num": it,
            "optimizers": [o.state_dict() for o in optimizers],
            "args": {n: v for n, v in vars(args).items() if n not in NOT_KEPT}, "stage": stage,
            "began": began, "running": running.tolist(), "log_size": log.tell(),
            "data": meta["hash"], "tokenizer": babilong.dump_tokenizer(training.encoding)})

    def say(text, **entry):
        if RANK == 0:
            print(f"step {it:5d}{text}", flush=True)
            log.write(json.dumps({"iter": it, **entry}) + "\n")

    def total(*values):
        """The values' sums over all processes."""
        values = torch.tensor(values, dtype=torch.float64)
        if WORLD > 1:
            dist.all_reduce(values := values.to(device))
        return values.cpu().numpy()

    def by_task(first):
        """How many answers begin, of each task."""
        return first[first >= 0].bincount(minlength=len(running)).cpu()

    if RANK == 0 and not checkpoint:
        get_batch(training, args, 0, 1, False, running)  # what cannot work leaves no run behind
        save()  # so that there is something to resume from the first step on
    clock, seen, stop = time.perf_counter(), 0, False
    while it < args.max_iters and not stop:
        # half of the batches or more are as long as the stage allows; one in five has no haystack
        rng, most = random.Random(f"{args.seed}/{it}"), stages[stage]
        segments = most if rng.random() < 0.5 else rng.randint(1, most)
        noise = stage > 0 and rng.random() < 0.8
        if rng.random() < args.short_texts:
            segments, noise = rng.randint(1, min(4, most)), False
        batch = get_batch(training, args, it, segments, noise, running)
        counts = total((batch[1] != -1).sum(), batch[2].sum(), *by_task(batch[3]))
        n_targets, n_answers, n_first = max(1, counts[0]), max(1, counts[1]), counts[2:]

        # up to the peak, then level, then down to zero
        up = (it + 1) / max(1, args.warmup_iters)
        down = (args.max_iters - it) / max(1e-9, args.decay_share * args.max_iters)
        schedule = min(1, up, down)
        for optimizer, peak in zip(optimizers, (args.learning_rate, args.muon_lr)):
            for group in optimizer.param_groups:
                group["lr"] = peak * schedule

        # noise on the claims, its seed each step's and process's own: a resumed run has the same
        torch.manual_seed(rng.getrandbits(62) + RANK)
        model.set_noise(args.claim_noise if down < 1 else 0.0)
        model.train()
        losses, right = 0.0, torch.zeros(len(running))
        for parts in zip(*(part.tensor_split(args.gradient_accumulation_steps) for part in batch)):
            idx, targets, answer, first = (part.to(device) for part in parts)
            # (mean over all targets + answer_weight * mean over the answers') / (1 + answer_weight)
            weights = (targets != -1) / n_targets + args.answer_weight * answer / n_answers
            weights = weights / (1 + args.answer_weight)
            with amp:
                x, loss, _ = network(idx, targets, weights=weights)
            (loss * WORLD).backward()  # DistributedDataParallel takes the mean of what is a sum
            losses += loss.item()
            with torch.no_grad():  # of each answer its first token, with the true text before it
                at = first >= 0
                said = model.head(x[at]).argmax(dim=-1)
                right += by_task(first[at][said == targets[at]])
        clip = args.grad_clip or math.inf
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), clip).item()
        losses, stop, *right = total(losses, len(stopped), *right)
        if not math.isfinite(losses + norm):
            raise ValueError(f"at step {it} the loss is {losses} and the gradient's norm {norm}: "
                             "lower the learning rates. The last checkpoint is kept")
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        it, seen = it + 1, seen + batch[0].numel() * WORLD
        accuracy = sum(right) / max(1, sum(n_first))

        if segments == most and (noise or stage == 0):
            for task, n in enumerate(n_first):
                if n:  # it was in the batch
                    running[task] += 0.1 * (right[task] / n - running[task])
        late = args.stage_iters and it - began >= args.stage_iters
        if (running.mean() > args.stage_accuracy or late) and stage < len(stages) - 1:
            stage, began, running[:] = stage + 1, it, 0.0
            say(f": stage {stage} of {len(stages) - 1}, up to {stages[stage]} segments",
                stage=stage)
        if it % args.log_interval == 0:
            now = time.perf_counter()
            entry = {"segments": segments, "loss": losses, "accuracy": accuracy, "norm": norm,
                     "lr": args.learning_rate * schedule, "tokens_per_second": seen / (now - clock)}
            text = (" | segments {segments:2d} | loss {loss:6.3f} | answers {accuracy:6.1%} | norm "
                    "{norm:5.2f} | lr {lr:.1e} | {tokens_per_second:6.0f} tok/s")
            say(text.format(**entry), **entry)
            clock, seen = now, 0
        pause = time.perf_counter()
        if args.eval_interval and it % args.eval_interval == 0 and it < args.max_iters:
            model.eval()
            lengths = sorted({1, *args.curriculum})
            n = math.ceil(100 / max(1, len(args.tasks)))  # the tasks share the samples
            rows = [evaluate(model, held_out, task, meta["seed"], n, segments=s)
                    for s in lengths for task in args.tasks]
            if rows:
                means = np.reshape([r["accuracy"] for r in rows], (len(lengths), -1)).mean(axis=1)
                text = ", ".join(f"{s} seg. {mean:.0f} %" for s, mean in zip(lengths, means))
                say(f": {text}; {shares(rows)}".removesuffix("; "), eval=rows)
            elif text := perplexity(model, held_out, max(args.curriculum)):
                say(f": perplexity {text['perplexity']}", **text)
        if RANK == 0 and (it % args.checkpoint_interval == 0 or it == args.max_iters or stop):
            save()
        clock += time.perf_counter() - pause  # tokens_per_second is of the training alone
    for name, handler in before.items():
        signal.signal(name, handler)
    return not stop


def compile_blocks(model, must):
    """Compiles the blocks in place: checkpoints keep their names. ValueError: must, but cannot."""
    try:
        torch.compile(torch.neg)(model.norm.weight.detach())  # is there a compiler?
    except RuntimeError as e:
        if must:
            raise ValueError(f"--compile=on does not work here ({first_line(e)})") from None
        return print(f"torch.compile does not work here, so without ({first_line(e)})")
    torch._dynamo.config.recompile_limit = 64  # batches of one text, or segment, are special
    for block in model.blocks:
        block.compile(dynamic=True)


def get_data(args, checkpoint):
    """Training, held-out and evaluated data, and meta. ValueError, OSError: they cannot be used."""
    exported = Path(args.out_dir).is_file()  # a model in one file goes to other machines
    if RANK == 0 and (exported or not checkpoint) and not Path(args.data_dir, "meta.json").exists():
        print(f"preparing the data in {args.data_dir}")
        babilong.write_data(args.data_dir)
    if WORLD > 1:
        dist.barrier()
    tokenizer = checkpoint and checkpoint["tokenizer"]
    training, held_out, meta = babilong.load_data(args.data_dir, args.block_size, tokenizer)
    if missing := set(args.tasks) - set(meta["tasks"].split(",")):
        raise ValueError(f"{args.data_dir} holds no {min(missing)}: prepare it with --tasks")
    if args.data:
        texts = babilong.read_documents(args.data)
        training, held_out = (babilong.Documents(training.encoding, texts, args.block_size, part)
                              for part in ((0, 0.9), (0.9, 1)))
        meta["hash"] = training.digest()
    if checkpoint and checkpoint["data"] != meta["hash"]:
        if not exported:
            raise ValueError(f"{args.data or args.data_dir} (hash {meta['hash']}) is not what the "
                             f"model in {args.out_dir} learned from (hash {checkpoint['data']})")
        print(f"{args.data_dir} is not what this model learned from: figures can differ")
    evaluated = held_out
    if args.babilong_dir:
        evaluated = babilong.Published(held_out, args.babilong_dir, args.eval_lengths)
        for task, length in product(args.tasks, args.eval_lengths):
            evaluated.read(task, length)  # what is missing shows before training, not after
    elif args.babi_dir or args.background:
        stories, sentences = held_out.stories, held_out.sentences
        if args.babi_dir:
            stories = {t: babilong.find_babi(args.babi_dir, t, "test") for t in args.tasks}
        if args.background:
            sentences = babilong.read_background(args.background)
        evaluated = babilong.Babilong(held_out.encoding, stories, sentences, args.block_size)
    return training, held_out, evaluated, meta


def main(args, checkpoint):
    """Returns the exit code."""
    if WORLD > 1 and args.device in ("auto", "cuda") and torch.cuda.is_available():
        args.device = f"cuda:{os.environ['LOCAL_RANK']}"
    device = pick_device(args.device)
    if device.type == "cuda":
        torch.cuda.set_device(device.index or 0)  # "cuda" alone has no index
    if WORLD > 1:
        # imported later, by DistributedDataParallel, it keeps the group's threads beyond the group
        from torch import _dynamo  # noqa: F401
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    torch.set_float32_matmul_precision("high")
    training, held_out, evaluated, meta = get_data(args, checkpoint)
    torch.manual_seed(args.seed)
    if checkpoint:
        changed = {name: getattr(args, name) for name in MAY_CHANGE}
        model, _ = load_model(checkpoint, device, **changed)
    else:
        config, llama = model_config(args, training.encoding.n_vocab), args.init_from != "scratch"
        # a Llama's file of tokens holds nearly all that it embeds
        if llama and config.vocab_size < 0.9 * llama_config(args.init_from)["vocab_size"]:
            raise ValueError(f"{args.data_dir} is not in the tokens of {args.init_from}: prepare "
                             "it with its --tokenizer")
        model = load_llama(args.init_from, **asdict(config)) if llama else build(config)
        model.to(device, torch.float64 if args.dtype == "float64" else torch.float32)
    for name, weight in model.named_parameters():
        weight.requires_grad_("memory" in name or not args.freeze_decoder)
    if not args.eval_only:
        if args.compile == "on" or (args.compile == "auto" and device.type == "cuda"):
            compile_blocks(model, must=args.compile == "on")
        if RANK == 0:
            Path(args.out_dir).mkdir(parents=True, exist_ok=True)
            c, n = model.config, f"{model.num_params():,} parameters"
            print(f"{n} ({model.num_params(memory=False):,} without memory), memory "
                  f"{c.memory_type} with {c.memory_slots} slots, segments of {c.block_size}, "
                  f"{device}, data {meta['hash']}", flush=True)
        if not train(args, checkpoint, model, training, held_out, meta):
            if RANK == 0:
                print(f"stopped; --init_from=resume --out_dir={args.out_dir} goes on")
            return 130
    model.eval()
    final_table(args, checkpoint, model, training, evaluated, meta)
    if WORLD > 1:
        dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(*parse_args()))
    except (ValueError, OSError) as e:
        sys.exit(f"train.py: error: {e}")
    except RuntimeError as e:
        if isinstance(e, torch.OutOfMemoryError) or "allocate memory" in str(e):
            sys.exit("train.py: error: out of memory: lower --batch_size, or raise "
                     f"--gradient_accumulation_steps ({first_line(e)})")
        if isinstance(e, dist.DistError) or "gloo" in str(e):
            sys.exit(f"train.py: error: another process has ended or is lost ({first_line(e)})")
        raise
    except KeyboardInterrupt:
        sys.exit(130)
