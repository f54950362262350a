"""From logits to the next token. Every request has its own random numbers, so its text never depends on the batch."""

from __future__ import annotations

import torch

from ivl.errors import InputError
from ivl.types import SamplingParams

TOP_P_CANDIDATES = 1024
"""Top-p looks at this many best tokens first and sorts the whole vocabulary only if they do not suffice."""


class Sampler:
    """What one request needs to choose tokens. seen_V marks the tokens of prompt and reply for the repetition penalty."""

    def __init__(self, params: SamplingParams, prompt: list[int], vocab_size: int) -> None:
        self.params = params
        self.greedy = params.temperature == 0 and params.repetition_penalty == 1
        self.generator = generator(params.seed) if params.temperature > 0 else None
        self.seen_V: torch.Tensor | None = None
        if params.repetition_penalty != 1:
            self.seen_V = torch.zeros(vocab_size, dtype=torch.bool)
            self.seen_V[prompt] = True

    def pick(self, logits_V: torch.Tensor) -> int:
        """Penalty, temperature, top-k, top-p, in this order; then one uniform number chooses."""
        logits_V = logits_V.float().cpu()
        if self.seen_V is not None:
            penalty = self.params.repetition_penalty
            penalised_V = torch.where(logits_V > 0, logits_V / penalty, logits_V * penalty)
            logits_V = torch.where(self.seen_V, penalised_V, logits_V)
        token = int(logits_V.argmax()) if self.params.temperature == 0 else self._draw(logits_V / self.params.temperature)
        if self.seen_V is not None:
            self.seen_V[token] = True
        return token

    def _draw(self, logits_V: torch.Tensor) -> int:
        uniform = torch.rand((), generator=self.generator, dtype=torch.float64)
        kept, ids = candidates(logits_V, self.params.top_k, self.params.top_p)
        cumulative = kept.double().cumsum(0)
        at = int(torch.searchsorted(cumulative, uniform * cumulative[-1], right=True).clamp(max=len(kept) - 1))
        return at if ids is None else int(ids[at])


def generator(seed: int | None) -> torch.Generator:
    """Random numbers of one request; without a seed they differ every time."""
    numbers = torch.Generator()
    if seed is None:
        numbers.seed()
    else:
        numbers.manual_seed(seed)
    return numbers


def candidates(logits_V: torch.Tensor, top_k: int, top_p: float) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Probabilities that survive top-k and top-p, and their token ids; ids is None when all survive, in token order.

    Top-p keeps the smallest set of most likely tokens whose probability, after top-k, reaches it.
    """
    size = len(logits_V)
    if (top_k == 0 or top_k >= size) and top_p == 1:
        return logits_V.softmax(0), None
    if 0 < top_k < size:
        best, ids = logits_V.topk(top_k)
        probabilities = best.softmax(0)
    else:
        best, ids = logits_V.topk(min(TOP_P_CANDIDATES, size))
        probabilities = (best - logits_V.logsumexp(0)).exp()
        if probabilities.double().sum() < top_p and len(best) < size:
            best, ids = logits_V.sort(descending=True)
            probabilities = best.softmax(0)
    before = probabilities.double().cumsum(0) - probabilities
    count = max(1, int((before < top_p).sum()))
    return probabilities[:count], ids[:count]


def choose(logits_SV: torch.Tensor, samplers: list[Sampler]) -> list[int]:
    """The next token of each sequence.

    Raises:
        InputError: if a sequence has no finite best score, as with a damaged checkpoint or a type that overflows.
    """
    best_S, tokens_S = logits_SV.max(-1)
    if not best_S.isfinite().all():
        raise InputError(f"the model's scores are not finite in {logits_SV.dtype}: check the checkpoint, or use float32")
    tokens = tokens_S.tolist()
    for row, sampler in enumerate(samplers):
        if not sampler.greedy:
            tokens[row] = sampler.pick(logits_SV[row])
    return tokens
