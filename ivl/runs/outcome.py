"""What a run has come to: its figures as a picture and in words, and what to do next."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ivl.runs.config import RunConfig
from ivl.utils.jsonl import reading_line

SMOOTHED = 20
"""The picture's second line is the mean over one part in this many of the steps."""


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """Return the rows of metrics.jsonl; a last line that was cut off is left out.

    Raises:
        InputError: naming the line, for one that no run wrote.
    """
    path, rows = run_dir / "metrics.jsonl", []
    for number, line in enumerate(path.read_bytes().splitlines(keepends=True) if path.exists() else (), 1):
        if line.endswith(b"\n"):
            with reading_line(path, number, "remove the line"):
                row = json.loads(line)
                int(row["step"])
                if row.get("evaluation", "validation") == "validation":
                    float(row["loss"])
                rows.append(row)
    return rows


def validation_losses(rows: Sequence[dict[str, Any]], last_step: int | None = None) -> list[tuple[int, float]]:
    """Return step and loss of each validation, up to a step."""
    found = [(row["step"], row["loss"]) for row in rows if row.get("evaluation") == "validation"]
    return [(step, loss) for step, loss in found if last_step is None or step <= last_step]


def draw(run_dir: Path, title: str) -> Path | None:
    """Draw the losses of a run, and the rewards of preference training, into loss.png; None where matplotlib is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    rows = read_metrics(run_dir)
    steps = [row for row in rows if "evaluation" not in row]
    if not steps:
        return None
    panels = [("loss", "loss")] + [("rewards/accuracy", "pairs right")] * ("rewards/accuracy" in steps[0])
    figure = Figure(figsize=(7.2, 3.6 * len(panels)), layout="constrained")
    axes = figure.subplots(len(panels), squeeze=False)[:, 0]
    width = max(1, len(steps) // SMOOTHED)
    for axis, (name, label) in zip(axes, panels, strict=True):
        at, values = [row["step"] for row in steps], [row[name] for row in steps]
        means = [sum(values[max(0, n + 1 - width) : n + 1]) / min(width, n + 1) for n in range(len(values))]
        axis.plot(at, values, color="#9db7d5", linewidth=0.8, label="each step")
        axis.plot(at, means, color="#1f5a99", label=f"mean of {width} steps")
        if name == "loss" and (checked := validation_losses(rows)):
            axis.plot(*zip(*checked, strict=True), "o-", color="#c4501b", markersize=4, label="validation")
            step, loss = min(checked, key=lambda pair: pair[1])
            axis.annotate(f"{loss:.3f}", (step, loss), textcoords="offset points", xytext=(0, 7), ha="center", fontsize=8)
        axis.set(ylabel=label)
        axis.grid(alpha=0.25)
        axis.legend(frameon=False, fontsize=8)
    axes[0].set_title(title, parse_math=False)
    axes[-1].set_xlabel("step")
    figure.savefig(run_dir / "loss.png", dpi=120)
    return run_dir / "loss.png"


def describe(config: RunConfig) -> str:
    """Return what a finished run has come to, and the commands that come next."""
    run_dir = Path(config.run_dir)
    rows, picture = read_metrics(run_dir), run_dir / "loss.png"
    if not rows:
        return "done: no step was left to do"
    steps, checked = [row for row in rows if "evaluation" not in row], validation_losses(rows)
    minutes, seconds = divmod(round(steps[-1]["seconds"]), 60)
    done, planned = steps[-1]["step"], config.train.num_steps or 0
    last = [row["loss"] for row in steps[-max(5, len(steps) // SMOOTHED) :]]
    told = [f"done: {done:,}{f' of {planned:,}' * (done < planned)} steps in {minutes:,} min {seconds} s; "
            f"loss {steps[0]['loss']:.4f} at first, {sum(last) / len(last):.4f} in the last steps"]  # fmt: skip
    best = min(checked, key=lambda pair: pair[1], default=(0, 0.0))
    if checked:
        told.append(f"validation loss {checked[-1][1]:.4f} at the end, lowest {best[1]:.4f} after step {best[0]}")
    told += [f"drawn in {picture}"] if picture.exists() else []
    model, kept = str(run_dir / "model"), run_dir / "best"
    commands = [f"ivl chat {shlex.quote(model)}", evaluation_command(config, model), f"ivl serve {shlex.quote(model)} --web"]
    if kept.exists() and best[0] != steps[-1]["step"]:
        base, adapter = (config.model, f" --adapter {shlex.quote(str(kept))}") if config.lora else (str(kept), "")
        commands.append(f"ivl chat {shlex.quote(base)}{adapter}     (as it was at its lowest validation loss)")
    return "\n".join([*told, "next:", *(f"  {command}" for command in commands)])


def evaluation_command(config: RunConfig, model: str) -> str:
    """Return the command that scores the model on its validation rows."""
    data = config.val_data
    if config.objective.pairs or data is None:
        return f"ivl eval {shlex.quote(model)} --data ROWS --metric exact     (ROWS that it was not trained on)"
    names = (data.mixture,) if isinstance(data.mixture, str) else data.mixture
    more = [*(["--root", data.root] if data.root else []), *(["--val-share", f"{data.val_share:g}"] if data.validation else [])]
    return shlex.join(["ivl", "eval", model, "--data", *names, *more, "--metric", "exact"])
