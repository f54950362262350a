"""`ivl models`: nothing is cut, however narrow the terminal."""

from __future__ import annotations

import json

import pytest

from ivl.cli.models import models
from ivl.config import PUBLISHED, SIZES

TOTALS = (938193024, 2205754368, 3712637952, 8075365376, 25514186112, 38388164992, 78408318336)


def test_the_table_and_the_json_have_every_id_and_count(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    models([])
    table = capsys.readouterr().out
    models(["--json"])
    rows = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in rows] == [model.name for model in PUBLISHED] and len(rows) == 14
    assert [row["parameters"] for row in rows] == [*TOTALS, *TOTALS] and len(SIZES) == 7
    for row in rows:
        line = next(line for line in table.splitlines() if f" {row['name']} " in line)
        assert all((f"{value:,}" if isinstance(value, int) else value) in line for value in row.values())
