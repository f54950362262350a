"""Objectives of the nano recipes, which only their import paths open: nothing else needs them.

Tiles are mirrored and transposed at random, for easy-vqa's labels do not depend on direction.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from ivl.model.devices import send
from ivl.model.vlm import VLM
from ivl.train.objectives import check_batch, encode_vision, next_token
from ivl.types import Batch, Loss


def flipped_next_token(model: VLM, batch: Batch) -> Loss:
    """Next-token cross-entropy on tiles that are flipped while training."""
    return next_token(model, flip_tiles(batch) if model.training else batch)


def flipped_caption_words(model: VLM, batch: Batch) -> Loss:
    """The loss of caption_words on tiles that are flipped while training."""
    return caption_words(model, flip_tiles(batch) if model.training else batch)


def caption_words(model: VLM, batch: Batch) -> Loss:
    """Predict the words of each tile's caption from the tile's mean vision token, through the output head.

    A multi-label softmax over the caption's tokens (Huang et al., 2024, arXiv:2411.03313): ViT and projector learn to
    see before a decoder listens, on any captioned images. Every placeholder run counts 1; end-of-turn tokens are no words.

    Raises:
        ValueError: if the batch does not fit the model, or has no tile with a trained caption.
    """
    check_batch(batch, model)
    run_of, label_of = caption_labels(model, batch)
    if not len(run_of):
        raise ValueError(f"caption_words needs tiles with trained captions; {', '.join(batch.sources[:3])} have none")
    vision_RUD = encode_vision(model, batch)
    assert vision_RUD is not None
    log_probs_RV = model.head(vision_RUD.mean(1)).float().log_softmax(-1)
    num_words_R = torch.bincount(run_of, minlength=len(vision_RUD))
    weight = (num_words_R > 0).sum().float()
    num_words, run_of, label_of = (send(x, log_probs_RV.device) for x in (num_words_R[run_of], run_of, label_of))
    losses = -log_probs_RV[run_of, label_of] / num_words
    right = (log_probs_RV.argmax(-1)[run_of] == label_of).float()
    hits = (log_probs_RV.new_zeros(len(vision_RUD)).index_add(0, run_of, right) > 0).sum().float()
    return Loss(losses.sum(), weight, {"accuracy": torch.stack([hits, torch.full_like(hits, float(weight))])})


def caption_labels(model: VLM, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Pairs (placeholder run, trained label of the same sequence) without end-of-turn tokens."""
    lens_S = torch.tensor(batch.layout.new_lens)
    seq_T = torch.arange(len(lens_S)).repeat_interleave(lens_S)
    placeholder_T = batch.tokens_T == model.config.image_token_id
    seq_R = seq_T[placeholder_T][:: model.config.tokens_per_tile]
    ends = torch.tensor(model.config.eos_token_ids)
    word_T = (batch.weights_T != 0) & ~torch.isin(batch.labels_T, ends)
    run_of, word_of = (seq_R[:, None] == seq_T[word_T][None, :]).nonzero(as_tuple=True)
    return run_of, batch.labels_T[word_T][word_of]


def flip_tiles(batch: Batch) -> Batch:
    """Mirror each tile left-right and up-down and transpose it, each with probability 1/2."""
    tiles_GSSC = batch.tiles_GSSC.clone()
    for dims in ((2,), (1,)):
        chosen = torch.rand(len(tiles_GSSC)) < 0.5
        tiles_GSSC[chosen] = tiles_GSSC[chosen].flip(dims)
    chosen = torch.rand(len(tiles_GSSC)) < 0.5
    tiles_GSSC[chosen] = tiles_GSSC[chosen].transpose(1, 2)
    return replace(batch, tiles_GSSC=tiles_GSSC)
