"""The stages of the quickstart: from random weights to a model that answers about pictures, then preference training."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from examples.quickstart import alignment
from examples.quickstart.data import prepare
from ivl.errors import InputError
from ivl.evaluation.tasks import easy_vqa
from ivl.recipes import nano
from ivl.runs.config import RunConfig
from ivl.utils.files import write_json
from ivl.utils.progress import reporting

Recipe = Callable[[], RunConfig]
STAGES: tuple[Recipe, ...] = (nano.language, nano.vision, nano.stage1, nano.stage15, nano.stage2)
RECORD = "stage.json"
FRESH_QUESTIONS, REPLIES, HELD_OUT = 600, 8, 1000
"""Questions sampled for preference training, replies to each of them, and test questions."""


def main() -> None:
    """Read the command line and run the quickstart."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.quickstart",
        description="Write the data, train the five stages, evaluate on the official test split, train by preference, write "
        "the report page. After an interruption the same command goes on where it stopped.",
    )
    parser.add_argument("--fresh", action="store_true", help="start over")
    if parser.parse_args().fresh:
        shutil.rmtree(nano.RUN, ignore_errors=True)
    try:
        quickstart(Path(nano.RUN))
    except InputError as error:
        raise SystemExit(f"quickstart: {error}") from None
    except KeyboardInterrupt:
        print("quickstart: stopped; the same command goes on from here", file=sys.stderr)
        raise SystemExit(130) from None


def quickstart(out: Path) -> dict[str, Any]:
    """Do everything in the directory `out`; returns what report.json holds."""
    from examples.quickstart.report import write_page
    from ivl.api import load
    from ivl.evaluation.run import evaluate
    from ivl.evaluation.tasks import find
    from ivl.serve.page import write_examples

    if not (out / "data" / "done").exists():
        prepare(out)
    stages = train(STAGES)
    shutil.rmtree(out / "model", ignore_errors=True)
    shutil.copytree(Path(STAGES[-1]().run_dir) / "model", out / "model")

    write_examples(out / "model", [(row.question, [Path(row.image)]) for row in example_rows()])
    print("\nevaluating on the official test split", flush=True)
    predictions = out / "predictions.jsonl"
    predictions.unlink(missing_ok=True)
    began = time.monotonic()
    with reporting("evaluation", "questions") as show:
        report = evaluate(
            find("easy-vqa"), load(out / "model").engine, model=str(out / "model"), predictions=predictions, on_progress=show
        )
    low, high = report["ci95"]
    print(f"{report['value']:.2%} of {report['n']:,} questions are right (95% interval {low:.2%} to {high:.2%})", flush=True)
    minutes = sum(stage["seconds"] for stage in stages) / 60
    result = {
        "accuracy": report["value"], "ci95": report["ci95"], "n": report["n"], "by_type": report["by_type"],
        "training_minutes": round(minutes, 2), "evaluation_seconds": round(time.monotonic() - began, 1), "stages": stages,
        "versions": report["versions"], "preference": align(out),
    }  # fmt: skip
    write_json(out / "report.json", result)
    page = write_page(out, result)
    print(
        f"\n{report['value']:.2%} of {report['n']:,} test questions (95% interval {low:.2%} to {high:.2%}), "
        f"{minutes:.1f} minutes of training\n{summarize(result['preference'])}\nreport: {page}\n\nnext:\n"
        f'  .venv/bin/ivl chat {out / "model"} {out / "model/examples/0-0.png"} -p "what shape is in the image?"\n'
        "  docs/fine_tune.md teaches it what your own rows say"
    )
    return result


