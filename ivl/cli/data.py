"""`ivl data ...`: the commands for training data."""

from __future__ import annotations

import contextlib
import json
import signal
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from ivl.cli.options import run_subcommand
from ivl.data.config import DataConfig
from ivl.datasets.convert import ConvertConfig
from ivl.errors import DataError, InputError
from ivl.filters.chain import Chain, load_chain
from ivl.filters.judge import DataJudge
from ivl.filters.run import FilterOptions, run
from ivl.formats.rows import RowFormat
from ivl.generators import GeneratorConfig, connect
from ivl.utils.progress import counting, print_table, reporting, wide_console
from ivl.utils.terminal import printable

if TYPE_CHECKING:
    from rich.progress import TaskID

    from ivl.datasets.estimate import DatasetEstimate, PackEstimate
    from ivl.datasets.inspect import Watch
    from ivl.datasets.stats import DatasetStats

SHOWN = 10
"""Problems of each kind that `validate` and `convert` print without `--all`."""


@dataclass(frozen=True, kw_only=True)
class MixtureOptions(DataConfig):
    """The data configuration as options of a command that reads a mixture."""

    mixture: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="MIXTURE ...")]
    """Meta JSONs, and files or folders of rows of any format that is read; one or several."""
    num_workers: Annotated[int, tyro.conf.arg(name="workers")] = 0
    """Processes that read and encode rows; 0 does so in this one."""

    def __post_init__(self) -> None:
        if not self.mixture:
            raise InputError("name rows: a meta JSON, or a file or folder of rows, as in ivl data validate rows.jsonl")
        super().__post_init__()


@dataclass(frozen=True, kw_only=True)
class ValidateOptions(MixtureOptions):
    model: str | None = None
    """Model directory whose processor also encodes every row: finds rows that are too long or train nothing."""
    as_json: Annotated[bool, tyro.conf.arg(name="json")] = False
    """Print one JSON object a line instead: each problem, then the summary."""
    show_all: Annotated[bool, tyro.conf.arg(name="all")] = False
    """Print every problem, not the first ten of each kind."""


@dataclass(frozen=True, kw_only=True)
class StatsOptions(MixtureOptions):
    model: str | None = None
    """Model directory whose processor counts tokens and tiles; without one, lengths are in characters."""
    out: str | None = None
    """Directory for stats.json and for stats.html, a page of plots."""


def validate(options: Annotated[ValidateOptions, tyro.conf.arg(name="")]) -> None:
    """Print problems with file and line, the first ten of each kind, then the number of each; exit code 1 if there is one."""
    from ivl.datasets.inspect import kind_of
    from ivl.datasets.stats import DatasetStats, total

    done: list[DatasetStats] = []
    shown: Counter[str] = Counter()
    for finding in _inspect(options, options.model):
        if isinstance(finding, DatasetStats):
            done.append(finding)
            if not options.as_json:
                name = printable(finding.name)
                print(f"{name}: {finding.rows:,} rows ({finding.format}), {_problems(finding)}")
                print("".join(f"{name}: note: {printable(note)}\n" for note in finding.notes), end="")
        elif options.as_json:
            source, problem = getattr(finding, "source", None), getattr(finding, "problem", str(finding))
            print(json.dumps({"source": source, "kind": kind_of(finding), "problem": problem}))
        elif options.show_all or shown[kind_of(finding)] < SHOWN:
            shown[kind_of(finding)] += 1
            print(f"{printable(finding)} [{kind_of(finding)}]")
    whole = total(done)
    if options.as_json:
        names = ("rows", "bad", "format", "repeated_ids", "letters")
        datasets = {each.name: {name: getattr(each, name) for name in names} for each in done}
        print(json.dumps({"rows": whole.rows, "bad": whole.bad, "kinds": whole.kinds, "datasets": datasets}))
    elif whole.bad:
        print(f"{whole.bad:,} problem{'s' * (whole.bad > 1)} in {whole.rows:,} rows: {_kinds(whole.kinds)}")
        if hidden := whole.bad - shown.total():
            print(f"{hidden:,} more problems are not printed; --all prints them")
    if whole.bad:
        raise SystemExit(1)


def stats(options: Annotated[StatsOptions, tyro.conf.arg(name="")]) -> None:
    """Print the number of rows, turns, media and characters of each data set, and how long they are."""
    from ivl.datasets.stats import DatasetStats
    from ivl.datasets.stats_report import check, print_tables, write_report

    if options.out:
        check(options.out)
    datasets = [finding for finding in _inspect(options, options.model) if isinstance(finding, DatasetStats)]
    print_tables(datasets)
    if bad := sum(each.bad for each in datasets):
        print(f"{bad:,} bad rows are not in these figures; `ivl data validate` names their places")
    if options.out:
        print(write_report(options.out, datasets, mixture=options.mixture, model=options.model))


def _inspect(config: DataConfig, model: str | None) -> Iterator[InputError | DatasetStats]:
    """Problems and counts, with a progress bar while standard error is a terminal."""
    from ivl.checkpoint import load_processor, resolve
    from ivl.datasets.inspect import inspect

    with _progress() as watch:
        yield from inspect(config, load_processor(resolve(model)) if model else None, watch=watch)


