"""`ivl eval`: score a model on a task."""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from ivl.errors import InputError
from ivl.evaluation.scoring import Style
from ivl.generators import Dtype

if TYPE_CHECKING:
    from ivl.evaluation.run import Progress
    from ivl.evaluation.voting import Judge, Reader
    from ivl.types import SamplingParams

SAMPLED, REASONED = 0.7, 1024
"""Temperature of several replies and tokens of a reasoned one, unless told otherwise."""


def evaluate(args: list[str]) -> None:
    tyro.cli(run, prog="ivl eval", args=args)


def run(
    model: tyro.conf.Positional[Annotated[str | None, tyro.conf.arg(metavar="MODEL")]] = None,
    /,
    *,
    task: str = "easy-vqa",
    limit: int | None = None,
    out: Path | None = None,
    predictions: Path | None = None,
    fresh: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False,
    batch_size: int = 512,
    cot: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False,
    style: Style | None = None,
    samples: int = 1,
    select: Literal["vote", "likelihood", "judge"] = "vote",
    temperature: float | None = None,
    top_p: float = 1.0,
    seed: int = 0,
    max_new_tokens: int | None = None,
    judge_model: str | None = None,
    judge_url: str | None = None,
    judge_url_model: str | None = None,
    judge_by: Literal["rating", "likelihood"] = "rating",
    max_tiles: int | None = None,
    dtype: Dtype = "auto",
    device: str = "auto",
    list_tasks: Annotated[bool, tyro.conf.arg(name="list"), tyro.conf.FlagCreatePairsOff] = False,
) -> None:
    """Score a model on a benchmark, with a 95% confidence interval (Wilson).

    Predictions are saved as they come; the same command continues a run that was interrupted.

    Args:
        model: A model directory or hub id.
        task: What to measure; --list shows all.
        limit: Only the first so many examples.
        out: Write the report (task, metric, value, ci95, n, by_type, model, versions) to this JSON file.
        predictions: Where predictions are kept; by default beside --out, or under runs/eval.
        fresh: Forget predictions of an earlier run.
        batch_size: Most questions answered, and saved, at a time; fewer while the model is slow.
        cot: Ask the model to reason first and to close with its answer; only that is scored.
        style: How replies show their answer: direct (they are it), final_answer (a last line "Final answer: ..."), boxed, think
            (tags). With --cot this is asked for (default final_answer); without, it is what the model was trained to do.
        samples: Replies to each question, of which one counts; all are saved.
        select: Which one: vote (of the answer that most give), likelihood (the highest mean log-probability of a token) or
            judge (the highest rating of another model).
        temperature: 0 is greedy; by default the task's, or 0.7 for several replies.
        top_p: Sample from the smallest set of tokens that has this probability.
        seed: Other seeds give other replies.
        max_new_tokens: Longest reply; by default the task's, or 1024 where replies reason.
        judge_model: Directory or hub id of the model that rates replies.
        judge_url: Or an OpenAI-compatible endpoint; its key is taken from OPENAI_API_KEY.
        judge_url_model: Name of the judge at the endpoint.
        judge_by: Ask the judge for a rating, or take how likely the reply is under --judge-model, such as a model trained on
            preferences.
        max_tiles: Tiles an image may be cut into; by default what the checkpoint says.
        dtype: Type of the weights; auto is the stored one where the processor computes in it well.
        device: cpu, cuda, or auto.
        list_tasks: Show the tasks and stop.
    """
    from ivl.evaluation.tasks import TASKS, find

    if list_tasks:
        print("\n".join(f"{name:20}{text}" for name, (_, text) in TASKS.items()))
        return
    chosen = find(task)
    if model is None:
        raise InputError("name a model to evaluate: ivl eval MODEL --task easy-vqa")
    if (limit is not None and limit < 1) or batch_size < 1:
        raise InputError(f"--limit and --batch-size must be at least 1, got {limit} and {batch_size}")
    if samples < 1:
        raise InputError(f"need at least 1 reply to each question, got --samples {samples}")
    if judge_url and not judge_url_model:
        raise InputError("--judge-url needs --judge-url-model, the name that the endpoint knows the judge by")
    judging = [name for name in (judge_model, judge_url) if name]
    if len(judging) != (select == "judge") or (select == "judge" and samples < 2):
        raise InputError("--select judge needs --samples of 2 or more and one of --judge-model and --judge-url; else no judge")
    if judge_by == "likelihood" and not judge_model:
        raise InputError("--judge-by likelihood needs --judge-model: an endpoint does not tell how likely a given reply is")
    asked = style or ("final_answer" if cot else "direct")
    params = sampling(chosen.params, asked, samples, temperature=temperature, top_p=top_p, seed=seed, limit=max_new_tokens)
    if predictions is None:
        default = Path("runs/eval") / f"{Path(model).name or 'model'}-{chosen.name}.jsonl"
        predictions = out.with_suffix(".predictions.jsonl") if out else default
    if fresh:
        predictions.unlink(missing_ok=True)

    from ivl.api import load
    from ivl.checkpoint import resolve
    from ivl.checkpoint.files import fingerprint
    from ivl.evaluation.report import write_page
    from ivl.evaluation.run import evaluate, write_report
    from ivl.evaluation.task import Method

    if samples > 1 and out:
        from ivl.utils.html import pyplot

        pyplot()  # a missing library should not show after hours of sampling
    judge, judge_name = connect_judge(judge_model, judge_url, judge_url_model, judge_by) if judging else (None, "")
    method = Method(style=asked, instruct=cot, samples=samples, select=select, judge=judge_name)
    loaded = load(model, dtype=dtype, device=device, max_tiles=max_tiles)
    directory = resolve(model)
    settings = f"{fingerprint(directory)} {loaded.engine.model.dtype} max_tiles={max_tiles}"
    report = evaluate(
        chosen,
        loaded.engine,
        model=str(directory) if Path(model).is_dir() else model,
        predictions=predictions,
        fingerprint=settings,
        limit=limit,
        batch_size=batch_size,
        params=params,
        method=method,
        judge=judge,
        on_progress=ProgressLine(),
    )
    rows = {"all": report, **report["by_type"]}
    for name, row in rows.items():
        low, high = row["ci95"]
        print(f"{name:12}{chosen.metric} {row['value']:7.2%}  95% interval {low:.2%} to {high:.2%}  n {row['n']:,}")
    for point in report["samples"]["curve"] if samples > 1 else ():
        low, high = point["ci95"]
        print(f"{point['samples']:>4} replies, {select:11} {point['value']:7.2%}  95% interval {low:.2%} to {high:.2%}")
    print(f"predictions: {predictions}")
    if out:
        write_report(out, report)
        print(f"report: {out}")
        if samples > 1:
            write_page(out.with_suffix(".html"), report)
            print(f"page: {out.with_suffix('.html')}")


