"""A run keeps and drops the right rows, and killing it anywhere changes nothing in what comes out."""

from __future__ import annotations

import errno
import json
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from ivl.cli import main
from ivl.data.mixture import Mixture, load_mixture
from ivl.errors import InputError
from ivl.filters import run as run_module
from ivl.filters.chain import Chain, load_chain, read_chain
from ivl.filters.judge import DataJudge
from ivl.filters.run import FilterOptions, run
from ivl.formats.rows import write_jsonl
from ivl.types import Conversation, SamplingParams, TextDelta
from ivl.utils.files import NewFiles
from ivl.utils.jsonl import AppendLog
from tests.helpers.mixtures import make_rows, turns

OUTPUTS = ("meta.json", "dropped.jsonl", "verdicts.jsonl", "report.json", "report.html", "kept")


class CountingJudge:
    """Scores by the text alone, and notes every question it is asked in a file, which outlives the process."""

    def __init__(self, log: Path, wait: float = 0) -> None:
        self.log, self.wait = log, wait

    def stream(self, prompt: Conversation, params: SamplingParams) -> Iterator[TextDelta]:
        text = prompt[-1].text
        with self.log.open("ab", buffering=0) as file:
            file.write(json.dumps(text).encode() + b"\n")
        time.sleep(self.wait)
        score = sum(text.encode()) % 11
        yield TextDelta("hm" if "Reply with" not in text and score == 4 else f"Score: {score}", finish_reason="stop")

    @property
    def asked(self) -> list[str]:
        return self.log.read_text().splitlines() if self.log.exists() else []


def chain(*, judged: bool = True) -> Chain:
    stages: list[dict[str, Any]] = [
        {"use": "length", "max_answer": 600}, {"use": "repetition", "exempt": ["many"]}, {"use": "duplicates"},
    ]  # fmt: skip
    return read_chain({"stages": [*stages, *([{"use": "quality", "min_score": 3}] if judged else [])]}, "chain")


