"""Asks, scores and reports. Predictions are saved as they come, and a killed run goes on where it stopped."""

from __future__ import annotations

import hashlib
import json
import time
from collections import defaultdict
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from itertools import islice
from pathlib import Path
from typing import Any

from ivl.checkpoint import model_name
from ivl.errors import InputError
from ivl.evaluation.config import EvalConfig, JudgeConfig, Method
from ivl.evaluation.curve import curve
from ivl.evaluation.prompts import reasoned
from ivl.evaluation.scoring import wilson
from ivl.evaluation.task import Example, Task
from ivl.evaluation.voting import GUIDED_RATING, RATING, Candidate, Rater, RatingJudge, RewardModel, choose, rate, sample
from ivl.generators import Generator, answers_of, connect
from ivl.types import SamplingParams
from ivl.utils.files import write_json
from ivl.utils.jsonl import AppendLog, json_line
from ivl.utils.progress import ShowProgress, reporting

PACKAGES = ("ivl", "torch", "tokenizers", "pillow", "easy-vqa")
"""Packages whose versions a report notes."""
FIRST_BATCH = 16
"""Batches grow from here, up to what is answered in a few seconds: a slow model too shows progress and saves often."""
ONE_REPLY = Method()


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """One line of a predictions file."""

    id: str
    group: str
    answers: tuple[str, ...]
    prediction: str
    """The reply that counts."""
    score: float
    samples: tuple[Candidate, ...] = ()
    """All replies, where the method notes more than the text of one."""


def run(config: EvalConfig, generator: Generator, *, model: str, fingerprint: str = "") -> dict[str, Any]:
    """Evaluate a generator as the configuration says, write the report and its page, and return the report.

    Args:
        model: The model's name, which tells its predictions from those of others.
        fingerprint: Changes when the model's replies may change.

    Raises:
        InputError: as `evaluate`; also for an unknown task, or a judge that cannot be loaded.
    """
    from ivl.evaluation.report import write_page
    from ivl.evaluation.tasks import find
    from ivl.utils.html import pyplot

    task = find(config.task)
    if config.out and config.method.samples > 1:
        pyplot()  # a missing library should not show after hours of sampling
    judge, name = connect_judge(config.judge) if config.method.needs_judge else (None, "")
    predictions = predictions_of(config, model)
    if config.fresh:
        predictions.unlink(missing_ok=True)
    with reporting("evaluation", "questions") as show:
        report = evaluate(
            task, generator, model=model, predictions=predictions, fingerprint=fingerprint, limit=config.limit,
            batch_size=config.batch_size, params=config.sampling_for(task.params), method=replace(config.method, judge=name),
            judge=judge, on_progress=show,
        )  # fmt: skip
    if config.out:
        write_json(config.out, report)
        if config.method.samples > 1:
            write_page(config.out.with_suffix(".html"), report)
    return report


def predictions_of(config: EvalConfig, model: str) -> Path:
    """Return the file of a run's predictions."""
    default = Path("runs/eval") / f"{model_name(model)}-{config.task}.jsonl"
    return config.predictions or (config.out.with_suffix(".predictions.jsonl") if config.out else default)


def connect_judge(config: JudgeConfig) -> tuple[Rater, str]:
    """Return a judge and its name. One that runs here can only answer with a number."""
    generator, name = connect(config)
    if config.by == "likelihood":
        return RewardModel(generator), f"likelihood under {name}"
    return RatingJudge(generator, GUIDED_RATING if config.model else RATING), name


