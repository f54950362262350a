"""Samples all rows of a step on the card that computed their scores. The host reads what was chosen, in one copy.

Each row gets what `Sampler` would choose but for rounding: its random number is drawn by the same generator on the host, and
the candidates are walked through in the same order.
"""

from __future__ import annotations

import torch

from ivl.inference.sampling import SampledToken, Sampler, not_finite
from ivl.model.devices import send
from ivl.types import TokenLogprob


def sample_on_card(logits_SV: torch.Tensor, samplers: list[Sampler]) -> list[SampledToken | Exception]:
    """Sample the next token of each sequence, as `ivl.inference.sampling.sample`."""
    device, failed = logits_SV.device, dict[int, Exception]()
    best_S, tokens_S = logits_SV.max(-1)
    if rows := [row for row, sampler in enumerate(samplers) if not sampler.greedy]:
        rows_R = send(torch.tensor(rows), device)
        allowed = _allowed(samplers, rows, failed)
        picked_R = _pick(logits_SV[rows_R].float(), [samplers[row] for row in rows], allowed)
        tokens_S = tokens_S.index_copy(0, rows_R, picked_R)
    parts = [best_S.isfinite(), tokens_S]
    asked = {row: sampler.params.logprobs for row, sampler in enumerate(samplers) if sampler.params.logprobs is not None}
    num_top = min(max(asked.values(), default=0), logits_SV.shape[1])
    if asked:
        rows_R = send(torch.tensor(list(asked)), device)
        scores_RV = logits_SV[rows_R].float()
        total_R1, (best_RK, ids_RK) = scores_RV.logsumexp(-1, keepdim=True), scores_RV.topk(num_top)
        chosen_R1 = scores_RV.gather(1, tokens_S[rows_R].unsqueeze(1))
        parts += [chosen_R1 - total_R1, best_RK - total_R1, ids_RK]
    # Token ids are exact in float64, so that one tensor holds everything.
    read = torch.cat([part.flatten().double() for part in parts]).tolist()
    finite, tokens, read = read[: len(samplers)], read[len(samplers) : 2 * len(samplers)], read[2 * len(samplers) :]
    logprobs: dict[int, TokenLogprob] = {}
    for number, (row, count) in enumerate(asked.items()):
        at = len(asked) + number * num_top
        ids, values = read[at + len(asked) * num_top :][:count], read[at : at + min(count, num_top)]
        top = tuple((int(token), value) for token, value in zip(ids, values, strict=True))
        logprobs[row] = TokenLogprob(int(tokens[row]), read[number], top)
    sampled: list[SampledToken | Exception] = []
    for row, sampler in enumerate(samplers):
        token = int(tokens[row])
        try:
            if row in failed or not finite[row]:
                raise failed.get(row) or not_finite(logits_SV.dtype)
            if not sampler.greedy:
                sampler.note(token)
            sampled.append(SampledToken(token, logprobs.get(row), sampler.matcher and sampler.matcher.advance(token)))
        except Exception as error:
            sampled.append(error)
    return sampled


def _allowed(samplers: list[Sampler], rows: list[int], failed: dict[int, Exception]) -> dict[int, torch.Tensor]:
    """Return what the grammars allow, bool [V] by the place of a row among rows; note the rows whose grammar fails."""
    allowed: dict[int, torch.Tensor] = {}
    for place, row in enumerate(rows):
        if (matcher := samplers[row].matcher) is not None:
            try:
                allowed[place] = matcher.allowed()
            except Exception as error:
                failed[row] = error
    return allowed


def _pick(scores_RV: torch.Tensor, samplers: list[Sampler], allowed: dict[int, torch.Tensor]) -> torch.Tensor:
    """Apply grammars and penalties, and choose a token for each row. Returns [R]."""
    device, (num_rows, vocabulary) = scores_RV.device, scores_RV.shape
    if allowed:
        guided_G, mask_GV = send(torch.tensor(list(allowed)), device), send(torch.stack(list(allowed.values())), device)
        scores_RV = scores_RV.index_copy(0, guided_G, scores_RV[guided_G].masked_fill(~mask_GV, -torch.inf))
    flat = scores_RV.flatten()
    seen = [(row * vocabulary + s.seen, s.params.repetition_penalty) for row, s in enumerate(samplers) if s.seen is not None]
    if seen:
        places = send(torch.cat([ids for ids, _ in seen]), device)
        penalties = send(torch.cat([torch.full((len(ids),), penalty) for ids, penalty in seen]), device)
        old = flat[places]
        flat = flat.index_copy(0, places, torch.where(old > 0, old / penalties, old * penalties))
    counted = [
        (row * vocabulary + token, s.params.presence_penalty + s.params.frequency_penalty * count)
        for row, s in enumerate(samplers)
        for token, count in s.counts.items()
    ]
    if counted:
        places, penalties = (send(torch.tensor(column), device) for column in zip(*counted, strict=True))
        flat = flat.index_add(0, places, -penalties)
    return _draw(flat.view(num_rows, vocabulary), samplers)


def _draw(scores_RV: torch.Tensor, samplers: list[Sampler]) -> torch.Tensor:
    """Draw from the candidates of each row; a greedy row has one."""
    every = scores_RV.shape[1]
    numbers = [
        (s.params.temperature, s.params.top_k, s.params.top_p, s.params.min_p, _uniform(s))
        if s.params.temperature
        else (1, 1, 1, 0, 0)
        for s in samplers
    ]
    columns = send(torch.tensor(numbers, dtype=torch.float64), scores_RV.device).unsqueeze(2).unbind(1)
    temperature_R1, top_k_R1, top_p_R1, min_p_R1, uniform_R1 = columns
    by_rank_R1 = (top_k_R1 > 0) & (top_k_R1 < every)  # the order in which candidates are walked through, else by their ids
    falling_RV, ids_RV = (scores_RV / temperature_R1.float()).sort(dim=-1, descending=True, stable=True)
    too_low_RV = torch.arange(every, device=scores_RV.device) >= top_k_R1
    probabilities_RV = falling_RV.masked_fill(by_rank_R1 & too_low_RV, -torch.inf).softmax(-1)
    before_RV = probabilities_RV.double().cumsum(-1) - probabilities_RV.double()
    kept_RV = (top_p_R1 >= 1) | (before_RV < top_p_R1)
    kept_RV &= probabilities_RV >= min_p_R1.float() * probabilities_RV[:, :1]
    kept_RV[:, 0] = True
    probabilities_RV = probabilities_RV.masked_fill(~kept_RV, 0)
    by_id_RV = torch.zeros_like(probabilities_RV).scatter(1, ids_RV, probabilities_RV)
    cumulative_RV = torch.where(by_rank_R1, probabilities_RV, by_id_RV).double().cumsum(-1)
    total_R1 = cumulative_RV[:, -1:].contiguous()
    last_R1 = torch.searchsorted(cumulative_RV, total_R1)  # those behind it have probability 0
    at_R1 = torch.searchsorted(cumulative_RV, uniform_R1 * total_R1, right=True).minimum(last_R1)
    at_R1 = at_R1.clamp_max(every - 1)  # where scores are not finite
    return torch.where(by_rank_R1, ids_RV.gather(1, at_R1), at_R1).squeeze(1)


def _uniform(sampler: Sampler) -> float:
    """Return the next random number in [0, 1) of a request. It is drawn on the host, as on a CPU."""
    return float(torch.rand((), generator=sampler.generator, dtype=torch.float64))
