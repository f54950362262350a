"""Asks, scores and reports. Predictions are saved as they come, and a killed run goes on where it stopped."""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from ivl.errors import InputError, short
from ivl.evaluation import fingerprint, voting
from ivl.evaluation.config import EvalConfig, Method
from ivl.evaluation.figures import rows_of
from ivl.evaluation.grading import Grader, if_right
from ivl.evaluation.prompts import reasoned
from ivl.evaluation.results import Prediction, PredictionsFile, beside, check_scores, write_scores
from ivl.evaluation.task import Example, Score, Scored, Task, limited, score_of
from ivl.evaluation.voting import Candidate, Rater, choose
from ivl.generators import Generator, LoadConfig, connect
from ivl.parallel.follow import LeadingEngine
from ivl.parallel.launch import start_world, stop_world
from ivl.train.world import World
from ivl.types import Conversation, SamplingParams
from ivl.utils.progress import ShowProgress, reporting
from ivl.utils.signals import Interruption

PACKAGES = ("ivl", "torch", "tokenizers", "pillow", "easy-vqa")
"""Packages whose versions a report notes."""
FIRST_BATCH = 16
"""Batches grow from here, up to what is answered in a few seconds: a slow model too shows progress and saves often."""
DEFAULT, ONE_REPLY, ALONE = EvalConfig(), Method(), World()


def _silent(*_: object, **__: object) -> None:
    pass


@dataclass(frozen=True)
class Evaluated:
    """What an evaluation gives: the report, and for each question its score and its prediction."""

    report: dict[str, Any]
    scored: list[Scored]
    predictions: list[Prediction]

    @property
    def replies(self) -> list[str]:
        """The replies that count."""
        return [prediction.prediction for prediction in self.predictions]


def run(
    config: EvalConfig, name: str, load: LoadConfig, generator: Generator | None = None, task: Task | None = None
) -> tuple[dict[str, Any], list[tuple[str, Path]]]:
    """Load a model, evaluate it as the configuration says, and write the report, its page and files of other tools.

    Args:
        name: A directory or a hub id, or the name of the generator.
        generator: Answers in place of a model that is loaded here.
        task: Is asked in place of the one that the configuration names.

    Under torchrun every rank answers its share, and the first one reports. The others return an empty report.

    Returns:
        The report, and what files were written.

    Raises:
        InputError: as `evaluate`; also for an unknown task, a model or judge that cannot be loaded, and foreign files.
    """
    from ivl.checkpoint import model_name, resolve
    from ivl.evaluation.foreign import export, submit
    from ivl.evaluation.report import check, write
    from ivl.evaluation.tasks import task_of
    from ivl.generators.local import load_engine

    load = load.with_one_adapter()
    if load.adapter and generator is not None:
        raise InputError(f"--adapter {load.adapter[0]} is for a model that runs here")
    label = "+".join([model_name(name) if generator is None else name, *map(model_name, load.adapter)])
    task, predictions = task or task_of(config), config.predictions_of(label)
    if config.out:  # what is wrong with it should not show after hours of asking
        check(config.out, predictions, several=config.method.samples > 1)
    task.settings()  # a missing file of rows is told before a model is loaded
    world = World() if load.tensor_parallel > 1 else start_world(load.device.partition(":")[0])
    if world.size > 1:
        if "," in load.device:
            raise InputError(f"--device {load.device} is for one process: torchrun gives each of {world.size} a card")
        load = replace(load, device=str(world.device))
    judge, grader = connect_judge(config, predictions)
    model = " + ".join([str(resolve(name)) if generator is None and Path(name).is_dir() else name, *load.adapter])
    own = generator is None
    generator = generator or load_engine(name, load)
    shares = [beside(predictions, f"rank{rank}.jsonl") for rank in range(world.size)] if world.size > 1 else []
    if shares:
        asking = _Asking(task, generator, config, model, judge)
        asking.answered(asking.examples(world), shares[world.rank])
        world.barrier()
        stop_world(world)
        if not world.is_main:
            return {}, []
    stop = Interruption("stops after these questions; a second signal ends it at once")
    with reporting("evaluation", "questions") as show, stop:

        def saved(done: int, total: int, *, resumed: int = 0, note: str = "") -> None:
            show(done, total, resumed=resumed, note=note)
            if stop.signal and done < total:
                print(f"stopped at {done:,} of {total:,} questions; the same command goes on from there", file=sys.stderr)
                raise SystemExit(128 + stop.signal)

        result = evaluate_all(
            task, generator, config, model=model, predictions=predictions, judge=judge, grader=grader, on_progress=saved,
            shares=shares,
        )  # fmt: skip
    if own and isinstance(generator, LeadingEngine):
        generator.close()  # another model may follow
    files = [("predictions", predictions)]
    if result.report["value"] is None:
        files.append(("submission", submit(beside(predictions, "submission"), task, result.scored, result.replies)))
    if config.export:
        exported = export(config.export, config.export_to, task, result.report, result.scored, result.replies)
        files += [("exported", path) for path in exported]
    if config.out:
        write(config.out, result)
        files += [("report", config.out), ("page", config.out.with_suffix(".html"))]
    return result.report, files


