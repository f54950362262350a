"""An endpoint is evaluated as a model is, and may be the judge."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ivl.cli.eval import evaluate
from tests.evaluation.rows import write_tsv
from tests.evaluation.test_benchmarks import choice_rows
from tests.helpers.servers import KEY, engine, running


def test_an_endpoint_gives_what_the_model_gives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    served = engine(tmp_path / "model")
    path = write_tsv(tmp_path / "rows.tsv", choice_rows(3))
    command = ["--task", "mmstar", "--data", str(path), "--max-new-tokens", "3", "--out"]
    evaluate([str(tmp_path / "model"), *command, str(tmp_path / "here.json")])
    with running(served) as server:
        url = f"{server.url}/v1"
        evaluate(["--url", url, "--url-model", "tiny", *command, str(tmp_path / "there.json"), "--judge-url", url,
                  "--judge-url-model", "tiny"])  # fmt: skip
    scores = [(tmp_path / f"{name}.scores.jsonl").read_text().splitlines()[1:] for name in ("here", "there")]
    assert [json.loads(line)["reply"] for line in scores[0]] == [json.loads(line)["reply"] for line in scores[1]]
    assert json.loads((tmp_path / "there.json").read_text())["model"] == "tiny"
    assert (tmp_path / "there.judge.jsonl").read_text().splitlines()[1:], "the endpoint was asked as the judge, too"
