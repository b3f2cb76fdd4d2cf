"""The command line of train.py: training, resuming, evaluating, and what it says to bad input."""
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from torch.cuda._utils import _get_device_index

import compare
import export
import facts
import prepare_babilong as babilong
import sample
import train
from model import Memory
from test_data import expected
from test_model import llama_folder

ROOT = Path(__file__).parent.parent


def flags(data_dir, out_dir, **kwargs):
    base = dict(data_dir=data_dir, out_dir=out_dir, device="cpu", block_size=32, n_layer=2, n_embd=32,
                n_head=2, memory_slots=4, max_iters=8, batch_size=8, curriculum="1,2", stage_accuracy=0.0,
                log_interval=1, eval_interval=0, eval_samples=10, eval_segments="1,2", eval_lengths="0k",
                warmup_iters=2)
    return [f"--{k}={v}" for k, v in {**base, **kwargs}.items()]


def run(*args):
    return train.main(*train.parse_args([*args]))


def weights(out_dir):
    return torch.load(Path(out_dir, "ckpt.pt"), weights_only=True)


def results(out_dir, name="results.json"):
    return json.loads(Path(out_dir, name).read_text())


def same(a, b):
    """Two nested states, bit for bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def apart(a, b):
    """The distance of two runs' weights, relative to their norm."""
    a, b = weights(a)["model"], weights(b)["model"]
    squares = sum((a[k] - b[k]).square().sum() for k in a), sum(w.square().sum() for w in a.values())
    return (squares[0] / squares[1]).sqrt().item()


def log(out_dir):
    lines = Path(out_dir, "log.jsonl").read_text().splitlines(keepends=True)
    # a line without its end is still being written
    rows = [json.loads(line) for line in lines if line.endswith("\n")]
    return [{k: v for k, v in row.items() if k != "tokens_per_second"} for row in rows]


def losses(out_dir):
    return [row["loss"] for row in log(out_dir) if "loss" in row]


# ----------------------------------------------------------------------------- training

@pytest.mark.parametrize("memory_type", ["lm2", "rmt", "none"])
def test_a_run_leaves_checkpoint_log_and_results(memory_type, data_dir, tmp_path, capsys):
    assert run(*flags(data_dir, tmp_path, memory_type=memory_type, eval_interval=4, tasks="qa1,qa6",
                      eval_segments="3,3")) == 0
    assert weights(tmp_path)["iter_num"] == 8 and len(losses(tmp_path)) == 8
    assert all(w.isfinite().all() for w in weights(tmp_path)["model"].values())
    found, blocks = results(tmp_path), 2 if memory_type == "lm2" else 1 if memory_type == "rmt" else 0
    assert found["config"]["max_iters"] == 8 and found["data_hash"] and found["config"]["parameters"] > 0
    assert [(r["task"], r["length"], r["segments"]) for r in found["results"]] == [
        ("qa1", "0k", None), ("qa6", "0k", None), ("qa1", None, 3), ("qa6", None, 3)]
    for row in found["results"]:
        assert row["n"] == 10 and row["accuracy"] == 10 * row["correct"]
        assert len(row["fact_chunks"]) == len(row["haystack_chunks"]) == 1 + blocks
    if memory_type == "lm2":  # two segments of 8 chunks; at the start all claim
        row = found["results"][2]
        assert row["fact_chunks"][0] + row["haystack_chunks"][0] == 10 * 2 * 8 and row["fact_chunks"][0] > 9
        assert row["haystack_chunks"][1] > 0
    assert 1 < found["perplexities"][0]["perplexity"] < 10_000
    printed = capsys.readouterr().out
    assert re.search(r"^accuracy in % .* qa1 +qa6 +all$", printed, re.M) and "perplexity" in printed
    mean = sum(r["accuracy"] for r in found["results"][2:]) / 2
    assert re.search(rf"^3 seg\. +96 +20 .* {mean:.1f}$", printed, re.M)
    shares = "; chunks written, .*, in % by block: .+" if memory_type == "lm2" else ""
    assert re.search(rf"^step +4: 1 seg\. \d+ %, 2 seg\. \d+ %{shares}$", printed, re.M)
    assert {p.name for p in tmp_path.iterdir()} == {"ckpt.pt", "log.jsonl", "results.json"}


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_resume_equals_uninterrupted_bit_for_bit(dtype, data_dir, tmp_path, monkeypatch):
    run(*flags(data_dir, tmp_path / "whole", dtype=dtype, tasks="qa1,qa6"))
    save, saved = train.save_checkpoint, []

    def save_and_die(*args):
        save(*args)
        saved.append(args)
        if len(saved) == 2:  # the first one is written before the first step
            raise KeyboardInterrupt

    monkeypatch.setattr(train, "save_checkpoint", save_and_die)
    with pytest.raises(KeyboardInterrupt):
        run(*flags(data_dir, tmp_path / "cut", dtype=dtype, tasks="qa1,qa6", checkpoint_interval=3))
    assert weights(tmp_path / "cut")["iter_num"] == 3
    with open(tmp_path / "cut" / "log.jsonl", "a") as f:
        f.write('{"iter": 4, "loss": "written after the checkpoint"}\n')
    run("--init_from=resume", f"--out_dir={tmp_path / 'cut'}", "--device=cpu")  # the rest is kept
    whole, cut = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    for key in "model", "optimizers", "stage", "running", "iter_num":
        assert same(whole[key], cut[key]), key
    assert log(tmp_path / "whole") == log(tmp_path / "cut")
    assert results(tmp_path / "whole")["results"] == results(tmp_path / "cut")["results"]


