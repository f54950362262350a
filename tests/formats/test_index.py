"""The index of a data file is built by one process of many, and thousands of shards cost no descriptors."""

from __future__ import annotations

import gc
import io
import json
import multiprocessing
import os
import signal
import tarfile
import time
from pathlib import Path

import pytest

from ivl.errors import InputError
from ivl.formats import offsets, tar
from ivl.formats.rows import open_rows, write_jsonl
from ivl.formats.text import TextRows


@pytest.fixture(autouse=True)
def stored(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(offsets, "MIN_BYTES", 20_000)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def slow(rows: TextRows, build=TextRows._build) -> offsets.Arrays:
    """Build the index, and note in a file who did."""
    with (rows.path.parent / "built").open("ab", buffering=0) as file:
        file.write(b"%d\n" % os.getpid())
    time.sleep(0.3)
    return build(rows)


def rank(path: Path, barrier, found) -> None:
    barrier.wait()
    rows = open_rows(path)
    found.put((len(rows), rows[999]["n"]))


def test_one_of_four_ranks_builds_the_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TextRows, "_build", slow)
    path = write_jsonl(({"n": n} for n in range(2000)), tmp_path / "a.jsonl")
    fork = multiprocessing.get_context("fork")
    barrier, found = fork.Barrier(4), fork.Queue()
    ranks = [fork.Process(target=rank, args=(path, barrier, found)) for _ in range(4)]
    for each in ranks:
        each.start()
    assert [found.get(timeout=20) for _ in ranks] == [(2000, 999)] * 4
    for each in ranks:
        each.join()
    assert len((tmp_path / "built").read_text().split()) == 1
    assert sorted(each.name for each in tmp_path.iterdir()) == [".a.jsonl.ivl-rows", "a.jsonl", "built"]


def test_a_rank_that_is_killed_leaves_the_work_to_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TextRows, "_build", slow)
    path = write_jsonl(({"n": n} for n in range(2000)), tmp_path / "a.jsonl")
    child = os.fork()
    if not child:
        open_rows(path)
        os._exit(0)
    while not (tmp_path / "built").exists():
        time.sleep(0.005)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert len(open_rows(path)) == 2000
    assert len((tmp_path / "built").read_text().split()) == 2
    assert not list(tmp_path.glob("*.lock")) and not list(tmp_path.glob(".*.lock"))


def num_open() -> int:
    gc.collect()
    return len(list(Path("/proc/self/fd").iterdir()))


def shards(folder: Path, count: int) -> Path:
    folder.mkdir()
    for n in range(count):
        with tarfile.open(folder / f"{n:04d}.tar", "w") as file:
            for name, data in ((f"k{n}.json", json.dumps({"n": n, "messages": []}).encode()), (f"k{n}.txt", b"x")):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                file.addfile(info, io.BytesIO(data))
    return folder


def test_small_shards_of_a_large_set_are_indexed_once_and_hold_no_descriptors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few, many = shards(tmp_path / "few", 1), shards(tmp_path / "many", 200)
    assert len(open_rows(few)) == 1 and not list(few.glob(".*"))  # in memory: it is small
    before = num_open()
    assert len(open_rows(many)) == 200
    monkeypatch.setattr(tar, "_members", None)  # not read again
    rows = open_rows(many)
    assert num_open() == before
    assert [rows.source(n) for n in (0, 199)] == [f"{many}/0000.tar:k0", f"{many}/0199.tar:k199"]
    assert num_open() - before < 10


def test_a_file_that_changes_after_it_was_opened_gets_no_index_of_its_old_content(tmp_path: Path) -> None:
    path = write_jsonl(({"n": n} for n in range(2000)), tmp_path / "a.jsonl")
    rows = open_rows(path)
    rows.close()
    write_jsonl(({"n": n} for n in range(3000)), path)
    with pytest.raises(InputError, match="changed while in use"):
        rows[0]
    assert len(open_rows(path)) == 3000
