"""Cross-entropy that never holds a whole logit matrix: head and loss run in chunks, over trained tokens only.

M trained tokens, M <= T; R of them in a chunk.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

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


def linear_cross_entropy(
    hidden_MD: torch.Tensor, head_VD: torch.Tensor, labels_M: torch.Tensor, weights_M: torch.Tensor, *, chunk: int | None = None
) -> TokenLoss:
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
    """
    need = torch.is_grad_enabled()
    needed = need and hidden_MD.requires_grad, need and head_VD.requires_grad
    rows = chunk or chunk_rows(head_VD)
    total, ce_M, correct_M = _LinearCrossEntropy.apply(hidden_MD, head_VD, labels_M, weights_M.float(), rows, needed)
    return TokenLoss(total, ce_M, correct_M)


def chunk_rows(head_VD: torch.Tensor) -> int:
    """Return the number of tokens whose logits fit into MAX_LOGITS."""
    return max(64, MAX_LOGITS // len(head_VD))


def add_gradients(
    grad_RV: torch.Tensor,
    hidden_RD: torch.Tensor,
    head_VD: torch.Tensor,
    hidden_grad_MD: torch.Tensor | None,
    head_grad_VD: torch.Tensor | None,
    span: slice,
) -> None:
    """Turn the gradient of a chunk's logits into those of its hidden states (rows `span`) and of the head, where needed."""
    if hidden_grad_MD is not None:
        hidden_grad_MD[span] = (grad_RV @ head_VD).to(hidden_grad_MD.dtype)
    if head_grad_VD is not None:
        for at in range(0, len(head_VD), HEAD_ROWS):  # added while the product is in the caches
            head_grad_VD[at : at + HEAD_ROWS] += grad_RV[:, at : at + HEAD_ROWS].T @ hidden_RD


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_MD: torch.Tensor,
        head_VD: torch.Tensor,
        labels_M: torch.Tensor,
        weights_M: torch.Tensor,
        rows: int,
        need: tuple[bool, bool],
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
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
            logits = (hidden @ head.T).float()
            label = logits.gather(1, labels_M[span, None]).squeeze(1)
            peak = logits.amax(1)
            correct_M[span] = label >= peak
            norm = logits.sub_(peak[:, None]).exp_().sum(1)
            ce_M[span] = peak + norm.log() - label
            if not (need_hidden or need_head):
                continue
            weight = weights_M[span]
            grad = logits.mul_((weight / norm)[:, None])
            grad.scatter_add_(1, labels_M[span, None], -weight[:, None])
            add_gradients(grad.to(hidden.dtype), hidden, head, hidden_grad_MD, head_grad_VD, span)
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
        return hidden_grad_MD, head_grad_VD, None, None, None, None
