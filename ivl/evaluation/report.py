"""The report of an evaluation and its page: figures by category, replies by number, and the wrong answers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ivl.errors import InputError
from ivl.evaluation.figures import shown
from ivl.evaluation.voting import draw
from ivl.types import ImageRef, Text
from ivl.utils import html as pages
from ivl.utils.files import write_atomic, write_json

if TYPE_CHECKING:
    from ivl.evaluation.run import Evaluated

KEYS = {"task", "metric", "value", "ci95", "by_type", "versions"}
TITLE = "scores by ivl eval"
MOST_SHOWN, MOST_CHARACTERS = 100, 1500


def check(out: Path, predictions: Path, *, several: bool) -> None:
    """Check that a report and its page can be written without harm to files of another kind.

    Args:
        several: Whether the page has a plot of several replies.

    Raises:
        InputError: naming the file that is in the way, or the missing library.
    """
    page = out.with_suffix(".html")
    if len({path.absolute() for path in (out, predictions, page)}) < 3:
        raise InputError(f"{out}: report, predictions ({predictions}) and page ({page}) need different names; use NAME.json")
    pages.check_places(out, KEYS, page, TITLE, "ivl eval", plots=several)


def write(out: Path, result: Evaluated) -> None:
    """Write the report and its page."""
    try:
        write_json(out, result.report)
        write_atomic(out.with_suffix(".html"), _page(result))
    except OSError as error:
        raise InputError(f"{out}: cannot be written ({error.strerror})") from None


def _page(result: Evaluated) -> str:
    """Return one HTML file."""
    report, sections = result.report, []
    if report["value"] is not None:
        value, interval = shown(report)
        sections.append(pages.facts(**{report["metric"]: value, "95% interval": interval, "questions": f"{report['n']:,}"}))
    if "samples" in report:
        sections += _several(report)
    if report["by_type"]:
        table = [[name, f"{row['n']:,}", *shown(row)] for name, row in report["by_type"].items()]
        sections += ["<h2>By category</h2>", pages.table(["category", "questions", report["metric"], "95% interval"], table)]
    if report["value"] is not None:
        sections += _wrong(result)
    about = {key: report[key] for key in ("prompt", "extraction", "defects", "data", "undecided") if key in report}
    asked = [[key, value] for key, value in {"model": report["model"], **about, "sampling": report["params"]}.items()]
    sections += ["<h2>How it was asked</h2>", pages.table(["setting", "value"], asked, words={"value"})]
    return pages.page(f"{report['task']}: {TITLE}", *sections, pages.next_steps(*_next_steps(report)))


def _next_steps(report: dict[str, Any]) -> list[tuple[str, str]]:
    """Return what to do with a score."""
    compare = "Compare with another model on the same questions; the interval of a difference is far narrower than these two:"
    steps = [(compare, "ivl eval --compare THIS.json OTHER.json")]
    if report["value"] is not None:
        look = "Read the wrong answers: is the reply wrong, or was it read wrongly? Then try another --metric or a judge."
        steps.insert(0, (look, ""))
        steps.append(("Train on rows of the kind that goes wrong:", "ivl train lora --model MODEL --data ROWS"))
    return steps


def _several(report: dict[str, Any]) -> list[str]:
    """Return the metric by number of replies as a plot and a table, and counts of replies."""
    method, samples = report["method"], report["samples"]
    counts = [["all", f"{samples['replies']:,}"], ["without an answer", f"{samples['without_answer']:,}"]]
    if samples["without_rating"] is not None:
        counts.append(["without a rating", f"{samples['without_rating']:,}"])
    sections = [f"<p>Of {method['samples']} replies to a question one counts, chosen by {pages.text(method['select'])}.</p>"]
    if points := samples["curve"]:
        figure, axes = pages.pyplot().subplots(figsize=(4.6, 2.8), layout="constrained")
        draw(axes, points, method["select"])
        low, high = axes.get_ylim()
        axes.set(ylabel=f"{report['metric']}, %", ylim=(max(0, low), min(100, high)))
        axes.set_title(f"{report['task']}, temperature {report['params']['temperature']:g}")
        by_size = [[point["samples"], *shown(point)] for point in points]
        head = ["replies to a question", report["metric"], "95% interval"]
        sections += [pages.plot(figure, "the metric against the number of replies"), pages.table(head, by_size)]
    return [*sections, "<h2>Replies</h2>", pages.table(["replies", "number"], counts)]


def _wrong(result: Evaluated) -> list[str]:
    """Return the wrong and the undecided answers with their pictures, and what the extractor read in each."""
    wrong = [(s, p) for s, p in zip(result.scored, result.predictions, strict=True) if s.score.value < 1]
    cards: list[str] = []
    for each, prediction in wrong[:MOST_SHOWN]:
        parts = [part for message in each.example.conversation for part in message.content]
        pictures = "".join(pages.picture(part.source) for part in parts if isinstance(part, ImageRef))
        asked = "".join(part.text for part in parts if isinstance(part, Text)).strip()
        read = "undecided" if each.score.undecided else f"read as {each.score.answer!r}, worth {each.score.value:g}"
        expected = pages.text(" or ".join(each.example.answers)[:MOST_CHARACTERS])
        cards.append(
            pages.card(
                pictures, pages.block(asked, most=MOST_CHARACTERS),
                pages.block(prediction.prediction, "bad", most=MOST_CHARACTERS),
                f"{pages.text(each.example.id)}: {pages.text(read)}; expected <span class='good'>{expected}</span>",
            )
        )  # fmt: skip
    if not wrong:
        return ["<h2>Wrong answers</h2><p>None.</p>"]
    count = f"{len(wrong):,} of {len(result.scored):,}" + (f", the first {len(cards)} shown" if len(cards) < len(wrong) else "")
    return [f"<h2>Wrong answers: {count}</h2>", pages.grid(cards)]
