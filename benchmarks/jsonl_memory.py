"""Memory of the workers that encode from a jsonl of millions of lines, and how soon its first rows are there.

    python -m benchmarks.jsonl_memory --rows 5000000

The loader draws random rows, four workers read and encode them. Their resident memory is set beside that of workers that
do the same with a thousand lines. Resident memory counts what workers share (the index, mapped from its file) once for
each; the proportional figure (PSS) divides it among them. Every measurement is a process of its own.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import tempfile
import time
from pathlib import Path
from typing import Literal

import tyro

from ivl.data.config import DataConfig
from ivl.data.loader import Loader
from tests.helpers.mixtures import processor, turns

MB = 1 << 20


def write_lines(path: Path, rows: int) -> Path:
    answers = [json.dumps({"conversations": turns("what is this", "a red circle " * (1 + n % 20))})[1:] for n in range(97)]
    with path.open("w") as file:
        for n in range(rows):
            file.write(f'{{"id": {n}, {answers[n % 97]}\n')
    return path


def memory_of(pid: int | None) -> dict[str, float]:
    """Rss and Pss of a process in MB."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return {line.split(":")[0]: round(int(line.split()[1]) / 1024, 1) for line in lines if line.startswith(("Rss", "Pss:"))}


def measure(path: Path, start_method: Literal["fork", "spawn"], num_workers: int, draws: int, out: Path) -> None:
    began = time.monotonic()
    config = DataConfig(mixture=str(path), num_workers=num_workers, start_method=start_method)
    loader = Loader(config, processor(), seed=0)
    opened = time.monotonic() - began
    seen = 0
    first = workers = []
    for batch in loader:
        if not seen:
            first = time.monotonic() - began
        seen += len(batch.ids)
        if seen >= draws:
            workers = [memory for each in multiprocessing.active_children() if (memory := memory_of(each.pid))]
            break
    figures = {
        "open_s": opened, "first_batch_s": first, "rows_read": seen,
        "rss_mb": [each["Rss"] for each in workers], "pss_mb": [each["Pss"] for each in workers],
    }  # fmt: skip
    out.write_text(json.dumps(figures))


def run(path: Path, start_method: Literal["fork", "spawn"], num_workers: int, draws: int) -> dict:
    out = path.with_suffix(".figures")
    arguments = (path, start_method, num_workers, draws, out)
    process = multiprocessing.get_context("spawn").Process(target=measure, args=arguments)
    process.start()
    process.join()
    return json.loads(out.read_text())


def main(rows: int = 5_000_000, num_workers: int = 4, draws: int = 40_000) -> None:
    """Print the figures for forked and for spawned workers.

    Args:
        rows: Lines of the file.
        num_workers: Processes that encode.
        draws: Random rows read before memory is looked at.
    """
    with tempfile.TemporaryDirectory() as name:
        path = write_lines(Path(name) / "rows.jsonl", rows)
        few = write_lines(Path(name) / "few.jsonl", 1000)
        print(f"{rows:,} lines, {path.stat().st_size / MB:,.0f} MB; {draws:,} random rows by {num_workers} workers")
        index = path.with_name(f".{path.name}.ivl-rows")
        for start_method in ("fork", "spawn"):
            idle = run(few, start_method, num_workers, 1000)
            index.unlink(missing_ok=True)
            without = run(path, start_method, num_workers, draws)
            size = os.stat(index).st_size / MB  # noqa: PTH116
            cached = run(path, start_method, num_workers, draws)
            print(f"{start_method}: rss of workers {cached['rss_mb']} MB, pss {cached['pss_mb']} MB")
            print(f"  of workers on 1,000 lines: rss {idle['rss_mb']} MB, pss {idle['pss_mb']} MB")
            over = [max(each["rss_mb"]) - min(idle["rss_mb"]) for each in (cached, without)]
            print(f"  over these: {over[0]:.1f} MB at most, {over[1]:.1f} MB where the index was built in the same run")
            print(f"  opened and first batch without the index: {without['open_s']:.2f} s, {without['first_batch_s']:.2f} s")
            print(f"  with the index of {size:.0f} MB: {cached['open_s']:.2f} s, {cached['first_batch_s']:.2f} s")


if __name__ == "__main__":
    tyro.cli(main)
