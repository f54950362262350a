"""Objectives: a model and a batch to a Loss. A loss term of your own is one function, named by its import path."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import torch

from ivl.data.loader import Loader
from ivl.model.devices import send
from ivl.model.vlm import VLM
from ivl.train.config import ObjectiveConfig, Precision
from ivl.train.losses import linear_cross_entropy, share_of
from ivl.train.world import World, is_sharded
from ivl.types import Batch, Loss

Objective = Callable[[VLM, Batch], Loss]
"""A plain function, or a StatefulObjective."""


@dataclass(frozen=True, kw_only=True)
class ObjectiveContext:
    """What an objective may use of the run that it is built for."""

    world: World
    directory: Path
    """The directory of the run."""
    precision: Precision
    packs_per_rank: int
    """Packs that one rank takes in one step."""
    resumed: bool
    """Whether the run goes on from a checkpoint."""
    loaders: Mapping[str, Callable[[], Loader]]
    """Make loaders of one epoch in the files' order: of the data named `train` and, where a run has them, `validation`."""
    start_model: Callable[[], VLM]
    """Build the model that the run started from once more, on the run's device and sharded as the run's model is."""


class StatefulObjective:
    """Base of the objectives that have settings, prepare something, or keep a state from step to step.

    `runs` calls build once, then prepare. The state is saved with every checkpoint and is the same on all ranks: each rank
    calls the objective equally often, or calls idle when its data are at their end.
    """

    Settings: ClassVar[type[ObjectiveConfig]] = ObjectiveConfig
    """The class of its settings."""

    @classmethod
    def build(cls, config: ObjectiveConfig, context: ObjectiveContext) -> Self:  # noqa: ARG003
        """Build the objective from its settings; an objective without settings ignores them."""
        return cls()

    def prepare(self, model: VLM) -> None:
        """Do what must be done before the first step, such as a pass over the data with the model as it starts."""

    def idle(self) -> None:
        """Take part in what ranks do together, on a rank that has no batch of its own while others have one."""

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint saves, as JSON values."""
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        """Take over what state() returned."""

    def __call__(self, model: VLM, batch: Batch) -> Loss:
        """Compute the loss of one pack: a sum, its weight, and figures to log."""
        raise NotImplementedError


def next_token(model: VLM, batch: Batch) -> Loss:
    """Next-token cross-entropy over trained tokens, weighted by the batch's loss weights.

    metrics: accuracy (share of trained tokens whose label is the likeliest) and, when the batch spans several data sets,
    loss/NAME, the plain mean of each.

    Raises:
        ValueError: if tokens, labels or placeholders do not fit the model, naming the sample.
    """
    check_batch(batch, model)
    hidden_TD = forward_batch(model, batch)
    at_M = batch.weights_T.nonzero().squeeze(1)
    weights_M, device = batch.weights_T[at_M], hidden_TD.device
    labels_M = send(batch.labels_T[at_M], device)
    head = model.decoder.head
    loss = linear_cross_entropy(
        hidden_TD[send(at_M, device)], head.matrix(), labels_M, send(weights_M, device), share=share_of(head)
    )
    correct = torch.stack([loss.correct_M.sum().float(), loss.correct_M.new_full((), len(at_M), dtype=torch.float32)])
    metrics = {"accuracy": correct, **_by_dataset(batch, at_M, loss.ce_M)}
    return Loss(loss.total, weights_M.sum(), metrics)


def forward_batch(model: VLM, batch: Batch) -> torch.Tensor:
    """Final hidden states [T, D]. Each distinct tile is encoded once, however many placeholder runs show it."""
    vision_RUD = encode_vision(model, batch)
    if vision_RUD is None and is_sharded(model):
        # Ranks that share shards run ViT and decoder together, forward and backward: one without images encodes a blank
        # tile and shows none of it.
        size = model.config.vision.image_size
        vision_RUD = _encode(model, torch.zeros(1, size, size, 3, dtype=torch.uint8))[:0]
    at_X = send(model.placeholders(batch.tokens_T), model.device)
    return model(send(batch.tokens_T, model.device), batch.layout, vision_RUD, at_X=at_X)


def encode_vision(model: VLM, batch: Batch) -> torch.Tensor | None:
    """Vision tokens [R, U, D] of every placeholder run, without a graph when ViT and projector are frozen."""
    if not len(batch.tiles_GSSC):
        return None
    return _encode(model, batch.tiles_GSSC)[send(batch.tile_ids_R, model.device)]


def _encode(model: VLM, tiles_GSSC: torch.Tensor) -> torch.Tensor:
    trains = any(p.requires_grad for part in (model.vision, model.projector) for p in part.parameters())
    with torch.set_grad_enabled(trains and torch.is_grad_enabled()):
        return model.encode_tiles(send(tiles_GSSC, model.device))


def check_batch(batch: Batch, model: VLM) -> None:
    """Refuse a batch that does not fit the model.

    Raises:
        ValueError: for ids outside the vocabulary or loss weights that are not finite and >= 0, with the sample's name;
            for a placeholder that shows no tile. `VLM.embed` compares the number of placeholders with that of vision tokens.
    """
    size = model.config.decoder.vocab_size
    trained_T = batch.weights_T != 0
    faults = {
        "loss weight that is negative or not finite": ~(batch.weights_T >= 0) | torch.isinf(batch.weights_T),
        f"token outside the vocabulary of {size}": (batch.tokens_T < 0) | (batch.tokens_T >= size),
        f"trained label outside the vocabulary of {size}": trained_T & ((batch.labels_T < 0) | (batch.labels_T >= size)),
    }
    for fault, bad_T in faults.items():
        if bad_T.any():
            at = int(bad_T.nonzero()[0])
            token, label, weight = (x[at].item() for x in (batch.tokens_T, batch.labels_T, batch.weights_T))
            raise ValueError(f"{sample_at(batch, at)}{fault} (token {token}, label {label}, weight {weight:g})")
    if len(batch.tile_ids_R) and not 0 <= int(batch.tile_ids_R.min()) <= int(batch.tile_ids_R.max()) < len(batch.tiles_GSSC):
        raise ValueError(f"a placeholder shows tile {int(batch.tile_ids_R.max())} but there are {len(batch.tiles_GSSC)} tiles")


def sample_at(batch: Batch, at: int) -> str:
    """Name of the sample that holds token `at`, as `ID (file:line): `; empty when the batch does not say."""
    end = 0
    for number, length in enumerate(batch.sample_lens):
        end += length
        if at < end:
            return f"{batch.ids[number]} ({batch.sources[number]}): "
    return ""


def _by_dataset(batch: Batch, at_M: torch.Tensor, ce_M: torch.Tensor) -> dict[str, torch.Tensor]:
    names = sorted(set(batch.datasets))
    if len(names) < 2 or len(batch.sample_lens) != len(batch.datasets):
        return {}
    number_of = {name: number for number, name in enumerate(names)}
    numbers = torch.tensor([number_of[name] for name in batch.datasets]).repeat_interleave(torch.tensor(batch.sample_lens))
    numbers_M = numbers[at_M]
    counts_N = send(numbers_M.bincount(minlength=len(names)).double(), ce_M.device)
    sums_N = torch.zeros_like(counts_N).index_add(0, send(numbers_M, ce_M.device), ce_M.double())
    return {f"loss/{name}": pair for name, pair in zip(names, torch.stack([sums_N, counts_N], dim=1), strict=True)}
