"""Training on a card equals training on the CPU, and the host does not wait for the card (see tests/helpers/pretend.cpp)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.helpers import pretend

ROOT = Path(__file__).parent.parent.parent
RUNS = (
    "bf16", "fp32", "pure_bf16", "checkpointing", "large vit", "text", "projector", "muon", "lora", "captions", "mpo file",
    "mpo model", "mpo adapters", "evaluations", "evaluations bf16",
)  # fmt: skip


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config) -> dict[str, Any]:
    """What tests.helpers.card_cases prints; one process does all cases, since torch must be imported after the device."""
    return pretend.printed_by("tests.helpers.card_cases", tmp_path_factory, pytestconfig)


@pytest.mark.parametrize("case", RUNS)
def test_a_card_trains_as_the_cpu_does(found: dict[str, Any], case: str) -> None:
    assert f"runs {case}" not in found["failed"], found["failed"][f"runs {case}"]
    on_cpu, on_card = (found["runs"][case][device] for device in ("cpu", "cuda"))
    assert len(on_cpu) == len(on_card) >= 2
    for ours, theirs in zip(on_card, on_cpu, strict=True):
        assert ours.keys() == theirs.keys()
        assert ours["step"] == theirs["step"]
        near = {"abs": 1e-5, "rel": 1e-6} if case in ("fp32", "evaluations") else {"abs": 5e-4, "rel": 1e-4}
        for name in ("loss", "length"):
            assert ours.get(name, 0.0) == pytest.approx(theirs.get(name, 0.0), **near)
        # The sum of six log-probabilities, whose logits bf16 rounds.
        assert ours.get("logprob", 0.0) == pytest.approx(theirs.get("logprob", 0.0), rel=10 * near["rel"])
        assert ours.get("grad_norm", 1.0) == pytest.approx(theirs.get("grad_norm", 1.0), rel=5e-3)


@pytest.mark.parametrize("case", ["next_token", "fp32", "preference"])
def test_the_host_waits_once_a_step(found: dict[str, Any], case: str) -> None:
    """Nothing in a micro-batch asks the card for a value; the figures of a step are read together."""
    assert f"waits {case}" not in found["failed"], found["failed"][f"waits {case}"]
    waits = found["waits"][case]
    assert waits["micro"] == {}
    assert sum(waits["step"].values()) == 1
