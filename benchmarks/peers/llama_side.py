"""llama.cpp through the low-level functions of llama-cpp-python: batches decoded and sampled greedily in C."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import llama_cpp as c
import numpy as np
from llama_cpp import mtmd_cpp as mtmd

from benchmarks.peers.inputs import tiles, tokens
from benchmarks.peers.install import FILES

CONTEXT = 4096


@c.llama_log_callback
def silent(level: int, text: bytes, data: Any) -> None:
    """llama.cpp tells much."""


def opened(path: Path, threads: int, *, context: int, batch: int, sequences: int) -> tuple[Any, Any]:
    """A model and a context of so many tokens, silent."""
    c.llama_log_set(silent, ctypes.c_void_p(0))
    mtmd.mtmd_helper_log_set(silent, ctypes.c_void_p(0))
    model = c.llama_model_load_from_file(str(path).encode(), c.llama_model_default_params())
    params = c.llama_context_default_params()
    params.n_ctx, params.n_batch, params.n_seq_max, params.kv_unified = context, batch, sequences, True
    params.n_threads = params.n_threads_batch = threads
    return model, c.llama_init_from_model(model, params)


def decode(context: Any, rows: list[tuple[int, int, int, bool]]) -> None:
    """One call for (token, position, sequence, wanted) rows."""
    batch = c.llama_batch_init(len(rows), 0, 1)
    batch.n_tokens = len(rows)
    for i, (token, position, sequence, wanted) in enumerate(rows):
        batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, position, 1, wanted
        batch.seq_id[i][0] = sequence
    if c.llama_decode(context, batch):
        raise RuntimeError("llama_decode failed")
    c.llama_batch_free(batch)


@dataclass
class Side:
    width: str
    threads: int = 2

    def __post_init__(self) -> None:
        path = FILES / f"gguf-{self.width}" / "model.gguf"
        self.model, self.context = opened(path, self.threads, context=CONTEXT, batch=CONTEXT, sequences=8)
        self.sampler = c.llama_sampler_init_greedy()
        self.memory = c.llama_get_memory(self.context)

    def read(self, batch: int, number: int) -> None:
        c.llama_memory_clear(self.memory, True)
        for sequence in range(batch):
            ids = tokens(sequence, number).tolist()
            decode(self.context, [(token, i, sequence, i == number - 1) for i, token in enumerate(ids)])

    def prefill(self, number: int) -> Callable[[], float]:
        def run() -> float:
            started = time.perf_counter()
            self.read(1, number)
            c.llama_sampler_sample(self.sampler, self.context, -1)
            return time.perf_counter() - started

        return run

    def decode(self, batch: int, context: int, steps: int) -> Callable[[], float]:
        def run() -> float:
            self.read(batch, context)
            ids = [1] * batch
            started = time.perf_counter()
            for step in range(steps):
                decode(self.context, [(token, context + step, sequence, True) for sequence, token in enumerate(ids)])
                ids = [c.llama_sampler_sample(self.sampler, self.context, i) for i in range(batch)]
            return time.perf_counter() - started

        return run

    def vision(self, count: int) -> Callable[[], float]:
        params = mtmd.mtmd_context_params_default()
        params.use_gpu, params.n_threads, params.print_timings = False, self.threads, False
        projector = str(FILES / "gguf-bf16" / "mmproj.gguf").encode()
        context = mtmd.mtmd_init_from_file(projector, self.model, params)
        if context is None:
            raise RuntimeError("llama.cpp could not open mmproj.gguf")
        marks = mtmd.mtmd_default_marker() * count
        text = mtmd.mtmd_input_text(marks, len(marks), False, True)
        pixels = [np.ascontiguousarray(tile) for tile in tiles(count)]
        kind = ctypes.c_uint8 * pixels[0].size
        bitmaps = [mtmd.mtmd_bitmap_init(448, 448, kind.from_buffer(tile)) for tile in pixels]
        chunks = mtmd.mtmd_input_chunks_init()
        if mtmd.mtmd_tokenize(context, chunks, ctypes.byref(text), (mtmd.mtmd_bitmap_p_ctypes * count)(*bitmaps), count):
            raise RuntimeError("llama.cpp could not take the tiles")
        parts = [mtmd.mtmd_input_chunks_get(chunks, i) for i in range(mtmd.mtmd_input_chunks_size(chunks))]
        images = [part for part in parts if mtmd.mtmd_input_chunk_get_type(part) == mtmd.MTMD_INPUT_CHUNK_TYPE_IMAGE]
        encoded = sum(mtmd.mtmd_input_chunk_get_n_tokens(part) for part in images)
        if encoded != 256 * count:
            raise RuntimeError(f"llama.cpp makes {encoded} vision tokens of {count} tiles, expected {256 * count}")

        def run() -> float:
            started = time.perf_counter()
            for image in images:
                if mtmd.mtmd_encode_chunk(context, image):
                    raise RuntimeError("llama.cpp could not encode a tile")
            return time.perf_counter() - started

        return run
