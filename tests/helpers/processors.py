"""A small vocabulary and a processor over it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ivl.processing.processor import Processor
from ivl.processing.tokenizer import Tokenizer, train_tokenizer
from tests.conftest import tiny_config

CORPUS = [
    "What is the colour of the shape in the image? It is a red circle.",
    "Compare the two pictures and describe what changed between them.",
    "你好，世界。图片里有什么？ 一只猫坐在垫子上。",
    "system user assistant Frame-1: Frame-2:",
] * 4


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return train_tokenizer(CORPUS, 400)


def processor_for(tokenizer: Tokenizer, template: str = "internvl2_5", **tiling: int) -> Processor:
    """A processor of a model with 28 px tiles and four vision tokens each."""
    base = tiny_config()
    config = replace(
        base,
        decoder=replace(base.decoder, vocab_size=len(tokenizer)),
        tiling=replace(base.tiling, **tiling),
        image_token_id=tokenizer.id("<IMG_CONTEXT>"),
        eos_token_ids=(tokenizer.id("<|im_end|>"),),
        template=template,
    )
    return Processor(config, tokenizer)


@pytest.fixture(scope="session")
def processor(tokenizer: Tokenizer) -> Processor:
    return processor_for(tokenizer)
