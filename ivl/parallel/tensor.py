"""Tensor parallelism applied to a plain model (Megatron-LM, arXiv:1909.08053): ranks share heads, MLPs and vocabulary.

Every rank runs the same layers with a share of the query heads, key/value heads and MLP columns. `qkv` and `gate_up` have a
share of their output rows, part by part; `out` and `down` have the matching input columns, so that their outputs are summed
over the ranks. The embedding table is shared by columns, which are gathered; the output head by rows of the vocabulary, which
the losses are told of. The ViT lies on every rank and encodes a share of the tiles. Norms are everybody's own.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import gcd
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from ivl.config import DecoderConfig, ModelConfig
from ivl.errors import InputError
from ivl.model.decoder import DecoderLayer
from ivl.model.linear import Linear
from ivl.model.vlm import VLM
from ivl.quant.layers import quantized_layers
from ivl.train.losses import HeadShare
from ivl.train.world import ModelCuts, ParameterCut, World


@dataclass(eq=False)
class TensorRanks:
    """The ranks that share a model; this process is `rank` of `count`."""

    group: dist.ProcessGroup | None
    """Who speaks in the layers; ranks that answer get another one after a failed step."""
    rank: int
    count: int

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        """Sum a contiguous tensor over the ranks, in place."""
        dist.all_reduce(x, group=self.group)
        return x

    def maximum(self, x: torch.Tensor) -> torch.Tensor:
        """Take the maximum of a contiguous tensor over the ranks, in place."""
        dist.all_reduce(x, dist.ReduceOp.MAX, group=self.group)
        return x

    def gather(self, x: torch.Tensor, dim: int) -> torch.Tensor:
        """Put the tensors of all ranks one after another."""
        pieces = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(self.count)]
        dist.all_gather(pieces, x.contiguous(), group=self.group)
        return torch.cat(pieces, dim)


class _ToRanks(torch.autograd.Function):
    """Give every rank what all of them have; the gradients of what they make of it add up."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, ranks: TensorRanks) -> torch.Tensor:
        ctx.ranks = ranks
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return ctx.ranks.sum(grad.contiguous()), None


class _FromRanks(torch.autograd.Function):
    """Sum what the ranks have; each gets the gradient of the sum."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, ranks: TensorRanks) -> torch.Tensor:
        ctx.mark_dirty(x)
        return ranks.sum(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:  # noqa: ARG004  # pyright: ignore[reportIncompatibleMethodOverride]
        return grad, None


class _Gathered(torch.autograd.Function):
    """Put the tensors of the ranks one after another; each gets the gradient of its own."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, ranks: TensorRanks, dim: int) -> torch.Tensor:
        ctx.ranks, ctx.dim = ranks, dim
        return ranks.gather(x, dim)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return grad.chunk(ctx.ranks.count, ctx.dim)[ctx.ranks.rank], None, None


class OutputRows(Linear):
    """A share of a linear layer's output rows: qkv and gate_up."""

    ranks: TensorRanks

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(_ToRanks.apply(input, self.ranks))


class InputColumns(Linear):
    """A share of a linear layer's input columns: out and down."""

    ranks: TensorRanks

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return _FromRanks.apply(super().forward(input), self.ranks)


class VocabularyHead(OutputRows):
    """A share of the output head's rows, filled up to the same number on every rank. Its logits are whole."""

    share: HeadShare
    num_tokens: int

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return _Gathered.apply(super().forward(input), self.ranks, -1)[..., : self.num_tokens]


class WidthEmbedding(nn.Embedding):
    """A share of the embedding table's columns. What it returns is whole."""

    ranks: TensorRanks

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return _Gathered.apply(super().forward(input), self.ranks, -1)


