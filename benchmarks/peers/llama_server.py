"""What llama.cpp's server does, over llama-cpp-python's low-level functions: slots filled as they come free, a step for all."""

from __future__ import annotations

import ctypes
from collections import deque
from dataclasses import dataclass
from pathlib import Path

import llama_cpp as c
from llama_cpp import mtmd_cpp as mtmd

from benchmarks.peers.inputs import tokens
from benchmarks.peers.llama_side import decode, opened
from benchmarks.peers.serve import picture
from benchmarks.throughput import Ask

SLOTS = 16
CONTEXT = 16384
BATCH = 2048


@dataclass
class Slot:
    number: int
    left: int
    """Tokens still to come."""
    position: int
    token: int


class Server:
    def __init__(self, directory: Path, size: str, threads: int) -> None:
        self.model, self.context = opened(directory / "model.gguf", threads, context=CONTEXT, batch=BATCH, sequences=SLOTS)
        self.memory = c.llama_get_memory(self.context)
        self.sampler = c.llama_sampler_init_greedy()
        self.words = c.llama_vocab_n_tokens(c.llama_model_get_vocab(self.model)) - 20
        options = mtmd.mtmd_context_params_default()
        options.use_gpu, options.n_threads, options.print_timings = False, threads, False
        self.eyes = mtmd.mtmd_init_from_file(str(directory / "mmproj.gguf").encode(), self.model, options)
        self.side = 64 if size == "nano" else 448

    def run(self, todo: list[Ask]) -> int:
        waiting, slots, free, done = deque(todo), list[Slot](), list(range(SLOTS)), 0
        while waiting or slots:
            while waiting and free:
                slots.append(self.begin(waiting.popleft(), free.pop()))
            decode(self.context, [(slot.token, slot.position, slot.number, True) for slot in slots])
            for row, slot in enumerate(slots):
                slot.token, slot.position, slot.left = self.sample(row), slot.position + 1, slot.left - 1
                done += 1
            for slot in [slot for slot in slots if not slot.left]:
                slots.remove(slot)
                free.append(slot.number)
                c.llama_memory_seq_rm(self.memory, slot.number, -1, -1)
        return done

    def begin(self, ask: Ask, number: int) -> Slot:
        """Reads the prompt but its last token, which goes with everybody's next step."""
        position = self.show(ask, number) if ask.images else 0
        words = (tokens(ask.seed, ask.text) % self.words).tolist()
        decode(self.context, [(token, position + i, number, False) for i, token in enumerate(words[:-1])])
        return Slot(number, ask.new, position + len(words) - 1, words[-1])

    def show(self, ask: Ask, number: int) -> int:
        """Encodes the images and puts them into the cache; the position after them."""
        pixels = [picture(ask, i, self.side) for i in range(ask.images)]
        kind = ctypes.c_uint8 * pixels[0].size
        bitmaps = [mtmd.mtmd_bitmap_init(self.side, self.side, kind.from_buffer(p)) for p in pixels]
        marks = mtmd.mtmd_default_marker() * ask.images
        text = mtmd.mtmd_input_text(marks, len(marks), False, True)
        chunks = mtmd.mtmd_input_chunks_init()
        if mtmd.mtmd_tokenize(
            self.eyes, chunks, ctypes.byref(text), (mtmd.mtmd_bitmap_p_ctypes * ask.images)(*bitmaps), ask.images
        ):
            raise RuntimeError("llama.cpp could not take the images")
        after, seen = c.llama_pos(0), 0
        for i in range(mtmd.mtmd_input_chunks_size(chunks)):
            chunk = mtmd.mtmd_input_chunks_get(chunks, i)
            if mtmd.mtmd_input_chunk_get_type(chunk) != mtmd.MTMD_INPUT_CHUNK_TYPE_IMAGE:
                continue
            seen += 1
            if mtmd.mtmd_helper_eval_chunk_single(
                self.eyes, self.context, chunk, after.value, number, BATCH, False, ctypes.byref(after)
            ):
                raise RuntimeError("llama.cpp could not read an image")
        if seen != ask.images:
            raise RuntimeError(f"llama.cpp saw {seen} of {ask.images} images")
        mtmd.mtmd_input_chunks_free(chunks)
        for bitmap in bitmaps:
            mtmd.mtmd_bitmap_free(bitmap)
        return after.value

    def sample(self, row: int) -> int:
        return c.llama_sampler_sample(self.sampler, self.context, row)
