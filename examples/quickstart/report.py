"""The quickstart's report page: learning curves, accuracy by question type, pictures with questions and answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ivl.evaluation.tasks import easy_vqa
from ivl.runs.outcome import read_metrics
from ivl.utils import html as pages

NUM_EXAMPLES = 24
ABOUT = (
    "A model of 1.7 million parameters with the parts of InternVL2.5 learned easy-vqa from nothing: language and vision alone, "
    "then both together. 5,000 pictures of one shape, 48,000 questions; those of the test split were never trained on."
)


def write_page(out: Path, result: dict[str, Any]) -> Path:
    """report.html in one file, pictures included. result: what the quickstart writes to report.json."""
    predictions = [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()[1:]]
    low, high = result["ci95"]
    right = {
        f"right of {result['n']:,} test questions": f"{result['accuracy']:.2%}",
        "95% interval": f"{low:.2%} to {high:.2%}",
    }
    after = {"right about several pictures, after MPO": f"{result['preference']['after']['accuracy']:.1%}"}
    page = out / "report.html"
    page.write_text(
        pages.page(
            "ivl quickstart: easy-vqa from nothing",
            pages.facts(**right, minutes_of_training=f"{result['training_minutes']:.1f}", **after),
            f"<p>{ABOUT}</p><h2>What it says</h2>{examples(predictions)}",
            f"<h2>Accuracy by question type</h2>{bars(result['by_type'])}",
            f"<h2>Stages</h2>{stage_table(result['stages'])}",
            f"<h2>Learning curves</h2><p>{LINES}</p>{curves(result['stages'])}",
            f"<h2>Preference</h2>{preference(result['preference'])}",
            pages.next_steps(*next_steps(out)),
        ),
        encoding="utf-8",
    )
    return page


def next_steps(out: Path) -> list[tuple[str, str]]:
    ivl, model = ".venv/bin/ivl", out / "model"
    return [
        ("Talk to it:", f'{ivl} chat {model} {model}/examples/0-0.png -p "what shape is in the image?"'),
        ("Serve it, with a page for a browser (after make install):", f"{ivl} serve {model} --web"),
        ("Teach it something of your own; docs/fine_tune.md goes through it step by step:",
         f"{ivl} demo-data .\n{ivl} train finetune --model {model} --data data/train.jsonl --out-dir runs/count"),
    ]  # fmt: skip


def preference(result: dict[str, Any]) -> str:
    kinds = {"accuracy": "right", "reasoning": "reasoning\nright", "malformed": "malformed", "endless": "endless"}
    figure, axis = pages.pyplot().subplots(figsize=(4.4, 2.6), layout="constrained")
    for offset, when in enumerate(("before", "after")):
        shares = [100 * result[when][kind] for kind in kinds]
        bars = axis.bar([at + 0.38 * offset for at in range(len(kinds))], shares, 0.36, label=f"{when} MPO")
        axis.bar_label(bars, [f"{share:.1f}" for share in shares], fontsize=8)
    axis.set_xticks([at + 0.19 for at in range(len(kinds))], list(kinds.values()))
    axis.set(ylim=(0, 112), ylabel="% of replies")
    axis.legend()
    return (
        f"<p>Questions about two to four pictures, answered with written reasoning; {result['after']['n']:,} of them about "
        "pictures of the test split. The supervised data carry a plausible mistake in many answers; "
        f"{result['replies']:,} replies to fresh questions were checked and became {result['pairs']:,} pairs "
        "(<a href='pairs/report.html'>their report</a>).</p>"
        + pages.plot(figure, "before and after MPO")
        + f"{stage_table(result['stages'])}<p></p>{curves(result['stages'])}"
    )


def stage_table(stages: list[dict[str, Any]]) -> str:
    rows = [
        [s["name"], f"{s['steps']:,}", f"{s['samples']:,}", f"{s['tokens']:,}", f"{s['seconds']:.0f} s", f"{s['loss']:.4f}"]
        for s in stages
    ]
    return pages.table(["stage", "steps", "samples", "tokens", "time", "last loss"], rows)


LOSS, ACCURACY = pages.COLORS[:2]
LINES = (
    "By step: the training loss on the left scale (blue); on the right one (orange) the share of right tokens, or of pairs "
    "that MPO tells apart."
)


def curves(stages: list[dict[str, Any]]) -> str:
    plots = []
    for stage in stages:
        rows = [row for row in read_metrics(Path(stage["run_dir"])) if "evaluation" not in row]
        steps = [row["step"] for row in rows]
        figure, axis = pages.pyplot().subplots(figsize=(3.9, 2.3), layout="constrained")
        axis.plot(steps, [max(row["loss"], 1e-5) for row in rows], color=LOSS, linewidth=0.9)
        axis.set(title=stage["name"], yscale="log")
        axis.yaxis.set_major_formatter("{x:g}")
        axis.tick_params(axis="y", which="minor", labelleft=False)
        right = axis.twinx()
        share = "rewards/accuracy" if "rewards/accuracy" in rows[0] else "accuracy"
        right.plot(steps, [100 * row[share] for row in rows], color=ACCURACY, linewidth=0.9)
        right.set_ylim(0, 102)
        right.yaxis.set_major_formatter("{x:.0f}%")
        plots.append(pages.plot(figure, f"loss and accuracy of {stage['name']}"))
    return pages.grid(plots, "plots")


def bars(by_type: dict[str, Any]) -> str:
    figure, axis = pages.pyplot().subplots(figsize=(4.6, 0.7 + 0.45 * len(by_type)), layout="constrained")
    for name, score in by_type.items():
        low, high = score["ci95"]
        error = [[100 * max(0.0, score["value"] - low)], [100 * max(0.0, high - score["value"])]]
        label = f"{name}\n{score['n']:,} questions"
        axis.barh(label, 100 * score["value"], xerr=error, color=pages.COLORS[0], ecolor=pages.INK, capsize=3)
        axis.text(100 * low - 0.2, label, f"{score['value']:.2%} ", ha="right", va="center")
    least = min(score["ci95"][0] for score in by_type.values())
    axis.set_xlim(max(0.0, 100 * least - 5), 100)
    axis.set_xlabel("right, %, with 95% interval")
    return pages.plot(figure, "accuracy by type")


def examples(predictions: list[dict[str, Any]]) -> str:
    """Every kind of question, wrong answers first: they are what a person would look for."""
    rows = {row.id: row for row in easy_vqa.rows("test")}
    wrong = [p for p in predictions if not p["score"]][: NUM_EXAMPLES // 2]
    right = [p for p in predictions if p["score"]]
    chosen = wrong + right[:: max(1, len(right) // (NUM_EXAMPLES - len(wrong)))][: NUM_EXAMPLES - len(wrong)]
    count = sum(not p["score"] for p in predictions)
    cells = pages.grid(example(p, rows[p["id"]]) for p in chosen)
    return f"<p>{count} wrong answers in all; the first {len(wrong)} come first.</p>{cells}"


def example(prediction: dict[str, Any], row: easy_vqa.Row) -> str:
    reply = pages.text(prediction["prediction"])
    verdict = f"<b>{reply}</b>" if prediction["score"] else f"<b class='bad'>{reply}</b> (is {pages.text(row.answer)})"
    return pages.card(pages.picture(Path(row.image)), f"<br>{pages.text(row.question)}<br>{verdict}")
