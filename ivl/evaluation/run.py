"""Asks, scores and reports. Predictions are saved as they come, and a killed run goes on where it stopped."""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections import defaultdict
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from itertools import islice
from pathlib import Path
from typing import Any

from ivl.errors import InputError, short
from ivl.evaluation import fingerprint
from ivl.evaluation.config import EvalConfig, JudgeConfig, Method
from ivl.evaluation.curve import curve
from ivl.evaluation.predictions import Prediction, PredictionsFile
from ivl.evaluation.prompts import reasoned
from ivl.evaluation.scoring import summary
from ivl.evaluation.task import Example, Task
from ivl.evaluation.voting import GUIDED_RATING, RATING, Candidate, Rater, RatingJudge, RewardModel, choose, rate, sample
from ivl.generators import Generator, LoadConfig, connect
from ivl.types import Conversation, SamplingParams
from ivl.utils.progress import ShowProgress, reporting
from ivl.utils.signals import Interruption

PACKAGES = ("ivl", "torch", "tokenizers", "pillow", "easy-vqa")
"""Packages whose versions a report notes."""
FIRST_BATCH = 16
"""Batches grow from here, up to what is answered in a few seconds: a slow model too shows progress and saves often."""
DEFAULT, ONE_REPLY = EvalConfig(), Method()


def run(config: EvalConfig, name: str, load: LoadConfig) -> tuple[dict[str, Any], Path]:
    """Load a model, evaluate it as the configuration says, and write the report and its page.

    Args:
        name: A directory or a hub id.

    Returns:
        The report, and the file of the predictions.

    Raises:
        InputError: as `evaluate`; also for an unknown task, a model or judge that cannot be loaded, and foreign files.
    """
    from ivl.checkpoint import model_name, resolve
    from ivl.evaluation.report import check, write
    from ivl.evaluation.tasks import find
    from ivl.generators.local import load_engine

    task, predictions = find(config.task), config.predictions_of(model_name(name))
    if config.out:  # what is wrong with it should not show after hours of asking
        check(config.out, predictions, several=config.method.samples > 1)
    judge = connect_judge(config.judge) if config.method.select == "judge" else None
    engine = load_engine(name, load)
    model = str(resolve(name)) if Path(name).is_dir() else name
    stop = Interruption("stops after these questions; a second signal ends it at once")
    with reporting("evaluation", "questions") as show, stop:

        def saved(done: int, total: int, *, resumed: int = 0, note: str = "") -> None:
            show(done, total, resumed=resumed, note=note)
            if stop.signal and done < total:
                print(f"stopped at {done:,} of {total:,} questions; the same command goes on from there", file=sys.stderr)
                raise SystemExit(128 + stop.signal)

        report = evaluate(task, engine, config, model=model, predictions=predictions, judge=judge, on_progress=saved)
    if config.out:
        write(config.out, report)
    return report, predictions


def connect_judge(config: JudgeConfig) -> Rater:
    """Return a judge. One that runs here can only answer with a number."""
    if bool(config.model) == bool(config.url):
        raise InputError("--select judge needs one of --judge.model and --judge.url")
    generator, _ = connect(config)
    name = config.model or f"{config.url} {config.url_model}"
    if config.by == "likelihood":
        return RewardModel(generator, name)
    return RatingJudge(generator, GUIDED_RATING if config.model else RATING, name)


