"""The OpenCompass average of eight benchmarks, beside the published scores (model cards of InternVL2_5-*-MPO)."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ivl.errors import InputError
from ivl.utils.strict_json import read_json

EIGHT: dict[str, tuple[float, tuple[tuple[str, ...], ...]]] = {
    "MMBench v1.1": (100, (
        ("mmbench-test-en-v11", "mmbench-test-cn-v11"), ("mmbench-dev-en-v11", "mmbench-dev-cn-v11"), ("mmbench-test-en-v11",),
        ("mmbench-dev-en-v11",),
    )),
    "MMStar": (100, (("mmstar",),)),
    "MMMU val": (100, (("mmmu",),)),
    "MathVista": (100, (("mathvista",),)),
    "HallusionBench": (100, (("hallusionbench",),)),
    "AI2D": (100, (("ai2d",),)),
    "OCRBench": (0.1, (("ocrbench",),)),
    "MMVet": (100, (("mmvet",),)),
}  # fmt: skip
"""Each with the factor to 100 and the tasks whose mean it is, the leaderboard's own first."""
PUBLISHED: dict[str, tuple[float, ...]] = {
    "InternVL2.5-1B": (66.5, 51.3, 41.2, 47.1, 39.4, 69.0, 77.4, 47.2),
    "InternVL2.5-2B": (70.9, 54.3, 43.2, 51.1, 42.3, 74.9, 80.2, 62.6),
    "InternVL2.5-4B": (78.2, 58.7, 51.8, 60.8, 46.6, 81.4, 82.0, 61.5),
    "InternVL2.5-8B": (82.5, 63.2, 56.2, 64.5, 49.0, 84.6, 82.1, 62.8),
    "InternVL2.5-26B": (84.6, 66.5, 60.7, 68.0, 55.8, 86.2, 85.4, 65.4),
    "InternVL2.5-38B": (85.4, 68.5, 64.6, 72.4, 57.9, 87.6, 84.1, 67.2),
    "InternVL2.5-78B": (87.5, 69.5, 70.0, 70.6, 57.4, 89.1, 85.3, 71.8),
    "InternVL2.5-1B-MPO": (67.2, 49.7, 40.8, 53.0, 40.0, 69.4, 83.6, 47.2),
    "InternVL2.5-2B-MPO": (71.6, 55.0, 45.0, 56.4, 43.0, 75.3, 84.2, 65.4),
    "InternVL2.5-4B-MPO": (78.6, 60.2, 51.6, 65.3, 47.8, 82.0, 88.0, 67.1),
    "InternVL2.5-8B-MPO": (82.4, 65.7, 54.9, 68.9, 51.4, 84.5, 88.3, 66.9),
    "InternVL2.5-26B-MPO": (84.2, 67.2, 57.7, 72.8, 55.3, 86.2, 91.2, 67.1),
    "InternVL2.5-38B-MPO": (85.6, 69.8, 64.1, 73.8, 61.5, 88.1, 88.5, 72.5),
    "InternVL2.5-78B-MPO": (87.3, 73.1, 68.3, 73.8, 58.7, 89.3, 91.2, 71.4),
}
"""In the order of EIGHT, OCRBench divided by 10. The card prints 68.9 as the average of the 8B model, whose mean is 68.1."""


def published_of(model: str) -> tuple[float, ...] | None:
    """Return the published scores of a model by the last part of its name or path, however that is spelled."""
    names = {re.sub(r"[^a-z0-9]", "", name.lower()): scores for name, scores in PUBLISHED.items()}
    return names.get(re.sub(r"[^a-z0-9]", "", model.rstrip("/").rpartition("/")[2].lower()))


def average(reports: Sequence[Path]) -> dict[str, Any]:
    """Return the eight scores on 0 to 100 with published values and differences, and their mean if all eight are there.

    Raises:
        InputError: if a file is no report, the reports are of several models, or two are of the same task.
    """
    found: dict[str, Mapping[str, Any]] = {}
    for path in reports:
        report = read_json(path)
        if not isinstance(report, dict) or not {"task", "value", "ci95", "model"} <= report.keys():
            raise InputError(f"{path}: is no report of ivl eval")
        if report["task"] in found:
            raise InputError(f"{path}: a second report of {report['task']}")
        found[report["task"]] = report
    models = sorted({str(report["model"]) for report in found.values()})
    if len(models) != 1:
        raise InputError(f"an average is of one model; the reports are of {', '.join(models) or 'none'}")
    rows: list[dict[str, Any]] = []
    published = published_of(models[0]) or (None,) * len(EIGHT)
    for (name, (factor, ways)), value in zip(EIGHT.items(), published, strict=True):
        tasks = next((way for way in ways if all(t in found and found[t]["value"] is not None for t in way)), ())
        each = [found[task] for task in tasks]
        ends = [report.get("range", [report["value"]] * 2) for report in each]
        row: dict[str, Any] = {"name": name, "tasks": tasks, "published": value, "scores": None}
        if each:
            row["scores"] = [factor * sum(end[side] for end in ends) / len(ends) for side in (0, 1)]
            row["half"] = factor * math.hypot(*((r["ci95"][1] - r["ci95"][0]) / 2 for r in each)) / len(each)
        rows.append(row)
    missing = [row["name"] for row in rows if row["scores"] is None]
    result: dict[str, Any] = {"model": models[0], "rows": rows, "missing": missing, "average": None}
    if not missing:
        means = [sum(row["scores"][side] for row in rows) / len(rows) for side in (0, 1)]
        half = math.hypot(*(row["half"] for row in rows)) / len(rows)
        result |= {"average": means, "ci95": [means[0] - half, means[1] + half]}
        result["published"] = math.fsum(known) / len(rows) if (known := published_of(models[0])) else None
    return result


def as_text(result: Mapping[str, Any]) -> str:
    """Write the table of `average`."""
    lines = [(str(result["model"]), "score", "published", "difference")]
    rows = [(row["name"], row["scores"], row["published"]) for row in result["rows"]]
    if result["average"]:
        rows.append(("average", result["average"], result["published"]))
    for name, scores, published in rows:
        shown = "missing" if scores is None else " to ".join(f"{score:.1f}" for score in dict.fromkeys(scores))
        difference = "" if scores is None or published is None else f"{scores[0] - published:+.1f}"
        lines.append((name, shown, "" if published is None else f"{published:.1f}", difference))
    text = "\n".join(f"{name:20}{shown:>16}{published:>12}{difference:>12}" for name, shown, published, difference in lines)
    if result["missing"]:
        return f"{text}\nno average: {', '.join(result['missing'])} missing"
    return f"{text}\n95% interval of the average {result['ci95'][0]:.1f} to {result['ci95'][1]:.1f}"
