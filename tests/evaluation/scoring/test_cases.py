"""Verification against answers labelled by hand, each as a careful grader would."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path
from typing import get_args

import pytest

from ivl.evaluation.scoring import AnswerMode, compare

CASES = [json.loads(line) for line in (Path(__file__).parent / "cases.jsonl").read_text(encoding="utf-8").splitlines()]
MOST_SECONDS = 120.0
"""Processor time of all cases, those of ended workers included: a guard against hanging that a busy machine does not meet."""


def test_every_case_is_judged_as_labelled_and_in_time() -> None:
    pytest.importorskip("math_verify")
    wrong, began = [], processor_time()
    for number, case in enumerate(CASES, 1):
        prediction = case["prediction"] * case.get("repeat", 1)
        verdict = compare(prediction, case["truth"], mode=case["mode"], choices=case.get("choices", ()))
        if not 0 <= verdict.score <= 1 or verdict.correct != case["accept"]:
            wrong.append((number, case["mode"], prediction[:40], case["truth"], verdict))
    assert not wrong
    assert processor_time() - began < MOST_SECONDS


def processor_time() -> float:
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def test_the_table_is_wide_enough() -> None:
    kinds = Counter(case["type"] for case in CASES)
    assert sum(kinds.values()) >= 300 and min(kinds.values()) >= 10
    for kind in ("units", "fraction", "latex", "choice text", "chinese", "percent", "thousands", "negation"):
        assert kinds[kind] >= 15, kind
    assert {case["mode"] for case in CASES} == set(get_args(AnswerMode))
    asked = [json.dumps({**case, "accept": None, "why": None}) for case in CASES]
    assert len(set(asked)) == len(asked)
