"""Speed beside another commit of ivl: `python -m benchmarks.against_commit --tree TREE`, a checkout of that commit.

The two trees take turns, round by round, each task in a fresh process, so that drift of the machine meets both. A ratio is
the other tree's time over ours, of the medians over rounds: above 1, this tree is faster. The model has InternVL2.5-1B's
shape and random weights; on a slow processor `--layers 6` gives ViT and decoder fewer layers of the same shape. `photos`
turns scikit-image's photographs into prompts.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

HERE = Path(__file__).parents[1]
DECODE_TOKENS = 24
CONTEXTS = {1: 300, 8: 64}
"""Tokens of each prompt before replies are timed, by batch size."""


@dataclass(kw_only=True)
class Options:
    tree: Path
    """Root of the other checkout."""
    models: Path = HERE / "runs" / "against_commit"
    """Folder of the models, which are made where they are missing."""
    layers: int = 24
    """Layers of ViT and decoder."""
    rounds: int = 3
    threads: int = 2
    dtype: str = "bfloat16"
    tasks: tuple[str, ...] = ("vision", "w8a8", "bf16", "int8", "int4", "train", "photos")
    out: Path | None = None
    """JSON file of every time."""


@dataclass
class Times:
    """Seconds per run of one figure, by tree."""

    seconds: dict[str, list[float]] = field(default_factory=lambda: {"before": [], "now": []})

    def ratio(self) -> float:
        before, now = (statistics.median(self.seconds[side]) for side in ("before", "now"))
        return before / now


def main(options: Options) -> None:
    models = options.models / f"{options.layers}-layers"
    make_models(models, options.layers)
    figures: dict[str, Times] = {}
    for number in range(options.rounds):
        for task in options.tasks:
            sides = [("before", options.tree), ("now", HERE)]
            for side, tree in sides if number % 2 == 0 else reversed(sides):
                print(f"round {number + 1} of {options.rounds}: {task}, {side}", file=sys.stderr, flush=True)
                for name, seconds in run_side(tree, task, models, options).items():
                    figures.setdefault(name, Times()).seconds[side].append(seconds)
        report(figures, number + 1)
    if options.out is not None:
        options.out.write_text(json.dumps({name: times.seconds for name, times in figures.items()}, indent=1))


def report(figures: dict[str, Times], rounds: int) -> None:
    print(f"\nafter {rounds} rounds: median seconds before and now, ratio")
    for name, times in figures.items():
        before, now = (statistics.median(times.seconds[side]) for side in ("before", "now"))
        print(f"{name:24} {before:9.4f} {now:9.4f}  {times.ratio():.3f}", flush=True)


def make_models(models: Path, layers: int) -> None:
    """Make ivl, ivl-int8, ivl-int4 and ivl-w8a8 by this tree; both trees read them."""
    import dashscope
    import torch

    from ivl.checkpoint import load_tokenizer, save_model, save_processor
    from ivl.config import published_config
    from ivl.model.vlm import VLM
    from ivl.processing.processor import Processor

    plain = models / "ivl"
    if not plain.exists():
        full = published_config("1B")
        config = replace(full, vision=replace(full.vision, num_layers=layers), decoder=replace(full.decoder, num_layers=layers))
        torch.set_default_dtype(torch.bfloat16)
        model = VLM(config).eval()
        model.init_weights()
        save_model(model, models / "part")
        tokenizer = load_tokenizer(Path(dashscope.__file__).parent / "resources")  # the real Qwen vocabulary
        tokenizer.add_special()
        save_processor(Processor(config, tokenizer), models / "part")
        (models / "part").rename(plain)
    for width, option in (("int8", "--quantize"), ("int4", "--quantize"), ("w8a8", "--quantize-vision")):
        if not (out := models / f"ivl-{width}").exists():
            subprocess.run([sys.executable, "-m", "ivl", "convert", plain, out, option, width], check=True)


def run_side(tree: Path, task: str, models: Path, options: Options) -> dict[str, float]:
    """Best seconds of each figure of a task, measured in a process that imports ivl from `tree`."""
    environment = {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": str(options.threads)}
    command = [sys.executable, "-W", "ignore", __file__, task, str(models), str(options.threads), options.dtype]
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{task} in {tree} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


# One side, which runs in either tree


def side(task: str, models: Path, threads: int, dtype: Any) -> dict[str, float]:
    import torch

    torch.set_num_threads(threads)
    if task == "train":
        return {"training step": best(training_step(models, dtype), 2)}
    if task == "photos":
        return {"photographs": best(photographs(models), 5)}
    import ivl

    folder = models / {"bf16": "ivl", "vision": "ivl", "w8a8": "ivl-w8a8"}.get(task, f"ivl-{task}")
    engine = ivl.load(folder, dtype=dtype).engine
    if task in ("vision", "w8a8"):
        vision(engine.model, 1)()
        return {f"{task} {count}": best(vision(engine.model, count), 2 if count == 1 else 1, warm=False) for count in (1, 7)}
    replies(engine, 1, 64, 4)
    figures = {f"{task} prefill 1850": best(lambda: replies(engine, 1, 1850, 1), 1, warm=False)}
    for batch, context in CONTEXTS.items():
        whole = best(lambda b=batch, c=context: replies(engine, b, c, 1 + DECODE_TOKENS), 2, warm=False)
        first = best(lambda b=batch, c=context: replies(engine, b, c, 1), 2, warm=False)
        figures[f"{task} prefill {batch} x {context}"] = first
        figures[f"{task} decode {batch}"] = (whole - first) / DECODE_TOKENS
    return figures


def vision(model: Any, count: int) -> Callable[[], Any]:
    import torch

    tiles = torch.randint(0, 256, (count, 448, 448, 3), dtype=torch.uint8)
    return torch.inference_mode()(lambda: model.encode_tiles(tiles))


def replies(engine: Any, batch: int, prompt_tokens: int, new_tokens: int) -> None:
    """Answer `batch` random prompts, none of which the prefix cache has seen."""
    import torch

    from ivl.types import Prompt, SamplingParams

    tiles, runs = torch.empty(0, 448, 448, 3, dtype=torch.uint8), torch.empty(0, dtype=torch.long)
    prompts = [Prompt(torch.randint(0, 1500, (prompt_tokens,)), tiles, runs) for _ in range(batch)]
    engine.generate(prompts, SamplingParams(max_new_tokens=new_tokens, ignore_eos=True))


def training_step(models: Path, dtype: str) -> Callable[[], Any]:
    import torch

    import ivl
    from benchmarks import tasks

    config, set_dtype = ivl.load(models / "ivl").engine.model.config, torch.set_default_dtype
    torch.set_default_dtype = lambda _: set_dtype(getattr(torch, dtype))  # the tasks of both trees ask for bfloat16
    tasks.published_config = lambda _: config  # both trees' tasks take their model from here
    return tasks.prepare("ours", "train", 1)


def photographs(models: Path) -> Callable[[], Any]:
    import io

    from PIL import Image
    from skimage import data

    import ivl

    processor = ivl.load(models / "ivl").engine.processor
    pictures = []
    for name in ("astronaut", "chelsea", "coffee", "rocket", "retina", "hubble_deep_field"):
        buffer = io.BytesIO()
        Image.fromarray(getattr(data, name)()).convert("RGB").save(buffer, "JPEG", quality=92)
        pictures.append(buffer.getvalue())

    def run() -> None:
        for picture in pictures:
            processor.prompt(ivl.ask("what is this", picture))

    return run


def best(run: Callable[[], Any], repeats: int, *, warm: bool = True) -> float:
    """Return the least seconds of so many runs."""
    if warm:
        run()
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        run()
        times.append(time.perf_counter() - started)
    return min(times)


if __name__ == "__main__":
    if len(sys.argv) > 4 and not sys.argv[1].startswith("-"):
        print(json.dumps(side(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4])))
    else:
        import tyro

        main(tyro.cli(Options))
