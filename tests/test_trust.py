"""
Attempts to break it: kills, full disks, foreign and hostile files, senseless flags and texts, ranks
that die. The long ones run with: python -m pytest -m slow
"""
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import prepare_babilong as babilong
import sample
import train
from model import LM2, LM2Config
from test_train import ROOT, flags, log, losses, results, run, same, weights

slow = pytest.mark.slow
linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs Linux's /proc or limits")


def command(*args, launcher=()):
    return [sys.executable, *launcher, str(ROOT / "train.py"), *args]


def start(args, **kwargs):
    return subprocess.Popen(args, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            env={**os.environ, "OMP_NUM_THREADS": "1"}, **kwargs)


def finish(process, timeout=150):
    out, err = process.communicate(timeout=timeout)
    return process.returncode, out, err


# ----------------------------------------------------------------------------- kill -9 and resume

@pytest.mark.parametrize("kills", [3, pytest.param(30, marks=slow)])
def test_killed_runs_end_as_if_nothing_had_been(kills, data_dir, tmp_path):
    rng, interval = random.Random(kills), 5
    common = dict(max_iters=40 * kills, checkpoint_interval=interval, eval_samples=2, eval_segments="1",
                  stage_accuracy=0.9, stage_iters=9)
    code, _, err = finish(start(command(*flags(data_dir, tmp_path / "whole", **common))))
    assert code == 0, err
    args, done, cut = flags(data_dir, tmp_path / "cut", **common), 0, tmp_path / "cut"
    while True:
        process, checkpoint = start(command(*args)), cut / "ckpt.pt"
        if done < kills:
            # a random moment of the training, or the moment in which a checkpoint is being written
            begun, more = len(log(cut)) if checkpoint.exists() else 0, rng.randrange(12)
            while process.poll() is None and not (checkpoint.exists() and len(log(cut)) > begun + more):
                time.sleep(0.002)
            while done % 2 and process.poll() is None and not (cut / "ckpt.pt.tmp").exists():
                pass
            process.kill()
        code, out, err = finish(process)
        if code == 0:
            break
        assert code == -signal.SIGKILL, err
        done += 1
        assert log(cut)[-1]["iter"] - weights(cut)["iter_num"] <= interval
        args = ["--init_from=resume", f"--out_dir={cut}", "--device=cpu"]
    assert done == kills
    whole, after = weights(tmp_path / "whole"), weights(cut)
    for key in whole.keys() - {"args", "log_size"}:  # times differ in length
        assert same(whole[key], after[key]), key
    assert log(tmp_path / "whole") == log(cut)


# ----------------------------------------------------------------------------- data parallel

def torchrun(n, *args):
    launcher = "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n}"
    return command(*args, launcher=launcher)


@slow
def test_four_processes_compute_what_one_computes(data_dir, tmp_path):
    common = dict(max_iters=50, dtype="float64", stage_accuracy=1.0, stage_iters=15, claim_noise=0)
    for name, line in ("one", command), ("many", lambda *args: torchrun(4, *args)):
        code, _, err = finish(start(line(*flags(data_dir, tmp_path / name, **common))))
        assert code == 0, err
    one, many = (weights(tmp_path / name)["model"] for name in ("one", "many"))
    assert max((one[k] - many[k]).abs().max().item() for k in one) < 1e-5
    assert losses(tmp_path / "one") == pytest.approx(losses(tmp_path / "many"), abs=1e-5)
    assert results(tmp_path / "one")["results"] == results(tmp_path / "many")["results"]


@slow
@linux
def test_a_rank_that_dies_ends_the_job(data_dir, tmp_path):
    def parent(process):
        try:
            return int((process / "stat").read_text().rsplit(")", 1)[1].split()[1])
        except OSError:
            return None

    job = start(torchrun(2, *flags(data_dir, tmp_path, max_iters=10**6)))
    while not (tmp_path / "log.jsonl").exists() or len(log(tmp_path)) < 5:
        assert job.poll() is None
        time.sleep(0.1)
    processes = [p for p in Path("/proc").iterdir() if p.name.isdigit()]
    os.kill(max(int(p.name) for p in processes if parent(p) == job.pid), signal.SIGKILL)
    code, _, err = finish(job, timeout=60)
    assert code != 0 and "another process has ended" in err and weights(tmp_path)["iter_num"] >= 0


@slow
@linux
def test_no_thread_outlives_the_process_group(data_dir, tmp_path):
    """One that did could need the interpreter when that is gone, and abort a process that is done."""
    (tmp_path / "run.py").write_text(f"""import sys
from pathlib import Path
sys.path.insert(0, {str(ROOT)!r})
import train
train.main(*train.parse_args())
print(*[f"still {{p.read_text().strip()}}" for p in Path("/proc/self/task").glob("*/comm")])
""")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    line = [*launcher, str(tmp_path / "run.py"), *flags(data_dir, tmp_path / "out", max_iters=3)]
    code, out, err = finish(start(line))
    assert code == 0, err
    assert "still" in out and "gloo" not in out


