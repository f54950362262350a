"""Speed and memory beside transformers, llama.cpp and OpenVINO: `python -m benchmarks.against_peers`.

The first run installs the peers (`benchmarks/peers/install.py`) and writes their model files. Then, round by round, every
peer at every width gets a process of its own, one after the other: load, warm up, some runs of each task. Figures are
medians over all rounds; ratios are to the best peer, above 1 is faster here; shares are of the limits measured in the run.
`--level avx2` holds every side to AVX2 (docs/cpu.md): "16 bit" then says how weights are stored, and all multiply in float32.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.machine import processor_name
from benchmarks.peers.install import FILES, LEVELS, PYTHON, ROOT, install
from benchmarks.tasks import CONTEXT, decoder_weights, tile_flops, tokens_flops
from ivl.config import ModelConfig, published_config
from ivl.cpu.kernels.features import machine_level

SIZE = "1B"
PEERS = ("transformers", "llama", "openvino")
NAMES = {"ivl": "ivl", "transformers": "transformers", "llama": "llama.cpp", "openvino": "OpenVINO"}
BITS = {"bf16": 16, "int8": 8, "int4": 4.5}
"""Of a weight; the four bits come in groups with a scale."""
WIDTHS = {"transformers": ("bf16",), "llama": tuple(BITS), "openvino": (*BITS, "w8a8"), "ivl": (*BITS, "w8a8")}
KINDS = {
    "ivl": {"bf16": "ivl", "int8": "ivl-int8", "int4": "ivl-int4", "w8a8": "ivl-w8a8"},
    "llama": {width: f"gguf-{width}" for width in BITS},
    "openvino": {**{width: f"ov-{width}" for width in BITS}, "w8a8": "ov-vision-w8a8"},
    "transformers": {"bf16": ""},
}
"""Model files by peer and width."""
DECODE_STEPS = 16


@dataclass(frozen=True, kw_only=True)
class Task:
    name: str
    width: str
    target: float | None
    """Wanted ratio to the best peer; for memory, the most of the leanest peer's."""
    unit: str
    per_run: float = 0.0
    flops: float = 0.0
    bytes: float = 0.0


def all_tasks(config: ModelConfig, steps: int) -> list[Task]:
    tile, d = tile_flops(config), config.decoder
    found = [
        Task(name=f"vision {n}", width=width, target=1.0, unit="tiles/s", per_run=n, flops=n * tile)
        for width in ("bf16", "w8a8")
        for n in (1, 7)
    ]
    for width, bits in BITS.items():
        target = 1.0 if width == "bf16" else None
        for n in (300, 1850):
            flops = tokens_flops(config, n, logits=1)
            found.append(Task(name=f"prefill {n}", width=width, target=target, unit="tok/s", per_run=n, flops=flops))
        weights = (decoder_weights(config) + d.width * d.vocab_size) * bits / 8
        for batch, target in ((1, {"bf16": 1.0, "int8": 1.3, "int4": 1.1}[width]), (8, 1.0)):
            past = batch * CONTEXT * d.num_layers * 2 * d.num_kv_heads * d.head_dim * 2
            found.append(
                Task(name=f"decode {batch}", width=width, target=target, unit="tok/s", per_run=batch * steps,
                     bytes=steps * (weights + past))
            )  # fmt: skip
        found.append(Task(name="memory", width=width, target=1.1, unit="GB"))
    return found


def files(peer: str, width: str) -> str | None:
    """What is needed there and cannot be made, or None."""
    kind = KINDS[peer][width]
    needed = [kind, "ov-vision"] if peer == "openvino" else ["gguf-bf16", kind] if peer == "llama" else [kind]
    for name in filter(None, needed):
        if name.startswith("ov") and not name.startswith("ov-vision"):
            make("qwen2")
        if not make(name):
            return name
    return None


def make(kind: str) -> bool:
    if (FILES / kind).exists():
        return True
    FILES.mkdir(parents=True, exist_ok=True)
    python = PYTHON if kind.startswith(("ov", "qwen2")) or kind in ("gguf-int8", "gguf-int4") else sys.executable
    if kind.startswith("gguf"):
        make("ivl")
    return subprocess.run([python, "-m", "benchmarks.peers.files", kind], check=False, cwd=ROOT).returncode == 0


