"""Fine-tune with low-rank adapters, then merge them into the model.

    python examples/lora_finetune.py [MODEL]

Without a model a small one of random weights is built. The adapter is in PEFT's format; `ivl merge MODEL ADAPTER OUT` folds
it in, as is done here.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

from own_model_from_config import build
from own_training_recipe import draw, write_data

import ivl
from ivl.checkpoint.adapter import merge
from ivl.config import LoraConfig
from ivl.data.config import DataConfig
from ivl.runs.config import RunConfig
from ivl.runs.run import run
from ivl.train.config import OptimConfig, Stage, TrainConfig

RUN = Path("runs/examples/lora")


def main() -> None:
    shutil.rmtree(RUN, ignore_errors=True)
    base = sys.argv[1] if len(sys.argv) > 1 else str(build(RUN / "base"))
    config = RunConfig(
        name="lora",
        out_dir=str(RUN / "run"),
        model=base,
        stage=Stage(trainable=()),  # every part of the model is frozen; the adapters alone learn
        lora=LoraConfig(rank=8, targets=("decoder.layers", "projector")),
        data=DataConfig(mixture=write_data(RUN / "data"), max_tokens=1024, num_workers=0, averaging="token", cache_samples=256),
        train=TrainConfig(
            optim=OptimConfig(lr=1e-2, warmup_ratio=0.1), num_steps=20, log_every=10, precision="fp32", tensorboard=False
        ),
    )
    trained = run(config)
    losses = [json.loads(line)["loss"] for line in (RUN / "run" / "metrics.jsonl").read_text().splitlines()]
    print(f"loss {losses[0]:.2f} -> {losses[-1]:.2f}")

    adapter = RUN / "run" / "adapter"
    print(f"{adapter}: {', '.join(sorted(p.name for p in adapter.iterdir()))}")
    merge(base, adapter, RUN / "merged", force=True)
    question, picture = "what colour is it?", draw("red", "circle", at=3)
    replies = [ivl.load(model).chat(question, picture, max_new_tokens=8) for model in (trained, RUN / "merged")]
    print(f"the run's model says    {replies[0]!r}")
    print(f"merged by hand it says  {replies[1]!r}")


if __name__ == "__main__":
    main()
