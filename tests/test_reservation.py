"""Laws of reserved memory: weights read into it are the same, bad files change nothing, and what is not used is given back."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ivl import reservation
from ivl.checkpoint import load_model
from ivl.reservation import Reservation
from tests.helpers.engines import tiny_directory

needs_linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux only")
LOAD = """
import hashlib, sys
from ivl import reservation
if sys.argv[2] == "with":
    reservation._worth_it = lambda: True
else:
    reservation._worth_it = lambda: False
claimed = []
claim = reservation.claim
reservation.claim = lambda: claimed.append(claim()) or claimed[-1]
import ivl
model = ivl.load(sys.argv[1])
import torch
assert (claimed[0] is not None) == (sys.argv[2] == "with") and not reservation._pending
if claimed[0] is not None:
    assert claimed[0].used > 0.9 * len(claimed[0].memory), (claimed[0].used, len(claimed[0].memory))
weights = b"".join(p.detach().contiguous().view(torch.uint8).numpy().tobytes() for p in model.engine.model.parameters())
print(hashlib.sha256(weights).hexdigest())
"""


@needs_linux
def test_weights_read_into_reserved_memory_are_the_same(tmp_path: Path) -> None:
    directory = tiny_directory(tmp_path / "model")
    printed = [
        subprocess.run([sys.executable, "-c", LOAD, str(directory), how], check=True, capture_output=True, text=True).stdout
        for how in ("with", "without")
    ]
    assert printed[0] == printed[1] and len(printed[0]) > 60


@needs_linux
def test_pieces_are_aligned_apart_and_no_more_than_there_are() -> None:
    reserved = Reservation([100, 4096, 7])
    pieces = [reserved.take(size) for size in (100, 4096, 7)]
    assert reserved.take(64) is None and reserved.take(0) is None
    tensors = [torch.frombuffer(piece, dtype=torch.uint8) for piece in pieces if piece is not None]
    assert [len(t) for t in tensors] == [100, 4096, 7] and all(t.data_ptr() % 64 == 0 for t in tensors)
    for number, tensor in enumerate(tensors):
        tensor.fill_(number + 1)
    reserved.finish()
    assert [int(t.unique()) for t in tensors] == [1, 2, 3]


@needs_linux
def test_a_reservation_too_small_or_too_large_serves_what_it_can(tmp_path: Path) -> None:
    directory = tiny_directory(tmp_path / "model")
    plain = load_model(directory).state_dict()
    for size in (1000, 10 << 20):
        reservation._pending.append(Reservation([size]))
        loaded = load_model(directory).state_dict()
        assert all(torch.equal(loaded[name], weight) for name, weight in plain.items()) and not reservation._pending


@pytest.mark.parametrize("data", [b"", b"12345678", (50).to_bytes(8, "little") + b"{", b"\xff" * 64])
def test_files_that_are_not_what_they_should_be_reserve_nothing(
    data: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reservation, "_worth_it", lambda: True)
    monkeypatch.delitem(sys.modules, "torch")
    (tmp_path / "model.safetensors").write_bytes(data)
    with reservation.begun(tmp_path):
        assert not reservation._pending
    for header in (
        {"w": {"dtype": "BF16", "data_offsets": [0, 1 << 40]}},
        {"w": {}},
        {"w": {"dtype": "F16", "data_offsets": [0, 2]}},
    ):
        text = json.dumps(header).encode()
        (tmp_path / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + b"12")
        with reservation.begun(tmp_path), reservation.begun(tmp_path / "missing"):
            assert not reservation._pending