def connect_judge(config: EvalConfig, predictions: Path) -> tuple[Rater | None, Grader | None]:
    """Load the judge, if one is named, as the rater that selects replies and as the grader of what scores leave undecided."""
    judge = config.judge
    if not (judge.model or judge.url):
        if config.method.select == "judge":
            raise InputError("--select judge needs one of --judge.model and --judge.url")
        return None, None
    generator, name = connect(judge)
    grader = Grader(generator, name, beside(predictions, "judge.jsonl"))
    if config.method.select != "judge":
        return None, grader
    shown = judge.model or f"{judge.url} {judge.url_model}"
    if judge.by == "likelihood":
        return voting.RewardModel(generator, shown), None
    return voting.RatingJudge(generator, voting.GUIDED_RATING if judge.model else voting.RATING, shown), grader


def evaluate(
    task: Task, generator: Generator, config: EvalConfig = DEFAULT, *, model: str, predictions: Path, **options: Any
) -> dict[str, Any]:
    """Answer a task's examples and return the report, as `evaluate_all` does."""
    return evaluate_all(task, generator, config, model=model, predictions=predictions, **options).report


def evaluate_all(
    task: Task,
    generator: Generator,
    config: EvalConfig = DEFAULT,
    *,
    model: str,
    predictions: Path,
    judge: Rater | None = None,
    grader: Grader | None = None,
    on_progress: ShowProgress = _silent,
    shares: Sequence[Path] = (),
) -> Evaluated:
    """Answer a task's examples, score the replies, and write the scores beside the predictions.

    A saved prediction is used again if generator, sampling, method and judge are the same, and the example still asks the same
    with the same answers; how many are is printed on standard error.

    Args:
        config: Its limit, batch size, method and sampling; `fresh` forgets the predictions. The seed of an example follows from
            the seed of the sampling parameters (0 if none) and its id.
        model: The model's name in the report.
        predictions: A file of predictions, continued if it exists.
        judge: Rates replies, if the method selects by judge.
        grader: Decides about replies that the task's rule leaves undecided. What stays undecided makes the value a range.
        on_progress: Gets the predictions so far, all that are asked for, those of an earlier run, and the metric so far.
        shares: Files of the ranks, whose predictions are taken over.

    Raises:
        InputError: if the file holds predictions of something else or belongs to another process, or an example cannot be
            answered or scored.
    """
    if (config.method.select == "judge") != (judge is not None):
        raise InputError(f"a judge is needed to select by judge, and then only; select is {config.method.select}")
    check_scores(beside(predictions, "scores.jsonl"))
    asking = _Asking(task, generator, config, model, judge)
    examples = asking.examples()
    answered = asking.answered(examples, predictions, on_progress, shares)
    scores = [asking.scores[example.id] for example in examples]
    scored = list(map(Scored, examples, grader.decide(scores) if grader else scores))
    report = {
        "task": task.name,
        "metric": task.metric,
        **figures_of(task, scored, config.undecided),
        **({} if config.method == ONE_REPLY else asking.samples_report(examples, answered, grader)),
        "model": model,
        "params": json.loads(json.dumps(asdict(asking.params))),
        **task.settings(),
        "versions": versions(),
    }
    if grader and grader.unread is not None and "undecided" in report:
        report["undecided"]["notes"].append(f"the judge's replies decide nothing, such as {short(grader.unread)}")
    if report["value"] is not None:
        headline = next(iter(task.figures(scored).values()))
        about = {key: report[key] for key in ("task", "metric", "model")}
        write_scores(beside(predictions, "scores.jsonl"), about, headline, scored, answered)
    return Evaluated(report, scored, answered)


