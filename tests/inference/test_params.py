"""Sampling parameters and grammars are checked where they are made: type and range, by name."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from ivl.errors import InputError
from ivl.types import Grammar, SamplingParams

NUMBERS = ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
COUNTS = ("max_new_tokens", "top_k", "seed", "logprobs")


@pytest.mark.parametrize("name", [*NUMBERS, *COUNTS, "stop", "ignore_eos", "guide"])
def test_a_value_of_another_type_or_outside_its_range_is_refused_by_name(name: str) -> None:
    wrong: list[Any] = [math.nan, math.inf, -math.inf, 1e300, -5.5, "1", b"1", [1], {}, object(), 10**400]
    if name not in ("seed", "logprobs", "guide"):
        wrong.append(None)
    if name in COUNTS:
        wrong += [1.5, True, 2**64]
    if name in ("temperature", "repetition_penalty", "top_p"):
        wrong += [1e-300]
    if name == "stop":
        wrong += ["end", (5,), (b"x",)]
    for value in wrong:
        with pytest.raises(InputError, match=name) as caught:
            SamplingParams(**{name: value})
        assert len(str(caught.value)) < 300


def test_values_at_their_limits_are_taken() -> None:
    SamplingParams(
        temperature=1e-4, top_p=1, top_k=0, min_p=1.0, seed=2**64 - 1, logprobs=0, stop=["a"], frequency_penalty=-2,  # type: ignore[arg-type]
    )  # fmt: skip
    SamplingParams(temperature=np.float32(0.5), seed=np.int64(-(2**63)), max_new_tokens=np.int32(1))  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"temperature must be 0 \(greedy\) or at least 0\.0001, got 9e-05"):
        SamplingParams(temperature=0.00009)


@pytest.mark.parametrize(
    ("kind", "value"), [("xml", "x"), (5, "x"), ("json", "{}"), ("regex", ""), ("choice", ["a"]), ("regex", 5)]
)
def test_grammars_of_another_kind_or_type_are_refused(kind: Any, value: Any) -> None:
    with pytest.raises(InputError, match="grammar"):
        Grammar(kind, value)
