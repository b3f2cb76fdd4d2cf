"""
Attempts to break it: kills, full disks, foreign and hostile files, senseless flags and texts, ranks that die, numbers that
overflow. The long ones run with: python -m pytest -m slow
"""
import argparse
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import prepare_babilong as babilong
import sample
import train
from model import LM2, LM2Config
from test_train import ROOT, Bomb, flags, log, run, same, weights

slow = pytest.mark.slow
linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs Linux's /proc or limits")


def command(*args, launcher=()):
    return [sys.executable, *launcher, str(ROOT / "train.py"), *args]


def start(args, threads=1, **kwargs):
    return subprocess.Popen(args, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            env={**os.environ, "OMP_NUM_THREADS": str(threads)}, **kwargs)


def finish(process, timeout=150):
    out, err = process.communicate(timeout=timeout)
    return process.returncode, out, err


# ----------------------------------------------------------------------------- kill -9 and resume

@pytest.mark.parametrize("kills", [3, pytest.param(30, marks=slow)])
def test_killed_runs_end_as_if_nothing_had_been(kills, data_dir, tmp_path):
    rng, interval, most = random.Random(kills), 5, 40 * kills
    common = dict(max_iters=most, checkpoint_interval=interval, eval_samples=2, eval_segments="1", stage_accuracy=0.9, stage_iters=9)
    whole = start(command(*flags(data_dir, tmp_path / "whole", **common)))
    code, _, err = finish(whole)
    assert code == 0, err
    args, done = flags(data_dir, tmp_path / "cut", **common), 0
    while True:
        process, checkpoint = start(command(*args)), tmp_path / "cut" / "ckpt.pt"
        if done < kills:
            # a random moment of the training, or the moment in which a checkpoint is being written
            begun = len(log(tmp_path / "cut")) if checkpoint.exists() else 0
            while process.poll() is None and not (checkpoint.exists() and len(log(tmp_path / "cut")) > begun + rng.randrange(12)):
                time.sleep(0.002)
            while done % 2 and process.poll() is None and not checkpoint.with_name("ckpt.pt.tmp").exists():
                pass
            process.kill()
        code, out, err = finish(process)
        if code == 0:
            break
        assert code == -signal.SIGKILL, err
        done += 1
        assert log(tmp_path / "cut")[-1]["iter"] - weights(tmp_path / "cut")["iter_num"] <= interval
        args = ["--init_from=resume", f"--out_dir={tmp_path / 'cut'}", "--device=cpu", "--log_interval=1", "--eval_interval=0",
                "--eval_samples=2", "--eval_segments=1", "--eval_lengths=", f"--checkpoint_interval={interval}"]
    assert done == kills
    whole, cut = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert whole.keys() == cut.keys()
    for key in whole.keys() - {"args", "log_size"}:  # the path of out_dir is part of neither; times differ in length
        assert same(whole[key], cut[key]), key
    assert log(tmp_path / "whole") == log(tmp_path / "cut")


def test_nothing_is_drawn_from_global_random_states(data_dir, tmp_path):
    """So there is nothing of Python's or numpy's to save: batches depend on the seed and the step alone."""
    random.seed(5)
    np.random.seed(5)
    before = random.getstate(), np.random.get_state()[1].tolist()
    run(*flags(data_dir, tmp_path, max_iters=3))
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before


def test_resume_refuses_a_shorter_curriculum_and_other_optimizers(data_dir, tmp_path, capsys):
    run(*flags(data_dir, tmp_path, max_iters=4))
    with pytest.raises(SystemExit):
        run("--init_from=resume", f"--out_dir={tmp_path}", "--curriculum=1")
    assert "--curriculum has 1 stages, but the checkpoint is in stage 2" in capsys.readouterr().err
    with pytest.raises(ValueError, match="--muon_lr cannot become zero"):
        run("--init_from=resume", f"--out_dir={tmp_path}", "--muon_lr=0", "--max_iters=8")