def test_resume_takes_rates_from_flags_but_no_other_model(data_dir, tmp_path, capsys):
    run(*flags(data_dir, tmp_path, max_iters=2))
    resume = ["--init_from=resume", f"--out_dir={tmp_path}"]
    run(*resume, "--max_iters=3", "--weight_decay=0.3", "--beta1=0.5", "--beta2=0.6")
    groups = [group for state in weights(tmp_path)["optimizers"] for group in state["param_groups"]]
    assert [g["weight_decay"] for g in groups] == [0.3, 0.0, 0.3] and groups[0]["betas"] == (0.5, 0.6)
    (tmp_path / "log.jsonl").unlink()  # a checkpoint goes on without its log, too
    assert run(*resume, "--memory_slots=9") == 0  # at its end; no weight depends on N
    for extra, complaint in (("--n_embd=64", "--n_embd=64, but the model"), ("--max_iters=2", "at step 3"),
                             ("--preset=lm2-1.7b", "--preset is for a new model"),
                             ("--curriculum=1", "ends before the run's stage 2")):
        with pytest.raises(SystemExit) as e:
            run(*resume, extra)
        assert e.value.code == 2 and complaint in capsys.readouterr().err
    with pytest.raises(ValueError, match="--muon_lr cannot become zero"):
        run(*resume, "--muon_lr=0", "--max_iters=9")
    with pytest.raises(SystemExit):
        run(*flags(data_dir, tmp_path))
    assert "holds a run" in capsys.readouterr().err and weights(tmp_path)["iter_num"] == 3
    run(*flags(data_dir, tmp_path / "rmt", memory_type="rmt", max_iters=1))
    with pytest.raises(SystemExit):  # RMT's memory tokens are weights
        run("--init_from=resume", f"--out_dir={tmp_path / 'rmt'}", "--memory_slots=9")
    assert "--memory_slots=9, but the model it starts from has 4" in capsys.readouterr().err


def test_a_model_in_one_file_answers_like_its_run(data_dir, tmp_path, monkeypatch, capsys):
    run(*flags(data_dir, "run"))
    monkeypatch.setattr(sys, "argv", ["export.py", "run", "model.pt"])
    export.main()
    assert Path("model.pt").stat().st_size < Path("run/ckpt.pt").stat().st_size / 3
    exported, _ = train.load_model(train.load_checkpoint("model.pt"), "cpu")
    assert train.parse_args(["--eval_only", "--out_dir=model.pt"])[0].data_dir == "data/babilong"
    trained, _ = train.load_model(train.load_checkpoint("run"), "cpu")
    for (name, p), q in zip(exported.named_parameters(), trained.parameters()):
        assert p.dtype == torch.float32 and torch.equal(p, q.bfloat16().float()), name
    command = ["--eval_only", "--out_dir=model.pt", "--device=cpu", "--eval_segments=2", "--eval_samples=5"]
    run(*command, f"--data_dir={data_dir}")
    figures = results(".", "eval.json")["results"]
    shutil.copytree(data_dir, "other")
    Path("other/eval/background.txt").write_text(Path(data_dir, "train/background.txt").read_text())
    Path("other/meta.json").write_text(Path(data_dir, "meta.json").read_text().replace('hash": "', 'hash": "x'))
    capsys.readouterr()
    run(*command, "--data_dir=other")
    assert "other is not what this model learned from" in capsys.readouterr().out
    assert results(".", "eval.json")["results"] != figures  # of its own haystack, in the model's tokens
    monkeypatch.setattr(sample, "MODEL", Path("model.pt"))  # what answers before there is out/
    for args in ["--out_dir=run"], ["--out_dir=model.pt"], []:
        sample.main(sample.get_parser().parse_args(["--device=cpu", *args]))
    answers = capsys.readouterr().out.splitlines()[-3:]
    assert answers[0].startswith("Where is Mary?") and len(set(answers[1:])) == 1
    for mode, complaint in (("--init_from=resume", "model.pt is a model, to evaluate"),
                            ("--eval_only --init_from=other", "--eval_only takes the model from --out_dir")):
        with pytest.raises(SystemExit):
            train.parse_args([*mode.split(), "--out_dir=model.pt"])
        assert complaint in capsys.readouterr().err
    shutil.copy("model.pt", "run/ckpt.pt")
    with pytest.raises(ValueError, match="an exported model has none"):
        run("--init_from=resume", "--out_dir=run", f"--data_dir={data_dir}")


