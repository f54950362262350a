"""A small InternVL2.5 from nothing: a configuration, a tokenizer, random weights; saved, loaded and asked.

    python examples/own_model_from_config.py [OUT]

The classes are those of the 78B; only the numbers differ. The weights are random, and so is what it says.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image

import ivl
from ivl.checkpoint import save_model, save_processor
from ivl.config import DecoderConfig, ModelConfig, TilingConfig, VisionConfig
from ivl.model.vlm import VLM
from ivl.processing.processor import Processor
from ivl.processing.tokenizer import Tokenizer, train_tokenizer

WORDS = ("what colour is it?", "what shape is it?", "red green blue yellow", "circle square", "user assistant system")


def config_for(tokenizer: Tokenizer, **decoder: int) -> ModelConfig:
    """A ViT of 2 layers on 28 px tiles (4 vision tokens each) and a decoder of 2 layers; decoder changes its numbers."""
    small = DecoderConfig(
        vocab_size=len(tokenizer), width=64, num_layers=2, mlp_width=128, num_heads=4, num_kv_heads=2, head_dim=16,
        qkv_bias=True, max_positions=4096,
    )  # fmt: skip
    return ModelConfig(
        vision=VisionConfig(width=32, num_layers=2, mlp_width=64, num_heads=4, patch_size=7, image_size=28),
        decoder=replace(small, **decoder),
        tiling=TilingConfig(tile_size=28, max_tiles=6),
        image_token_id=tokenizer.id("<IMG_CONTEXT>"),
        eos_token_ids=(tokenizer.id("<|im_end|>"),),
        system_message="",
    )


def build(out: Path, *, seed: int = 0, words: tuple[str, ...] = WORDS, **decoder: int) -> Path:
    """Write a complete model directory of random weights."""
    tokenizer = train_tokenizer(words, vocab_size=300)
    config = config_for(tokenizer, **decoder)
    torch.manual_seed(seed)
    model = VLM(config)
    model.init_weights()
    save_model(model, out)
    save_processor(Processor(config, tokenizer), out)
    return out


def main() -> None:
    out = build(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/examples/own-model"))
    model = ivl.load(out)
    parameters = sum(p.numel() for p in model.engine.model.parameters())
    print(f"{out}: {parameters:,} parameters in {', '.join(sorted(p.name for p in out.iterdir()))}")
    picture = Image.new("RGB", (56, 28), "red")
    reply = model.chat("what colour is it?", picture, max_new_tokens=8)
    print(f"an untrained model says: {reply!r}")


if __name__ == "__main__":
    main()
