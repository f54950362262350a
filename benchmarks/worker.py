"""One side of one task in a process of its own: prepare, warm up, then one timed run per line read from stdin."""

from __future__ import annotations

import json
import resource
import sys
import time

import torch

WARM_UP = 2


def main(side: str, task: str, threads: str, decode_steps: str) -> None:
    torch.set_num_threads(int(threads))
    if side == "limits":
        answer(**limits())
        return
    from benchmarks.tasks import prepare

    run = prepare(side, task, int(decode_steps))
    for _ in range(1 if task == "train" else WARM_UP):
        run()
    answer(ready=True)
    for _ in sys.stdin:
        started = time.perf_counter()
        run()
        seconds = time.perf_counter() - started
        answer(seconds=seconds, peak_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


def answer(**values: object) -> None:
    print(json.dumps(values), flush=True)


def limits() -> dict[str, float]:
    """Best rate of bfloat16 products (FLOP/s) and of reading memory (bytes/s)."""
    rates = []
    for size in (1024, 2048, 4096):
        a, b = torch.randn(size, size).bfloat16(), torch.randn(size, size).bfloat16()
        out = torch.empty_like(a)
        rates += [2 * size**3 / best(lambda a=a, b=b, out=out: torch.mm(a, b.T, out=out))]
    memory = torch.ones(120_000_000, dtype=torch.int64)
    return {"flops": max(rates), "bytes": memory.nbytes / best(memory.sum)}


def best(function: object, repeats: int = 10) -> float:
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        function()  # type: ignore[operator]
        times.append(time.perf_counter() - started)
    return min(times)


if __name__ == "__main__":
    main(*sys.argv[1:])
