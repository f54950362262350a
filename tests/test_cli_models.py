"""`ivl models`: nothing is cut, however narrow the terminal. `ivl ... | head` ends without a traceback."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from ivl.cli.models import models
from ivl.config import SIZES

TOTALS = (938193024, 2205754368, 3712637952, 8075365376, 25514186112, 38388164992, 78408318336)


def test_the_table_and_the_json_have_every_id_and_count(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    models([])
    table = capsys.readouterr().out
    models(["--json"])
    rows = json.loads(capsys.readouterr().out)
    assert [row["hub_id"] for row in rows] == [f"OpenGVLab/InternVL2_5-{s}{m}" for m in ("", "-MPO") for s in SIZES]
    assert [row["parameters"] for row in rows] == [*TOTALS, *TOTALS] and len(SIZES) == 7
    for row in rows:
        line = next(line for line in table.splitlines() if f" {row['name']} " in line)
        assert all((f"{value:,}" if isinstance(value, int) else value) in line for value in row.values())


def test_a_reader_that_has_seen_enough_is_no_error() -> None:
    command = [sys.executable, "-m", "ivl", "train", "--help"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout and process.stderr
        process.stdout.close()
        assert process.stderr.read() == "" and process.wait() == 1
