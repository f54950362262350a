"""Weights read straight into memory are those that are stored, however the file and the model divide them."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from ivl.checkpoint import files, load_model, save_model
from ivl.checkpoint.files import WEIGHTS, Weights
from ivl.errors import InputError
from tests.helpers.checkpoints import random_model, tiny_like


@pytest.fixture
def stored(tmp_path):
    torch.manual_seed(0)
    tensors = {f"t{i}": torch.randn(i + 1, 7).to((torch.float32, torch.bfloat16)[i % 2]) for i in range(40)}
    tensors |= {"empty": torch.empty(0, 3), "scalar": torch.tensor(2.5)}
    save_file(tensors, tmp_path / WEIGHTS)
    return tmp_path, tensors


def test_all_and_some(stored, monkeypatch):
    directory, tensors = stored
    for pieces, bytes_each in ((1024, 1 << 30), (3, 1 << 30), (1024, 100)):
        monkeypatch.setattr(files, "MAX_PIECES", pieces)
        monkeypatch.setattr(files, "MAX_READ", bytes_each)
        for names in (list(tensors), list(tensors)[::3], ["t5", "t5"]):
            ours = [(name, torch.full_like(tensors[name], 9)) for name in names]
            Weights(directory).fill(ours)
            assert all(torch.equal(tensor, tensors[name]) for name, tensor in ours)


def test_into_parts_and_other_types(stored):
    directory, tensors = stored
    fused = torch.zeros(30, 7)
    turned = torch.zeros(7, 10).T
    double = torch.zeros(13, 7, dtype=torch.float64)
    Weights(directory).fill([("t8", fused[2:11]), ("t10", fused[11:22]), ("t9", turned), ("t12", double)])
    assert torch.equal(fused, torch.cat([torch.zeros(2, 7), tensors["t8"], tensors["t10"], torch.zeros(8, 7)]))
    assert torch.equal(turned, tensors["t9"].float()) and torch.equal(double, tensors["t12"].double())


def test_a_file_cut_meanwhile(stored):
    directory, tensors = stored
    weights = Weights(directory)
    with (directory / WEIGHTS).open("r+b") as file:
        file.truncate((directory / WEIGHTS).stat().st_size - 40)
    with pytest.raises(InputError, match="ends too early"):
        weights.fill((name, torch.empty_like(tensor)) for name, tensor in tensors.items())


def test_embeddings_in_their_file(tmp_path):
    model = random_model(tiny_like("1B"))
    save_model(model, tmp_path)
    mapped, copied = (load_model(tmp_path, map_embeddings=mapped) for mapped in (True, False))
    assert all(torch.equal(a, b) for a, b in zip(mapped.parameters(), copied.parameters(), strict=True))
    with torch.no_grad():  # the file keeps what it has
        mapped.decoder.embeddings.weight.zero_()
    save_model(mapped, tmp_path / "other")
    assert torch.equal(load_model(tmp_path).decoder.embeddings.weight, model.decoder.embeddings.weight)
    half = load_model(tmp_path, map_embeddings=True, dtype=torch.bfloat16)
    assert half.decoder.embeddings.weight.dtype == torch.bfloat16
