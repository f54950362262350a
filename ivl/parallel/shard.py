"""FSDP2 applied to a plain model. It is sharded before it has memory, so that a rank holds its share and one tensor at most."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch

from ivl.model.vit import VisionEmbeddings
from ivl.model.vlm import VLM
from ivl.train.shards import StoredTensors, fill, keep
from ivl.train.world import World, cuts_of, is_sharded

ReadWhole = Callable[[str], torch.Tensor]
"""Returns a whole parameter by its name."""


def is_shared(model: VLM) -> bool:
    """Whether ranks share the model, as shards or as tensor ranks: each holds a part of it."""
    return is_sharded(model) or bool(cuts_of(model).cuts)


def shard(model: VLM, world: World, dtype: torch.dtype | None = None) -> None:
    """Spread parameters, gradients and the optimizer's state over ranks, in place.

    Each layer, the embeddings, and the last norm with the head are gathered by themselves; the rest of the ViT and the
    projector are gathered with the whole model.

    Args:
        model: the model, on the meta device or with memory.
        world: the ranks.
        dtype: what parameters are gathered in, and the model computes in, where it is not their own type; gradients are
            summed in float32 then.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    mesh, decoder = world.shard_mesh(), model.decoder
    policy = MixedPrecisionPolicy(dtype, reduce_dtype=dtype and torch.float32)
    for module in (*model.vision.layers, *decoder.layers, decoder.embeddings):
        fully_shard(module, mesh=mesh, mp_policy=policy)
    # The loss multiplies by the head after the forward pass that gathered it.
    fully_shard([decoder.norm, decoder.head], mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    for method in ("encode_tiles", "head"):  # called from outside, as forward is
        register_fsdp_forward_method(model, method)
    model.compute_dtype = dtype


def load_shards(model: VLM, stored: StoredTensors) -> None:
    """Read what this rank holds of the parameters that are stored."""
    for name, parameter in model.named_parameters():
        if name in stored.shapes:
            fill(parameter, stored, name, cuts_of(model))


@torch.no_grad()
def draw_shards(model: VLM, seed: int, shapes: Mapping[str, torch.Size]) -> None:
    """Initialize randomly, with the values of a model that is not sharded: each rank draws all tensors, one at a time.

    Args:
        model: the shards.
        seed: of the run.
        shapes: of the whole parameters.
    """
    torch.manual_seed(seed)
    VisionEmbeddings(model.config.vision)  # a convolution draws when it is made, before init_weights does
    for name, parameter in model.named_parameters():
        if ".lora_" not in name:
            whole = torch.empty(shapes[name])
            model.init_weight(name, whole)
            keep(parameter, cuts_of(model).share(name, whole))


@contextmanager
def whole_parameters(model: VLM, world: World) -> Iterator[ReadWhole | None]:
    """Yield a function that returns whole parameters, on the first rank; None on the others. All ranks call this together.

    Of a model that ranks share the function gathers one parameter at a time. The other ranks take part until the first rank's
    block has ended, and theirs begins then.
    """
    parameters, cuts = dict(model.named_parameters()), cuts_of(model).cuts
    if not is_shared(model):
        yield (lambda name: parameters[name].detach()) if world.is_main else None
    elif not world.is_main:
        while wanted := world.from_first(list[str]):
            world.whole(parameters[wanted[0]].detach(), cuts.get(wanted[0]))
        yield None
    else:

        def get(name: str) -> torch.Tensor:
            world.from_first(lambda: [name])
            return world.whole(parameters[name].detach(), cuts.get(name)).cpu()

        try:
            yield get
        except Exception as error:
            world.fail(str(error) or type(error).__name__)
            raise
        world.from_first(list[str])
