"""Ranks share the questions out, and the first one reports what one process would."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ivl.cli.eval import evaluate
from ivl.errors import InputError
from ivl.evaluation import run
from ivl.train.world import World
from tests.helpers.engines import tiny_directory
from tests.helpers.ranks import on_ranks


def _rank(_: int, arguments: list[str]) -> None:
    evaluate(arguments)


def test_ranks_share_the_questions(tmp_path: Path) -> None:
    pytest.importorskip("easy_vqa")
    command = [str(tiny_directory(tmp_path / "model")), "--limit", "11", "--max-new-tokens", "3", "--device", "cpu", "--out"]
    evaluate([*command, str(tmp_path / "one.json")])
    on_ranks(2, _rank, [*command, str(tmp_path / "two.json")])
    reports = [json.loads((tmp_path / f"{name}.json").read_text()) for name in ("one", "two")]
    assert reports[0] == reports[1]
    shares = [(tmp_path / f"two.rank{rank}.jsonl").read_text().splitlines()[1:] for rank in (0, 1)]
    assert [len(share) for share in shares] == [6, 5], "no question is asked twice"
    lines = [(tmp_path / f"{name}.predictions.jsonl").read_text().splitlines() for name in ("one", "two")]
    assert sorted(lines[0]) == sorted(lines[1])
    on_ranks(2, _rank, [*command, str(tmp_path / "two.json")])
    assert (tmp_path / "two.predictions.jsonl").read_text().splitlines() == lines[1]


def test_a_model_on_several_cards_is_for_one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "start_world", lambda _: World(0, 2))
    with pytest.raises(InputError, match="--device cuda:0,cuda:1 is for one process: torchrun gives each of 2 a card"):
        evaluate(["tiny", "--device", "cuda:0,cuda:1", "--out", str(tmp_path / "report.json")])
