"""A planned step on the model."""

from __future__ import annotations

import time

import torch

from ivl.cpu.replay import Replays
from ivl.inference.sampling import Chosen, choose
from ivl.inference.scheduler import Piece, Plan
from ivl.inference.vision import VisionEncoder
from ivl.model.cache import PagedCache
from ivl.model.vlm import VLM


class Runner:
    def __init__(self, model: VLM, cache: PagedCache, encoder: VisionEncoder) -> None:
        self.model = model
        self.cache = cache
        self.encoder = encoder
        self.replays = Replays(model.decoder, cache)

    def run(self, plan: Plan) -> list[Chosen | None]:
        """Encode the planned tiles, compute the planned pieces in one forward call, and choose a token for each that
        samples, in order; None where the scores are not finite."""
        started = time.perf_counter()
        if plan.tiles:
            self._encode(plan)
        encoded = time.perf_counter()
        tokens = self._forward(plan.pieces) if plan.pieces else []
        done = time.perf_counter()
        for request in {request for request, _ in plan.wanted}:
            request.vision += encoded - started
        for piece in plan.pieces:
            if piece.start < piece.request.num_prompt:
                piece.request.prefill += done - encoded
        return tokens

    def _encode(self, plan: Plan) -> None:
        encoded = self.encoder.encode(plan.tiles)
        for request, key in plan.wanted:
            request.encoded[key] = encoded[key]

    def _forward(self, pieces: list[Piece]) -> list[Chosen | None]:
        device = self.model.device
        step = self.cache.step([piece.request.sequence for piece in pieces], tuple(piece.count for piece in pieces))
        x_TD = self.model.embed(_tokens(pieces).to(device), _vision(pieces))
        hidden_TD = self.replays.run(x_TD, step)
        sampling = [number for number, piece in enumerate(pieces) if piece.samples]
        if not sampling:
            return []
        if len(sampling) < len(hidden_TD):
            ends = [step.layout.starts[number] + pieces[number].count - 1 for number in sampling]
            hidden_TD = hidden_TD[torch.tensor(ends, device=device)]
        logits_SV = self.model.head(hidden_TD)
        logits_SV[:, self.model.config.image_token_id] = -torch.inf  # stands for pixels; there are none to put here
        return choose(logits_SV, [pieces[number].request.sampler for number in sampling])


def _tokens(pieces: list[Piece]) -> torch.Tensor:
    parts: list[torch.Tensor] = []
    replies = [piece.request.tokens[-1] for piece in pieces if piece.start >= piece.request.num_prompt]
    if len(replies) == len(pieces):
        return torch.tensor(replies, dtype=torch.long)
    for piece in pieces:
        if piece.start < piece.request.num_prompt:
            parts.append(piece.request.prompt.tokens_T[piece.start : piece.stop])
        else:
            parts.append(torch.tensor(piece.request.tokens[-1:], dtype=torch.long))
    return torch.cat(parts)


def _vision(pieces: list[Piece]) -> torch.Tensor | None:
    """Vision tokens [X, D] of all placeholders in the pieces, in order."""
    parts = [piece.request.prompt.vision(piece.start, piece.stop, piece.request.encoded) for piece in pieces]
    found = [vision_XD for vision_XD in parts if vision_XD is not None]
    return torch.cat(found) if found else None
