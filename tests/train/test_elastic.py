"""run() stopped and gone on with by another number of gloo ranks: every sample of every epoch is trained on exactly once."""

import json
from collections import Counter
from pathlib import Path

import pytest
from safetensors.torch import load_file

from ivl.checkpoint import save_processor
from ivl.data.config import DataConfig
from ivl.runs.config import RunConfig
from ivl.runs.run import run
from ivl.train.config import OptimConfig, Stage
from ivl.train.loop import Trainer
from tests.helpers.mixtures import make_file, processor
from tests.helpers.ranks import on_ranks
from tests.helpers.training import crash_at, run_config

ROWS, EPOCHS = 40, 2


def train_and_note(rank: int, world_size: int, config: RunConfig, crash: int, seen: Path) -> None:
    original = Trainer._loss

    def noting(self, batch, place):
        with (seen / f"{world_size}-{rank}").open("a") as file:
            file.write(json.dumps([self.counters.step, batch.ids]) + "\n")
        return original(self, batch, place)

    Trainer._loss = noting

    run(config, resume=True, evaluators=crash_at(crash, config.run_dir, saved=crash - 1) if crash else None)


def run_on(world_size: int, config: RunConfig, seen: Path, *, crash: int = 0) -> Counter:
    """What was trained on up to the last checkpoint before the crash, or to the end."""
    on_ranks(world_size, train_and_note, world_size, config, crash, seen, exitcode=3 if crash else 0)
    lines = [json.loads(line) for path in seen.glob(f"{world_size}-*") for line in path.read_text().splitlines()]
    return Counter(i for step, ids in lines if not crash or step < crash - 1 for i in ids)


@pytest.mark.parametrize(("shard", "phases"), [(False, (4, 2, 1)), (True, (2, 1))])
def test_another_number_of_ranks_goes_on_with_the_same_epoch(tmp_path, shard, phases):
    save_processor(processor(), tmp_path / "tokenizer")
    config = run_config(
        name="elastic", out_dir=str(tmp_path / "run"), architecture=processor().config, tokenizer=str(tmp_path / "tokenizer"),
        stage=Stage(trainable=("vision", "projector", "decoder")), shard=shard,
        data=DataConfig(
            mixture=str(make_file(tmp_path / "data", ROWS)), max_tokens=200, max_tiles=30, num_workers=0, epochs=EPOCHS,
            max_buffer=2,
        ),
        optim=OptimConfig(lr=1e-3, warmup_ratio=0.1), packs_per_step=4, precision="fp32", save_every=1, device="cpu",
        log_every=100, tensorboard=False,
    )  # fmt: skip
    (tmp_path / "seen").mkdir()
    trained: Counter = Counter()
    for n, world_size in enumerate(phases):
        last = n == len(phases) - 1
        trained += run_on(world_size, config, tmp_path / "seen", crash=0 if last else 2 * n + 3)  # 2 steps last, 1 is lost
    assert trained == {f"r{n}": EPOCHS for n in range(ROWS)}
    rows = [json.loads(line) for line in Path(config.run_dir, "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1)) and rows[-1]["total_samples"] == EPOCHS * ROWS
    assert [row["packs"] for row in rows[:-1]] == [4] * (len(rows) - 1), "the global batch stays"
    assert rows[-1]["loss"] < rows[0]["loss"]
    moments = load_file(Path(config.run_dir, f"checkpoint-{len(rows)}", "trainer", "optimizer.safetensors"))
    assert {int(value) for name, value in moments.items() if name.endswith("|step")} == {len(rows)}
