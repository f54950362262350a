"""The kernels as functions of tensors.

Functions whose tensors are bfloat16 expect what `takes` allows and weights that `fits` allows. Those of a decoding step
have an argument `launch`, which starts the kernel or records it.
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import NamedTuple

import torch

from ivl.cpu.kernels import features
from ivl.cpu.kernels.launch import NOW, Launch

MAX_ROWS = 16
"""Up to here a product is bound by reading its weight; beyond, torch's matrix products are faster."""
MIN_OUT = 32
"""Fewest output features of a linear kernel."""
MIN_QUERIES, MAX_KEYS = 64, 16384
"""Where the attention kernel pays: fewer queries read keys more than they compute, more keys outgrow the caches."""
PANEL_BYTES = 3 << 19
"""Bytes of 8-bit inputs that stay in the second-level cache while all of a weight passes."""
MAX_GROUP = 16
"""Query heads of one key head that the decoding kernel is unrolled for."""
NormArgs = tuple[torch.Tensor, float]
"""An RMS norm: weight, eps."""


def takes(x: torch.Tensor) -> bool:
    """Whether kernels take these inputs: bfloat16 on a CPU, no gradient wanted, rows in one piece."""
    in_order = x.is_cpu and x.stride(-1) == 1 and not torch.is_grad_enabled()
    return in_order and x.dtype is torch.bfloat16 and features.at_least("avx2")


def fits(weight: torch.Tensor) -> bool:
    """Whether kernels take this weight: bfloat16 on a CPU, in one piece, with rows of whole vectors of 32."""
    in_order = weight.is_cpu and weight.is_contiguous() and weight.shape[-1] % 32 == 0
    return in_order and weight.dtype is torch.bfloat16 and features.at_least("avx2")


class Fusion(NamedTuple):
    """What is computed around a product of few rows: an RMS norm or a SwiGLU gate before it, a residual added after it."""

    norm: NormArgs | None = None
    gated: bool = False
    residual: torch.Tensor | None = None

    @property
    def before(self) -> str:
        return "norm" if self.norm is not None else "gate" if self.gated else ""

    def arguments(self) -> tuple[int, int, int]:
        """Return the kernel's arguments: norm weight, bits of eps, residual."""
        norm, eps = (0, 0) if self.norm is None else (self.norm[0].data_ptr(), _bits(self.norm[1]))
        return norm, eps, _pointer(self.residual)


ALONE = Fusion()


def linear(
    x: torch.Tensor, weight_OI: torch.Tensor, bias_O: torch.Tensor | None, fusion: Fusion = ALONE, launch: Launch = NOW
) -> torch.Tensor:
    """Return x @ weight^T + bias for at most MAX_ROWS rows.

    One row goes through vectors, which keep up with the memory better, and costs nothing more with norm, gate and residual.
    More rows go through AMX if there is AMX; without it they must come alone. The result of a row does not depend on the
    number of rows.
    """
    x_TI = x.reshape(-1, x.shape[-1])
    rows, (out, width) = len(x_TI), weight_OI.shape
    if rows > 1 and fusion.gated:
        x_TI, fusion = swiglu(x_TI, launch), fusion._replace(gated=False)
    y_TO = launch.empty(rows, out)
    pointers = (x_TI.data_ptr(), weight_OI.data_ptr(), _pointer(bias_O), y_TO.data_ptr(), width, out, x_TI.stride(0))
    shape = (fusion.before, fusion.residual is not None)
    if rows > 1 and features.at_least("amx"):
        columns = 8 if rows <= 8 else MAX_ROWS
        room = 2 * (2 * width * columns + 32)  # the rows in pairs, and normalized
        launch.run("linear_amx", (columns, *shape), out * width, *pointers, *fusion.arguments(), rows, scratch=room)
    else:
        launch.run("linear", (rows, *shape), out * width, *pointers, *fusion.arguments())
    return y_TO.view(*x.shape[:-1], out)