@contextlib.contextmanager
def _progress() -> Iterator[Watch]:
    with counting() as bar:
        tasks: dict[str, TaskID] = {}

        def watch(name: str, done: int, rows: int) -> None:
            if name not in tasks:
                tasks[name] = bar.add_task(name, total=rows, note="")
            bar.update(tasks[name], completed=done, note=f"{bar.tasks[tasks[name]].speed or 0:,.0f} rows/s")

        yield watch


def _problems(dataset: DatasetStats) -> str:
    return f"{dataset.bad:,} bad: {_kinds(dataset.kinds)}" if dataset.bad else "no problems"


def _kinds(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count:,} {kind}" for kind, count in sorted(counts.items()))


@dataclass(frozen=True, kw_only=True)
class ConvertRowsOptions(ConvertConfig):
    format: Annotated[RowFormat | None, tyro.conf.arg(name="from")] = None
    """Format of the source; by default it is found out."""
    show_all: Annotated[bool, tyro.conf.arg(name="all")] = False
    """Print every row that is left out, not the first ten of each kind."""


def convert(
    options: Annotated[
        ConvertRowsOptions, tyro.conf.arg(name=""), tyro.conf.PositionalRequiredArgs, tyro.conf.FlagCreatePairsOff
    ],
) -> None:
    """Write the rows of a file or folder in another format. parquet and webdataset take the images in; the others name files.

    A bad row, or one that the target cannot hold, stops with its file and line, and no target is left.
    """
    from ivl.datasets.convert import convert as convert_rows

    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # cleans up, as after Ctrl-C
    shown: Counter[str] = Counter()

    def on_bad(error: DataError) -> None:
        shown[error.kind] += 1
        if options.show_all or shown[error.kind] <= SHOWN:
            print(f"{printable(error)} [{error.kind}]", file=sys.stderr)

    with reporting(options.target.name, "rows") as show:
        report = convert_rows(options, on_bad=on_bad, on_progress=show)
    print(f"{options.target}: {report.rows:,} rows from {report.format}")
    for key, count in report.dropped.items():
        print(f"`{printable(key)}` of {count:,} rows is not carried over")
    if report.bad:
        print(f"{sum(report.bad.values()):,} rows left out: {_kinds(report.bad)}")


@dataclass(frozen=True, kw_only=True)
class FilterConfig:
    """A filter, the data it filters, and its judge."""

    config: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="CONFIG")]
    """heuristic, text, multimodal, or a .json file."""
    mixture: Annotated[tyro.conf.Positional[str | None], tyro.conf.arg(metavar="MIXTURE")] = None
    """A meta JSON, or a file or folder of rows of any known format."""
    out: Annotated[tyro.conf.Positional[Path | None], tyro.conf.arg(metavar="OUT")] = None
    """Folder of the results."""
    options: Annotated[FilterOptions, tyro.conf.arg(name="")] = field(default_factory=FilterOptions)
    judge: str | None = None
    """Model directory or hub id of a judge that runs here."""
    judge_url: str | None = None
    """An OpenAI-compatible endpoint of a judge, such as http://localhost:8000/v1."""
    judge_model: str | None = None
    """Name of the judge at that endpoint."""
    judge_key: str = "OPENAI_API_KEY"
    """Environment variable that holds the endpoint's key."""
    judge_concurrency: int = 8
    """Requests at the endpoint at the same time."""
    judge_cache: Path | None = None
    """File of the judge's replies, which several runs may share; by default OUT/judge.sqlite."""

    def connect_judge(self, chain: Chain, out: Path) -> DataJudge | None:
        model, url, url_model, threads = self.judge, self.judge_url, self.judge_model, self.judge_concurrency
        if not model and not url:
            return None
        if not chain.needs_judge:
            raise InputError(f"the filter {self.config} asks no judge; leave it out, or add a stage such as quality")
        if (model is None) == (url is None) or (url is None) != (url_model is None):
            raise InputError("name one judge: either --judge DIR, or --judge-url ENDPOINT with --judge-model NAME")
        settings = GeneratorConfig(model=model, url=url, url_model=url_model, key_variable=self.judge_key, concurrency=threads)
        generator, name = connect(settings)
        name = url_model or name  # the same model at another address is the same judge
        cache, threads = self.judge_cache or out / "judge.sqlite", threads if url else 1
        return DataJudge(generator, name=name, cache=cache, config=chain.config.judge, threads=threads)


