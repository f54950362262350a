"""Runs a scheduled step on the model."""

from __future__ import annotations

import time
from collections.abc import Mapping

import torch

from ivl.inference.sampling import SampledToken, sample
from ivl.inference.scheduler import EngineStep, Piece
from ivl.inference.vision import VisionEncoder
from ivl.model.cache import PagedCache
from ivl.model.devices import send
from ivl.model.vlm import VLM


class Runner:
    """Encodes tiles, computes tokens and samples."""

    def __init__(self, models: Mapping[str, VLM], cache: PagedCache, encoder: VisionEncoder, unused: list[int]) -> None:
        """models: by variant; unused: the ids that have no token."""
        self.models = models
        self.cache = cache
        self.encoder = encoder
        self.sample = sample  # `ivl.gpu.accelerate` puts a card's way here
        # The image token stands for pixels, which a reply does not have.
        self.never_sampled = torch.tensor([models[""].config.image_token_id, *unused], device=models[""].device)

    def run(self, step: EngineStep) -> list[SampledToken | Exception]:
        """Encode the tiles of a step, compute its pieces in one forward call, and sample a token for each piece that ends
        a prompt or continues a reply, in order; an exception where that fails."""
        started, model = time.perf_counter(), self.models[step.variant]
        if step.tiles:
            encoded = self.encoder.encode(step.tiles, model)
            for request, tile in step.tile_users:
                request.cache.vision[tile] = encoded[tile]
        encoded_at = time.perf_counter()
        tokens = self._forward(model, step.pieces) if step.pieces else []
        done = time.perf_counter()
        for request in {request for request, _ in step.tile_users}:
            request.timings.vision += encoded_at - started
        for piece in step.pieces:
            if piece.in_prompt:
                piece.request.timings.prefill += done - encoded_at
        return tokens

    def _forward(self, model: VLM, pieces: list[Piece]) -> list[SampledToken | Exception]:
        device = model.device
        step = self.cache.step([piece.request.cache.sequence for piece in pieces], tuple(piece.count for piece in pieces))
        at_X = send(_placeholders(pieces, step.layout.starts), device)
        hidden_TD = model(send(_tokens(pieces), device), step.layout, _vision(pieces), step, at_X)
        sampling = [number for number, piece in enumerate(pieces) if piece.samples]
        if not sampling:
            return []
        if len(sampling) < len(hidden_TD):
            ends = [step.layout.starts[number] + pieces[number].count - 1 for number in sampling]
            hidden_TD = hidden_TD[send(torch.tensor(ends), device)]
        logits_SV = model.head(hidden_TD)
        logits_SV.index_fill_(1, self.never_sampled, -torch.inf)
        return self.sample(logits_SV, [pieces[number].request.sampler for number in sampling])


def _tokens(pieces: list[Piece]) -> torch.Tensor:
    """Return the token ids [T] of all pieces, in order."""
    if not any(piece.in_prompt for piece in pieces):
        return torch.tensor([piece.request.tokens[-1] for piece in pieces], dtype=torch.long)
    parts = [
        piece.request.prompt.tokens_T[piece.start : piece.stop] if piece.in_prompt else torch.tensor(piece.request.tokens[-1:])
        for piece in pieces
    ]
    return torch.cat(parts)


def _placeholders(pieces: list[Piece], starts: tuple[int, ...]) -> torch.Tensor:
    """Return where the image placeholders of all pieces are on the token axis, [X]. A reply has none."""
    at: list[int] = []
    for piece, start in zip(pieces, starts, strict=True):
        prompt = piece.request.prompt
        between = prompt.placeholders_between(piece.start, piece.stop)
        at += [start + position - piece.start for position in prompt.placeholders[slice(*between)]]
    return torch.tensor(at, dtype=torch.long)


def _vision(pieces: list[Piece]) -> torch.Tensor | None:
    """Return the vision tokens [X, D] of all placeholders in the pieces, in order."""
    parts = [piece.request.prompt.vision_between(piece.start, piece.stop, piece.request.cache.vision) for piece in pieces]
    shown = [vision_XD for vision_XD in parts if vision_XD is not None]
    return torch.cat(shown) if shown else None
