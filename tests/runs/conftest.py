"""A small run."""

from collections.abc import Iterator

import pytest
import torch

from ivl.checkpoint import save_processor
from ivl.data.config import DataConfig
from ivl.runs.config import RunConfig
from ivl.train.config import OptimConfig, Stage
from tests.helpers.mixtures import make_file, processor
from tests.helpers.training import run_config


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Sums depend on the number of threads in their last bit, and the forked runs have one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def config(tmp_path) -> RunConfig:
    save_processor(processor(), tmp_path / "tokenizer")
    return run_config(
        name="small", out_dir=str(tmp_path / "run"), architecture=processor().config, tokenizer=str(tmp_path / "tokenizer"),
        stage=Stage(trainable=("vision", "projector", "decoder"), drop_path=0.3), optim=OptimConfig(lr=3e-3, warmup_ratio=0.1),
        data=DataConfig(mixture=str(make_file(tmp_path / "data", 24)), max_tokens=300, max_tiles=40, num_workers=0),
        num_steps=12, packs_per_step=2, precision="fp32", save_every=4, log_every=100, log_samples=True, tensorboard=False,
    )  # fmt: skip
