"""Speed beside another commit of ivl: `python -m benchmarks.against_commit --tree TREE`, a checkout of that commit.

The two trees take turns, round by round, each task in a fresh process, so that drift of the machine meets both. A ratio is
the other tree's time over ours, of the medians over rounds: above 1, this tree is faster. The model is InternVL2.5-1B with
random weights (`benchmarks.peers.files`); `photos` turns scikit-image's photographs into prompts.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).parents[1]
DECODE_TOKENS = 24
CONTEXT = 300
"""Tokens of a prompt before replies are timed."""


@dataclass(kw_only=True)
class Options:
    tree: Path
    """Root of the other checkout."""
    models: Path = HERE / "runs" / "peers"
    """Folder with ivl, ivl-int8, ivl-int4 and ivl-w8a8, as `benchmarks.peers.files` makes them."""
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
    figures: dict[str, Times] = {}
    for number in range(options.rounds):
        for task in options.tasks:
            sides = [("before", options.tree), ("now", HERE)]
            for side, tree in sides if number % 2 == 0 else reversed(sides):
                for name, seconds in run_side(tree, task, options).items():
                    figures.setdefault(name, Times()).seconds[side].append(seconds)
        report(figures, number + 1)
    if options.out is not None:
        options.out.write_text(json.dumps({name: times.seconds for name, times in figures.items()}, indent=1))


def report(figures: dict[str, Times], rounds: int) -> None:
    print(f"\nafter {rounds} rounds: median seconds before and now, ratio")
    for name, times in figures.items():
        before, now = (statistics.median(times.seconds[side]) for side in ("before", "now"))
        print(f"{name:24} {before:9.4f} {now:9.4f}  {times.ratio():.3f}", flush=True)


def run_side(tree: Path, task: str, options: Options) -> dict[str, float]:
    """Best seconds of each figure of a task, measured in a process that imports ivl from `tree`."""
    environment = {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": str(options.threads)}
    command = [sys.executable, "-W", "ignore", __file__, task, str(options.models), str(options.threads), options.dtype]
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{task} in {tree} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


# One side, which runs in either tree


def side(task: str, models: Path, threads: int, dtype: str) -> dict[str, float]:
    import torch

    torch.set_num_threads(threads)
    if task == "train":
        return {"training step": best(training_step(), 2)}
    if task == "photos":
        return {"photographs": best(photographs(models), 5)}
    import ivl

    folder = models / {"bf16": "ivl", "vision": "ivl", "w8a8": "ivl-w8a8"}.get(task, f"ivl-{task}")
    engine = ivl.load(folder, dtype=dtype).engine
    if task in ("vision", "w8a8"):
        return {f"{task} {count}": best(vision(engine.model, count), 3) for count in (1, 7)}
    figures = {f"{task} prefill {number}": best(lambda n=number: replies(engine, 1, n, 1), 2) for number in (CONTEXT, 1850)}
    for batch in (1, 8):
        whole = best(lambda b=batch: replies(engine, b, CONTEXT, 1 + DECODE_TOKENS), 2)
        first = best(lambda b=batch: replies(engine, b, CONTEXT, 1), 2)
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
    prompts = [Prompt(torch.randint(0, 150_000, (prompt_tokens,)), tiles, runs) for _ in range(batch)]
    engine.generate(prompts, SamplingParams(max_new_tokens=new_tokens, ignore_eos=True))


def training_step() -> Callable[[], Any]:
    from benchmarks.tasks import prepare

    return prepare("ours", "train", 1)


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


def best(run: Callable[[], Any], repeats: int) -> float:
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
