"""Samples the next token. Every request has its own random numbers, so its text never depends on the batch."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np
import torch

from ivl.errors import InputError
from ivl.inference.grammar import GrammarMatcher
from ivl.types import FinishReason, SamplingParams, TokenLogprob


@dataclass(frozen=True)
class SampledToken:
    """A token. end: why the reply ends here by its grammar, if it does."""

    token: int
    logprob: TokenLogprob | None = None
    end: FinishReason | None = None


class Sampler:
    """Samples the tokens of one request.

    seen: the distinct tokens of prompt and reply; counts: how often the reply has each token. Both are kept only if a
    penalty needs them.
    """

    def __init__(self, params: SamplingParams, prompt: list[int], matcher: GrammarMatcher | None = None) -> None:
        self.params = params
        self.matcher = matcher
        self.by_count = params.presence_penalty != 0 or params.frequency_penalty != 0
        self.counts: Counter[int] = Counter()
        self.greedy = params.temperature == 0 and params.repetition_penalty == 1 and not self.by_count and matcher is None
        self.generator = torch.Generator() if params.temperature > 0 else None
        if self.generator is not None and params.seed is not None:
            self.generator.manual_seed(params.seed)
        elif self.generator is not None:
            self.generator.seed()  # a new generator would begin with the same seed every time
        self.seen: torch.Tensor | None = None
        if params.repetition_penalty != 1:
            self.seen = torch.tensor(prompt, dtype=torch.long).unique()

    def sample(self, logits_V: torch.Tensor, best: int) -> SampledToken:
        """Return the next token. best: the token with the highest score."""
        token = best if self.greedy else self.pick(logits_V)
        logprob = None if self.params.logprobs is None else token_logprob(logits_V, token, self.params.logprobs)
        return SampledToken(token, logprob, self.matcher and self.matcher.advance(token))

    def pick(self, logits_V: torch.Tensor) -> int:
        """Apply grammar, penalties, temperature, top-k, top-p and min-p, in this order; then one uniform number decides."""
        logits_V = logits_V.float().cpu()
        if self.matcher is not None:
            logits_V = logits_V.masked_fill(~self.matcher.allowed(), -torch.inf)
        if self.seen is not None:
            old, penalty = logits_V[self.seen], self.params.repetition_penalty
            logits_V = logits_V.index_copy(0, self.seen, torch.where(old > 0, old / penalty, old * penalty))
        if self.counts:
            ids, counts = torch.tensor(list(self.counts)), torch.tensor(list(self.counts.values()), dtype=torch.float32)
            penalties = self.params.presence_penalty + self.params.frequency_penalty * counts
            logits_V = logits_V.index_add(0, ids, -penalties)
        token = int(logits_V.argmax()) if self.params.temperature == 0 else self._draw(logits_V / self.params.temperature)
        self.note(token)
        return token

    def note(self, token: int) -> None:
        """Remember a sampled token for the penalties."""
        if self.seen is not None and token not in self.seen:
            self.seen = torch.cat([self.seen, torch.tensor([token])])
        if self.by_count:
            self.counts[token] += 1

    def _draw(self, logits_V: torch.Tensor) -> int:
        uniform = torch.rand((), generator=self.generator, dtype=torch.float64)
        probabilities, ids = candidates(logits_V, self.params.top_k, self.params.top_p, self.params.min_p)
        cumulative = probabilities.double().cumsum(0)
        last = int(torch.searchsorted(cumulative, cumulative[-1]))  # those behind it have probability 0
        at = min(last, int(torch.searchsorted(cumulative, uniform * cumulative[-1], right=True)))
        return at if ids is None else int(ids[at])


def token_logprob(logits_V: torch.Tensor, token: int, num_top: int) -> TokenLogprob:
    """Return the log-probabilities of a token and of the num_top most likely ones, by the model's own scores."""
    logits_V = logits_V.float()
    total = logits_V.logsumexp(0)
    best, ids = logits_V.topk(min(num_top, len(logits_V)))
    top = tuple(zip(ids.tolist(), (best - total).tolist(), strict=True))
    return TokenLogprob(token, float(logits_V[token] - total), top)


def candidates(
    logits_V: torch.Tensor, top_k: int, top_p: float, min_p: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return the probabilities that survive top-k, top-p and min-p, and their token ids.

    Top-p keeps the smallest set of most likely tokens whose probability, after top-k, reaches it. Min-p keeps tokens at
    least this times as likely as the most likely one. The ids are None if every token survives: token n is then at place n.
    """
    ids = None
    if 0 < top_k < len(logits_V):
        logits_V, ids = logits_V.topk(top_k)
    probabilities = logits_V.softmax(0)
    if top_p < 1:  # by numpy, which sorts a vocabulary twenty times as fast as torch and partitions it faster still
        falling = np.sort(probabilities.numpy())[::-1]
        count = int(np.searchsorted(np.cumsum(falling, dtype=np.float64), top_p)) + 1
        if count < len(falling):
            kept = torch.from_numpy(np.sort(np.argpartition(probabilities.numpy(), -count)[-count:]))
            probabilities, ids = probabilities[kept], kept if ids is None else ids[kept]
    if min_p > 0:
        kept = (probabilities >= min_p * probabilities.max()).nonzero()[:, 0]
        probabilities, ids = probabilities[kept], kept if ids is None else ids[kept]
    return probabilities, ids


def sample(logits_SV: torch.Tensor, samplers: list[Sampler]) -> list[SampledToken | Exception]:
    """Sample the next token of each sequence; an exception where that fails, which concerns no other sequence."""
    best_S, tokens_S = logits_SV.max(-1)
    finite, tokens = best_S.isfinite().tolist(), tokens_S.tolist()
    sampled: list[SampledToken | Exception] = []
    for row, sampler in enumerate(samplers):
        try:
            if not finite[row]:
                raise not_finite(logits_SV.dtype)
            sampled.append(sampler.sample(logits_SV[row], tokens[row]))
        except Exception as error:
            sampled.append(error)
    return sampled


def not_finite(dtype: torch.dtype) -> InputError:
    """Return the error for scores of a damaged checkpoint, or of a dtype that overflows."""
    return InputError(f"the model's scores are not finite in {dtype}: use float32, or find the fault by `ivl convert`")
