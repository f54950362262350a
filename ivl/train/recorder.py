"""Logs of a run: metrics.jsonl, TensorBoard when installed, a live line on a terminal and plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch

from ivl.train.config import TrainConfig
from ivl.utils.jsonl import AppendLog, read_rows


@dataclass(frozen=True)
class StepResult:
    """One optimizer step, over all ranks."""

    step: int
    """Steps done, this one included."""
    figures: dict[str, float]
    """Loss, rate, gradient norm, the objective's figures, counts, pace and memory, by their names in metrics.jsonl."""
    ids: list[str]
    """Samples of this rank."""
    share: float
    """Share of the run that is done, 0 to 1."""


class Recorder:
    """Writes the figures of steps and evaluations, on the first rank only. Close it, or use it in a `with`."""

    def __init__(
        self,
        title: str,
        config: TrainConfig,
        *,
        directory: Path | None = None,
        step: int = 0,
        budgets: tuple[int, int] | None = None,
        on: bool = True,
    ) -> None:
        """Open the logs.

        Args:
            title: name of the run on the console.
            config: how often a line is printed, and what is logged.
            directory: where metrics.jsonl and tensorboard/ go; None writes to the console alone.
            step: steps done before; later lines of metrics.jsonl are dropped, for a resumed run writes them again.
            budgets: tokens and tiles of a full pack, of which the fill is logged.
            on: whether this rank writes.
        """
        self.title, self.budgets, self.log_samples = title, budgets, config.log_samples
        self.console = ConsoleLogger(title, config.num_steps, step, every=config.log_every, on=on)
        self.log, self.board = None, None
        if directory is not None and on:
            self.log = open_metrics(directory / "metrics.jsonl", step)
            self.board = TensorBoardLogger(directory / "tensorboard", step) if config.tensorboard else None

    def write(self, result: StepResult) -> dict[str, Any]:
        """Write the figures of a step and return them as a row."""
        row: dict[str, Any] = {"step": result.step, **result.figures}
        if self.budgets is not None:
            tokens, tiles = (row["packs"] * budget for budget in self.budgets)
            row |= {"fill": row["tokens"] / tokens, "tile_fill": row["tiles"] / tiles}
        self._log(row | ({"ids": result.ids} if self.log_samples else {}), "train")
        self.console.show(row, result.share)
        return row

    def write_evaluation(self, step: int, name: str, figures: Mapping[str, float]) -> None:
        """Write the figures of an evaluation after a step."""
        self._log({"step": step, "evaluation": name, **figures}, name)
        shown = "  ".join(f"{key} {value:.4f}" for key, value in figures.items())
        self.console.say(f"{self.title} step {step} {name}: {shown}")

    def sync(self) -> None:
        """Put metrics.jsonl on disk, before a checkpoint that counts on it."""
        if self.log is not None:
            self.log.sync()

    def close(self) -> None:
        """Close all logs."""
        self.console.close()
        for log in (self.log, self.board):
            if log is not None:
                log.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _log(self, row: dict[str, Any], prefix: str) -> None:
        if self.log is not None:
            self.log.append([row])
        if self.board is not None:
            self.board.write(row, prefix)


def open_metrics(path: Path, step: int) -> AppendLog:
    """Open metrics.jsonl to append to; lines beyond `step` and a last line that a crash cut short are dropped."""
    keep = 0
    for _, end, row in read_rows(path) if path.exists() else ():
        if row["step"] > step:
            break
        keep = end
    return AppendLog(path, keep)


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
            for name, value in row.items():
                if name != "step" and isinstance(value, (int, float)):
                    self.writer.add_scalar(f"{prefix}/{name}", value, row["step"])

    def close(self) -> None:
        """Flush and close the events file."""
        if self.writer is not None:
            self.writer.close()


class ConsoleLogger:
    """A live line on a terminal; elsewhere a plain line every `every` steps. Silent on other ranks."""

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
        step = f"{row['step']}/{self.num_steps}" if self.num_steps else row["step"]
        line = f"{self.title} step {step} {console_line(row, self._left(row['step'], share))}"
        if self.progress is not None:
            self.progress.update(self.task, completed=share, description=line)
        elif row["step"] % self.every == 0 or share >= 1:
            print(line, file=sys.stderr, flush=True)

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
    parts = [f"loss {row['loss']:.4f}", f"{hours}:{minutes:02}:{seconds:02} left"]
    parts += [f"lr {row['lr']:.2e}", f"grad {row['grad_norm']:.2f}"]
    parts += [f"{row['tokens_per_second']:,.0f} tok/s", f"{row['samples_per_second']:.1f} samples/s"]
    if "fill" in row:
        parts.append(f"fill {row['fill']:.0%}")
    return "  ".join((*parts, f"{row['memory_gb']:.1f} GB"))


def peak_memory_gb(device: torch.device) -> float:
    """Peak memory of this process: GPU memory on a GPU, resident memory elsewhere."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
