"""The command line of train.py: training, resuming, evaluating, and what it says to flags and files that cannot work."""
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

import model
import prepare_babilong as babilong
import sample
import train
import variants
from model import LM2, LM2Config
from test_data import expected
from test_model import llama_folder

ROOT = Path(__file__).parent.parent


def flags(data_dir, out_dir, **kwargs):
    base = dict(data_dir=data_dir, out_dir=out_dir, device="cpu", block_size=32, n_layer=2, n_embd=32, n_head=2, memory_slots=4,
                max_iters=8, batch_size=8, curriculum="1,2", stage_accuracy=0.0, log_interval=1, eval_interval=0, eval_samples=10,
                eval_segments="1,2", eval_lengths="", warmup_iters=2)
    return [f"--{k}={v}" for k, v in {**base, **kwargs}.items()]


def run(*args):
    return train.main(*train.parse_args([*args]))


def weights(out_dir):
    return torch.load(Path(out_dir, "ckpt.pt"), weights_only=True)


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
    """
    The distance of two runs' weights, relative to their norm: all together, because AdamW makes a whole step out of a
    rounding error wherever a single element's gradient is almost zero.
    """
    a, b = weights(a)["model"], weights(b)["model"]
    return (sum((a[k] - b[k]).square().sum() for k in a) / sum(w.square().sum() for w in a.values())).sqrt().item()