# ----------------------------------------------------------------------------- data parallel

def torchrun(n, *args):
    return command(*args, launcher=("-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n}"))


def assert_equal_runs(a, b):
    a_weights, b_weights = weights(a)["model"], weights(b)["model"]
    assert max((a_weights[k] - b_weights[k]).abs().max().item() for k in a_weights) < 1e-5
    losses = [[row["loss"] for row in log(folder)] for folder in (a, b)]
    assert len(losses[0]) == len(losses[1]) and losses[0] == pytest.approx(losses[1], abs=1e-5)
    results = [json.loads((folder / "results.json").read_text())["results"] for folder in (a, b)]
    assert results[0] == results[1]


FLOAT64 = dict(muon_lr=0, max_iters=50, dtype="float64", batch_size=8, stage_accuracy=1.0, stage_iters=15)


@slow
@pytest.mark.parametrize("n", [2, 4])
def test_processes_compute_what_one_computes(n, data_dir, tmp_path):
    """AdamW, 50 steps; the first stages have batches of one segment, which leave the memory's write without gradient."""
    for name, line in (("one", command), ("many", lambda *args: torchrun(n, *args))):
        code, _, err = finish(start(line(*flags(data_dir, tmp_path / name, **FLOAT64))))
        assert code == 0, err
    assert_equal_runs(tmp_path / "one", tmp_path / "many")


@slow
def test_two_groups_stand_for_two_machines(data_dir, tmp_path, haystack):
    shutil.copytree(data_dir, tmp_path / "own")  # the second machine has a disk of its own
    babilong.write_data(tmp_path / "other", background=[str(haystack)], vocab_size=650, eval_stories=5)
    for port, folders, works in ((29611, (data_dir, tmp_path / "own"), True), (29612, (data_dir, tmp_path / "other"), False)):
        group = [start(command(*flags(folder, tmp_path / "two", **FLOAT64), launcher=(
            "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1", f"--node_rank={rank}", "--master_addr=127.0.0.1",
            f"--master_port={port}"))) for rank, folder in enumerate(folders)]
        ends = [finish(process) for process in group]
        if works:
            assert [code for code, _, _ in ends] == [0, 0], ends
            assert finish(start(command(*flags(data_dir, tmp_path / "one", **FLOAT64))))[0] == 0
            assert_equal_runs(tmp_path / "one", tmp_path / "two")
        else:
            assert all(code != 0 and "the processes have different data" in err for code, _, err in ends)


@slow
@linux
def test_a_rank_that_dies_ends_the_job(data_dir, tmp_path):
    job = start(torchrun(2, *flags(data_dir, tmp_path, max_iters=10**6)))
    while not (tmp_path / "log.jsonl").exists() or len(log(tmp_path)) < 5:
        assert job.poll() is None
        time.sleep(0.1)
    workers = [int(p.name) for p in Path("/proc").iterdir() if p.name.isdigit() and _parent(p) == job.pid]
    os.kill(max(workers), signal.SIGKILL)
    begun = time.time()
    code, _, err = finish(job, timeout=60)
    assert code != 0 and "another process has ended" in err and time.time() - begun < 60
    assert weights(tmp_path)["iter_num"] >= 0


@slow
@linux
def test_no_thread_outlives_the_process_group(data_dir, tmp_path):
    """One that did could need the interpreter when that is gone: the process would abort, with all its work done."""
    (tmp_path / "run.py").write_text(f"""import sys
from pathlib import Path
sys.path.insert(0, {str(ROOT)!r})
import train
train.main(*train.parse_args())
print(*[f"still {{p.read_text().strip()}}" for p in Path("/proc/self/task").glob("*/comm")])
""")
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(tmp_path / "run.py")]
    code, out, err = finish(start(line + flags(data_dir, tmp_path / "out", max_iters=3)))
    assert code == 0, err
    assert "still" in out and "gloo" not in out