# ----------------------------------------------------------------------------- files and disks

class Bomb:
    def __reduce__(self):
        return os.system, ("touch exploded",)


@pytest.fixture(scope="module")
def trained(data_dir, tmp_path_factory):
    path = tmp_path_factory.mktemp("trained")
    run(*flags(data_dir, path, max_iters=4, eval_segments="1", eval_samples=2))
    return path


@pytest.mark.parametrize("kind", ["empty", "zeros", "truncated", "flipped", "callable", "number", "foreign",
                                  "lacks", "weights", "config", "unknown", "tokenizer", "shape"])
def test_bad_checkpoints_get_one_line_and_run_nothing(kind, trained):
    shutil.copytree(trained, "out")
    path, whole, c = Path("out/ckpt.pt"), Path("out/ckpt.pt").read_bytes(), weights("out")
    damaged = {"empty": b"", "zeros": bytes(4096), "truncated": whole[: len(whole) // 2],
               "flipped": whole[:900] + b"\0" * 64 + whole[964:]}
    other = {"callable": {**c, "model": Bomb()}, "number": 5, "foreign": {"model": {}, "epoch": 3},
             "lacks": {k: v for k, v in c.items() if k != "stage"}, "weights": {**c, "model": {}},
             "config": {**c, "config": {"n_layer": "two"}}, "tokenizer": {**c, "tokenizer": "[]"},
             "unknown": {**c, "config": {**c["config"], "moe": 1}},
             "shape": {**c, "model": {**c["model"], "norm.weight": torch.ones(3)}}}
    if kind in damaged:
        path.write_bytes(damaged[kind])
    else:
        torch.save(other[kind], path)
    left = path.read_bytes()
    parse = sample.get_parser().parse_args
    for attempt in (lambda: run("--eval_only", "--out_dir=out", "--device=cpu"),
                    lambda: run("--init_from=resume", "--out_dir=out", "--max_iters=6", "--device=cpu"),
                    lambda: sample.main(parse(["--out_dir=out", "--device=cpu"]))):
        with pytest.raises((ValueError, SystemExit)) as e:
            attempt()
        assert "\n" not in str(e.value).strip()
    assert path.read_bytes() == left and not Path("exploded").exists()


def small_files():
    import resource
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))


@linux
def test_full_disk_keeps_the_checkpoint(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "out")
    before, resume = weights(tmp_path / "out"), ("--init_from=resume", "--max_iters=8", "--device=cpu")
    line = command(f"--out_dir={tmp_path / 'out'}", *resume)
    code, _, err = finish(start(line, preexec_fn=small_files))
    assert code == 1 and len(err.strip().splitlines()) == 1 and "ckpt.pt cannot be written" in err, err
    assert same(before, weights(tmp_path / "out")) and not (tmp_path / "out" / "ckpt.pt.tmp").exists()


@linux
@pytest.mark.parametrize("how", ["killed", "full"])
def test_a_preparation_that_broke_off_is_made_good(how, tmp_path, haystack):
    line = [sys.executable, str(ROOT / "prepare_babilong.py"), f"--data_dir={tmp_path / 'data'}",
            f"--background={haystack}", "--tasks=qa1,qa2"]
    process = start(line, preexec_fn=small_files if how == "full" else None)
    while how == "killed" and process.poll() is None and not any(tmp_path.iterdir()):
        time.sleep(0.001)
    if how == "killed":
        process.kill()
    code, _, err = finish(process)
    assert code != 0 and len(err.strip().splitlines()) == (how == "full")
    with pytest.raises(ValueError, match="run prepare_babilong.py again"):
        babilong.load_data(tmp_path / "data", 32)
    assert finish(start(line))[0] == 0 and babilong.load_data(tmp_path / "data", 32)


@pytest.mark.parametrize("content, complaint", [
    (b"", "holds no text"), (bytes(range(256)) * 40, "not text in UTF-8"), (b"\0" * 5000, "usable sentences"),
    (b"".join(b"Ship %d of the bay sails at dawn. " % i for i in range(450)), "450 usable sentences")])
def test_background_that_is_none(content, complaint, tmp_path):
    (tmp_path / "book.txt").write_bytes(content)
    with pytest.raises(ValueError, match=complaint):
        babilong.write_data(tmp_path / "data", ("qa1",), background=[str(tmp_path / "book.txt")])
    assert not (tmp_path / "data" / "meta.json").exists()


