"""What several replies to a question bring: `python -m studies.test_time_scaling --model DIR [--questions FILE]`.

nano reasons about two to four pictures of easy-vqa's test split. Every question is asked 16 times at each temperature, and
the same replies give the accuracy of majority voting and of the most likely reply for 1, 2, 4, 8 and 16 of them (means over
random subsets; 95% intervals by resampling the questions), beside greedy decoding and beside a judge that is always right, the
limit of any choice among the replies. --judge names a second model, such as one trained on preferences: then the reply that is
the most likely under it is measured too, beside its own greedy replies. Replies are kept in --out; a run that was stopped
goes on.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

import ivl
from examples.quickstart.alignment import ASKED, GREEDY, write_rows
from examples.quickstart.compositions import compositions
from ivl.evaluation.config import EvalConfig, Method
from ivl.evaluation.curve import by_size, draw
from ivl.evaluation.run import evaluate, versions
from ivl.evaluation.scoring import exact_match
from ivl.evaluation.task import Example
from ivl.evaluation.voting import Candidate, RewardModel, rate
from ivl.types import SamplingParams
from ivl.utils import html as pages
from ivl.utils.progress import counting

SEED = 9
"""As in examples.quickstart.alignment.held_out: the same questions."""
COLOURS = {"vote": "#1f77b4", "likelihood": "#ff7f0e", "judge": "#2ca02c", "always right": "#7f7f7f"}


@dataclass(frozen=True)
class Compositions:
    """Questions about several pictures, as a task; a reply ends with its answer."""

    rows: list[dict[str, Any]]
    name: str = "compositions"
    metric: str = "exact_match"
    params: SamplingParams = GREEDY

    def examples(self) -> Iterator[Example]:
        for row in self.rows:
            asked = ivl.ask("<image>\n" * len(row["image"]) + row["question"], *row["image"])
            yield Example(id=row["id"], conversation=asked, answers=(row["answer"],), group=row["question"])

    def score(self, reply: str, example: Example) -> float:
        return exact_match(reply, example.answers)


def read_rows(options: argparse.Namespace) -> list[dict[str, Any]]:
    if options.questions:
        return [json.loads(line) for line in options.questions.read_text().splitlines()][: options.count]
    rows = compositions("test", options.count, seed=SEED, prefix="test")
    return [{key: row[key] for key in ASKED} for row in rows]


def replies(
    options: argparse.Namespace, task: Compositions, engine: Any, temperature: float, name: str = "", model: Path | None = None
) -> list[dict[str, Any]]:
    """The predictions of all questions; one greedy reply at temperature 0."""
    path, model = options.out / f"{name}replies-{temperature:g}.jsonl", model or options.model
    config = EvalConfig(
        method=Method(style="final_answer", samples=options.samples if temperature else 1, likelihood=True),
        sampling=replace(task.params, temperature=temperature), batch_size=64,
    )  # fmt: skip
    with counting(on=True, lasting=True) as bar:
        shown = bar.add_task(f"temperature {temperature:g}", total=len(task.rows), note="")
        report = evaluate(
            task,
            engine,
            config,
            model=str(model),
            predictions=path,
            on_progress=lambda done, total, **about: bar.update(shown, completed=done, note=about["note"]),
        )
    print(temperature, {key: report["samples"][key] for key in ("replies", "without_answer")})
    return [json.loads(line) for line in path.read_text().splitlines()[1:]]


def curves(task: Compositions, found: list[dict[str, Any]], judge: Any = None) -> dict[str, dict[int, np.ndarray]]:
    """By way of choosing and number of replies: the expected score of each question."""
    samples = [[Candidate(**each) for each in row["samples"]] for row in found]
    scores = [
        [0.0 if c.answer is None else task.score(c.answer, tuple(row["answers"])) for c in some]
        for some, row in zip(samples, found, strict=True)
    ]
    rated = [
        [replace(c, rating=s) for c, s in zip(some, each, strict=True)] for some, each in zip(samples, scores, strict=True)
    ]
    ways = {
        "vote": by_size(samples, scores, "vote"),
        "likelihood": by_size(samples, scores, "likelihood"),
        "always right": by_size(rated, scores, "judge"),
    }
    if judge is not None:
        asked = {example.id: example.conversation for example in task.examples()}
        read = rate(RewardModel(judge), [asked[row["id"]] for row in found], samples)
        ways["judge"] = by_size(read, scores, "judge")
    return ways


def point(size: int, values: np.ndarray) -> dict[str, Any]:
    return {"samples": size, "value": float(values.mean()), "ci95": interval(values)}


def interval(values: np.ndarray) -> tuple[float, float]:
    """The 95% bootstrap interval of the mean over questions."""
    rng = np.random.default_rng(0)
    means = [values[rng.integers(len(values), size=len(values))].mean() for _ in range(2000)]
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def gain(values: np.ndarray, base: np.ndarray) -> list[float]:
    """Mean difference over the same questions, and its interval."""
    return [float((values - base).mean()), *interval(values - base)]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--model", type=Path, default=Path("runs/preference-effect/sft/model"))
    parser.add_argument(
        "--questions", type=Path, help="rows {id, image, question, answer}; by default made from the test split"
    )
    parser.add_argument("--count", type=int, default=400, help="questions")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--temperatures", type=float, nargs="+", default=[0.7, 1.0])
    parser.add_argument("--out", type=Path, default=Path("runs/test-time-scaling"))
    parser.add_argument("--judge", type=Path, help="a second model")
    parser.add_argument("--plot", type=Path, nargs="+", metavar="DIR", help="draw these finished runs as one figure in --out")
    options = parser.parse_args()
    if options.plot:
        results = [json.loads((run / "result.json").read_text()) | {"title": f"{run.name},"} for run in options.plot]
        plot(results, options.out / "test_time_scaling.png")
        return
    task = Compositions(read_rows(options))
    write_rows(options.out / "questions.jsonl", task.rows)
    engine = ivl.load(options.model).engine
    judge = ivl.load(options.judge).engine if options.judge else None
    greedy = curves(task, replies(options, task, engine, 0.0))["vote"][1]
    own: np.ndarray | None = None
    result: dict[str, Any] = {
        "model": str(options.model), "questions": len(task.rows), "greedy": point(1, greedy), "versions": versions(),
        "temperatures": {},
    }  # fmt: skip
    if judge is not None:
        own = curves(task, replies(options, task, judge, 0.0, "judge-", options.judge))["vote"][1]
        result["judge_greedy"] = point(1, own) | {"over_greedy": gain(own, greedy)}
    for temperature in options.temperatures:
        found = curves(task, replies(options, task, engine, temperature), judge)
        result["temperatures"][f"{temperature:g}"] = {
            way: [
                {**point(size, values), "over_greedy": gain(values, greedy)}
                | ({"over_judge": gain(values, own)} if own is not None else {})
                for size, values in sizes.items()
            ]
            for way, sizes in found.items()
        }
    (options.out / "result.json").write_text(json.dumps(result, indent=2))
    show(result)
    plot([result], options.out / "test_time_scaling.png")
    print(f"{options.out / 'result.json'}, {options.out / 'test_time_scaling.png'}")


def show(result: dict[str, Any]) -> None:
    def interval_of(pair: list[float]) -> str:
        return f"{100 * pair[0]:.1f} to {100 * pair[1]:.1f}"

    greedy = result["greedy"]
    table = Table("temperature", "taken", "replies", "right, %", "95%", "over greedy", "95%")
    table.add_row("0", "greedy", "1", f"{100 * greedy['value']:.1f}", interval_of(greedy["ci95"]), "", "")
    if own := result.get("judge_greedy"):
        over, *rest = own["over_greedy"]
        ends = [f"{100 * own['value']:.1f}", interval_of(own["ci95"]), f"{100 * over:+.1f}", interval_of(rest)]
        table.add_row("0", "judge's greedy", "1", *ends)
    for temperature, ways in result["temperatures"].items():
        for way, points in ways.items():
            for p in points:
                over, *rest = p["over_greedy"]
                table.add_row(
                    temperature, way, str(p["samples"]), f"{100 * p['value']:.1f}", interval_of(p["ci95"]),
                    f"{100 * over:+.1f}", interval_of(rest),
                )  # fmt: skip
    Console().print(table)


def plot(results: list[dict[str, Any]], path: Path) -> None:
    """A row for each model, a column for each temperature."""
    columns = len(results[0]["temperatures"])
    figure, grid = pages.pyplot().subplots(
        len(results), columns, figsize=(4.5 * columns, 3.2 * len(results)), layout="constrained", sharey="row", squeeze=False
    )
    for row, result in zip(grid, results, strict=True):
        for axes, (temperature, ways) in zip(row, result["temperatures"].items(), strict=True):
            for way, points in ways.items():
                draw(axes, points, way, COLOURS[way])
            axes.axhline(100 * result["greedy"]["value"], color="#333", linestyle="--", linewidth=1, label="greedy")
            if own := result.get("judge_greedy"):
                axes.axhline(100 * own["value"], color=COLOURS["judge"], linestyle=":", linewidth=1, label="judge's own greedy")
            axes.set_title(f"{result.get('title', '')} temperature {temperature}".strip())
    figure.legend(*grid[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=6)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
