"""`ivl eval` end to end on a tiny model."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from ivl.cli.eval import evaluate
from ivl.errors import InputError
from ivl.utils.jsonl import AppendLog
from tests.evaluation.rows import write_tsv
from tests.evaluation.test_benchmarks import choice_rows
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


@pytest.mark.parametrize(
    ("name", "content"),
    [("r.json", "{}"), ("r.json", "[1]"), ("r.json", "thesis"), ("r.json", '{"task": "x", "value": 1}'), ("r.html", "<p>mine"),
     ("r.predictions.jsonl", '{"a": 1}'), ("r.predictions.jsonl", '{"a": 1}\n')],
)  # fmt: skip
def test_foreign_files_in_the_place_of_results_are_refused_and_kept(tmp_path: Path, name: str, content: str) -> None:
    pytest.importorskip("easy_vqa")
    model = str(tiny_directory(tmp_path / "model"))
    (tmp_path / name).write_text(content)
    for more in ([], ["--fresh"]):
        with pytest.raises(InputError, match=name):
            evaluate(
                [model, "--limit", "2", "--samples", "2", "--max-new-tokens", "2", "--out", str(tmp_path / "r.json"), *more]
            )
        assert (tmp_path / name).read_text() == content and not (tmp_path / "r.predictions.jsonl").is_dir()


def test_results_need_places_of_their_own(tmp_path: Path) -> None:
    """All of these are refused before the model, which does not exist, is looked for."""
    (tmp_path / "file").write_text("x")
    os.mkfifo(tmp_path / "pipe.json")
    for out, more, problem in (
        ("r.json", ["--predictions", str(tmp_path / "r.json")], "need different names"),
        ("r.html", [], "need different names"),
        ("file/r.json", [], "cannot be written"),
        ("n" * 300, [], "cannot be written"),
        ("pipe.json", [], "is a pipe"),
        ("", [], "cannot be read|cannot be written"),
    ):
        with pytest.raises(InputError, match=problem):
            evaluate(["no-model", "--out", str(tmp_path / out), *more])


def test_two_models_called_model_have_files_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("easy_vqa")
    monkeypatch.chdir(tmp_path)
    for run in ("mine", "yours"):
        tiny_directory(tmp_path / run / "model")
        evaluate([f"{run}/model", "--limit", "2"])
        assert f"predictions: runs/eval/{run}-easy-vqa.jsonl" in capsys.readouterr().out
    evaluate(["mine/model", "--limit", "3"])
    assert "2 answers from runs/eval/mine-easy-vqa.jsonl, 1 new" in capsys.readouterr().err
    shutil.rmtree(tmp_path / "mine/model")
    retrain(tiny_directory(tmp_path / "mine/model"))
    with pytest.raises(InputError, match=r"mine-easy-vqa\.jsonl: holds predictions with weights .*; --fresh forgets them"):
        evaluate(["mine/model", "--limit", "3"])


def retrain(directory: Path) -> None:
    """Change weights, but neither the size nor the time of their file."""
    (path,) = directory.glob("*.safetensors")
    status, data = path.stat(), bytearray(path.read_bytes())
    data[-64:-32] = bytes(value ^ 1 for value in data[-64:-32])
    path.write_bytes(data)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def test_two_commands_in_one_file_at_once(tmp_path: Path) -> None:
    pytest.importorskip("easy_vqa")
    model, path = str(tiny_directory(tmp_path / "model")), tmp_path / "p.jsonl"
    held = AppendLog(path)  # as the other command holds it
    with pytest.raises(InputError, match=r"p\.jsonl: another process is writing this file"):
        evaluate([model, "--limit", "2", "--predictions", str(path)])
    held.close()
    evaluate([model, "--limit", "2", "--predictions", str(path)])


def test_a_benchmark_by_the_command_with_a_judge_and_two_models(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    models = [str(tiny_directory(tmp_path / name / "model")) for name in ("mine", "yours")]
    path = write_tsv(tmp_path / "rows.tsv", choice_rows(3))
    out = tmp_path / "r.json"
    command = ["--task", "mmstar", "--data", str(path), "--max-new-tokens", "3", "--out", str(out)]
    evaluate([*models, *command, "--judge-model", models[0]])
    assert not out.exists()
    reports = {path.name: json.loads(path.read_text()) for path in tmp_path.glob("r-*.json")}
    assert len(reports) == 2
    for report in reports.values():
        assert (report["task"], report["prompt"], report["extraction"], report["n"]) == ("mmstar", "published", "2024-12", 3)
        assert report["data"]["file"] == str(path) and not report["data"]["official"]
        assert report["undecided"]["replies"] + 3 * report["value"] <= 3, "a tiny judge says nothing that can be read"
        assert "at random" in report["undecided"]["notes"][0]
        assert report["undecided"]["notes"][-1].startswith("the judge's replies decide nothing, such as '")
    judged = [line for file in tmp_path.glob("r-*.judge.jsonl") for line in file.read_text().splitlines()[1:]]
    assert len(judged) >= 3 and len(list(tmp_path.glob("r-*.scores.jsonl"))) == 2
    assert "undecided: " in capsys.readouterr().out
    (kept,) = tmp_path.glob("r-*mine*.judge.jsonl")
    before = kept.read_bytes()
    predictions = str(kept).replace(".judge.", ".predictions.")
    evaluate([models[0], *command, "--predictions", predictions, "--judge-model", models[0]])
    assert kept.read_bytes() == before, "the judge is asked nothing twice"
