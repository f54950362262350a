"""CPU kernels for bfloat16 inference, where torch's own fall behind the memory.

A product of few rows is bound by reading the weight; torch reads it at about half the speed of memory. RMSNorm, SwiGLU
and rotary positions are chains of passes in torch and one pass here. The kernels are written in LLVM's portable vector
instructions (see build.py), compiled by llvmlite in milliseconds at first use, and run on torch's own OpenMP threads.
Sums are float32. Whether a tensor qualifies is asked with `usable`; everything else stays with torch.
"""

from __future__ import annotations

import ctypes
from functools import cache

import torch

from ivl.cpu.kernels.calls import Calls, address_of, parallel, run

__all__ = ["Calls", "parallel"]

MAX_ROWS = 16
"""Up to here a product is bound by reading its weight; beyond, torch's matrix products are faster."""
MIN_OUT = 32
"""Fewest output features of a linear kernel."""
MIN_QUERIES, MAX_KEYS = 64, 16384
"""Where the attention kernel pays: fewer queries read keys more than they compute, more keys outgrow the caches."""
PANEL_BYTES = 3 << 19
"""Of inputs in 8 bits that stay in the second-level cache while all of a weight passes."""
MAX_GROUP = 16
"""Query heads of one key head that the decoding kernel is unrolled for."""


@cache
def has_tiles() -> bool:
    """Whether there are matrix tiles, and this process may use them."""
    from ivl.cpu.kernels import build

    return build.has_amx()


def usable(x: torch.Tensor, weight: torch.Tensor | None = None) -> bool:
    """Whether the kernels take these tensors: bfloat16 on a CPU, no gradient wanted, whole vectors of 32."""
    return (
        x.dtype is torch.bfloat16
        and x.is_cpu
        and not torch.is_grad_enabled()
        and (weight is None or (weight.dtype is torch.bfloat16 and weight.is_contiguous()))
        and x.shape[-1] % 32 == 0
        and x.stride(-1) == 1
        and address_of("rms_norm") is not None
    )


def linear(
    x: torch.Tensor,
    weight_OI: torch.Tensor,
    bias_O: torch.Tensor | None,
    *,
    norm: tuple[torch.Tensor, float] | None = None,
    gated: bool = False,
    plus: torch.Tensor | None = None,
) -> torch.Tensor:
    """x @ weight^T + bias for at most MAX_ROWS rows. One row goes through vectors, which keep up with the memory better;
    more go through matrix tiles where there are any, and a row's result does not depend on how many they are.

    Rows may pass an RMS norm (weight, eps) or a SwiGLU gate before, and have `plus` added after: a single one at no cost,
    more only where there are tiles.
    """
    x_TI = x.reshape(-1, x.shape[-1])
    rows, (out, width) = len(x_TI), weight_OI.shape
    if rows > 1 and gated:
        x_TI, gated = swiglu(x_TI), False
    y_TO = x.new_empty(rows, out)
    bias = 0 if bias_O is None else bias_O.data_ptr()
    norm_pointer, eps = (0, 0) if norm is None else (norm[0].data_ptr(), _bits(norm[1]))
    extra = (norm_pointer, eps, 0 if plus is None else plus.data_ptr())
    shape = (rows, "norm" if norm is not None else "gate" if gated else "", plus is not None)
    pointers = (x_TI.data_ptr(), weight_OI.data_ptr(), bias, y_TO.data_ptr(), width, out, x_TI.stride(0), *extra)
    if rows > 1 and has_tiles():
        columns = 8 if rows <= 8 else MAX_ROWS
        room = 2 * (2 * width * columns + 32)  # the rows in pairs, and normalised
        scratch = torch.empty(torch.get_num_threads() * room, dtype=torch.uint8)
        run("linear_amx", (columns, *shape[1:]), out * width, 0, scratch.data_ptr(), room, *pointers, rows)
    else:
        run("linear", shape, out * width, *pointers)
    return y_TO.view(*x.shape[:-1], out)


@cache
def _bits(number: float) -> int:
    """The bits of a float32."""
    return ctypes.c_int32.from_buffer(ctypes.c_float(number)).value


@cache
def _has_vnni() -> bool:
    from ivl.cpu.kernels import quant

    return quant.has_vnni()


def quant_usable(x: torch.Tensor, scale_OG: torch.Tensor, group: int) -> bool:
    """Whether the kernels take these inputs with weights whose scales are these, for groups of so many elements."""
    return (
        usable(x, scale_OG)
        and _has_vnni()
        and len(scale_OG) >= MIN_OUT
        and (scale_OG.shape[1] == 1 or (group in (32, 64, 128) and x.shape[-1] % group == 0))
    )


