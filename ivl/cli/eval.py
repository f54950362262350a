"""`ivl eval`: scores models on a task, or replies that another tool has written, and compares runs."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import tyro

from ivl.cli.options import ReplyLoadConfig, answer_foreign, parse
from ivl.errors import InputError
from ivl.evaluation.config import EvalConfig
from ivl.evaluation.foreign import Given, given_task, model_of
from ivl.evaluation.tasks import TASKS, task_of
from ivl.generators import GeneratorConfig, LoadConfig, connect
from ivl.utils.terminal import printable

_Flag = tyro.conf.FlagCreatePairsOff
COLUMNS = 100


@dataclass(frozen=True, kw_only=True)
class EvalOptions:
    """Score models on a benchmark or on rows of your own, each figure with its 95% interval.

    Predictions are saved as they come; the same command continues a run that was interrupted.
    """

    models: tyro.conf.Positional[Annotated[tuple[str, ...], tyro.conf.arg(metavar="MODEL")]] = ()
    """Model directories or hub ids."""
    list_tasks: Annotated[bool, tyro.conf.arg(name="list"), _Flag] = False
    """Show the tasks, with rows, metric, judge and tiles, and stop."""
    compare: tuple[Path, Path] | None = None
    """Compare two runs on the same questions: their reports, predictions or scores."""
    average: tuple[Path, ...] = ()
    """Show the eight scores of the OpenCompass average from these reports, beside the published ones."""
    score: Path | None = None
    """Score the replies in a file of predictions by VLMEvalKit (tsv, xlsx) or samples by lmms-eval (jsonl)."""
    url: tuple[str, ...] = ()
    """OpenAI-compatible endpoints to evaluate, beside or instead of models."""
    url_model: tuple[str, ...] = ()
    """The name of the model at each endpoint."""
    config: Annotated[EvalConfig, tyro.conf.arg(name="")] = field(default_factory=EvalConfig)
    load: Annotated[ReplyLoadConfig, tyro.conf.arg(name="")] = field(default_factory=ReplyLoadConfig)


def evaluate(args: list[str]) -> None:
    """Run the command."""
    answer_foreign("eval", args)
    args = [re.sub("^--judge-", "--judge.", arg) for arg in args]
    rest = [arg for arg in args if arg not in ("-h", "--help")]
    # The defaults of sampling follow from the task and the method, which are read first.
    first, _ = tyro.cli(EvalOptions, prog="ivl eval", args=rest, return_unknown_args=True, config=(tyro.conf.AvoidSubcommands,))
    task = given_task(first.score, first.config) if first.score else task_of(first.config)
    sampling = first.config.sampling_for(task.params)
    default = EvalOptions(config=EvalConfig(sampling=sampling))
    options = parse(EvalOptions, "eval", args, default=default, config=(tyro.conf.AvoidSubcommands,))
    if options.list_tasks:
        print(listing())
    elif options.compare:
        show_comparison(*options.compare)
    elif options.average:
        from ivl.evaluation.average import as_text, average

        print(as_text(average(options.average)))
    else:
        evaluate_each(options)


def evaluate_each(options: EvalOptions) -> None:
    """Evaluate every model, endpoint or file of replies that the options name."""
    if len(options.url) != len(options.url_model):
        raise InputError("give --url-model for every --url, the name of the model at the endpoint")
    targets: list[tuple[str, Any]] = [(name, None) for name in options.models]
    targets += [
        (model, GeneratorConfig(url=url, url_model=model)) for url, model in zip(options.url, options.url_model, strict=True)
    ]
    if options.score:
        if targets:
            raise InputError("--score takes the replies of a file; name no model beside it")
        targets = [(options.score.stem, options.score)]
    if not targets:
        raise InputError("name a model to evaluate, before the options: ivl eval MODEL --task easy-vqa")
    for name, source in targets:
        config = options.config
        if len(targets) > 1 and (config.out or config.predictions):
            label = re.sub(r"[^\w.-]+", "-", name).strip("-")
            out, predictions = (
                path and path.with_name(f"{path.stem}-{label}{path.suffix}") for path in (config.out, config.predictions)
            )
            config = replace(config, out=out, predictions=predictions)
        show(name, config, options.load, source)


def listing() -> str:
    """Return name, rows, metric, judge, tiles of each task and what it is, in 100 columns."""
    lines = [("task", "rows", "metric", "judge", "tiles", "")]
    for name, task in TASKS.items():
        rows, judge, tiles = (getattr(task, key, None) for key in ("rows", "judge", "tiles"))
        lines.append((name, f"{rows:,}" if rows else "", task.metric, judge or "no", str(tiles or ""), task.about))
    *widths, _ = (max(map(len, column)) for column in zip(*lines, strict=True))
    indent = sum(widths) + 2 * len(widths)
    told = [textwrap.wrap(about, COLUMNS - indent) or [""] for *_, about in lines]
    starts = ["  ".join([*map(str.ljust, line, widths), ""]) for line in lines]  # the widths leave out the last column
    parts = [f"\n{'':{indent}}".join(wrapped) for wrapped in told]
    return "\n".join(f"{start}{part}".rstrip() for start, part in zip(starts, parts, strict=True))


def show(name: str, config: EvalConfig, load: LoadConfig, source: GeneratorConfig | Path | None) -> None:
    """Evaluate a model, an endpoint or the replies of a file, and print the figures."""
    from ivl.evaluation.figures import shown
    from ivl.evaluation.run import run

    if isinstance(source, Path):
        task = given_task(source, config)
        config = replace(config, task=task.name)
        config, name = replace(config, predictions=config.predictions_of(source.stem)), model_of(source, task)
        report, files = run(config, name, load, Given(source), task)
    else:
        report, files = run(config, name, load, connect(source)[0] if source else None)
    if not report:  # a rank that is not the first
        return
    print(f"{report['task']} of {name}")
    rows = list(_rows(report, config))
    width, wide = (max((len(row[column]) for row in rows), default=0) for column in (0, 1))
    for group, what, row in rows:
        value, interval = shown(row)
        print(f"  {printable(group):{width}}  {what:{wide}} {value:>7}  95% interval {interval}  n {row['n']:,}")
    if left := report.get("undecided"):
        print("; ".join([f"undecided: {left['replies']:,} replies, counted as {left['count_as']}", *left["notes"]]))
    for kind, file in files:
        print(f"{kind}: {file}")


def _rows(report: dict[str, Any], config: EvalConfig) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Yield the lines of a report: name, metric and figure. The names of other figures tell what they are."""
    if report["value"] is None:
        return
    yield "all", report["metric"], report
    for group, row in report["by_type"].items():
        yield group, "", row
    for point in report.get("samples", {}).get("curve", ()):
        yield f"{point['samples']} replies", str(config.method.select), point


def show_comparison(first: Path, second: Path) -> None:
    """Print the difference of two runs, the second minus the first."""
    from ivl.evaluation.results import compare

    found = compare(first, second)
    low, high = found["ci95"]
    print(f"{printable(found['task'])}: {found['n']:,} questions of both runs, {found['left_out']:,} of one alone left out")
    for model, mean in zip(found["models"], found["means"], strict=True):
        print(f"  mean score {mean:.4f}  {printable(model)}")
    print(f"  difference {found['difference']:+.4f}  95% interval {low:+.4f} to {high:+.4f}")
    print("  right in one run alone: {:,} and {:,}, McNemar's p {:.3g}".format(*found["only_right"], found["mcnemar_p"]))
    if headline := found.get("headline"):
        low, high = headline["ci95"]
        values = " and ".join(f"{value:.4f}" for value in headline["values"])
        print(f"  headline {values}, difference {headline['difference']:+.4f}  95% interval {low:+.4f} to {high:+.4f}")
