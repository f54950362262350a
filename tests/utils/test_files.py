"""Directories that belong to one process at a time."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from ivl.errors import InputError
from ivl.utils import files
from ivl.utils.files import locked, real, regular, write_atomic
from ivl.utils.sealed import put_in_place

HOLD = """
import sys, time
from pathlib import Path
from ivl.utils.files import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_held_directory_is_refused_by_name_until_its_holder_is_killed(tmp_path: Path) -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    with pytest.raises(InputError, match=f"{tmp_path.name}: another process is at work"), locked(tmp_path):
        pass
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with locked(tmp_path):
        pass


def test_a_missing_directory_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be written"), locked(tmp_path / "missing"):
        pass


def test_only_files_that_end_are_regular(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"abc")
    (tmp_path / "link").symlink_to("file")
    assert regular(tmp_path / "link").st_size == 3
    assert regular(str(tmp_path))  # whoever opens a folder says so in better words
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "zero").symlink_to("/dev/zero")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket"))
        reading, writing = os.pipe()
        kinds = {"fifo": "a pipe", "zero": "a device", "socket": "a socket", f"/dev/fd/{reading}": "a pipe"}
        for name, kind in kinds.items():
            with pytest.raises(InputError, match=f"{name}: is {kind}, not a regular file; write its content into a file"):
                regular(tmp_path / name)
        os.close(reading)
        os.close(writing)
    with pytest.raises(FileNotFoundError):
        regular(tmp_path / "gone")


def test_a_lock_leaves_no_file_behind_and_takes_away_none(tmp_path: Path) -> None:
    with locked(tmp_path):
        assert (tmp_path / ".lock").exists()
    assert list(tmp_path.iterdir()) == []
    (tmp_path / ".lock").write_text("somebody's notes")
    with locked(tmp_path):
        pass
    assert (tmp_path / ".lock").read_text() == "somebody's notes"


def test_what_is_in_the_place_is_renamed_also_beside_links_to_nothing(tmp_path: Path) -> None:
    (tmp_path / "new").mkdir()
    (tmp_path / "place").mkdir()
    (tmp_path / "place" / "notes").write_text("mine")
    (tmp_path / "place.old").symlink_to("nowhere")
    put_in_place(tmp_path / "new", tmp_path / "place")
    assert (tmp_path / "place.old-2" / "notes").read_text() == "mine" and (tmp_path / "place.old").is_symlink()
    assert list((tmp_path / "place").iterdir()) == []


def test_a_path_is_real_also_through_links_that_lead_to_one_another(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("file")
    (tmp_path / "loop").symlink_to("loop")
    assert real(tmp_path / "link") == real(tmp_path) / "file"
    assert real(tmp_path / "loop" / "a").name == "a"


def test_a_digest_is_of_content_and_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "PIECE", 4)
    a, b = tmp_path / "a", tmp_path / "b"
    a.write_bytes(b"0123456789"), b.write_bytes(b"")
    whole = files.digest([a, b])
    assert whole == files.digest([a, b]) != files.digest([b, a])
    assert files.digest([a], limit=4) != files.digest([a])
    a.write_bytes(b"0123456798")
    assert files.digest([a, b]) != whole


@pytest.mark.parametrize("kind", ["link", "dangling", "pipe", "folder"])
def test_a_temporary_name_that_is_taken_changes_nothing(tmp_path: Path, kind: str) -> None:
    victim, part = tmp_path / "victim", tmp_path / ".out.json.new"
    if kind != "dangling":
        victim.write_text("mine")
    if kind in ("link", "dangling"):
        part.symlink_to(victim)
    elif kind == "pipe":
        os.mkfifo(part)
    else:
        part.mkdir()
    with pytest.raises(OSError):
        write_atomic(tmp_path / "out.json", "text")
    assert not (tmp_path / "out.json").exists() and part.lstat()
    assert victim.read_text() == "mine" if kind != "dangling" else not victim.exists()


def test_what_a_killed_writer_left_is_written_anew_and_other_files_stay(tmp_path: Path) -> None:
    (tmp_path / ".out.json.new").write_text("half")
    (tmp_path / "out.json.part").write_text("mine")
    write_atomic(tmp_path / "out.json", "whole")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"out.json": "whole", "out.json.part": "mine"}


@pytest.mark.parametrize("kind", ["link", "pipe", "folder"])
def test_a_lock_that_is_no_file_is_one_line(tmp_path: Path, kind: str) -> None:
    lock = tmp_path / ".lock"
    {"link": lambda: lock.symlink_to(tmp_path / "outside"), "pipe": lambda: os.mkfifo(lock), "folder": lock.mkdir}[kind]()
    with pytest.raises(InputError, match="cannot be written"), locked(tmp_path):
        pass
    assert not (tmp_path / "outside").exists()