def evaluate(
    task: Task,
    generator: Generator,
    config: EvalConfig = DEFAULT,
    *,
    model: str,
    predictions: Path,
    judge: Rater | None = None,
    on_progress: ShowProgress = lambda *_, **__: None,
) -> dict[str, Any]:
    """Answer a task's examples and return the report.

    A saved prediction is used again if generator, sampling, method and judge are the same, and the example still asks the same
    with the same answers; how many are is printed on standard error.

    Args:
        config: Its limit, batch size, method and sampling; `fresh` forgets the predictions. The seed of an example follows from
            the seed of the sampling parameters (0 if none) and its id.
        model: The model's name in the report.
        predictions: A file of predictions, continued if it exists.
        judge: Rates replies, if the method selects by judge.
        on_progress: Gets the predictions so far, all that are asked for, those of an earlier run, and the metric so far.

    Raises:
        InputError: if the file holds predictions of something else or belongs to another process, or an example cannot be
            answered or scored.
    """
    if (config.method.select == "judge") != (judge is not None):
        raise InputError(f"a judge is needed to select by judge, and then only; select is {config.method.select}")
    examples = list(islice(task.examples(), config.limit))
    by_id = {example.id: example for example in examples}
    if not examples or len(by_id) != len(examples):
        count = f"{len(examples)} examples, but {len(by_id)} different ids" if examples else "no examples"
        raise InputError(f"task {task.name} gives {count}")
    asking = _Asking(task, generator, config.sampling_for(task.params), config.method, judge)
    with PredictionsFile(predictions, {"model": model, **asking.about()}, fresh=config.fresh) as file:
        same = (p for p in file.saved if p.id in by_id and p.asked == asking.hash(by_id[p.id]))
        done = {p.id: asking.prediction(by_id[p.id], p.prediction, p.samples) for p in same}
        if file.saved:
            print(f"{len(done):,} answers from {predictions}, {len(examples) - len(done):,} new", file=sys.stderr, flush=True)
        todo = iter([example for example in examples if example.id not in done])
        total, resumed, size = sum(p.score for p in done.values()), len(done), min(FIRST_BATCH, config.batch_size)
        while batch := list(islice(todo, size)):
            started = time.monotonic()
            try:
                new = asking.predictions(batch)
            except InputError as error:
                raise InputError(f"task {task.name}, examples {batch[0].id} to {batch[-1].id}: {error}") from error
            done.update((p.id, p) for p in new)
            if judge is not None and all(c.rating is None for p in done.values() for c in p.samples):
                raise InputError(f"the judge rated no reply to {len(done)} questions: it must write a number from 0 to 10")
            file.append(new)
            total += sum(p.score for p in new)
            seconds = time.monotonic() - started
            size = min(2 * size, config.batch_size) if seconds < 2 else max(1, size // 2) if seconds > 20 else size
            on_progress(len(done), len(examples), resumed=resumed, note=f"{total / len(done):.2%} so far")
    answered = [done[example.id] for example in examples]
    by_type = defaultdict(list)
    for prediction in answered:
        by_type[prediction.group].append(prediction.score)
    return {
        "task": task.name,
        "metric": task.metric,
        **summary([prediction.score for prediction in answered]),
        "by_type": {group: summary(scores) for group, scores in sorted(by_type.items())},
        **({} if config.method == ONE_REPLY else asking.samples_report(examples, answered)),
        "model": model,
        "params": json.loads(json.dumps(asdict(asking.params))),
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

    def about(self) -> dict[str, Any]:
        """Return what predictions depend on beside their questions."""
        settings = {"params": asdict(self.params), "method": asdict(self.method)}
        return {
            "task": self.task.name, **fingerprint.of_generator(self.generator), **settings,
            "judge": fingerprint.of_judge(self.judge),
        }  # fmt: skip

    def question(self, example: Example) -> Conversation:
        return reasoned(example.conversation, self.method.style) if self.method.instruct else example.conversation

    def hash(self, example: Example) -> str:
        return fingerprint.of_question(self.question(example), example.answers)

    def predictions(self, examples: list[Example]) -> list[Prediction]:
        asked = [self.question(example) for example in examples]
        params = [self.seeded(example) for example in examples]
        likelihood = self.method.select == "likelihood" or self.method.likelihood
        candidates = sample(self.generator, asked, params, self.method.samples, style=self.method.style, likelihood=likelihood)
        if self.judge is not None:
            candidates = rate(self.judge, asked, candidates)
        plain = self.method == ONE_REPLY
        return [
            self.prediction(example, replies[0].text, () if plain else tuple(replies))
            for example, replies in zip(examples, candidates, strict=True)
        ]

    def seeded(self, example: Example) -> SamplingParams:
        """Give every example other random numbers, the same on every run."""
        if self.params.temperature == 0:
            return self.params
        digest = hashlib.sha256(f"{self.params.seed or 0} {example.id}".encode()).digest()
        return replace(self.params, seed=int.from_bytes(digest[:4], "little") >> 2)

    def prediction(self, example: Example, text: str, samples: tuple[Candidate, ...] = ()) -> Prediction:
        """Score a reply, or the one that counts of several, by the current rules."""
        chosen = samples[choose(samples, self.method.select)] if samples else Candidate(text=text, answer=text)
        return Prediction(
            id=example.id, asked=self.hash(example), group=example.group, answers=example.answers, prediction=chosen.text,
            score=self.score(chosen, example), samples=samples,
        )  # fmt: skip

    def score(self, candidate: Candidate, example: Example) -> float:
        if candidate.answer is None:
            return 0.0
        score = self.task.score(candidate.answer, example.answers)
        if not isinstance(score, int | float) or not 0 <= score <= 1:
            raise InputError(f"the score of {example.id} must be a number from 0 to 1, got {short(score)}")
        return float(score)

    def samples_report(self, examples: list[Example], predictions: list[Prediction]) -> dict[str, Any]:
        """Report the metric for fewer replies, and how many replies have no answer or rating."""
        samples = [p.samples for p in predictions]
        candidates = [candidate for replies in samples for candidate in replies]
        scores = [[self.score(c, example) for c in replies] for example, replies in zip(examples, samples, strict=True)]
        return {
            "method": asdict(self.method),
            "judge": fingerprint.of_judge(self.judge),
            "samples": {
                "replies": len(candidates),
                "without_answer": sum(c.answer is None for c in candidates),
                "without_rating": sum(c.rating is None for c in candidates) if self.judge is not None else None,
                "curve": curve(samples, scores, self.method.select),
            },
        }


def versions() -> dict[str, str]:
    """Return the installed versions of packages that may influence a score."""
    installed = {}
    for package in PACKAGES:
        with suppress(PackageNotFoundError):
            installed[package] = version(package)
    return installed
