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
    """Best rate of products (FLOP/s; bfloat16, or float32 where the processor has no bfloat16) and of reading memory (bytes/s).

    The weight of a product is packed for it once, which is the fastest way that torch knows.
    """
    from ivl.cpu.kernels.features import multiplies_bfloat16

    rates, dtype = [], torch.bfloat16 if multiplies_bfloat16() else torch.float32
    for size in (1024, 2048, 4096):
        a, b = torch.randn(size, size).to(dtype), torch.randn(size, size).to(dtype)
        packed = torch.ops.mkldnn._reorder_linear_weight(b, size)
        products = (
            lambda a=a, b=b: a @ b.T,
            lambda a=a, b=packed: torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], ""),
        )
        rates += [2 * size**3 / best(product) for product in products]
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