def quant_linear(
    x_TI: torch.Tensor,
    weight: torch.Tensor,
    scale_OG: torch.Tensor,
    zero_OG: torch.Tensor | None,
    bias_O: torch.Tensor | None,
    *,
    norm: tuple[torch.Tensor, float] | None = None,
    gated: bool = False,
    plus: torch.Tensor | None = None,
) -> torch.Tensor:
    """x @ weight^T + bias for a few rows and the quantised weight of a QuantLinear. `norm`, `gated` and `plus` as in
    `linear`, for a single row. A row's result does not depend on how many they are."""
    out, groups = scale_OG.shape
    width = x_TI.shape[1] // 2 if gated else x_TI.shape[1]
    bits = 8 * weight.shape[1] // width
    y_TO = x_TI.new_empty(len(x_TI), out)
    before = "norm" if norm is not None else "gate" if gated else ""
    norm_pointer, eps = (0, 0) if norm is None else (norm[0].data_ptr(), _bits(norm[1]))
    weights = (weight.data_ptr(), scale_OG.data_ptr(), *(0 if t is None else t.data_ptr() for t in (zero_OG, bias_O)))
    kind = (bits, groups, int(zero_OG is not None), width)
    if len(x_TI) > 1:
        x_TI = quant_prepare(x_TI, bits, zero_OG is not None)
    run(
        "quant_linear", (*kind, len(y_TO), before, int(plus is not None)), out * width, x_TI.data_ptr(), *weights,
        y_TO.data_ptr(), out, norm_pointer, eps, 0 if plus is None else plus.data_ptr(),
    )  # fmt: skip
    return y_TO


def quant_few(
    x_TI: torch.Tensor,
    weight: torch.Tensor,
    scale_OG: torch.Tensor,
    zero_OG: torch.Tensor | None,
    bias_O: torch.Tensor | None,
    *,
    plus: torch.Tensor | None = None,
) -> torch.Tensor:
    """x @ weight^T + bias + plus for 2 to 16 rows, on matrix tiles."""
    assert has_tiles()  # asks the system for permission, too
    width, (out, groups) = x_TI.shape[1], scale_OG.shape
    bits = 8 * weight.shape[1] // width
    tokens = quant_prepare(x_TI, bits, zero_OG is not None)
    y_TO = x_TI.new_empty(len(x_TI), out)
    room = 16 * tokens.shape[1]
    scratch = torch.empty(torch.get_num_threads() * room, dtype=torch.uint8)
    tensors = (zero_OG, bias_O)
    pointers = (weight.data_ptr(), scale_OG.data_ptr(), *(0 if t is None else t.data_ptr() for t in tensors), y_TO.data_ptr())
    run(
        "quant_few", (bits, groups, int(zero_OG is not None), width, int(plus is not None)), out * width,
        0, scratch.data_ptr(), room, tokens.data_ptr(), *pointers, out, 0 if plus is None else plus.data_ptr(), len(x_TI),
    )  # fmt: skip
    return y_TO