def _parent(process):
    try:
        return int((process / "stat").read_text().rsplit(")", 1)[1].split()[1])
    except OSError:
        return None


# ----------------------------------------------------------------------------- checkpoints

@pytest.fixture(scope="module")
def trained(data_dir, tmp_path_factory):
    path = tmp_path_factory.mktemp("trained")
    run(*flags(data_dir, path, max_iters=4, checkpoint_interval=2, eval_segments="1", eval_samples=2))
    return path


def _damaged(kind, path, whole):
    checkpoint = torch.load(path, weights_only=True)
    if kind in ("empty", "zeros", "truncated", "flipped"):
        half = len(whole) // 2
        path.write_bytes({"empty": b"", "zeros": bytes(4096), "truncated": whole[:half], "flipped": whole[:900] + b"\0" * 64 + whole[964:]}[kind])
    else:
        other = {"callable": {**checkpoint, "model": Bomb()}, "number": 5, "list": [1], "foreign": {"model": {}, "epoch": 3},
                 "version": {**checkpoint, "format": 2}, "lacks": {k: v for k, v in checkpoint.items() if k != "rng"},
                 "kinds": {**checkpoint, "optimizers": 5}, "weights": {**checkpoint, "model": {}},
                 "config": {**checkpoint, "config": {"n_layer": "two"}}, "unknown": {**checkpoint, "config": {**checkpoint["config"], "moe": 1}},
                 "tokenizer": {**checkpoint, "tokenizer": "[]"}, "shape": {**checkpoint, "model": {**checkpoint["model"], "norm.weight": torch.ones(3)}}}
        torch.save(other[kind], path)


@pytest.mark.parametrize("kind", ["empty", "zeros", "truncated", "flipped", "callable", "number", "list", "foreign", "version", "lacks", "kinds",
                                  "weights", "config", "unknown", "tokenizer", "shape"])
def test_bad_checkpoints_get_one_line_and_run_nothing(kind, trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(trained, "out")
    path, whole = Path("out/ckpt.pt"), Path("out/ckpt.pt").read_bytes()
    _damaged(kind, path, whole)
    left = path.read_bytes()
    for attempt in (lambda: run("--eval_only", "--out_dir=out", "--eval_segments=1", "--eval_samples=2", "--eval_lengths=", "--device=cpu"),
                    lambda: run("--init_from=resume", "--out_dir=out", "--max_iters=6", "--device=cpu"),
                    lambda: sample.main(sample.get_parser().parse_args(["--out_dir=out", "--device=cpu"]))):
        with pytest.raises((ValueError, SystemExit)) as e:
            attempt()
        assert "\n" not in str(e.value).strip()
        if isinstance(e.value, ValueError) and kind not in ("weights", "config", "unknown", "tokenizer", "shape"):
            assert "out/ckpt.pt is not a checkpoint" in str(e.value) and "out/ckpt.previous.pt: copy it" in str(e.value)
    assert path.read_bytes() == left and not Path("exploded").exists()
    os.replace("out/ckpt.previous.pt", path)  # as the line advises
    assert weights("out")["iter_num"] == 2
    run("--init_from=resume", "--out_dir=out", "--device=cpu", "--eval_segments=1", "--eval_samples=2", "--eval_lengths=")
    assert same(weights("out")["model"], weights(trained)["model"])


# ----------------------------------------------------------------------------- data and disks

def _small_files(limit):
    import resource
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))


@linux
def test_full_disk_keeps_the_checkpoint(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "out")
    before = weights(tmp_path / "out")
    code, _, err = finish(start(command("--init_from=resume", f"--out_dir={tmp_path / 'out'}", "--max_iters=8", "--device=cpu"),
                                preexec_fn=_small_files(20_000)))
    assert code == 1 and len(err.strip().splitlines()) == 1 and "ckpt.pt cannot be written" in err, err
    assert same(before, weights(tmp_path / "out")) and not (tmp_path / "out" / "ckpt.pt.tmp").exists()


