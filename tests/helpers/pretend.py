"""A device cuda:0 on the host's memory for a torch without CUDA (see pretend.cpp).

`start` must come before torch is imported, so a test runs what needs the device in a process of its own.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any


def torch_directory() -> Path:
    spec = importlib.util.find_spec("torch")
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent


def build(folder: Path) -> Path:
    """Compile pretend.cpp against the installed torch, unless the folder has the library already."""
    source, torch = Path(__file__).with_suffix(".cpp"), torch_directory()
    content = source.read_bytes() + (torch / "version.py").read_bytes()
    library = folder / f"pretend-{hashlib.sha256(content).hexdigest()[:16]}.so"
    if library.exists():
        return library
    includes = [f"-I{torch}/include", f"-I{torch}/include/torch/csrc/api/include"]
    links = [f"-L{torch}/lib", "-lc10", "-ltorch_cpu"]
    made = library.with_suffix(f".{os.getpid()}")
    subprocess.run(["g++", "-std=c++20", "-O0", "-shared", "-fPIC", source, "-o", made, *includes, *links], check=True)
    return made.rename(library)


def start(library: Path) -> None:
    """Load the device and import torch, whose CUDA functions then answer as on a machine with one card."""
    assert "torch" not in sys.modules
    names = ("libtorch_global_deps.so", "libc10.so", "libtorch_cpu.so")
    for path in (*(torch_directory() / "lib" / name for name in names), library):
        ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
    import torch
    import torch.nn.attention.varlen

    cuda: Any = torch.cuda
    cuda._lazy_init = cuda.synchronize = cuda.set_device = cuda.set_rng_state = lambda *_: None
    cuda.manual_seed = cuda.manual_seed_all = lambda *_: None
    cuda.is_available = cuda.is_bf16_supported = lambda *_, **__: True
    cuda.is_initialized = cuda.is_current_stream_capturing = lambda: False
    cuda.device_count, cuda.current_device = lambda: 1, lambda: 0
    cuda.get_device_capability, cuda.mem_get_info = lambda *_: (9, 0), lambda *_: (80 << 30, 80 << 30)
    cuda.max_memory_allocated = lambda *_: 0
    cuda.get_rng_state = lambda *_: torch.get_rng_state()
    torch.nn.attention.varlen.varlen_attn = varlen_attn  # type: ignore[assignment]


def varlen_attn(
    query: Any, key: Any, value: Any, cu_seq_q: Any, cu_seq_k: Any, max_q: int, max_k: int, *,
    window_size: tuple[int, int] = (-1, -1), enable_gqa: bool = False,
) -> Any:  # fmt: skip
    """What torch's function computes, with the conditions of its kernel."""
    import torch

    from tests.helpers.waits import unseen

    assert all(x.is_cuda for x in (query, key, value, cu_seq_q, cu_seq_k))
    assert query.dtype in (torch.bfloat16, torch.float16), f"flash attention takes half precision, got {query.dtype}"
    assert cu_seq_q.dtype is cu_seq_k.dtype is torch.int32 and query.shape[-1] % 8 == 0
    assert all(x.stride(-1) == 1 for x in (query, key, value))
    with unseen():
        bounds = cu_seq_q.tolist()
        assert max(b - a for a, b in pairwise(bounds)) == max_q == max_k
        parts = []
        for first, last in pairwise(bounds):
            heads = (x[first:last].transpose(0, 1).unsqueeze(0) for x in (query, key, value))
            causal = window_size == (-1, 0)
            out = torch.nn.functional.scaled_dot_product_attention(*heads, is_causal=causal, enable_gqa=enable_gqa)
            parts.append(out.squeeze(0).transpose(0, 1))
        return torch.cat(parts)
