"""A benchmark of your own: examples, a score, a report with a 95% interval.

    python examples/own_task.py [MODEL]

Without a model a small one of random weights is asked, so expect a score near zero. To have the task in
`ivl eval --task NAME`, put the class in ivl/evaluation/tasks/ and name it in TASKS there.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

from own_model_from_config import build
from PIL import Image

import ivl
from ivl.evaluation.config import EvalConfig
from ivl.evaluation.run import evaluate
from ivl.evaluation.scoring import exact_match
from ivl.evaluation.task import Example, Task

RUN = Path("runs/examples/own-task")


class Colors(Task):
    """Name the color of a plain picture."""

    name = "colors"
    metric = "exact_match"
    params = ivl.SamplingParams(max_new_tokens=5)

    def examples(self) -> Iterator[Example]:
        for color in ("red", "green", "blue", "yellow"):
            for size in (64, 200):
                asked = ivl.ask("what color is the shape?", Image.new("RGB", (size, size), color))
                yield Example(id=f"{color}-{size}", conversation=asked, answers=(color,), group=f"{size} px")

    def score(self, reply: str, example: Example) -> float:
        return exact_match(reply, example.answers)


def main() -> None:
    model = sys.argv[1] if len(sys.argv) > 1 else str(build(RUN / "model"))
    config = EvalConfig(fresh=True)  # without it, an interrupted run goes on
    report = evaluate(Colors(), ivl.load(model).engine, config, model=model, predictions=RUN / "predictions.jsonl")
    (RUN / "report.json").write_text(json.dumps(report, indent=2))
    low, high = report["ci95"]
    print(f"{report['task']}: {report['value']:.0%} of {report['n']}, 95% interval {low:.0%} to {high:.0%}")
    for name, group in report["by_type"].items():
        print(f"  {name}: {group['value']:.0%}")


if __name__ == "__main__":
    main()