@linux
def test_full_disk_leaves_no_half_data(tmp_path, haystack):
    line = [sys.executable, str(ROOT / "prepare_babilong.py"), f"--data_dir={tmp_path / 'data'}", f"--background={haystack}", "--tasks=qa1"]
    code, _, err = finish(start(line, preexec_fn=_small_files(20_000)))
    assert code == 1 and len(err.strip().splitlines()) == 1 and list(tmp_path.iterdir()) == [], err
    assert finish(start(line))[0] == 0 and babilong.load_data(tmp_path / "data", 32)


@pytest.mark.skipif(hasattr(os, "geteuid") and os.geteuid() == 0, reason="root may write everywhere")
def test_missing_permission_is_one_line(data_dir, tmp_path):
    tmp_path.chmod(0o500)
    code, _, err = finish(start(command(*flags(data_dir, tmp_path / "out"))))
    assert code == 1 and len(err.strip().splitlines()) == 1 and "Permission denied" in err


@pytest.mark.parametrize("content, complaint", [(b"", "holds no text"), (bytes(range(256)) * 40, "not text in UTF-8"), (b"\0" * 5000, "usable sentences")])
def test_background_that_is_none(content, complaint, tmp_path):
    (tmp_path / "book.txt").write_bytes(content)
    with pytest.raises(ValueError, match=complaint):
        babilong.write_data(tmp_path / "data", ("qa1",), background=[str(tmp_path / "book.txt")])
    assert [p.name for p in tmp_path.iterdir()] == ["book.txt"]


def test_killed_preparation_is_made_good(tmp_path, haystack):
    line = [sys.executable, str(ROOT / "prepare_babilong.py"), f"--data_dir={tmp_path / 'data'}", f"--background={haystack}", "--tasks=qa1,qa2"]
    process = start(line)
    while process.poll() is None and not any(tmp_path.iterdir()):
        time.sleep(0.001)
    process.kill()
    finish(process)
    assert not (tmp_path / "data").exists() or babilong.load_data(tmp_path / "data", 32)
    assert finish(start(line))[0] == 0 and babilong.load_data(tmp_path / "data", 32)


def test_tokenizer_of_other_data_is_noticed(trained, tmp_path, haystack):
    babilong.write_data(tmp_path / "data", ("qa1",), background=[str(haystack)], vocab_size=600, eval_stories=5)
    with pytest.raises(ValueError, match="another tokenizer than the checkpoint"):
        run("--eval_only", f"--out_dir={trained}", f"--data_dir={tmp_path / 'data'}", "--device=cpu")


# ----------------------------------------------------------------------------- flags

ACTIONS = [a for a in train.get_parser()._actions if a.dest != "help"]
SENSELESS = ["", "x", "-1", "0", "1", "2", "7", "0.5", "1e400", "nan", "-inf", "9" * 30, "1_000", " 4", "٣", "1,2", ",", "4k", "9M", "None", "qa1", "on", "\ud800"]


def refused(capsys, call):
    """What a call complains of, or None if it works. Anything but one clean line is a failure."""
    try:
        call()
    except SystemExit as e:
        assert e.code in (2, 130) or isinstance(e.code, str)
        (line,) = capsys.readouterr().err.splitlines()
        assert ": error: " in line and "Traceback" not in line
        return line
    except (ValueError, OSError) as e:  # what train.py prints as one line
        assert str(e) and "\n" not in str(e)
        return str(e)


TYPED = [(program, a) for program in (train, sample, babilong) for a in program.get_parser()._actions if a.type]


