"""Cross-entropy that never holds a whole logit matrix: head and loss run in chunks, over trained tokens only.

M is the number of trained tokens, M <= T.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

MAX_LOGITS = 2**26
"""Elements of one chunk of float32 logits (256 MB)."""
WORDS = 8192
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
    """Weighted sum of the cross-entropy of softmax(hidden @ head^T), gradients included, chunk rows at a time.

    Logits are products in the autocast type when autocast is on, else in the type of hidden; the softmax is float32.
    Gradients are ready after the forward pass, so a chunk's logits die with the chunk; a gradient that nobody needs
    (a frozen head, frozen hidden states, no_grad) is not computed.

    chunk: rows per chunk; None takes as many as keep the logits within MAX_LOGITS.
    """
    device = hidden_MD.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden_MD.dtype
    rows = chunk or max(64, MAX_LOGITS // len(head_VD))
    need = torch.is_grad_enabled()
    total, ce_M, correct_M = _LinearCrossEntropy.apply(
        hidden_MD,
        head_VD,
        labels_M,
        weights_M.float(),
        rows,
        dtype,
        (need and hidden_MD.requires_grad, need and head_VD.requires_grad),
    )  # type: ignore[misc]
    return TokenLoss(total, ce_M, correct_M)


def linear_log_probs(
    hidden_MD: torch.Tensor, head_VD: torch.Tensor, labels_M: torch.Tensor, *, chunk: int | None = None
) -> torch.Tensor:
    """Log-probability of each label under softmax(hidden @ head^T), float32 [M], differentiable.

    As linear_cross_entropy, but what becomes of the log-probabilities is open: logits are computed again, chunk by chunk, in
    the backward pass.
    """
    device = hidden_MD.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden_MD.dtype
    rows = chunk or max(64, MAX_LOGITS // len(head_VD))
    return _LinearLogProbs.apply(hidden_MD, head_VD, labels_M, rows, dtype)  # type: ignore[return-value]


class _LinearLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_MD, head_VD, labels_M, rows, dtype):  # type: ignore[override]
        log_probs_M = torch.empty(len(hidden_MD), dtype=torch.float32, device=hidden_MD.device)
        with torch.autocast(hidden_MD.device.type, enabled=False):
            head = head_VD.to(dtype)
            for at in range(0, len(hidden_MD), rows):
                span = slice(at, at + rows)
                logits = (hidden_MD[span].to(dtype) @ head.T).float()
                log_probs_M[span] = logits.gather(1, labels_M[span, None]).squeeze(1) - logits.logsumexp(1)
        ctx.save_for_backward(hidden_MD, head_VD, labels_M)
        ctx.rows, ctx.dtype = rows, dtype
        return log_probs_M

    @staticmethod
    def backward(ctx, grad_M):  # type: ignore[override]
        hidden_MD, head_VD, labels_M = ctx.saved_tensors
        need_hidden, need_head = ctx.needs_input_grad[:2]
        hidden_grad_MD = torch.empty_like(hidden_MD) if need_hidden else None
        head_grad_VD = torch.zeros_like(head_VD, dtype=torch.float32) if need_head else None
        head = head_VD.to(ctx.dtype)
        for at in range(0, len(hidden_MD), ctx.rows):
            span = slice(at, at + ctx.rows)
            hidden = hidden_MD[span].to(ctx.dtype)
            grad = (hidden @ head.T).float().softmax(1).mul_(-grad_M[span, None])
            grad.scatter_add_(1, labels_M[span, None], grad_M[span, None])
            _add_gradients(grad.to(ctx.dtype), hidden, head, hidden_grad_MD, head_grad_VD, span)
        return hidden_grad_MD, None if head_grad_VD is None else head_grad_VD.to(head_VD.dtype), None, None, None


def _add_gradients(grad_RV, hidden_RD, head_VD, hidden_grad_MD, head_grad_VD, span: slice) -> None:
    """From the gradient of a chunk's logits to those of its hidden states and of the head."""
    if hidden_grad_MD is not None:
        hidden_grad_MD[span] = (grad_RV @ head_VD).to(hidden_grad_MD.dtype)
    if head_grad_VD is not None:
        for words in range(0, len(head_VD), WORDS):  # a block's product is added while it is in the caches
            head_grad_VD[words : words + WORDS] += grad_RV[:, words : words + WORDS].T @ hidden_RD


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_MD, head_VD, labels_M, weights_M, rows, dtype, need):  # type: ignore[override]
        need_hidden, need_head = need
        ce_M = torch.empty(len(hidden_MD), dtype=torch.float32, device=hidden_MD.device)
        correct_M = torch.empty_like(ce_M, dtype=torch.bool)
        hidden_grad_MD = torch.empty_like(hidden_MD) if need_hidden else None
        # Sums over many chunks stay in float32 whatever the head's own type.
        head_grad_VD = torch.zeros_like(head_VD, dtype=torch.float32) if need_head else None
        with torch.autocast(hidden_MD.device.type, enabled=False):
            head = head_VD.to(dtype)
            for at in range(0, len(hidden_MD), rows):
                span = slice(at, at + rows)
                hidden = hidden_MD[span].to(dtype)
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
                _add_gradients(grad.to(dtype), hidden, head, hidden_grad_MD, head_grad_VD, span)
        ctx.save_for_backward(hidden_grad_MD, head_grad_VD)
        ctx.head_dtype = head_VD.dtype
        ctx.mark_non_differentiable(ce_M, correct_M)
        return (ce_M * weights_M).sum(), ce_M, correct_M

    @staticmethod
    def backward(ctx, grad_total, *_unused):  # type: ignore[override]
        hidden_grad_MD, head_grad_VD = ctx.saved_tensors
        if hidden_grad_MD is not None:
            hidden_grad_MD = hidden_grad_MD * grad_total.to(hidden_grad_MD.dtype)
        if head_grad_VD is not None:
            head_grad_VD = (head_grad_VD * grad_total).to(ctx.head_dtype)
        return hidden_grad_MD, head_grad_VD, None, None, None, None, None
