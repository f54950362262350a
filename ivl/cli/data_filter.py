"""`ivl data filter`: a chain of filters over a mixture."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from ivl.errors import InputError
from ivl.filters.chain import Chain, load_chain
from ivl.filters.judge import DataJudge
from ivl.filters.run import FilterOptions, run
from ivl.generators import GeneratorConfig, connect
from ivl.utils.progress import reporting


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
        print(f"left out of meta.json, since no row was kept: {', '.join(empty)}")
    print(f"{result['kept']:,} of {result['rows']:,} rows kept: {out / 'meta.json'}; look at {out / 'report.html'}")
    if not result["kept"]:
        raise InputError(f"no row was kept; see {out / 'report.html'}")
