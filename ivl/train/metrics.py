"""Where numbers go: metrics.jsonl always, TensorBoard when installed, a live line on a terminal, plain lines elsewhere."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import torch


class MetricsLog:
    """metrics.jsonl: one object per step, appended and never repeated.

    Opening at `step` drops lines beyond it and a last line that a crash cut short: a resumed run writes them again.
    """

    def __init__(self, path: Path, step: int = 0) -> None:
        lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
        kept = [line for line in lines if line.endswith(b"\n") and json.loads(line)["step"] <= step]
        if len(kept) < len(lines):
            temp = path.with_suffix(".tmp")
            temp.write_bytes(b"".join(kept))
            temp.replace(path)
        self.file = path.open("a", encoding="utf-8")

    def write(self, row: dict) -> None:
        self.file.write(json.dumps(row) + "\n")
        self.file.flush()

    def sync(self) -> None:
        """On disk before a checkpoint that counts on it."""
        os.fsync(self.file.fileno())

    def close(self) -> None:
        self.file.close()


class Board:
    """TensorBoard events, or nothing when tensorboard is not installed."""

    def __init__(self, directory: Path, step: int = 0) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            self.writer = None
        else:
            self.writer = SummaryWriter(str(directory), purge_step=step + 1)

    def write(self, row: dict, prefix: str = "train") -> None:
        if self.writer is not None:
            for name, value in row.items():
                if name != "step" and isinstance(value, (int, float)):
                    self.writer.add_scalar(f"{prefix}/{name}", value, row["step"])

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()


class Screen:
    """A live line on a terminal; a plain line every `every` steps otherwise. Silent on other ranks."""

    def __init__(self, title: str, num_steps: int | None, step: int, *, every: int = 1, on: bool = True) -> None:
        self.title, self.num_steps, self.first, self.every, self.on = title, num_steps, step, every, on
        self.began = time.monotonic()
        self.progress = None
        if on and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn
            from rich.table import Column

            console = Console(stderr=True)
            figures = TextColumn("{task.description}", table_column=Column(no_wrap=True, overflow="ellipsis"))
            bar = (BarColumn(12),) if console.width > 140 else ()
            self.progress = Progress(*bar, figures, console=console)
            self.progress.start()
            self.task = self.progress.add_task(title, total=1.0)

    def show(self, row: dict, share: float) -> None:
        """share: how much of the run is done, 0 to 1."""
        if not self.on:
            return
        step = f"{row['step']}/{self.num_steps}" if self.num_steps else row["step"]
        line = f"{self.title} step {step} {describe(row, self._left(row['step'], share))}"
        if self.progress is not None:
            self.progress.update(self.task, completed=share, description=line)
        elif row["step"] % self.every == 0 or share >= 1:
            print(line, file=sys.stderr, flush=True)

    def say(self, text: str) -> None:
        if self.on:
            print(text, file=sys.stderr, flush=True) if self.progress is None else self.progress.console.print(
                text, markup=False, highlight=False
            )

    def _left(self, step: int, share: float) -> float:
        done = step - self.first
        if not hasattr(self, "share_at_start"):
            self.share_at_start = share * self.first / step if step else 0.0
        gained = share - self.share_at_start
        return (time.monotonic() - self.began) * (1 - share) / gained if done and gained > 0 else 0.0

    def close(self) -> None:
        if self.progress is not None:
            self.progress.stop()


def describe(row: dict, seconds_left: float) -> str:
    """The figures of one step in one line."""
    minutes, seconds = divmod(int(seconds_left), 60)
    hours, minutes = divmod(minutes, 60)
    parts = [f"loss {row['loss']:.4f}", f"{hours}:{minutes:02}:{seconds:02} left"]
    parts += [f"lr {row['lr']:.2e}", f"grad {row['grad_norm']:.2f}"]
    parts += [f"{row['tokens_per_second']:,.0f} tok/s", f"{row['samples_per_second']:.1f} samples/s"]
    if "fill" in row:
        parts.append(f"fill {row['fill']:.0%}")
    return "  ".join((*parts, f"{row['memory_gb']:.1f} GB"))


def peak_memory_gb(device: torch.device) -> float:
    """Peak of this process: GPU memory on a GPU, resident memory else."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