def evaluate(
    task: Task,
    generator: Generator,
    *,
    model: str,
    predictions: Path,
    fingerprint: str = "",
    limit: int | None = None,
    batch_size: int = 512,
    params: SamplingParams | None = None,
    method: Method = ONE_REPLY,
    judge: Rater | None = None,
    on_progress: ShowProgress = lambda *_, **__: None,
) -> dict[str, Any]:
    """Answer a task's first `limit` examples and return the report.

    Args:
        model: The model's name; with the fingerprint it tells its predictions from those of others.
        predictions: A jsonl file, continued if it exists.
        batch_size: Most examples that are asked, and saved, at a time.
        params: Replace the task's. The seed of an example follows from their seed (0 if none) and its id.
        judge: Rates replies, if the method selects by judge.
        on_progress: Gets the predictions so far, all that are asked for, those of an earlier run, and the metric so far.

    Raises:
        InputError: if the file holds predictions of something else, or an example cannot be answered.
    """
    if method.needs_judge != (judge is not None):
        raise InputError(f"a judge is needed to select by judge, and then only; got select {method.select!r}, judge {judge}")
    listed = list(islice(task.examples(), limit))
    examples = {example.id: example for example in listed}
    if not examples or len(examples) != len(listed):
        raise InputError(f"task {task.name} gives {len(listed)} examples and {len(examples)} different ids")
    asking = _Asking(task, generator, params or task.params, method, judge)
    settings = json.loads(json.dumps(asdict(asking.params)))
    about = {"task": task.name, "model": model, "fingerprint": fingerprint, "params": settings}
    if method != ONE_REPLY:
        about["method"] = asdict(method)
    saved, log = open_predictions(predictions, about)
    done = {p.id: asking.prediction(examples[p.id], p.prediction, p.samples) for p in saved if p.id in examples}
    todo = iter([example for example in listed if example.id not in done])
    total, resumed, size = sum(p.score for p in done.values()), len(done), min(FIRST_BATCH, batch_size)
    with log:
        while batch := list(islice(todo, size)):
            started = time.monotonic()
            try:
                new = asking.predictions(batch)
            except InputError as error:
                raise InputError(f"task {task.name}, examples {batch[0].id} to {batch[-1].id}: {error}") from error
            log.append(map(_row, new))
            log.sync()
            done.update((p.id, p) for p in new)
            total += sum(p.score for p in new)
            seconds = time.monotonic() - started
            if seconds < 2:
                size = min(2 * size, batch_size)
            elif seconds > 20:
                size = max(1, size // 2)
            on_progress(len(done), len(examples), resumed=resumed, note=f"{total / len(done):.2%} so far")
    by_type = defaultdict(list)
    for prediction in done.values():
        by_type[prediction.group].append(prediction.score)
    return {
        "task": task.name,
        "metric": task.metric,
        **summary([p.score for p in done.values()]),
        "by_type": {group: summary(scores) for group, scores in sorted(by_type.items())},
        **({} if method == ONE_REPLY else {"method": asdict(method), "samples": asking.samples_report([*done.values()])}),
        "model": model,
        "params": settings,
        "versions": versions(),
    }


@dataclass(frozen=True)
class _Asking:
    """Turns examples into predictions."""

    task: Task
    generator: Generator
    params: SamplingParams
    method: Method
    judge: Rater | None

    def predictions(self, examples: list[Example]) -> list[Prediction]:
        asked = [example.conversation for example in examples]
        if self.method.instruct:
            asked = [reasoned(conversation, self.method.style) for conversation in asked]
        params = [self.seeded(example) for example in examples]
        if self.method == ONE_REPLY:
            texts = answers_of(self.generator, asked, params)
            return [self.prediction(example, text) for example, text in zip(examples, texts, strict=True)]
        likelihood = self.method.select == "likelihood" or self.method.likelihood
        candidates = sample(self.generator, asked, params, self.method.samples, style=self.method.style, likelihood=likelihood)
        if self.judge is not None:
            candidates = rate(self.judge, asked, candidates)
        return [self.prediction(example, "", tuple(replies)) for example, replies in zip(examples, candidates, strict=True)]

    def seeded(self, example: Example) -> SamplingParams:
        """Give every example other random numbers, the same on every run."""
        if self.params.temperature == 0:
            return self.params
        digest = hashlib.sha256(f"{self.params.seed or 0} {example.id}".encode()).digest()
        return replace(self.params, seed=int.from_bytes(digest[:4], "little") >> 2)

    def prediction(self, example: Example, text: str, samples: tuple[Candidate, ...] = ()) -> Prediction:
        """Score a reply, or the one that counts of several, by the current rules."""
        if samples:
            chosen = samples[choose(samples, self.method.select)]
            text, score = chosen.text, self.score(chosen, example.answers)
        else:
            score = self.task.score(text, example.answers)
        return Prediction(
            id=example.id, group=example.group, answers=example.answers, prediction=text, score=score, samples=samples
        )

    def score(self, candidate: Candidate, answers: tuple[str, ...]) -> float:
        return 0.0 if candidate.answer is None else self.task.score(candidate.answer, answers)

    def samples_report(self, predictions: list[Prediction]) -> dict[str, Any]:
        """Report the metric for fewer replies, and how many replies have no answer or rating."""
        samples = [p.samples for p in predictions]
        candidates = [candidate for replies in samples for candidate in replies]
        scores = [[self.score(c, p.answers) for c in p.samples] for p in predictions]
        return {
            "replies": len(candidates),
            "without_answer": sum(c.answer is None for c in candidates),
            "without_rating": sum(c.rating is None for c in candidates) if self.judge is not None else None,
            "curve": [asdict(point) for point in curve(samples, scores, self.method.select)],
        }


def summary(scores: list[float]) -> dict[str, Any]:
    """Return the mean score with its 95% interval."""
    total = sum(scores)
    return {"value": total / len(scores), "ci95": list(wilson(total, len(scores))), "n": len(scores)}


def versions() -> dict[str, str]:
    """Return the installed versions of packages that may influence a score."""
    installed = {}
    for package in PACKAGES:
        with suppress(PackageNotFoundError):
            installed[package] = version(package)
    return installed


def open_predictions(path: Path, about: dict[str, Any]) -> tuple[list[Prediction], AppendLog]:
    """Open a file of predictions under a first line that says whose they are.

    Returns:
        The saved predictions, and the log behind them. An unfinished last line, which a killed run may leave, is cut off.

    Raises:
        InputError: if the file holds predictions of something else, or a line is broken.
    """
    saved: list[Prediction] = []

    def take(number: int, row: dict[str, Any]) -> bool:
        if number > 1:
            saved.append(_prediction(row, f"{path}:{number}"))
        for key in {**about, **row} if number == 1 else ():
            if row.get(key) != about.get(key):
                raise InputError(
                    f"{path}: holds predictions with {key} {row.get(key)!r}, this run has {about.get(key)!r}; "
                    "delete the file or name another with --predictions"
                )
        return True

    log = AppendLog(path)
    if not log.resume(json_line(about), take, "delete the file to start again"):
        log.append([about])
        log.sync()
    return saved, log


def _row(prediction: Prediction) -> dict[str, Any]:
    return {key: value for key, value in asdict(prediction).items() if key != "samples" or value}


def _prediction(row: dict[str, Any], where: str) -> Prediction:
    try:
        samples = tuple(Candidate(**candidate) for candidate in row.get("samples", ()))
        return Prediction(**{**row, "answers": tuple(row["answers"]), "samples": samples})
    except (KeyError, TypeError) as error:
        raise InputError(f"{where}: not a prediction ({error}); delete the file to start again") from error
