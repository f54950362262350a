"""FSDP2 applied to a plain model."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from ivl.train.world import World


def shard(model: nn.Module, layers: Iterable[nn.Module], world: World, methods: tuple[str, ...] = ()) -> None:
    """Spread parameters, gradients and the optimizer's state over ranks, a layer at a time, in place.

    Args:
        model: the model; its parameters outside the layers are one more unit.
        layers: modules that are gathered one by one.
        world: the ranks.
        methods: names of the model's methods that are called from outside, as forward is, and use parameters.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    mesh = init_device_mesh(world.device.type, (world.size,))
    for layer in layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    for method in methods:
        register_fsdp_forward_method(model, method)