def log(out_dir):
    rows = [json.loads(line) for line in Path(out_dir, "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in ("ms", "tokens_per_second")} for row in rows]


def picture(path):
    """The texts in an SVG; raises if it is not well-formed."""
    return [e.text for e in ElementTree.parse(path).iter("{http://www.w3.org/2000/svg}text")]


# ----------------------------------------------------------------------------- training

@pytest.mark.parametrize("memory_type", ["lm2", "rmt", "none"])
def test_a_run_leaves_checkpoint_log_and_results(memory_type, data_dir, tmp_path, capsys):
    assert run(*flags(data_dir, tmp_path, memory_type=memory_type, eval_interval=4, eval_lengths="0k", tasks="qa1,qa6", eval_segments="3")) == 0
    checkpoint = weights(tmp_path)
    assert checkpoint["iter_num"] == 8 and isinstance(checkpoint["config"], dict)
    assert all(isinstance(w, torch.Tensor) and w.isfinite().all() for w in checkpoint["model"].values())
    rows = log(tmp_path)
    assert [r["iter"] for r in rows if "loss" in r] == list(range(1, 9)) and any("eval" in r for r in rows)
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["config"]["max_iters"] == 8 and results["config"]["parameters"] > 0 and results["config"]["data_hash"]
    assert [(r["task"], r["length"], r["segments"]) for r in results["results"]] == [
        ("qa1", "0k", None), ("qa1", None, 3), ("qa6", "0k", None), ("qa6", None, 3)]
    for r in results["results"]:
        assert r["n"] == 10 and r["low"] <= r["accuracy"] == 10 * r["correct"] <= r["high"]
    assert 1 < results["perplexity"]["perplexity"] < 10_000 and results["perplexity"]["tokens"] % 64 == 0
    assert [g["task"] for g in results["guesses"]] == ["qa1", "qa6"]
    printed = capsys.readouterr().out
    assert re.search(r"^accuracy in % .* qa1 +qa6 +average +95% interval$", printed, re.M) and "perplexity" in printed
    mean = sum(r["accuracy"] for r in results["results"] if r["segments"] == 3) / 2
    assert re.search(rf"^3 seg\. +96 +20 .* {mean:.1f} +[\d.]+ - +[\d.]+$", printed, re.M)
    assert {p.name for p in tmp_path.iterdir()} == {"ckpt.pt", "ckpt.previous.pt", "curves.svg", "log.jsonl", "results.json"}
    curves = picture(tmp_path / "curves.svg")
    assert [t for t in curves if t.endswith("seg.")] == ["1 seg.", "2 seg.", "3 seg."] and "stage of the curriculum" in curves


def test_resume_equals_uninterrupted_bit_for_bit(data_dir, tmp_path, monkeypatch):
    run(*flags(data_dir, tmp_path / "whole"))
    save, saved = train.save_checkpoint, []

    def save_and_die(*args):
        save(*args)
        saved.append(args)
        if len(saved) == 2:  # the first one is written before the first step
            raise KeyboardInterrupt

    monkeypatch.setattr(train, "save_checkpoint", save_and_die)
    with pytest.raises(KeyboardInterrupt):
        run(*flags(data_dir, tmp_path / "cut", checkpoint_interval=3))
    assert weights(tmp_path / "cut")["iter_num"] == 3
    with open(tmp_path / "cut" / "log.jsonl", "a") as f:
        f.write('{"iter": 4, "loss": "written after the checkpoint"}\n')
    run("--init_from=resume", f"--out_dir={tmp_path / 'cut'}", "--device=cpu", "--log_interval=1", "--eval_interval=0",
        "--eval_samples=10", "--eval_segments=1,2", "--eval_lengths=")
    whole, cut = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    for key in ("model", "optimizers", "stage", "running", "iter_num", "rng"):
        assert same(whole[key], cut[key]), key
    assert log(tmp_path / "whole") == log(tmp_path / "cut")
    results = [json.loads((tmp_path / name / "results.json").read_text())["results"] for name in ("whole", "cut")]
    assert results[0] == results[1]


def test_the_log_stays_whole_over_resumes(data_dir, tmp_path):
    def resume(most, log_interval=100):
        run("--init_from=resume", f"--out_dir={tmp_path}", f"--max_iters={most}", f"--log_interval={log_interval}", "--device=cpu",
            "--eval_samples=2", "--eval_segments=1", "--eval_lengths=")

    path = tmp_path / "log.jsonl"
    run(*flags(data_dir, tmp_path, max_iters=2))
    with open(path, "a") as f:
        f.write('{"iter": 3, "loss": "written after the checkpoint"}\n')
    with open(path) as reader:
        before = path.read_text()
        resume(3)  # and logs nothing
        assert reader.read() == before  # not cut under the eyes of whoever had opened it
    resume(4)
    assert [row["iter"] for row in log(tmp_path)] == [1, 2]
    path.unlink()
    resume(5, log_interval=1)
    assert [row["iter"] for row in log(tmp_path)] == [5]


def test_resume_goes_on_longer_but_not_with_another_architecture(data_dir, tmp_path, capsys):
    run(*flags(data_dir, tmp_path, max_iters=2))
    assert run("--init_from=resume", f"--out_dir={tmp_path}", "--max_iters=4", "--eval_segments=1", "--eval_lengths=", "--eval_samples=2") == 0
    assert weights(tmp_path)["iter_num"] == 4
    assert run("--init_from=resume", f"--out_dir={tmp_path}", "--eval_segments=1", "--eval_lengths=", "--eval_samples=2") == 0  # at its end
    with pytest.raises(SystemExit) as e:
        run("--init_from=resume", f"--out_dir={tmp_path}", "--n_embd=64")
    assert e.value.code == 2 and "--n_embd=64, but the checkpoint" in capsys.readouterr().err


def test_changed_data_are_noticed(tmp_path, haystack):
    for seed in (1, 2):
        babilong.write_data(tmp_path / "data", ("qa1",), background=[str(haystack)], vocab_size=600, eval_stories=5, seed=seed)
        if seed == 1:
            run(*flags(tmp_path / "data", tmp_path / "out", max_iters=2))
    with pytest.raises(ValueError, match="has changed since the checkpoint"):
        run("--init_from=resume", f"--out_dir={tmp_path / 'out'}", "--max_iters=4")
    assert run("--eval_only", f"--out_dir={tmp_path / 'out'}", "--eval_segments=1", "--eval_lengths=") == 0


def test_a_new_run_keeps_the_old_checkpoint(data_dir, tmp_path):
    run(*flags(data_dir, tmp_path, max_iters=2))
    old = weights(tmp_path)
    run(*flags(data_dir, tmp_path, max_iters=2, seed=5))
    assert same(old["model"], torch.load(tmp_path / "ckpt.old.pt", weights_only=True)["model"])
    assert not same(old["model"], weights(tmp_path)["model"])


@pytest.mark.parametrize("change", [{}, {"gradient_accumulation_steps": 2, "stage_accuracy": 1.0}])
def test_seed_and_accumulation(change, data_dir, tmp_path):
    """The same seed gives the same run; computing a batch in two parts gives it up to rounding."""
    base = {"muon_lr": 0, "stage_accuracy": change.get("stage_accuracy", 0.0)}
    run(*flags(data_dir, tmp_path / "a", **base))
    run(*flags(data_dir, tmp_path / "b", **base, **{k: v for k, v in change.items() if k not in base}))
    assert apart(tmp_path / "a", tmp_path / "b") <= (1e-6 if change else 0)


@pytest.mark.parametrize("claiming", [False, True])
def test_two_processes_compute_what_one_computes(claiming, data_dir, tmp_path):
    """Where claims are drawn back, too: a checkpoint whose salience is made large gives logits far above the limit."""
    change = {"muon_lr": 0, "max_iters": 6}
    if claiming:
        run(*flags(data_dir, tmp_path / "one", muon_lr=0, max_iters=1))
        checkpoint = weights(tmp_path / "one")
        for name, weight in checkpoint["model"].items():
            if name.endswith("salience"):
                weight.copy_(torch.linspace(-1, 1, len(weight)))
        torch.save(checkpoint, tmp_path / "one" / "ckpt.pt")
        shutil.copytree(tmp_path / "one", tmp_path / "two")
        change = {"max_iters": 6, "init_from": "resume"}
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for name, launcher in (("one", []), ("two", ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"])):
        command = [sys.executable, *launcher, str(ROOT / "train.py"), *flags(data_dir, tmp_path / name, **change)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=150, env=environment)
        assert done.returncode == 0, done.stderr
    assert apart(tmp_path / "one", tmp_path / "two") < 1e-6
    losses = [[row["loss"] for row in log(tmp_path / name)] for name in ("one", "two")]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    results = [json.loads((tmp_path / name / "results.json").read_text())["results"] for name in ("one", "two")]
    assert [r["n"] for r in results[0]] == [r["n"] for r in results[1]]


def test_interrupt_leaves_a_checkpoint_and_says_how_to_go_on(data_dir, tmp_path):
    process = subprocess.Popen([sys.executable, str(ROOT / "train.py")] + flags(data_dir, tmp_path, max_iters=100000),
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for line in process.stdout:
        if "step" in line:
            process.send_signal(2)
            break
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "--init_from=resume" in out and "Traceback" not in err
    assert weights(tmp_path)["iter_num"] > 0


def test_batch_marks_answers_and_ignores_padding(data_dir):
    data = babilong.load_data(data_dir, 32)[0]
    args, _ = train.parse_args(flags(data_dir, "unused", tasks="qa1,qa8"))
    _, (idx, targets, answer, first) = train.Batches(data, args, 0, 1)[0, 2, True]
    assert idx.shape == targets.shape == answer.shape == first.shape == (4, 64)
    assert torch.equal(targets[:, :-1][targets[:, :-1] >= 0], idx[:, 1:][targets[:, :-1] >= 0]) and (targets[:, -1] == -1).all()
    assert not (targets == data.newline).any()
    for row in range(4):
        text = data.encoding.decode(targets[row][answer[row]].tolist())
        assert re.fullmatch(r"( (\w+|\w+, \w+|\w+, \w+, \w+)\.)+", text)
        assert first[row].sum() == text.count(".")
    halves = [train.Batches(data, args, rank, 2)[0, 2, True][1][0] for rank in (0, 1)]
    assert torch.equal(idx, torch.stack(halves, dim=1).flatten(0, 1))


def test_batches_composed_ahead_are_the_same(data_dir, tmp_path):
    for workers in (0, 2):  # the stage changes after the first and the second step, when later batches are on their way
        run(*flags(data_dir, tmp_path / str(workers), data_workers=workers))
    assert same(weights(tmp_path / "0")["model"], weights(tmp_path / "2")["model"])
    assert log(tmp_path / "0") == log(tmp_path / "2")
    data = babilong.load_data(data_dir, 32)[0]
    copy = pickle.loads(pickle.dumps(data))  # what a process that does not fork is given
    assert same(*(d.sample("qa2", 1, 5, segments=4).tokens.tolist() for d in (data, copy)))


# ----------------------------------------------------------------------------- evaluation

class Oracle:
    """Stands in for a model of qa1: answers by reading the prompt, or only its last `window` segments."""

    def __init__(self, data, window=None):
        self.data, self.window = data, window
        self.embed, self.config, self.seen = torch.nn.Embedding(1, 1), train.LM2Config(data.block_size), []

    def initial_memory(self, batch_size):
        return torch.zeros(1, batch_size, 1, 1)

    def generate(self, idx, max_new_tokens, state=None, temperature=1.0):
        if max_new_tokens == 0:
            return idx, (1.0 + torch.arange(len(idx)).view(1, -1, 1, 1), idx)
        self.seen.append(state[0].flatten().tolist())
        answers = []
        for row in state[1].tolist():
            start = 0 if self.window is None else len(row) // self.data.block_size * self.data.block_size - (self.window - 1) * self.data.block_size
            text = self.data.encoding.decode(row[start:])
            question = re.search(r"(Where is \w+\?)$", text)[1]
            facts = list(enumerate(re.findall(r"(?:Mary|John|Sandra|Daniel) (?:moved|went|went back|journeyed|travelled) to the \w+\.", text)))
            try:
                answer = expected("qa1", facts, question)[0]
            except KeyError:
                answer = "nowhere"
            answers.append((self.data.encode(f" {answer}.") + (self.data.newline,) * 9)[:max_new_tokens])
        return torch.tensor(answers), state


def test_evaluation_scores_a_perfect_reader_and_a_window_reader(data):
    row = train.evaluate(Oracle(data), data, "qa1", 0, 60, segments=6)
    assert row["accuracy"] == row["accuracy_outside"] == row["accuracy_earlier"] == 100 and row["n"] == 60 and row["tokens"] == 192
    assert 0 < row["n_outside"] < 60 and 0 < row["n_earlier"] < 60
    window = train.evaluate(Oracle(data, window=1), data, "qa1", 0, 60, segments=6)
    assert window["accuracy_outside"] < 30 < window["accuracy"] < 100
    assert train.evaluate(Oracle(data), data, "qa1", 0, 30, length="0k")["accuracy"] == 100


def test_retrieval_gives_a_window_reader_what_the_question_names(data):
    """qa1's facts name the person asked about, and the haystack does not: one segment of retrieved text is enough."""
    row = train.evaluate(Oracle(data, window=1), data, "qa1", 0, 60, retrieve=4, segments=6)
    assert row["accuracy_outside"] > 90 and row["retrieve"] == 4 and row["tokens"] == 192
    assert train.evaluate(Oracle(data, window=1), data, "qa1", 0, 60, retrieve=1, segments=6)["accuracy"] < row["accuracy"]


def test_guessing_without_the_story(data_dir):
    """What is known of the tasks: six places alike in qa1, as often yes as no in qa6, qa9's questions rest on a "no" more often."""
    training, held_out, _ = babilong.load_data(data_dir, 32)
    held_out = babilong.Babilong(held_out.encoding, None, held_out.sentences, 32)  # simulated: more than the folder's 40 stories
    rates = {task: train.guess(training, held_out, task) for task in ("qa1", "qa5", "qa6", "qa9")}
    for task, low, high in (("qa1", 13, 21), ("qa6", 46, 54), ("qa9", 60, 68)):
        assert low < rates[task]["majority"] < high and low < rates[task]["question_only"] < high
    assert rates["qa5"]["question_only"] > rates["qa5"]["majority"] + 5  # "Who" and "What" ask for different answers


def test_perplexity_of_a_model_that_knows_nothing_is_its_vocabulary(data):
    model = train.LM2(train.LM2Config(block_size=32, vocab_size=data.encoding.n_vocab, n_layer=1, n_head=2, n_embd=16, tie_embeddings=False))
    found = train.perplexity(model, data, 2)  # the head starts at zero
    assert found["perplexity"] == pytest.approx(data.encoding.n_vocab, rel=1e-4)
    assert found["tokens"] == sum(map(len, data.haystack)) // 64 * 64


def test_average_over_tasks():
    rows = [{"n": 100, "accuracy": 50.0, "low": 40.4, "high": 59.6}, {"n": 100, "accuracy": 90.0, "low": 82.6, "high": 94.5}, {"n": 0}]
    mean, low, high = train.average(rows)
    assert mean == 70 and low == pytest.approx(70 - (9.6**2 + 7.4**2) ** 0.5 / 2) and high == pytest.approx(70 + (9.6**2 + 4.5**2) ** 0.5 / 2)
    assert train.average(rows[:1])[1:] == pytest.approx((40.4, 59.6))


def test_a_stage_ends_at_its_limit(data_dir, tmp_path):
    run(*flags(data_dir, tmp_path, stage_accuracy=1.0, stage_iters=3))
    assert [row["stage"] for row in log(tmp_path)] == [0, 0, 1, 1, 1, 2, 2, 2]


def test_a_window_of_several_segments(data_dir, tmp_path):
    """The whole text in one window, counted in the segments of the others."""
    run(*flags(data_dir, tmp_path, memory_type="none", block_size=64, data_block_size=32, eval_segments="1,2,3"))
    rows = json.loads((tmp_path / "results.json").read_text())["results"]
    assert [r["tokens"] for r in rows] == [32, 64, 96] and [r["n_outside"] > 0 for r in rows] == [False, True, True]


def test_another_rule_from_the_command_line(data_dir, tmp_path):
    command = [sys.executable, str(ROOT / "tests" / "variants.py"), "shared"] + flags(data_dir, tmp_path, max_iters=1)
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "results.json").read_text())["config"]["rule"] == "shared"


@pytest.mark.parametrize("rule", variants.RULES)
def test_other_rules_train(rule, data_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(model, "Memory", model.Memory)  # so that they are put back
    monkeypatch.setattr(model.LM2, "init_weights", model.LM2.init_weights)
    variants.use(rule)
    assert run(*flags(data_dir, tmp_path, max_iters=4, eval_segments="1")) == 0
    assert isinstance(LM2(LM2Config(n_embd=12)).blocks[0].memory, variants.RULES[rule]) and log(tmp_path)[-1]["loss"] > 0


def test_comparison_folds_seeds_and_keeps_the_rest_apart(data_dir, tmp_path):
    for name, seed, kind in (("a1", 1, "lm2"), ("a2", 2, "lm2"), ("b", 1, "none")):
        run(*flags(data_dir, tmp_path / name, seed=seed, memory_type=kind, max_iters=4, stage_accuracy=1.0, stage_iters=1))
    files = [str(tmp_path / name / "results.json") for name in ("a1", "a2", "b")]

    def compare(*args):
        done = subprocess.run([sys.executable, str(ROOT / "tests" / "compare.py"), *args], capture_output=True, text=True)
        return done.returncode, done.stdout, done.stderr

    code, table, _ = compare(*files)
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    assert code == 0 and rows[0] == ["accuracy in %", "a1", "b"] and rows[-1] == ["seeds", "1, 2", "1"]
    values = [json.loads(Path(f).read_text())["results"][1]["accuracy"] for f in files]
    assert rows[3] == ["2 seg.", f"{(values[0] + values[1]) / 2:.1f} ({min(values[:2]):.1f}–{max(values[:2]):.1f})", f"{values[2]:.1f}"]
    code, curve, _ = compare("--curve", *files)
    assert code == 0 and curve.splitlines()[2:4] == ["| 1 | 1 (1–1) | 1 |", "| 2 | 2 (2–2) | 2 |"]
    assert compare(f"--plot={tmp_path / 'plot.svg'}", *files)[0] == compare(f"--figure5={tmp_path / 'blocks.svg'}", *files)[0] == 0
    assert {"a1", "b", "1 seg.", "2 seg."} <= set(picture(tmp_path / "plot.svg")) and {"0", "2"} <= set(picture(tmp_path / "blocks.svg"))
    (tmp_path / "bad.json").write_text("[]")
    code, _, err = compare(str(tmp_path / "bad.json"))
    assert code == 1 and len(err.splitlines()) == 1 and "bad.json is not a results.json" in err


def test_known_points_are_drawn_where_they_belong():
    body, end = train.chart("<&", {"a": [(0, 0), (4, 100, 50, 100)], "b": [(2, 50)]}, top=10)
    lines = re.findall(r'class="line" stroke="(#\w+)" d="(M[\d.]+ [\d.]+L?.*?)"', body)[2:]  # the first two are the legend's
    assert lines == [("#2b8cd6", "M56.0 168.0L448.0 58.0M448.0 113.0L448.0 58.0"), ("#d55e00", "M252.0 113.0")] and end == 202
    assert "&lt;&amp;" in body and re.findall(r'text-anchor="end">(\d+)<', body) == ["0", "20", "40", "60", "80", "100"]


@pytest.mark.parametrize("low, high, expected", [
    (0, 100, [0, 20, 40, 60, 80, 100]), (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]), (9.57, 9.66, [9.58, 9.6, 9.62, 9.64, 9.66]), (0, 3, [0, 1, 2, 3])])
def test_round_numbers(low, high, expected):
    assert train.round_numbers(low, high) == pytest.approx(expected)


def test_interventions_change_the_memory_and_nothing_else(data):
    for intervention, memories in (("none", [1, 2, 3, 4]), ("reset", [0, 0, 0, 0]), ("swap", [4, 1, 2, 3])):
        oracle = Oracle(data)
        train.evaluate(oracle, data, "qa1", 0, 4, intervention, segments=3)
        assert oracle.seen == [memories]


def test_eval_only_repeats_the_table_and_takes_other_data(data_dir, tmp_path, haystack):
    run(*flags(data_dir, tmp_path))
    first = json.loads((tmp_path / "results.json").read_text())
    common = ["--eval_only", f"--out_dir={tmp_path}", "--device=cpu", "--eval_samples=10", "--eval_lengths="]
    assert run(*common, "--eval_segments=1,2", f"--results={tmp_path / 'again.json'}") == 0
    again = json.loads((tmp_path / "again.json").read_text())
    assert again["results"] == first["results"] and again["config"]["data_hash"] == first["config"]["data_hash"]
    babi = "".join(f"1 Mary went to the {p}.\n2 Where is Mary? \t{p}\t1\n" for p in babilong.PLACES)
    (tmp_path / "qa1_test.txt").write_text(babi)
    run(*common, "--eval_segments=2", f"--babi_dir={tmp_path}", f"--background={haystack}", "--intervention=reset")
    other = json.loads((tmp_path / "results-reset.json").read_text())
    assert other["config"]["data_hash"] != first["config"]["data_hash"] and other["results"][0]["intervention"] == "reset"


def test_memory_is_grafted_onto_a_llama_and_trained(data_dir, tmp_path, capsys):
    _, _, weights = llama_folder(tmp_path / "llama", vocab_size=900)
    common = dict(init_from=tmp_path / "llama", n_layer=2, n_embd=32, n_head=4, max_iters=3, eval_segments="1")
    run(*flags(data_dir, tmp_path / "out", **common), "--freeze_decoder")
    trained = torch.load(tmp_path / "out" / "ckpt.pt", weights_only=True)["model"]
    assert torch.equal(trained["blocks.1.mlp.w2.weight"], weights["model.layers.1.mlp.down_proj.weight"])
    assert trained["blocks.0.memory.gain"].abs().sum() > 0 and len(trained["embed.weight"]) < 900
    run("--init_from=resume", f"--out_dir={tmp_path / 'out'}", "--max_iters=5")
    later = torch.load(tmp_path / "out" / "ckpt.pt", weights_only=True)["model"]
    assert torch.equal(later["embed.weight"], trained["embed.weight"])
    assert not torch.equal(later["blocks.0.memory.w_out.weight"], trained["blocks.0.memory.w_out.weight"])
    sample.main(sample.get_parser().parse_args([f"--out_dir={tmp_path / 'out'}", "--start=Mary went to the office. Where is Mary?", "--show_memory"]))
    assert "Where is Mary?" in capsys.readouterr().out
    run(*flags(data_dir, tmp_path / "free", **common))
    assert not torch.equal(torch.load(tmp_path / "free" / "ckpt.pt", weights_only=True)["model"]["embed.weight"], trained["embed.weight"])
    for extra, complaint in ((["--n_layer=3"], "--n_layer=3, but"), (["--qk_norm"], "--qk_norm=True, but"), (["--preset=lm2-1.7b"], "for a new model"),
                             (["--init_from=nowhere"], "nowhere/config.json is not the config of a Llama"),
                             (["--memory_slots=0", "--freeze_decoder"], "leaves nothing to train")):
        with pytest.raises(SystemExit) as e:
            train.parse_args([*flags(data_dir, tmp_path / "x", **common), *extra])
        assert e.value.code == 2 and complaint in capsys.readouterr().err


def test_a_llama_that_lacks_tokens_is_refused(data_dir, tmp_path):
    llama_folder(tmp_path / "llama")
    with pytest.raises(ValueError, match="knows 50 tokens, and the text"):
        run(*flags(data_dir, tmp_path / "out", init_from=tmp_path / "llama", n_head=4))


def test_presets_are_what_no_flag_says():
    args, _ = train.parse_args(["--preset=lm2-1.7b", "--n_layer=4"])
    config = train.model_config(args, 128256)
    assert (config.n_layer, config.n_embd, config.n_kv_head, config.intermediate_size, config.memory_slots) == (4, 2048, 8, 8192, 2048)
    assert config.tie_embeddings and not config.qk_norm and args.batch_size == train.parse_args([])[0].batch_size


def test_plain_text_is_learned_and_sampled_as_it_is(data_dir, tmp_path, capsys):
    (tmp_path / "texts").mkdir()
    for name, line in ("a", "one two three\n"), ("b", "four five six\n"):
        (tmp_path / "texts" / f"{name}.txt").write_text(line * 300)
    run(*flags(data_dir, tmp_path / "out", data=tmp_path / "texts", max_iters=150, eval_interval=75, curriculum="2", learning_rate=0.01, eval_segments="1,2,99"))
    printed = capsys.readouterr().out
    found = re.findall(r"^perplexity of held-out text, (\d+) segments at a time: ([\d.]+)", printed, re.M)
    assert [s for s, _ in found] == ["1", "2"] and float(found[1][1]) < 3 and "majority" not in printed  # 99 segments: no text is so long
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["perplexity"]["segments"] == 2 and len(results["perplexities"]) == 2 and results["results"] == []
    assert "perplexity of held-out text" in picture(tmp_path / "out" / "curves.svg")
    run("--init_from=resume", f"--out_dir={tmp_path / 'out'}", "--max_iters=151")
    sample.main(sample.get_parser().parse_args([f"--out_dir={tmp_path / 'out'}", "--start=one two three\none two", "--temperature=0", "--max_new_tokens=12"]))
    assert capsys.readouterr().out.endswith("\none two three\none two three\none two three\none two three\none two\n")
    (tmp_path / "texts" / "a.txt").write_text("other text " * 300)
    with pytest.raises(ValueError, match="has changed since the checkpoint"):
        run("--init_from=resume", f"--out_dir={tmp_path / 'out'}", "--max_iters=152")


def test_samples_of_text_stay_within_a_document(encoding):
    texts = [f"{c} " * n for c, n in (("a", 500), ("b", 40), ("c", 3))]
    documents = babilong.Documents(encoding, texts, block_size=8)
    seen = set()
    for i in range(300):
        sample = documents.sample(None, 1, i, segments=4)
        text = encoding.decode(sample.tokens[: sample.prompt].tolist())
        assert len(sample.tokens) == 32 and len(set(text.split())) == 1 and not sample.answers
        assert sample.prompt == min(32, len(documents.documents["abc".index(text.strip()[0])])) and not sample.tokens[sample.prompt :].any()
        seen.add(text.strip()[0])
    assert seen == set("abc") and documents.digest() != babilong.Documents(encoding, texts[:2], 8).digest()
    targets = train.Batches(documents, train.parse_args(["--data=x", "--batch_size=512"])[0], 0, 1)[0, 4, False][1][1]
    for row, i in zip(targets, range(128)):
        assert (row == -1).sum() == 33 - documents.sample(None, 1337, f"0.{i}", segments=4).prompt


@pytest.mark.parametrize("flag, complaint", [("--intervention=reset", "text without questions"), ("--retrieve=2", "text without questions"),
                                             ("--babi_dir=x", "text without questions")])
def test_text_has_no_questions(flag, complaint, capsys):
    with pytest.raises(SystemExit) as e:
        train.parse_args(["--data=x", flag])
    assert e.value.code == 2 and complaint in capsys.readouterr().err


def test_text_that_is_none(data_dir, tmp_path):
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "short.txt").write_text("ab")
    for name, complaint in ("empty.txt", "holds no text"), ("", "holds no text"), ("nowhere", "nowhere"), ("short.txt", "too short"):
        if not name:
            (tmp_path / "empty").mkdir()
        with pytest.raises((ValueError, OSError), match=complaint):
            run(*flags(data_dir, tmp_path / "out", data=tmp_path / (name or "empty")))


def test_wilson_interval():
    assert train.wilson(0, 0) == (0.0, 100.0) and train.wilson(0, 10) == (0.0, 27.8) and train.wilson(10, 10) == (72.2, 100.0) and train.wilson(50, 100) == (40.4, 59.6)


# ----------------------------------------------------------------------------- what cannot work

@pytest.mark.parametrize("flag, word", [
    ("--n_layer=zero", "--n_layer"), ("--n_layer=0", "from 1 to 1000"), ("--n_embd=-3", "--n_embd"), ("--learning_rate=nan", "--learning_rate"),
    ("--beta2=1.5", "from 0"), ("--memory_slots=-1", "--memory_slots"), ("--memory_type=lstm", "--memory_type"), ("--n_lay=3", "--n_lay"),
    ("--tasks=qa11", "--tasks"), ("--curriculum=1,x", "--curriculum"), ("--curriculum=", "--curriculum"), ("--eval_lengths=4", "--eval_lengths"),
    ("--n_head=5", "n_head"), ("--n_kv_head=3", "n_kv_head"), ("--memory_top_k=99", "memory_top_k"), ("--batch_size=4", "--batch_size"),
    ("--seed=1e3", "--seed"), ("--intervention=reset --memory_slots=0", "--intervention"),
    ("--intervention=swap --retrieve=3", "do not go together"), ("--retrieve=-1", "--retrieve"), ("--stage_iters=x", "--stage_iters"), ("--n_memory_layers=4", "n_memory_layers"),
    ("--eval_only --out_dir=nowhere", "no checkpoint nowhere/ckpt.pt"), ("--init_from=resume --out_dir=nowhere", "no checkpoint")])
def test_bad_flags_are_named_in_one_line(flag, word, capsys):
    with pytest.raises(SystemExit) as e:
        train.parse_args(flag.split())
    (line,) = capsys.readouterr().err.splitlines()
    assert e.value.code == 2 and word in line and ": error: " in line


class Bomb:
    def __reduce__(self):
        return (os.system, ("touch exploded",))


@pytest.mark.parametrize("kind", ["empty", "zeros", "text", "truncated", "pickle", "other"])
def test_damaged_checkpoint_is_refused_and_nothing_runs(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"model": {}, "config": {}, "iter_num": 1, "tokenizer": "", "args": {}}, "whole.pt")
    content = {"empty": b"", "zeros": bytes(4096), "text": b"hello", "truncated": Path("whole.pt").read_bytes()[:300]}
    if kind in content:
        Path("ckpt.pt").write_bytes(content[kind])
    else:
        torch.save({"model": Bomb()} if kind == "pickle" else {"weights": 1}, "ckpt.pt")
    with pytest.raises(ValueError, match="ckpt.pt is not a checkpoint of train.py"):
        train.load_checkpoint(".")
    assert not Path("exploded").exists()


def test_bad_input_ends_with_one_line_and_no_traceback(data_dir, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "meta.json").write_text("{}")
    done = subprocess.run([sys.executable, str(ROOT / "train.py")] + flags(tmp_path / "data", tmp_path / "out"), capture_output=True, text=True)
    assert done.returncode == 1 and len(done.stderr.strip().splitlines()) == 1
    assert "cannot be used" in done.stderr and not (tmp_path / "out").exists()


def test_task_that_the_data_lack_is_named(tmp_path, haystack):
    babilong.write_data(tmp_path / "data", ("qa1",), background=[str(haystack)], vocab_size=600, eval_stories=5)
    with pytest.raises(ValueError, match="holds no qa2"):
        run(*flags(tmp_path / "data", tmp_path / "out", tasks="qa1,qa2"))


def test_help_lists_every_flag_with_its_default(capsys):
    with pytest.raises(SystemExit):
        train.parse_args(["-h"])
    text = capsys.readouterr().out
    assert all(f"--{name}" in text for name in ("memory_slots", "curriculum", "eval_only")) and text.count("default:") > 40
