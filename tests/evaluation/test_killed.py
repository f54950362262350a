"""E1: `ivl eval` killed twenty times loses no prediction, repeats none and ends with the same score."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch

from ivl.cli.eval import evaluate
from tests.helpers.engines import tiny_directory

KILLS, EXAMPLES = 20, 800


def in_a_child(arguments: list[str]) -> int:
    """The command in a process of its own; its id."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        torch.set_num_threads(1)
        with Path(os.devnull).open("w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
            evaluate(arguments)
        status = 0
    finally:
        os._exit(status)


def test_e1_twenty_kills_change_nothing(tmp_path: Path) -> None:
    model, rows = str(tiny_directory(tmp_path / "model")), tmp_path / "rows.jsonl"
    turns = ([{"from": "human", "value": f"{n}?"}, {"from": "gpt", "value": "a"}] for n in range(EXAMPLES))
    rows.write_text("".join(json.dumps({"conversations": each}) + "\n" for each in turns))
    common = [model, "--data", str(rows), "--metric", "exact", "--max-new-tokens", "2", "--batch-size", "4", "--out"]
    whole, killed = tmp_path / "whole.json", tmp_path / "killed.json"
    predictions = tmp_path / "killed.predictions.jsonl"
    evaluate([*common, str(tmp_path / "first.json"), "--limit", "1"])  # for its imports
    assert os.waitpid(in_a_child([*common, str(whole)]), 0)[1] == 0
    rng = random.Random(0)
    for _ in range(KILLS):
        size = predictions.stat().st_size if predictions.exists() else 0
        child = in_a_child([*common, str(killed)])
        deadline = time.monotonic() + 20
        while not (predictions.exists() and predictions.stat().st_size > size) and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(rng.random() * 0.01)  # anywhere in the next batches, their writing included
        os.kill(child, signal.SIGKILL)
        assert os.WIFSIGNALED(os.waitpid(child, 0)[1]), "it ended before it was killed: take more examples"
        assert not killed.exists()
    assert os.waitpid(in_a_child([*common, str(killed)]), 0)[1] == 0
    rows = [
        [json.loads(line) for line in path.read_text().splitlines()]
        for path in (predictions, tmp_path / "whole.predictions.jsonl")
    ]
    ids = [row["id"] for row in rows[0][1:]]
    assert len(ids) == len(set(ids)) == EXAMPLES and rows[0][1:] == rows[1][1:]
    reports = [json.loads(path.read_text()) for path in (killed, whole)]
    assert (
        reports[0]["value"] == reports[1]["value"] and reports[0]["ci95"] == reports[1]["ci95"] and reports[0]["n"] == EXAMPLES
    )


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_what_is_answered_and_says_how_to_go_on(
    tmp_path: Path, number: signal.Signals, capfd: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("easy_vqa")
    path = tmp_path / "p.jsonl"
    command = [str(tiny_directory(tmp_path / "model")), "--batch-size", "4", "--predictions", str(path)]
    child = os.fork()
    if not child:
        status = 1
        try:
            torch.set_num_threads(1)
            evaluate([*command, "--limit", "2000"])
        except SystemExit as error:
            status = error.code
        finally:
            os._exit(status)
    deadline = time.monotonic() + 60
    while not (path.exists() and path.read_bytes().count(b"\n") > 8) and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(child, number)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 128 + number
    lines = path.read_bytes().splitlines()
    told = capfd.readouterr().err
    assert "stops after these questions" in told
    assert f"stopped at {len(lines) - 1:,} of 2,000 questions; the same command goes on from there" in told
    evaluate([*command, "--limit", str(len(lines) + 1)])
    assert f"{len(lines) - 1:,} answers from {path}, 2 new" in capfd.readouterr().err