def sampling(
    params: SamplingParams, style: Style, samples: int, *, temperature: float | None, top_p: float, seed: int, limit: int | None
) -> SamplingParams:
    """A task's settings with those of the command line."""
    changes: dict[str, Any] = {"top_p": top_p}
    if limit is not None or style != "direct":
        changes["max_new_tokens"] = REASONED if limit is None else limit
    if temperature is not None or samples > 1:
        changes["temperature"] = SAMPLED if temperature is None else temperature
    try:
        changed = replace(params, **changes)
    except ValueError as error:
        raise InputError(str(error)) from error
    if samples > 1 and changed.temperature == 0:
        raise InputError(f"at temperature 0 all {samples} replies are the same: raise --temperature")
    return replace(changed, seed=seed) if changed.temperature > 0 else changed


def connect_judge(model: str | None, url: str | None, url_model: str | None, by: str) -> tuple[Judge | Reader, str]:
    """A judge and its name. One that runs here can only answer with a number."""
    from ivl.cli.generators import connect
    from ivl.evaluation.voting import GUIDED_RATING, RATING, Judge, Reader

    generator, name = connect(model, url, url_model)
    if by == "likelihood":
        return Reader(generator), f"likelihood under {name}"
    return Judge(generator, GUIDED_RATING if model else RATING), name


class ProgressLine:
    """One line on a terminal, redrawn; elsewhere a line now and then."""

    def __init__(self) -> None:
        self.started = self.shown = time.monotonic()
        self.live = sys.stderr.isatty()

    def __call__(self, progress: Progress) -> None:
        now = time.monotonic()
        last = progress.done == progress.total
        if not (self.live or last or now - self.shown > 10):
            return
        self.shown = now
        rate = (progress.done - progress.resumed) / max(1e-9, now - self.started)
        text = (
            f"{progress.done:,}/{progress.total:,} ({progress.done / progress.total:.0%}), {progress.value:.2%} so far, "
            f"{rate:,.1f}/s, {(progress.total - progress.done) / max(1e-9, rate):,.0f} s left"
        )
        end = "\n" if last or not self.live else ""
        print(f"\r{text:<90}" if self.live else text, end=end, file=sys.stderr, flush=True)