@pytest.mark.parametrize("program, action", TYPED, ids=lambda x: getattr(x, "dest", None) or x.__name__)
def test_every_flag_names_itself_and_its_range(program, action, capsys):
    complaints, parse = 0, train.parse_args if program is train else program.get_parser().parse_args
    for value in SENSELESS:
        line = refused(capsys, lambda: parse([f"{action.option_strings[0]}={value}"]))
        complaints += line is not None
        assert line is None or re.search(rf"\b{action.dest}\b", line), (value, line)
        assert line is None or re.search(r"from .* (to|on)|must|a length is|stands? |needs|too", line), (value, line)
    assert complaints > 3


@pytest.mark.parametrize("n", [60, pytest.param(500, marks=slow)])
def test_random_flags_work_or_are_refused_in_one_line(n, data_dir, tmp_path, monkeypatch, capsys):
    """Parsing and all of the set-up; on a machine that would have 64 MB, so that what fits is small."""
    monkeypatch.setattr(train, "train", lambda *args: False)
    monkeypatch.setattr(train, "evaluate", lambda *args, **kwargs: pytest.fail("evaluated without a checkpoint"))
    monkeypatch.setattr(os, "sysconf", lambda name: {"SC_PAGE_SIZE": 2**10, "SC_PHYS_PAGES": 2**16}[name])
    monkeypatch.chdir(tmp_path)
    rng, outcomes = random.Random(0), []
    for i in range(n):
        line = [f"--data_dir={data_dir}", "--device=cpu", f"--out_dir={tmp_path / str(i)}"]
        for action in rng.sample(ACTIONS, rng.randint(1, 6)):
            if action.dest in ("out_dir", "data_dir"):
                continue
            value = rng.choice([*SENSELESS, *map(str, action.choices or ()), *[action.default] * 8])
            if value is None:
                continue  # the default: not given
            line.append(action.option_strings[0] + ("" if action.nargs == 0 else f"={value}"))
        message = refused(capsys, lambda: train.main(*train.parse_args(line)))
        capsys.readouterr()
        outcomes.append(message)
        assert message is None or len(message) < 500, message
    assert 0.05 < sum(message is None for message in outcomes) / n < 0.9


def test_a_model_too_large_for_the_machine_is_refused_before_it_is_made(data_dir, tmp_path):
    with pytest.raises(ValueError, match="the model, [0-9,]+ parameters .*, needs [0-9]+ GiB and cpu has"):
        run(*flags(data_dir, tmp_path / "out", n_embd=2**16, n_layer=20))
    assert not (tmp_path / "out").exists()


# ----------------------------------------------------------------------------- text

TEXTS = ["", " ", "\n\n", "\0", "a\0b", "<|endoftext|> <|im_start|> <s> [INST]", "naïve 漢字 🙂 \u202e\ufeff", "a" * 300_000, " " * 300_000,
         "word " * 60_000, "é" * 50_000, "\r\n\t\v\f\x1c", "?" * 10_000]


@pytest.mark.parametrize("text", TEXTS, ids=lambda t: repr(t[:12]))
def test_any_text_is_text(text, encoding):
    ids = encoding.encode_ordinary(text)
    assert encoding.decode(ids) == text and encoding.special_tokens_set == set() and all(0 <= i < encoding.n_vocab for i in ids)


@pytest.mark.parametrize("text", [t[:3000] for t in TEXTS] + ["Where is Mary?"], ids=lambda t: repr(t[:12]))
def test_sample_reads_any_text(text, trained, capsys):
    args = sample.get_parser().parse_args([f"--out_dir={trained}", "--device=cpu", f"--start={text}", "--max_new_tokens=3", "--answer_tokens=3"])
    if text.strip():
        sample.main(args)
        assert capsys.readouterr().out
    else:
        with pytest.raises(ValueError, match="--start holds no text"):
            sample.main(args)


def test_what_is_no_unicode_is_refused(trained):
    with pytest.raises(ValueError, match="--start is not text in UTF-8"):
        sample.main(sample.get_parser().parse_args([f"--out_dir={trained}", "--start=\udcff"]))


