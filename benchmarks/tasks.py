"""What is timed: InternVL2.5-1B with random bfloat16 weights, here and in transformers, as one callable per task and side.

Both sides get the same tokens and pixels. transformers runs as its users run it at its best: sdpa attention, bfloat16,
a dynamic cache, logits only for the last token of a prompt. A training step is forward and backward over every
parameter, gradients dropped afterwards; samples lie in one pack here and are padded to the longest there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ivl.config import ModelConfig, published_config

SIZE = "1B"
CONTEXT = 300
"""Tokens in the cache when decoding begins."""
DECODE_STEPS = 16
TRAIN_SAMPLES = ((768, 1), (330, 1), (160, 0), (96, 0))
"""(tokens, tiles) of the samples of a training step: a long and a middling one with an image, two short texts."""
ANSWER_SHARE = 0.4
"""Trained share of each sample, at its end."""


@dataclass(frozen=True, kw_only=True)
class Task:
    name: str
    target: float
    """Wanted ratio of their time to ours."""
    unit: str
    per_run: float
    """Units in one run: tiles, tokens."""
    flops: float = 0.0
    """Least arithmetic of one run; a causal triangle counts half."""
    bytes: float = 0.0
    """Least memory traffic of one run."""
    alone: bool = False
    """Too large for both sides to stay in memory."""


def tasks(config: ModelConfig, decode_steps: int = DECODE_STEPS) -> list[Task]:
    tile, useful = tile_flops(config), sum(tokens for tokens, _ in TRAIN_SAMPLES)
    trained = sum(int(tokens * ANSWER_SHARE) for tokens, _ in TRAIN_SAMPLES)
    step = sum(tokens_flops(config, tokens, logits=0) + tiles * tile for tokens, tiles in TRAIN_SAMPLES)
    step += 2 * trained * config.decoder.width * config.decoder.vocab_size
    decodes = [
        Task(
            name=f"decode batch {batch}", target=target, unit="tok/s", per_run=batch * decode_steps,
            bytes=decode_steps * decode_bytes(config, batch),
        )
        for batch, target in ((1, 2.0), (8, 1.5))
    ]  # fmt: skip
    prefills = [
        Task(name=f"prefill {n}", target=target, unit="tok/s", per_run=n, flops=tokens_flops(config, n, logits=1))
        for n, target in ((300, 1.1), (1850, 1.2))
    ]
    visions = [Task(name=f"vision {n}", target=1.3, unit="tiles/s", per_run=n, flops=n * tile) for n in (1, 7)]
    return [
        *visions,
        *prefills,
        *decodes,
        Task(name="train", target=2.0, unit="tok/s", per_run=useful, flops=3 * step, alone=True),
    ]


# Least work


def decoder_weights(config: ModelConfig) -> int:
    """Weights of all decoder layers that multiply every token."""
    d = config.decoder
    heads = d.num_heads + d.num_kv_heads
    return d.num_layers * (2 * d.width * heads * d.head_dim + 3 * d.width * d.mlp_width)


def tokens_flops(config: ModelConfig, tokens: int, logits: int) -> float:
    d = config.decoder
    attention = 2 * d.num_layers * d.num_heads * d.head_dim * tokens**2
    return 2.0 * tokens * decoder_weights(config) + attention + 2 * logits * d.width * d.vocab_size


def tile_flops(config: ModelConfig) -> float:
    v, d = config.vision, config.decoder
    rows = 1 + v.grid**2
    layers = v.num_layers * (2 * rows * (4 * v.width**2 + 2 * v.width * v.mlp_width) + 4 * rows**2 * v.width)
    patches = 2 * v.grid**2 * 3 * v.patch_size**2 * v.width
    return float(layers + patches + 2 * config.tokens_per_tile * (4 * v.width * d.width + d.width**2))


def decode_bytes(config: ModelConfig, batch: int) -> float:
    d = config.decoder
    past = batch * CONTEXT * d.num_layers * 2 * d.num_kv_heads * d.head_dim
    return 2.0 * (decoder_weights(config) + d.width * d.vocab_size + past)


# The two sides


def prepare(side: str, task: str, decode_steps: int) -> Callable[[], Any]:
    """The callable that runs the task once, warm-up excluded."""
    torch.manual_seed(0)
    kind, _, size = task.partition(" ")
    number = int(size.rpartition(" ")[2] or 0)
    build = {"ours": _ours, "theirs": _theirs}[side]
    return build(kind, number, decode_steps)


def _tokens(*shape: int) -> torch.Tensor:
    return torch.randint(0, 150_000, shape, generator=torch.Generator().manual_seed(1))


def _tiles(count: int) -> torch.Tensor:
    return torch.randint(0, 256, (count, 448, 448, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))


def _train_samples(config: ModelConfig) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(tokens, labels not shifted) of each sample; the tile's placeholders come first."""
    samples = []
    for tokens, tiles in TRAIN_SAMPLES:
        ids = _tokens(tokens)
        ids[1 : 1 + tiles * config.tokens_per_tile] = config.image_token_id
        labels = ids.clone()
        labels[: tokens - int(tokens * ANSWER_SHARE)] = -100
        samples.append((ids, labels))
    return samples