def world(place: Path, count: int = 60) -> Path:
    """A jsonl with bad, odd and equal rows, and a JSON array, in one mixture."""
    place.mkdir(parents=True, exist_ok=True)
    rng = random.Random(0)
    words = [
        "river",
        "stone",
        "bridge",
        "light",
        "under",
        "over",
        "small",
        "tree",
        "house",
        "walks",
        "slowly",
        "through",
        "morning",
    ]
    lines = []
    for n in range(count):
        answer = " ".join(rng.choices(words, k=30)).capitalize() + "."
        answer = answer * 30 if n % 15 == 1 else "again and again and " * 20 if n % 15 == 2 else answer
        row = {"id": f"t{n}", "extra": [1.50, None], "conversations": turns(f"Tell {n}.", answer)}
        lines.append(json.dumps(row) if n % 2 else json.dumps(row, separators=(",", ":")) + "  \r")
        if n % 15 == 4:
            lines.append(json.dumps(row | {"id": f"twin{n}"}))
        if n % 15 == 5:
            lines += ['{"broken": ', '{"conversations": []}', "\ud83d".encode("utf-8", "surrogatepass").decode("latin-1")]
    (place / "text.jsonl").write_text("\n".join(lines), encoding="latin-1")
    (place / "many.json").write_text(json.dumps(make_rows(place / "pictures", count // 3), indent=1))
    meta = {
        "text": {"annotation": "text.jsonl", "repeat_time": 0.5, "length": 7},
        "many": {"annotation": "many.json", "root": "pictures", "repeat_time": 2, "max_dynamic_patch": 6, "data_augment": True},
    }
    (place / "meta.json").write_text(json.dumps(meta))
    return place / "meta.json"


def outputs(out: Path) -> dict[str, bytes]:
    return {
        path.relative_to(out).as_posix(): path.read_bytes()
        for name in OUTPUTS
        for path in ([out / name] if (out / name).is_file() else sorted((out / name).iterdir()))
    }


def judged(
    log: Path,
    out: Path,
    *,
    wait: float = 0,
    threads: int = 1,
    fresh: bool = False,
    on_progress: Any = lambda done, total, resumed=0, note="": None,
) -> dict[str, Any]:
    judge = DataJudge(CountingJudge(log, wait), name="fake", cache=out / "judge.sqlite", threads=threads)
    return run(chain(), log.parent / "meta.json", out, FilterOptions(fresh=fresh), judge=judge, on_progress=on_progress)


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_bytes().split(b"\n") if line]


def test_every_row_is_kept_or_dropped_with_its_reason(tmp_path: Path) -> None:
    meta, out = world(tmp_path), tmp_path / "out"
    shown: list[tuple[int, int]] = []
    result = judged(tmp_path / "asked", out, on_progress=lambda done, total, **_: shown.append((done, total)))
    verdicts, dropped = rows_of(out / "verdicts.jsonl"), rows_of(out / "dropped.jsonl")
    mixture = Mixture(load_mixture(meta), seed=0)
    assert [v["source"] for v in verdicts] == [f.source(n) for f in mixture.files for n in range(len(f))]
    assert result["rows"] == len(verdicts) and shown[0] == (0, len(verdicts)) and shown[-1] == (len(verdicts), len(verdicts))
    assert result["kept"] == sum(v["keep"] for v in verdicts) == result["rows"] - len(dropped)
    assert [v["source"] for v in verdicts if not v["keep"]] == [row["source"] for row in dropped]
    reasons = Counter((row["stage"], row["reason"]) for row in dropped)
    assert reasons["length", "answer too long"] == 4 and reasons["repetition", "loop of words"] == 4
    assert reasons["unreadable", "broken_json"] == 8 and reasons["unreadable", "bad_row"] == 4
    assert reasons["duplicates", "near-duplicate"] >= 3 and reasons["quality", "score below 3"] > 0
    for row in dropped:
        if row["stage"] == "duplicates":
            assert row["duplicate_of"] in {v["source"] for v in verdicts}
        if row["stage"] == "quality":
            assert row["score"] < 3 and row["row"]["conversations"]
    assert [row["row"] for row in dropped if row["reason"] == "bad_row"] == [{"conversations": []}] * 4
    assert all(isinstance(row["row"], str) and row["problem"] for row in dropped if row["reason"] == "broken_json")


def test_kept_rows_are_the_rows_and_train_as_they_are(tmp_path: Path) -> None:
    meta, out = world(tmp_path), tmp_path / "out"
    judged(tmp_path / "asked", out)
    old, new = load_mixture(meta), load_mixture(out / "meta.json")
    assert [(s.name, s.repeat_time, s.max_dynamic_patch, s.data_augment) for s in old] == [
        (s.name, s.repeat_time, s.max_dynamic_patch, s.data_augment) for s in new
    ]
    lines = (tmp_path / "text.jsonl").read_bytes().split(b"\n")
    kept = [v["row"] for v in rows_of(out / "verdicts.jsonl") if v["keep"] and v["dataset"] == "text"]
    assert (out / "kept/text.jsonl").read_bytes() == b"".join(lines[row].strip() + b"\n" for row in kept)
    before, after = Mixture(old, seed=0), Mixture(new, seed=0)
    kept = [v["row"] for v in rows_of(out / "verdicts.jsonl") if v["keep"] and v["dataset"] == "many"]
    assert len(kept) == new[1].length == len(after.files[1])
    for at, row in enumerate(kept):
        a, b = before.record(1, row), after.record(1, at)
        assert (a.id, a.conversations) == (b.id, b.conversations)


def in_a_child(work: Any) -> bool:
    """Whether the work came to its end in a forked process, which may kill itself."""
    child = os.fork()
    if not child:
        try:
            work()
            os._exit(0)
        except BaseException:
            import traceback

            traceback.print_exc()
            os._exit(1)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return False
    assert os.WEXITSTATUS(status) == 0
    return True


@pytest.mark.parametrize(("seed", "threads"), [(0, 1), (1, 4), (2, 1), (3, 3)])
def test_kill_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int, threads: int) -> None:
    """SIGKILL at random writes, syncs, renames and replies: the outputs are those of a run that nobody disturbed, and no
    reply that arrived is asked for again."""
    world(tmp_path)
    monkeypatch.setattr(run_module, "BLOCK", 16)
    judged(tmp_path / "asked", tmp_path / "whole", threads=threads)
    asked = Counter(CountingJudge(tmp_path / "asked").asked)
    assert set(asked.values()) == {1}
    (tmp_path / "asked").unlink()
    rng = random.Random(seed)

    def work(fuse: int) -> None:
        burnt = 0

        def step(*args: Any, **options: Any) -> None:
            nonlocal burnt
            burnt += 1
            if burnt == fuse:
                os.kill(os.getpid(), signal.SIGKILL)

        def before(function: Any) -> Any:
            return lambda *args, **options: (step(), function(*args, **options))[1]

        places = (
            (AppendLog, "append"),
            (NewFiles, "write"),
            (AppendLog, "sync"),
            (os, "fsync"),
            (Path, "replace"),
            (Path, "unlink"),
        )
        for owner, name in places:
            monkeypatch.setattr(owner, name, before(getattr(owner, name)))
        judged(tmp_path / "asked", tmp_path / "out", threads=threads, wait=0.001, on_progress=step)

    fuses = [rng.randint(1, 50) for _ in range(12)] + [-1]
    kills = 0
    while not in_a_child(partial(work, fuses[kills])):
        kills += 1
    assert kills >= 4
    assert outputs(tmp_path / "out") == outputs(tmp_path / "whole")
    again = Counter(CountingJudge(tmp_path / "asked").asked)
    assert again.keys() == asked.keys()
    # Only what was in flight when the process died may be asked again.
    assert sum(again.values()) - len(again) <= kills * max(threads, 32 if threads == 1 else 1)


def test_kill_at_a_random_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world(tmp_path)
    monkeypatch.setattr(run_module, "BLOCK", 8)
    judged(tmp_path / "asked", tmp_path / "whole", threads=2)
    rng, kills = random.Random(5), 0
    while True:
        child = os.fork()
        if not child:
            judged(tmp_path / "asked", tmp_path / "out", threads=2, wait=0.004)
            os._exit(0)
        time.sleep(rng.uniform(0.02, 0.25) if kills < 8 else 0)
        if kills < 8:
            os.kill(child, signal.SIGKILL)
            kills += 1
        _, status = os.waitpid(child, 0)
        if os.WIFEXITED(status):
            assert os.WEXITSTATUS(status) == 0
            break
    assert outputs(tmp_path / "out") == outputs(tmp_path / "whole")


def test_processes_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    meta = world(tmp_path)
    monkeypatch.setattr(run_module, "BLOCK", 8)
    one = run(chain(judged=False), meta, tmp_path / "one")
    assert run(chain(judged=False), meta, tmp_path / "two", FilterOptions(workers=2)) == one
    with pytest.raises(InputError, match=r"at most 1,000, got 1000000"):
        FilterOptions(workers=1_000_000)
    assert outputs(tmp_path / "one") == outputs(tmp_path / "two")


def test_processes_share_the_judge_s_requests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The judge is asked where the rows are, in all by as many requests at once as it may get."""
    meta = world(tmp_path)
    monkeypatch.setattr(run_module, "BLOCK", 8)
    judged(tmp_path / "asked", tmp_path / "one", threads=4)

    class Noting(CountingJudge):
        def stream(self, prompt: Conversation, params: SamplingParams) -> Iterator[TextDelta]:
            (self.log.parent / f"{os.getpid()}.asked").touch()
            return super().stream(prompt, params)

    judge = DataJudge(Noting(tmp_path / "again"), name="fake", cache=tmp_path / "two" / "judge.sqlite", threads=4)
    run(chain(), meta, tmp_path / "two", FilterOptions(workers=2), judge=judge)
    assert outputs(tmp_path / "one") == outputs(tmp_path / "two")
    askers = {path.stem for path in tmp_path.glob("*.asked")}
    assert len(askers) == 2 and str(os.getpid()) not in askers and judge.threads == 4
    assert Counter(CountingJudge(tmp_path / "again").asked).keys() == Counter(CountingJudge(tmp_path / "asked").asked).keys()


def test_a_complete_run_is_left_alone(tmp_path: Path) -> None:
    world(tmp_path)
    first = judged(tmp_path / "asked", tmp_path / "out")
    stamps = {
        path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir() if path.suffix in (".json", ".jsonl", ".html")
    }
    asked = len(CountingJudge(tmp_path / "asked").asked)
    assert judged(tmp_path / "asked", tmp_path / "out") == first
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps
    assert judged(tmp_path / "asked", tmp_path / "out", fresh=True) == first  # by the cache alone
    assert len(CountingJudge(tmp_path / "asked").asked) == asked


def test_rows_that_are_edited_at_equal_size_are_other_data(tmp_path: Path) -> None:
    meta, out = world(tmp_path), tmp_path / "out"
    run(chain(judged=False), meta, out)
    before = outputs(out)
    rows = (tmp_path / "text.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "text.jsonl").write_bytes(b"".join([rows[1], rows[0], *rows[2:]]))
    with pytest.raises(InputError, match=r"belongs to another run \(data was.*--fresh"):
        run(chain(judged=False), meta, out)
    assert outputs(out) == before


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    meta, out = world(tmp_path), tmp_path / "out"
    run(chain(judged=False), meta, out)
    with pytest.raises(InputError, match=r"belongs to another run \(chain was.*--fresh"):
        run(load_chain("heuristic"), meta, out)
    with pytest.raises(InputError, match=r"belongs to another run \(data was"):
        run(chain(judged=False), tmp_path / "text.jsonl", out)
    run(load_chain("heuristic"), meta, out, FilterOptions(fresh=True))
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "meta.json").write_text("{}")
    with pytest.raises(InputError, match="not of a filter run"):
        run(chain(judged=False), meta, mine, FilterOptions(fresh=True))
    assert (mine / "meta.json").read_text() == "{}"
    with pytest.raises(InputError, match="need a judge"):
        run(chain(), meta, tmp_path / "other")


def test_a_folder_of_links_to_the_results_is_refused(tmp_path: Path) -> None:
    world(tmp_path)
    out, links = tmp_path / "out", tmp_path / "links"
    run(load_chain("heuristic"), tmp_path / "text.jsonl", out)
    (kept,) = (out / "kept").iterdir()
    before = kept.read_bytes()
    links.mkdir()
    (links / "rows.jsonl").symlink_to(kept)
    for fresh in (False, True):
        with pytest.raises(InputError, match=r"holds the input .*links/rows\.jsonl"):
            run(load_chain("heuristic"), links, out, FilterOptions(root=str(tmp_path), fresh=fresh))
    assert kept.read_bytes() == before


def test_a_full_disk_is_said_and_costs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    meta, calls = world(tmp_path), iter(range(1000))
    real = os.fsync
    monkeypatch.setattr(run_module, "BLOCK", 8)

    def full(fd: int) -> None:
        if next(calls) == 20:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(fd)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match=r"No space left on device.*the same command goes on"):
        run(chain(judged=False), meta, tmp_path / "out")
    run(chain(judged=False), meta, tmp_path / "out")
    run(chain(judged=False), meta, tmp_path / "whole")
    assert outputs(tmp_path / "out") == outputs(tmp_path / "whole")


def test_two_runs_in_one_folder(tmp_path: Path) -> None:
    meta = world(tmp_path)

    def second() -> None:
        with pytest.raises(InputError, match=r"progress\.jsonl: another process is writing"):
            run(chain(judged=False), meta, tmp_path / "out")

    run(chain(judged=False), meta, tmp_path / "out", on_progress=lambda *_, **__: in_a_child(second) or pytest.fail("killed"))


def test_parquet_rows_and_odd_names(tmp_path: Path) -> None:
    """Rows that are not text come out as reference jsonl, images included, under file names that are safe and distinct."""
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rows = make_rows(tmp_path / "p", 12)
    shown = [row for row in rows if "image" in row and not isinstance(row["conversations"][0], list)]
    table = [row | {"image": {"bytes": (tmp_path / "p" / row["image"]).read_bytes(), "path": None}} for row in shown]
    parquet.write_table(pa.Table.from_pylist(table), tmp_path / "rows.parquet")
    write_jsonl([row for row in rows if "image" not in row], tmp_path / "a.jsonl")
    meta = {"../x/y": {"annotation": "rows.parquet"}, ".. x y": {"annotation": "a.jsonl"}, "...": {"annotation": "a.jsonl"}}
    (tmp_path / "meta.json").write_text(json.dumps(meta))
    run(read_chain({"stages": [{"use": "length"}]}, "c"), tmp_path / "meta.json", tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out/kept").iterdir()) == ["rows.jsonl", "x_y.jsonl", "x_y~2.jsonl"]
    before, after = (Mixture(load_mixture(place / "meta.json"), seed=0) for place in (tmp_path, tmp_path / "out"))
    for row in range(len(table)):
        assert before.record(0, row).conversations == after.record(0, row).conversations


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    meta = world(tmp_path)

    def ivl(*arguments: object) -> int:
        monkeypatch.setattr("sys.argv", ["ivl", "data", "filter", *map(str, arguments)])
        try:
            main()
        except SystemExit as end:
            return int(end.code or 0)
        return 0

    assert ivl("text") == 0 and '"min_score": 7' in capsys.readouterr().out
    assert ivl("heuristic", meta, tmp_path / "out") == 0
    said = capsys.readouterr().out
    assert "repetition: " in said and "rows kept: " in said and str(tmp_path / "out/report.html") in said
    assert ivl("text", meta, tmp_path / "o2") == 1 and "need a judge" in capsys.readouterr().err
    assert ivl("heuristic", meta) == 1 and "name a folder" in capsys.readouterr().err
    assert ivl("heuristic", meta, tmp_path / "o3", "--judge-url", "http://x/v1") == 1
    assert "asks no judge" in capsys.readouterr().err
    assert ivl("text", meta, tmp_path / "o3", "--judge-url", "http://x/v1") == 1 and "--judge-model" in capsys.readouterr().err
    strict = tmp_path / "strict.json"
    strict.write_text('{"stages": [{"use": "length", "min_answer": 5000}]}')
    assert ivl(strict, tmp_path / "many.json", tmp_path / "o4", "--root", tmp_path / "pictures") == 1
    assert "no row was kept" in capsys.readouterr().err
