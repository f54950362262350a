"""transformers as its users run it at its best: sdpa, a dynamic cache, logits of the last token only, and bfloat16, or
float32 where the processor has no bfloat16."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.peers.inputs import tiles, tokens
from benchmarks.tasks import their_model
from ivl.cpu.kernels.features import multiplies_bfloat16
from ivl.model.vlm import normalize

DTYPE = torch.bfloat16 if multiplies_bfloat16() else torch.float32


@dataclass
class Side:
    width: str

    def __post_init__(self) -> None:
        self.model: Any = their_model(DTYPE)

    def vision(self, count: int) -> Callable[[], float]:
        pixels = torch.from_numpy(tiles(count))

        @torch.inference_mode()
        def run() -> float:
            started = time.perf_counter()
            self.model.model.get_image_features(normalize(pixels, DTYPE))
            return time.perf_counter() - started

        return run

    @torch.inference_mode()
    def read(self, batch: int, number: int) -> Any:
        ids = torch.stack([torch.from_numpy(tokens(seed, number)) for seed in range(batch)])
        return self.model(input_ids=ids, use_cache=True, logits_to_keep=1)

    def prefill(self, number: int) -> Callable[[], float]:
        def run() -> float:
            started = time.perf_counter()
            self.read(1, number).logits.argmax(-1)
            return time.perf_counter() - started

        return run

    def decode(self, batch: int, context: int, steps: int) -> Callable[[], float]:
        cache = self.read(batch, context).past_key_values

        @torch.inference_mode()
        def run() -> float:
            if (extra := cache.get_seq_length() - context) > 0:
                cache.crop(-extra)
            ids = torch.ones(batch, 1, dtype=torch.long)
            started = time.perf_counter()
            for _ in range(steps):
                ids = self.model(input_ids=ids, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)
            return time.perf_counter() - started

        return run