def _ours(kind: str, number: int, decode_steps: int) -> Callable[[], Any]:
    from ivl.cpu import accelerate
    from ivl.model.cache import CachedSequence, PagedCache
    from ivl.model.vlm import VLM
    from ivl.train.objectives import next_token
    from ivl.types import Batch, Layout

    config = published_config(SIZE)
    torch.set_default_dtype(torch.bfloat16)
    model = VLM(config).eval()
    model.init_weights()
    accelerate(model)  # as every engine and every training run is

    def cache(sequences: int, tokens: int) -> tuple[PagedCache, list[CachedSequence]]:
        room = -(-tokens // 64) * 64 * sequences
        return PagedCache(config.decoder, num_tokens=room, dtype=torch.bfloat16), [CachedSequence() for _ in range(sequences)]

    if kind == "vision":
        tiles = _tiles(number)
        return torch.inference_mode()(lambda: model.encode_tiles(tiles))

    if kind == "prefill":
        tokens_T = _tokens(number)

        @torch.inference_mode()
        def prefill() -> Any:
            store, sequences = cache(1, number)
            step = store.step(sequences, (number,))
            return model.head(model(tokens_T, step.layout, cache=step)[-1:])

        return prefill

    if kind == "decode":
        store, sequences = cache(number, CONTEXT + decode_steps)
        with torch.inference_mode():
            step = store.step(sequences, (CONTEXT,) * number)
            model(_tokens(number * CONTEXT), step.layout, cache=step)

        @torch.inference_mode()
        def decode() -> Any:
            for sequence in sequences:
                sequence.length = CONTEXT
            tokens_T = _tokens(number)
            for _ in range(decode_steps):
                step = store.step(sequences, (1,) * number)
                tokens_T = model.head(model(tokens_T, step.layout, cache=step)).argmax(-1)
            return tokens_T

        return decode

    samples = _train_samples(config)
    shifted = [torch.cat([labels[1:], torch.tensor([-100])]) for _, labels in samples]
    labels_T = torch.cat(shifted)
    num_tiles = sum(tiles for _, tiles in TRAIN_SAMPLES)
    batch = Batch(
        tokens_T=torch.cat([ids for ids, _ in samples]), labels_T=labels_T, weights_T=(labels_T >= 0).float(),
        tiles_GSSC=_tiles(num_tiles), tile_ids_R=torch.arange(num_tiles),
        layout=Layout.packed(tuple(len(ids) for ids, _ in samples)), ids=tuple("abcd"),
    )  # fmt: skip
    model.train()

    def train() -> Any:
        loss = next_token(model, batch)
        (loss.total / loss.weight).backward()
        model.zero_grad(set_to_none=True)
        return loss.total.item()

    return train


def their_model(dtype: torch.dtype) -> Any:
    """transformers' InternVL of this size, random weights, eval mode."""
    from transformers import InternVLConfig, InternVLForConditionalGeneration, InternVLVisionConfig, Qwen2Config

    config = published_config(SIZE)
    v, d = config.vision, config.decoder
    vision = InternVLVisionConfig(
        hidden_size=v.width, num_hidden_layers=v.num_layers, num_attention_heads=v.num_heads, attention_bias=v.qkv_bias,
        intermediate_size=v.mlp_width, image_size=[v.image_size] * 2, patch_size=[v.patch_size] * 2, norm_type=v.norm,
        layer_norm_eps=v.norm_eps, use_qk_norm=v.qk_norm,
    )  # fmt: skip
    text = Qwen2Config(
        vocab_size=d.vocab_size, hidden_size=d.width, intermediate_size=d.mlp_width, num_hidden_layers=d.num_layers,
        num_attention_heads=d.num_heads, num_key_value_heads=d.num_kv_heads, max_position_embeddings=d.max_positions,
        rope_parameters={"rope_type": "default", "rope_theta": d.rope_theta}, rms_norm_eps=d.norm_eps,
        tie_word_embeddings=False,
    )  # fmt: skip
    torch.set_default_dtype(dtype)
    whole = InternVLConfig(
        vision_config=vision, text_config=text, image_token_id=config.image_token_id, tie_word_embeddings=False
    )
    model = InternVLForConditionalGeneration(whole).eval()
    assert model.config._attn_implementation == "sdpa" and model.dtype == dtype
    return model


def _theirs(kind: str, number: int, decode_steps: int) -> Callable[[], Any]:
    from ivl.model.vlm import normalize

    config = published_config(SIZE)
    model = their_model(torch.bfloat16)

    if kind == "vision":
        tiles = _tiles(number)
        return torch.inference_mode()(lambda: model.model.get_image_features(normalize(tiles, torch.bfloat16)))

    if kind == "prefill":
        tokens = _tokens(1, number)
        return torch.inference_mode()(lambda: model(input_ids=tokens, use_cache=True, logits_to_keep=1).logits)

    if kind == "decode":
        with torch.inference_mode():
            cache = model(input_ids=_tokens(number, CONTEXT), use_cache=True, logits_to_keep=1).past_key_values

        @torch.inference_mode()
        def decode() -> Any:
            if (extra := cache.get_seq_length() - CONTEXT) > 0:
                cache.crop(-extra)
            tokens = _tokens(number, 1)
            for _ in range(decode_steps):
                tokens = model(input_ids=tokens, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)
            return tokens

        return decode

    samples = _train_samples(config)
    pad = torch.nn.utils.rnn.pad_sequence
    ids = pad([ids for ids, _ in samples], batch_first=True, padding_value=config.pad_token_id or 0)
    labels = pad([labels for _, labels in samples], batch_first=True, padding_value=-100)
    mask = pad([torch.ones_like(ids) for ids, _ in samples], batch_first=True)
    tiles = _tiles(sum(tiles for _, tiles in TRAIN_SAMPLES))
    model.train()

    def train() -> Any:
        pixels = normalize(tiles, torch.bfloat16)
        loss = model(input_ids=ids, pixel_values=pixels, attention_mask=mask, labels=labels, use_cache=False).loss
        loss.backward()
        model.zero_grad(set_to_none=True)
        return loss.item()

    return train