def takes_few(tokens: int, width: int, bits: int) -> bool:
    """Whether `quant_few` is for these."""
    return 1 < tokens <= MAX_ROWS and width % (512 // bits) == 0 and has_tiles()


def quant_matmul(
    x_TI: torch.Tensor,
    weight: torch.Tensor,
    scale_OG: torch.Tensor,
    zero_OG: torch.Tensor | None,
    bias_O: torch.Tensor | None,
) -> torch.Tensor:
    """x @ weight^T + bias for several rows, on matrix tiles."""
    from ivl.cpu.kernels.quant_amx import scratch_bytes

    assert has_tiles()  # asks the system for permission, too
    (tokens, width), (out, groups) = x_TI.shape, scale_OG.shape
    bits = 8 * weight.shape[1] // width
    y_TO = x_TI.new_empty(tokens, out)
    bias = torch.zeros(out) if bias_O is None else bias_O.float()
    room = scratch_bytes(width)
    scratch = torch.empty(torch.get_num_threads() * room + 64, dtype=torch.uint8)
    aligned = -(-scratch.data_ptr() // 64) * 64
    kind = (bits, groups, int(zero_OG is not None), width, min(tokens, 16), 2 if tokens >= 32 else 1)
    pointers = (x_TI.data_ptr(), weight.data_ptr(), scale_OG.data_ptr(), 0 if zero_OG is None else zero_OG.data_ptr())
    run(
        "quant_matmul", kind, out * width, 0, aligned, room, *pointers, bias.data_ptr(), y_TO.data_ptr(),
        out, tokens, x_TI.stride(0),
    )  # fmt: skip
    return y_TO


def quant_rounded(
    x_TI: torch.Tensor,
    weight: torch.Tensor,
    scale_O1: torch.Tensor,
    bias_O: torch.Tensor | None,
    *,
    gelu: bool = False,
    plus_TO: torch.Tensor | None = None,
    factor_O: torch.Tensor | None = None,
) -> torch.Tensor:
    """x @ weight^T + bias with x rounded to 8 bits by row, for weights of 8 bits, on matrix tiles; `gelu` of it, or
    plus + factor times it."""
    from ivl.cpu.kernels.quant_amx import scratch_bytes

    assert has_tiles()  # asks the system for permission, too
    (tokens, width), out = x_TI.shape, len(weight)
    rounded = torch.empty(tokens, width + 64, dtype=torch.uint8)
    run("quant_round", (width,), x_TI.numel(), x_TI.data_ptr(), rounded.data_ptr(), tokens, x_TI.stride(0))
    y_TO = x_TI.new_empty(tokens, out)
    bias = torch.zeros(out) if bias_O is None else bias_O.float()
    room = scratch_bytes(width + 32)
    scratch = torch.empty(torch.get_num_threads() * room + 64, dtype=torch.uint8)
    aligned = -(-scratch.data_ptr() // 64) * 64
    after = "gelu" if gelu else "" if plus_TO is None else "add"
    added = y_TO if plus_TO is None else plus_TO.contiguous()
    factor = 0 if factor_O is None else factor_O.data_ptr()
    panels = -(-rounded.numel() // PANEL_BYTES)
    for part, y_part, plus in zip(*(t.tensor_split(panels) for t in (rounded, y_TO, added)), strict=True):
        kind = (width, min(len(part), 16), 2 if len(part) >= 32 else 1, after)
        pointers = (part.data_ptr(), weight.data_ptr(), scale_O1.data_ptr(), bias.data_ptr(), y_part.data_ptr())
        run("quant_rounded", kind, out * width, 0, aligned, room, *pointers, out, len(part), plus.data_ptr(), factor)
    return y_TO


def quant_prepare(x_TI: torch.Tensor, bits: int, zero: bool) -> torch.Tensor:
    """Rows as the products with quantised weights take them, uint8 [T, bytes]."""
    from ivl.cpu.kernels.quant import token_bytes

    rows, width = x_TI.shape
    tokens = torch.empty(rows, token_bytes(bits, width), dtype=torch.uint8)
    pointers = (x_TI.data_ptr(), tokens.data_ptr())
    run("quant_prepare", (bits, int(zero), width), x_TI.numel(), *pointers, rows, x_TI.stride(0))
    return tokens


def quant_unpack(weight: torch.Tensor, scale_OG: torch.Tensor, zero_OG: torch.Tensor | None, width: int) -> torch.Tensor:
    """The matrix that a quantised weight stands for, bfloat16 [O, I]."""
    out, groups = scale_OG.shape
    matrix = scale_OG.new_empty(out, width)
    pointers = (weight.data_ptr(), scale_OG.data_ptr(), 0 if zero_OG is None else zero_OG.data_ptr(), matrix.data_ptr())
    kind = (8 * weight.shape[1] // width, groups, int(zero_OG is not None), width)
    run("quant_unpack", kind, matrix.numel(), *pointers, out)
    return matrix


def looked_up(tiles_GSSC: torch.Tensor, table_CV: torch.Tensor) -> torch.Tensor | None:
    """The entries of a table of 3 colours by 256 values, [G, 3, size, size] in its dtype; None where there is no kernel."""
    pixels, size = tiles_GSSC[0, :, :, 0].numel(), table_CV.element_size()
    if not (tiles_GSSC.is_cpu and tiles_GSSC.is_contiguous() and pixels % 16 == 0 and size in (2, 4)):
        return None
    if address_of("normalise", size) is None:
        return None
    out_GCYX = table_CV.new_empty(len(tiles_GSSC), 3, *tiles_GSSC.shape[1:3])
    bits_CV = table_CV.contiguous().view(torch.int32 if size == 4 else torch.int16).to(torch.int32)
    pointers = (tiles_GSSC.data_ptr(), out_GCYX.data_ptr(), bits_CV.data_ptr())
    run("normalise", (size,), out_GCYX.numel(), *pointers, len(tiles_GSSC) * pixels, pixels)
    return out_GCYX


def rms_norm(x: torch.Tensor, weight_D: torch.Tensor, eps: float) -> torch.Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension; rounded once, at the end."""
    x_TD = x.reshape(-1, x.shape[-1])
    y_TD = x.new_empty(x_TD.shape)
    pointers = (x_TD.data_ptr(), weight_D.data_ptr(), y_TD.data_ptr())
    run("rms_norm", (), x.numel(), *pointers, len(x_TD), x.shape[-1], x_TD.stride(0), _bits(eps))
    return y_TD.view(x.shape)


def swiglu(gate_up_TM: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up of [gate | up] rows, [T, 2 M] to [T, M]."""
    rows, width = len(gate_up_TM), gate_up_TM.shape[-1] // 2
    y_TM = gate_up_TM.new_empty(rows, width)
    run("swiglu", (), y_TM.numel(), gate_up_TM.data_ptr(), y_TM.data_ptr(), rows, width, gate_up_TM.stride(0))
    return y_TM


def rotate_(x_TNH: torch.Tensor, cos_TH: torch.Tensor, sin_TH: torch.Tensor) -> torch.Tensor:
    """Rotary positions applied in place to every head of x_TNH; cos and sin are float32, their halves equal."""
    tokens, heads, size = x_TNH.shape
    pointers = (x_TNH.data_ptr(), cos_TH.data_ptr(), sin_TH.data_ptr())
    run("rotate", (), x_TNH.numel(), *pointers, tokens, heads, size, x_TNH.stride(0), x_TNH.stride(1))
    return x_TNH


def attention_usable(q_TNH: torch.Tensor, num_keys: int) -> bool:
    """Whether `attention` takes these queries: matrix tiles, heads of 64 or 128, and scores that fit into the caches."""
    return (
        q_TNH.shape[0] >= MIN_QUERIES
        and num_keys <= MAX_KEYS
        and q_TNH.shape[-1] in (64, 128)
        and usable(q_TNH)
        and has_tiles()
    )


def attention(q_TNH: torch.Tensor, k_LKH: torch.Tensor, v_LKH: torch.Tensor, *, causal: bool) -> torch.Tensor:
    """Attention of one sequence, [T, N, H]; with causal, the T queries are the last of the L tokens."""
    from ivl.cpu.kernels.attention_amx import scratch_bytes

    assert has_tiles()  # asks the system for permission, too
    (num_queries, num_heads, size), num_keys = q_TNH.shape, len(k_LKH)
    out_TNH = q_TNH.new_empty(q_TNH.shape)
    room = scratch_bytes(num_keys, size)
    scratch = torch.empty(torch.get_num_threads() * room + 64, dtype=torch.uint8)
    aligned = -(-scratch.data_ptr() // 64) * 64
    tensors = (q_TNH, k_LKH, v_LKH, out_TNH)
    run(
        "attention", (size, int(causal)), out_TNH.numel() * num_keys, 0, *(x.data_ptr() for x in tensors), aligned, room,
        num_queries, num_keys, num_heads, num_heads // k_LKH.shape[1], *(s for x in tensors for s in x.stride()[:2]),
    )  # fmt: skip
    return out_TNH


def decode_attention_usable(head_size: int, num_heads: int, num_kv_heads: int) -> bool:
    return head_size % 64 == 0 and num_heads // num_kv_heads <= MAX_GROUP


def decode_attention(
    qkv_SXH: torch.Tensor,
    cos_S1H: torch.Tensor,
    sin_S1H: torch.Tensor,
    keys_LKH: torch.Tensor,
    values_LKH: torch.Tensor,
    table_SB: torch.Tensor,
    past_S: torch.Tensor,
    block_size: int,
    longest: int,
) -> torch.Tensor:
    """One new token per sequence: queries and keys are turned to their positions, keys and values written to the paged
    cache, and attention taken over all of it. Positions count up to `longest`. Returns out_SNH."""
    from ivl.cpu.kernels.decode import scratch_bytes

    num_seqs, num_all, size = qkv_SXH.shape
    num_kv_heads = keys_LKH.shape[1]
    num_heads = num_all - 2 * num_kv_heads
    group = num_heads // num_kv_heads
    out_SNH = qkv_SXH.new_empty(num_seqs, num_heads, size)
    room = scratch_bytes(group, size, longest)
    scratch = torch.empty(torch.get_num_threads() * room, dtype=torch.uint8)
    tensors = (qkv_SXH, cos_S1H, sin_S1H, keys_LKH, values_LKH, out_SNH, table_SB, past_S)
    kind = (size, group, block_size, int(has_tiles() and block_size % 16 == 0))
    run(
        "decode_attention", kind, num_seqs * num_all * longest * size, 0, scratch.data_ptr(), room,
        *(x.data_ptr() for x in tensors), num_seqs, num_kv_heads, qkv_SXH.stride(0), table_SB.stride(0),
    )  # fmt: skip
    return out_SNH