def filter_data(command: Annotated[FilterConfig, tyro.conf.arg(name=""), tyro.conf.FlagCreatePairsOff]) -> None:
    """Keep the rows that pass a chain of filters; the others go to dropped.jsonl with the stage and the reason.

    OUT/meta.json trains as it is; OUT/report.html is for a look before. The same command goes on after an interruption.
    With CONFIG alone the configuration is printed with all its thresholds, to be changed and given as a file.
    """
    chain, out = load_chain(command.config), command.out
    if command.mixture is None:
        print(chain.to_text(), end="")
        return
    if out is None:
        raise InputError(f"name a folder for the results: ivl data filter {command.config} {command.mixture} OUT")
    judge = command.connect_judge(chain, out)
    with reporting("filter", "rows") as show:
        result = run(chain, command.mixture, out, command.options, judge=judge, on_progress=show)
    for stage in result["stages"]:
        if stage["dropped"] or stage["unjudged"]:
            reasons = ", ".join(f"{count:,} {reason}" for reason, count in stage["reasons"].items())
            unjudged = f"; {stage['unjudged']:,} unjudged" if stage["unjudged"] else ""
            print(f"{stage['name']}: {stage['dropped']:,} dropped of {stage['reached']:,} ({reasons}){unjudged}")
    if empty := [name for name, each in result["datasets"].items() if not each["kept"]]:
        print(f"left out of meta.json, since no row was kept: {printable(', '.join(empty))}")
    print(f"{result['kept']:,} of {result['rows']:,} rows kept: {out / 'meta.json'}; look at {out / 'report.html'}")
    if not result["kept"]:
        raise InputError(f"no row was kept; see {out / 'report.html'}")


@dataclass(frozen=True, kw_only=True)
class PackOptions(MixtureOptions):
    model: str
    """Model directory whose processor encodes the rows."""
    ranks: int = 1
    """Processes that train."""
    accumulation: int = 1
    """Packs that every rank takes in one optimizer step."""
    rows: int = 1000
    """Rows to encode."""
    seed: int = 0
    """Seed of the order and of the choice of rows."""
    dry_run: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Changes nothing: this command always prints and never writes."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("ranks", "accumulation", "rows"):
            if getattr(self, name) < 1:
                raise InputError(f"--{name} must be >= 1, got {getattr(self, name)}")


def pack(options: Annotated[PackOptions, tyro.conf.arg(name="")]) -> None:
    """Print how full packs get, how many samples they hold, and how many steps an epoch takes.

    Random rows are encoded, an epoch is drawn from their lengths and packed. Nothing is written: packs are made in training.
    """
    from ivl.checkpoint import load_processor, resolve
    from ivl.data.loader import Loader
    from ivl.datasets.estimate import estimate_packs

    loader = Loader(options, load_processor(resolve(options.model)), seed=options.seed, world_size=options.ranks)
    with reporting("encoding", "rows") as show:
        estimate = estimate_packs(loader, options.rows, on_progress=show)
    console = wide_console()
    print_table(ESTIMATED, [_cells(part) for part in estimate.datasets])
    for line in describe(estimate, options, ranks=options.ranks, accumulation=options.accumulation):
        console.print(line, highlight=False)


ESTIMATED = ("data set", "rows", "drawn an epoch", "each", "encoded", "tokens", "most", "tiles", "most", "over budget", "bad")


def _cells(part: DatasetEstimate) -> list[str]:
    """Return the row of a data set under ESTIMATED."""
    counts = (part.over_budget, part.bad)
    return [
        part.name, f"{part.rows:,}", f"{part.draws:,}", f"x {part.draws / part.rows:.3g}", f"{part.sampled:,}",
        f"{part.tokens:,.0f}", f"{part.max_tokens:,}", f"{part.tiles:.1f}", f"{part.max_tiles}", *(f"{n:,}" for n in counts),
    ]  # fmt: skip


def describe(estimate: PackEstimate, config: DataConfig, *, ranks: int, accumulation: int) -> list[str]:
    """The estimate in words and numbers, a line each."""
    steps, packs = estimate.num_steps(accumulation), estimate.packs * ranks
    lines = [
        "",
        f"budgets          {config.max_tokens:,} tokens and {config.max_tiles} tiles a pack",
        f"token fill       {estimate.token_fill:.1%}",
        f"tile fill        {estimate.tile_fill:.1%}",
        f"samples a pack   {estimate.samples_per_pack:.1f}",
        f"packs an epoch   {packs:,} (standard error {estimate.error:.1%}, from {estimate.sampled:,} rows)",
        f"steps an epoch   {steps:,}; packs a step: {ranks} ranks x {accumulation} each = {ranks * accumulation}",
    ]
    policies = {
        "refuse": "the first stops training", "truncate": "cut at a turn", "cut": "cut at the budget", "skip": "left out",
    }  # fmt: skip
    if estimate.over_budget:
        policy = policies[config.over_budget]
        lines.append(f"over budget      {estimate.over_budget:,} of {estimate.sampled:,} rows; {policy} (data.over_budget)")
    if bad := sum(part.bad for part in estimate.datasets):
        lines.append(f"bad rows         {bad:,} of {estimate.sampled:,}; `ivl data validate` names their places")
    return lines


COMMANDS = {"validate": validate, "stats": stats, "convert": convert, "filter": filter_data, "pack": pack}


def main(args: list[str]) -> None:
    """Run the command."""
    run_subcommand(COMMANDS, "data", args)