@slow
def test_ten_megabytes_without_a_full_stop(encoding):
    text = "Mary went to the office " * 420_000
    assert len(text) > 10_000_000 and encoding.decode(encoding.encode_ordinary(text)) == text
    config = LM2Config(block_size=2048, vocab_size=encoding.n_vocab, n_layer=1, n_head=1, n_embd=16, memory_slots=4)
    reader = sample.Reader(LM2(config), encoding)
    reader.read(text)
    assert reader.state[0].isfinite().all()


# ----------------------------------------------------------------------------- numbers

def test_numbers_that_overflow_are_named(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "out")
    checkpoint = weights(tmp_path / "out")
    checkpoint["model"]["blocks.1.mlp.w2.weight"][3, 4] = torch.inf
    torch.save(checkpoint, tmp_path / "out" / "ckpt.pt")
    with pytest.raises(ValueError, match=r"at step 4 \(samples 1337/4\) the loss is nan .* first in blocks.1.mlp.w2.weight: .* checkpoint is kept"):
        run("--init_from=resume", f"--out_dir={tmp_path / 'out'}", "--max_iters=8", "--device=cpu")
    assert same(weights(tmp_path / "out"), checkpoint)


def test_culprit_is_where_the_backward_pass_broke():
    model = LM2(LM2Config(block_size=8, vocab_size=40, n_layer=2, n_head=2, n_embd=16, memory_slots=2, tie_embeddings=False))
    assert train.culprit(model) == "no single parameter"
    idx = torch.randint(40, (1, 8))
    model.blocks[1].mlp.w2.register_full_backward_hook(lambda module, grad_in, grad_out: (grad_in[0] * torch.nan,))
    model(idx, idx)[1].backward()
    assert re.fullmatch(r"the gradient of blocks\.1\.mlp\.w[13]\.weight", train.culprit(model))


@slow
def test_memory_stays_finite_in_bfloat16_over_a_million_tokens():
    torch.manual_seed(0)
    model = LM2(LM2Config(block_size=256, vocab_size=512, n_layer=2, n_head=2, n_embd=32, memory_slots=8, qk_norm=True, forget_bias=20.0))
    state = None
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for piece in range(16):
            _, state = model.generate(torch.randint(512, (1, 2**16)), 0, state)
            assert state[0].dtype == torch.float32 and state[0].isfinite().all()
        logits = model(torch.randint(512, (1, 256)), memory=state[0])[0]
    assert logits.isfinite().all()
    for block, M in zip(model.blocks, state[0]):
        q = torch.randn(1, 2, 64, 16)
        assert block.memory.read(q, M, block.attn).isfinite().all()


# ----------------------------------------------------------------------------- determinism

def test_seeds(data_dir, tmp_path):
    """The same seed gives the same figures; another seed other weights and samples, and the same evaluation."""
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        run(*flags(data_dir, tmp_path / name, max_iters=3, seed=seed))
    a, b, c = (weights(tmp_path / name) for name in "abc")
    assert all(same(a[k], b[k]) for k in a.keys() - {"log_size", "args"}) and log(tmp_path / "a") == log(tmp_path / "b")
    moved = [name for name, w in a["model"].items() if not torch.equal(w, c["model"][name])]
    assert len(moved) > 0.8 * len(a["model"]) and log(tmp_path / "a")[-1]["loss"] != log(tmp_path / "c")[-1]["loss"]
    configs = [json.loads((tmp_path / name / "results.json").read_text()) for name in "ac"]
    assert configs[0]["config"]["data_hash"] == configs[1]["config"]["data_hash"] and configs[0]["guesses"] == configs[1]["guesses"]
    assert [(r["n"], r["n_outside"], r["tokens"]) for r in configs[0]["results"]] == [(r["n"], r["n_outside"], r["tokens"]) for r in configs[1]["results"]]
