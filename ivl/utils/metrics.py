"""Where the figures of a training run are shown: the console, with a live line on a terminal, TensorBoard, and trackers."""

from __future__ import annotations

import importlib
import math
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ivl.errors import InputError

SHOWN = {"accuracy": ("accuracy", ".1%"), "rewards/margin": ("margin", ".3f"), "rewards/accuracy": ("pairs right", ".0%")}
"""Figures of objectives on the console, with their names there and their forms."""
SETS_SHOWN = 4
"""Data sets whose losses are on the console; metrics.jsonl has all."""


class TensorBoardLogger:
    """TensorBoard events, or nothing when tensorboard is not installed."""

    def __init__(self, directory: Path, step: int = 0) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            self.writer = None
        else:
            self.writer = SummaryWriter(str(directory), purge_step=step + 1)

    def write(self, row: Mapping[str, Any], prefix: str = "train") -> None:
        """Add every number of a row as a scalar PREFIX/NAME."""
        if self.writer is not None:
            for name, value in _numbers(row, prefix).items():
                self.writer.add_scalar(name, value, row["step"])

    def close(self) -> None:
        """Flush and close the events file."""
        if self.writer is not None:
            self.writer.close()


class TrackerLogger:
    """A run of Weights & Biases (`wandb`), or of trackio, which has the same functions. Both read their own variables of the
    environment, such as WANDB_PROJECT and WANDB_MODE.

    Raises:
        InputError: if the package is not installed, or does not begin a run.
    """

    def __init__(self, package: str, title: str, directory: Path, about: Mapping[str, Any]) -> None:
        self.tracker = import_tracker(package)
        places = {"dir": str(directory)} if package == "wandb" else {}
        try:
            self.tracker.init(project=os.environ.get("WANDB_PROJECT", "ivl"), name=title, config=dict(about), **places)
        except Exception as error:  # of the network, a missing key, whatever the package raises
            raise InputError(f"--log-to {package}: no run could be begun ({str(error)[:200]})") from error

    def write(self, row: Mapping[str, Any], prefix: str = "train") -> None:
        """Log every number of a row as PREFIX/NAME."""
        self.tracker.log(_numbers(row, prefix), step=row["step"])

    def close(self) -> None:
        """End the run at the tracker."""
        self.tracker.finish()


def _numbers(row: Mapping[str, Any], prefix: str) -> dict[str, float]:
    return {f"{prefix}/{name}": n for name, n in row.items() if isinstance(n, (int, float)) and name != "step"}


def import_tracker(package: str) -> Any:
    """Import a tracker's package. Raises InputError with the command that installs it."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise InputError(f'--log-to {package} needs {error.name}: pip install "ivl[{package}]"') from error


class ConsoleLogger:
    """A plain line every `every` steps, and on a terminal a live line below. Silent on other ranks."""

    def __init__(self, title: str, num_steps: int | None, step: int, *, every: int = 1, on: bool = True) -> None:
        self.title, self.num_steps, self.first, self.every, self.on = title, num_steps, step, every, on
        self.began = time.monotonic()
        self.share_at_start: float | None = None
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

    def show(self, row: Mapping[str, Any], share: float) -> None:
        """Show the figures of a step; share is how much of the run is done, 0 to 1."""
        if not self.on:
            return
        # Without a number of steps the data decide: as many more as the share that is left says.
        steps = str(self.num_steps) if self.num_steps else f"~{math.ceil(row['step'] / max(share, 1e-9) - 1e-6)}"
        line = f"{self.title} step {row['step']}/{steps} {console_line(row, self._left(row['step'], share))}"
        if self.progress is not None:
            self.progress.update(self.task, completed=share, description=line)
        if row["step"] % self.every == 0 or share >= 1:
            self.say(line)

    def say(self, text: str) -> None:
        """Print a line that stays."""
        if not self.on:
            return
        if self.progress is None:
            print(text, file=sys.stderr, flush=True)
        else:
            self.progress.console.print(text, markup=False, highlight=False)

    def _left(self, step: int, share: float) -> float:
        """Estimate the seconds left from the pace since this process began."""
        done = step - self.first
        if self.share_at_start is None:
            self.share_at_start = share * self.first / step if step else 0.0
        gained = share - self.share_at_start
        return (time.monotonic() - self.began) * (1 - share) / gained if done and gained > 0 else 0.0

    def close(self) -> None:
        """Stop the live line."""
        if self.progress is not None:
            self.progress.stop()


def console_line(row: Mapping[str, Any], seconds_left: float) -> str:
    """Format the figures of one step as one line."""
    minutes, seconds = divmod(int(seconds_left), 60)
    hours, minutes = divmod(minutes, 60)
    parts = [f"epoch {row['epoch']:.2f}"] if "epoch" in row else []
    parts += [f"loss {row['loss']:.4f}{_by_data_set(row)}", f"{hours}:{minutes:02}:{seconds:02} left"]
    parts += [f"{text} {row[name]:{form}}" for name, (text, form) in SHOWN.items() if name in row]
    parts += [f"lr {row['lr']:.2e}", f"grad {row['grad_norm']:.2f}"]
    parts += [f"{row['tokens_per_second']:,.0f} tok/s", f"{row['samples_per_second']:.1f} samples/s"]
    if "fill" in row and row.get("samples") != row.get("packs", 0):  # a row a pack is not packed, and fills what it fills
        parts.append(f"fill {row['fill']:.0%}")
    return "  ".join((*parts, f"{row['memory_gb']:.1f} GB"))


def _by_data_set(row: Mapping[str, Any]) -> str:
    """The losses of the first data sets in brackets; nothing where there is only one, or the parts are terms of the loss."""
    losses = {name.removeprefix("loss/"): value for name, value in row.items() if name.startswith("loss/")}
    if not losses or "rewards/margin" in row:
        return ""
    shown = ", ".join(f"{name} {value:.3f}" for name, value in list(losses.items())[:SETS_SHOWN])
    return f" ({shown}{f' and {len(losses) - SETS_SHOWN} more' if len(losses) > SETS_SHOWN else ''})"
