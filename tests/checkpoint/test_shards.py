"""Rows of our parameters read alone, from either dialect and from the files of a sharded run."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ivl.checkpoint import save_model
from ivl.checkpoint.model_dir import empty_model, open_rows
from ivl.checkpoint.shards import FOLDER, ShardedWeights
from ivl.checkpoint.tensor_file import TensorFile
from ivl.errors import InputError
from tests.helpers.checkpoints import random_model, tiny_like


@pytest.mark.parametrize("dialect", ["internvl_chat", "transformers"])
@pytest.mark.parametrize("size", ["1B", "8B", "3.5-1B"])
def test_any_rows_are_those_of_the_parameter(tmp_path, size, dialect):
    model = random_model(tiny_like(size))
    save_model(model, tmp_path, dialect=dialect, max_shard_bytes=60_000)
    stored, draw = open_rows(tmp_path, empty_model(model.config)), random.Random(0)
    for name, parameter in model.named_parameters():
        assert stored.shapes[name] == tuple(parameter.shape) and stored.get(name).equal(parameter)
        for _ in range(5):
            first, last = sorted(draw.sample(range(len(parameter) + 1), 2))
            assert stored.rows(name, first, last).equal(parameter[first:last]), (name, first, last)


def write(folder: Path, parts: dict[int, dict[str, tuple[int, torch.Tensor]]]) -> Path:
    (folder / FOLDER).mkdir(exist_ok=True)
    for rank, tensors in parts.items():
        offsets = {name: {"saved_offsets": [first]} for name, (first, _) in tensors.items()}
        save_file(
            {name: tensor for name, (_, tensor) in tensors.items()}, folder / FOLDER / f"rank-{rank:05d}.safetensors",
            metadata={"DCP_SHARDING_INFO": json.dumps(offsets)},
        )  # fmt: skip
    return folder


def test_rows_of_several_files(tmp_path):
    whole = torch.arange(10.0).view(5, 2)
    parts = {0: {"w": (3, whole[3:]), "w|step": (0, torch.tensor(7.0))}, 1: {"w": (0, whole[:3])}, 2: {"w": (5, whole[5:])}}
    write(tmp_path, parts)
    stored = ShardedWeights(tmp_path)
    assert stored.shapes == {"w": (5, 2)} and stored.get("w").equal(whole)
    assert all(stored.rows("w", a, b).equal(whole[a:b]) for a in range(5) for b in range(a + 1, 6))
    assert ShardedWeights(tmp_path, state=True).get("w|step") == 7


def test_missing_rows_and_other_files_are_one_line(tmp_path):
    with pytest.raises(InputError, match="rows of 'w' are missing"):
        ShardedWeights(write(tmp_path, {0: {"w": (0, torch.ones(2, 2))}, 1: {"w": (3, torch.ones(2, 2))}}))
    place = tmp_path / FOLDER / "rank-00001.safetensors"
    save_file({"w": torch.ones(2)}, place)
    with pytest.raises(InputError, match=r"rank-00001\.safetensors: does not say where its rows belong"):
        ShardedWeights(tmp_path)
    for data in (b"", b"x" * 100, (2**40).to_bytes(8, "little") + b"{}"):
        place.write_bytes(data)
        with pytest.raises(InputError, match=r"rank-00001\.safetensors: cannot be read"):
            TensorFile(place)
