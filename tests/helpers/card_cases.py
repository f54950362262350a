"""Runs and steps on the CPU and on the pretended card: `python -m tests.helpers.card_cases LIBRARY FOLDER` prints them as JSON.

{"runs": {case: {device: the lines of metrics.jsonl}}, "waits": {case: {"micro": ..., "step": ...}}, "failed": {case: why}}
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
import traceback
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from tests.helpers import pretend

DEVICES = ("cpu", "cuda")


def main(library: Path, folder: Path) -> None:
    pretend.start(library)
    import torch

    torch.set_num_threads(1)
    folder.mkdir(parents=True)
    result: dict[str, dict[str, Any]] = {"runs": {}, "waits": {}, "failed": {}}
    for case, changes in cases(folder).items():
        attempt(result, "runs", case, partial(on_both, folder, case, changes))
    for case in ("next_token", "preference", "fp32"):
        attempt(result, "waits", case, partial(counted, folder, case))
    print(json.dumps(result))


def attempt(result: dict[str, dict[str, Any]], kind: str, case: str, function: Callable[[], Any]) -> None:
    try:
        result[kind][case] = function()
    except Exception as error:
        places = [f"{frame.filename.split('/')[-1]}:{frame.lineno}" for frame in traceback.extract_tb(error.__traceback__)]
        result["failed"][f"{kind} {case}"] = f"{type(error).__name__}: {str(error)[:300]} at {places[-6:]}"


def cases(folder: Path) -> dict[str, dict[str, Any]]:
    """What each run changes in the small run of `base`."""
    from ivl.config import LoraConfig
    from ivl.preference.config import PreferenceConfig
    from ivl.train.config import ObjectiveConfig, OptimConfig, Stage
    from tests.helpers.mixtures import processor

    config = processor().config
    vision = dataclasses.replace(config.vision, norm="rms_norm", qk_norm=True, qkv_bias=False)
    large_vit = dataclasses.replace(config, vision=vision)
    lora = LoraConfig(rank=4, dropout=0.1, targets=("decoder.layers", "decoder.head"))
    adapters = {"stage": Stage(trainable=()), "lora": lora}
    captions = ObjectiveConfig(path="ivl.recipes.nano_objectives:flipped_caption_words")
    no_dropout = adapters | {"lora": LoraConfig(rank=4, targets=("decoder.layers",), dropout=0.0)}
    every = PreferenceConfig(
        reference="model", ipo=0.1, hinge=0.1, robust=0.1, kto=0.1, orpo=0.1, simpo=0.1, label_smoothing=0.1
    )  # fmt: skip
    return {
        "bf16": {},
        "fp32": {"precision": "fp32"},
        "pure_bf16": {"precision": "pure_bf16"},
        "checkpointing": {"checkpointing": True, "stage": Stage(trainable=("vision", "projector", "decoder"), drop_path=0.3)},
        "large vit": {"architecture": large_vit},
        "text": {"data": "text"},
        "projector": {"stage": Stage(trainable=("projector",))},
        "muon": {"optim": OptimConfig(name="muon", lr=1e-3)},
        "lora": adapters,
        "captions": {"objective": captions, "data": "pictures"},
        "mpo file": {"objective": PreferenceConfig(), "data": "pairs"},
        "mpo model": {"objective": every, "data": "pairs"},
        "mpo adapters": {"objective": PreferenceConfig(reference="adapters"), "data": "pairs", **no_dropout},
        "evaluations": {"evaluations": True, "precision": "fp32"},
        "evaluations bf16": {"evaluations": True},
    }


def base(folder: Path, data: str = "rows", **changes: Any) -> Any:
    """The configuration of a run of two steps."""
    from ivl.checkpoint import save_processor
    from ivl.data.config import DataConfig
    from ivl.formats.rows import write_jsonl
    from ivl.train.config import OptimConfig, Stage
    from tests.helpers.mixtures import make_rows, processor
    from tests.helpers.pairs import make_pairs
    from tests.helpers.training import run_config

    if not (folder / "tokenizer").exists():
        save_processor(processor(), folder / "tokenizer")
        rows = make_rows(folder / "images", 18)
        rows = [row | {"image": f"images/{row['image']}"} if "image" in row else row for row in rows]
        write_jsonl(rows, folder / "rows.jsonl")
        write_jsonl([row for row in rows if "image" not in row], folder / "text.jsonl")
        write_jsonl([row for row in rows if "image" in row], folder / "pictures.jsonl")
        make_pairs(folder / "pairs-of", 8)
    mixture = folder / "pairs-of" / "pairs.jsonl" if data == "pairs" else folder / f"{data}.jsonl"
    options: dict[str, Any] = {
        "name": "card", "architecture": processor().config, "tokenizer": str(folder / "tokenizer"),
        "stage": Stage(trainable=("vision", "projector", "decoder")), "optim": OptimConfig(lr=1e-3),
        "data": DataConfig(mixture=str(mixture), max_tokens=200, max_tiles=20, num_workers=0, averaging="square"),
        "num_steps": 2, "packs_per_step": 2, "precision": "bf16", "tensorboard": False, "log_every": 1000,
    }  # fmt: skip
    return run_config(**(options | changes))


def on_both(folder: Path, case: str, changes: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    return {device: rows_of_run(folder, case, device, changes) for device in DEVICES}


def rows_of_run(folder: Path, case: str, device: str, changes: dict[str, Any]) -> list[dict[str, Any]]:
    """Train on a device and return metrics.jsonl; a case with evaluations also stops and goes on."""
    from ivl.runs.run import run

    changes = dict(changes)
    evaluations = changes.pop("evaluations", False)
    out = folder / "runs" / f"{case}-{device}"
    config = base(folder, device=device, out_dir=str(out), **changes)
    if evaluations:
        config = dataclasses.replace(
            config, val_data=dataclasses.replace(config.data, epochs=1), val_every=1, val_packs=2,
            train=dataclasses.replace(config.train, save_every=1, num_steps=3),
        )  # fmt: skip
        run(config, evaluators=replies)
        shutil.rmtree(out / "checkpoint-3")
        run(config, evaluators=replies, resume=True)
    else:
        run(config)
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def replies(processor: Any) -> tuple[Any, ...]:
    """An evaluation during training: greedy and sampled replies to a question about a picture, as a number."""
    from PIL import Image

    from ivl.inference.engine import Engine
    from ivl.processing import chat
    from ivl.train.loop import Evaluator
    from ivl.types import ImageRef, SamplingParams

    def figures(model: Any) -> dict[str, float]:
        engine = Engine(model, processor, max_cache_tokens=2048, block_size=256)
        asked = [(chat.user(f"<image>\n{text}", ImageRef(Image.new("RGB", (60, 30), "red"))),) for text in ("what", "is this")]
        greedy = SamplingParams(max_new_tokens=6, ignore_eos=True, logprobs=1)
        sampled = SamplingParams(max_new_tokens=6, temperature=0.8, top_p=0.9, seed=1, repetition_penalty=1.1)
        found = engine.generate(asked, greedy) + engine.generate(asked * 2, sampled)
        first = found[0].logprobs or []
        return {"length": float(sum(len(reply.text) for reply in found)), "logprob": sum(each.logprob for each in first)}

    return (Evaluator("replies", 1, figures),)


def counted(folder: Path, case: str) -> dict[str, dict[str, int]]:
    """What the host waits for in one optimizer step, and in each further micro-batch of it."""
    import torch

    from ivl.data.loader import Loader
    from ivl.preference.config import PreferenceConfig
    from ivl.preference.objective import PreferenceObjective
    from ivl.preference.reference import frozen
    from ivl.train.loop import Trainer
    from ivl.train.objectives import next_token
    from ivl.train.recorder import Recorder
    from ivl.train.world import World, in_step
    from tests.helpers.mixtures import processor
    from tests.helpers.pairs import new_model
    from tests.helpers.training import BatchList
    from tests.helpers.waits import Waits

    card = torch.device("cuda", 0)
    config = base(folder, data="pairs" if case == "preference" else "rows")
    batches = list(Loader(dataclasses.replace(config.data, epochs=2), processor(), seed=0))
    batches = [dataclasses.replace(batch, datasets=tuple("ab"[n % 2] for n in range(len(batch.ids)))) for batch in batches]
    found: dict[int, Counter[str]] = {}
    for packs in (1, 3):
        model = new_model().to(card)
        reference = frozen(new_model().to(card))
        objective = PreferenceObjective(PreferenceConfig(), reference) if case == "preference" else next_token
        train = dataclasses.replace(
            config.train, packs_per_step=packs, num_steps=9, precision="fp32" if case == "fp32" else "bf16", checkpointing=True
        )
        source = BatchList(batches)
        trainer = Trainer(model, objective, train, World(device=card), None, source, None, Recorder("card", train, on=False))
        stream = in_step(source, World())
        trainer.step(stream)
        with Waits() as seen:
            trainer.step(stream)
        found[packs] = seen.found
    one, three = found[1], found[3]
    micro = {place: (three[place] - one[place]) // 2 for place in three if three[place] > one[place]}
    return {"micro": micro, "step": dict(one - Counter(micro))}


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
