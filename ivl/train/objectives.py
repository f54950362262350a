"""Objectives: a model and a batch to a Loss. A new loss term is one function here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from ivl.model.vlm import VLM
from ivl.train.losses import linear_cross_entropy
from ivl.train.world import is_sharded
from ivl.types import Batch, Loss

Objective = Callable[[VLM, Batch], Loss]


def sft_objective(model: VLM, batch: Batch) -> Loss:
    """Next-token cross-entropy over trained tokens, weighted by the batch's loss weights.

    metrics: accuracy (trained tokens whose label is the likeliest) and, when the batch spans several data sets,
    loss/NAME, the plain mean of each.

    Raises:
        ValueError: if tokens, labels or placeholders do not fit the model, naming the sample.
    """
    check_batch(batch, model)
    hidden_TD = forward_batch(model, batch)
    at_M = batch.weights_T.nonzero().squeeze(1)
    weights_M = batch.weights_T[at_M]
    loss = linear_cross_entropy(hidden_TD[at_M], model.decoder.head.matrix(), batch.labels_T[at_M], weights_M)
    metrics = {"accuracy": _sum_and_count(loss.correct_M), **_by_dataset(batch, at_M, loss.ce_M)}
    return Loss(loss.total, weights_M.sum(), metrics)


def caption_words_objective(model: VLM, batch: Batch) -> Loss:
    """Which words does the caption of this tile hold? Asked of the tile's mean vision token through the output head.

    A multi-label softmax over the caption's tokens (Huang et al., 2024, arXiv 2411.03313): ViT and projector learn to
    see before a decoder listens, on any captioned images. Every placeholder run counts 1; end-of-turn tokens are no words.

    Raises:
        ValueError: if the batch does not fit the model, or has no tile with a trained caption.
    """
    check_batch(batch, model)
    run_of, label_of = caption_words(model, batch)
    if not len(run_of):
        raise ValueError(f"caption_words needs tiles with trained captions; {', '.join(batch.sources[:3])} have none")
    vision_RUD = encode_vision(model, batch)
    assert vision_RUD is not None
    log_probs_RV = model.head(vision_RUD.mean(1)).float().log_softmax(-1)
    num_words_R = torch.bincount(run_of, minlength=len(vision_RUD)).clamp(min=1)
    losses = -log_probs_RV[run_of, label_of] / num_words_R[run_of]
    likeliest_R = log_probs_RV.argmax(-1)
    hits = torch.zeros_like(num_words_R).index_add(0, run_of, (likeliest_R[run_of] == label_of).long())
    weight = (torch.bincount(run_of, minlength=len(vision_RUD)) > 0).sum()
    return Loss(losses.sum(), weight.float(), {"accuracy": torch.stack([(hits > 0).sum().float(), weight.float()])})


def caption_words(model: VLM, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Pairs (placeholder run, trained label of the same sequence) without end-of-turn tokens."""
    lens_S = torch.tensor(batch.layout.new_lens, device=batch.tokens_T.device)
    seq_T = torch.arange(len(lens_S), device=lens_S.device).repeat_interleave(lens_S)
    placeholder_T = batch.tokens_T == model.config.image_token_id
    seq_R = seq_T[placeholder_T][:: model.config.tokens_per_tile]
    ends = torch.tensor(model.config.eos_token_ids, device=lens_S.device)
    word_T = (batch.weights_T != 0) & ~torch.isin(batch.labels_T, ends)
    run_of, word_of = (seq_R[:, None] == seq_T[word_T][None, :]).nonzero(as_tuple=True)
    return run_of, batch.labels_T[word_T][word_of]


OBJECTIVES: dict[str, Objective] = {"next_token": sft_objective, "caption_words": caption_words_objective}


def flip_tiles(batch: Batch) -> Batch:
    """Mirror each tile left-right and up-down and transpose it, each with probability 1/2."""
    tiles_GSSC = batch.tiles_GSSC.clone()
    for dims in ((2,), (1,)):
        chosen = torch.rand(len(tiles_GSSC)) < 0.5
        tiles_GSSC[chosen] = tiles_GSSC[chosen].flip(dims)
    chosen = torch.rand(len(tiles_GSSC)) < 0.5
    tiles_GSSC[chosen] = tiles_GSSC[chosen].transpose(1, 2)
    return replace(batch, tiles_GSSC=tiles_GSSC)


def forward_batch(model: VLM, batch: Batch) -> torch.Tensor:
    """Final hidden states [T, D]. Each distinct tile is encoded once, however many placeholder runs show it."""
    vision_RUD = encode_vision(model, batch)
    if vision_RUD is None and is_sharded(model):
        # Ranks that share shards go through ViT and decoder together, forth and back: one without pictures encodes a blank
        # tile and shows none of it.
        size = model.config.vision.image_size
        vision_RUD = _encode(model, torch.zeros(1, size, size, 3, dtype=torch.uint8, device=batch.tokens_T.device))[:0]
    return model(batch.tokens_T, batch.layout, vision_RUD)


def encode_vision(model: VLM, batch: Batch) -> torch.Tensor | None:
    """Vision tokens [R, U, D] of every placeholder run, without a graph when ViT and projector are frozen."""
    if not len(batch.tiles_GSSC):
        return None
    return _encode(model, batch.tiles_GSSC)[batch.tile_ids_R]


def _encode(model: VLM, tiles_GSSC: torch.Tensor) -> torch.Tensor:
    trains = any(p.requires_grad for part in (model.vision, model.projector) for p in part.parameters())
    with torch.set_grad_enabled(trains and torch.is_grad_enabled()):
        # Shards are gathered once a call, and ranks that share them must call equally often.
        return model.encode_tiles(tiles_GSSC, chunk=None) if is_sharded(model) else model.encode_tiles(tiles_GSSC)


def check_batch(batch: Batch, model: VLM) -> None:
    """Refuse a batch that does not fit the model.

    Raises:
        ValueError: for ids outside the vocabulary or loss weights that are not finite and >= 0, with the sample's name;
            for placeholders without a tile, with both counts.
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
    num_marks = int((batch.tokens_T == model.config.image_token_id).sum())
    num_vision = len(batch.tile_ids_R) * model.config.tokens_per_tile
    if num_marks != num_vision:
        raise ValueError(
            f"{num_marks} image placeholder tokens but {num_vision} vision tokens "
            f"({len(batch.tile_ids_R)} tiles shown, {model.config.tokens_per_tile} tokens each)"
        )
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
    numbers_M = numbers.to(ce_M.device)[at_M]
    return {f"loss/{name}": _sum_and_count(ce_M[numbers_M == number]) for number, name in enumerate(names)}


def _sum_and_count(values: torch.Tensor) -> torch.Tensor:
    return torch.stack([values.sum().float(), torch.tensor(float(len(values)), device=values.device)])
