"""Speed and memory beside transformers: `python -m benchmarks.against_transformers`, or `make bench`.

Every task runs on both sides in fresh processes that take turns, so that drift of the machine meets both. Ratios are of
medians: theirs over ours, above 1 is faster here. Peak memory is the most each process ever held resident.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.partner import Partner
from benchmarks.tasks import DECODE_STEPS, SIZE, Task, tasks
from ivl.config import published_config

SIDES = ("ours", "theirs")


def started(side: str, task: str, threads: int, decode_steps: int) -> Partner:
    environment = {
        "OMP_NUM_THREADS": str(threads), "TRANSFORMERS_VERBOSITY": "error",
        # ivl asks torch for huge pages when it is imported first; their side must not get that from our import.
        "THP_MEM_ALLOC_ENABLE": "0" if side == "theirs" else "1",
    }  # fmt: skip
    return Partner("-m", "benchmarks.worker", side, task, str(threads), str(decode_steps), environment=environment)


Runs = list[dict[str, dict[str, Any]]]


def together(task: Task, threads: int, repeats: int, decode_steps: int) -> Runs:
    """Both sides stay loaded and run by turns."""
    workers: dict[str, Partner] = {}
    try:
        for side in SIDES:  # one after the other: building both at once would need both peaks
            workers[side] = started(side, task.name, threads, decode_steps)
            workers[side].answer()
        return [{side: workers[side].run() for side in SIDES} for _ in range(repeats)]
    finally:
        for worker in workers.values():
            worker.close()


def in_turns(task: Task, threads: int, repeats: int, decode_steps: int, runs_each: int = 3) -> Runs:
    """One side is loaded at a time, for three runs: for tasks whose memory would not hold both."""
    runs: Runs = []
    for _ in range(-(-repeats // runs_each)):
        turn: dict[str, list[dict[str, Any]]] = {}
        for side in SIDES:
            worker = started(side, task.name, threads, decode_steps)
            try:
                worker.answer()
                turn[side] = [worker.run() for _ in range(runs_each)]
            finally:
                worker.close()
        runs += [{side: turn[side][i] for side in SIDES} for i in range(runs_each)]
    return runs


def measure(task: Task, threads: int, repeats: int, decode_steps: int) -> dict[str, Any]:
    runs = (in_turns if task.alone else together)(task, threads, repeats, decode_steps)
    result: dict[str, Any] = {"task": task.name, "target": task.target, "unit": task.unit}
    for side in SIDES:
        seconds = [run[side]["seconds"] for run in runs]
        result[side] = {
            "seconds": statistics.median(seconds),
            "rate": task.per_run / statistics.median(seconds),
            "all_seconds": seconds,
            "peak_bytes": runs[-1][side]["peak_bytes"],
        }
    result["ratio"] = result["theirs"]["seconds"] / result["ours"]["seconds"]
    return result


def measure_limits(threads: int) -> dict[str, float]:
    worker = started("limits", "", threads, 0)
    try:
        return worker.answer()
    finally:
        worker.close()


def share(task: Task, seconds: float, limits: dict[str, float]) -> float:
    """How much of the run the machine's limit explains."""
    return max(task.flops / limits["flops"], task.bytes / limits["bytes"]) / seconds


def report(results: list[dict[str, Any]], limits: dict[str, float]) -> Table:
    caption = f"limits in this run: {limits['flops'] / 1e12:.2f} TFLOP/s bfloat16, {limits['bytes'] / 1e9:.1f} GB/s read"
    table = Table(title=f"InternVL2.5-{SIZE}, random weights, bfloat16", caption=caption)
    for column in ("task", "ours", "theirs", "unit", "ratio", "target", "ours of limit", "peak GB ours", "theirs"):
        table.add_column(column, justify="left" if column in ("task", "unit") else "right")
    for r in results:
        good, lean = r["ratio"] >= r["target"], r["ours"]["peak_bytes"] <= r["theirs"]["peak_bytes"]
        peaks = [f"{r[side]['peak_bytes'] / 1e9:.2f}" for side in SIDES]
        table.add_row(
            r["task"], f"{r['ours']['rate']:.2f}", f"{r['theirs']['rate']:.2f}", r["unit"],
            f"[{'green' if good else 'red'}]{r['ratio']:.2f}[/]", f"{r['target']:.1f}", f"{r['share_of_limit']:.0%}",
            f"[{'green' if lean else 'red'}]{peaks[0]}[/]", peaks[1],
        )  # fmt: skip
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="3 repeats instead of 9: minutes less, noisier")
    parser.add_argument("--tasks", nargs="+", metavar="WORD", help="only tasks whose name contains one of these words")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("runs/benchmark.json"))
    args = parser.parse_args()
    repeats, decode_steps = (3, DECODE_STEPS // 2) if args.quick else (9, DECODE_STEPS)
    chosen = [t for t in tasks(published_config(SIZE), decode_steps) if any(w in t.name for w in args.tasks or [""])]
    console, results = Console(width=128), []
    limits = measure_limits(args.threads)
    for task in chosen:
        result = measure(task, args.threads, min(repeats, 5) if task.name == "train" else repeats, decode_steps)
        results.append(result)
        console.print(f"{task.name}: {result['ratio']:.2f}x")
    # The machine may have moved meanwhile: its better moment is the limit.
    again = measure_limits(args.threads)
    limits = {name: max(limits[name], again[name]) for name in limits}
    for task, result in zip(chosen, results, strict=True):
        result["share_of_limit"] = share(task, result["ours"]["seconds"], limits)
    console.print(report(results, limits))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    machine = {"processor": platform.processor() or platform.machine(), "threads": args.threads}
    args.out.write_text(json.dumps({"machine": machine, "limits": limits, "results": results}, indent=2) + "\n")
    console.print(f"written to {args.out}")


if __name__ == "__main__":
    main()
