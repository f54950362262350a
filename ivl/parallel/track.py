"""The memory of one rank and what it sends, from a training step on fake tensors over a fake process group.

The step is the run's own: the model, its stage and adapters, FSDP2, recomputation, the loss in chunks. Nothing is computed
and nothing is allocated, so the ranks may be as many as one likes. torch's trackers (torch.distributed._tools) follow every
storage that an operation makes.

A large model takes minutes. Memory at any moment of a step, and the collectives of the step, are linear in the number of
layers of either kind, so three tracks with two or three layers of a kind give them for any number.
"""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
from torch.distributed._tools.mem_tracker import MemTracker
from torch.utils._pytree import tree_leaves

from ivl.config import ModelConfig
from ivl.model.attention import Sdpa
from ivl.model.vlm import VLM
from ivl.parallel.shard import shard
from ivl.parallel.tensor import split
from ivl.train.config import Precision
from ivl.train.losses import chunk_rows, linear_cross_entropy, share_of
from ivl.train.objectives import encode_vision
from ivl.train.precision import computing
from ivl.train.stage import trainable
from ivl.train.world import World
from ivl.types import Batch, Layout

CPU = torch.device("cpu")
SMALLEST = 2
"""Layers of each kind in the smallest track: the first and the last one differ from those between them."""


@dataclass(frozen=True, kw_only=True)
class RankSetup:
    """What one rank holds, and what it does with a pack."""

    precision: Precision
    shards: int
    """Ranks that share parameters, gradients and moments; 1 keeps all on each rank."""
    replicas: int = 1
    """Copies of the model, sharded or whole, whose gradients are summed."""
    tensor_parallel: int = 1
    """Ranks that share the decoder of each model, and its tiles."""
    moments: Callable[[str, nn.Parameter], int]
    """Moments that the optimizer keeps of a parameter."""
    accumulates: bool
    """Whether gradients of earlier packs are there already."""
    tokens: int
    tiles: int
    sequences: int


@dataclass(frozen=True)
class Tracked:
    """Bytes of a rank at the fullest point of each moment of a step; of each collective of a pack the calls and bytes."""

    peaks: dict[str, float]
    collectives: dict[str, tuple[int, float]]

    @property
    def peak(self) -> float:
        """The most that a rank holds."""
        return max(self.peaks.values())

    @property
    def fullest(self) -> str:
        """When it holds that."""
        return max(self.peaks, key=self.peaks.__getitem__)


def track(build: Callable[[ModelConfig], VLM], architecture: ModelConfig, setup: RankSetup, *, whole: bool = False) -> Tracked:
    """Track one pack.

    Args:
        build: makes a model on the meta device, with what trains marked.
        architecture: of the whole model.
        setup: the rank.
        whole: track every layer instead of two or three of each kind.
    """
    depths = architecture.vision.num_layers, architecture.decoder.num_layers
    if whole or min(depths) <= SMALLEST:
        found = _track(build(architecture), setup)
    else:
        few = [(SMALLEST, SMALLEST), (SMALLEST + 1, SMALLEST), (SMALLEST, SMALLEST + 1)]
        base, *more = (_track(build(_with_layers(architecture, *layers)), setup) for layers in few)
        steps = [depth - SMALLEST for depth in depths]
        found = {
            key: value + sum(n * (other[key] - value) for n, other in zip(steps, more, strict=True))
            for key, value in base.items()
        }
    names = dict.fromkeys(name for kind, name in found if kind == "calls")
    return Tracked(
        {name: value for (kind, name), value in found.items() if kind == "peak"},
        {name: (round(found["calls", name]), found["bytes", name]) for name in names},
    )


def _with_layers(architecture: ModelConfig, vision: int, decoder: int) -> ModelConfig:
    """Return the architecture with fewer layers; all of its ViT runs."""
    parts = {
        "vision": replace(architecture.vision, num_layers=vision),
        "decoder": replace(architecture.decoder, num_layers=decoder),
    }
    return replace(architecture, select_layer=-1, **parts)