def align(out: Path) -> dict[str, Any]:
    """Train on questions about several pictures: on careless supervised data, then by MPO on the model's checked replies."""
    print("\npreference: questions about several pictures, answered with reasoning", flush=True)
    reason, mpo = nano.reason(), nano.mpo()
    alignment.write_reasoning(Path(reason.data.mixture), reason.train.num_steps or 0)
    stages = train((nano.reason,))
    start = Path(reason.run_dir) / "model"
    began = time.monotonic()
    alignment.write_pairs(start, out, questions=FRESH_QUESTIONS, replies=REPLIES)
    sampling = time.monotonic() - began
    sources = json.loads((out / "pairs" / "report.json").read_text())["sources"].values()
    pairs = sum(sum(source["pairs"].values()) for source in sources)
    print(f"{pairs:,} pairs from {FRESH_QUESTIONS * REPLIES:,} replies: {out / 'pairs/report.html'}", flush=True)
    stages += train((nano.mpo,))
    aligned = Path(mpo.run_dir) / "model"
    shutil.rmtree(out / "model-mpo", ignore_errors=True)
    shutil.copytree(aligned, out / "model-mpo")
    scores = {}
    for when, model in (("before", start), ("after", aligned)):
        scores[when] = alignment.held_out(model, HELD_OUT, out)
        print(f"{when} MPO {scores[when]['accuracy']:.1%} of {HELD_OUT:,} questions are right", flush=True)
    return {
        **scores, "pairs": pairs, "replies": FRESH_QUESTIONS * REPLIES,
        "sampling_seconds": round(sampling, 1), "stages": stages,
    }  # fmt: skip


def summarize(preference: dict[str, Any]) -> str:
    """Say in one sentence what preference training brought."""
    before, after = (preference[when]["accuracy"] for when in ("before", "after"))
    minutes = (sum(stage["seconds"] for stage in preference["stages"]) + preference["sampling_seconds"]) / 60
    return (
        f"Questions about several pictures: {before:.1%} of {preference['after']['n']:,} right after supervised training, "
        f"{after:.1%} after MPO on {preference['pairs']:,} pairs of its own replies ({minutes:.1f} minutes)"
    )


def train(recipes: tuple[Recipe, ...]) -> list[dict[str, Any]]:
    """Train stages one after another, or go on with them; returns the record of each."""
    from examples.quickstart.ranks import spawn

    spawn(train_stages, (recipes,), nano.RANKS)
    return [json.loads((Path(recipe().run_dir) / RECORD).read_text()) for recipe in recipes]


def train_stages(recipes: tuple[Recipe, ...]) -> None:
    """Train all stages; every rank calls this."""
    is_main = os.environ.get("RANK", "0") == "0"
    for recipe in recipes:
        config = recipe()
        done = (Path(config.run_dir) / RECORD).exists()
        if is_main:
            status = f"already trained, in {config.run_dir}" if done else (recipe.__doc__ or "").split(": ", 1)[-1]
            print(f"\n{config.name}: {status}", flush=True)
        if not done:
            train_stage(config, is_main)


def train_stage(config: RunConfig, is_main: bool) -> None:
    """Train one stage or go on with it, and write a record of its time and figures."""
    from ivl.runs.outcome import read_metrics
    from ivl.runs.run import run

    began = time.monotonic()
    if not (Path(config.run_dir) / "model").exists():
        run(config, resume=True)
    if not is_main:
        return
    last = read_metrics(Path(config.run_dir))[-1]
    stage = {
        "name": config.name, "seconds": round(max(time.monotonic() - began, last["seconds"]), 1), "steps": last["step"],
        "tokens": last["total_tokens"], "samples": last["total_samples"], "loss": last["loss"], "run_dir": config.run_dir,
    }  # fmt: skip
    (Path(config.run_dir) / RECORD).write_text(json.dumps(stage, indent=2))


def example_rows() -> list[easy_vqa.Row]:
    """Choose a question about each of the first six pictures of the test split, for the server's page to offer."""
    first: dict[str, easy_vqa.Row] = {}
    for row in easy_vqa.rows("test"):
        first.setdefault(row.image, row)
    return list(first.values())[:6]
