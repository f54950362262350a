"""One side of benchmarks/throughput.py: `python -m benchmarks.peers.serve SIDE SIZE REQUESTS THREADS`."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.peers.inputs import tokens
from benchmarks.peers.install import FILES
from benchmarks.throughput import Ask, asks, kind_of


def main(side: str, size: str, count: int, threads: int) -> None:
    prepare: Callable[[str, int], Callable[[list[Ask]], int]] = {
        "ivl": ours,
        "transformers": transformers,
        "llama": llama,
    }[side]
    run = prepare(size, threads)
    run([Ask(1000 + i, 30, 1, 3) for i in range(2)])  # warm-up
    todo = asks(count)
    started = time.perf_counter()
    new = run(todo)
    seconds = time.perf_counter() - started
    if new != sum(ask.new for ask in todo):
        raise RuntimeError(f"{side} made {new} tokens instead of {sum(ask.new for ask in todo)}")
    print(json.dumps({"tokens": new, "seconds": seconds}))


def picture(ask: Ask, number: int, size: int) -> np.ndarray:
    """uint8 [size, size, 3]; no two requests share one."""
    return np.random.default_rng((ask.seed, number)).integers(0, 256, (size, size, 3), dtype=np.uint8)


def ids(ask: Ask, config: Any) -> list[int]:
    """Placeholders first, then text."""
    words = (tokens(ask.seed, ask.text) % (min(config.image_token_id, 150_000) - 10)).tolist()
    return [config.image_token_id] * (ask.images * config.tokens_per_tile) + words


def ours(size: str, threads: int) -> Callable[[list[Ask]], int]:
    import torch

    from ivl.checkpoint import load_model
    from ivl.cpu import accelerate
    from ivl.inference.engine import Engine
    from ivl.types import Message, Prompt, SamplingParams, Text

    torch.set_num_threads(threads)
    model = accelerate(load_model(FILES / kind_of("ivl", size)))
    config = model.config

    class Prompts:
        tokenizer: Any = None

        def prompt(self, conversation: Any) -> Prompt:
            ask = Ask(*map(int, conversation[0].text.split()))
            side = config.tiling.tile_size
            shown = [torch.from_numpy(picture(ask, i, side)) for i in range(ask.images)]
            tiles = torch.stack(shown) if shown else torch.empty(0, side, side, 3, dtype=torch.uint8)
            return Prompt(torch.tensor(ids(ask, config)), tiles, torch.arange(ask.images))

    from benchmarks.peers.ivl_side import Ids

    prompts = Prompts()
    prompts.tokenizer = Ids()
    engine = Engine(model, prompts)
    engine.eos = frozenset()

    def run(todo: list[Ask]) -> int:
        conversations = [(Message("user", (Text(f"{a.seed} {a.text} {a.images} {a.new}"),)),) for a in todo]
        replies = engine.generate(conversations, [SamplingParams(max_new_tokens=a.new) for a in todo])
        return sum(len(reply.tokens) for reply in replies)

    return run


def transformers(size: str, threads: int) -> Callable[[list[Ask]], int]:
    import torch
    from transformers import GenerationConfig, InternVLForConditionalGeneration

    from ivl.checkpoint import load_config
    from ivl.model.vlm import normalize

    torch.set_num_threads(threads)
    directory = FILES / kind_of("transformers", size)
    config = load_config(directory)
    model = InternVLForConditionalGeneration.from_pretrained(directory, dtype=torch.bfloat16).eval()

    @torch.inference_mode()
    def with_images(todo: list[Ask]) -> int:
        todo = sorted(todo, key=lambda ask: ask.new)
        for at in range(0, len(todo), 8):
            some = todo[at : at + 8]
            prompts = [ids(ask, config) for ask in some]
            longest = max(map(len, prompts))
            padded = torch.tensor([[0] * (longest - len(p)) + p for p in prompts])
            mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
            shown = [picture(ask, i, config.tiling.tile_size) for ask in some for i in range(ask.images)]
            pixels = normalize(torch.from_numpy(np.stack(shown)), torch.bfloat16)
            new = max(ask.new for ask in some)
            model.generate(
                input_ids=padded, attention_mask=mask, pixel_values=pixels, max_new_tokens=new, min_new_tokens=new,
                do_sample=False, pad_token_id=0,
            )  # fmt: skip
        return sum(ask.new for ask in todo)

    def text_only(todo: list[Ask]) -> int:
        generation = GenerationConfig(max_new_tokens=128, do_sample=False, eos_token_id=-1, pad_token_id=0)
        manager = model.init_continuous_batching(generation_config=generation)
        manager.start()
        wanted = [manager.add_request(ids(ask, config), max_new_tokens=ask.new) for ask in todo]
        done = 0
        for result in manager:
            if result.is_finished():
                done += 1
            if done == len(wanted):
                break
        manager.stop(block=True)
        return sum(ask.new for ask in todo)

    def run(todo: list[Ask]) -> int:
        seen, text = [a for a in todo if a.images], [a for a in todo if not a.images]
        return (text_only(text) if text else 0) + (with_images(seen) if seen else 0)

    return run


def llama(size: str, threads: int) -> Callable[[list[Ask]], int]:
    from benchmarks.peers.llama_server import Server

    return Server(FILES / kind_of("llama", size), size, threads).run


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
