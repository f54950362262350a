"""The quickstart's report page: learning curves, accuracy by question type, pictures with questions and answers."""

from __future__ import annotations

import base64
import html
import json
from pathlib import Path
from typing import Any

from ivl.evaluation.tasks import easy_vqa
from ivl.utils import html as pages

NUM_EXAMPLES = 24
STYLE = ".grid img { height: 6rem; image-rendering: pixelated; display: block; border: 1px solid #ddd }"


def write_page(out: Path, result: dict[str, Any]) -> Path:
    """report.html in one file, pictures included. result: what the quickstart writes to report.json."""
    predictions = [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()[1:]]
    low, high = result["ci95"]
    page = out / "report.html"
    page.write_text(
        pages.page(
            "ivl quickstart: easy-vqa from nothing",
            f"<p><b>{result['accuracy']:.2%}</b> of {result['n']:,} official test questions answered exactly (95% interval "
            f"{low:.2%} to {high:.2%}), after {result['training_minutes']:.1f} minutes of training.</p>",
            f"<h2>Stages</h2>{stage_table(result['stages'])}",
            f"<h2>Learning curves</h2>{curves(result['stages'])}",
            f"<h2>Accuracy by question type</h2>{bars(result['by_type'])}",
            f"<h2>What it says</h2>{examples(predictions)}",
            f"<h2>Preference</h2>{preference(result['preference'])}",
            style=STYLE,
        ),
        encoding="utf-8",
    )
    return page


def preference(result: dict[str, Any]) -> str:
    kinds = {"accuracy": "right", "reasoning": "reasoning right", "malformed": "malformed", "endless": "endless"}
    figure, axis = pages.pyplot().subplots(figsize=(7, 2.4), layout="constrained")
    for offset, (when, color) in enumerate((("before", "#9ecae1"), ("after", "#3182bd"))):
        shares = [result[when][kind] for kind in kinds]
        bars = axis.bar([at + 0.38 * offset for at in range(len(kinds))], shares, 0.36, color=color, label=f"{when} MPO")
        axis.bar_label(bars, [f"{share:.1%}" for share in shares], fontsize=8)
    axis.set_xticks([at + 0.19 for at in range(len(kinds))], list(kinds.values()))
    axis.set_ylim(0, 1.12)
    axis.legend()
    return (
        f"<p>Questions about two to four pictures, answered with written reasoning; {result['after']['n']:,} of them about "
        "pictures of the test split. The supervised data carry a plausible mistake in many answers; "
        f"{result['replies']:,} replies to fresh questions were checked and became {result['pairs']:,} pairs "
        "(<a href='pairs/report.html'>their report</a>).</p>"
        + pages.plot(figure, "before and after MPO")
        + stage_table(result["stages"])
    )


def stage_table(stages: list[dict[str, Any]]) -> str:
    rows = [
        [s["name"], f"{s['steps']:,}", f"{s['samples']:,}", f"{s['tokens']:,}", f"{s['seconds']:.0f} s", f"{s['loss']:.4f}"]
        for s in stages
    ]
    return pages.table(["stage", "steps", "samples", "tokens", "time", "last loss"], rows)


def curves(stages: list[dict[str, Any]]) -> str:
    figure, axes = pages.pyplot().subplots(
        1, len(stages), figsize=(3.2 * len(stages), 2.8), squeeze=False, layout="constrained"
    )
    for axis, stage in zip(axes[0], stages, strict=True):
        lines = (Path(stage["run_dir"]) / "metrics.jsonl").read_text().splitlines()
        rows = [row for row in map(json.loads, lines) if "evaluation" not in row]
        steps = [row["step"] for row in rows]
        axis.plot(steps, [max(row["loss"], 1e-5) for row in rows], color="#1f77b4", linewidth=0.8)
        axis.set(title=stage["name"], xlabel="step", yscale="log")
        axis.tick_params(axis="y", which="minor", labelleft=False)
        right = axis.twinx()
        right.plot(steps, [row["accuracy"] for row in rows], color="#2ca02c", linewidth=0.8)
        right.set_ylim(0, 1.02)
        if stage is stages[-1]:
            right.set_ylabel("token accuracy (green)")
    axes[0][0].set_ylabel("training loss (blue)")
    return pages.plot(figure, "loss and accuracy per stage")


def bars(by_type: dict[str, Any]) -> str:
    figure, axis = pages.pyplot().subplots(figsize=(8, 0.7 + 0.5 * len(by_type)))
    for name, score in by_type.items():
        low, high = score["ci95"]
        error = [[max(0.0, score["value"] - low)], [max(0.0, high - score["value"])]]
        axis.barh(f"{name} ({score['n']:,})", score["value"], xerr=error, color="#9ecae1", ecolor="#333", capsize=3)
        axis.text(low - 0.002, f"{name} ({score['n']:,})", f"{score['value']:.2%} ", ha="right", va="center")
    axis.set_xlim(max(0.0, min(s["ci95"][0] for s in by_type.values()) - 0.05), 1.001)
    axis.set_xlabel("exact match, 95% interval")
    return pages.plot(figure, "accuracy by type")


def examples(predictions: list[dict[str, Any]]) -> str:
    """Every kind of question, wrong answers first: they are what a person would look for."""
    rows = {row.id: row for row in easy_vqa.rows("test")}
    wrong = [p for p in predictions if not p["score"]][: NUM_EXAMPLES // 2]
    right = [p for p in predictions if p["score"]]
    chosen = wrong + right[:: max(1, len(right) // (NUM_EXAMPLES - len(wrong)))][: NUM_EXAMPLES - len(wrong)]
    cells = "".join(example(p, rows[p["id"]]) for p in chosen)
    count = sum(not p["score"] for p in predictions)
    return f"<p>{count} wrong answers in all; the first {len(wrong)} come first.</p><div class='grid'>{cells}</div>"


def example(prediction: dict[str, Any], row: easy_vqa.Row) -> str:
    reply = html.escape(prediction["prediction"])
    verdict = reply if prediction["score"] else f"<span class='bad'>{reply}</span> (is {html.escape(row.answer)})"
    picture = base64.b64encode(Path(row.image).read_bytes()).decode()
    return f"<div><img alt='' src='data:image/png;base64,{picture}'>{html.escape(row.question)}<br><b>{verdict}</b></div>"
