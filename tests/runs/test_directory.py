"""The run directory: nothing that ivl did not write is touched, one process has it at a time, damage is named."""

import json
import os
import resource
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest

from ivl.errors import InputError
from ivl.runs.directory import latest_checkpoint
from ivl.runs.outcome import read_metrics
from ivl.runs.run import run
from ivl.train.loop import Evaluator
from ivl.train.state import MARKER
from ivl.utils.jsonl import AppendLog
from tests.helpers.training import changed, wait_for
from tests.runs.helpers import rows, same_weights, snapshot, start, steps


@pytest.fixture
def short_run(config):
    return changed(config, num_steps=4, save_every=2)


def test_checkpoints_of_others_are_left_and_named(short_run, capsys):
    folder = Path(short_run.run_dir)
    for name in ("checkpoint-500", ".tmp-notes", ".tmp-checkpoint-mine"):
        (folder / name).mkdir(parents=True)
        (folder / name / "adapter_model.safetensors").write_text("x")
    (folder / "checkpoint-4").write_text("a file")
    (folder / ".tmp-checkpoint-9" / "trainer").mkdir(parents=True)
    with pytest.raises(InputError, match=r"holds \.tmp-checkpoint-9, but no run\.json of the run that wrote it"):
        run(short_run)
    (folder / ".tmp-checkpoint-9").rename(folder / ".tmp-checkpoint-mine-2")
    before = snapshot(folder)
    run(changed(short_run, keep_last=1))
    after = snapshot(folder)
    assert {name: value for name, value in before.items() if name != "checkpoint-4"}.items() <= after.items()
    assert (folder / "checkpoint-4.old").read_text() == "a file"
    assert (folder / "checkpoint-4" / MARKER).is_file() and not (folder / "checkpoint-2").exists()
    words = capsys.readouterr().err
    assert "checkpoint-500: not a checkpoint of ivl" in words and "checkpoint-4 was there already" in words


def test_keep_last_removes_only_what_was_written(short_run):
    run(short_run)
    folder = Path(short_run.run_dir)
    (folder / "checkpoint-2" / "notes.txt").write_text("mine")
    (folder / "checkpoint-1").symlink_to("checkpoint-2")
    (folder / "model" / "notes.txt").write_text("mine, too")
    (folder / ".tmp-checkpoint-9" / "trainer").mkdir(parents=True)
    run(changed(short_run, num_steps=8, keep_last=1), resume=True, allow_changed=True)
    assert (folder / "checkpoint-2" / "notes.txt").is_file() and (folder / "checkpoint-1").is_symlink()
    assert not (folder / "checkpoint-4").exists() and (folder / "checkpoint-8").is_dir()
    assert not (folder / ".tmp-checkpoint-9").exists()
    assert (folder / "model.old" / "notes.txt").read_text() == "mine, too"
    before = snapshot(folder)
    run(changed(short_run, num_steps=8, keep_last=1), resume=True)  # finished: nothing is left to do
    assert {k: v for k, v in snapshot(folder).items() if not k.startswith(("environment", "run"))}.items() <= before.items()


def test_a_refused_start_changes_nothing(short_run, tmp_path):
    run(short_run)
    folder = Path(short_run.run_dir)
    with (folder / "checkpoint-4" / "config.json").open("a") as file:
        file.write(" ")
    (folder / ".tmp-checkpoint-6").mkdir()
    for broken in ("checkpoint-2", None):
        if broken:
            (folder / broken / MARKER).unlink()
        before = snapshot(folder)
        for options in ({}, {"resume": True}):
            with pytest.raises(InputError, match=r"holds a run|no sound checkpoint"):
                run(short_run, **options)
        assert snapshot(folder) == before
    others = tmp_path / "others"
    for name in ("model", "metrics.jsonl", "run.json"):
        shutil.rmtree(others, ignore_errors=True)
        others.mkdir()
        (others / name).write_text("somebody's")
        with pytest.raises(InputError, match=rf"{name}"):
            run(changed(short_run, out_dir=str(others)), resume=True)
        assert snapshot(others) == snapshot(others) and (others / name).read_text() == "somebody's"
    missing = changed(short_run, out_dir=str(tmp_path / "a" / "b"), model=str(tmp_path / "nowhere"), tokenizer="")
    with pytest.raises(InputError, match="nowhere"):
        run(missing)
    assert not (tmp_path / "a").exists()


