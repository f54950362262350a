"""How soon a killed server is back: `python -m benchmarks.serve_restart [MODEL]`.

`ivl serve` is killed by signal 9 while it answers and started again, some times over. What a restart costs is from the start
until /ready says yes, less the seconds of loading by its own log; importing torch, timed beside it, is most of it. Without
MODEL it is nano with random weights.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from pathlib import Path

from benchmarks.serve_load import make_model
from benchmarks.startup import seconds

KEY = "a-key-for-benchmarks-1"
TARGET = 3.0
"""Seconds beside loading."""


def ready(directory: Path, port: int) -> tuple[subprocess.Popen[str], float, float]:
    """A server that takes requests, the seconds until it did, and those of them that loading took."""
    command = [sys.executable, "-m", "ivl", "serve", str(directory), "--port", str(port), "--names", "model"]
    started = time.perf_counter()
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, "IVL_API_KEYS": KEY})
    assert server.stderr is not None
    load, line = 0.0, {"event": ""}
    while line["event"] != "listening":
        line = json.loads(server.stderr.readline())
        load = line["seconds"] if line["event"] == "loaded" else load
    threading.Thread(target=server.stderr.read, daemon=True).start()
    request = urllib.request.Request(f"http://127.0.0.1:{port}/ready", headers={"Authorization": f"Bearer {KEY}"})
    assert urllib.request.urlopen(request).status == 200
    return server, time.perf_counter() - started, load


def occupy(port: int) -> None:
    """Send a long request, and do not wait for its answer."""
    body = {"model": "model", "prompt": "what?", "max_tokens": 1000, "ignore_eos": True}
    headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
    request = urllib.request.Request(f"http://127.0.0.1:{port}/v1/completions", json.dumps(body).encode(), headers)

    def send() -> None:
        with contextlib.suppress(OSError):  # the server is about to be killed
            urllib.request.urlopen(request)

    threading.Thread(target=send, daemon=True).start()
    time.sleep(0.2)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("model", nargs="?", type=Path)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--port", type=int, default=8447)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        directory = args.model or Path(folder) / "nano"
        if args.model is None:
            make_model(directory)
        imported, rows = [], []
        for _ in range(args.repeats + 1):
            imported.append(seconds([sys.executable, "-c", "import torch"]))
            server, whole, load = ready(directory, args.port)
            occupy(args.port)
            server.send_signal(signal.SIGKILL)
            server.wait()
            rows.append((whole, load))
    beside = [whole - load for whole, load in rows[1:]]  # the first start only fills the page cache
    print("ready after", ", ".join(f"{whole:.2f} s ({load:.2f} s loading)" for whole, load in rows[1:]))
    print(f"beside loading: median {statistics.median(beside):.2f} s, most {max(beside):.2f} s (target {TARGET} s)")
    print(f"importing torch alone: {statistics.median(imported[1:]):.2f} s")


if __name__ == "__main__":
    main()
