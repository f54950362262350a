"""Damaged files of a checkpoint, as far as its marker lets them through: each is an InputError of one line, or is read.

`IVL_FUZZ=10000 python -m pytest tests/runs/test_fuzz.py` tries as many mutations of each file.
"""

import json
from pathlib import Path

import pytest

from ivl.runs.run import run
from ivl.train.state import MARKER
from tests.helpers.fuzz import changed_bytes, changed_json, hammer
from tests.helpers.training import changed


@pytest.mark.parametrize("name", [MARKER, "trainer/state.json", "trainer/rank-0.json", "trainer/optimizer.safetensors"])
def test_checkpoint(config, name):
    config = changed(config, num_steps=1, save_every=1)
    run(config)
    checkpoint = Path(config.run_dir) / "checkpoint-1"
    path, marker = checkpoint / name, checkpoint / MARKER
    data = path.read_bytes()

    def read() -> None:
        if path != marker:  # a marker of older versions has sizes alone, so that the content reaches its reader
            sizes = {each: about[0] for each, about in json.loads(sealed).items()}
            marker.write_text(json.dumps(sizes | {name: path.stat().st_size}))
        run(config, resume=True)

    sealed = marker.read_bytes()
    if name.endswith(".safetensors"):
        header = 8 + int.from_bytes(data[:8], "little")
        hammer(path, lambda rng: changed_bytes(rng, data, 0, header), read)
    else:
        hammer(path, lambda rng: changed_json(rng, json.loads(data)), read)
