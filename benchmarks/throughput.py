"""Many requests at once: `python -m benchmarks.throughput`, tokens a second here, in transformers and in llama.cpp.

Requests have prompts of 20 to 300 tokens, none to three images of one tile, and replies of 16 to 128 tokens; all are known
from the start. ivl takes them through its engine. transformers reads text through continuous batching
(`generate_batch`), which takes no images, and prompts with images in batches of eight, padded, like lengths together.
llama.cpp has no server in its Python package that serves two requests at once, so the loop of its server is written here:
slots that are filled as they come free, one call a step for all of them, images by libmtmd.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.peers.install import LEVELS, PYTHON, ROOT, install
from ivl.cpu.kernels.features import machine_level

SIDES = ("ivl", "transformers", "llama")
TARGET = 1.5
NEEDED = {"ivl": "ivl{}", "transformers": "ivl-hf{}", "llama": "gguf{}"}


@dataclass(frozen=True)
class Ask:
    seed: int
    text: int
    """Tokens of text in the prompt."""
    images: int
    new: int


def asks(count: int) -> list[Ask]:
    chance = random.Random(0)
    return [
        Ask(i, chance.randint(20, 300), chance.choice((0, 0, 0, 1, 1, 2, 3)), chance.randint(16, 128)) for i in range(count)
    ]


def kind_of(side: str, size: str) -> str:
    if side == "llama":
        return "gguf-nano" if size == "nano" else "gguf-bf16"
    return NEEDED[side].format("-nano" if size == "nano" else "")


def run_side(side: str, size: str, count: int, threads: int) -> dict[str, Any]:
    python = PYTHON if side == "llama" else Path(sys.executable)
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "THP_MEM_ALLOC_ENABLE": str(int(side == "ivl"))}
    command = [python, "-m", "benchmarks.peers.serve", side, size, str(count), str(threads)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment, cwd=ROOT, check=True)
    return json.loads(done.stdout.strip().splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--sizes", nargs="+", choices=("nano", "1B"), default=["nano", "1B"])
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--level", choices=tuple(LEVELS), default=machine_level(), help="hold every side to this level")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "throughput.json")
    args = parser.parse_args()
    install(args.level)
    results: list[dict[str, Any]] = []
    for size in args.sizes:
        for side in args.sides:
            for kind in ("ivl-nano" if size == "nano" else "ivl", kind_of(side, size)):
                subprocess.run([sys.executable, "-m", "benchmarks.peers.files", kind], check=True, cwd=ROOT)
        rounds = [{s: run_side(s, size, args.requests, args.threads) for s in args.sides} for _ in range(args.rounds)]
        row: dict[str, Any] = {"size": size, "requests": args.requests}
        for side in args.sides:
            row[side] = median(r[side]["tokens"] / r[side]["seconds"] for r in rounds)
        peers = [row[side] for side in args.sides if side != "ivl"]
        row["ratio"] = row["ivl"] / max(peers) if peers and "ivl" in row else None
        results.append(row)
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(results, indent=2) + "\n")
    table = Table(title="New tokens a second, bfloat16")
    for column in ("model", "requests", "ivl", "transformers", "llama.cpp", "ratio", "target"):
        table.add_column(column, justify="left" if column == "model" else "right")
    for row in results:
        ratio = "-" if row["ratio"] is None else f"[{'green' if row['ratio'] >= TARGET else 'red'}]{row['ratio']:.2f}[/]"
        rates = [f"{row[side]:,.1f}" if side in row else "-" for side in SIDES]
        table.add_row(row["size"], str(row["requests"]), *rates, ratio, str(TARGET))
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
