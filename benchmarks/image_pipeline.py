"""Photographs to tiles beside two other ways: `python -m benchmarks.image_pipeline`.

JPEG files on disk become normalized float32 pixels of tiles, four samples a batch, in the main process. Each side is a process
of its own with one worker process, both bound to one core, and sides take turns. Time is processor time of both processes, so
that samples per second are per core whatever is done where, and other programs matter little. The start of the workers is left
out by taking the difference of a long and a short run. Figures are medians.

- ours: ivl's Loader. uint8 tiles arrive (`uint8`); then they are normalized, the first thing that the model does with them, two
  tiles at a time as there.
- reference: what InternVL's own data set does, written anew: PIL resize and crops, each tile through PIL's JPEG if degraded,
  then torch operations to float32, in a torch DataLoader.
- transformers: HF `datasets` with InternVL's PIL image processor, in a torch DataLoader. It cannot degrade tiles; the whole
  image is compressed once instead, which is mostly less work.

Photographs are scikit-image's, laid side by side to reach the size, so that their detail stays that of real ones.
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import os
import random
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.partner import Partner

SIDES = ("ours", "reference", "transformers")
SIZES = {"0.3 MP": (640, 480), "1.1 MP": (1280, 853), "1.9 MP": (1600, 1200), "3.1 MP": (2048, 1536), "12 MP": (4032, 3024)}
TILES = (1, 4, 6, 12)
BATCH = 4
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def make_photographs(folder: Path, count: int = 8) -> dict[str, list[str]]:
    """JPEG files of each size, quality 90."""
    from skimage import data

    names = ("astronaut", "coffee", "chelsea", "rocket", "retina", "hubble_deep_field")
    photographs = [np.asarray(getattr(data, name)()) for name in names] + [np.asarray(data.stereo_motorcycle()[0])]
    paths: dict[str, list[str]] = {}
    for size, (width, height) in SIZES.items():
        for n in range(count):
            canvas, draw, y = np.zeros((height, width, 3), np.uint8), random.Random(n), 0
            while y < height:
                x, band = 0, min(300, height - y)
                while x < width:
                    piece = draw.choice(photographs)[:band, : width - x]
                    canvas[y : y + band, x : x + piece.shape[1]] = piece
                    x += piece.shape[1]
                y += band
            path = folder / f"{size.replace(' ', '')}-{n}.jpg"
            Image.fromarray(canvas).save(path, quality=90)
            paths.setdefault(size, []).append(str(path))
    return paths


def ours(paths: list[str], max_tiles: int, jpeg: bool) -> Iterator[torch.Tensor]:
    from ivl.config import TilingConfig
    from ivl.cpu import accelerate, resize
    from ivl.data.config import DataConfig
    from ivl.data.loader import Loader
    from ivl.processing.processor import Processor
    from tests.helpers.mixtures import processor  # a real tokenizer, if a small one

    resize.available()  # compiled once, before the worker is forked
    folder = Path(paths[0]).parent
    rows = folder / "rows.jsonl"
    turns = [{"from": "human", "value": "<image>\nwhat is this"}, {"from": "gpt", "value": "a red circle on white"}]
    rows.write_text("".join(json.dumps({"image": path, "conversations": turns}) + "\n" for path in paths))
    meta = {"photographs": {"root": "", "annotation": str(rows), "data_augment": jpeg}}
    (folder / "meta.json").write_text(json.dumps(meta))
    small = processor()
    config = DataConfig(
        mixture=str(folder / "meta.json"), max_tokens=10**6, max_tiles=10**4, max_samples=BATCH, max_tiles_per_image=max_tiles,
        num_workers=1, epochs=1, shuffle=False,
    )  # fmt: skip
    for batch in Loader(config, accelerate(Processor(small.config, small.tokenizer, TilingConfig())), seed=0):
        yield batch.tiles_GSSC


def finish_ours(tiles_GSSC: torch.Tensor) -> None:
    from ivl.cpu.layers import CHUNK_TILES
    from ivl.model.vlm import normalize

    for chunk in tiles_GSSC.split(CHUNK_TILES):
        normalize(chunk, torch.float32)


class Reference(torch.utils.data.Dataset):
    """The model cards' transform of an image (build_transform, dynamic_preprocess), with ToTensor and Normalize in torch."""

    def __init__(self, paths: list[str], max_tiles: int, jpeg: bool) -> None:
        self.paths, self.max_tiles, self.jpeg = paths, max_tiles, jpeg
        self.grids = sorted(
            {(i, j) for i in range(1, max_tiles + 1) for j in range(1, max_tiles + 1) if i * j <= max_tiles},
            key=lambda grid: grid[0] * grid[1],
        )
        self.mean, self.std = (torch.tensor(x).view(3, 1, 1) for x in (MEAN, STD))

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> torch.Tensor:
        image = Image.open(self.paths[index]).convert("RGB")
        width, height = image.size
        best, gap = (1, 1), float("inf")
        for i, j in self.grids:
            difference = abs(width / height - i / j)
            if difference < gap or (difference == gap and width * height > 0.5 * 448 * 448 * i * j):
                best, gap = (i, j), difference
        columns, rows = best
        resized = image.resize((448 * columns, 448 * rows), Image.Resampling.BICUBIC)
        boxes = [(x * 448, y * 448, x * 448 + 448, y * 448 + 448) for y in range(rows) for x in range(columns)]
        tiles = [resized.crop(box) for box in boxes]
        if len(tiles) > 1:
            tiles.append(image.resize((448, 448), Image.Resampling.BICUBIC))
        return torch.stack([self.transform(tile) for tile in tiles])

    def transform(self, tile: Image.Image) -> torch.Tensor:
        if self.jpeg:
            buffer = io.BytesIO()
            tile.save(buffer, format="JPEG", quality=random.randint(75, 100))
            tile = Image.open(buffer).convert("RGB")
        bytes_CYX = torch.from_numpy(np.array(tile)).permute(2, 0, 1).contiguous()
        return bytes_CYX.to(torch.float32).div_(255).sub_(self.mean).div_(self.std)


