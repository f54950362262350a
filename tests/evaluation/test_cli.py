"""`ivl eval` end to end on a tiny model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ivl.cli.eval import evaluate
from ivl.errors import InputError
from tests.helpers.engines import tiny_directory


def test_eval_writes_report_and_predictions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("easy_vqa")
    model = str(tiny_directory(tmp_path / "model"))
    out = tmp_path / "report.json"
    evaluate([model, "--task", "easy-vqa", "--limit", "20", "--out", str(out)])
    printed = capsys.readouterr().out
    report = json.loads(out.read_text())
    assert set(report) >= {"task", "metric", "value", "ci95", "n", "by_type", "model", "versions"} and report["n"] == 20
    assert "95% interval" in printed and "n 20" in printed
    lines = (tmp_path / "report.predictions.jsonl").read_text().splitlines()
    assert len(lines) == 21
    evaluate([model, "--limit", "25", "--out", str(out)])  # goes on
    assert (tmp_path / "report.predictions.jsonl").read_text().splitlines()[:21] == lines
    with pytest.raises(InputError, match=r"holds predictions with tiling .*; --fresh"):
        evaluate([model, "--limit", "25", "--out", str(out), "--max-tiles", "2"])
    evaluate([model, "--limit", "5", "--out", str(out), "--max-tiles", "2", "--fresh"])
    assert json.loads(out.read_text())["n"] == 5


def test_eval_lists_tasks_and_suggests_names(capsys: pytest.CaptureFixture[str]) -> None:
    evaluate(["--list"])
    assert "easy-vqa" in capsys.readouterr().out
    with pytest.raises(InputError, match="did you mean 'easy-vqa"):
        evaluate(["model", "--task", "easyvqa"])
    with pytest.raises(InputError, match="name a model"):
        evaluate([])
