"""Counts the times that the host waits for a card: what it does then would stop a real one from being kept busy."""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

PACKAGE = str(Path(__file__).parent.parent.parent / "ivl") + "/"
READS = ("_local_scalar_dense", "nonzero", "masked_select", "bincount", "equal", "_unique2", "unique_dim")
"""Operators whose result or its size the host must know."""
INDEXING = ("index", "index_put", "index_put_", "_index_put_impl_")

_unseen = 0


@contextmanager
def unseen() -> Iterator[None]:
    """Count nothing."""
    global _unseen
    _unseen += 1
    try:
        yield
    finally:
        _unseen -= 1


class Waits(TorchDispatchMode):
    """Counts, within a `with`, by kind and place in ivl."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def note(self, kind: str) -> None:
        if _unseen:
            return
        frames = [frame for frame in traceback.extract_stack() if frame.filename.startswith(PACKAGE)]
        place = f"{frames[-1].filename.removeprefix(PACKAGE)}:{frames[-1].lineno}" if frames else "torch"
        self.found[f"{kind} at {place}"] += 1

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if any(map(on_card, tree_leaves((args, out)))) and (kind := wait_of(func, args, kwargs or {}, out)):
            self.note(kind)
        return out

    # These make or read tensors behind the back of a dispatch mode.
    def __enter__(self) -> Self:
        self.plain = torch.tensor, torch.Tensor.new_tensor, torch.Tensor.tolist
        tensor, new_tensor, tolist = self.plain

        def counted(function: Callable[..., torch.Tensor]) -> Any:
            def make(*args: Any, **kwargs: Any) -> torch.Tensor:
                out = function(*args, **kwargs)
                if out.is_cuda:
                    self.note("a tensor made on the card of numbers")
                return out

            return make

        def read(values: torch.Tensor) -> Any:
            if values.is_cuda:
                self.note("tolist")
            with unseen():
                return tolist(values)

        torch.tensor, torch.Tensor.new_tensor, torch.Tensor.tolist = counted(tensor), counted(new_tensor), read  # type: ignore
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        torch.tensor, torch.Tensor.new_tensor, torch.Tensor.tolist = self.plain  # type: ignore
        super().__exit__(*error)


class Moves(TorchDispatchMode):
    """Counts copies from one card to another within a `with`, as [from, to, shape]."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[list[Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        to, source = args[:2] if func._schema.name == "aten::copy_" else (out, args[0] if args else None)
        if on_card(to) and on_card(source) and to.device != source.device:
            self.found.append([str(source.device), str(to.device), list(to.shape)])
        return out


def on_card(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_cuda


def wait_of(func: Any, args: tuple, kwargs: dict[str, Any], out: Any) -> str | None:
    """How a call with a tensor on the card makes the host wait; None if it does not."""
    name = func._schema.name.split("::")[1]
    if name in READS:
        return name
    if name == "repeat_interleave" and func._overloadname == "Tensor" and kwargs.get("output_size") is None:
        return name
    if name in INDEXING:
        indices = [x for x in args[1] if isinstance(x, torch.Tensor)]
        if any(x.dtype in (torch.bool, torch.uint8) for x in indices):
            return f"{name} by a mask"
        return None if all(map(on_card, indices)) else f"{name} by indices on the host"
    if name in ("_to_copy", "copy_", "to"):  # in inference mode `to` is seen itself
        to, source = args[:2] if name == "copy_" else (out, args[0])
        given = dict(zip((argument.name for argument in func._schema.arguments), args, strict=False)) | kwargs
        asynchronous = given.get("non_blocking")
        if on_card(source) and not on_card(to):
            return "copy to the host"
        if on_card(to) and not on_card(source) and not (asynchronous and source.is_pinned()):
            return "copy to the card of memory that is not pinned"
    return None
