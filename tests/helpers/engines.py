"""A processor for the tiny model: one token per character, one image one to three tiles."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image
from tokenizers import AddedToken

from ivl.checkpoint import save_model, save_processor
from ivl.config import ModelConfig
from ivl.inference.engine import Engine
from ivl.model.vlm import VLM
from ivl.processing.processor import Processor
from ivl.processing.tokenizer import Tokenizer, train_tokenizer
from ivl.types import Conversation, ImageRef, Message, Prompt, Text
from tests.conftest import tiny_config

FIRST_CHARACTER = 32
IMAGE_TOKEN = 90


class FakeTokenizer:
    def stream(self) -> FakeStream:
        return FakeStream()

    def unused(self, vocab_size: int) -> list[int]:
        return []


class FakeStream:
    def push(self, token: int) -> str:
        return chr(FIRST_CHARACTER + token)

    def flush(self) -> str:
        return ""


class FakeProcessor:
    def __init__(self, config: ModelConfig) -> None:
        self.config = config
        self.tokenizer = FakeTokenizer()
        self.calls = 0

    def prompt(self, conversation: Conversation) -> Prompt:
        self.calls += 1
        tokens, tiles = [1], []
        for message in conversation:
            for part in message.content:
                if isinstance(part, Text):
                    tokens += [ord(c) - FIRST_CHARACTER for c in part.text]
                elif isinstance(part, ImageRef) and isinstance(part.source, Image.Image):
                    size, num_tiles = self.config.tiling.tile_size, part.max_tiles or 1
                    pixels = torch.tensor(list(part.source.resize((size, size)).tobytes()), dtype=torch.uint8)
                    tiles += [pixels.view(size, size, 3).roll(n, 0) for n in range(num_tiles)]
                    tokens += [IMAGE_TOKEN] * (num_tiles * self.config.tokens_per_tile)
        size = self.config.tiling.tile_size
        stacked = torch.stack(tiles) if tiles else torch.zeros(0, size, size, 3, dtype=torch.uint8)
        return Prompt(torch.tensor(tokens), stacked, torch.arange(len(tiles)))


def picture(seed: int) -> Image.Image:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (4, 4, 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(pixels.numpy()).resize((28, 28), Image.Resampling.NEAREST)


def ask(text: str, *images: ImageRef) -> Conversation:
    return (Message("user", (*images, Text(text))),)


def lively_model(family: str = "qwen2") -> VLM:
    """A tiny model whose replies vary: large weights, and several end tokens so that replies end at different lengths."""
    torch.manual_seed(0)
    model = VLM(replace(tiny_config(family=family), eos_token_ids=(91, 7, 23))).eval()
    model.init_weights()
    enliven(model)
    return model


def tiny_engine(model: VLM, **options: int) -> Engine:
    return Engine(model, FakeProcessor(model.config), **{"max_cache_tokens": 8192, "block_size": 16, **options})


def assert_idle(engine: Engine) -> None:
    """Nothing runs, and every block is free or evictable."""
    pool, stats = engine.cache.pool, engine.stats()
    assert stats.waiting == stats.running == stats.cache_blocks_used == 0 and not any(pool.users)
    assert sorted([*pool.free, *pool.evictable]) == list(range(pool.num_blocks))
    assert set(pool.cached.values()) == set(pool.evictable) == set(pool.hashes)


def tiny_directory(path: Path, *, tools: bool = False, num_kv_heads: int = 2) -> Path:
    """A model directory with a tokenizer of its own: random weights, 28 px tiles, replies of varied text.

    tools: the vocabulary has Qwen's words for calls of tools, and the context has room for them.
    """
    tokenizer = train_tokenizer(["what colour is the shape? red green blue yes no circle"] * 3, 300)
    if tools:
        words = [AddedToken(word, special=False, normalized=False) for word in ("<tool_call>", "</tool_call>")]
        tokenizer.backend.add_tokens(words)
        tokenizer = Tokenizer(tokenizer.backend, config=tokenizer.config)
    config = replace(
        tiny_config(),
        decoder=replace(
            tiny_config().decoder, vocab_size=len(tokenizer), max_positions=4000 if tools else 600, num_kv_heads=num_kv_heads
        ),
        image_token_id=tokenizer.id("<IMG_CONTEXT>"),
        eos_token_ids=(tokenizer.id("<|im_end|>"),),
        system_message="",
    )
    torch.manual_seed(1)
    model = VLM(config).eval()
    model.init_weights()
    enliven(model)
    save_model(model, path)
    save_processor(Processor(config, tokenizer), path)
    return path


def enliven(model: VLM) -> None:
    """Larger weights, so that replies of a random model vary with what it is asked."""
    with torch.no_grad():
        for part in (model.projector, model.decoder):
            for parameter in part.parameters():
                if parameter.ndim == 2:
                    parameter.mul_(8)
