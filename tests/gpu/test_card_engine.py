"""The engine on a card, and on two, answers as on the CPU, and the host waits once a step (see tests/helpers/pretend.cpp)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ivl.gpu.spread import shares
from tests.helpers import pretend
from tests.helpers.card_engine import CASES, SPREAD, TWO_CARDS

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config) -> dict[str, Any]:
    """What tests.helpers.card_engine prints; one process does all cases, since torch must be imported after the device."""
    return pretend.printed_by("tests.helpers.card_engine", tmp_path_factory, pytestconfig)


@pytest.mark.parametrize(("case", "device"), [(case, "cuda") for case in CASES] + [(case, TWO_CARDS) for case in SPREAD])
def test_a_card_answers_as_the_cpu_does(found: dict[str, Any], case: str, device: str) -> None:
    assert f"replies {case}" not in found["failed"], found["failed"][f"replies {case}"]
    on_cpu, on_card = (found["replies"][case][each] for each in ("cpu", device))
    if case != "logprobs":
        assert on_card == on_cpu
        return
    for ours, theirs in zip(on_card, on_cpu, strict=True):
        for (token, value, top), (other, expected, best) in zip(ours, theirs, strict=True):
            assert token == other and value == pytest.approx(expected, abs=1e-4)
            assert [each for each, _ in top] == [each for each, _ in best]
            assert [each for _, each in top] == pytest.approx([each for _, each in best], abs=1e-4)


@pytest.mark.parametrize("case", ["greedy", "sampled", "penalties", "logprobs", "two cards"])
def test_the_host_reads_a_decoding_step_once(found: dict[str, Any], case: str) -> None:
    assert f"waits {case}" not in found["failed"], found["failed"][f"waits {case}"]
    assert sum(found["waits"][case].values()) == 1, found["waits"][case]


def test_a_decoding_step_replays_one_graph_at_the_same_addresses(found: dict[str, Any]) -> None:
    assert not [case for case in found["failed"] if case.startswith("graphs")], found["failed"]
    graphs = found["graphs"]["two steps of a bucket"]
    assert graphs["graphs"] == 1 and graphs["replays"] == graphs["traces"] >= 5
    assert graphs["equal"] and graphs["operations"] > 20


def test_layers_and_their_cache_are_shared_out_over_two_cards(found: dict[str, Any]) -> None:
    """The ViT and the head count as the first card's share; the hidden state of four replies moves there and back."""
    assert "spread places" not in found["failed"], found["failed"]
    places = found["spread"]["places"]
    assert places["layers"] == [["cuda:1"], ["cuda:0"], ["cuda:0"]] and places["others"] == ["cuda:1"]
    assert places["cache"] == [["cuda:1", 1], ["cuda:0", 2]]
    assert places["moves"] == [["cuda:1", "cuda:0", [4, 64]], ["cuda:0", "cuda:1", [4, 64]]]


def test_an_adapter_lies_beside_its_layers(found: dict[str, Any]) -> None:
    assert "spread adapter" not in found["failed"], found["failed"]
    on_cpu, on_cards = found["spread"]["adapter"]
    assert on_cpu == on_cards and on_cpu != found["replies"]["greedy"]["cpu"]


def test_devices_that_cannot_be_had_are_refused(found: dict[str, Any]) -> None:
    assert found["spread"]["mixed"].startswith("Expected all tensors to be on the same device"), "what the tests stand on"
    several = "several devices are different cards by their numbers, as in cuda:0,cuda:1"
    here = "device must be auto, cpu or one of 4 cuda devices of this machine, got"
    assert found["spread"]["refused"] == {
        "cuda:0,cpu": f"device cuda:0,cpu: {several}, which cpu is not",
        "cuda,cuda:1": f"device cuda,cuda:1: {several}, which cuda is not",
        "cuda:1,cuda:1": f"device cuda:1,cuda:1: {several}, but cuda:1 is named twice",
        "cuda:0,cuda:4": f"{here} 'cuda:4'",
        "cuda:0,": f"{here} ''",
        "cuda:0,cuda:1,cuda:2,cuda:3": "device names 4 cards, but the decoder has 3 layers: name fewer",
        "tensor ranks": f"tensor_parallel takes a GPU a process: device is auto, cuda or cpu, got {TWO_CARDS}",
        "cache": "max_cache_tokens is 268435456, the memory of the fullest card has room for 167772160 at most: lower it",
    }


@pytest.mark.parametrize(
    ("sizes", "first", "room", "wanted"),
    [
        ([10] * 8, 0, [100, 100], [4, 4]), ([10] * 8, 40, [100, 100], [2, 6]), ([10] * 8, 0, [300, 100], [6, 2]),
        ([10] * 3, 500, [100, 100], [1, 2]), ([10] * 3, 0, [1, 1, 900], [1, 1, 1]), ([10] * 3, 0, [900, 1, 1], [1, 1, 1]),
        ([30, 10, 10, 10], 0, [100, 100], [1, 3]),
    ],
)  # fmt: skip
def test_cards_are_filled_alike(sizes: list[int], first: int, room: list[int], wanted: list[int]) -> None:
    assert shares(sizes, first, room) == wanted


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
