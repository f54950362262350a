"""How full packs are, ours beside the published rule on the same streams, and how fast packing is.

    python -m benchmarks.packing --out results/packing.json

Lengths are synthetic and seeded. `offline` is the fill of the binding budget when 10,000 samples are packed largest
first with every pack open, which no stream can do: where it is below 97%, the lengths are what leaves packs unfilled.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

from ivl.data.packing import Packer
from tests.helpers.reference_packing import reference_packs

TOKENS_PER_TILE = 256


@dataclass(frozen=True, slots=True)
class Size:
    num_tokens: int
    num_tiles: int


def short_vqa(n: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """One image of 1 to 13 tiles (12 and a thumbnail) and a few dozen words."""
    tiles = rng.integers(1, 14, n)
    return tiles * TOKENS_PER_TILE + 20 + rng.lognormal(4.2, 0.6, n).astype(int), tiles


def long_documents(n: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """90% short text with up to 2 tiles, 10% text documents of 2,000 to 8,191 tokens."""
    tiles = rng.integers(0, 3, n)
    tokens = tiles * TOKENS_PER_TILE + 20 + rng.lognormal(4.8, 0.6, n).astype(int)
    long = rng.random(n) < 0.1
    return np.where(long, rng.integers(2000, 8192, n), tokens), np.where(long, 0, tiles)


def video(n: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """8 to 32 frames of one tile, each with its `Frame7: ` line, and some words."""
    frames = rng.integers(8, 33, n)
    return frames * (TOKENS_PER_TILE + 8) + 20 + rng.lognormal(4.8, 0.6, n).astype(int), frames


STREAMS = {"short VQA": short_vqa, "90% short, 10% long": long_documents, "video": video}
BUDGETS = ((8192, 48), (16384, 48), (32768, 128))


def ours(sizes: list[Size], max_tokens: int, max_tiles: int, max_buffer: int) -> int:
    """Number of packs."""
    packer: Packer[Size] = Packer(max_tokens=max_tokens, max_tiles=max_tiles, max_buffer=max_buffer)
    packs = sum(packer.add(position, size) is not None for position, size in enumerate(sizes))
    while packer.flush():
        packs += 1
    return packs


def measure(name: str, n: int, max_tokens: int, max_tiles: int, max_buffer: int) -> dict:
    tokens, tiles = STREAMS[name](n, np.random.default_rng(0))
    fit = (tokens <= max_tokens) & (tiles <= max_tiles)
    pairs = np.stack([tokens[fit], tiles[fit]], axis=1).tolist()
    sizes = [Size(*pair) for pair in pairs]
    began = time.monotonic()
    packs = ours(sizes, max_tokens, max_tiles, max_buffer)
    seconds = time.monotonic() - began
    reference = reference_packs(pairs, max_tokens=max_tokens, max_tiles=max_tiles, max_buffer=max_buffer)
    fullest = sorted(sizes[:10_000], key=lambda size: -max(size.num_tokens / max_tokens, size.num_tiles / max_tiles))
    offline = ours(fullest, max_tokens, max_tiles, 10**9)
    token_need, tile_need = tokens[fit].sum() / max_tokens, tiles[fit].sum() / max_tiles
    need = max(sum(s.num_tokens for s in fullest) / max_tokens, sum(s.num_tiles for s in fullest) / max_tiles)
    return {
        "stream": name, "max_tokens": max_tokens, "max_tiles": max_tiles, "samples": len(sizes), "over_budget": n - len(sizes),
        "binding": "tokens" if token_need >= tile_need else "tiles", "samples_per_pack": len(sizes) / packs,
        "token_fill": token_need / packs, "tile_fill": tile_need / packs,
        "reference_token_fill": token_need / len(reference), "reference_tile_fill": tile_need / len(reference),
        "offline": need / offline,
        "samples_per_second": len(sizes) / seconds,
    }  # fmt: skip


def main(samples: int = 100_000, max_buffer: int = 20, timed: int = 1_000_000, out: Path | None = None) -> None:
    """Print the table.

    Args:
        samples: Samples of each stream.
        max_buffer: Packs that stay open.
        timed: Samples of the timing.
        out: JSON file for the figures.
    """
    rows = [measure(name, samples, *budget, max_buffer) for name in STREAMS for budget in BUDGETS]
    print("| stream | pack | binding | samples a pack | token fill | first fit | tile fill | first fit | offline |")
    print("|---|---|---|---|---|---|---|---|---|")
    for row in rows:
        print(
            f"| {row['stream']} | {row['max_tokens']:,} / {row['max_tiles']} | {row['binding']} "
            f"| {row['samples_per_pack']:.1f} | {row['token_fill']:.2%} | {row['reference_token_fill']:.2%} "
            f"| {row['tile_fill']:.2%} | {row['reference_tile_fill']:.2%} | {row['offline']:.2%} |"
        )
    seconds = {}
    for name in STREAMS:
        tokens, tiles = STREAMS[name](timed, np.random.default_rng(1))
        sizes = [Size(*pair) for pair in np.stack([tokens, tiles], axis=1).tolist()]
        began = time.monotonic()
        ours(sizes, 16384, 48, max_buffer)
        seconds[name] = time.monotonic() - began
        print(f"{timed:,} samples of {name} in {seconds[name]:.1f} s")
    if out:
        out.write_text(json.dumps({"rows": rows, "seconds": seconds, "timed": timed, "max_buffer": max_buffer}, indent=2))


if __name__ == "__main__":
    tyro.cli(main)
