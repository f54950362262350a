"""`ivl models`: nothing is cut, however narrow the terminal. `ivl ... | head` ends without a traceback."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from ivl.cli.models import models

SIZES = ("1B", "2B", "4B", "8B", "26B", "38B", "78B")
TOTALS = (938193024, 2205754368, 3712637952, 8075365376, 25514186112, 38388164992, 78408318336)
LATER = {
    "InternVL3-1B": 938193024, "InternVL3-2B": 2088957440, "InternVL3-8B": 7944373760, "InternVL3-9B": 9141824512,
    "InternVL3-14B": 15117256704, "InternVL3-38B": 38388164992, "InternVL3-78B": 78408318336,
    "InternVL3_5-1B": 1060897792, "InternVL3_5-2B": 2348347392, "InternVL3_5-4B": 4732489216,
    "InternVL3_5-8B": 8528318464, "InternVL3_5-14B": 15119523840, "InternVL3_5-38B": 38390405504,
}  # fmt: skip
"""Sums over the shapes of the parts, by hand. The 9B without the rows that its image tokens add."""


def test_the_table_and_the_json_have_every_id_and_count(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    models([])
    table = capsys.readouterr().out
    models(["--json"])
    rows = json.loads(capsys.readouterr().out)
    assert [row["hub_id"] for row in rows[:14]] == [f"OpenGVLab/InternVL2_5-{s}{m}" for m in ("", "-MPO") for s in SIZES]
    assert [row["parameters"] for row in rows[:14]] == [*TOTALS, *TOTALS]
    versions = {
        "InternVL3-": ("", "-Instruct", "-Pretrained", "-hf"),
        "InternVL3_5-": ("", "-MPO", "-Instruct", "-Pretrained", "-HF"),
    }
    for series, ends in versions.items():
        expected = {f"OpenGVLab/{name}{end}": count for name, count in LATER.items() if name.startswith(series) for end in ends}
        assert {row["hub_id"]: row["parameters"] for row in rows if row["name"].startswith(series)} == expected
    for row in rows:
        line = next(line for line in table.splitlines() if f" {row['name']} " in line)
        assert all((f"{value:,}" if isinstance(value, int) else value) in line for value in row.values())


def test_a_reader_that_has_seen_enough_is_no_error() -> None:
    command = [sys.executable, "-m", "ivl", "train", "--help"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout and process.stderr
        process.stdout.close()
        assert process.stderr.read() == "" and process.wait() == 1
