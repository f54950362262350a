"""The ranks of a run, the mesh that they form, and their sums. A single process is a World of size 1 and takes the same path.

    rank = (replica * shards + shard) * tensor + tensor rank

Tensor ranks are neighbors, for they speak in every layer. They share one model and take the same packs; all others are data
ranks, each with packs of its own. Tested on CPU processes over gloo; GPUs and nccl take the same calls but have not run.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.distributed_c10d import Store

from ivl.errors import InputError

WorldItem = TypeVar("WorldItem")

GRACE = 10.0
"""Seconds that ranks give one another to tell that they are alive, when a message did not come."""
BUCKET = 2**25
"""Gradient elements summed over ranks in one message."""


class RankFailedError(InputError):
    """Another rank has stopped; the message is its reason."""


class RankLostError(RankFailedError):
    """Another rank has ended or does not answer, so that the ranks can do nothing together any more."""


def is_of_group(error: BaseException) -> bool:
    """Whether an error came from the process group: another rank has ended, or does not answer."""
    # gloo raises plain RuntimeErrors.
    return isinstance(error, RuntimeError) and (isinstance(error, dist.DistError) or "gloo" in str(error))


@dataclass(frozen=True)
class ParameterCut:
    """How tensor ranks share one parameter: each has an equal piece of every part, one after another along `dim`."""

    dim: int
    parts: tuple[int, ...]
    """Lengths of the parts in the whole parameter, such as the rows of query, key and value."""

    def share(self, whole: torch.Tensor, rank: int, count: int) -> torch.Tensor:
        """Return the share of a tensor rank. Rows that the last ranks lack are zero; columns divide."""
        pieces: list[torch.Tensor] = []
        for part in whole.split(self.parts, self.dim):
            size = -(-part.shape[self.dim] // count)
            piece = part.split(size, self.dim)[rank]
            lacking = size - piece.shape[self.dim]
            pieces += [piece, piece.new_zeros(lacking, *piece.shape[1:])] if lacking else [piece]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, self.dim)

    def join(self, shares: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return the whole parameter from the shares of all tensor ranks."""
        lengths = [-(-length // len(shares)) for length in self.parts]
        pieces = zip(*(share.split(lengths, self.dim) for share in shares), strict=True)
        parts = [torch.cat(part, self.dim).narrow(self.dim, 0, length) for part, length in zip(pieces, self.parts, strict=True)]
        return parts[0] if len(parts) == 1 else torch.cat(parts, self.dim)


@dataclass(frozen=True)
class ModelCuts:
    """How tensor ranks share a model. Each has every parameter that is not named here, and computes its whole gradient."""

    cuts: Mapping[str, ParameterCut] = field(default_factory=dict[str, ParameterCut])
    partial: frozenset[str] = frozenset()
    """Parameters that every rank has and uses for a part of the work: their gradients must be summed over tensor ranks."""
    rank: int = 0
    count: int = 1

    def share(self, name: str, whole: torch.Tensor) -> torch.Tensor:
        """Return this rank's share of a whole parameter, or of a tensor of its shape."""
        return self.cuts[name].share(whole, self.rank, self.count) if name in self.cuts else whole

    def shape(self, name: str, whole: Sequence[int]) -> torch.Size:
        """Return the shape of this rank's share."""
        return self.share(name, torch.empty(whole, device="meta")).shape


NO_CUTS = ModelCuts()


def cuts_of(model: nn.Module) -> ModelCuts:
    """Return how tensor ranks share the model, as `ivl.parallel.tensor` has noted it there."""
    return getattr(model, "tensor_cuts", NO_CUTS)


@dataclass(frozen=True)
class World:
    """The ranks of a run; this process is `rank`."""

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    owns_group: bool = False
    """Whether start_world of ivl.parallel made the process group, so that stop_world ends it."""
    store: Store | None = None
    """What all ranks can write to and read without waiting for one another."""
    replicate: int = 1
    """Copies of a sharded model (HSDP)."""
    tensor: int = 1
    """Tensor ranks that share one model."""
    mesh: DeviceMesh | None = None
    """The dimensions (replicate, shard, tensor) of `arranged`; None where all ranks are shards of one model or replicas."""

    def arranged(self, *, replicate: int = 1, tensor: int = 1) -> World:
        """Return the same ranks as a mesh; all of them call this together.

        Raises:
            InputError: if they are too few, or cannot be divided so.
        """
        if replicate == tensor == 1:
            return self
        if self.size % (replicate * tensor):
            wanted = f"tensor_parallel {tensor}" + (f" in {replicate} replicas" if replicate > 1 else "")
            raise InputError(
                f"{wanted} needs a multiple of {replicate * tensor} processes, there are {self.size}: start them by torchrun "
                f"--nproc-per-node {replicate * tensor}"
            )
        shape, names = (replicate, self.size // (replicate * tensor), tensor), ("replicate", "shard", "tensor")
        mesh = init_device_mesh(self.device.type, shape, mesh_dim_names=names)
        return replace(self, replicate=replicate, tensor=tensor, mesh=mesh)

    def shard_mesh(self) -> DeviceMesh:
        """Return the ranks that FSDP2 spreads one model over: a line, or with replicas (replicate, shard)."""
        if self.mesh is None:
            return init_device_mesh(self.device.type, (self.size,))
        return self.mesh["replicate", "shard"] if self.replicate > 1 else self.mesh["shard"]

    def group(self, name: str) -> ProcessGroup | None:
        """Return the ranks that differ from this one in one dimension of the mesh; None is all ranks."""
        return self.mesh.get_group(name) if self.mesh is not None else None

    @property
    def tensor_rank(self) -> int:
        """Number of this rank among those that share its model."""
        return self.rank % self.tensor

    @property
    def data_rank(self) -> int:
        """Number of this rank's model: ranks of the same number take the same packs."""
        return self.rank // self.tensor

    @property
    def data_size(self) -> int:
        """How many models share out the packs."""
        return self.size // self.tensor

    @property
    def is_main(self) -> bool:
        """Whether this rank writes files and prints."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait until every rank is here; raises as all_reduce does."""
        self.gather({})

    def all_reduce(self, values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Sum named float64 vectors over data ranks; a rank may lack names that others have.

        Raises:
            RankFailedError: if another rank has called fail.
        """
        if self.size == 1:
            return values
        total: dict[str, torch.Tensor] = {}
        for rank, part in enumerate(self.gather({name: value.tolist() for name, value in values.items()})):
            for name, numbers in part.items():
                value = torch.tensor(numbers, dtype=torch.float64)
                if rank % self.tensor:  # the first of the tensor ranks has the same figures; a name may be this one's alone
                    value = torch.zeros_like(value)
                total[name] = total[name] + value if name in total else value
        return total

    def fail(self, reason: str) -> None:
        """Make the next barrier or all_reduce of the other ranks raise, instead of waiting for a rank that has stopped."""
        with suppress(RankFailedError):
            self.gather(reason)

    def from_first(self, function: Callable[[], WorldItem]) -> WorldItem:
        """Call a function on the first rank; returns its result (no string, see gather), or raises its InputError, on all."""
        if not self.is_main:
            return self.gather(None)[0]
        try:
            result = function()
        except InputError as error:
            self.fail(str(error))
            raise
        self.gather(result)
        return result

    def gather(self, value: Any) -> list[Any]:
        """Return the values of all ranks. A string is a reason to stop."""
        if self.size == 1:
            return [value]
        gathered: list[Any] = [None] * self.size
        try:
            dist.all_gather_object(gathered, value)
        except RuntimeError as error:  # of the process group, which knows no names
            raise self.lost(error) from None
        if reasons := [part for part in gathered if isinstance(part, str)]:
            raise RankFailedError(reasons[0])
        return gathered

    def lost(self, error: Exception) -> RankLostError:
        """Return an error of the process group with the names of the ranks that do not meet it, too, within GRACE seconds."""
        silent: list[str] = []
        with suppress(RuntimeError):  # the store has ended with the rank that held it
            if self.store is not None:
                self.store.set_timeout(timedelta(seconds=GRACE))
                if not self.store.check([own := f"error of {self.rank}"]):  # else the others have had the time
                    self.store.set(own, "")
                    time.sleep(GRACE)
                ranks = [rank for rank in range(self.size) if not self.store.check([f"error of {rank}"])]
                silent = [f"rank {rank} on {self.store.get(f'host of {rank}').decode()}" for rank in ranks]
        names = ", ".join(silent) or "another rank of the run"
        return RankLostError(f"{names} ended, or stopped responding ({error})")

    def all_reduce_gradients(self, parameters: Mapping[str, nn.Parameter], cuts: ModelCuts = NO_CUTS) -> None:
        """Sum gradients over ranks, in place.

        A parameter without a gradient gets a zero one on every rank, so that an update does not depend on how the packs were
        split.
        """
        whole: list[torch.Tensor] = []
        partial: list[torch.Tensor] = []
        for name, parameter in parameters.items():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            gradient = parameter.grad
            if hasattr(parameter, "full_tensor"):
                gradient.mul_(self.data_size)  # FSDP2's backward pass leaves the mean over ranks
                gradient = gradient.to_local()  # type: ignore[operator]
            elif self.data_size > 1:
                whole.append(gradient)
            if name in cuts.partial:
                partial.append(gradient)
        _all_reduce(whole, self.group("shard"))  # without FSDP2 there are no replicas
        _all_reduce(partial, self.group("tensor"))

    def whole(self, tensor: torch.Tensor, cut: ParameterCut | None = None) -> torch.Tensor:
        """Gather a whole tensor from all ranks that share it, on each of them; they call this together."""
        tensor = full_tensor(tensor)
        if cut is None:
            return tensor
        shares = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for _ in range(self.tensor)]
        dist.all_gather(shares, tensor.contiguous(), group=self.group("tensor"))
        return cut.join(shares)

    def gradient_norm(self, parameters: Mapping[str, nn.Parameter], cuts: ModelCuts) -> torch.Tensor:
        """Return the norm of the whole gradients. What every tensor rank has counts once."""
        shared, own = ([p.grad for name, p in parameters.items() if p.grad is not None and (name in cuts.cuts) == cut]
                       for cut in (False, True))  # fmt: skip
        norm = full_tensor(nn.utils.get_total_norm(shared))
        if not own:
            return norm
        square = full_tensor(nn.utils.get_total_norm(own)).square()
        dist.all_reduce(square, group=self.group("tensor"))
        return (square + norm.to(square.device).square()).sqrt()


def _all_reduce(gradients: Sequence[torch.Tensor], group: ProcessGroup | None) -> None:
    bucket: list[torch.Tensor] = []
    size = 0
    for number, gradient in enumerate(gradients, 1):
        bucket.append(gradient)
        size += gradient.numel()
        if size < BUCKET and number < len(gradients):
            continue
        flat = torch.cat([g.flatten() for g in bucket])
        dist.all_reduce(flat, group=group)
        for one, summed in zip(bucket, flat.split([g.numel() for g in bucket]), strict=True):
            one.copy_(summed.view_as(one))
        bucket, size = [], 0


def is_sharded(model: nn.Module) -> bool:
    """Whether ivl.parallel has sharded the model."""
    return hasattr(model, "set_requires_gradient_sync")  # a method that FSDP2 adds


def reshard(model: nn.Module) -> None:
    """Give up the parameters that a forward pass without a backward pass leaves gathered, rounded to what it computes in."""
    for module in model.modules():
        if is_sharded(module):
            module.reshard()  # type: ignore[operator]


def full_tensor(tensor: Any) -> torch.Tensor:
    """Gather the whole tensor of a shard on every rank; all ranks call this together. A plain tensor passes through."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def in_step(items: Iterable[WorldItem], world: World) -> Iterator[tuple[WorldItem, bool]]:
    """Yield items, and that they count, until they end on all ranks, as those that share shards must run the model together.

    A rank whose items have ended before gets one of another rank, which does not count.
    """
    own = iter(items)
    while any(ranks := world.gather((item := next(own, None)) is not None)):
        lent = [item]
        if not all(ranks):
            dist.broadcast_object_list(lent, src=ranks.index(True))
        given = lent[0] if item is None else item
        assert given is not None
        yield given, item is not None
