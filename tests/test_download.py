"""Downloads, against a server on this machine that does what servers do, and what they should not do."""
import gzip
import json
import threading
import time
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

import prepare_babilong as babilong
from test_train import flags, run

RECORDS = [{"input": f"Mary went to the {place}. It was late. John left.", "question": "Where is Mary? ", "target": place}
           for place in ("office", "garden")]
GOOD = json.dumps(RECORDS).encode()
BOOK = "The licence.\n*** START OF THE PROJECT GUTENBERG EBOOK 84 ***\n{}\n*** END OF THE PROJECT GUTENBERG EBOOK 84 ***\nMore licence."


class Handler(BaseHTTPRequestHandler):
    """Answers each path with the next of the functions that `answers` has for it, the last one again and again."""

    def do_GET(self):
        self.server.asked.append((self.path, self.headers.get("Range")))
        answers = next((a for end, a in self.server.answers.items() if self.path.endswith(end)), [send(b"", 404)])
        (answers.pop(0) if len(answers) > 1 else answers[0])(self)

    def log_message(self, *args):
        pass


def send(content, status=200, announced=None, **headers):
    """A function that answers with content, whole or from the asked byte on."""
    def answer(handler):
        asked = handler.headers.get("Range")
        start = int(asked.removeprefix("bytes=").rstrip("-")) if asked and status == 200 else 0
        handler.send_response(206 if start else status)
        handler.send_header("Content-Length", str(len(content) - start if announced is None else announced))
        if start:
            handler.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        for name, value in headers.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.end_headers()
        handler.wfile.write(content[start:])
    return answer


