"""Devices cuda:0, cuda:1, ... on the host's memory for a torch without CUDA (see pretend.cpp).

`start` must come before torch is imported, so a test runs what needs the device in a process of its own.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


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


def printed_by(module: str, tmp_path_factory: pytest.TempPathFactory, config: pytest.Config) -> dict[str, Any]:
    """What a module prints last as JSON in a process of its own, given the library and a folder: torch must be imported after
    the device. Skips the test where there is no g++."""
    if shutil.which("g++") is None:
        pytest.skip("the pretended card is compiled by g++, which is not here")
    folder = tmp_path_factory.mktemp("card")
    cache = getattr(config, "cache", None)  # none where the plugin is switched off
    library = build(cache.mkdir("pretend") if cache else folder)
    command = [sys.executable, "-m", module, str(library), str(folder / "work")]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def start(library: Path, cards: int = 1) -> None:
    """Load the devices and import torch, whose CUDA functions then answer as on a machine with so many cards."""
    assert "torch" not in sys.modules
    os.environ["PRETEND_CARDS"] = str(cards)
    names = ("libtorch_global_deps.so", "libc10.so", "libtorch_cpu.so")
    for path in (*(torch_directory() / "lib" / name for name in names), library):
        ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
    import torch
    import torch.nn.attention.varlen

    cuda: Any = torch.cuda
    answers = {
        **dict.fromkeys(("_lazy_init", "synchronize", "set_device", "set_rng_state", "manual_seed", "manual_seed_all")),
        "is_available": True, "is_bf16_supported": True, "is_initialized": False, "is_current_stream_capturing": False,
        "device_count": cards, "current_device": 0, "get_device_capability": (9, 0), "mem_get_info": (80 << 30, 80 << 30),
        "max_memory_allocated": 0, "reset_peak_memory_stats": None, "get_device_name": "a pretended card",
    }  # fmt: skip
    for name, answer in answers.items():  # a function for each, for dynamo tells them by identity
        setattr(cuda, name, lambda *_, answer=answer, **__: answer)
    cuda.get_rng_state = lambda *_: torch.get_rng_state()
    torch.nn.attention.varlen.varlen_attn = varlen_attn  # type: ignore[assignment]
    from tests.helpers import card_graphs

    card_graphs.put_in()


def varlen_attn(query: Any, key: Any, value: Any, *args: Any, **options: Any) -> Any:
    """What torch's function computes, with the conditions of its kernel."""
    from tests.helpers import card_graphs

    return card_graphs.call(_varlen_attn, query, key, value, *args, **options)


def _varlen_attn(
    query: Any, key: Any, value: Any, cu_seq_q: Any, cu_seq_k: Any, max_q: int, max_k: int, *,
    window_size: tuple[int, int] = (-1, -1), enable_gqa: bool = False, seqused_k: Any = None, block_table: Any = None,
    num_splits: int | None = None,
) -> Any:  # fmt: skip
    import torch

    from tests.helpers.waits import unseen

    given = [x for x in (cu_seq_q, cu_seq_k, seqused_k, block_table) if x is not None]
    assert all(x.is_cuda for x in (query, key, value, *given))
    assert query.dtype in (torch.bfloat16, torch.float16), f"flash attention takes half precision, got {query.dtype}"
    assert query.dtype is key.dtype is value.dtype and query.shape[-1] % 8 == 0
    assert all(x.dtype is torch.int32 and x.stride(-1) == 1 for x in given)
    assert all(x.stride(-1) == 1 for x in (query, key, value))
    with unseen():
        if block_table is not None:
            assert key.shape[1] % 256 == 0 and num_splits == 1 and cu_seq_k is None
            return by_pages(query, key, value, cu_seq_q, seqused_k, block_table, (max_q, max_k))
        bounds = cu_seq_q.tolist()
        assert max(b - a for a, b in pairwise(bounds)) == max_q == max_k
        parts = []
        for first, last in pairwise(bounds):
            heads = (x[first:last].transpose(0, 1).unsqueeze(0) for x in (query, key, value))
            causal = window_size == (-1, 0)
            out = torch.nn.functional.scaled_dot_product_attention(*heads, is_causal=causal, enable_gqa=enable_gqa)
            parts.append(out.squeeze(0).transpose(0, 1))
        return torch.cat(parts)


def by_pages(query: Any, key: Any, value: Any, cu_seq_q: Any, used: Any, table: Any, longest: tuple[int, int]) -> Any:
    """Causal attention from the new tokens of each sequence to all of its tokens, which lie in the pages of its table."""
    import torch

    bounds, lens, rows = cu_seq_q.tolist(), used.tolist(), table.tolist()
    assert max(b - a for a, b in pairwise(bounds)) <= longest[0] and max(lens) <= longest[1]
    parts = []
    for (first, last), length, blocks in zip(pairwise(bounds), lens, rows, strict=True):
        kept = blocks[: -(-length // key.shape[1])]
        keys, values = (torch.cat([x[block] for block in kept])[:length] for x in (key, value))
        mask = torch.ones(last - first, length, dtype=torch.bool, device=query.device).tril(length - (last - first))
        heads = (x.transpose(0, 1).unsqueeze(0) for x in (query[first:last], keys, values))
        out = torch.nn.functional.scaled_dot_product_attention(*heads, mask, enable_gqa=True)
        parts.append(out.squeeze(0).transpose(0, 1))
    return torch.cat(parts)
