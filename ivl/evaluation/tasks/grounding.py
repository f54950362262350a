"""RefCOCO, RefCOCO+ and RefCOCOg: a box for what a sentence describes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ivl.evaluation.benchmark import Benchmark
from ivl.evaluation.data import literal
from ivl.evaluation.figures import Figures, average, mean
from ivl.evaluation.scoring.boxes import Corners, box_in, in_pixels, overlap, reference_box
from ivl.evaluation.task import Example, Score, Scored

PROMPT = "Please provide the bounding box coordinate of the region this sentence describes: <ref>{}</ref>"
COLUMNS = ("bbox_x1", "bbox_y1", "bbox_x2", "bbox_y2")
HIT = 0.5
"""The overlap from which a box is right."""


class RefCoco(Benchmark):
    """The mean over splits of the share of boxes that overlap the true one by half."""

    def prepared(self, row: dict[str, Any]) -> dict[str, Any]:
        split = {"split": row.get("split") or row.get("category", "")}
        return row | split | ({"question": PROMPT.format(row["sent"])} if "sent" in row else {})

    def answers(self, row: Mapping[str, Any]) -> tuple[str, ...]:
        size = float(row["width"]), float(row["height"])
        corners = [row[name] for name in COLUMNS] if all(name in row for name in COLUMNS) else literal(row.get("bbox", []))
        if corners:
            return (str([float(value) for value in corners]),)
        box = box_in(str(row["answer"]))
        fractions = box is not None and max(map(abs, box)) <= 1.5
        return (str(list(in_pixels(box, *size) if fractions else box)),) if box else ()

    def read(self, text: str, example: Example, *, judged: bool = False) -> Score | None:
        """Measure the overlap; by the reference code's rule for its own rows and prompt."""
        row, truth = example.row, box_in(example.truth)
        size = float(row["width"]), float(row["height"])
        box: Corners | None = reference_box(text, *size)
        if "sent" not in row and self.prompt != "reference":
            box = in_pixels(found, *size) if (found := box_in(text)) else None
        iou = overlap(box, truth) if box and truth else 0.0
        answer = "" if box is None else ", ".join(f"{value:.1f}" for value in box)
        return Score(value=float(iou >= HIT), answer=answer, numbers={"iou": iou})

    def figures(self, scored: Sequence[Scored]) -> Figures:
        """Return the mean of the splits, each split, and the mean overlap."""
        splits = {split: mean(rows) for split, rows in self.grouped(scored).items()}
        average_iou = mean(scored, lambda s: s.score.numbers["iou"])
        return {"Average": average(splits.values(), n=len(scored)), **splits, "mean IoU": average_iou}


TASKS = (
    RefCoco(
        name="refcoco", file="RefCOCO", about="boxes for descriptions, eight splits", metric="precision at IoU 0.5",
        md5="f50ca356638ddac89b309311fd876a5d", by_file="split", categories=("split",),
    ),
)  # fmt: skip
