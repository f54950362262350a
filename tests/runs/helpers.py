"""What the tests of runs read from a run's directory, and runs in processes of their own."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from multiprocessing.context import ForkProcess
from pathlib import Path

import torch

from ivl.checkpoint import load_model
from ivl.runs.config import RunConfig


def rows(config: RunConfig) -> list[dict]:
    with Path(config.run_dir, "metrics.jsonl").open() as file:
        return [json.loads(line) for line in file]


def steps(config: RunConfig) -> list[tuple]:
    return [(r["step"], r["loss"], r["ids"]) for r in rows(config) if "evaluation" not in r]


def same_weights(a, b) -> bool:
    return all(p.equal(q) for p, q in zip(load_model(a).parameters(), load_model(b).parameters(), strict=True))


def snapshot(folder: Path) -> dict[str, str]:
    """Every name below a folder, with the hash of a file's content."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
        for path in sorted(folder.rglob("*"))
    }


def start(function: Callable[..., None], *args, log: Path) -> ForkProcess:
    """Call a function in a forked process as `ivl` would: errors of input are one line in the log."""
    process = multiprocessing.get_context("fork").Process(target=_call, args=(function, args, log))
    process.start()
    return process


def redirect_errors(log: Path) -> None:
    """Let this process write its errors into a file."""
    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), 2)
    sys.stderr = os.fdopen(2, "w", buffering=1)


def _call(function: Callable[..., None], args: tuple, log: Path) -> None:
    from ivl.errors import InputError

    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # Ray, in a test before, leaves a handler of its own
    torch.set_num_threads(1)
    redirect_errors(log)
    try:
        function(*args)
    except InputError as error:
        os.write(2, f"ivl train: {error}\n".encode())
        os._exit(1)
    except KeyboardInterrupt:
        os._exit(130)
