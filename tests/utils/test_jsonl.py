"""Journals and logs: nothing that ivl did not write is touched, and one process writes at a time."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from ivl.errors import InputError
from ivl.utils.jsonl import AppendLog, Journal, lines_of, read_journal

ABOUT = {"kind": "test", "n": 1}
FOREIGN = {
    "one-line JSON": b'{"thesis": "seven years of work"}',
    "one line": b"words\n",
    "a line without its end": b"words",
    "CSV": b"a,b\n1,2\n3,4",
    "JSON lines without an end": b'{"a": 1}\n{"b": 2}',
    "a list": b"[1]\n",
    "zeros": bytes(100),
    "another kind of log": b'{"step": 1, "loss": 2.0}\n{"step": 2',
    "another journal": b'{"about": {"kind": "other", "n": 1}}\n{"x": 1}\n{"end_of',
    "another journal's beginning": b'{"about": {"kind": "other", "n"',
    "deep": b"[" * 100_000 + b"\n",
}
HOLD = """
import sys, time
from pathlib import Path
from ivl.utils.jsonl import Journal
journal = Journal(Path(sys.argv[1]), {"kind": "test", "n": 1})
journal.add([{"row": 0}])
print("held", flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("name", FOREIGN)
def test_a_file_that_is_not_ours_keeps_every_byte(tmp_path: Path, name: str) -> None:
    path = tmp_path / "out.jsonl"
    path.write_bytes(FOREIGN[name])
    with pytest.raises(InputError, match=r"out\.jsonl.*choose another output or remove the file"):
        Journal(path, ABOUT)
    with pytest.raises(InputError, match=r"out\.jsonl"):
        AppendLog(path).resume(b'{"step":' if name != "another kind of log" else b'{"x":', lambda *_: False)
    assert path.read_bytes() == FOREIGN[name]


def test_an_empty_file_and_what_a_kill_leaves_of_ours_go_on(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    with Journal(path, ABOUT) as journal:
        journal.add([{"row": 0}])
        journal.add([{"row": 1}])
    whole = path.read_bytes()
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        with Journal(path, ABOUT) as journal:
            for chunk in range(journal.num_chunks, 2):
                journal.add([{"row": chunk}])
        assert path.read_bytes() == whole


def test_a_broken_line_is_named_with_its_remedy_and_nothing_is_cut(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    with Journal(path, ABOUT) as journal:
        journal.add([{"row": 0}])
    for broken in (b"{]\n", b"5\n", b"[" * 100_000 + b"\n", b"\xff\n", b'{"about"}\n', bytes(10) + b"\n"):
        data = path.read_bytes() + broken + b'{"end_of_chunk": 1}\n{"row'
        path.write_bytes(data)
        with pytest.raises(InputError, match=r"journal.jsonl:4: .*; remove this line and all that follow"):
            Journal(path, ABOUT)
        assert path.read_bytes() == data
        path.write_bytes(data[: data.index(broken)])  # the remedy
        with Journal(path, ABOUT) as journal:
            assert journal.num_chunks == 1


def test_a_journal_belongs_to_one_process_until_it_ends(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(path)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    before = path.read_bytes()
    with pytest.raises(InputError, match=r"journal\.jsonl: another process is writing this file"):
        Journal(path, ABOUT)
    assert path.read_bytes() == before
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with Journal(path, ABOUT) as journal:
        assert journal.num_chunks == 1
        with pytest.raises(InputError, match="another process"):
            Journal(path, ABOUT)
        assert [row for _, row in read_journal(path)[1]] == [{"row": 0}]  # reading lets go of nothing
        with pytest.raises(InputError, match="another process"):
            AppendLog(path)
    assert sorted(tmp_path.iterdir()) == [path]


def test_lone_surrogates_are_kept(tmp_path: Path) -> None:
    path, about = tmp_path / "journal.jsonl", {"path": "x\udce9", "n": 1}
    for chunk in range(2):
        with Journal(path, about) as journal:
            assert journal.num_chunks == chunk
            journal.add([{"text": 'a "\ud83d" \\\udc00'}])
    assert read_journal(path)[0] == about
    assert [row["text"] for _, row in read_journal(path)[1]] == ['a "\ud83d" \\\udc00'] * 2
    path.read_bytes().decode()  # the file itself is UTF-8


def test_places_that_cannot_be_written_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path, reason in (
        (tmp_path, "Is a directory"),
        (tmp_path / "file" / "x", "exists|Not a directory"),
        (tmp_path / ("x" * 300), "too long"),
        (Path("/dev/null"), "not a regular file"),
    ):
        with pytest.raises(InputError, match=reason):
            Journal(path, ABOUT)
    log = AppendLog(tmp_path / "log.jsonl")
    log.close()
    full = pytest.raises(InputError, match=r"log\.jsonl.*No space left.*goes on")
    with Path("/dev/full").open("ab", buffering=0) as log._file, full:
        log.append([{"row": 1}])


def test_a_line_without_end_is_read_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ivl.utils.jsonl.MAX_ROW_BYTES", 99)
    (tmp_path / "a").write_bytes(b"a" * 250 + b"\n" + b"b\n")
    with (tmp_path / "a").open("rb") as file:
        assert list(map(len, lines_of(file))) == [100, 100, 51, 2]
    with pytest.raises(InputError, match="a:1: not valid JSON"):
        read_journal(tmp_path / "a")
