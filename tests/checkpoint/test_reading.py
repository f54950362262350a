"""Weights copied into a model are those that are stored, however the file and the model divide them."""

from __future__ import annotations

import torch
from safetensors.torch import save_file

from ivl.checkpoint import load_model, save_model
from ivl.checkpoint.keymaps import TensorEntry
from ivl.checkpoint.model_dir import fill
from ivl.checkpoint.weights import WEIGHTS, StoredWeights
from tests.helpers.checkpoints import random_model, tiny_like


def test_into_parts_and_other_types(tmp_path):
    torch.manual_seed(0)
    tensors = {f"t{i}": torch.randn(i + 1, 7).to((torch.float32, torch.bfloat16)[i % 2]) for i in range(40)}
    tensors |= {"empty": torch.empty(0, 3), "scalar": torch.tensor(2.5)}
    save_file(tensors, tmp_path / WEIGHTS)
    ours = {name: torch.full_like(tensor, 9) for name, tensor in tensors.items()}
    ours |= {"fused": torch.zeros(30, 7), "turned": torch.zeros(7, 10).T, "double": torch.zeros(13, 7, dtype=torch.float64)}
    entries = [
        *(TensorEntry(name, (name,)) for name in tensors),
        TensorEntry("fused", ("t8", "t0", "t9", "t9"), rows=(9, 1, 10, 10)),
        TensorEntry("turned", ("t9",)),
        TensorEntry("double", ("t12",)),
    ]
    fill(ours, entries, StoredWeights(tmp_path))
    assert all(torch.equal(ours[name], tensors[name]) for name in tensors)
    t0, t8, t9 = tensors["t0"], tensors["t8"], tensors["t9"].float()
    assert torch.equal(ours["fused"], torch.cat([t8, t0, t9, t9])) and torch.equal(ours["turned"], t9)
    assert torch.equal(ours["double"], tensors["t12"].double())


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