def test_a_checkpoint_wants_its_own_data(data_dir, tmp_path, haystack):
    babilong.write_data(tmp_path / "other", ("qa1",), background=[str(haystack)], vocab_size=600,
                        eval_stories=5, seed=2)
    run(*flags(data_dir, tmp_path / "out", max_iters=2))
    left = (tmp_path / "out" / "results.json").read_bytes()
    for how in ("--init_from=resume", "--max_iters=4"), ("--eval_only",):
        with pytest.raises(ValueError, match="is not what the model in .* learned from"):
            run(*how, f"--out_dir={tmp_path / 'out'}", f"--data_dir={tmp_path / 'other'}")
        with pytest.raises(ValueError, match="nowhere cannot be used"):
            run(*how, f"--out_dir={tmp_path / 'out'}", f"--data_dir={tmp_path / 'nowhere'}")
    assert run("--eval_only", f"--out_dir={tmp_path / 'out'}", "--eval_segments=1") == 0
    assert not (tmp_path / "nowhere").exists() and left == (tmp_path / "out" / "results.json").read_bytes()


@pytest.mark.parametrize("change", [{}, {"gradient_accumulation_steps": 2}, {"seed": 5}])
def test_seed_and_accumulation(change, data_dir, tmp_path):
    """The same seed gives the same run; computing a batch in two parts gives it up to rounding."""
    base = dict(stage_accuracy=1.0, claim_noise=0.0 if "gradient_accumulation_steps" in change else 1.5)
    run(*flags(data_dir, tmp_path / "a", **base))
    run(*flags(data_dir, tmp_path / "b", **base, **change))
    distance = apart(tmp_path / "a", tmp_path / "b")
    assert distance > 0.1 if "seed" in change else distance <= (1e-6 if change else 0)


def test_claims_are_noisy_while_the_rate_falls(data_dir, tmp_path, monkeypatch):
    pool, noises = Memory.pool, []
    monkeypatch.setattr(Memory, "pool", lambda memory, h, s: noises.append((memory.training, memory.noise))
                        or pool(memory, h, s))
    run(*flags(data_dir, tmp_path, max_iters=10, claim_noise=0.5))  # the rate falls from step 7 on
    of_training = [noise for training, noise in noises if training]
    assert of_training == [0.0] * 7 * 2 + [0.5] * 3 * 2 and not noises[-1][0]  # 2 blocks


@pytest.mark.parametrize("shape", [(48, 48), (96, 32), (32, 96)])
def test_muon_is_that_of_torch_less_its_rounding(shape):
    """Four steps with weight decay; torch's computes in bfloat16, which keeps three digits."""
    torch.manual_seed(0)
    ours, theirs = (torch.nn.Parameter(torch.ones(shape)) for _ in range(2))
    optimizers = train.Muon([ours], dict(lr=0.01, weight_decay=0.1)), torch.optim.Muon([theirs], 0.01, 0.1)
    for _ in range(4):
        ours.grad = torch.randn(shape)
        theirs.grad = ours.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    assert (ours - theirs).norm() < 0.02 * (ours - 1).norm()


