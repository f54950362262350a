"""`make quickstart`: easy-vqa from nothing to a model that answers questions about pictures, and then its alignment by
preference, in minutes on a CPU."""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from examples.quickstart import alignment
from ivl.errors import InputError
from ivl.evaluation.tasks import easy_vqa
from ivl.recipes import nano
from ivl.runs.config import RunConfig
from ivl.utils.files import write_json

COLOUR, SHAPE = "what color is the shape?", "what shape is in the image?"
Recipe = Callable[[], RunConfig]
STAGES: tuple[Recipe, ...] = (nano.language, nano.vision, nano.stage1, nano.stage15, nano.stage2)
RECORD = "stage.json"
FRESH_QUESTIONS, REPLIES, HELD_OUT = 600, 8, 1000
"""Of the preference step: questions sampled, replies to each, test questions."""


def main() -> None:
    """Write the data, train the five stages, evaluate on the official test split, align by preference, write the report page.

    Run again after an interruption, it goes on where it stopped; `--fresh` starts over.
    """
    if "--fresh" in sys.argv[1:]:
        shutil.rmtree(nano.RUN, ignore_errors=True)
    try:
        quickstart(Path(nano.RUN))
    except InputError as error:
        raise SystemExit(f"quickstart: {error}") from None


def quickstart(out: Path) -> dict[str, Any]:
    from examples.quickstart.report import write_page
    from ivl.api import load
    from ivl.evaluation.run import evaluate
    from ivl.evaluation.tasks import find
    from ivl.serve.examples import write_examples

    if not (out / "data" / "done").exists():
        prepare(out)
    stages = train(STAGES)
    shutil.rmtree(out / "model", ignore_errors=True)
    shutil.copytree(Path(STAGES[-1]().run_dir) / "model", out / "model")

    write_examples(out / "model", [(row.question, [Path(row.image)]) for row in example_rows()])
    print("\nevaluating on the official test split")
    predictions = out / "predictions.jsonl"
    predictions.unlink(missing_ok=True)
    began = time.monotonic()
    report = evaluate(find("easy-vqa"), load(out / "model").engine, model=str(out / "model"), predictions=predictions)
    minutes = sum(stage["seconds"] for stage in stages) / 60
    result = {
        "accuracy": report["value"], "ci95": report["ci95"], "n": report["n"], "by_type": report["by_type"],
        "training_minutes": round(minutes, 2), "evaluation_seconds": round(time.monotonic() - began, 1), "stages": stages,
        "versions": report["versions"], "preference": align(out),
    }  # fmt: skip
    write_json(out / "report.json", result)
    page = write_page(out, result)
    low, high = report["ci95"]
    print(
        f"\n{report['value']:.2%} of {report['n']:,} test questions (95% interval {low:.2%} to {high:.2%}), "
        f"{minutes:.1f} minutes of training\n{told(result['preference'])}\nreport: {page}\n\nTalk to it:\n"
        f'  .venv/bin/ivl chat {out / "model"} {example_image()} -p "what shape is in the image?"'
    )
    return result


def align(out: Path) -> dict[str, Any]:
    """Questions about several pictures: careless supervised data, then MPO on the model's own checked replies."""
    print("\npreference: questions about several pictures, answered with reasoning", flush=True)
    reason, mpo = nano.reason(), nano.mpo()
    alignment.write_reasoning(Path(reason.data.mixture), reason.train.num_steps or 0)
    stages = train((nano.reason,))
    start = Path(reason.run_dir) / "model"
    began = time.monotonic()
    alignment.write_pairs(start, out, questions=FRESH_QUESTIONS, replies=REPLIES)
    sampling = time.monotonic() - began
    stages += train((nano.mpo,))
    aligned = Path(mpo.run_dir) / "model"
    shutil.rmtree(out / "model-mpo", ignore_errors=True)
    shutil.copytree(aligned, out / "model-mpo")
    sources = json.loads((out / "pairs" / "report.json").read_text())["sources"].values()
    return {
        "before": alignment.held_out(start, HELD_OUT, out), "after": alignment.held_out(aligned, HELD_OUT, out),
        "pairs": sum(sum(source["pairs"].values()) for source in sources), "replies": FRESH_QUESTIONS * REPLIES,
        "sampling_seconds": round(sampling, 1), "stages": stages,
    }  # fmt: skip


