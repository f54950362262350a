"""OpenVINO GenAI's continuous batching pipeline, one `step` at a time, and OpenVINO's runtime for the vision encoder.

Both compute in bfloat16 where the processor does; weights as exported (see files.py).
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import openvino as ov
import openvino_genai as genai

from benchmarks.peers.inputs import tiles, tokens
from benchmarks.peers.install import FILES

CACHE_GB = 1


@dataclass
class Side:
    width: str
    threads: int = 2

    def __post_init__(self) -> None:
        self.pipe: Any = None

    def vision(self, count: int) -> Callable[[], float]:
        name = "ov-vision" if self.width == "bf16" else "ov-vision-w8a8"
        precision = "f32" if os.environ.get("IVL_CPU") == "avx2" else "bf16"
        options = {"INFERENCE_NUM_THREADS": self.threads, "PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": precision}
        model = ov.Core().compile_model(FILES / name / "vision.xml", "CPU", options)
        pixels = tiles(count)
        mean, deviation = np.float32([0.485, 0.456, 0.406]), np.float32([0.229, 0.224, 0.225])

        def run() -> float:
            started = time.perf_counter()
            model(((pixels / np.float32(255) - mean) / deviation).transpose(0, 3, 1, 2))
            return time.perf_counter() - started

        return run

    def start(self, batch: int, number: int, new: int) -> list[Any]:
        if self.pipe is None:
            scheduler = genai.SchedulerConfig()
            scheduler.max_num_batched_tokens = 4096
            scheduler.cache_size = CACHE_GB
            scheduler.dynamic_split_fuse = False
            scheduler.enable_prefix_caching = False
            options = {"INFERENCE_NUM_THREADS": self.threads}
            self.pipe = genai.ContinuousBatchingPipeline(str(FILES / f"ov-{self.width}"), scheduler, "CPU", options)
        config = genai.GenerationConfig()
        config.max_new_tokens, config.ignore_eos = new, True
        return [self.pipe.add_request(i, ov.Tensor(tokens(i, number)[None]), config) for i in range(batch)]

    def finish(self) -> int:
        steps = 0
        while self.pipe.has_non_finished_requests():
            self.pipe.step()
            steps += 1
        return steps

    def prefill(self, number: int) -> Callable[[], float]:
        def run() -> float:
            handles = self.start(1, number, 1)
            started = time.perf_counter()
            self.finish()
            seconds = time.perf_counter() - started
            del handles
            return seconds

        return run

    def decode(self, batch: int, context: int, steps: int) -> Callable[[], float]:
        def run() -> float:
            handles = self.start(batch, context, steps + 1)
            self.pipe.step()  # all prompts
            started = time.perf_counter()
            took = self.finish()
            seconds = time.perf_counter() - started
            if took != steps:
                raise RuntimeError(f"OpenVINO took {took} steps for {steps} tokens")
            del handles
            return seconds

        return run