@pytest.mark.parametrize("loud, dtype", [(False, "float32"), (True, "float64")])
def test_two_processes_compute_what_one_computes(loud, dtype, data_dir, tmp_path):
    """loud: with saliences so large that claims are pulled back, at a loss above 100."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    run(*flags(data_dir, tmp_path / "one", max_iters=1, dtype=dtype, claim_noise=0))
    checkpoint = weights(tmp_path / "one")
    for name, weight in checkpoint["model"].items() if loud else ():
        if name.endswith("salience"):
            weight.copy_(torch.linspace(-1, 1, len(weight)))
    for name, launcher in ("one", []), ("two", ["torch.distributed.run", "--nproc_per_node=2"]):
        (tmp_path / name).mkdir(exist_ok=True)
        torch.save({**checkpoint, "log_size": 0}, tmp_path / name / "ckpt.pt")
        (tmp_path / name / "log.jsonl").touch()
        launcher = ["-m", launcher[0], "--standalone", *launcher[1:]] if launcher else []
        command = [sys.executable, *launcher, str(ROOT / "train.py"), "--init_from=resume",
                   f"--out_dir={tmp_path / name}", "--max_iters=6", "--device=cpu"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=150, env=environment)
        assert done.returncode == 0, done.stderr
    assert apart(tmp_path / "one", tmp_path / "two") < 1e-6
    assert losses(tmp_path / "one") == pytest.approx(losses(tmp_path / "two"), abs=1e-5)
    one, two = (results(tmp_path / name)["results"] for name in ("one", "two"))
    assert [(r["n"], r["fact_chunks"]) for r in one] == [(r["n"], r["fact_chunks"]) for r in two]


def test_interrupt_leaves_a_checkpoint_and_says_how_to_go_on(data_dir, tmp_path):
    command = [sys.executable, str(ROOT / "train.py"), *flags(data_dir, tmp_path, max_iters=100000)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for line in process.stdout:
        if "step" in line:
            process.send_signal(2)
            break
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "--init_from=resume" in out and "Traceback" not in err
    assert weights(tmp_path)["iter_num"] > 0
    before = signal.getsignal(signal.SIGINT)
    run(*flags(data_dir, tmp_path / "whole", max_iters=1))
    assert signal.getsignal(signal.SIGINT) is before  # ctrl-C works again, in the final table too


def test_batch_marks_answers_and_ignores_padding(data_dir, monkeypatch):
    data = babilong.load_data(data_dir, 32)[0]
    args, _ = train.parse_args(flags(data_dir, "unused", tasks="qa1,qa8"))
    running = np.zeros(2)
    idx, targets, answer, first = train.get_batch(data, args, 0, 2, True, running)
    assert idx.shape == targets.shape == answer.shape == first.shape == (4, 64)
    there = targets[:, :-1] >= 0
    assert torch.equal(targets[:, :-1][there], idx[:, 1:][there]) and (targets[:, -1] == -1).all()
    assert not (targets == data.newline).any()
    for row in range(4):
        text = data.encoding.decode(targets[row][answer[row]].tolist())
        assert re.fullmatch(r"( (\w+|\w+, \w+|\w+, \w+, \w+)\.)+", text)
        begins = first[row][first[row] >= 0].tolist()
        assert len(begins) == text.count(".") and len(set(begins)) == 1
        assert begins[0] == (not set(re.findall(r"\w+", text)) <= set(babilong.PLACES))
    monkeypatch.setattr(train, "WORLD", 2)
    halves = []
    for rank in 0, 1:
        monkeypatch.setattr(train, "RANK", rank)
        halves.append(train.get_batch(data, args, 0, 2, True, running))
    for part, two in zip((idx, targets, answer, first), zip(*halves)):
        assert torch.equal(part, torch.stack(two, dim=1).flatten(0, 1))


def test_tasks_are_drawn_by_their_errors(data_dir):
    data = babilong.load_data(data_dir, 32)[0]
    args, _ = train.parse_args(flags(data_dir, "unused", tasks="qa1,qa6", batch_size=40))
    for running, share in ([0.0, 0.0], 1 / 2), ([1.0, 0.1], 1 / 11):
        kinds = [train.get_batch(data, args, it, 1, False, np.array(running))[3].amax(dim=1) for it in range(25)]
        kinds = torch.cat(kinds)  # 1,000 samples
        assert set(kinds.tolist()) == {0, 1} and abs((kinds == 0).float().mean() - share) < 0.06


def test_short_texts_have_no_haystack(data_dir, tmp_path, monkeypatch):
    seen, get_batch = [], train.get_batch
    monkeypatch.setattr(train, "get_batch", lambda *args: seen.append(args[2:5]) or get_batch(*args))
    run(*flags(data_dir, tmp_path, short_texts=0.5, curriculum="8", stage_accuracy=1, stage_iters=4, max_iters=34))
    assert all(call == (it, 1, False) for it, call in enumerate(seen[1:5])) and len(seen) == 35
    # from now on up to 8 segments, less than 5 where there is no haystack
    assert {s for _, s, noise in seen[5:] if not noise} > {1, 4} and max(s for _, s, noise in seen if noise) == 8
    assert 0.3 < np.mean([s < 5 and not noise for _, s, noise in seen[5:]]) < 0.8


def test_a_stage_ends_at_its_limit(data_dir, tmp_path):
    run(*flags(data_dir, tmp_path, stage_accuracy=1.0, stage_iters=3))
    assert [(row["iter"], row["stage"]) for row in log(tmp_path) if "stage" in row] == [(3, 1), (6, 2)]


@pytest.mark.parametrize("device, index", [("cuda", 0), ("cuda:1", 1)])
def test_a_gpu_without_a_number_is_the_first(device, index, data_dir, tmp_path, monkeypatch):
    """torch.cuda.set_device takes no torch.device("cuda"): seen with its own check, without a GPU."""
    used = []
    monkeypatch.setattr(train, "pick_device", torch.device)
    monkeypatch.setattr(train, "get_data", lambda *args: used[99])  # no further
    monkeypatch.setattr(torch.cuda, "set_device", lambda d: used.append(_get_device_index(d)))
    with pytest.raises(IndexError):
        run(*flags(data_dir, tmp_path), f"--device={device}")
    assert used == [index]


def test_without_a_compiler_it_says_so(capsys, monkeypatch):
    def compiled(*args):
        raise RuntimeError("no compiler\nhere")

    monkeypatch.setattr("torch.compile", lambda function: compiled)
    model = train.build(train.LM2Config(32, 50, 1, 2, n_embd=16))
    train.compile_blocks(model, must=False)
    assert "no compiler here" in capsys.readouterr().out
    assert model.blocks[0]._compiled_call_impl is None
    with pytest.raises(ValueError, match="--compile=on does not work here"):
        train.compile_blocks(model, must=True)


def test_another_rule_from_the_command_line(data_dir, tmp_path):
    command = [sys.executable, str(ROOT / "tests" / "variants.py"), "mean", *flags(data_dir, tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    row = results(tmp_path)["results"][-1]  # every chunk is written
    assert row["fact_chunks"][1] == row["fact_chunks"][0] > 0 < row["haystack_chunks"][1]


# ----------------------------------------------------------------------------- evaluation

class Oracle:
    """Stands in for a model of qa1: answers from all that it has read, or from the last segment."""

    def __init__(self, data, forgets=False):
        self.data, self.forgets, self.texts, self.seen = data, forgets, [], []
        self.embed, self.config = torch.nn.Embedding(2**16, 1), train.LM2Config(data.block_size)
        self.embed.weight.data.copy_(torch.arange(2**16)[:, None])

    def initial_memory(self, batch_size):
        return torch.zeros(1, batch_size, 1, 1)

    def segments(self, x, memory):
        """Keeps texts; the memory names them, from 1."""
        for row in range(len(x)):
            kept = self.texts[int(memory[0, row]) - 1] if memory[0, row] else []
            self.texts.append(kept + x[row].flatten().int().tolist())
        return x, 1.0 + torch.arange(len(self.texts) - len(x), len(self.texts)).view(1, -1, 1, 1), None

    def generate(self, idx, max_new_tokens, temperature, state):
        answers, verbs = [], "moved|went back|went|journeyed|travelled"
        self.seen.append(state[0].flatten().int().tolist())
        for row, kept in zip(idx.tolist(), self.seen[-1]):
            before = self.texts[kept - 1] if kept and not self.forgets else []
            text = self.data.encoding.decode(before + row)
            facts = re.findall(rf"(?:Mary|John|Sandra|Daniel) (?:{verbs}) to the \w+\.", text)
            try:
                answer = expected("qa1", list(enumerate(facts)), re.search(r"(Where is \w+\?)$", text)[1])[0]
            except LookupError:
                answer = "nowhere"
            answers.append((self.data.encode(f" {answer}.") + (self.data.newline,) * 9)[:max_new_tokens])
        return torch.cat((idx, torch.tensor(answers)), dim=1), state


def test_evaluation_scores_a_perfect_reader_and_a_window_reader(data):
    row = train.evaluate(Oracle(data), data, "qa1", 0, 60, segments=6)
    assert row["accuracy"] == row["accuracy_outside"] == 100 and row["n"] == 60 and row["tokens"] == 192
    assert 0 < row["n_outside"] < 60
    window = train.evaluate(Oracle(data, forgets=True), data, "qa1", 0, 60, segments=6)
    assert window["accuracy_outside"] < 30 < window["accuracy"] < 100
    assert train.evaluate(Oracle(data), data, "qa1", 0, 30, length="0k")["accuracy"] == 100


def test_retrieval_gives_a_window_reader_what_the_question_names(data):
    """qa1's facts name the person asked about, the haystack does not: a segment is enough."""
    row = train.evaluate(Oracle(data, forgets=True), data, "qa1", 0, 60, retrieve=4, segments=6)
    less = train.evaluate(Oracle(data, forgets=True), data, "qa1", 0, 60, retrieve=1, segments=6)
    assert row["accuracy_outside"] > 90 and row["tokens"] == 192 and less["accuracy"] < row["accuracy"]


