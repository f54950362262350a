"""Log-probabilities of the replies of packed pairs: chosen and rejected are neighboring sequences that share their tiles."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch

from ivl.model.devices import send
from ivl.model.vlm import VLM
from ivl.train.losses import WHOLE_HEAD, HeadShare, add_gradients, chunk_rows, share_of
from ivl.train.objectives import forward_batch
from ivl.types import Batch


@dataclass(frozen=True)
class Replies:
    """log_probs_S: summed log-probability of each sequence's trained tokens. lens_S: how many there are."""

    log_probs_S: torch.Tensor
    lens_S: torch.Tensor

    @property
    def means_S(self) -> torch.Tensor:
        """Mean log-probability of a trained token, by sequence."""
        return self.log_probs_S / self.lens_S


def reply_log_probs(model: VLM, batch: Batch) -> Replies:
    """Compute the log-probabilities of a pack's replies in one forward call."""
    hidden_TD = forward_batch(model, batch)
    device, num_sequences = hidden_TD.device, len(batch.layout.new_lens)
    at_M, seq_M = last_replies(batch)
    labels_M = send(batch.labels_T[at_M], device)
    head = model.decoder.head
    log_probs_M = linear_log_probs(hidden_TD[send(at_M, device)], head.matrix(), labels_M, share=share_of(head))
    # index_add in float32 over a few thousand terms of one sign: no worse than the terms themselves.
    sums_S = log_probs_M.new_zeros(num_sequences).index_add(0, send(seq_M, device), log_probs_M)
    return Replies(sums_S, send(torch.bincount(seq_M, minlength=num_sequences), device))


def last_replies(batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Find the trained tokens of every sequence's last reply, and their sequences; earlier replies belong to the prompt."""
    at_M = batch.weights_T.nonzero().squeeze(1)
    lens_S = torch.tensor(batch.layout.new_lens)
    seq_M = torch.arange(len(lens_S)).repeat_interleave(lens_S)[at_M]
    # A reply is a run of trained tokens. No run goes on from one sequence to the next, for the last token has no label.
    reply_M = (at_M.diff(prepend=at_M[:1]) != 1).cumsum(0)
    last_S = torch.zeros_like(lens_S).scatter_reduce(0, seq_M, reply_M, "amax")
    kept_M = reply_M == last_S[seq_M]
    return at_M[kept_M], seq_M[kept_M]


def check_pairs(batch: Batch) -> None:
    """Refuse a sample that is not a pair of two different replies with trained tokens in both.

    Raises:
        ValueError: naming the sample.
    """
    ends = list(accumulate(batch.layout.new_lens))
    start = sequence = 0
    for number, num_tokens in enumerate(batch.sample_lens):
        name = f"{batch.ids[number]} ({batch.sources[number]})"
        inside = [end for end in ends[sequence:] if end <= start + num_tokens]
        if len(inside) != 2:
            raise ValueError(f"{name}: a preference pair has two replies, this sample has {len(inside)}")
        middle, end = inside
        for side, span in (("chosen", slice(start, middle)), ("rejected", slice(middle, end))):
            if not batch.weights_T[span].any():
                raise ValueError(f"{name}: the {side} reply trains no token")
        if torch.equal(batch.tokens_T[start:middle], batch.tokens_T[middle:end]):
            raise ValueError(f"{name}: chosen and rejected are the same")
        start, sequence = end, sequence + 2


def linear_log_probs(
    hidden_MD: torch.Tensor, head_VD: torch.Tensor, labels_M: torch.Tensor, *,
    chunk: int | None = None, share: HeadShare = WHOLE_HEAD,
) -> torch.Tensor:  # fmt: skip
    """Compute the log-probability of each label under softmax(hidden @ head^T), float32 [M], differentiable.

    Logits are computed in chunks, as by linear_cross_entropy, and again in the backward pass, for the loss is not known yet.
    """
    return _LinearLogProbs.apply(hidden_MD, head_VD, labels_M, chunk or chunk_rows(head_VD), share)


class _LinearLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_MD: torch.Tensor, head_VD: torch.Tensor, labels_M: torch.Tensor, rows: int, share: HeadShare
    ) -> torch.Tensor:
        label_M, total_M = (hidden_MD.new_empty(len(hidden_MD), dtype=torch.float32) for _ in range(2))
        head = head_VD.to(hidden_MD.dtype)
        for at in range(0, len(hidden_MD), rows):
            span = slice(at, at + rows)
            logits = share.mask((hidden_MD[span] @ head.T).float())
            at_R1, here_R = share.places(labels_M[span], len(head))
            label_M[span] = share.sum(logits.gather(1, at_R1).squeeze(1).masked_fill(~here_R, 0.0))
            peak = share.maximum(logits.amax(1))
            total_M[span] = peak + share.sum(logits.sub_(peak[:, None]).exp_().sum(1)).log()
        ctx.save_for_backward(hidden_MD, head_VD, labels_M, total_M)
        ctx.rows, ctx.share = rows, share
        return label_M - total_M

    @staticmethod
    def backward(ctx: Any, grad_M: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        hidden_MD, head_VD, labels_M, total_M = ctx.saved_tensors
        need_hidden, need_head = ctx.needs_input_grad[:2]
        hidden_grad_MD = torch.empty_like(hidden_MD) if need_hidden else None
        head_grad_VD = torch.zeros_like(head_VD, dtype=torch.float32) if need_head else None
        head = head_VD.to(hidden_MD.dtype)
        for at in range(0, len(hidden_MD), ctx.rows):
            span = slice(at, at + ctx.rows)
            hidden, share = hidden_MD[span], ctx.share
            logits = share.mask((hidden @ head.T).float())
            at_R1, here_R = share.places(labels_M[span], len(head))
            grad = logits.sub_(total_M[span, None]).exp_().mul_(-grad_M[span, None])
            grad.scatter_add_(1, at_R1, (grad_M[span] * here_R)[:, None])
            add_gradients(grad.to(hidden.dtype), hidden, head, hidden_grad_MD, head_grad_VD, span)
        if hidden_grad_MD is not None:
            hidden_grad_MD = ctx.share.sum(hidden_grad_MD)
        return hidden_grad_MD, None if head_grad_VD is None else head_grad_VD.to(head_VD.dtype), None, None, None
