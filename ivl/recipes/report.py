"""The quickstart's report page: learning curves, accuracy by question type, pictures with questions and answers."""

from __future__ import annotations

import base64
import html
import io
import json
from pathlib import Path
from typing import Any

from ivl.data import easy_vqa

NUM_EXAMPLES = 24
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
h1 { font-size: 1.5rem } h2 { font-size: 1.15rem; margin-top: 2rem }
table { border-collapse: collapse } td, th { padding: .25rem .9rem .25rem 0; text-align: left } th { font-weight: 600 }
img.curves { width: 100% } .grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(13rem, 1fr)); gap: 1rem }
.grid img { width: 6rem; image-rendering: pixelated; display: block; border: 1px solid #ddd } .wrong { color: #b00020 }
"""


def write_page(out: Path, result: dict[str, Any]) -> Path:
    """report.html in one file, pictures included. result: what the quickstart writes to report.json."""
    predictions = [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()[1:]]
    low, high = result["ci95"]
    body = f"""<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>ivl quickstart</title><style>{STYLE}</style>
<h1>ivl quickstart: easy-vqa from nothing</h1>
<p><b>{result["accuracy"]:.2%}</b> of {result["n"]:,} official test questions answered exactly
(95% interval {low:.2%} to {high:.2%}), after {result["training_minutes"]:.1f} minutes of training.</p>
<h2>Stages</h2>{stage_table(result["stages"])}
<h2>Learning curves</h2><img class="curves" alt="loss and accuracy per stage" src="{curves(result["stages"])}">
<h2>Accuracy by question type</h2><img class="curves" alt="accuracy by type" src="{bars(result["by_type"])}">
<h2>What it says</h2>{examples(predictions)}</html>"""
    page = out / "report.html"
    page.write_text(body, encoding="utf-8")
    return page


def stage_table(stages: list[dict[str, Any]]) -> str:
    rows = "".join(
        f"<tr><td>{s['name']}<td>{s['steps']:,}<td>{s['samples']:,}<td>{s['tokens']:,}"
        f"<td>{s['seconds']:.0f} s<td>{s['loss']:.4f}"
        for s in stages
    )
    return f"<table><tr><th>stage<th>steps<th>samples<th>tokens<th>time<th>last loss{rows}</table>"


def curves(stages: list[dict[str, Any]]) -> str:
    plt = _pyplot()
    figure, axes = plt.subplots(1, len(stages), figsize=(3.2 * len(stages), 2.8), squeeze=False, layout="constrained")
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
    return _png(figure)


def bars(by_type: dict[str, Any]) -> str:
    plt = _pyplot()
    figure, axis = plt.subplots(figsize=(8, 0.7 + 0.5 * len(by_type)))
    for name, score in by_type.items():
        low, high = score["ci95"]
        error = [[max(0.0, score["value"] - low)], [max(0.0, high - score["value"])]]
        axis.barh(f"{name} ({score['n']:,})", score["value"], xerr=error, color="#9ecae1", ecolor="#333", capsize=3)
        axis.text(low - 0.002, f"{name} ({score['n']:,})", f"{score['value']:.2%} ", ha="right", va="center")
    axis.set_xlim(max(0.0, min(s["ci95"][0] for s in by_type.values()) - 0.05), 1.001)
    axis.set_xlabel("exact match, 95% interval")
    return _png(figure)


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
    said = html.escape(prediction["prediction"])
    verdict = said if prediction["score"] else f"<span class='wrong'>{said}</span> (is {html.escape(row.answer)})"
    picture = base64.b64encode(Path(row.image).read_bytes()).decode()
    return f"<div><img alt='' src='data:image/png;base64,{picture}'>{html.escape(row.question)}<br><b>{verdict}</b></div>"


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot

    return matplotlib.pyplot


def _png(figure: Any) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, bbox_inches="tight")
    _pyplot().close(figure)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