def test_interventions_change_the_memory_and_nothing_else(data):
    for intervention, memories in ("none", [1, 2, 3, 4]), ("reset", [0] * 4), ("swap", [4, 1, 2, 3]):
        oracle = Oracle(data)
        row = train.evaluate(oracle, data, "qa1", 0, 4, intervention, segments=3)
        assert oracle.seen == [memories] and row["n"] == 4
    assert train.evaluate(Oracle(data), data, "qa1", 0, 1, "swap", segments=3)["n"] == 0  # with nobody


def test_shares_are_those_of_facts_and_of_haystack():
    rows = [{"fact_chunks": [10, 9, 0], "haystack_chunks": [100, 50, 1]}] * 2
    assert train.shares(rows) == "chunks written, of facts / of the haystack, in % by block: 90/50.0 0/1.0"
    assert train.shares([{"fact_chunks": [0], "haystack_chunks": [0]}]) == ""


def test_facts_are_counted_by_their_need(data):
    class Model(Oracle):
        """Block 1 writes every chunk, block 2 those with the token " garden"."""

        def segments(self, x, memory):
            garden = (x[..., 0].int() == data.encode(" garden")[0]).unflatten(-1, (-1, 4)).any(dim=-1)
            return x, memory, torch.stack((torch.ones_like(garden), garden)).float()

        def initial_memory(self, batch_size):
            return torch.zeros(2, batch_size, 1, 1)

    samples = [data.sample("qa1", 0, i, segments=6) for i in range(40)]
    needed, others, hay = sum(facts.count(Model(data), s) for s in samples)
    # a chunk on the border of two facts counts for both
    told = [(i in s.support, " garden" in data.encoding.decode(s.tokens[a // 4 * 4 : -(-b // 4) * 4]))
            for s in samples for i, (a, b) in s.facts.items() if b <= 5 * 32]
    for row, need in (needed, True), (others, False):
        gardens = [garden for kind, garden in told if kind == need]
        assert row.tolist() == [len(gardens), len(gardens), sum(gardens)] and 0 < row[2] < row[1]
    assert hay[0] == hay[1] > 500 and hay[2] == 0
    assert facts.count(Model(data), data.sample("qa1", 0, 0, segments=1)).sum() == 0


def test_guessing_without_the_story(data_dir):
    training, held_out, _ = babilong.load_data(data_dir, 32)
    places, switch = training.guess(held_out, "qa1"), training.guess(held_out, "qa9")
    assert 10 < places["majority"] < 30 and 55 < switch["majority"] < 75


def test_perplexity_of_a_model_that_knows_nothing_is_its_vocabulary(data):
    config = train.LM2Config(32, data.encoding.n_vocab, 1, 2, n_embd=16, tie_embeddings=False)
    model = train.build(config).eval()
    text = train.perplexity(model, data, 2)
    assert text["perplexity"] == pytest.approx(data.encoding.n_vocab, rel=1e-4)
    assert text["tokens"] % 64 == 0 and train.perplexity(model, data, 10**6) is None
    torch.nn.init.normal_(model.head.weight, std=1e6)
    assert 1e300 < train.perplexity(model, data, 2)["perplexity"] < math.inf


def test_eval_only_repeats_the_table_and_takes_other_data(data_dir, tmp_path, haystack):
    run(*flags(data_dir, tmp_path))
    common = ["--eval_only", f"--out_dir={tmp_path}", "--device=cpu"]
    assert run(*common) == 0 and results(tmp_path)["results"] == results(tmp_path, "eval.json")["results"]
    for threshold, written in (0.01, 1), (0.99, 0):  # all claims are between
        run(*common, f"--claim_threshold={threshold}")
        for row in results(tmp_path, "eval.json")["results"]:
            assert all(n == written * row["fact_chunks"][0] for n in row["fact_chunks"][1:])
    babi = "".join(f"1 Mary went to the {p}.\n2 Where is Mary? \t{p}\t1\n" for p in babilong.PLACES)
    (tmp_path / "qa1_one_test.txt").write_text(babi)
    other = tmp_path / "other.json"
    run(*common, f"--babi_dir={tmp_path}", f"--background={haystack},", f"--results={other}", "--intervention=reset")
    assert json.loads(other.read_text())["config"]["babi_dir"] == str(tmp_path)
    assert other.stat().st_mode == (tmp_path / "eval.json").stat().st_mode
    target = {"input": "Mary went to the office.", "question": "Where is Mary?", "target": "office"}
    (tmp_path / "hub" / "qa1").mkdir(parents=True)
    (tmp_path / "hub" / "qa1" / "0k.json").write_text(json.dumps([target] * 3))
    run(*common, f"--babilong_dir={tmp_path / 'hub'}")
    assert [(r["length"], r["n"]) for r in results(tmp_path, "eval.json")["results"]] == [("0k", 3)]


def test_comparison_folds_seeds_and_keeps_the_rest_apart(data_dir, tmp_path, monkeypatch, capsys):
    for name, seed, kind in ("a1", 1, "lm2"), ("a2", 2, "lm2"), ("b", 1, "none"):
        run(*flags(data_dir, tmp_path / name, seed=seed, memory_type=kind, max_iters=4, eval_interval=2))
    files = [str(tmp_path / name / "results.json") for name in ("a1", "a2", "b")]

    def table(*args):
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["compare.py", *args])
        compare.main()
        return [[cell.strip() for cell in line.strip("|").split("|")]
                for line in capsys.readouterr().out.splitlines()]

    rows = table(*files)
    assert rows[0] == ["accuracy in %", "a1", "b"] and rows[-1] == ["seeds", "1, 2", "1"]
    a, b, c = (results(Path(file).parent)["results"][1]["accuracy"] for file in files)
    p = (c / 10 + 2) / 14  # of ten answers
    interval = f"{c:.1f} ± {196 * (p * (1 - p) / 14) ** 0.5:.1f}"
    assert rows[2] == ["1 seg.", f"{(a + b) / 2:.1f} ({min(a, b):.1f}–{max(a, b):.1f})", interval]
    assert table("--by_task", files[2])[2] == ["1 seg.", interval, interval]
    run("--eval_only", f"--out_dir={tmp_path / 'b'}", "--device=cpu", "--eval_segments=3", "--eval_samples=4")
    rows = table(files[2], str(tmp_path / "b" / "eval.json"))
    assert rows[0] == ["accuracy in %", "b"]  # one run, of which another row is known now
    assert {"1 seg.", "2 seg.", "3 seg."} <= {size for size, *_ in rows}
    for flag, texts in ("plot", {"a1", "b", "1 seg.", "2 seg."}), ("curves", {"1 seg.", "training loss"}):
        table(f"--{flag}={tmp_path / 'x.svg'}", *files)
        tree = ElementTree.parse(tmp_path / "x.svg")
        assert texts <= {e.text for e in tree.iter("{http://www.w3.org/2000/svg}text")}
    (tmp_path / "bad.json").write_text("[]")
    command = [sys.executable, compare.__file__, str(tmp_path / "bad.json")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1
    assert "bad.json is not a results.json" in done.stderr


# ----------------------------------------------------------------------------- Llama, plain text

def test_memory_is_grafted_onto_a_llama_and_trained(data_dir, tmp_path, capsys):
    llama_folder(tmp_path / "llama", vocab_size=750)
    common = dict(init_from=tmp_path / "llama", n_head=4, max_iters=3, eval_segments="1")
    theirs = train.load_llama(tmp_path / "llama").state_dict()
    run(*flags(data_dir, tmp_path / "out", **common), "--freeze_decoder")
    trained = weights(tmp_path / "out")["model"]
    assert torch.equal(trained["blocks.1.mlp.w2.weight"], theirs["blocks.1.mlp.w2.weight"])
    assert trained["blocks.0.memory.wv.weight"].abs().sum() > 0 and len(trained["embed.weight"]) < 750
    run("--init_from=resume", f"--out_dir={tmp_path / 'out'}", "--max_iters=5")
    assert torch.equal(weights(tmp_path / "out")["model"]["embed.weight"], trained["embed.weight"])
    run(*flags(data_dir, tmp_path / "free", **common))
    free = weights(tmp_path / "free")["model"]
    assert not torch.equal(free["embed.weight"], trained["embed.weight"])
    for extra, complaint in (("--n_layer=3", "--n_layer=3, but"), ("--qk_norm", "--qk_norm=True, but"),
                             ("--init_from=resum", "is not scratch, resume or a folder"),
                             (f"--init_from={data_dir}", "config.json is not a Llama's")):
        with pytest.raises(SystemExit) as e:
            train.parse_args([*flags(data_dir, tmp_path / "x", **common), extra])
        assert e.value.code == 2 and complaint in capsys.readouterr().err
    llama_folder(tmp_path / "llama", vocab_size=900)
    with pytest.raises(ValueError, match="is not in the tokens of"):
        run(*flags(data_dir, tmp_path / "x", **common))
    llama_folder(tmp_path / "llama")
    with pytest.raises(ValueError, match="has 50 tokens, the text"):
        run(*flags(data_dir, tmp_path / "y", **common))


def test_running_accuracies_stay_with_their_tasks(data_dir, tmp_path, monkeypatch):
    run(*flags(data_dir, tmp_path, tasks="qa1,qa6", max_iters=2))
    kept, seen, get_batch = weights(tmp_path), [], train.get_batch
    torch.save({**kept, "running": [0.5, 0.25]}, tmp_path / "ckpt.pt")
    monkeypatch.setattr(train, "get_batch", lambda *args: seen.append(args[5].tolist()) or get_batch(*args))
    run("--init_from=resume", f"--out_dir={tmp_path}", "--tasks=qa6,qa2", "--max_iters=3")
    assert seen == [[0.25, 0.0]]


def test_presets_are_what_no_flag_says():
    args, _ = train.parse_args(["--preset=lm2-1.7b", "--n_layer=4"])
    config = train.model_config(args, 128256)
    assert (config.n_layer, config.n_embd, config.n_kv_head, config.memory_slots) == (4, 2048, 8, 2048)
    assert config.intermediate_size == 8192 and config.tie_embeddings and not config.qk_norm


def test_plain_text_is_learned_and_sampled_as_it_is(data_dir, tmp_path, capsys):
    (tmp_path / "texts").mkdir()
    for name, line in ("a", "one two three\n"), ("b", "four five six\n"):
        (tmp_path / "texts" / f"{name}.txt").write_text(line * 300)
    run(*flags(data_dir, tmp_path / "out", data=tmp_path / "texts", max_iters=60, eval_interval=30,
               curriculum="2", learning_rate=0.01, eval_segments="1,2,99"))
    found = re.findall(r"^perplexity of held-out text, (\d+) segments at a time: ([\d.]+)",
                       capsys.readouterr().out, re.M)
    assert [s for s, _ in found] == ["1", "2"] and float(found[1][1]) < 3  # no text has 99 segments
    assert len(results(tmp_path / "out")["perplexities"]) == 2 and results(tmp_path / "out")["results"] == []
    sample.main(sample.get_parser().parse_args([
        f"--out_dir={tmp_path / 'out'}", "--start=one two three\none two", "--temperature=0",
        "--max_new_tokens=12"]))
    assert capsys.readouterr().out.startswith("one two three\none two three\none two three\none two")
    small = dict(data=tmp_path / "texts", block_size=1, curriculum="1,2")
    run(*flags(data_dir, tmp_path / "one", **small), "--chunk_size=1")
    texts = results(tmp_path / "one")["perplexities"]
    assert [text["segments"] for text in texts] == [2]  # one token has nothing to predict
    (tmp_path / "texts" / "a.txt").write_text("other text " * 300)
    with pytest.raises(ValueError, match="is not what the model in"):
        run("--init_from=resume", f"--out_dir={tmp_path / 'out'}", "--max_iters=152")


def test_samples_of_text_stay_within_a_document(encoding):
    texts = [f"{c} " * n for c, n in (("a", 500), ("b", 40), ("c", 3))]
    documents, seen = babilong.Documents(encoding, texts, block_size=8), set()
    for i in range(300):
        sample = documents.sample(None, 1, i, segments=4)
        text = encoding.decode(sample.tokens[: sample.prompt].tolist())
        assert len(sample.tokens) == 32 and len(set(text.split())) == 1 and not sample.answers
        seen.add(text.strip()[0])
    assert seen == set("abc") and documents.digest() != babilong.Documents(encoding, texts[:2], 8).digest()
    args, _ = train.parse_args(["--data=x", "--batch_size=512", "--out_dir=nowhere"])
    targets = train.get_batch(documents, args, 0, 4, False, np.zeros(1))[1]
    for row, i in zip(targets, range(128)):
        assert (row == -1).sum() == 33 - documents.sample(None, 1337, f"0.{i}", segments=4).prompt


def test_text_that_is_none(data_dir, tmp_path):
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "short.txt").write_text("ab")
    for name, complaint in ("empty.txt", "holds no text"), ("nowhere", "nowhere"), ("short.txt", "too short"):
        with pytest.raises((ValueError, OSError), match=complaint):
            run(*flags(data_dir, tmp_path / "out", data=tmp_path / name))


# ----------------------------------------------------------------------------- what cannot work

@pytest.mark.parametrize("flag, word", [
    ("--n_layer=zero", "--n_layer"), ("--n_layer=0", "from 1 to 1000"), ("--learning_rate=nan", "--learning_rate"),
    ("--beta2=1.5", "from 0"), ("--memory_slots=-1", "--memory_slots"), ("--memory_type=lstm", "--memory_type"),
    ("--n_lay=3", "--n_lay"), ("--tasks=qa11", "--tasks"), ("--curriculum=1,x", "--curriculum"),
    ("--curriculum=", "--curriculum"), ("--eval_lengths=4", "--eval_lengths"), ("--n_head=5", "n_embd"),
    ("--n_kv_head=3", "n_head"), ("--batch_size=4", "--batch_size"), ("--seed=1e3", "--seed"),
    ("--intervention=reset --memory_slots=0", "--intervention"), ("--block_size=30", "block_size"),
    ("--intervention=swap --retrieve=3", "--retrieve"), ("--chunk_size=0", "--chunk_size"),
    ("--claim_threshold=1", "claim_threshold"),
    ("--freeze_decoder --memory_type=none", "--freeze_decoder"), ("--data=x --retrieve=2", "--data"), ("--babi_dir=", "empty"),
    ("--results=.", "--results"), ("--results=nowhere/x.json", "--results"),
    ("--eval_only --out_dir=nowhere", "no checkpoint nowhere/ckpt.pt")])
def test_bad_flags_are_named_in_one_line(flag, word, capsys):
    with pytest.raises(SystemExit) as e:
        train.parse_args(flag.split())
    (line,) = capsys.readouterr().err.splitlines()
    assert e.value.code == 2 and word in line and ": error: " in line


def test_bad_input_ends_with_one_line_and_no_traceback(data_dir, tmp_path, haystack):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "meta.json").write_text("{}")
    command = [sys.executable, str(ROOT / "train.py")]
    for line in flags(tmp_path / "data", tmp_path / "out"), flags(data_dir, tmp_path / "out", device="meta"):
        done = subprocess.run(command + line, capture_output=True, text=True)
        assert done.returncode == 1 and len(done.stderr.strip().splitlines()) == 1, done.stderr
        assert "cannot be used" in done.stderr and not (tmp_path / "out").exists()
    babilong.write_data(tmp_path / "one", ("qa1",), background=[str(haystack)], vocab_size=600, eval_stories=5)
    with pytest.raises(ValueError, match="holds no qa2"):
        run(*flags(tmp_path / "one", tmp_path / "out", tasks="qa1,qa2"))
    with pytest.raises(ValueError, match="no story of qa1 fits"):
        run(*flags(data_dir, tmp_path / "small", block_size=4))
    assert not (tmp_path / "small" / "ckpt.pt").exists()
    late = train.parse_args(flags(data_dir, tmp_path / "two", max_iters=1))
    run(*flags(data_dir, tmp_path / "two", max_iters=2))
    with pytest.raises(ValueError, match="another run has begun"):
        train.main(*late)
    assert weights(tmp_path / "two")["iter_num"] == 2


def test_help_lists_every_flag_with_its_default(capsys):
    with pytest.raises(SystemExit):
        train.parse_args(["-h"])
    text = capsys.readouterr().out
    assert all(f"--{name}" in text for name in ("memory_slots", "curriculum", "eval_only"))
    assert text.count("default:") > 40


def test_nothing_is_drawn_from_global_random_states(data_dir, tmp_path):
    """So there is nothing of numpy's to save: batches depend on the seed and the step alone."""
    np.random.seed(5)
    before = np.random.get_state()[1].tolist()
    run(*flags(data_dir, tmp_path, max_iters=3))
    assert np.random.get_state()[1].tolist() == before
