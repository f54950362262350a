"""One peer at one width in a process of its own: `python -m benchmarks.peers.worker PEER WIDTH THREADS STEPS RUNS TASK...`

Every task is warmed up once, then run RUNS times; one JSON line each. TASK `memory` runs a little of everything with the
whole model loaded, for the peak of memory.
"""

from __future__ import annotations

import importlib
import json
import resource
import sys
import time
from collections.abc import Callable
from typing import Any

CONTEXT = 300
"""Tokens of a prompt before replies are timed."""
SLOW = 4.0
"""A task that takes more seconds is run once a round."""


def main(peer: str, width: str, threads: int, steps: int, runs: int, tasks: list[str]) -> None:
    if peer in ("ivl", "transformers", "limits"):
        import torch

        torch.set_num_threads(threads)
    if peer == "limits":
        from benchmarks.worker import best, limits
        from ivl.cpu.kernels.features import at_least

        a = torch.randint(-127, 127, (4096, 4096), dtype=torch.int8)
        int8 = 2 * 4096**3 / best(lambda: torch._int_mm(a, a.T), 5) if at_least("avx512") else 0.0
        answer(**limits(), int8=int8)
        return
    started = time.perf_counter()
    side = importlib.import_module(f"benchmarks.peers.{peer}_side").Side(width)
    load = time.perf_counter() - started
    for task in tasks:
        if task == "memory":
            for run in (side.vision(1), side.prefill(CONTEXT), side.decode(1, CONTEXT, steps)):
                run()
            answer(task=task, peak_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, load=load)
            continue
        run = prepare(side, task, steps)
        slow = run() > SLOW
        answer(task=task, seconds=[run() for _ in range(1 if slow else runs)])


def prepare(side: Any, task: str, steps: int) -> Callable[[], float]:
    kind, _, number = task.rpartition(" ")
    if kind == "vision":
        return side.vision(int(number))
    if kind == "prefill":
        return side.prefill(int(number))
    return side.decode(int(number), CONTEXT, steps)


def answer(**values: object) -> None:
    print(json.dumps(values), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], *map(int, sys.argv[3:6]), sys.argv[6:])
