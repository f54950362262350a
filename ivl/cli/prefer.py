"""`ivl prefer sample`, `pairs` and `dropout`: from questions to preference pairs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import tyro

from ivl.preference.sampling import Progress
from ivl.utils.progress import counting


def main(args: list[str]) -> None:
    commands = {"sample": sample, "pairs": pairs, "dropout": dropout}
    tyro.extras.subcommand_cli_from_dict(commands, prog="ivl prefer", args=args)


Positional = tyro.conf.Positional
Input = Annotated[Path, Positional]


def sample(
    questions: Input,
    out: Input,
    *,
    model: str | None = None,
    url: str | None = None,
    url_model: str | None = None,
    concurrency: int = 8,
    num_replies: int = 32,
    temperature: float = 1.0,
    top_k: int = 50,
    top_p: float = 1.0,
    max_new_tokens: int = 4096,
    seed: int = 0,
    chunk: int = 16,
) -> None:
    """Ask every question many times. The same command goes on where an interrupted one stopped.

    Args:
        questions: A .jsonl file of questions, or a JSON object of sources (docs/preference.md).
        out: Journal of replies to write, a .jsonl file.
        model: Directory or hub id of a model to run here.
        url: Or an OpenAI-compatible endpoint, such as http://host:8000/v1; its key is taken from OPENAI_API_KEY.
        url_model: Name of the model at the endpoint.
        concurrency: Requests to the endpoint in flight at once.
        num_replies: Replies to each question.
        temperature: 0 gives the same reply every time.
        top_k: Most likely tokens kept; 0 keeps all.
        top_p: Probability kept.
        max_new_tokens: Longest reply; a reply that reaches it counts as malformed.
        seed: Every reply has a seed of its own that follows from this one.
        chunk: Questions asked together and saved as one.
    """
    from ivl.cli.generators import connect
    from ivl.preference import sampling
    from ivl.preference.questions import load_sources, read_questions
    from ivl.types import SamplingParams

    sources = load_sources(questions)
    total = sum(1 for _ in read_questions(sources))
    params = SamplingParams(max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p)
    generator, name = connect(model, url, url_model, concurrency=concurrency)
    with _progress("questions", total) as show:
        sampling.sample(
            generator,
            sources,
            out,
            model=name,
            num_replies=num_replies,
            params=params,
            seed=seed,
            chunk=chunk,
            on_progress=show,
        )
    print(f"{total:,} questions x {num_replies} replies: {out}")


def dropout(
    replies: Input,
    out: Input,
    *,
    model: str | None = None,
    url: str | None = None,
    url_model: str | None = None,
    concurrency: int = 8,
    ratio: float = 0.5,
    per_question: int = 1,
    temperature: float = 1.0,
    top_k: int = 50,
    max_new_tokens: int = 2048,
    seed: int = 0,
    chunk: int = 64,
) -> None:
    """Dropout-NTP: continue the first part of each reply without the image. `ivl prefer pairs` makes pairs of it.

    An endpoint must continue an unfinished reply of the assistant; most do not, so a local model is the safe choice.

    Args:
        replies: Journal that `ivl prefer sample` wrote.
        out: Journal of continuations to write.
        ratio: Share of a reply's words that is kept.
        per_question: Replies to each question that are taken.
        model: Directory or hub id of a model to run here.
        url: Or an OpenAI-compatible endpoint.
        url_model: Name of the model at the endpoint.
        concurrency: Requests to the endpoint in flight at once.
        temperature: 0 gives the same continuation every time.
        top_k: Most likely tokens kept; 0 keeps all.
        max_new_tokens: Longest continuation.
        seed: Every continuation has a seed of its own that follows from this one.
        chunk: Replies continued together and saved as one.
    """
    from ivl.cli.generators import connect
    from ivl.preference import sampling
    from ivl.types import SamplingParams
    from ivl.utils.jsonl import read_journal

    total = per_question * sum(1 for _ in read_journal(replies)[1])
    generator, name = connect(model, url, url_model, concurrency=concurrency)
    params = SamplingParams(max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k)
    with _progress("replies", total) as show:
        sampling.continue_without_images(
            generator, replies, out, model=name, ratio=ratio, per_question=per_question, params=params, seed=seed, chunk=chunk,
            on_progress=show,
        )  # fmt: skip
    print(f"continuations: {out}")


def pairs(replies: Input, out: Input, *, limit: int | None = None, seed: int = 0) -> None:
    """Check the replies of a journal and write preference pairs, a report page and a mixture for `ivl train`.

    Args:
        replies: Journal that `ivl prefer sample` or `ivl prefer dropout` wrote.
        out: Directory for pairs.jsonl, format_pairs.jsonl, grades.jsonl, meta.json, report.json and report.html.
        limit: Pairs of a question and kind; by default 15, or 3 where there are more than 500,000 questions.
        seed: Chooses among possible pairs.
    """
    from ivl.preference.pairs import build_pairs
    from ivl.preference.report import write_report

    with counting(on=True, lasting=True) as bar:
        task = bar.add_task("questions", total=None, note="")

        def show(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        tallies = build_pairs(replies, out, limit=limit, seed=seed, on_progress=show)
    write_report(out, tallies, seed=seed)
    for name, t in tallies.items():
        made = ", ".join(f"{count:,} {kind} pairs" for kind, count in sorted(t.pairs.items())) or "no pairs"
        print(f"{name}: {t.questions:,} questions, {t.accuracy:.1%} of replies correct, {made}")
    print(f"report: {out / 'report.html'}\ntrain:  ivl train 1B-mpo --model MODEL --data.mixture {out / 'meta.json'}")


@contextmanager
def _progress(what: str, total: int) -> Iterator[Callable[[Progress], None]]:
    with counting(on=True, lasting=True) as bar:
        task = bar.add_task(what, total=total, note="")

        def show(progress: Progress) -> None:
            elapsed = bar.tasks[task].elapsed or 0.0
            rate = f"{progress.replies / elapsed:,.1f} replies/s" if elapsed > 0 and progress.replies else ""
            bar.update(task, completed=progress.done, note=rate)

        yield show
