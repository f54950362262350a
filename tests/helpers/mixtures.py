"""A small world of data: a processor for 28 px tiles of one vision token, rows with pictures, and files of them."""

from __future__ import annotations

import dataclasses
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

from ivl.formats.rows import write_jsonl
from ivl.processing.processor import Processor
from ivl.processing.tokenizer import train_tokenizer
from ivl.types import Batch
from tests.conftest import tiny_config


@cache
def processor() -> Processor:
    tokenizer = train_tokenizer(["what is this", "a red circle on white"] * 5, 300)
    config = tiny_config()
    config = dataclasses.replace(
        config,
        decoder=dataclasses.replace(config.decoder, vocab_size=len(tokenizer)),
        image_token_id=tokenizer.id("<IMG_CONTEXT>"),
        eos_token_ids=(tokenizer.id("<|im_end|>"),),
        template="plain-chatml",
    )
    return Processor(config, tokenizer)


def turns(question: str, answer: str) -> list[dict]:
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


def make_rows(folder: Path, count: int, *, seed: int = 0) -> list[dict]:
    """Rows of several kinds and lengths; every third is text only, and some hold two conversations."""
    rng = np.random.default_rng(seed)
    rows = []
    for n in range(count):
        answer = "a red circle " * int(rng.integers(1, 6))
        if n % 3 == 2:
            rows.append({"id": f"r{n}", "conversations": turns("what is this", answer)})
            continue
        width, height = rng.integers(20, 90, size=2).tolist()
        picture(folder / f"{n}.png", width, height, seed=n)
        talk = turns("<image>\nwhat is this", answer)
        rows.append({"id": f"r{n}", "image": f"{n}.png", "conversations": [talk, talk] if n % 4 == 1 else talk})
    return rows


def picture(path: Path, width: int, height: int, *, seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, size=(height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def make_file(folder: Path, count: int, *, seed: int = 0, name: str = "rows.jsonl") -> Path:
    return write_jsonl(make_rows(folder, count, seed=seed), folder / name)


def same(a: Batch, b: Batch) -> bool:
    """Bit for bit."""
    tensors = ("tokens_T", "labels_T", "weights_T", "tiles_GSSC", "tile_ids_R")
    return (a.layout, a.ids, a.sources) == (b.layout, b.ids, b.sources) and all(
        getattr(a, name).equal(getattr(b, name)) for name in tensors
    )
