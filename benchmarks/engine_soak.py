"""Whether an engine may run for ever: thousands of short requests, some cancelled at random, and its memory.

    python -m benchmarks.engine_soak [--requests 10000] [--cancelled 0.1]

A nano-size model with random weights; prompts of 10 to 150 tokens, 0 to 3 tiles each, a third of them sharing a
beginning; replies of up to 16 tokens. Fails if memory is 5% above the level after the first 500 requests, or if
anything is left in the engine at the end.
"""

from __future__ import annotations

import random
import sys
import time
from pathlib import Path
from typing import Annotated

import torch
import tyro

from benchmarks.wordless import TokenIds
from ivl.cpu import accelerate
from ivl.inference.engine import Engine, Request
from ivl.model.vlm import VLM
from ivl.recipes.nano import architecture
from ivl.types import Conversation, Message, Prompt, SamplingParams, Text
from ivl.utils.progress import counting

LEVEL_AFTER = 500
GROWTH = 1.05
OPEN = 48


class Mixed:
    """Conversations are numbers; each is another prompt."""

    def __init__(self) -> None:
        self.config = architecture()
        self.tokenizer = TokenIds()

    def prompt(self, conversation: Conversation) -> Prompt:
        numbers = torch.Generator().manual_seed(int(conversation[0].text))
        length, count, shared = (int(torch.randint(0, n, (), generator=numbers)) for n in (140, 4, 3))
        size = self.config.tiling.tile_size
        tiles = torch.randint(0, 256, (count, size, size, 3), dtype=torch.uint8, generator=numbers)
        asked = torch.randint(0, 300, (10 + length,), generator=numbers)
        system = torch.arange(100) if shared == 0 else torch.arange(0)
        shown = torch.full((count * self.config.tokens_per_tile,), self.config.image_token_id)
        return Prompt(torch.cat([system, shown, asked]), tiles, torch.arange(count))


def resident_mb() -> float:
    """This process's memory; what the C library keeps for later counts, too."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) / 1024


def soak(requests: int, cancelled: float, seed: int) -> bool:
    torch.manual_seed(seed)
    rng = random.Random(seed)
    processor = Mixed()
    model = VLM(processor.config).eval()
    model.init_weights()
    accelerate(model)
    engine = Engine(model, processor, max_cache_tokens=16384, max_batch_tokens=1024, vision_cache_bytes=4 << 20)
    active: list[Request] = []
    made = done = dropped = 0
    marks = sorted({LEVEL_AFTER, *(share * requests // 5 for share in range(1, 6))})
    rows: list[tuple[int, float, float]] = []
    started = time.perf_counter()
    with counting() as progress:
        bar = progress.add_task("requests", total=requests, note="")
        while (over := done + dropped) < requests:
            if over >= marks[len(rows)]:
                rows.append((over, resident_mb(), over / (time.perf_counter() - started)))
            while made < requests and len(active) < OPEN:
                sampling = SamplingParams(max_new_tokens=rng.randint(1, 16), temperature=1.0, seed=made)
                active.append(engine.submit((Message("user", (Text(str(made)),)),), sampling))
                made += 1
            engine.step()
            ended = sum(request.finish_reason is not None for request in active)
            active = [request for request in active if request.finish_reason is None]
            for _ in range(ended):
                if active and rng.random() < cancelled / (1 - cancelled):
                    engine.cancel(active.pop(rng.randrange(len(active))))
                    dropped += 1
            done += ended
            note = f"{over / (time.perf_counter() - started):.0f}/s, {resident_mb():.0f} MB"
            progress.update(bar, completed=done + dropped, note=note)
    rows.append((done + dropped, resident_mb(), (done + dropped) / (time.perf_counter() - started)))
    level = next(memory for count, memory, _ in rows if count >= min(LEVEL_AFTER, requests))
    stats = engine.stats()
    print(f"{'requests':>8} {'RSS MB':>8} {'of level':>8} {'requests/s':>10}")
    for count, memory, rate in rows:
        print(f"{count:8,} {memory:8.1f} {memory / level:8.3f} {rate:10.1f}")
    print(f"{dropped:,} cancelled, {done:,} finished; {stats}")
    left = stats.running + stats.waiting + stats.cache_blocks_used + sum(engine.cache.pool.users)
    return rows[-1][1] <= GROWTH * level and left == 0


def main(requests: Annotated[int, tyro.conf.arg(help="How many.")] = 10_000, cancelled: float = 0.1, seed: int = 0) -> None:
    """Run requests through one engine and set its memory at the end beside that after the first 500."""
    if not soak(requests, cancelled, seed):
        sys.exit("memory grew, or something was left behind")


if __name__ == "__main__":
    tyro.cli(main)
