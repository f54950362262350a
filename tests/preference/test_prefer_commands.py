"""The commands as the documents show them, from questions in another folder, by an endpoint that answers anything."""

from __future__ import annotations

import json
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest
from PIL import Image

from ivl.cli import main
from ivl.errors import InputError
from ivl.preference.pairs import build_pairs
from ivl.utils.jsonl import read_journal
from tests.helpers.engines import tiny_directory
from tests.preference.test_pairs import journal, pairs, reply, row

IVL = [sys.executable, "-m", "ivl"]
LINES = "one\ntwo\n"
ODD = ["", "  \n", *(f"{LINES}Final answer: {n}" for n in (4, 4, 5)), f"{LINES}half \ud83d\nFinal answer: 6", "<image> <video>"]


class Endpoint(BaseHTTPRequestHandler):
    """Answers the replies in turn."""

    replies: ClassVar[list[str]] = []
    wait: ClassVar[float] = 0.0
    asked: ClassVar[int] = 0

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        time.sleep(self.wait)
        text = self.replies[Endpoint.asked % len(self.replies)]
        Endpoint.asked += 1
        choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
        data = json.dumps({"id": "x", "object": "chat.completion", "model": "m", "created": 0, "choices": [choice]}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def endpoint() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Endpoint)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    Endpoint.replies, Endpoint.wait, Endpoint.asked = ODD, 0.0, 0
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()
    server.server_close()


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Questions in data/, the working folder beside it."""
    (tmp_path / "data" / "images").mkdir(parents=True)
    (tmp_path / "work").mkdir()
    rows = []
    for n in range(12):
        Image.new("RGB", (8, 8), (n, 0, 0)).save(tmp_path / "data" / "images" / f"{n}.png")
        rows.append({"id": f"{n} \ud83d", "image": f"images/{n}.png", "question": f"how many {n}?", "answer": "4"})
    (tmp_path / "data" / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "data" / "sources.json").write_text(json.dumps({"charts": {"questions": "q.jsonl"}}))
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path


def ivl(*arguments: object, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr("sys.argv", ["ivl", *map(str, arguments)])
    try:
        main()
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def test_relative_questions_make_pairs_that_train_from_any_folder(
    place: Path, endpoint: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sample = ("prefer", "sample", "../data/sources.json", "runs/replies.jsonl", "--url", endpoint, "--url-model", "m")
    assert ivl(*sample, "--num-replies", 7, monkeypatch=monkeypatch) == 0
    texts = [reply["text"] for _, row in read_journal(Path("runs/replies.jsonl"))[1] for reply in row["replies"]]
    assert len(texts) == 84 and any("half \ufffd" in text for text in texts)
    assert ivl(*sample, "--num-replies", 7, monkeypatch=monkeypatch) == 0, "goes on, and has nothing to do"
    assert ivl("prefer", "pairs", "runs/replies.jsonl", "runs/pairs", monkeypatch=monkeypatch) == 0
    said = capsys.readouterr().out
    assert "next: ivl train mpo --model MODEL --data runs/pairs/meta.json" in said and "24 no answer" not in said
    assert "empty reply" in said and "not used:" in said
    meta = place / "work" / "runs" / "pairs" / "meta.json"
    monkeypatch.chdir(place / "data")
    assert ivl("data", "validate", meta, monkeypatch=monkeypatch) == 0, capsys.readouterr().out
    made = pairs(meta.parent) + pairs(meta.parent, "format_pairs.jsonl")
    assert all(Path(pair["image"]).is_absolute() and pair["rejected"].strip() and pair["chosen"].strip() for pair in made)
    train = ("train", "mpo", "--model", tiny_directory(place / "tiny"), "--data", meta, "--data.num-workers", 0)
    assert ivl(*train, "--num-steps", 1, "--out-dir", "run", monkeypatch=monkeypatch) == 0, capsys.readouterr().err
    assert (place / "data" / "run" / "model" / "config.json").is_file()


def test_pairs_that_training_refuses_are_counted_and_not_written(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    image = str(tmp_path / "a.png")
    rows = [
        row(0, [reply("4"), {"text": " \n", "finish_reason": "stop"}, {"text": "", "finish_reason": "stop"}], ["4"], image),
        row(1, [reply("4"), reply("5", reason="x" * 40_000)], ["4"], image),
        row(2, [reply("4"), reply("5 \ud83d")], ["4"], image),
        row(3, [reply("4"), reply("5")], ["4"], str(tmp_path / "gone.png")),
        row(4, [reply("4"), reply("5")], ["4"], image) | {"question": "<image><image> what?"},
        row(5, [reply("4", reason="x\ne\u0301"), reply("4", reason="x\n\u00e9", finish="length")], ["4"], image),
        row(6, [reply("4"), reply("5")], ["4"], image),
    ]  # fmt: skip
    tally = build_pairs(journal(tmp_path / "r.jsonl", rows), tmp_path / "out")["s"]
    made = pairs(tmp_path / "out")
    assert [pair["id"] for pair in made] == ["s/2/correctness-0", "s/6/correctness-0"]
    assert made[0]["rejected"].endswith("5 \ufffd")
    assert tally.left_out["empty reply"] == 2 and tally.left_out["more than 32,000 characters"] == 1
    assert tally.left_out["image no longer there"] == 1
    assert tally.left_out["replies equal but for how letters are encoded"] == 1
    assert sum(count for reason, count in tally.left_out.items() if "<image> marks" in reason) == 1


def test_a_folder_of_something_else_keeps_its_files(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    replies = journal(tmp_path / "r.jsonl", [row(0, [reply("4"), reply("5")], ["4"], str(tmp_path / "a.png"))])
    for name in ("meta.json", "pairs.jsonl", "grades.jsonl", "report.html", "report.json", "progress.jsonl"):
        out = tmp_path / name.replace(".", "_")
        out.mkdir()
        (out / name).write_text('{"mine": 1}')
        with pytest.raises(InputError, match=name):
            build_pairs(replies, out)
        assert [path.name for path in out.iterdir()] == [name] and (out / name).read_text() == '{"mine": 1}'
    with pytest.raises(InputError, match=r"pairs\.jsonl"):
        build_pairs(replies.rename(tmp_path / "pairs.jsonl"), tmp_path)
    build_pairs(tmp_path / "pairs.jsonl", tmp_path / "out")
    build_pairs(tmp_path / "pairs.jsonl", tmp_path / "out")  # its own folder again


@pytest.mark.parametrize(
    "change",
    [{"source": "other"}, {"replies": 5}, {"replies": [5]}, {"replies": [{"text": 5, "finish_reason": "stop"}]}, {"images": 5},
     {"answers": None}, {"answers": 5}, {"id": None, "replies": None}],
)  # fmt: skip
def test_rows_of_odd_values_are_named(tmp_path: Path, change: dict[str, Any]) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    good = row(0, [reply("4"), reply("5")], ["4"], str(tmp_path / "a.png"))
    with pytest.raises(InputError, match=r"r\.jsonl:3: "):
        build_pairs(journal(tmp_path / "r.jsonl", [good, good | change]), tmp_path / "out")
    for about in ({"kind": "replies"}, {"kind": "replies", "sources": 5}, {"kind": "replies", "sources": [{"name": 5}]}):
        (tmp_path / "r.jsonl").write_text(json.dumps({"about": about}) + "\n")
        with pytest.raises(InputError, match=r"r\.jsonl:1: "):
            build_pairs(tmp_path / "r.jsonl", tmp_path / "out")


def test_no_pairs_say_why_and_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    short = [{"text": text, "finish_reason": "stop"} for text in ("4", "5", "6")]
    replies = journal(tmp_path / "r.jsonl", [row(0, short, ["4"], str(tmp_path / "a.png"))])
    assert ivl("prefer", "pairs", replies, tmp_path / "out", monkeypatch=monkeypatch) == 1
    said = capsys.readouterr()
    assert "no pairs: 3 of 3 replies show no answer in the style final_answer (3 no answer)" in said.out
    assert "sample again, with --style direct" in said.out and "train" not in said.out and "no pairs" in said.err
    assert ivl("prefer", "pairs", replies, tmp_path / "out", "--style", "direct", monkeypatch=monkeypatch) == 0
    assert "2 correctness pairs" in capsys.readouterr().out
    wrong = journal(tmp_path / "w.jsonl", [row(0, [reply("5")], ["4"], str(tmp_path / "a.png"))])
    assert ivl("prefer", "pairs", wrong, tmp_path / "w", monkeypatch=monkeypatch) == 1
    assert "no reply is right by the mode auto" in capsys.readouterr().out


@pytest.mark.parametrize("questions", ["../data/q.jsonl", "../data/sources.json"])
def test_a_model_of_one_word_is_asked_again_without_reasons(
    place: Path, endpoint: str, questions: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Endpoint.replies = ["4", "5"]
    options = ("--url", endpoint, "--url-model", "m", "--mode", "exact", "--num-replies", 2, "--seed", 7, "--stop", "a b", "c")
    assert ivl("prefer", "sample", questions, "replies.jsonl", *options, monkeypatch=monkeypatch) == 0
    assert ivl("prefer", "pairs", "replies.jsonl", "pairs", monkeypatch=monkeypatch) == 1
    told = capsys.readouterr().out.splitlines()[-1]
    if questions.endswith(".json"):
        expected = f"SOURCES.json replies-direct.jsonl --style direct --url {endpoint} --url-model m --stop 'a b' c --seed 7"
        assert expected in told
        return
    assert ivl(*shlex.split(told.removeprefix("next: ivl ")), monkeypatch=monkeypatch) == 0
    about, rows = read_journal(Path("replies-direct.jsonl"))
    assert about["sources"][0]["style"] == "direct" and about["sources"][0]["mode"] == "exact" and about["seed"] == 7
    assert about["num_replies"] == 2 and about["params"]["stop"] == ["a b", "c"]
    assert sorted(row["question"] for _, row in rows) == sorted(f"how many {n}?" for n in range(12))
    assert ivl("prefer", "pairs", "replies-direct.jsonl", "pairs-direct", monkeypatch=monkeypatch) == 0
    assert "correctness pairs" in capsys.readouterr().out


def test_two_samplers_at_once_and_a_killed_holder(place: Path, endpoint: str) -> None:
    Endpoint.wait = 0.02
    command = [*IVL, "prefer", "sample", "../data/q.jsonl", "r.jsonl", "--url", endpoint, "--url-model", "m"]
    command += ["--num-replies", "2", "--chunk", "1"]
    holder = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    out = Path("r.jsonl")
    while not out.exists() or b"end_of_chunk" not in out.read_bytes():
        time.sleep(0.01)
    holder.send_signal(signal.SIGSTOP)
    before = out.read_bytes()
    second = subprocess.run(command, capture_output=True, text=True, check=False)
    assert second.returncode == 1 and "r.jsonl: another process is writing this file" in second.stderr
    assert out.read_bytes() == before
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert sorted(row["id"] for _, row in read_journal(out)[1]) == sorted(f"q/{n} \ud83d" for n in range(12))
    assert [path.name for path in Path.cwd().iterdir()] == ["r.jsonl"]


def test_names_that_no_file_can_have_are_one_line(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    long, rows = "x" * 300, place / "data" / "q.jsonl"
    replies = journal(place / "r.jsonl", [])
    for arguments in (
        ("prefer", "sample", long, "r.jsonl", "--url", "http://127.0.0.1:9/v1", "--url-model", "m"),
        ("prefer", "sample", rows, long, "--url", "http://127.0.0.1:9/v1", "--url-model", "m"),
        ("prefer", "pairs", long, "out"),
        ("prefer", "pairs", replies, long),
        ("prefer", "pairs", replies, replies),
        ("data", "filter", "heuristic", long, "out"),
        ("data", "filter", "heuristic", rows, long),
        ("data", "filter", "heuristic", rows, rows),
        ("data", "filter", long, rows, "out"),
    ):
        assert ivl(*arguments, monkeypatch=monkeypatch) == 1, arguments
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and said.startswith(f"ivl {arguments[0]}: "), (arguments, said)
