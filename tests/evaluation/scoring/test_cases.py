"""Verification against answers labelled by hand, each as a careful grader would."""

from __future__ import annotations

import json
import time
from collections import Counter
from pathlib import Path
from typing import get_args

import pytest

from ivl.evaluation.scoring import ACCEPT, AnswerMode, verify
from ivl.evaluation.scoring.formulas import shared_comparer

CASES = [json.loads(line) for line in (Path(__file__).parent / "cases.jsonl").read_text(encoding="utf-8").splitlines()]
SLOWEST, ALL = 20.0, 150.0
"""Seconds: guards against hanging; a comparison that meets a limit waits for a new process."""


@pytest.fixture(scope="module", autouse=True)
def _started() -> None:
    pytest.importorskip("math_verify")
    shared_comparer().same("x", "y")


def test_every_case_is_judged_as_labelled_and_in_time() -> None:
    wrong, slow, began = [], [], time.monotonic()
    for number, case in enumerate(CASES, 1):
        at = time.monotonic()
        prediction = case["prediction"] * case.get("repeat", 1)
        score = verify(prediction, case["truth"], mode=case["mode"], choices=case.get("choices", ()))
        if time.monotonic() - at > SLOWEST:
            slow.append(number)
        if not 0 <= score <= 1 or (score > ACCEPT) != case["accept"]:
            wrong.append((number, case["mode"], prediction[:40], case["truth"], score))
    assert not wrong and not slow, (wrong, slow)
    assert time.monotonic() - began < ALL


def test_the_table_is_wide_enough() -> None:
    kinds = Counter(case["type"] for case in CASES)
    assert sum(kinds.values()) >= 300 and min(kinds.values()) >= 10
    for kind in ("units", "fraction", "latex", "choice text", "chinese", "percent", "thousands", "negation"):
        assert kinds[kind] >= 15, kind
    assert {case["mode"] for case in CASES} == set(get_args(AnswerMode))
    asked = [json.dumps({**case, "accept": None, "why": None}) for case in CASES]
    assert len(set(asked)) == len(asked)