def half(handler, content=GOOD):
    """Breaks off in the middle."""
    send(content[: len(content) // 2], announced=len(content))(handler)
    handler.close_connection = True


def elsewhere(handler):
    send(GOOD[5:], 206, Content_Range="bytes 5-9/10")(handler)


def silent(handler):
    handler.send_response(200)
    handler.end_headers()
    time.sleep(1.5)


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.answers, server.asked, server.url = {}, [], f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=partial(server.serve_forever, poll_interval=0.01), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def fetch(server, path, **kwargs):
    babilong.fetch(server.url + "/x.json", path, babilong.parse_records, pause=0, **kwargs)


@pytest.mark.parametrize("answers, asked", [
    ([send(GOOD)], [None]), ([send(b"", 503), send(b"", 429), send(GOOD)], [None] * 3), ([half, send(GOOD)], [None, f"bytes={len(GOOD) // 2}-"]),
    ([half, send(GOOD, 200, Accept_Ranges="none")], [None, f"bytes={len(GOOD) // 2}-"]), ([half, send(b"", 416), send(GOOD)], [None, f"bytes={len(GOOD) // 2}-", None]),
    ([send(b"", 302, Location="/x.json"), send(GOOD)], [None, None])])
def test_what_may_pass_is_tried_again(answers, asked, server, tmp_path):
    server.answers["/x.json"] = answers
    fetch(server, tmp_path / "x.json")
    assert (tmp_path / "x.json").read_bytes() == GOOD and [r for _, r in server.asked] == asked
    fetch(server, tmp_path / "x.json")  # is there
    assert len(server.asked) == len(asked) and [p.name for p in tmp_path.iterdir()] == ["x.json"]


def test_a_server_that_does_not_go_on_sends_the_whole(server, tmp_path):
    def whole(handler):
        del handler.headers["Range"]
        send(GOOD)(handler)
    server.answers["/x.json"] = [half, whole]
    fetch(server, tmp_path / "x.json")
    assert (tmp_path / "x.json").read_bytes() == GOOD


@pytest.mark.parametrize("answers, complaint, kept", [
    ([send(b"", 404)], "is not to be had: 404", False), ([send(b"", 403)], "is not to be had: 403", False), ([send(b"", 500)], "in 4 tries", False),
    ([half], "in 4 tries .* run the same command again", True), ([silent], "in 4 tries", True), ([send(b"<html>sign in</html>")], "not a list of input", False),
    ([send(b"[]")], "no records", False), ([send(b'[{"input": 1, "question": "", "target": ""}]')], "not text", False), ([send(b"\xff\xfe")], "UTF-8", False),
    ([send(b"[" * 10**5)], "RecursionError", False), ([send(GOOD + b" " * 10**6)], "larger than 100000 bytes", False),
    ([send(gzip.compress(bytes(10**7)), Content_Encoding="gzip")], "comes compressed", False), ([half, elsewhere], "another place", False),
    ([send(GOOD, announced="many")], "invalid literal", False),
    ([send(b"", 302, Location="file:///etc/passwd")], "file:///etc/passwd' is not allowed", False),
    ([send(b"", 302, Location="http://127.0.0.1:9/x.json")], "which is not followed", False),
    ([send(b"", 302, Location="http://localhost/x.json")], "which is not followed", False)])
def test_what_cannot_be_used_leaves_nothing_and_the_next_try_completes(answers, complaint, kept, server, tmp_path, monkeypatch):
    monkeypatch.setattr(babilong, "TIMEOUT", 0.3)
    server.answers["/x.json"] = answers
    with pytest.raises(ValueError, match=complaint) as e:
        fetch(server, tmp_path / "x.json", most=10**5)
    assert "\n" not in str(e.value) and "127.0.0.1" in str(e.value)
    assert {p.name for p in tmp_path.iterdir()} <= ({"x.json.part"} if kept else set())
    server.answers["/x.json"] = [send(GOOD)]
    fetch(server, tmp_path / "x.json")
    assert (tmp_path / "x.json").read_bytes() == GOOD and len(list(tmp_path.iterdir())) == 1


def test_no_server_at_all(tmp_path):
    with pytest.raises(ValueError, match="in 4 tries"):
        babilong.fetch("http://127.0.0.1:9/x.json", tmp_path / "x.json", babilong.parse_records, pause=0)


def rows(records, total, cut=()):
    return send(json.dumps({"rows": [{"row_idx": 0, "row": r, "truncated_cells": list(cut)} for r in records], "num_rows_total": total}).encode())


def test_sets_that_have_no_json_files_are_fetched_row_by_row(server, tmp_path):
    server.answers = {"split=qa1&offset=0&length=100": [rows(RECORDS[:1], 2)], "split=qa1&offset=1&length=100": [rows(RECORDS[1:], 2)]}
    babilong.fetch_babilong(tmp_path, ["qa1"], ["4k"], "babilong-1k-samples", server.url)
    assert json.loads((tmp_path / "qa1" / "4k.json").read_text()) == RECORDS and len(list((tmp_path / "qa1").iterdir())) == 1
    assert server.asked[0][0] == "/datasets/RMT-team/babilong-1k-samples/resolve/main/data/qa1/4k.json" and "config=4k" in server.asked[1][0]


@pytest.mark.parametrize("answer, complaint", [(rows(RECORDS, 2, ["input"]), "cut short"), (rows([], 5), "cut short, or not at all"), (send(b"{}"), "no rows"),
                                               (send(b"[" * 10**5), "RecursionError"), (rows([{}], 1), "not a list of input")])
def test_rows_that_cannot_be_used(answer, complaint, server, tmp_path):
    server.answers = {"length=100": [answer]}
    with pytest.raises(ValueError, match=complaint):
        babilong.fetch_babilong(tmp_path, ["qa1"], ["4k"], hub=server.url)
    assert not list(tmp_path.rglob("*.json"))


def test_hub_from_the_command_line_to_predictions(server, data_dir, tmp_path, monkeypatch, capsys):
    server.answers = {"/data/qa1/0k.json": [send(GOOD)], "/data/qa1/1k.json": [send(GOOD)]}
    command = ["prepare_babilong.py", "--source=hub", "--tasks=qa1", "--lengths=0k,1k", f"--hub_url={server.url}/", f"--cache_dir={tmp_path / 'cache'}"]
    monkeypatch.setattr("sys.argv", command)
    babilong.main()
    assert str(tmp_path / "cache" / "babilong") in capsys.readouterr().out
    run(*flags(data_dir, tmp_path / "out", max_iters=1, eval_segments="1"))
    run("--eval_only", f"--out_dir={tmp_path / 'out'}", f"--babilong_dir={tmp_path / 'cache' / 'babilong'}", "--eval_lengths=0k,1k")
    predictions = [json.loads(line) for line in (tmp_path / "out" / "predictions.jsonl").read_text().splitlines()]
    assert [(p["length"], p["target"]) for p in predictions] == [("0k", "office"), ("0k", "garden"), ("1k", "office"), ("1k", "garden")]
    for p in predictions:
        assert p["right"] == babilong.score("qa1", p["question"], p["target"], p["output"]) and p["task"] == "qa1"
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [(r["length"], r["n"], r["n_outside"]) for r in results["results"]] == [("0k", 2, 0), ("1k", 2, 0)]
    for wrong, complaint in ((["--babilong_dir=nowhere", "--eval_lengths=0k"], "nowhere"), ([f"--babilong_dir={tmp_path / 'cache' / 'babilong'}", "--eval_lengths=2k"], "2k.json")):
        with pytest.raises((ValueError, OSError), match=complaint):
            run("--eval_only", f"--out_dir={tmp_path / 'out'}", *wrong)


@pytest.mark.parametrize("args", [["--lengths=../../x"], ["--tasks=../qa1"], ["--dataset=../../x"], ["--lengths=0k,,1k"]])
def test_names_that_climb_out_are_refused(args, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["prepare_babilong.py", "--source=hub", *args])
    with pytest.raises(SystemExit) as e:
        babilong.main()
    assert e.value.code == 2 and len(capsys.readouterr().err.splitlines()) == 1


def test_published_samples_are_composed_as_ours_are(data, tmp_path):
    record = {"input": "Mary went to the office.\nJohn  left. " * 9, "question": "Where is\nMary? ", "target": "office"}
    (tmp_path / "qa1").mkdir()
    (tmp_path / "qa1" / "0k.json").write_text(json.dumps([record]))
    published = babilong.Published(data, tmp_path)
    sample = published.sample("qa1", 0, 0, length="0k")
    text = data.encoding.decode(sample.tokens[: sample.prompt].tolist())
    assert len(sample.tokens) % 32 == 0 and len(sample.tokens) - sample.prompt == data.room["qa1"] and text.endswith("\n Where is Mary?")
    assert text.split("\n")[0] == " Mary went to the office. John left." * 9 and published.digest() != data.digest()


def test_novels_without_their_licence(server, tmp_path, haystack):
    book = BOOK.format(Path(haystack).read_text())
    server.answers = {".txt": [partial(half, content=book.encode()), send(book.encode())]}
    folder = tmp_path / "cache"
    meta = babilong.write_data(tmp_path / "data", ["qa1"], background=["gutenberg"], eval_stories=5, cache_dir=folder, books=server.url)
    assert meta["background"] == "gutenberg" and len(list((folder / "gutenberg").iterdir())) == len(babilong.NOVELS)
    assert "icence" not in (tmp_path / "data" / "train" / "background.txt").read_text()
    assert server.asked[0][0] == f"/cache/epub/{babilong.NOVELS[0]}/pg{babilong.NOVELS[0]}.txt"


def test_a_book_that_is_none_is_refused_and_nothing_is_written(server, tmp_path):
    server.answers = {".txt": [send(b"Please enable cookies.")]}
    with pytest.raises(ValueError, match="is not what was expected: no text between START and END"):
        babilong.write_data(tmp_path / "data", ["qa1"], background=["gutenberg"], cache_dir=tmp_path / "cache", books=server.url)
    assert not (tmp_path / "data").exists() and not list((tmp_path / "cache").rglob("*.txt*"))
