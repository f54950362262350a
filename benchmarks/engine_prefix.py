"""Time to the first token of a second question about the same image, beside the first; and the gap that a long prompt
tears into a running reply. InternVL2.5-1B with random bfloat16 weights.

    python -m benchmarks.engine_prefix [--image-tiles 7] [--rounds 3] [--batch-tokens 1024,2048]
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

from benchmarks.tasks import SIZE
from benchmarks.wordless import TokenIds
from ivl.config import published_config
from ivl.cpu import accelerate
from ivl.inference.engine import Engine
from ivl.model.vlm import VLM
from ivl.types import Conversation, Message, Prompt, SamplingParams, Text


class Pictures:
    """Conversations `image question` as prompts: 40 tokens of system prompt, the tiles, the question."""

    def __init__(self, model: VLM, num_tiles: int) -> None:
        self.config = model.config
        self.num_tiles = num_tiles
        self.tokenizer = TokenIds()

    def prompt(self, conversation: Conversation) -> Prompt:
        image, question = (int(n) for n in conversation[0].text.split())
        size, mark = self.config.tiling.tile_size, self.config.image_token_id
        numbers = torch.Generator().manual_seed(image)
        count = self.num_tiles if image else 0
        tiles = torch.randint(0, 256, (count, size, size, 3), dtype=torch.uint8, generator=numbers)
        system = torch.arange(40) + 100
        asked = torch.randint(0, 150_000, (24 if image else 1800,), generator=torch.Generator().manual_seed(question))
        shown = torch.full((count * self.config.tokens_per_tile,), mark)
        return Prompt(torch.cat([system, shown, asked]), tiles, torch.arange(count))


def asks(image: int, question: int) -> Conversation:
    return (Message("user", (Text(f"{image} {question}"),)),)


def first_token(engine: Engine, image: int, question: int) -> float:
    started = time.perf_counter()
    next(engine.stream(asks(image, question), SamplingParams(max_new_tokens=8)))
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--image-tiles", type=int, default=7)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch-tokens", default="1024,2048")
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    model = VLM(published_config(SIZE)).eval()
    model.init_weights()
    accelerate(model)
    for budget in map(int, args.batch_tokens.split(",")):
        engine = Engine(model, Pictures(model, args.image_tiles), max_batch_tokens=budget, max_cache_tokens=16384)
        engine.eos = frozenset()
        first_token(engine, 1, 1)
        pairs = [(first_token(engine, n + 2, 2), first_token(engine, n + 2, 3)) for n in range(args.rounds)]
        firsts, seconds = ([pair[k] for pair in pairs] for k in (0, 1))
        ratio = statistics.median(second / first for first, second in pairs)
        print(
            f"steps of {budget}: first question {statistics.median(firsts):.3f} s, "
            f"second {statistics.median(seconds):.3f} s, ratio {ratio:.3f}"
        )
        running = engine.submit(asks(0, 5), SamplingParams(max_new_tokens=200))
        while len(running.tokens) < 4:
            engine.step()
        for name, image in (("a prompt of 1,840 tokens", 0), (f"an image of {args.image_tiles} tiles", 99)):
            other, gaps, started = engine.submit(asks(image, 6 + image)), [], time.perf_counter()
            while not other.tokens:
                at = time.perf_counter()
                engine.step()
                gaps.append(time.perf_counter() - at)
            whole = time.perf_counter() - started
            print(f"    beside a reply, {name}: longest step {max(gaps):.3f} s of {len(gaps)}, first token {whole:.3f} s")
            engine.cancel(other)
        engine.cancel(running)


if __name__ == "__main__":
    main()