def told(preference: dict[str, Any]) -> str:
    before, after = (preference[when]["accuracy"] for when in ("before", "after"))
    minutes = (sum(stage["seconds"] for stage in preference["stages"]) + preference["sampling_seconds"]) / 60
    return (
        f"Questions about several pictures: {before:.1%} of {preference['after']['n']:,} right after supervised training, "
        f"{after:.1%} after MPO on {preference['pairs']:,} pairs of its own replies ({minutes:.1f} minutes)"
    )


def prepare(out: Path) -> None:
    """The tokenizer and the three data files, from the training split alone."""
    from ivl.checkpoint import save_tokenizer
    from ivl.processing.tokenizer import train_tokenizer

    rows = easy_vqa.rows("train")
    captions = easy_vqa.captions(rows)
    by_image: dict[str, list[easy_vqa.Row]] = {}
    for row in rows:
        by_image.setdefault(row.image, []).append(row)

    texts = [text for row in rows for text in (row.question, row.answer, "user", "assistant", "system")]
    tokenizer = train_tokenizer([*texts, *captions.values()], nano.VOCAB_SIZE)
    if len(tokenizer) != nano.VOCAB_SIZE:
        raise InputError(f"the tokenizer has {len(tokenizer)} tokens, the nano recipe needs {nano.VOCAB_SIZE}")
    save_tokenizer(tokenizer, out / "tokenizer")

    # One row an image: its questions share the picture's encoding, but never see each other's answers.
    questions = [
        {"id": Path(image).stem, "image": image, "conversations": [turns(f"<image>\n{r.question}", r.answer) for r in asked]}
        for image, asked in by_image.items()
    ]
    described = [
        {
            "id": Path(image).stem,
            "image": image,
            "conversations": [
                turns(f"<image>\n{question}", word) for question, word in zip((COLOUR, SHAPE), text.split(), strict=True)
            ],
        }
        for image, text in captions.items()
    ]
    in_words = [
        {"id": Path(image).stem, "conversations": [turns(f"{text}\n{r.question}", r.answer) for r in by_image[image]]}
        for image, text in captions.items()
    ]
    data = out / "data"
    data.mkdir(parents=True, exist_ok=True)
    for name, lines in (("questions", questions), ("captions", described), ("language", in_words)):
        (data / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (data / "done").touch()
    print(
        f"{len(rows):,} training questions about {len(by_image):,} images; "
        f"{len(captions):,} of the images are described by what their questions say"
    )


def turns(question: str, answer: str) -> list[dict[str, str]]:
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


def train(recipes: tuple[Recipe, ...]) -> list[dict[str, Any]]:
    """Train stages one after another, or go on with them; what each took."""
    from examples.quickstart.ranks import spawn

    spawn(train_stages, (recipes,), nano.RANKS)
    return [json.loads((Path(recipe().run_dir) / RECORD).read_text()) for recipe in recipes]


def train_stages(recipes: tuple[Recipe, ...]) -> None:
    """All stages, in every rank."""
    is_main = os.environ.get("RANK", "0") == "0"
    for recipe in recipes:
        config = recipe()
        done = (Path(config.run_dir) / RECORD).exists()
        if is_main:
            said = f"already trained, in {config.run_dir}" if done else (recipe.__doc__ or "").split(": ", 1)[-1]
            print(f"\n{config.name}: {said}", flush=True)
        if not done:
            train_stage(config, is_main)


def train_stage(config: RunConfig, is_main: bool) -> None:
    """Train one stage or go on with it, and leave a record of what it took."""
    from ivl.runs.run import run

    began = time.monotonic()
    if not (Path(config.run_dir) / "model").exists():
        run(config, resume=True)
    if not is_main:
        return
    last = json.loads((Path(config.run_dir) / "metrics.jsonl").read_text().splitlines()[-1])
    stage = {
        "name": config.name, "seconds": round(max(time.monotonic() - began, last["seconds"]), 1), "steps": last["step"],
        "tokens": last["total_tokens"], "samples": last["total_samples"], "loss": last["loss"], "run_dir": config.run_dir,
    }  # fmt: skip
    (Path(config.run_dir) / RECORD).write_text(json.dumps(stage, indent=2))


def example_image() -> str:
    return easy_vqa.rows("test")[0].image


def example_rows() -> list[easy_vqa.Row]:
    """A question about each of the first pictures of the test split: what the server's page offers first."""
    first: dict[str, easy_vqa.Row] = {}
    for row in easy_vqa.rows("test"):
        first.setdefault(row.image, row)
    return list(first.values())[:6]


if __name__ == "__main__":
    main()