class TensorVLM(VLM):
    """A model of which this rank has a share of the decoder, and encodes a share of the tiles."""

    ranks: TensorRanks
    tensor_cuts: ModelCuts

    def encode_tiles(self, tiles_GSSC: torch.Tensor) -> torch.Tensor:
        """Turn uint8 tiles [G, size, size, 3] into vision tokens [G, U, D]. Ranks without a tile encode a blank one."""
        ranks, count = self.ranks, len(tiles_GSSC)
        size = -(-count // ranks.count)
        own_GSSC = tiles_GSSC[ranks.rank * size : (ranks.rank + 1) * size]
        lacking = size - len(own_GSSC)
        if lacking:
            own_GSSC = torch.cat([own_GSSC, own_GSSC.new_zeros(lacking, *own_GSSC.shape[1:])])
        if self.training:  # drop path must differ from tile to tile
            torch.manual_seed(torch.initial_seed() + ranks.rank)
        return _Gathered.apply(super().encode_tiles(own_GSSC), ranks, 0)[:count]


def local_config(config: ModelConfig, count: int) -> DecoderConfig:
    """Return the configuration of the layers of one of `count` ranks.

    Raises:
        InputError: if the decoder cannot be shared by so many.
    """
    decoder = config.decoder
    sizes = {"key/value heads": decoder.num_kv_heads, "columns of the MLP": decoder.mlp_width, "channels": decoder.width}
    for name, size in sizes.items():
        if size % count:
            fitting = [n for n in range(1, gcd(*sizes.values()) + 1) if not gcd(*sizes.values()) % n]
            raise InputError(
                f"tensor_parallel is {count}, but the decoder's {size} {name} cannot be shared by so many ranks: take "
                f"{' or '.join(map(str, fitting))}"
            )
    return replace(
        decoder, num_heads=decoder.num_heads // count, num_kv_heads=decoder.num_kv_heads // count,
        mlp_width=decoder.mlp_width // count,
    )  # fmt: skip


def split(model: VLM, world: World) -> None:
    """Leave this rank its share of a whole model, in place; on the meta device, its shapes.

    `model.config` stays that of the whole model, `model.decoder.config` becomes that of the layers here.

    Raises:
        InputError: if weights are quantized.
    """
    if quantized_layers(model):
        remedy = "take the original model, or share out its layers by device, as in cuda:0,cuda:1"
        raise InputError(f"tensor_parallel needs weights that are not quantized: {remedy}")
    ranks = TensorRanks(world.group("tensor"), world.tensor_rank, world.tensor)
    local, decoder = local_config(model.config, ranks.count), model.decoder
    cuts: dict[str, ParameterCut] = {}
    for number, layer in enumerate(decoder.layers):
        assert isinstance(layer, DecoderLayer)
        layer.num_heads, layer.num_kv_heads = local.num_heads, local.num_kv_heads
        for name in ("qkv", "gate_up", "out", "down"):
            linear = layer.get_submodule(name)
            assert isinstance(linear, Linear)
            rows = tuple(length for _, length in linear.parts)
            linear.__class__ = OutputRows if rows else InputColumns
            _cut(linear, f"decoder.layers.{number}.{name}", 0 if rows else 1, rows or (linear.in_features,), ranks, cuts)
            linear.parts = tuple((part, length // ranks.count) for part, length in linear.parts)
            linear.out_features, linear.in_features = linear.weight.shape
    vocabulary, head = model.config.decoder.vocab_size, decoder.head
    decoder.embeddings.__class__, head.__class__ = WidthEmbedding, VocabularyHead
    _cut(decoder.embeddings, "decoder.embeddings", 1, (local.width,), ranks, cuts)
    _cut(head, "decoder.head", 0, (vocabulary,), ranks, cuts)
    assert isinstance(head, VocabularyHead)
    rows = len(head.weight)
    head.out_features, head.num_tokens = rows, vocabulary
    head.share = HeadShare(ranks.rank * rows, max(0, min(rows, vocabulary - ranks.rank * rows)), ranks.sum, ranks.maximum)
    decoder.config, model.__class__ = local, TensorVLM
    assert isinstance(model, TensorVLM)
    model.ranks = ranks
    partial = frozenset(name for name, _ in model.named_parameters() if _is_partial(name))
    model.tensor_cuts = ModelCuts(cuts, partial, ranks.rank, ranks.count)


def _is_partial(name: str) -> bool:
    """Whether ranks use a whole parameter for a part of the work: for some of the tiles, or for some of the heads."""
    return not name.startswith("decoder.") or ".q_norm." in name or ".k_norm." in name


def _cut(
    module: nn.Module, path: str, dim: int, parts: tuple[int, ...], ranks: TensorRanks, cuts: dict[str, ParameterCut]
) -> None:
    """Leave a module this rank's share of its parameters."""
    module.ranks = ranks  # type: ignore[assignment]
    for name, parameter in list(module.named_parameters(recurse=False)):
        cut = cuts[f"{path}.{name}"] = ParameterCut(dim, parts)
        share = cut.share(parameter.detach(), ranks.rank, ranks.count).clone(memory_format=torch.contiguous_format)
        setattr(module, name, nn.Parameter(share, requires_grad=parameter.requires_grad))
