"""Cross-entropy that never holds a whole logit matrix: head and loss run in chunks, over trained tokens only.

M trained tokens, M <= T; R of them in a chunk.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

MAX_LOGITS = 2**26
"""Elements of one chunk of float32 logits (256 MB)."""
HEAD_ROWS = 8192
"""Rows of the head whose gradient is added up at a time."""


@dataclass(frozen=True)
class TokenLoss:
    """total: differentiable sum of weight * cross-entropy. ce_M and correct_M: per trained token, for metrics only."""

    total: torch.Tensor
    ce_M: torch.Tensor
    correct_M: torch.Tensor


def _same(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


@dataclass(frozen=True)
class HeadShare:
    """Which rows of the output matrix are here. By default all are; else ranks share them, and the losses take the sum and the
    maximum over ranks where they go over the vocabulary."""

    first: int = 0
    """The token of the first row."""
    rows: int | None = None
    """Rows that stand for a token; those behind them fill up a share."""
    sum: Callable[[torch.Tensor], torch.Tensor] = _same
    maximum: Callable[[torch.Tensor], torch.Tensor] = _same

    def mask(self, logits_RV: torch.Tensor) -> torch.Tensor:
        """Take out the rows without a token, in place."""
        if self.rows is not None:
            logits_RV[:, self.rows :] = -torch.inf
        return logits_RV

    def places(self, labels_R: torch.Tensor, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return each label's row here, [R, 1], and whether it is here, [R]."""
        at_R = labels_R - self.first
        here_R = (at_R >= 0) & (at_R < rows)
        return at_R.clamp(0, rows - 1).unsqueeze(1), here_R


WHOLE_HEAD = HeadShare()


def share_of(head: nn.Module) -> HeadShare:
    """Return which rows of the output matrix a head has, as `ivl.parallel.tensor` has noted it there."""
    return getattr(head, "share", WHOLE_HEAD)


def linear_cross_entropy(
    hidden_MD: torch.Tensor, head_VD: torch.Tensor, labels_M: torch.Tensor, weights_M: torch.Tensor, *,
    chunk: int | None = None, share: HeadShare = WHOLE_HEAD,
) -> TokenLoss:  # fmt: skip
    """Sum the weighted cross-entropy of softmax(hidden @ head^T), gradients included, `chunk` rows at a time.

    Logits are products in the type of hidden; the softmax is float32.
    Gradients are ready after the forward pass, so a chunk's logits are freed with the chunk. A gradient that nobody needs
    (of a frozen head or frozen hidden states, or under no_grad) is not computed.

    Args:
        hidden_MD: final hidden states of the trained tokens.
        head_VD: the output matrix.
        labels_M: the next tokens.
        weights_M: loss weights.
        chunk: rows per chunk; None takes as many as keep the logits within MAX_LOGITS.
        share: which rows of the output matrix head_VD is.
    """
    need = torch.is_grad_enabled()
    needed = need and hidden_MD.requires_grad, need and head_VD.requires_grad
    rows = chunk or chunk_rows(head_VD)
    total, ce_M, correct_M = _LinearCrossEntropy.apply(hidden_MD, head_VD, labels_M, weights_M.float(), rows, share, needed)
    return TokenLoss(total, ce_M, correct_M)


def chunk_rows(head_VD: torch.Tensor) -> int:
    """Return the number of tokens whose logits fit into MAX_LOGITS."""
    return max(64, MAX_LOGITS // len(head_VD))


def add_gradients(
    grad_RV: torch.Tensor, hidden_RD: torch.Tensor, head_VD: torch.Tensor, hidden_grad_MD: torch.Tensor | None,
    head_grad_VD: torch.Tensor | None, span: slice,
) -> None:  # fmt: skip
    """Turn the gradient of a chunk's logits into those of its hidden states (rows `span`) and of the head, where needed."""
    if hidden_grad_MD is not None:
        hidden_grad_MD[span] = (grad_RV @ head_VD).to(hidden_grad_MD.dtype)
    if head_grad_VD is not None:
        for at in range(0, len(head_VD), HEAD_ROWS):  # added while the product is in the caches
            head_grad_VD[at : at + HEAD_ROWS] += grad_RV[:, at : at + HEAD_ROWS].T @ hidden_RD


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_MD: torch.Tensor, head_VD: torch.Tensor, labels_M: torch.Tensor, weights_M: torch.Tensor, rows: int,
        share: HeadShare, need: tuple[bool, bool],
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
        need_hidden, need_head = need
        ce_M = torch.empty(len(hidden_MD), dtype=torch.float32, device=hidden_MD.device)
        correct_M = torch.empty_like(ce_M, dtype=torch.bool)
        hidden_grad_MD = torch.empty_like(hidden_MD) if need_hidden else None
        # Sums over many chunks stay in float32 whatever the head's own type.
        head_grad_VD = torch.zeros_like(head_VD, dtype=torch.float32) if need_head else None
        head = head_VD.to(hidden_MD.dtype)
        for at in range(0, len(hidden_MD), rows):
            span = slice(at, at + rows)
            hidden = hidden_MD[span]
            logits = share.mask((hidden @ head.T).float())
            at_R1, here_R = share.places(labels_M[span], len(head))
            label = share.sum(logits.gather(1, at_R1).squeeze(1).masked_fill(~here_R, 0.0))
            peak = share.maximum(logits.amax(1))
            correct_M[span] = label >= peak
            norm = share.sum(logits.sub_(peak[:, None]).exp_().sum(1))
            ce_M[span] = peak + norm.log() - label
            if not (need_hidden or need_head):
                continue
            weight = weights_M[span]
            grad = logits.mul_((weight / norm)[:, None])
            grad.scatter_add_(1, at_R1, -(weight * here_R)[:, None])
            add_gradients(grad.to(hidden.dtype), hidden, head, hidden_grad_MD, head_grad_VD, span)
        if hidden_grad_MD is not None:
            hidden_grad_MD = share.sum(hidden_grad_MD)
        ctx.save_for_backward(hidden_grad_MD, head_grad_VD)
        ctx.head_dtype = head_VD.dtype
        ctx.mark_non_differentiable(ce_M, correct_M)
        return (ce_M * weights_M).sum(), ce_M, correct_M

    @staticmethod
    def backward(ctx: Any, grad_total: torch.Tensor, *_unused: Any) -> tuple[torch.Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        hidden_grad_MD, head_grad_VD = ctx.saved_tensors
        if hidden_grad_MD is not None:
            hidden_grad_MD = hidden_grad_MD * grad_total.to(hidden_grad_MD.dtype)
        if head_grad_VD is not None:
            head_grad_VD = (head_grad_VD * grad_total).to(ctx.head_dtype)
        return hidden_grad_MD, head_grad_VD, None, None, None, None, None
