"""`ivl data filter`: a chain of filters over a mixture."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from ivl.errors import InputError
from ivl.utils.progress import counting

if TYPE_CHECKING:
    from ivl.filters.chain import Chain
    from ivl.filters.judge import Judge
    from ivl.filters.run import Progress


def filter_data(
    config: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="CONFIG")],
    mixture: Annotated[str | None, tyro.conf.Positional, tyro.conf.arg(metavar="MIXTURE")] = None,
    out: Annotated[Path | None, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")] = None,
    *,
    root: str | None = None,
    format: str | None = None,
    judge: str | None = None,
    judge_url: str | None = None,
    judge_model: str | None = None,
    judge_key: str = "OPENAI_API_KEY",
    judge_concurrency: int = 8,
    judge_cache: Path | None = None,
    workers: int = 0,
    ray: str | None = None,
    fresh: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False,
) -> None:
    """Keep the rows that pass a chain of filters; the others go to dropped.jsonl with the stage and the reason.

    OUT/meta.json trains as it is; OUT/report.html is for a look before. The same command goes on after an interruption.
    With CONFIG alone the configuration is printed with all its thresholds, to be changed and given as a file.

    Args:
        config: heuristic, text, multimodal, or a .json file.
        mixture: A meta JSON, or a file or folder of rows of any format that is read.
        out: Folder of the results.
        root: Folder of relative media paths when `mixture` is rows.
        format: How `mixture` is read when it is rows; by default what it looks like.
        judge: Model directory or hub id of a judge that runs here.
        judge_url: An OpenAI-compatible endpoint of a judge, such as http://localhost:8000/v1.
        judge_model: The judge's name at that endpoint.
        judge_key: Environment variable that holds the endpoint's key.
        judge_concurrency: Requests to the endpoint in flight at once.
        judge_cache: Where replies are kept, for several runs; by default OUT/judge.sqlite.
        workers: Processes that compute what needs no judge; 0 computes in this one. With --ray local, its processors.
        ray: Address of a Ray cluster that computes instead, or `local` for one on this machine.
        fresh: Forget what an earlier run left in OUT, but not what the judge said.
    """
    from ivl.filters.chain import load_chain
    from ivl.filters.run import run

    chain = load_chain(config)
    if mixture is None or out is None:
        if mixture is not None:
            raise InputError(f"name a folder for the results: ivl data filter {config} {mixture} OUT")
        print(chain.spelled_out(), end="")
        return
    if workers < 0 or judge_concurrency < 1:
        raise InputError(f"need --workers >= 0 and --judge-concurrency >= 1, got {workers} and {judge_concurrency}")
    asked = None
    if not chain.needs_judge and (judge or judge_url):
        raise InputError(f"the filter {config} asks no judge; leave it out, or add a stage such as quality")
    if judge or judge_url:
        cache = judge_cache or out / "judge.sqlite"
        asked = _judge(chain, judge, judge_url, judge_model, judge_key, judge_concurrency, cache)
    with _progress() as show:
        result = run(
            chain, mixture, out, root=root, format=format, judge=asked, workers=workers, ray=ray, fresh=fresh, on_progress=show
        )  # fmt: skip
    _summary(result, out)
    if not result["kept"]:
        raise InputError(f"no row was kept; see {out / 'report.html'}")


def _judge(
    chain: Chain, judge: str | None, url: str | None, model: str | None, key: str, concurrency: int, cache: Path
) -> Judge:
    from ivl.cli.generators import connect
    from ivl.filters.judge import Judge

    if (judge is None) == (url is None) or (url is None) != (model is None):
        raise InputError("name one judge: either --judge DIR, or --judge-url ENDPOINT with --judge-model NAME")
    generator, name = connect(judge, url, model, key_variable=key, concurrency=concurrency)
    # The same model at another address is the same judge.
    return Judge(generator, name=model or name, cache=cache, config=chain.judge, threads=concurrency if url else 1)


def _summary(result: dict[str, Any], out: Path) -> None:
    for stage in result["stages"]:
        if stage["dropped"] or stage["unjudged"]:
            reasons = ", ".join(f"{count:,} {reason}" for reason, count in stage["reasons"].items())
            unjudged = f"; {stage['unjudged']:,} unjudged" if stage["unjudged"] else ""
            print(f"{stage['name']}: {stage['dropped']:,} dropped of {stage['reached']:,} ({reasons}){unjudged}")
    empty = [name for name, each in result["datasets"].items() if not each["kept"]]
    if empty:
        print(f"left out of meta.json, since no row was kept: {', '.join(empty)}")
    print(f"{result['kept']:,} of {result['rows']:,} rows kept: {out / 'meta.json'}; look at {out / 'report.html'}")


@contextmanager
def _progress() -> Iterator[Callable[[Progress], None]]:
    """A bar on a terminal, elsewhere a line now and then; with the rate and the time left."""
    live = sys.stderr.isatty()
    with counting() as bar:
        task = bar.add_task("filter", total=None, note="")
        started = shown = time.monotonic()

        def show(progress: Progress) -> None:
            nonlocal shown
            now = time.monotonic()
            done = progress.done - progress.resumed
            rate = done / max(1e-9, now - started)
            kept = f"{progress.kept / done:.1%} kept" if done else ""
            bar.update(task, total=progress.total, completed=progress.done, note=f"{rate:,.0f} rows/s, {kept}")
            if not live and now - shown > 10:
                shown = now
                left = (progress.total - progress.done) / max(1e-9, rate)
                text = f"{progress.done:,}/{progress.total:,} rows, {rate:,.0f} rows/s, {kept}, {left:,.0f} s left"
                print(text, file=sys.stderr, flush=True)

        yield show
