"""The figures of a run: metrics.jsonl, the console, and boards such as TensorBoard."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ivl.train.config import TrainConfig
from ivl.utils.jsonl import AppendLog
from ivl.utils.metrics import ConsoleLogger, TensorBoardLogger, TrackerLogger


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
    """Writes the figures of steps and evaluations, on the first rank only, until it is closed."""

    def __init__(
        self,
        title: str,
        config: TrainConfig,
        *,
        directory: Path | None = None,
        step: int = 0,
        budgets: tuple[int, int] | None = None,
        epoch_samples: int | None = None,
        boards: Sequence[TensorBoardLogger | TrackerLogger] = (),
        on: bool = True,
    ) -> None:
        """Open the logs.

        Args:
            title: name of the run on the console.
            config: how often a line is printed, and what is logged.
            directory: where metrics.jsonl goes; None writes none.
            step: steps done before; later lines of metrics.jsonl are dropped, for a resumed run writes them again.
            budgets: tokens and tiles of a full pack, of which the fill is logged.
            epoch_samples: samples of an epoch, of which the share is logged.
            boards: get every figure, too, and are closed.
            on: whether this rank writes.
        """
        self.title, self.budgets, self.epoch_samples, self.log_samples = title, budgets, epoch_samples, config.log_samples
        self.console = ConsoleLogger(title, config.num_steps, step, every=config.log_every, on=on)
        self.log, self.boards = None, boards
        if directory is not None and on:
            self.log = AppendLog(directory / "metrics.jsonl")
            self.log.resume(b'{"step": ', lambda _, row: row["step"] <= step)

    def write(self, result: StepResult) -> dict[str, Any]:
        """Write the figures of a step and return them as a row."""
        row: dict[str, Any] = {"step": result.step, **result.figures}
        if self.budgets is not None:
            tokens, tiles = (row["packs"] * budget for budget in self.budgets)
            row |= {"fill": row["tokens"] / tokens, "tile_fill": row["tiles"] / tiles}
        if self.epoch_samples is not None:
            row["epoch"] = row["total_samples"] / self.epoch_samples
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
        for log in (self.log, *self.boards):
            if log is not None:
                log.close()

    def _log(self, row: dict[str, Any], prefix: str) -> None:
        if self.log is not None:
            self.log.append([row])
        for board in self.boards:
            board.write(row, prefix)