# ----------------------------------------------------------------------------- flags

ACTIONS = [a for a in train.get_parser()._actions if a.dest != "help"]
SENSELESS = ["", "x", "-1", "0", "1", "2", "7", "0.5", "1e400", "nan", "-inf", "9" * 30, "1_000", " 4",
             "٣", "1,2", ",", "4k", "9M", "None", "qa1", "on", "\ud800"]


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


@pytest.mark.parametrize("n", [60, pytest.param(500, marks=slow)])
def test_random_flags_work_or_are_refused_in_one_line(n, data_dir, tmp_path, monkeypatch, capsys):
    """Parsing and all of the set-up, with models of a bounded size."""
    def build(config):
        if config.n_layer * config.n_embd**2 * max(1, config.memory_slots) > 10**8 or config.block_size > 10**5:
            raise ValueError("large")
        return train_build(config)

    train_build = train.build
    monkeypatch.setattr(train, "build", build)
    monkeypatch.setattr(train, "train", lambda *args: False)
    monkeypatch.setattr(train, "final_table", lambda *args: pytest.fail("no checkpoint"))
    rng, outcomes = random.Random(0), []
    for i in range(n):
        line = [f"--data_dir={data_dir}", "--device=cpu", f"--out_dir={tmp_path / str(i)}"]
        for action in rng.sample(ACTIONS, rng.randint(1, 6)):
            value = rng.choice([*SENSELESS, *map(str, action.choices or ()), *[action.default] * 8])
            if action.dest in ("out_dir", "data_dir") or value is None:
                continue
            line.append(action.option_strings[0] + ("" if action.nargs == 0 else f"={value}"))
        message = refused(capsys, lambda: train.main(*train.parse_args(line)))
        capsys.readouterr()
        outcomes.append(message)
        assert message is None or len(message) < 500, message
    assert 0.05 < sum(message is None for message in outcomes) / n < 0.9


TYPED = [(program, action) for program in (train, sample, babilong)
         for action in program.get_parser()._actions if action.type not in (None, str, babilong.out_file)]


@pytest.mark.parametrize("program, action", TYPED, ids=lambda x: getattr(x, "dest", None) or x.__name__)
def test_every_flag_names_itself(program, action, capsys):
    complaints, parse = 0, train.parse_args if program is train else program.get_parser().parse_args
    for value in SENSELESS:
        line = refused(capsys, lambda: parse([f"{action.option_strings[0]}={value}"]))
        complaints += line is not None
        assert line is None or re.search(rf"\b{action.dest}\b", line), (value, line)
    assert complaints > 0


# ----------------------------------------------------------------------------- text

TEXTS = ["", " ", "\n\n", "\0", "a\0b", "<|endoftext|> <|im_start|> <s> [INST]", "naïve 漢字 🙂 \u202e\ufeff",
         "a" * 300_000, " " * 300_000, "word " * 60_000, "é" * 50_000, "\r\n\t\v\f\x1c", "?" * 10_000]


@pytest.mark.parametrize("text", TEXTS, ids=lambda t: repr(t[:12]))
def test_any_text_is_text(text, encoding, trained, capsys):
    ids = babilong.encode(encoding, text)
    assert encoding.decode(ids) == text and all(0 <= i < encoding.n_vocab for i in ids)
    args = sample.get_parser().parse_args([f"--out_dir={trained}", "--device=cpu", f"--start={text[:3000]}",
                                           "--max_new_tokens=3", "--answer_tokens=3"])
    if text.strip():
        sample.main(args)
        assert capsys.readouterr().out
    else:
        with pytest.raises(ValueError, match="--start holds no text"):
            sample.main(args)


@slow
def test_memory_stays_finite_in_bfloat16_over_a_million_tokens():
    torch.manual_seed(0)
    config = LM2Config(block_size=256, vocab_size=512, n_layer=2, n_head=2, n_embd=32, memory_slots=8)
    model, state = LM2(config).eval(), None
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for piece in range(16):
            logits, state = model.read(torch.randint(512, (1, 2**16)), state)
            assert state[0].dtype == torch.float32 and state[0].isfinite().all()
    assert logits.isfinite().all()


def test_numbers_that_overflow_are_named(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "out")
    checkpoint = weights(tmp_path / "out")
    checkpoint["model"]["blocks.1.mlp.w2.weight"][3, 4] = torch.inf
    torch.save(checkpoint, tmp_path / "out" / "ckpt.pt")
    with pytest.raises(ValueError, match="at step 4 the loss is nan .* The last checkpoint is kept"):
        run("--init_from=resume", f"--out_dir={tmp_path / 'out'}", "--max_iters=8", "--device=cpu")
    assert same(weights(tmp_path / "out"), checkpoint)
