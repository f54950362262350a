"""The engine on a card answers as on the CPU, and the host waits once a step (see tests/helpers/pretend.cpp)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.helpers import pretend
from tests.helpers.card_engine import CASES

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config) -> dict[str, Any]:
    """What tests.helpers.card_engine prints; one process does all cases, since torch must be imported after the device."""
    return pretend.printed_by("tests.helpers.card_engine", tmp_path_factory, pytestconfig)


@pytest.mark.parametrize("case", CASES)
def test_a_card_answers_as_the_cpu_does(found: dict[str, Any], case: str) -> None:
    assert f"replies {case}" not in found["failed"], found["failed"][f"replies {case}"]
    on_cpu, on_card = (found["replies"][case][device] for device in ("cpu", "cuda"))
    if case != "logprobs":
        assert on_card == on_cpu
        return
    for ours, theirs in zip(on_card, on_cpu, strict=True):
        for (token, value, top), (other, expected, best) in zip(ours, theirs, strict=True):
            assert token == other and value == pytest.approx(expected, abs=1e-4)
            assert [each for each, _ in top] == [each for each, _ in best]
            assert [each for _, each in top] == pytest.approx([each for _, each in best], abs=1e-4)


@pytest.mark.parametrize("case", ["greedy", "sampled", "penalties", "logprobs"])
def test_the_host_reads_a_decoding_step_once(found: dict[str, Any], case: str) -> None:
    assert f"waits {case}" not in found["failed"], found["failed"][f"waits {case}"]
    assert sum(found["waits"][case].values()) == 1, found["waits"][case]


def test_a_decoding_step_replays_one_graph_at_the_same_addresses(found: dict[str, Any]) -> None:
    assert not [case for case in found["failed"] if case.startswith("graphs")], found["failed"]
    graphs = found["graphs"]["two steps of a bucket"]
    assert graphs["graphs"] == 1 and graphs["replays"] == graphs["traces"] >= 5
    assert graphs["equal"] and graphs["operations"] > 20


def test_blocks_that_are_no_pages_are_refused(found: dict[str, Any]) -> None:
    assert found["graphs"]["small blocks"] == "block_size must be a multiple of 256 on a card, got 64"


@pytest.mark.parametrize(
    ("case", "kind"),
    [("int8", "FusedInt8Linear"), ("int4", "Int4Linear"), ("int4 zero point", "Int4Linear"), ("W8A8", "Int8Linear")],
)
def test_a_quantized_layer_takes_the_product_of_torch(found: dict[str, Any], case: str, kind: str) -> None:
    assert f"products {case}" not in found["failed"], found["failed"][f"products {case}"]
    assert found["products"][case]["class"] == kind
    assert max(found["products"][case]["off"]) < (0.02 if case == "W8A8" else 0.006)
