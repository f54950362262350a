"""From the command to the first token: `python -m benchmarks.startup [MODEL]`.

`ivl chat MODEL -p hi --max-new-tokens 1` and `python -c "import torch; print(...)"` take turns, files cached, each timed until
it writes; the difference of the medians is what ivl, the weights and the prompt cost. Without MODEL it is the 1B with random
weights and the real vocabulary.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time

from benchmarks.peers.install import FILES, ROOT

TARGET = 1.5
"""Seconds more than importing torch."""


def seconds(command: list[str]) -> float:
    """Until the first output that is no blank."""
    started, seconds = time.perf_counter(), None
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd=ROOT) as process:
        assert process.stdout is not None
        while chunk := os.read(process.stdout.fileno(), 4096):
            if seconds is None and chunk.strip():
                seconds = time.perf_counter() - started
    if process.returncode or seconds is None:
        raise SystemExit(
            f"{' '.join(command)} ended with code {process.returncode} and {'no' if seconds is None else 'some'} output"
        )
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("model", nargs="?", default=str(FILES / "ivl"))
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()
    if args.model == str(FILES / "ivl"):
        FILES.mkdir(parents=True, exist_ok=True)
        subprocess.run([sys.executable, "-m", "benchmarks.peers.files", "ivl"], check=True, cwd=ROOT)
    chat = [sys.executable, "-m", "ivl", "chat", args.model, "-p", "hi", "--max-new-tokens", "1"]
    torch = [sys.executable, "-c", "import torch; print(torch.__version__, flush=True)"]
    seconds(chat)  # files into the page cache
    times = [(seconds(torch), seconds(chat)) for _ in range(args.repeats)]
    imported, first = (statistics.median(column) for column in zip(*times, strict=True))
    print(f"import torch {imported:.2f} s, first token {first:.2f} s: {first - imported:.2f} s more (target {TARGET} s)")
    print("all: " + ", ".join(f"{chat - torch:.2f}" for torch, chat in times))


if __name__ == "__main__":
    main()
