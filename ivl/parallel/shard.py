"""FSDP2 applied to a plain model."""

from __future__ import annotations

import torch

from ivl.model.vlm import VLM
from ivl.train.world import World


def shard(model: VLM, world: World, dtype: torch.dtype | None = None) -> None:
    """Spread parameters, gradients and the optimizer's state over ranks, in place.

    Each layer, the embeddings, and the last norm with the head are gathered by themselves; the rest of the ViT and the
    projector are gathered with the whole model.

    Args:
        model: the model.
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
