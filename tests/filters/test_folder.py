"""The folder of a filter run: nothing in it that ivl did not write is touched, and damage is one line."""

from __future__ import annotations

import json
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from ivl.errors import InputError
from ivl.filters import judge as judge_module
from ivl.filters.chain import Chain, load_chain, read_chain
from ivl.filters.judge import DataJudge, Quality
from ivl.filters.run import FilterOptions, run
from ivl.formats.rows import write_jsonl
from tests.filters.test_judge import Fake, record
from tests.helpers.mixtures import turns

FRESH = FilterOptions(fresh=True)
FILTER = [sys.executable, "-m", "ivl", "data", "filter"]


def chain(most: int = 600) -> Chain:
    return read_chain({"stages": [{"use": "length", "max_answer": most}, {"use": "duplicates"}]}, "chain")


def rows_file(path: Path, count: int = 20) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return write_jsonl([{"id": f"r{n}", "conversations": turns(f"q {n}", f"answer {n}" * n)} for n in range(count)], path)


def content(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_folder_that_holds_its_input_is_refused_before_anything_is_touched(tmp_path: Path) -> None:
    rows, out = rows_file(tmp_path / "in.jsonl"), tmp_path / "f"
    run(chain(), rows, out)
    (tmp_path / "link").symlink_to(out)
    (tmp_path / "rows.jsonl").symlink_to(out / "kept" / "in.jsonl")
    specs = {"annotation": str(tmp_path / "rows.jsonl")}, {"annotation": str(rows), "root": str(tmp_path / "link")}
    metas = [tmp_path / "meta0.json", tmp_path / "meta1.json"]
    for meta, spec in zip(metas, specs, strict=True):
        meta.write_text(json.dumps({"rows": spec}))
    before = content(tmp_path)
    for mixture in (out / "meta.json", out / "kept" / "in.jsonl", out / "kept", tmp_path / "link" / "meta.json", *metas):
        for target in (out, tmp_path / "link", tmp_path / "x" / ".." / "f"):
            for options in (FilterOptions(), FRESH):
                with pytest.raises(InputError, match="holds the input"):
                    run(chain(1), mixture, target, options)
    with pytest.raises(InputError, match="holds the input"):
        run(chain(), rows, tmp_path, FRESH)
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(InputError, match=r"loop/progress\.jsonl: cannot be written"):
        run(chain(), rows, tmp_path / "loop")
    assert content(tmp_path) == before


@pytest.mark.parametrize(
    "name", ["meta.json", "dropped.jsonl", "verdicts.jsonl", "report.html", "report.json", "kept/mine.jsonl"]
)
def test_files_of_something_else_are_left_alone(tmp_path: Path, name: str) -> None:
    rows, out = rows_file(tmp_path / "in.jsonl"), tmp_path / "out"
    (out / name).parent.mkdir(parents=True)
    (out / name).write_text('{"mine": 1}')
    for options in (FilterOptions(), FRESH):
        with pytest.raises(InputError, match="not of a filter run"):
            run(chain(), rows, out, options)
    (out / "progress.jsonl").write_text('{"my": "progress"}\n{"about": {}}')
    before = content(out)
    for options in (FilterOptions(), FRESH):
        with pytest.raises(InputError, match=r"progress\.jsonl:1: .*choose another output"):
            run(chain(), rows, out, options)
    assert content(out) == before


def test_fresh_removes_what_the_earlier_run_wrote_and_nothing_else(tmp_path: Path) -> None:
    first, second, out = rows_file(tmp_path / "first.jsonl"), rows_file(tmp_path / "second.jsonl"), tmp_path / "out"
    run(chain(), first, out)
    (out / "kept" / "mine.jsonl").write_text("mine")
    (out / "notes").write_text("mine")
    with pytest.raises(InputError, match="--fresh"):
        run(chain(), second, out)
    run(chain(), second, out, FRESH)
    assert {path.name for path in (out / "kept").iterdir()} == {"mine.jsonl", "second.jsonl"}
    assert (out / "notes").read_text() == (out / "kept" / "mine.jsonl").read_text() == "mine"


DAMAGES = {
    "not JSON": b"{]\n",
    "not UTF-8": b"\xff\n",
    "zeros": bytes(50) + b"\n",
    "a list": b"[]\n",
    "a number": b"5\n",
    "deep": b"[" * 100_000 + b"\n",
    "no keys": b"{}\n",
    "another row": b'{"dataset": "in", "row": 7, "keep": true, "id": "a", "source": "b", "scores": {}}\n',
    "a negative row": b'{"dataset": "in", "row": -5, "keep": true, "id": "a", "source": "b", "scores": {}}\n',
    "another stage": b'{"dataset": "in", "row": 4, "keep": false, "stage": "x", "id": "a", "source": "b", "scores": {}}\n',
    "text for a score": b'{"dataset": "in", "row": 4, "keep": true, "id": "a", "source": "b", "scores": {"length": "x"}}\n',
    "no object": b'{"dataset": "in", "row": 4, "keep": true, "id": "a", "source": "b", "scores": 7}\n',
    "a result of another kind": b'{"dataset": "in", "row": 4, "keep": true, "id": "a", "source": "b", "scores": {}, '
    b'"results": [7]}\n',
    "too many rows": b"".join(
        json.dumps({"dataset": "in", "row": n, "keep": True, "id": "", "source": "", "scores": {}}).encode() + b"\n"
        for n in range(4, 30)
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_part_is_one_line_with_its_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    rows, out = rows_file(tmp_path / "in.jsonl"), tmp_path / "out"
    monkeypatch.setattr("ivl.filters.run.BLOCK", 4)

    def stop(done: int, *_: Any, **__: Any) -> None:
        if done == 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(chain(), rows, out, on_progress=stop)
    part = out / "parts" / "000001.0"
    part.write_bytes(DAMAGES[name])
    with pytest.raises(InputError, match=r"parts/000001\.0:\d+: .*remove .*000001\.0, and the same command goes on"):
        run(chain(), rows, out)
    part.unlink()
    assert run(chain(), rows, out)["rows"] == 20
    assert (out / "verdicts.jsonl").read_bytes().count(b"\n") == 20
    assert not (out / "parts").exists()


def test_a_report_of_another_run_is_never_returned(tmp_path: Path) -> None:
    rows, out = rows_file(tmp_path / "in.jsonl"), tmp_path / "out"
    kept = run(chain(), rows, out)["kept"]
    report = (out / "report.json").read_bytes()
    assert run(chain(10), rows, out, FRESH)["kept"] < kept
    (out / "report.json").write_bytes(report)  # as if a kill had left it
    assert run(chain(10), rows, out)["kept"] < kept
    for damaged in (b"", b"{", b"[]", b"5", b"\xff"):
        (out / "report.json").write_bytes(damaged)
        with pytest.raises(InputError, match=r"report\.json") if damaged not in (b"[]", b"5") else suppressed():
            run(chain(10), rows, out)


class suppressed:
    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        pass


def test_one_line_json_names_its_rows(tmp_path: Path) -> None:
    """The usual LLaVA file is `json.dump(rows)`: one line."""
    rows: list[Any] = [{"id": f"r{n}", "conversations": turns("q", "x" * 700)} for n in range(30)]
    rows[7] = {"conversations": []}
    (tmp_path / "train.json").write_text(json.dumps(rows))
    report = run(chain(), tmp_path / "train.json", tmp_path / "out")
    dropped = [json.loads(line) for line in (tmp_path / "out" / "dropped.jsonl").read_text().splitlines()]
    assert report["rows"] == len(dropped) == len({row["source"] for row in dropped}) == 30
    assert len(report["stages"]) == 3 and dropped[7]["stage"] == "unreadable"


def test_two_filters_at_once_and_a_killed_holder(tmp_path: Path) -> None:
    rows, out = rows_file(tmp_path / "in.jsonl", 300), tmp_path / "out"
    command = [*FILTER, "heuristic", str(rows), str(out), "--workers", "1"]
    holder = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    while not (out / "progress.jsonl").exists() or not (out / "progress.jsonl").stat().st_size:
        time.sleep(0.002)
    holder.send_signal(signal.SIGSTOP)
    before = content(out)
    second = subprocess.run(command, capture_output=True, text=True, check=False)
    assert second.returncode == 1 and "progress.jsonl: another process is writing this file" in second.stderr
    assert second.stderr.count("\n") == 1 and content(out) == before
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    run(load_chain("heuristic"), rows, tmp_path / "whole")
    for name in ("verdicts.jsonl", "dropped.jsonl", "kept/in.jsonl"):
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_cache_of_something_else_or_damaged_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, path = [(record(f"says Score: {n}"), "general") for n in range(9)], tmp_path / "judge.sqlite"

    def ask(cache: Path = path) -> list[float | None]:
        return [verdict.score for verdict in DataJudge(Fake(), name="fake", cache=cache).verdicts(Quality(), rows)]

    scores = ask()
    with sqlite3.connect(tmp_path / "other.sqlite") as other:
        other.execute("CREATE TABLE mail (id, text)")
    with sqlite3.connect(tmp_path / "columns.sqlite") as columns:
        columns.execute("CREATE TABLE replies (id, text)")
    other.close()
    columns.close()
    before = content(tmp_path)
    for name, reason in (("other", "holds mail, so it is no judge's cache"), ("columns", "no such column")):
        with pytest.raises(InputError, match=rf"{name}\.sqlite: .*{reason}"):
            ask(tmp_path / f"{name}.sqlite")
    assert content(tmp_path) == before
    monkeypatch.setattr(judge_module, "LOCK_SECONDS", 0.1)
    lock = sqlite3.connect(path, isolation_level=None)
    lock.execute("BEGIN EXCLUSIVE")
    with pytest.raises(InputError, match=r"judge\.sqlite: .*locked.*The same command goes on"):
        DataJudge(Fake(), name="new", cache=path).verdicts(Quality(), rows)
    lock.execute("COMMIT")
    with sqlite3.connect(path) as odd:
        odd.execute("UPDATE replies SET reply = x'ff'")
    odd.close()
    lock.close()
    assert ask() == scores  # what is no text is asked again
    data = path.read_bytes()
    for damaged in (data[:100] + b"\xff" * (len(data) - 100), data[: len(data) // 2], b"not a database" * 500):
        path.write_bytes(damaged)
        for tail in ("-wal", "-shm"):
            path.with_name(path.name + tail).unlink(missing_ok=True)
        with pytest.raises(InputError, match=r"judge\.sqlite: .*remove it, and the judge is asked again"):
            ask()