def figures_of(task: Task, scored: list[Scored], undecided: Literal["range", "wrong"]) -> dict[str, Any]:
    """Return the headline and the other figures of a report. Undecided replies make each value a range, from wrong to right."""
    if not any(s.example.answers for s in scored):  # a server has them
        return {"value": None, "ci95": None, "n": len(scored), "by_type": {}}
    rows = rows_of(task.figures(scored))
    left = [s.score.undecided for s in scored if s.score.undecided]
    if left and undecided == "range":
        for name, best in rows_of(task.figures([Scored(s.example, if_right(s.score)) for s in scored])).items():
            row = rows[name]
            row |= {"range": [row["value"], best["value"]], "ci95": [row["ci95"][0], max(row["ci95"][1], best["ci95"][1])]}
    headline, *others = rows
    notes = sorted({f"the official tool {question.official}" for question in left if question.official})
    about = {"undecided": {"replies": len(left), "count_as": undecided, "notes": notes}} if left else {}
    return {**rows[headline], "by_type": {name: rows[name] for name in others}, **about}


@dataclass(frozen=True)
class _Asking:
    """Turns examples into predictions."""

    task: Task
    generator: Generator
    config: EvalConfig
    model: str
    judge: Rater | None
    scores: dict[str, Score] = field(default_factory=dict[str, Score])
    """Scores of the replies that count, by example."""

    @property
    def params(self) -> SamplingParams:
        return self.config.sampling_for(self.task.params)

    def examples(self, world: World = ALONE) -> list[Example]:
        """Return the examples that fall to this rank, whole clusters of them."""
        examples = limited(self.task.examples(), self.config.limit)
        if not examples:
            raise InputError(f"task {self.task.name} gives no examples")
        (name, times), *_ = Counter(example.id for example in examples).most_common(1)
        if times > 1:
            raise InputError(f"task {self.task.name} gives {times} examples of the same id {name!r}")
        mine = set(list(dict.fromkeys(example.unit for example in examples))[world.rank :: world.size])
        return [example for example in examples if example.unit in mine]

    def question(self, example: Example) -> Conversation:
        method = self.config.method
        return reasoned(example.conversation, method.style) if method.instruct else example.conversation

    def hash(self, example: Example) -> str:
        return fingerprint.of_question(self.question(example), example.answers)

    def answered(
        self, examples: list[Example], path: Path, show: ShowProgress = _silent, shares: Sequence[Path] = ()
    ) -> list[Prediction]:
        """Return the predictions of examples: those that are saved, and of the others once they are saved."""
        by_id, config = {example.id: example for example in examples}, self.config
        about = {
            "model": self.model, "task": self.task.name, **fingerprint.of_generator(self.generator),
            "params": asdict(self.params), "method": asdict(config.method), "judge": fingerprint.of_judge(self.judge),
        }  # fmt: skip
        with PredictionsFile(path, about, fresh=config.fresh) as file:
            done = self._same(file.saved, by_id)
            if file.saved:
                print(f"{len(done):,} answers from {path}, {len(examples) - len(done):,} new", file=sys.stderr, flush=True)
            for each in shares:
                with PredictionsFile(each, about) as share:
                    new = {key: p for key, p in self._same(share.saved, by_id).items() if key not in done}
                file.append(list(new.values()))
                done |= new
            todo = iter([example for example in examples if example.id not in done])
            resumed, size = len(done), min(FIRST_BATCH, config.batch_size)
            while batch := list(islice(todo, size)):
                started = time.monotonic()
                try:
                    fresh = self.predictions(batch)
                except InputError as error:
                    raise InputError(f"task {self.task.name}, examples {batch[0].id} to {batch[-1].id}: {error}") from error
                done |= {p.id: p for p in fresh}
                if self.judge is not None and all(c.rating is None for p in done.values() for c in p.samples):
                    raise InputError(f"the judge rated no reply to {len(done)} questions: it must write a number from 0 to 10")
                file.append(fresh)
                seconds, total = time.monotonic() - started, sum(p.score for p in done.values())
                size = min(2 * size, config.batch_size) if seconds < 2 else max(1, size // 2) if seconds > 20 else size
                form = ".2%" if total <= len(done) else ".2f"  # ratings go beyond 1
                show(len(done), len(examples), resumed=resumed, note=f"{total / len(done):{form}} so far")
        return [done[example.id] for example in examples]

    def _same(self, saved: list[Prediction], by_id: dict[str, Example]) -> dict[str, Prediction]:
        """Return the saved predictions of questions that are still asked the same, scored anew."""
        same = (p for p in saved if p.id in by_id and p.asked == self.hash(by_id[p.id]))
        return {p.id: self.prediction(by_id[p.id], p.prediction, p.samples) for p in same}

    def predictions(self, examples: list[Example]) -> list[Prediction]:
        asked, method = [self.question(example) for example in examples], self.config.method
        candidates = voting.sample(
            self.generator, asked, [self.seeded(example) for example in examples], method.samples, style=method.style,
            likelihood=method.select == "likelihood" or method.likelihood,
        )  # fmt: skip
        if self.judge is not None:
            candidates = voting.rate(self.judge, asked, candidates)
        if method.select == "vote":  # replies that the task reads alike are one answer
            candidates = [
                [replace(c, answer=score_of(self.task, c.answer, example).answer or c.answer) for c in replies]
                for example, replies in zip(examples, candidates, strict=True)
            ]
        return [
            self.prediction(example, replies[0].text, () if method == ONE_REPLY else tuple(replies))
            for example, replies in zip(examples, candidates, strict=True)
        ]

    def seeded(self, example: Example) -> SamplingParams:
        """Give every example other random numbers, the same on every run."""
        params = self.params
        digest = hashlib.sha256(f"{params.seed or 0} {example.id}".encode()).digest()
        return replace(params, seed=int.from_bytes(digest[:4], "little") >> 2) if params.temperature else params

    def prediction(self, example: Example, text: str, samples: tuple[Candidate, ...] = ()) -> Prediction:
        """Score a reply, or the one that counts of several, by the current rules."""
        chosen = samples[choose(samples, self.config.method.select)] if samples else Candidate(text=text, answer=text)
        score = self.scores[example.id] = score_of(self.task, chosen.answer, example)
        return Prediction(
            id=example.id, asked=self.hash(example), group=example.group, answers=example.answers, prediction=chosen.text,
            score=score.value, samples=samples, read=score.answer, cluster=example.cluster,
        )  # fmt: skip

    def samples_report(self, examples: list[Example], predictions: list[Prediction], grader: Grader | None) -> dict[str, Any]:
        """Report the metric for fewer replies, and how many replies have no answer or rating."""
        samples, method = [p.samples for p in predictions], self.config.method
        candidates = [candidate for replies in samples for candidate in replies]
        pairs = [(example, c.answer) for example, replies in zip(examples, samples, strict=True) for c in replies]
        graded = [score_of(self.task, answer, example) for example, answer in pairs]
        values = iter(score.value for score in (grader.decide(graded) if grader else graded))
        scores = [list(islice(values, len(replies))) for replies in samples]
        return {
            "method": asdict(method),
            "judge": fingerprint.of_judge(self.judge),
            "samples": {
                "replies": len(candidates),
                "without_answer": sum(c.answer is None for c in candidates),
                "without_rating": sum(c.rating is None for c in candidates) if self.judge is not None else None,
                "curve": voting.curve(samples, scores, method.select) if max(map(max, scores)) <= 1 else [],  # no ratings
            },
        }


def versions() -> dict[str, str]:
    """Return the installed versions of packages that may influence a score."""
    installed = {}
    for package in PACKAGES:
        with suppress(PackageNotFoundError):
            installed[package] = version(package)
    return installed