def _pointer(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


@cache
def _bits(number: float) -> int:
    """Return the bits of a float32."""
    return ctypes.c_int32.from_buffer(ctypes.c_float(number)).value


class QuantizedWeight(NamedTuple):
    """The tensors of a QuantLinear: uint8 weight [O, I * bits / 8], scales [O, groups], zero points, bias."""

    weight: torch.Tensor
    scale_OG: torch.Tensor
    zero_OG: torch.Tensor | None
    bias_O: torch.Tensor | None

    def kind(self, width: int) -> tuple[int, int, int, int]:
        """Return bits, groups, whether there are zero points, and width: what a kernel is specialized to."""
        return 8 * self.weight.shape[1] // width, self.scale_OG.shape[1], int(self.zero_OG is not None), width

    def pointers(self) -> tuple[int, int, int]:
        return self.weight.data_ptr(), self.scale_OG.data_ptr(), _pointer(self.zero_OG)

    def float_bias(self) -> torch.Tensor:
        return torch.zeros(len(self.scale_OG)) if self.bias_O is None else self.bias_O.float()


def quant_fits(scale_OG: torch.Tensor, width: int, group: int) -> bool:
    """Whether kernels take a quantized weight with these scales, each for a group of so many of a row's elements."""
    in_order = scale_OG.is_cpu and scale_OG.is_contiguous() and len(scale_OG) >= MIN_OUT and width % 32 == 0
    in_groups = scale_OG.shape[1] == 1 or (group in (32, 64, 128) and width % group == 0)
    return in_order and in_groups and scale_OG.dtype is torch.bfloat16 and features.at_least("avx2")


def quant_gemv(x_TI: torch.Tensor, q: QuantizedWeight, fusion: Fusion = ALONE, launch: Launch = NOW) -> torch.Tensor:
    """Return x @ weight^T + bias for up to MAX_ROWS rows, with VNNI; only a single row may be fused with more.

    The result of a row does not depend on the number of rows.
    """
    out = len(q.scale_OG)
    kind = q.kind(x_TI.shape[1] // 2 if fusion.gated else x_TI.shape[1])
    y_TO = launch.empty(len(x_TI), out)
    if len(x_TI) > 1:
        x_TI = quantize_inputs(x_TI, *kind[::2], launch=launch)
    launch.run(
        "quant_gemv", (*kind, len(y_TO), fusion.before, int(fusion.residual is not None)), out * kind[3], x_TI.data_ptr(),
        *q.pointers(), _pointer(q.bias_O), y_TO.data_ptr(), out, *fusion.arguments(),
    )  # fmt: skip
    return y_TO


def small_batch_fits(width: int, bits: int) -> bool:
    """Whether `quant_small_batch` takes rows of this width: whole steps of 64 bytes of weight."""
    return width % (512 // bits) == 0


def quant_small_batch(x_TI: torch.Tensor, q: QuantizedWeight, fusion: Fusion = ALONE, launch: Launch = NOW) -> torch.Tensor:
    """Return x @ weight^T + bias for 2 to MAX_ROWS rows, with AMX on integers."""
    if fusion.norm is not None:
        x_TI = rms_norm(x_TI, *fusion.norm, launch)
    elif fusion.gated:
        x_TI = swiglu(x_TI, launch)
    out, (bits, groups, zero, width) = len(q.scale_OG), q.kind(x_TI.shape[1])
    tokens = quantize_inputs(x_TI, bits, zero, launch=launch)
    y_TO = launch.empty(len(x_TI), out)
    name, shape = ("quant_small_batch8", (width,)) if bits == 8 else ("quant_small_batch4", (groups, zero, width))
    launch.run(
        name, (*shape, int(fusion.residual is not None)), out * width, tokens.data_ptr(), *q.pointers(), _pointer(q.bias_O),
        y_TO.data_ptr(), out, _pointer(fusion.residual), len(x_TI), scratch=16 * tokens.shape[1],
    )  # fmt: skip
    return y_TO


def quant_gemm(x_TI: torch.Tensor, q: QuantizedWeight) -> torch.Tensor:
    """Return x @ weight^T + bias for several rows, with AMX on bfloat16."""
    from ivl.cpu.kernels.quant_amx import scratch_bytes

    tokens, out, kind = len(x_TI), len(q.scale_OG), q.kind(x_TI.shape[1])
    y_TO, bias = x_TI.new_empty(tokens, out), q.float_bias()
    NOW.run(
        "quant_gemm", (*kind, min(tokens, 16), 2 if tokens >= 32 else 1), out * kind[3], x_TI.data_ptr(), *q.pointers(),
        bias.data_ptr(), y_TO.data_ptr(), out, tokens, x_TI.stride(0), scratch=scratch_bytes(kind[3]),
    )  # fmt: skip
    return y_TO


def w8a8_linear(
    x_TI: torch.Tensor, q: QuantizedWeight, *, gelu: bool = False, residual_TO: torch.Tensor | None = None,
    factor_O: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """Return x @ weight^T + bias for 8-bit weights and inputs rounded to 8 bits by row, with AMX on integers.

    Args:
        gelu: Apply GELU to the result.
        residual_TO: Return residual + factor * result.
    """
    from ivl.cpu.kernels.quant_amx import scratch_bytes

    (tokens, width), out = x_TI.shape, len(q.weight)
    rounded = torch.empty(tokens, width + 64, dtype=torch.uint8)
    NOW.run("w8a8_round", (width,), x_TI.numel(), x_TI.data_ptr(), rounded.data_ptr(), tokens, x_TI.stride(0))
    y_TO, bias = x_TI.new_empty(tokens, out), q.float_bias()
    after = "gelu" if gelu else "" if residual_TO is None else "add"
    residual = y_TO if residual_TO is None else residual_TO.contiguous()
    panels = -(-rounded.numel() // PANEL_BYTES)
    for part, y_part, plus in zip(*(t.tensor_split(panels) for t in (rounded, y_TO, residual)), strict=True):
        kind = (width, min(len(part), 16), 2 if len(part) >= 32 else 1, after)
        pointers = (part.data_ptr(), *q.pointers()[:2], bias.data_ptr(), y_part.data_ptr())
        sizes = (out, len(part), plus.data_ptr(), _pointer(factor_O))
        NOW.run("w8a8_gemm", kind, out * width, *pointers, *sizes, scratch=scratch_bytes(width + 32))
    return y_TO


def quantize_inputs(x_TI: torch.Tensor, bits: int, zero: int, *, launch: Launch = NOW) -> torch.Tensor:
    """Return rows in 16 bits, laid out for the products with weights of so many bits (see quant.py), uint8 [T, bytes]."""
    from ivl.cpu.kernels.quant import token_bytes

    rows, width = x_TI.shape
    tokens = launch.empty(rows, token_bytes(bits, width), dtype=torch.uint8)
    pointers = (x_TI.data_ptr(), tokens.data_ptr())
    launch.run("quantize_inputs", (bits, zero, width), x_TI.numel(), *pointers, rows, x_TI.stride(0))
    return tokens


def dequantize(weight: torch.Tensor, scale_OG: torch.Tensor, zero_OG: torch.Tensor | None, width: int) -> torch.Tensor:
    """Return the matrix that a quantized weight stands for, bfloat16 [O, I]."""
    q = QuantizedWeight(weight, scale_OG, zero_OG, None)
    matrix = scale_OG.new_empty(len(scale_OG), width)
    NOW.run("dequantize", q.kind(width), matrix.numel(), *q.pointers(), matrix.data_ptr(), len(scale_OG))
    return matrix


def rms_norm(x: torch.Tensor, weight_D: torch.Tensor, eps: float, launch: Launch = NOW) -> torch.Tensor:
    """Return x / sqrt(mean(x^2) + eps) * weight over the last dimension; rounded once, at the end."""
    x_TD = x.reshape(-1, x.shape[-1])
    y_TD = launch.empty(*x_TD.shape)
    pointers = (x_TD.data_ptr(), weight_D.data_ptr(), y_TD.data_ptr())
    launch.run("rms_norm", (), x.numel(), *pointers, len(x_TD), x.shape[-1], x_TD.stride(0), _bits(eps))
    return y_TD.view(x.shape)


def norm_heads_(
    qkv_TXH: torch.Tensor, q_norm: NormArgs, k_norm: NormArgs, num_heads: int, num_kv_heads: int, launch: Launch = NOW
) -> None:
    """Normalize each query head and each key head of [query | key | value] heads, in place."""
    (tokens, _, size), (q_weight_H, eps), (k_weight_H, _) = qkv_TXH.shape, q_norm, k_norm
    num_normed = num_heads + num_kv_heads
    pointers = (qkv_TXH.data_ptr(), q_weight_H.data_ptr(), k_weight_H.data_ptr())
    sizes = (tokens, num_heads, num_normed, size, qkv_TXH.stride(0))
    launch.run("norm_heads", (), tokens * num_normed * size, *pointers, *sizes, _bits(eps))


def swiglu(gate_up_TM: torch.Tensor, launch: Launch = NOW) -> torch.Tensor:
    """Return silu(gate) * up of [gate | up] rows, [T, 2 M] to [T, M], for M a multiple of 32."""
    rows, width = len(gate_up_TM), gate_up_TM.shape[-1] // 2
    y_TM = launch.empty(rows, width)
    launch.run("swiglu", (), y_TM.numel(), gate_up_TM.data_ptr(), y_TM.data_ptr(), rows, width, gate_up_TM.stride(0))
    return y_TM


def rotate_(x_TNH: torch.Tensor, cos_TH: torch.Tensor, sin_TH: torch.Tensor) -> torch.Tensor:
    """Rotate every head of x_TNH to its position, in place. cos and sin are float32; their halves are equal."""
    tokens, heads, size = x_TNH.shape
    pointers = (x_TNH.data_ptr(), cos_TH.data_ptr(), sin_TH.data_ptr())
    NOW.run("rotate", (), x_TNH.numel(), *pointers, tokens, heads, size, x_TNH.stride(0), x_TNH.stride(1))
    return x_TNH


def attention_takes(q_TNH: torch.Tensor, num_keys: int) -> bool:
    """Whether `attention` takes these queries: with AMX, heads of 64 or 128, and scores that fit into the caches."""
    pays = q_TNH.shape[0] >= MIN_QUERIES and num_keys <= MAX_KEYS and q_TNH.shape[-1] in (64, 128)
    return pays and takes(q_TNH) and features.at_least("amx")


def attention(q_TNH: torch.Tensor, k_LKH: torch.Tensor, v_LKH: torch.Tensor, *, causal: bool) -> torch.Tensor:
    """Attend within one sequence, with AMX. If causal, the T queries are the last of the L tokens. Returns out_TNH."""
    from ivl.cpu.kernels.attention_amx import scratch_bytes

    (num_queries, num_heads, size), num_keys = q_TNH.shape, len(k_LKH)
    out_TNH = q_TNH.new_empty(q_TNH.shape)
    tensors = (q_TNH, k_LKH, v_LKH, out_TNH)
    NOW.run(
        "attention", (size, int(causal)), out_TNH.numel() * num_keys, *(x.data_ptr() for x in tensors), num_queries, num_keys,
        num_heads, num_heads // k_LKH.shape[1], *(s for x in tensors for s in x.stride()[:2]),
        scratch=scratch_bytes(num_keys, size),
    )  # fmt: skip
    return out_TNH


def decode_attention_fits(head_size: int, num_heads: int, num_kv_heads: int) -> bool:
    """Whether `decode_attention` is made for such heads."""
    return head_size % 64 == 0 and num_heads // num_kv_heads <= MAX_GROUP


def decode_attention(
    qkv_SXH: torch.Tensor, factors: tuple[torch.Tensor, torch.Tensor], keys_LKH: torch.Tensor, values_LKH: torch.Tensor,
    table_SB: torch.Tensor, past_S: torch.Tensor, *, block_size: int, longest: int, launch: Launch = NOW,
) -> torch.Tensor:  # fmt: skip
    """Rotate one new token per sequence, write its keys and values to the paged cache, and attend to all of the sequence.

    Args:
        qkv_SXH: Query, key and value heads.
        factors: cos and sin, [S, 1, H] each, float32.
        keys_LKH: One layer's keys in the cache; values_LKH its values.
        table_SB: The cache blocks of every sequence.
        past_S: Cached tokens of every sequence.
        longest: A bound of the sequences' lengths.

    Returns:
        out_SNH.
    """
    from ivl.cpu.kernels.decode import scratch_bytes

    num_seqs, num_all, size = qkv_SXH.shape
    num_kv_heads = keys_LKH.shape[1]
    num_heads = num_all - 2 * num_kv_heads
    group = num_heads // num_kv_heads
    out_SNH = launch.empty(num_seqs, num_heads, size)
    tensors = (qkv_SXH, *factors, keys_LKH, values_LKH, out_SNH, table_SB, past_S)
    kind = (size, group, block_size, int(features.at_least("amx") and block_size % 16 == 0))
    launch.run(
        "decode_attention", kind, num_seqs * num_all * longest * size, *(x.data_ptr() for x in tensors), num_seqs,
        num_kv_heads, qkv_SXH.stride(0), table_SB.stride(0), scratch=scratch_bytes(group, size, longest),
    )  # fmt: skip
    return out_SNH