def reference(paths: list[str], max_tiles: int, jpeg: bool) -> Iterator[torch.Tensor]:
    return _loaded(Reference(paths, max_tiles, jpeg), torch.cat)


def transformers(paths: list[str], max_tiles: int, jpeg: bool) -> Iterator[torch.Tensor]:
    import datasets
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

    processor = GotOcr2ImageProcessorPil(
        size={"height": 448, "width": 448}, crop_to_patches=True, max_patches=max_tiles, image_mean=MEAN, image_std=STD
    )

    def transform(rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
        images = [degraded(image) if jpeg else image for image in rows["image"]]
        return {"pixels": [processor(image, return_tensors="pt")["pixel_values"] for image in images]}

    def degraded(image: Image.Image) -> Image.Image:
        buffer = io.BytesIO()
        image.save(buffer, format="JPEG", quality=random.randint(75, 100))
        return Image.open(buffer)

    rows = datasets.Dataset.from_dict({"image": paths}).cast_column("image", datasets.Image())
    return _loaded(rows.with_transform(transform), lambda batch: torch.cat([row["pixels"] for row in batch]))


def _loaded(dataset: Any, collate: Callable[[Any], torch.Tensor]) -> Iterator[torch.Tensor]:
    return iter(torch.utils.data.DataLoader(dataset, batch_size=BATCH, num_workers=1, collate_fn=collate))


def serve(side: str) -> None:
    """Answer each line of standard input, a task, with a line of its times."""
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    torch.set_num_threads(1)
    if side == "ours":
        from ivl.utils.machine import keep_freed_memory

        keep_freed_memory()  # as every training run does
    load = {"ours": ours, "reference": reference, "transformers": transformers}[side]
    for line in sys.stdin:
        task = json.loads(line)
        start, finishing, tiles = processor_time(), 0.0, 0
        for batch in load(task["paths"], task["tiles"], task["jpeg"]):
            tiles += len(batch)
            before = time.process_time()
            if side == "ours":
                finish_ours(batch)
            finishing += time.process_time() - before
        seconds = processor_time() - start
        print(json.dumps({"seconds": seconds, "finishing": finishing, "tiles": tiles}), flush=True)


def processor_time() -> float:
    """Seconds of this process and of its workers that have ended."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def started(side: str) -> Partner:
    environment = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    # As wherever ivl is imported first, which is not so here (see ivl/__init__.py); off is torch's own setting.
    environment["THP_MEM_ALLOC_ENABLE"] = "1" if side == "ours" else "0"
    return Partner("-m", "benchmarks.image_pipeline", "--serve", side, environment=environment)


def measure(sizes: list[str], tiles: list[int], rounds: int, seconds: float) -> Iterator[dict[str, Any]]:
    sides = {name: started(name) for name in SIDES}
    with tempfile.TemporaryDirectory() as folder:
        photographs = make_photographs(Path(folder))
        photographs["12 MP"] = photographs["12 MP"][:4]
        for size in sizes:
            for max_tiles in tiles:
                for jpeg in (False, True):
                    task = {"paths": photographs[size], "tiles": max_tiles, "jpeg": jpeg}
                    first = {}
                    for _ in range(2):  # the first warms up
                        first = {name: side.run(json.dumps(task)) for name, side in sides.items()}
                    assert len({answer["tiles"] for answer in first.values()}) == 1, first
                    # The fastest side sees as many photographs as take it a while; the same number for all.
                    count = max(1, min(40, round(seconds / first["ours"]["seconds"])))
                    task["paths"] = photographs[size] * (1 + count)
                    runs = [{name: side.run(json.dumps(task)) for name, side in sides.items()} for _ in range(rounds)]
                    for run, (name, base) in itertools.product(runs, first.items()):  # leaves out the start of the workers
                        run[name] = {what: value - base[what] for what, value in run[name].items()}
                    num = len(photographs[size])
                    yield summary(size, max_tiles, jpeg, num * count, first["ours"]["tiles"] / num, runs)
    for side in sides.values():
        side.close()


def summary(size: str, max_tiles: int, jpeg: bool, num: int, tiles: float, runs: list[dict[str, Any]]) -> dict[str, Any]:
    rate = {name: statistics.median(num / run[name]["seconds"] for run in runs) for name in SIDES}
    delivered = statistics.median(num / (run["ours"]["seconds"] - run["ours"]["finishing"]) for run in runs)
    ratios = {name: statistics.median(run[name]["seconds"] / run["ours"]["seconds"] for run in runs) for name in SIDES[1:]}
    return {
        "size": size, "max_tiles": max_tiles, "tiles": tiles, "jpeg": jpeg, **rate, "delivered": delivered,
        "over_reference": ratios["reference"], "over_transformers": ratios["transformers"],
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--serve", choices=SIDES)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--tiles", nargs="+", type=int, default=list(TILES))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=0.8, help="length of a measurement on our side")
    parser.add_argument("--out", type=Path, help="JSON lines are appended here")
    options = parser.parse_args()
    if options.serve:
        serve(options.serve)
        return
    titles = "photograph | most | tiles | JPEG | uint8 | ours | reference | transformers | over reference | over transformers"
    print(f"| {titles} |\n| --- | ---: | ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    for row in measure(options.sizes, options.tiles, options.rounds, options.seconds):
        rates = " | ".join(f"{row[name]:.1f}" for name in ("delivered", *SIDES))
        ratios = f"{row['over_reference']:.2f} | {row['over_transformers']:.2f}"
        task = f"{row['size']} | {row['max_tiles']} | {row['tiles']:g} | {'yes' if row['jpeg'] else 'no'}"
        print(f"| {task} | {rates} | {ratios} |", flush=True)
        if options.out:
            with options.out.open("a") as out:
                out.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
