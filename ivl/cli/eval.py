"""`ivl eval`: score a model on a task."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from ivl.api import Dtype
from ivl.errors import InputError

if TYPE_CHECKING:
    from ivl.evaluation.run import Progress


def evaluate(args: list[str]) -> None:
    tyro.cli(run, prog="ivl eval", args=args)


def run(
    model: tyro.conf.Positional[Annotated[str | None, tyro.conf.arg(metavar="MODEL")]] = None,
    /,
    *,
    task: str = "easy-vqa",
    limit: int | None = None,
    out: Path | None = None,
    predictions: Path | None = None,
    fresh: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False,
    batch_size: int = 512,
    max_tiles: int | None = None,
    dtype: Dtype = "auto",
    device: str = "auto",
    list_tasks: Annotated[bool, tyro.conf.arg(name="list"), tyro.conf.FlagCreatePairsOff] = False,
) -> None:
    """Score a model on a benchmark, with a 95% confidence interval (Wilson).

    Predictions are saved as they come; the same command continues a run that was interrupted.

    Args:
        model: A model directory or hub id.
        task: What to measure; --list shows all.
        limit: Only the first so many examples.
        out: Write the report (task, metric, value, ci95, n, by_type, model, versions) to this JSON file.
        predictions: Where predictions are kept; by default beside --out, or under runs/eval.
        fresh: Forget predictions of an earlier run.
        batch_size: Most questions answered, and saved, at a time; fewer while the model is slow.
        max_tiles: Tiles an image may be cut into; by default what the checkpoint says.
        dtype: Type of the weights; auto is the stored one where the processor computes in it well.
        device: cpu, cuda, or auto.
        list_tasks: Show the tasks and stop.
    """
    from ivl.evaluation.tasks import TASKS, find

    if list_tasks:
        print("\n".join(f"{name:20}{text}" for name, (_, text) in TASKS.items()))
        return
    chosen = find(task)
    if model is None:
        raise InputError("name a model to evaluate: ivl eval MODEL --task easy-vqa")
    if (limit is not None and limit < 1) or batch_size < 1:
        raise InputError(f"--limit and --batch-size must be at least 1, got {limit} and {batch_size}")
    if predictions is None:
        default = Path("runs/eval") / f"{Path(model).name or 'model'}-{chosen.name}.jsonl"
        predictions = out.with_suffix(".predictions.jsonl") if out else default
    if fresh:
        predictions.unlink(missing_ok=True)

    from ivl.api import load
    from ivl.evaluation.run import evaluate, write_report
    from ivl.model.checkpoint import resolve
    from ivl.model.checkpoint.files import fingerprint

    loaded = load(model, dtype=dtype, device=device, max_tiles=max_tiles)
    directory = resolve(model)
    settings = f"{fingerprint(directory)} {loaded.engine.model.dtype} max_tiles={max_tiles}"
    report = evaluate(
        chosen,
        loaded.engine,
        model=str(directory) if Path(model).is_dir() else model,
        predictions=predictions,
        fingerprint=settings,
        limit=limit,
        batch_size=batch_size,
        on_progress=ProgressLine(),
    )
    rows = {"all": report, **report["by_type"]}
    for name, row in rows.items():
        low, high = row["ci95"]
        print(f"{name:12}{chosen.metric} {row['value']:7.2%}  95% interval {low:.2%} to {high:.2%}  n {row['n']:,}")
    print(f"predictions: {predictions}")
    if out:
        write_report(out, report)
        print(f"report: {out}")


class ProgressLine:
    """One line on a terminal, redrawn; elsewhere a line now and then."""

    def __init__(self) -> None:
        self.started = self.shown = time.monotonic()
        self.live = sys.stderr.isatty()

    def __call__(self, progress: Progress) -> None:
        now = time.monotonic()
        last = progress.done == progress.total
        if not (self.live or last or now - self.shown > 10):
            return
        self.shown = now
        rate = (progress.done - progress.resumed) / max(1e-9, now - self.started)
        text = (
            f"{progress.done:,}/{progress.total:,} ({progress.done / progress.total:.0%}), {progress.value:.2%} so far, "
            f"{rate:,.1f}/s, {(progress.total - progress.done) / max(1e-9, rate):,.0f} s left"
        )
        end = "\n" if last or not self.live else ""
        print(f"\r{text:<90}" if self.live else text, end=end, file=sys.stderr, flush=True)
