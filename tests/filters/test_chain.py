"""Chains are read strictly, and what the shipped ones say is what the paper says."""

from __future__ import annotations

import dataclasses
import json
import pickle
import re
from pathlib import Path
from typing import Any

import pytest

from ivl.data.mixture import load_mixture
from ivl.errors import InputError
from ivl.filters.chain import CONFIGS, FILTERS, load_chain, read_chain
from ivl.filters.rows import RowChecker, RowEntry
from tests.helpers.mixtures import make_file

DOCS = Path(__file__).parents[2] / "docs/filtering.md"


def chain(*stages: dict[str, Any], **config: Any):
    return read_chain({"stages": list(stages), **config}, "my.json")


def test_the_shipped_chains() -> None:
    assert {path.stem for path in CONFIGS.iterdir()} == {"heuristic", "text", "multimodal"}
    text, multimodal = load_chain("text"), load_chain("multimodal")
    assert {stage.use: stage.limit for stage in text.stages if stage.judged} == {"quality": 7, "llm_repetition": 3}
    assert {text.domain_of(name) for name in ("alpaca", "MetaMathQA", "code_feedback", "ScienceQA")} == {
        "general", "mathematics", "programming", "discipline",
    }  # fmt: skip
    judged = {stage.use: stage for stage in multimodal.stages if stage.judged}
    assert list(judged) == ["llm_repetition"] and judged["llm_repetition"].limit == 3
    assert judged["llm_repetition"].exempts("DocVQA_train") and not judged["llm_repetition"].exempts("sharegpt4v")
    assert not load_chain("heuristic").needs_judge


@pytest.mark.parametrize("name", ["heuristic", "text", "multimodal"])
def test_spelled_out_it_is_the_same_chain(name: str) -> None:
    given = load_chain(name)
    again = read_chain(json.loads(given.to_text()), "printed")
    assert again.stages == given.stages
    assert dataclasses.replace(again.config, stages=given.config.stages) == given.config
    assert '"max_answer": ' in given.to_text() and '"max_chars": ' in given.to_text()


@pytest.mark.parametrize("use", FILTERS)
def test_every_filter_can_be_used(use: str) -> None:
    (stage,) = chain({"use": use}).stages
    assert stage.name == stage.use == use
    assert stage.limit is None or stage.limit > 0
    (line,) = re.findall(rf"^\| `{use}` \|.*$", DOCS.read_text("utf-8"), re.MULTILINE)
    assert re.findall(r"`(\w+)`", line.rsplit("|", 2)[1]) == [field.name for field in dataclasses.fields(stage.rule)]
    pickle.loads(pickle.dumps(stage))


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ([], "must be an object"),
        ({}, "stages is missing"),
        ({"stages": []}, "at least one stage"),
        ({"stagez": []}, "unknown key 'stagez'; did you mean 'stages'"),
        ({"stages": ["length"]}, "stage 1: `use` must be a filter"),
        ({"stages": [{"use": "length"}, {"use": "lenght"}]}, "stage 2: `use` must be a filter, got 'lenght'; did you mean"),
        ({"stages": [{"use": "garbled"}]}, "got 'garbled'; filters are length, runs, "),
        ({"stages": [{"use": "length", "max_answers": 3}]}, "unknown key 'max_answers'; did you mean 'max_answer'"),
        ({"stages": [{"use": "length", "max_answer": "3"}]}, "stage 1 (length): max_answer must be an integer, got '3'"),
        ({"stages": [{"use": "length", "max_answer": True}]}, "max_answer must be an integer, got True"),
        ({"stages": [{"use": "length", "min_answer": 9, "max_answer": 3}]}, "got 9 and 3"),
        ({"stages": [{"use": "quality", "min_score": 70}]}, "min_score must be in [0, 10], got 70"),
        ({"stages": [{"use": "length"}, {"use": "length"}]}, "two stages are called 'length'"),
        ({"stages": [{"use": "length", "name": "unreadable"}]}, "other than 'unreadable'"),
        ({"stages": [{"use": "length", "exempt": "docvqa"}]}, "exempt must be"),
        ({"stages": [{"use": "length"}], "domain": "cooking"}, "unknown domain 'cooking'"),
        ({"stages": [{"use": "length"}], "domains": {"*": "maths"}}, "unknown domain 'maths'"),
        ({"stages": [{"use": "length"}], "judge": {"unjudged": "maybe"}}, "judge: unjudged must be"),
        ({"stages": [{"use": "length"}], "judge": {"temprature": 1}}, "did you mean 'temperature'"),
        ({"stages": [{"use": "length"}], "groups": {"a": "b"}}, "groups must be"),
    ],
)
def test_mistakes_are_named(config: Any, says: str) -> None:
    with pytest.raises(InputError) as caught:
        read_chain(config, "my.json")
    assert str(caught.value).startswith("my.json") and says in str(caught.value)


def test_files_and_names(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="did you mean 'multimodal'"):
        load_chain("multimodel")
    with pytest.raises(InputError, match="cannot be read"):
        load_chain(tmp_path / "none.json")
    path = tmp_path / "mine.json"
    path.write_text('{"stages": [')
    with pytest.raises(InputError, match=r"mine\.json: not valid JSON"):
        load_chain(path)
    path.write_text('{"stages": [{"use": "length", "name": "short", "min_answer": 3}]}')
    assert load_chain(path).stages[0].name == "short"


def test_groups_and_patterns_exempt() -> None:
    (stage,) = chain({"use": "length", "exempt": ["academic", "mine_*"]}, groups={"academic": ["vqa*", "GQA"]}).stages
    assert [stage.exempts(name) for name in ("VQAv2", "gqa", "mine_1", "academic", "other")] == [True, True, True, False, False]


def checked(checker: RowChecker) -> list[tuple[RowEntry, bytes | None]]:
    """All rows with their verdicts, and the signatures of those that reach the stage that compares."""
    entries = [checker.entry(part.dataset, row) for part in checker.parts(100) for row in range(part.first, part.end)]
    return [(entry, checker.apply(checker.chain.stages, entry)) for entry in entries]


def test_rows_are_checked_the_same_in_another_process(tmp_path: Path) -> None:
    path = make_file(tmp_path, 30)
    with path.open("a") as file:
        file.write('{"id": 1}\n{"broken\n')
    checker = RowChecker(load_chain("heuristic"), load_mixture(path))
    found = checked(checker)
    assert checked(pickle.loads(pickle.dumps(checker))) == found
    assert [entry["reason"] for entry, _ in found if "problem" in entry] == ["bad_row", "broken_json"]
    assert any(signature for _, signature in found)


def test_a_missing_image_is_a_bad_row_and_a_rule_s_own_error_is_not(tmp_path: Path) -> None:
    path = make_file(tmp_path, 3)
    (tmp_path / "0.png").unlink()
    (tmp_path / "1.png").write_bytes(b"no image")
    checker = RowChecker(chain({"use": "duplicates"}), load_mixture(path))
    assert [entry.get("reason") for entry, _ in checked(checker)] == ["missing_media", "undecodable_media", None]
