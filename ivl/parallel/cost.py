"""What a training step costs: floating-point operations counted from shapes, seconds by the rates of a card and its links."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from ivl.model.vlm import VLM
from ivl.parallel.cards import LINK_SHARE, PEAK_SHARE, Card


@dataclass(frozen=True)
class Operations:
    """Floating-point operations of one pack, forward and backward, over all ranks that share it."""

    model: float
    """What the loss and its gradients need: the share of a card's peak (MFU) is counted from these."""
    repeated: float
    """Of forward passes that are run again in the backward pass, and of a reference model."""


def count_operations(model: VLM, tokens: int, tiles: int, sequences: int, *, reference: bool) -> Operations:
    """Count the operations of a pack whose tokens all train but those of images.

    Args:
        model: the model, on any device, with what trains marked.
        tokens: of the pack.
        tiles: of the pack.
        sequences: into which the tokens are divided, all as long.
        reference: whether a frozen copy of the model runs forward, too.
    """
    needed = repeated = 0.0
    flows = False
    for module, rows, attention, is_repeated in _blocks(model, tokens, tiles, sequences):
        parameters = [p for p in module.parameters() if p.ndim > 1]
        trained = sum(p.numel() for p in parameters if p.requires_grad)
        products = 2.0 * rows * sum(p.numel() for p in parameters)
        # Gradients of the rows go back as far as the first block that trains, those of matrices to what trains.
        flows = flows or trained > 0
        needed += products + attention
        needed += (products + 2 * attention) * flows + 2.0 * rows * trained
        repeated += (products + attention) * ((is_repeated and flows) + reference)
    return Operations(needed, repeated)


def _blocks(model: VLM, tokens: int, tiles: int, sequences: int) -> Iterator[tuple[nn.Module, int, float, bool]]:
    """Yield a model's modules in the order in which they run: their rows, attention's operations, whether they are repeated."""
    vision, decoder = model.vision, model.decoder
    patches, d = 1 + model.config.vision.grid**2, model.config.decoder
    yield vision.embeddings.patch, tiles * patches, 0.0, False
    attention = 4.0 * tiles * patches**2 * model.config.vision.width
    for layer in vision.layers:
        yield layer, tiles * patches, attention, vision.checkpointing
    num_vision = tiles * model.config.tokens_per_tile
    yield model.projector, num_vision, 0.0, False
    attention = 2.0 * tokens**2 / sequences * d.num_heads * d.head_dim  # half of all pairs, for it is causal
    for layer in decoder.layers:
        yield layer, tokens, attention, decoder.checkpointing
    yield decoder.head, tokens - num_vision, 0.0, False


def compute_seconds(operations: float, card: Card) -> float:
    """Estimate the time that one card takes for so many operations."""
    return operations / (card.tflops * 1e12 * PEAK_SHARE)


def send_seconds(size: float, ranks: int, card: Card, *, near: bool) -> float:
    """Estimate the time of an all-gather or a reduce-scatter; an all-reduce is both, one after the other.

    Args:
        size: bytes of the whole tensor.
        ranks: that take part.
        card: of the ranks.
        near: whether all of them are in one node.
    """
    return size * (ranks - 1) / ranks / ((card.link if near else card.network) * 1e9 * LINK_SHARE)