def test_a_directory_that_cannot_be_is_one_line(short_run, tmp_path):
    (tmp_path / "file").write_text("x")
    for name in ("file", "file/run", "x" * 300, "a\0b"):
        with pytest.raises(InputError, match="cannot be the directory of a run"):
            run(changed(short_run, out_dir=str(tmp_path / name)))
    with pytest.raises(InputError, match=r"\\udcff': this name is not UTF-8"):
        run(changed(short_run, out_dir=str(tmp_path / "\udcff")))


def test_of_two_starts_and_two_resumes_one_wins(short_run, tmp_path):
    config = changed(short_run, num_steps=30, save_every=1, keep_last=2)
    log = tmp_path / "log"
    for resume in (False, True):
        goal = changed(config, num_steps=60) if resume else config
        both = [start(run_or_resume, goal, resume, log=log) for _ in range(2)]
        for process in both:
            process.join(120)
        assert sorted(process.exitcode for process in both) == [0, 1]
    assert log.read_text().count("run: another process is at work in this directory") == 2
    assert [step for step, *_ in steps(config)] == list(range(1, 61))


def run_or_resume(config, resume):
    run(config, resume=resume, allow_changed=resume)


def test_a_killed_run_leaves_no_lock(short_run, tmp_path):
    config = changed(short_run, num_steps=1000, save_every=1)
    process = start(run, config, log=tmp_path / "log")
    wait_for(Path(config.run_dir) / "checkpoint-2" / MARKER)
    with pytest.raises(InputError, match="another process is at work"):
        run(config, resume=True)
    os.kill(process.pid, signal.SIGKILL)
    process.join(20)
    run(changed(config, num_steps=4), resume=True, allow_changed=True)