def _track(model: VLM, setup: RankSetup) -> dict[tuple[str, str], float]:
    """Return bytes by ("peak", moment), and calls and bytes by ("calls" or "bytes", collective)."""
    if setup.precision == "pure_bf16":
        model.to(torch.bfloat16)
    ranks, sharded = setup.shards * setup.replicas * setup.tensor_parallel, setup.shards > 1
    with _fake_ranks(ranks), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        world = World(0, ranks).arranged(replicate=setup.replicas, tensor=setup.tensor_parallel)
        if setup.tensor_parallel > 1:
            split(model, world)
        if sharded:
            shard(model, world, torch.bfloat16 if setup.precision == "bf16" else None)
        with FakeTensorMode(allow_non_fake_inputs=True):
            model.to_empty(device=CPU)
            held = [torch.empty_like(p) for name, p in trainable(model).items() for _ in range(setup.moments(name, p))]
            for parameter in trainable(model).values() if setup.accumulates else ():
                parameter.grad = torch.empty_like(parameter)
            tracker = _ShardTracker(model) if sharded else _WholeTracker()
            if isinstance(tracker, _ShardTracker):
                tracker.track_inputs(tuple(held))
            else:
                tracker.track_external(model, *held)
            _follow(model, tracker)
            with tracker:
                _run(model, setup, tracker)
    return dict(tracker.found)


def _run(model: VLM, setup: RankSetup, tracker: _Moments) -> None:
    """Run one pack forward and backward, every token behind the images trained."""
    tokens, num_vision = setup.tokens, setup.tiles * model.config.tokens_per_tile
    first, size = tokens // setup.sequences, model.config.vision.image_size
    layout = Layout.packed((*(first,) * (setup.sequences - 1), tokens - first * (setup.sequences - 1)))
    tokens_T, weights_T = torch.empty(tokens, dtype=torch.long), torch.empty(tokens)
    tiles_GSSC = torch.empty(setup.tiles, size, size, 3, dtype=torch.uint8)
    batch = Batch(tokens_T, tokens_T, weights_T, tiles_GSSC, torch.empty(setup.tiles, dtype=torch.long), layout)
    at_X = torch.empty(num_vision, dtype=torch.long)
    with computing(model, setup.precision):
        hidden_TD = model(tokens_T, layout, encode_vision(model, batch), at_X=at_X)
        tracker.moment = "loss"
        model.head(hidden_TD[:1])  # the tracker looks for the group of norm and head among the modules that were called
        head_VD, trained = model.decoder.head.matrix(), tokens - num_vision
        # Two chunks of the loss tell what all of them do; the others' hidden states and their gradients, which the backward
        # pass has twice, are held beside them.
        at_M = torch.empty(min(trained, 2 * chunk_rows(head_VD)), dtype=torch.long)
        others = [hidden_TD.new_empty(3, trained - len(at_M), hidden_TD.shape[1])]
        hidden_TD.register_hook(lambda _: others.clear())
        share = share_of(model.decoder.head)
        loss = linear_cross_entropy(hidden_TD[at_M], head_VD, tokens_T[at_M], weights_T[at_M], share=share)
        tracker.moment = "backward of the loss"
        loss.total.backward()


def _follow(model: VLM, tracker: _Moments) -> None:
    """Let the tracker know which layer runs, forward and backward."""
    for part in ("vision", "decoder"):
        layers = model.get_submodule(part).get_submodule("layers")
        for number, layer in enumerate(layers.children()):
            which = {0: "first ", len(list(layers.children())) - 1: "last "}.get(number, "")
            layer.register_forward_pre_hook(partial(_enter, tracker, f"forward of the {which}{part} layer"))
            layer.register_forward_hook(partial(_leave, tracker, f"backward of the {which}{part} layer"))
            place = layer if part == "decoder" else layer.get_submodule("attention")
            place.backend = _Flash()  # type: ignore[assignment]