def work(peer: str, width: str, tasks: list[str], args: argparse.Namespace, runs: int) -> list[dict[str, Any]]:
    """The answers of one process; a peer that fails is said so and has no figures."""
    python = PYTHON if peer in ("openvino", "llama") else sys.executable
    command = [*shlex.split(args.prefix), str(python), "-m", "benchmarks.peers.worker", peer, width, str(args.threads)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(args.threads), "TRANSFORMERS_VERBOSITY": "error"}
    # ivl asks torch for huge pages when it is imported first; transformers must not get that from our import.
    environment["THP_MEM_ALLOC_ENABLE"] = "1" if peer == "ivl" else "0"
    done = subprocess.run(
        [*command, str(args.steps), str(runs), *tasks], capture_output=True, text=True, env=environment, cwd=ROOT, check=False
    )
    if done.returncode:
        print(f"{peer} {width}: ended with code {done.returncode}\n{done.stderr[-2000:]}", file=sys.stderr)
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def measure(tasks: list[Task], args: argparse.Namespace) -> tuple[dict[str, Any], dict[str, float]]:
    """{task and width: {peer: seconds or bytes}} and the limits: the machine's better moments."""
    times: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    limits: dict[str, float] = defaultdict(float)
    sides = [("ivl", w) for w in WIDTHS["ivl"]] + [(p, w) for p in PEERS for w in WIDTHS[p]]
    sides = [(p, w) for p, w in sides if not args.only or p in args.only]
    wanted = {(p, w): [t.name for t in tasks if t.width == w and t.name != "memory"] for p, w in sides}
    if any("ivl-" in str(files(p, w)) for p, w in sides if wanted[p, w]):
        print("ivl: no quantized model could be made, those rows have no figure of ours", file=sys.stderr)
    for number in range(args.rounds):
        for name, value in work("limits", "", [], args, 0)[0].items():
            limits[name] = max(limits[name], value)
        for peer, width in sorted(sides, key=lambda side: list(BITS).index(side[1]) if side[1] in BITS else 9):
            if not wanted[peer, width] or files(peer, width) is not None:
                continue
            for result in work(peer, width, wanted[peer, width], args, args.runs):
                times[f"{result['task']} {width}"][peer] += result["seconds"]
                median = statistics.median(result["seconds"])
                print(f"round {number + 1}: {NAMES[peer]:13} {width:5} {result['task']:13} {median:7.3f} s", flush=True)
    for task in (t for t in tasks if t.name == "memory"):
        for peer in (p for p, w in sides if w == task.width and files(p, w) is None):
            for result in work(peer, task.width, ["memory"], args, 0):
                times[f"memory {task.width}"][peer].append(result["peak_bytes"])
    return {key: dict(value) for key, value in times.items()}, dict(limits)


def rows(tasks: list[Task], times: dict[str, Any], limits: dict[str, float]) -> list[dict[str, Any]]:
    found = []
    for task in tasks:
        medians = {peer: statistics.median(values) for peer, values in times.get(f"{task.name} {task.width}", {}).items()}
        peers = {peer: value for peer, value in medians.items() if peer != "ivl"}
        best = min(peers, key=lambda peer: peers[peer]) if peers else None
        ours = medians.get("ivl")
        row: dict[str, Any] = {"task": task.name, "width": task.width, "unit": task.unit, "target": task.target, "best": best}
        if task.name == "memory":
            row |= {"rates": {peer: value / 1e9 for peer, value in medians.items()}}
            row |= {"ratio": ours / peers[best] if ours and best else None, "limit": None, "share": None}
            row["good"] = row["ratio"] is not None and row["ratio"] <= task.target
        else:
            limit = least_seconds(task, limits)
            row |= {"rates": {peer: task.per_run / value for peer, value in medians.items()}}
            row |= {"ratio": peers[best] / ours if ours and best else None, "limit": task.per_run / limit}
            row["share"] = {peer: limit / value for peer, value in medians.items()}
            row["good"] = row["ratio"] is not None and (task.target is None or row["ratio"] >= task.target)
        found.append(row)
    return found


def least_seconds(task: Task, limits: dict[str, float]) -> float:
    """What arithmetic and reading of one run take at best. Narrow weights may be multiplied in bytes."""
    rate = limits["flops"] if task.width == "bf16" else max(limits["flops"], limits["int8"])
    return max(task.flops / rate, task.bytes / limits["bytes"])


def report(found: list[dict[str, Any]], limits: dict[str, float], level: str) -> Table:
    caption = (
        f"limits in this run: {limits['flops'] / 1e12:.2f} TFLOP/s, {limits['int8'] / 1e12:.2f} Top/s int8, "
        f"{limits['bytes'] / 1e9:.1f} GB/s read; shares of it in brackets; the memory ratio is ours to the leanest peer's"
    )
    table = Table(title=f"InternVL2.5-{SIZE} shape, random weights; {processor_name()}, level {level}", caption=caption)
    for column in ("task", "width", *NAMES.values(), "unit", "ratio", "target"):
        table.add_column(column, justify="left" if column in ("task", "width", "unit") else "right")
    for row in found:
        cells = []
        for peer in NAMES:
            rate = row["rates"].get(peer)
            share = f" ({row['share'][peer]:.0%})" if rate is not None and row["share"] else ""
            cells.append("-" if rate is None else f"{number(rate)}{share}")
        colour = "green" if row["good"] else "red"
        ratio = "-" if row["ratio"] is None else f"[{colour}]{row['ratio']:.2f}[/]"
        target = "-" if row["target"] is None else f"{row['target']:.1f}"
        table.add_row(row["task"], row["width"], *cells, row["unit"], ratio, target)
    return table


def number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}" if value >= 10 else f"{value:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="one round of 3 runs instead of 3 rounds: noisier")
    parser.add_argument("--tasks", nargs="+", metavar="WORD", help="only rows whose `task width` contains one of these")
    parser.add_argument("--only", nargs="+", choices=tuple(NAMES), help="only these sides")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--level", choices=tuple(LEVELS), default=machine_level(), help="hold every side to this level")
    parser.add_argument("--prefix", default="", metavar="COMMAND", help="put before every process, such as `taskset -c 0,1`")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "against_peers.json")
    args = parser.parse_args()
    args.rounds, args.runs, args.steps = (1, 3, DECODE_STEPS) if args.quick else (3, 3, DECODE_STEPS)
    install(args.level)
    tasks = all_tasks(published_config(SIZE), args.steps)
    tasks = [t for t in tasks if any(word in f"{t.name} {t.width}" for word in args.tasks or [""])]
    times, limits = measure(tasks, args)
    found = rows(tasks, times, limits)
    Console(width=140).print(report(found, limits, args.level))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    about = {"processor": processor_name(), "level": args.level, "limits": limits}
    args.out.write_text(json.dumps(about | {"times": times, "rows": found}, indent=2) + "\n")
    print(f"written to {args.out}")


if __name__ == "__main__":
    main()