def test_a_damaged_checkpoint_is_named_and_the_one_before_taken(short_run, tmp_path, capsys):
    run(short_run)
    whole, folder = tmp_path / "whole", Path(short_run.run_dir)
    shutil.copytree(folder, whole)
    shutil.rmtree(folder / "model")
    flip(folder / "checkpoint-4" / "trainer" / "optimizer.safetensors")
    run(short_run, resume=True)
    words = capsys.readouterr().err
    assert "checkpoint-4/trainer/optimizer.safetensors: its content is not what was written" in words
    assert "goes on from step 2" in words and same_weights(whole / "model", folder / "model")
    assert (folder / "checkpoint-4.old").is_dir()


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    for at in range(len(data) // 2, len(data) // 2 + 50):
        data[at] ^= 1
    path.write_bytes(data)


VALUES = [b"", b"[]", b"5", b"null", b'"x"', b"{}", b'{"a": 1}', b"\xff\xfe", b"[" * 10000, b'{"step": "x"}', b"\0" * 40]
STATES = [
    {"step": 0}, {"step": 2.5}, {"step": None}, {"world_size": 0}, {"world_size": 10**12}, {"world_size": -1},
    {"counters": []}, {"counters": {"step": "x"}}, {"counters": {"further": 1}}, {"counters": {"step": 7}},
    {"objective": 3}, {"step": 10**400},
]  # fmt: skip


def test_any_bytes_in_a_checkpoint_are_one_line(config, capsys):
    config = changed(config, num_steps=1, save_every=1)
    run(config)
    checkpoint = Path(config.run_dir) / "checkpoint-1"
    shutil.rmtree(Path(config.run_dir) / "model")
    marker, state = checkpoint / MARKER, checkpoint / "trainer" / "state.json"
    good = {path: path.read_bytes() for path in checkpoint.rglob("*") if path.is_file()}
    sizes = {name: about[0] for name, about in json.loads(good[marker]).items()}

    def refused(place, value, *, old: bool) -> None:
        place.write_bytes(value)
        if old:  # as older versions wrote it
            relative = place.relative_to(checkpoint).as_posix()
            marker.write_text(json.dumps(sizes | ({relative: len(value)} if place != marker else {})))
        with pytest.raises(InputError, match=r"no sound checkpoint|does not fit the run"):
            run(config, resume=True)
        assert not Path(config.run_dir, "model").exists()
        for path, content in good.items():
            path.write_bytes(content)

    for value in VALUES:
        refused(marker, value, old=False)
        for name in ("state.json", "rank-0.json", "optimizer.safetensors"):
            refused(checkpoint / "trainer" / name, value, old=False)
            refused(checkpoint / "trainer" / name, value, old=True)
    for change in STATES:
        refused(state, json.dumps(json.loads(good[state]) | change).encode(), old=True)
    marker.unlink()
    with pytest.raises(InputError, match="no sound checkpoint"):
        run(config, resume=True)
    marker.write_text(json.dumps(sizes))
    run(config, resume=True)


def crash(model):
    raise KeyboardInterrupt


def limited(config, large: bool) -> None:
    def full(*_):
        raise OSError(27, "File too large")

    if large:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    else:
        AppendLog.append = full  # metrics.jsonl
    run(config, resume=True)


@pytest.mark.parametrize("large", [False, True])
def test_a_full_disk_leaves_the_last_good_checkpoint(short_run, tmp_path, large):
    config = changed(short_run, num_steps=6)
    whole = run(changed(config, out_dir=str(tmp_path / "whole")))
    with pytest.raises(KeyboardInterrupt):
        run(config, evaluators=lambda _: (Evaluator("crash", 3, crash),))
    log = tmp_path / "log"
    process = start(limited, config, large, log=log)
    process.join(60)
    text = log.read_text()
    assert process.exitcode == 1 and "Traceback" not in text and "File too large" in text.splitlines()[-1]
    assert f"go on with: ivl train --resume {config.run_dir}" in text
    newest = latest_checkpoint(Path(config.run_dir))
    assert (
        newest is not None
        and newest.name == ("checkpoint-2" if large else "checkpoint-3")
        and not list(Path(config.run_dir).glob(".tmp-*"))
    )
    assert same_weights(run(config, resume=True), whole)
    assert [row["step"] for row in rows(config)] == [1, 2, *([3] if large else []), 4, 5, 6]


def test_the_first_command_is_kept(short_run, monkeypatch):
    monkeypatch.setattr("sys.argv", ["ivl", "train", "first"])
    run(short_run)
    monkeypatch.setattr("sys.argv", ["ivl", "train", "second"])
    run(changed(short_run, num_steps=6), resume=True, allow_changed=True)
    environment = json.loads(Path(short_run.run_dir, "environment.json").read_text())
    assert environment["command"][-1] == "first"
    assert [(each["step"], each["command"][-1]) for each in environment["starts"]] == [(0, "first"), (4, "second")]


def test_a_run_does_not_lie_among_its_rows(short_run, tmp_path):
    rows_file = Path(short_run.data.mixture)
    folder = rows_file.parent
    before = snapshot(folder)
    of_folder = changed(short_run, data=replace(short_run.data, mixture=str(folder)))
    for given, place in ((short_run, folder), (of_folder, folder), (of_folder, folder / "new" / "run")):
        with pytest.raises(InputError, match="among the rows of"):
            run(changed(given, out_dir=str(place)))
        assert snapshot(folder) == before


@pytest.mark.parametrize("name", ["run.json", "metrics.jsonl", "model"])
def test_a_link_to_nothing_is_not_replaced(short_run, name):
    folder = Path(short_run.run_dir)
    folder.mkdir()
    (folder / name).symlink_to("nowhere")
    with pytest.raises(InputError, match=rf"{name}: is a link to nothing"):
        run(short_run)
    assert [path.name for path in folder.iterdir()] == [name] and (folder / name).is_symlink()


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (b"{broken\n", "not valid JSON"),
        (b'{"step": 1, "loss": "\xe9"}\n', "not valid JSON"),
        (b"[]\n", "not a line that ivl wrote"),
        (b'{"step": 1}\n', "not a line that ivl wrote"),
    ],
)
def test_a_damaged_line_of_metrics_is_named(tmp_path, line, problem):
    good = b'{"step": 1, "loss": 2.0}\n'
    (tmp_path / "metrics.jsonl").write_bytes(good + line + good + b'{"step"')
    with pytest.raises(InputError, match=f"metrics.jsonl:2: {problem}"):
        read_metrics(tmp_path)
    (tmp_path / "metrics.jsonl").write_bytes(good + b'{"step"')  # the end was cut off: the run was killed
    assert read_metrics(tmp_path) == [{"step": 1, "loss": 2.0}]
