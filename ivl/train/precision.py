"""Computing in bfloat16 while the parameters stay float32.

The optimizer, checkpoints and LoRA see float32 parameters alone. `computing` puts bfloat16 copies of them in their places,
which are made once a step: a layer reads them as they are, where autocast would cast its weights in every call. The stream
between layers is bfloat16, too. A gradient is added to that of the float32 parameter as soon as it is there, so that those of
many packs add up in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn

from ivl.model.vlm import VLM
from ivl.train.config import Precision
from ivl.train.world import is_sharded


def computing(model: VLM, precision: Precision) -> AbstractContextManager[object]:
    """Return a context manager, to be entered any number of times, within which the model computes in the precision of a run.

    A sharded model needs none: FSDP2 gathers its parameters in the type that `ivl.parallel.shard` was given.
    """
    return WorkingWeights(model) if precision == "bf16" and not is_sharded(model) else nullcontext()


class WorkingWeights:
    """bfloat16 copies of a model's float32 parameters. Embeddings stay as they are: only the rows that a pack has are cast."""

    def __init__(self, model: VLM) -> None:
        self.places: list[tuple[nn.Module, str, nn.Parameter]] = []
        self.copies: dict[nn.Parameter, nn.Parameter] = {}
        for module in model.modules():
            for name, parameter in module.named_parameters(recurse=False):
                if module is model.decoder.embeddings:
                    continue
                self.places.append((module, name, parameter))
                if parameter not in self.copies:
                    self.copies[parameter] = _copy(parameter)

    @torch.no_grad()
    def __enter__(self) -> None:
        for parameter, copy in self.copies.items():
            if parameter.requires_grad:
                copy.copy_(parameter)
        for module, name, parameter in self.places:
            setattr(module, name, self.copies[parameter])

    def __exit__(self, *_: object) -> None:
        for module, name, parameter in self.places:
            setattr(module, name, parameter)


def _copy(parameter: nn.Parameter) -> nn.Parameter:
    copy = nn.Parameter(parameter.detach().to(torch.bfloat16, copy=True), requires_grad=parameter.requires_grad)
    if parameter.requires_grad:
        copy.register_post_accumulate_grad_hook(_adding_to(parameter))
    return copy


def _adding_to(parameter: nn.Parameter) -> Callable[[torch.Tensor], None]:
    """Return a hook that moves the gradient of a copy to its parameter."""

    def add(copy: torch.Tensor) -> None:
        gradient, copy.grad = copy.grad, None
        assert gradient is not None
        if parameter.grad is None:
            parameter.grad = gradient.float()
        else:
            parameter.grad += gradient

    return add