def _enter(tracker: _Moments, moment: str, *_: Any) -> None:
    if not tracker.in_backward:
        tracker.moment = moment


def _leave(tracker: _Moments, moment: str, _layer: nn.Module, _inputs: Any, out: torch.Tensor) -> None:
    if not tracker.in_backward and out.requires_grad:
        out.register_hook(lambda _: setattr(tracker, "moment", moment))


@contextmanager
def _fake_ranks(size: int) -> Iterator[None]:
    """Be the first of so many ranks, whose collectives return at once."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=0, world_size=size, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


COLLECTIVES = {
    "_allgather_base_": ("all-gather", 0),
    "allgather_": ("all-gather of tensor ranks", 0),
    "_reduce_scatter_base_": ("reduce-scatter", 1),
    "allreduce_": ("all-reduce", 0),
}
"""Operations of torch.ops.c10d, and which argument is the whole message."""


class _Moments:
    """What both trackers of torch lack: peaks by moment, and the collectives."""

    _curr_mem_snap: dict[torch.device, dict[Any, int]]

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.moment = "start"
        self.found: defaultdict[tuple[str, str], float] = defaultdict(float)

    @property
    def in_backward(self) -> bool:
        """Whether autograd runs."""
        return torch._C._current_graph_task_id() != -1  # noqa: SLF001

    def _update_peak_stats(self, peak_state: Any) -> None:  # noqa: ARG002
        key, now = ("peak", self.moment), self._curr_mem_snap.get(CPU, {}).get("Total", 0)
        self.found[key] = max(self.found[key], now)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in ("prim", "profiler"):  # half of all operations; they make no tensor
            return func(*args, **(kwargs or {}))
        if func.namespace == "c10d" and (found := COLLECTIVES.get(func._schema.name.rpartition(":")[2])):  # noqa: SLF001
            name, at = found
            self.found["calls", name] += 1
            self.found["bytes", name] += sum(leaf.nbytes for leaf in tree_leaves(args[at]) if isinstance(leaf, torch.Tensor))
        return super().__torch_dispatch__(func, types, args, kwargs)  # type: ignore[misc]


class _ShardTracker(_Moments, FSDPMemTracker):
    """Of a model that FSDP2 shards."""


class _WholeTracker(_Moments, MemTracker):
    """Of a plain model. It looks at no module: that working weights take the places of parameters, torch does not expect."""

    def _ignore(self, *_: Any) -> None: ...

    _pre_fw_hook = _post_fw_hook = _pre_bw_hook = _post_bw_hook = _ignore  # pyright: ignore[reportAssignmentType]


class _Flash(Sdpa):
    """Attention that takes the memory of a flash-attention kernel, whatever the device."""

    def packed(self, q_TNH: torch.Tensor, k_TKH: torch.Tensor, v_TKH: torch.Tensor, layout: Layout) -> torch.Tensor:  # noqa: ARG002
        return _FlashMemory.apply(q_TNH, k_TKH, v_TKH)

    def tiles(self, q_GPNH: torch.Tensor, k_GPNH: torch.Tensor, v_GPNH: torch.Tensor) -> torch.Tensor:
        return _FlashMemory.apply(q_GPNH, k_GPNH, v_GPNH)


class _FlashMemory(torch.autograd.Function):
    """Allocates what FlashAttention-2 does: the sums' logarithms forward; backward float32 gradients of the queries, and those
    of keys and values by query heads where several share one."""

    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        out = q.new_empty(q.shape)
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:-1], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, _grad: torch.Tensor) -> tuple[torch.Tensor, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        q, k, v, _, _ = ctx.saved_tensors
        sums = q.new_empty(q.shape, dtype=torch.float32)
        by_head = [q.new_empty(q.shape) for _ in range(2)] if q.shape != k.shape else []
        out = tuple(x.new_empty(x.shape) for x in (q, k, v))
        del sums, by_head
        return out
