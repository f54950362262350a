"""ivl: the engine that every command uses, and the model's vision encoder."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

import ivl
from benchmarks.peers.inputs import tiles, tokens
from benchmarks.peers.install import FILES
from benchmarks.wordless import TokenIds
from ivl.inference.engine import Engine, Request
from ivl.types import Message, Prompt, SamplingParams, Text


class Ids:
    """Stands in for a processor: the text of a conversation is a seed and a length, the prompt random tokens."""

    tokenizer = TokenIds()

    def prompt(self, conversation: tuple[Message, ...]) -> Prompt:
        seed, number = map(int, conversation[0].text.split())
        none = torch.empty(0, 448, 448, 3, dtype=torch.uint8)
        return Prompt(torch.from_numpy(tokens(seed, number)), none, torch.empty(0, dtype=torch.long))


@dataclass
class Side:
    width: str

    def __post_init__(self) -> None:
        self.model = ivl.load(FILES / ("ivl" if self.width == "bf16" else f"ivl-{self.width}")).engine.model
        self.engine = Engine(self.model, Ids(), max_cache_tokens=4096)  # type: ignore[arg-type]
        self.engine.eos = frozenset()
        self.seed = 0

    def submit(self, number: int, new: int) -> Request:
        self.seed += 1  # never the same prompt twice: the cache would know it
        return self.engine.submit((Message("user", (Text(f"{self.seed} {number}"),)),), SamplingParams(max_new_tokens=new))

    def vision(self, count: int) -> Callable[[], float]:
        pixels = torch.from_numpy(tiles(count))

        @torch.inference_mode()
        def run() -> float:
            return timed(lambda: self.model.encode_tiles(pixels))

        return run

    def prefill(self, number: int) -> Callable[[], float]:
        def run() -> float:
            request = self.submit(number, 1)
            return timed(lambda: self.until([request]))

        return run

    def decode(self, batch: int, context: int, steps: int) -> Callable[[], float]:
        def run() -> float:
            requests = [self.submit(context, steps + 1) for _ in range(batch)]
            while not all(request.tokens for request in requests):
                self.engine.step()
            # Prompts that were read in several steps leave some replies ahead: count what is still to come.
            left = sum(steps + 1 - len(request.tokens) for request in requests)
            return timed(lambda: self.until(requests)) * batch * steps / left

        return run

    def until(self, requests: list[Request]) -> None:
        while any(request.finish_reason is None for request in requests):
            self.engine.step()


def timed(function: Callable[[], Any]) -> float:
    started = time.perf_counter()
    function()
    return time.perf_counter() - started
