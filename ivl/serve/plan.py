"""What a model needs to answer on given cards: weights by width, cache, and the rates that a card's memory and peak allow."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ivl.checkpoint.model_dir import empty_model
from ivl.config import ModelConfig
from ivl.errors import InputError
from ivl.model.linear import Linear
from ivl.model.vlm import VLM
from ivl.parallel.cards import GIB, READ_SHARE, Card, find_card
from ivl.parallel.cost import compute_seconds, count_operations
from ivl.quant.layers import GROUPS

Width = Literal["bf16", "int8", "int4"]
WIDTHS: tuple[Width, ...] = ("bf16", "int8", "int4")
USED_SHARE = 0.9
"""Share of a card's memory for weights and cache. The rest is for a step's activations, buffers and captured graphs."""
SUM_SECONDS = 1e-5
"""Of one sum over the ranks of tensor parallelism in a decoding step: a few kilobytes, so nothing but its start counts."""
PROMPT_TILES, PROMPT_TOKENS = 13, 64
"""A picture of twelve tiles and its thumbnail, and a question."""


@dataclass(frozen=True, kw_only=True)
class ServingPlan:
    """One width of weights on one number of cards. Bytes are those of one card."""

    width: Width
    tensor_parallel: int
    weights: float
    cache: float
    """Of `batch` replies of `context` tokens each, prompts included."""
    replies: int
    """Replies of `context` tokens for which there is room at once."""
    fits: bool
    tokens_per_second_alone: float
    """Of one reply while there is no other."""
    tokens_per_second: float
    """Of `batch` replies together."""
    prompt_seconds: float
    """To read a picture of 13 tiles and a question."""


def plan_serving(
    architecture: ModelConfig, card_name: str, *, context: int, batch: int, parallel: int | None
) -> list[ServingPlan]:
    """Plan every width of weights, each on the smallest number of cards that it fits on; on the largest if it fits on none.

    Args:
        architecture: of the model.
        card_name: of ivl.parallel.cards.
        context: tokens of prompt and reply together.
        batch: replies at once.
        parallel: cards that share the decoder; None takes the smallest number.

    Raises:
        InputError: if the cards cannot share the decoder's heads.
    """
    card, heads = find_card(card_name), architecture.decoder.num_kv_heads
    sizes = [n for n in (1, 2, 4, 8) if heads % n == 0]
    if parallel is not None and heads % parallel:
        raise InputError(f"tensor_parallel {parallel} does not divide the {heads} key/value heads; use {sizes}")
    model = empty_model(architecture)
    plans = []
    for width in WIDTHS:
        tried = [_plan(model, card, width, n, context, batch) for n in ([parallel] if parallel else sizes)]
        plans.append(next((plan for plan in tried if plan.fits), tried[-1]))
    return plans


def _plan(model: VLM, card: Card, width: Width, ranks: int, context: int, batch: int) -> ServingPlan:
    d = model.config.decoder
    layers, embeddings, others = _weights(model, width)
    weights = (layers + embeddings) / ranks + others
    cache_of_one = 4.0 * context * d.num_layers * d.num_kv_heads * d.head_dim / ranks
    room = card.size * USED_SHARE - weights
    sums = SUM_SECONDS * 2 * d.num_layers * (ranks > 1)
    operations = 2.0 * sum(p.numel() for p in model.decoder.parameters()) / ranks

    def rate(replies: int) -> float:
        read = (layers / ranks + replies * cache_of_one) / (card.bandwidth * 1e9 * READ_SHARE)
        return replies / (max(read, compute_seconds(replies * operations, card)) + sums)

    prompt = PROMPT_TILES * model.config.tokens_per_tile + PROMPT_TOKENS
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    reading = count_operations(model, prompt, PROMPT_TILES, 1, reference=False).model
    return ServingPlan(
        width=width, tensor_parallel=ranks, weights=weights, cache=batch * cache_of_one,
        replies=max(0, int(room // cache_of_one)), fits=room >= batch * cache_of_one, tokens_per_second_alone=rate(1),
        tokens_per_second=rate(batch), prompt_seconds=compute_seconds(reading / ranks, card),
    )  # fmt: skip


def _weights(model: VLM, width: Width) -> tuple[float, float, float]:
    """Return bytes of what a token reads (layers, head), of embeddings, and of ViT and projector, which lie on every rank."""
    layers = sum(2.0 * p.numel() for p in model.decoder.parameters())
    embeddings = 2.0 * model.decoder.embeddings.weight.numel()
    for name, module in model.decoder.named_modules():
        if isinstance(module, Linear) and width != "bf16":
            layers += _quantized(module, 8 if name == "head" or width == "int8" else 4) - 2.0 * module.weight.numel()
    others = sum(2.0 * p.numel() for part in (model.vision, model.projector) for p in part.parameters())
    return layers - embeddings, embeddings, others


def _quantized(layer: Linear, bits: int) -> float:
    """Return bytes of a weight as `ivl convert --quantize` stores it: scales per row in 8 bits, per group in 4."""
    group = next((g for g in reversed(GROUPS) if layer.in_features % g == 0), layer.in_features)
    scales = layer.out_features * (1 if bits == 8 else layer.in_features // group)
    return layer.weight.numel() * bits / 8 + 2.0 * scales


def describe_serving(name: str, card: str, plans: list[ServingPlan], *, context: int, batch: int) -> str:
    """Format plans as a table."""
    heads = ("cards", "GiB", "cache", "fits", "replies", "tokens/s", "one reply", "picture")
    rows = [f"{name} on {card}: {batch} replies of {context:,} tokens, prompts included; GiB are those of one card", ""]
    rows.append("weights" + "".join(f"{head:>11}" for head in heads))
    for p in plans:
        sizes = (
            f"{p.tensor_parallel:11}{p.weights / GIB:11.1f}{p.cache / GIB:11.1f}{'yes' if p.fits else 'no':>11}{p.replies:11,}"
        )
        rates = f"{p.tokens_per_second:11,.0f}{p.tokens_per_second_alone:11,.0f}{p.prompt_seconds:9.2f} s"
        rows.append(f"{p.width:7}{sizes}{rates}")
    return "\n".join([
        *rows, "",
        f"cards: the fewest that share the decoder and leave {1 - USED_SHARE:.0%} of their memory free.",
        "replies: as many fit at once. tokens/s: of all replies. one reply: of one alone.",
        "picture: seconds until a picture of 13 tiles and a question are read.",
        "Rates are calculated from the card's memory and peak; int8 and int4 need kernels for them.",
    ])  # fmt: skip
