"""How the filter scales: the driver's share of the work, rows per second of a core, and memory of the search for duplicates.

`python -m benchmarks.filter_scale rows --rows 1000000 --workers 2 --ray local --before PATH` filters synthetic rows by the
heuristic chain in processes, on Ray and in an older tree (the last two where asked for), and compares the outputs.
`... near --texts 5000000` searches the sketches of synthetic long texts, a tenth of them near copies. They are drawn as hashes:
making them from texts takes a millisecond each.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parent.parent
OUTPUTS = ("verdicts.jsonl", "dropped.jsonl", "kept/rows.jsonl", "meta.json", "report.json")
PART, HASHES = 16_384, 64
RUN = """
import json, resource, sys, time
from ivl.filters.chain import load_chain
from ivl.filters.run import FilterOptions, run
rows, out, workers, ray = sys.argv[1:]
options = FilterOptions(workers=int(workers), ray=ray or None)
chain = load_chain("heuristic")
import torch.utils.data
started, cpu = time.perf_counter(), time.process_time()
report = run(chain, rows, out, options)
seconds, driver = time.perf_counter() - started, time.process_time() - cpu
children = resource.getrusage(resource.RUSAGE_CHILDREN)
print(json.dumps({"seconds": seconds, "driver_cpu": driver, "workers_cpu": children.ru_utime + children.ru_stime,
                  "driver_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, "kept": report["kept"]}))
"""


def write_rows(path: Path, count: int) -> None:
    """Questions with short answers, a fifth with long ones; 3% copies, 2% with an edit, some loops and broken rows."""
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghiklmnoprstuvw", k=rng.randint(2, 9))) for _ in range(20_000)]
    earlier: list[str] = []
    with path.open("w") as file:
        for number in range(count):
            chance = rng.random()
            if chance < 0.05 and earlier:
                answer = rng.choice(earlier)
                answer = answer if chance < 0.03 else answer.replace(" ", " so ", 1)
            else:
                size = rng.randint(40, 80) if chance < 0.25 else rng.randint(1, 8)
                answer = " ".join(rng.choices(words, k=size)).capitalize() + "."
                answer = answer * 20 if chance > 0.998 else answer
                if len(earlier) < 10_000:
                    earlier.append(answer)
            talk = [{"from": "human", "value": f"What is {rng.choice(words)}?"}, {"from": "gpt", "value": answer}]
            file.write(json.dumps({"id": number, "conversations": talk}) if chance < 0.999 else '{"broken": ')
            file.write("\n")


def filtered(tree: Path, rows: Path, out: Path, workers: int, ray: str) -> dict[str, Any]:
    """Run the filter of a tree in a process of its own; returns its figures, and a hash of each output."""
    environment = os.environ | {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", RUN, str(rows), str(out), str(workers), ray]
    done = subprocess.run(command, env=environment, cwd=tree, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    figures = json.loads(done.stdout.splitlines()[-1])
    if ray:  # its workers are not our children; they count as busy all the time
        figures["workers_cpu"] = workers * figures["seconds"]
    figures["cpu"] = figures["driver_cpu"] + figures["workers_cpu"]
    figures["hashes"] = {name: hashlib.sha256((out / name).read_bytes()).hexdigest()[:12] for name in OUTPUTS}
    return figures


def rows_command(args: argparse.Namespace, folder: Path) -> None:
    rows = folder / "rows.jsonl"
    write_rows(rows, args.rows)
    ways = {"now": (ROOT, "")}
    ways |= {"Ray": (ROOT, args.ray)} if args.ray else {}
    ways |= {"before": (args.before, "")} if args.before else {}
    hashes = []
    for name, (tree, ray) in ways.items():
        figures = filtered(tree, rows, folder / name, args.workers, ray)
        cpu = figures["cpu"]
        print(
            f"{name}: {args.rows:,} rows in {figures['seconds']:.0f} s, {args.rows / cpu:,.0f} rows a second and core; the "
            f"driver {figures['driver_cpu']:.1f} of {cpu:.1f} s CPU ({figures['driver_cpu'] / cpu:.1%}), "
            f"{figures['driver_mb']:.0f} MB; {figures['kept']:,} kept",
            flush=True,
        )
        hashes.append(figures["hashes"])
    print("the outputs are the same" if all(each == hashes[0] for each in hashes) else f"the outputs differ: {hashes}")


class Sketches:
    """Signatures of long texts without media; every tenth is a copy of an earlier one of its part with 8 hashes changed."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __call__(self, part: int) -> Iterator[tuple[int, bytes]]:
        rng = np.random.default_rng(part)
        size = min(PART, self.count - part * PART)
        hashes = rng.integers(0, 1 << 32, (size, HASHES), dtype=np.uint32)
        for row in range(10, size, 10):
            hashes[row] = hashes[row - 5]
            hashes[row, :8] ^= 1
        for row in range(size):
            data = hashes[row].tobytes()
            yield part * PART + row, bytes(8) + data[32:48] + bytes(20) + data


def near_command(args: argparse.Namespace, folder: Path) -> None:
    from functools import partial

    from ivl.filters.duplicates import Duplicates, find_duplicates
    from ivl.filters.run import _in_processes

    started, cpu = time.perf_counter(), time.process_time()
    parts = -(-args.texts // PART)
    found = find_duplicates(Duplicates(), Sketches(args.texts), parts, folder, partial(_in_processes, args.workers))
    seconds, driver = time.perf_counter() - started, time.process_time() - cpu
    planted = sum(len(range(10, min(PART, args.texts - part * PART), 10)) for part in range(parts))
    own, children = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    print(
        f"{args.texts:,} texts in {seconds:.0f} s, {args.workers} processes; {found.shape[1]:,} of {planted:,} copies found, "
        f"{int((found[0] - found[1] == 5).sum()):,} beside their originals; driver {driver:.0f} s CPU, processes "
        f"{children.ru_utime + children.ru_stime:.0f} s; at most {own.ru_maxrss / 1024:.0f} MB in the driver, "
        f"{children.ru_maxrss / 1024:.0f} MB in a process, mapped files included"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("what", choices=("rows", "near"))
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--texts", type=int, default=5_000_000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--ray", default="", help="address of a cluster, or local: run on it, too")
    parser.add_argument("--before", type=Path, help="an older tree to compare with")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        (rows_command if args.what == "rows" else near_command)(args, Path(folder))


if __name__ == "__main__":
    main()
