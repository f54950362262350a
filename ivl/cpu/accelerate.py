"""accelerate(): speed for a CPU, put into a model after loading, or into a processor."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import nn

from ivl.cpu.jpeg import FastLoader
from ivl.cpu.kernels import features, ops
from ivl.cpu.layers import FastDecoder, FastDecoderLayer, FastVisionAttention, FastVisionEmbeddings, FastVisionLayer, FastVLM
from ivl.cpu.linear import (
    AmxQuantLinear,
    AmxW8A8Linear,
    FastLinear,
    FastLoraLinear,
    FastRMSNorm,
    Float32Linear,
    VectorQuantLinear,
    VnniW8A8Linear,
)  # fmt: skip
from ivl.cpu.resize import fast_resize
from ivl.lora.layers import LoraLinear
from ivl.model.decoder import Decoder, DecoderLayer
from ivl.model.linear import Linear
from ivl.model.vit import VisionAttention, VisionEmbeddings, VisionLayer
from ivl.model.vlm import VLM
from ivl.processing.processor import Processor
from ivl.quant.layers import QuantLinear
from ivl.utils.machine import keep_freed_memory

Target = TypeVar("Target")
FAST: dict[type[nn.Module], type[nn.Module]] = {
    VLM: FastVLM, VisionEmbeddings: FastVisionEmbeddings, VisionAttention: FastVisionAttention, VisionLayer: FastVisionLayer,
    DecoderLayer: FastDecoderLayer, Decoder: FastDecoder,
}  # fmt: skip
"""Classes that are replaced whatever the dtype."""
FAST_BF16: dict[type[nn.Module], type[nn.Module]] = {Linear: FastLinear, LoraLinear: FastLoraLinear, nn.RMSNorm: FastRMSNorm}
"""Classes that are replaced where kernels take the weight."""
QUANTIZED: dict[str, tuple[type[QuantLinear], type[QuantLinear]]] = {
    "any": (QuantLinear, QuantLinear),
    "avx2": (VectorQuantLinear, QuantLinear),
    "avx512": (VectorQuantLinear, VnniW8A8Linear),
    "amx": (AmxQuantLinear, AmxW8A8Linear),
}
"""Quantized layers by the processor's level: of weights alone, and of weights and activations."""


def accelerate(target: Target) -> Target:
    """Make a model on a CPU, a part of one, or a processor faster, in place, and return it.

    A processor gives the same results as before. It can still be pickled for worker processes.

    Modules of a model get fast subclasses of their classes. Their parameters stay the same objects under the same names, so
    the model can be trained, saved, copied, adapted and merged as before. Where gradients are wanted it computes as before,
    except that short attention is spelled out. Modules that are put in later are plain until accelerate is called again. The
    process keeps the memory that tensors free (`keep_freed_memory`).
    """
    if isinstance(target, nn.Module):
        keep_freed_memory()
        for module in target.modules():
            module.__class__ = fast_class(module)
    elif isinstance(target, Processor):
        target.load, target.resize = FastLoader(), fast_resize
    return target


def has_bfloat16(device: torch.device) -> bool:
    """Whether a device computes in bfloat16 itself; a CPU without it takes tens of times as long as in float32."""
    if device.type != "cpu":
        return device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)
    return features.multiplies_bfloat16()


def answers_in_bfloat16(device: torch.device) -> bool:
    """Whether an accelerated model in bfloat16 answers fast there. On a CPU kernels stand in for what torch lacks: a
    bfloat16 model then takes half the memory of a float32 one, and reads half as much for each token."""
    return has_bfloat16(device) or (device.type == "cpu" and features.at_least("avx2"))


def fast_class(module: nn.Module) -> type[nn.Module]:
    """Return the class that computes what the module computes, fastest on this processor."""
    kind = type(module)
    if isinstance(module, QuantLinear):
        return quantized_class(module)
    if isinstance(module, nn.Linear | nn.RMSNorm) and kind in FAST_BF16 and ops.fits(module.weight):
        return FAST_BF16[kind] if kind is nn.RMSNorm or len(module.weight) >= ops.MIN_OUT else kind
    if kind is Linear and module.weight.dtype is torch.float32:
        return Float32Linear
    return FAST.get(kind, kind)


def quantized_class(layer: QuantLinear) -> type[QuantLinear]:
    """Choose the product of a quantized layer by the processor, the configuration and the shape."""
    config = layer.config
    if not ops.quant_fits(layer.scale, layer.in_features, config.group or layer.in_features):
        return QuantLinear
    weights_alone, with_activations = QUANTIZED[features.level()]
    return with_activations if config.activations else weights_alone
