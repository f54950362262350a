"""Report pages: one self-contained HTML file with tables, plots and small pictures. Plots need the `eval` extra.

Pages follow the reader's light or dark setting and fit a phone: plots are SVG drawn in the color of the text, and a row of a
wide table becomes a list where the window is narrow.
"""

from __future__ import annotations

import base64
import html
import io
import os
import warnings
from collections.abc import Iterable, Sequence, Set
from pathlib import Path
from typing import Any

from PIL import Image

from ivl.errors import InputError
from ivl.utils.files import regular
from ivl.utils.pictures import open_image, upright
from ivl.utils.strict_json import read_json

STYLE = Path(__file__).with_name("page.css").read_text("utf-8")
INK = "#1f2328"
"""Color of text and axes in plots; a page draws it in the color of its own text."""
COLORS = ("#4e8fd0", "#e07b39", "#3f9f5b", "#c14f8a", "#8a75d1", "#a08a2c", "#4fa3a5", "#98694f")
"""Colors of series, which stand out on light and on dark."""
MAX_OPEN = 700
"""Characters of a text that are shown before it has to be opened."""


def page(title: str, *sections: str) -> str:
    """A whole page; sections are HTML."""
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
    body = "\n".join(sections)
    return (
        f'<!doctype html><html lang="en">{head}<title>{text(title)}</title><style>{STYLE}</style>\n'
        f"<h1>{text(title)}</h1>\n{body}</html>"
    )


def check_places(
    report: Path, keys: Set[str], page: Path | None, title: str, command: str, *, plots: bool = True
) -> None:  # fmt: skip
    """Check that a report and its page can be written without harm to files of another kind. A missing folder is created.

    A report that has these keys, a page with this title, and an empty file may be replaced.

    Raises:
        InputError: naming the file that is in the way, or the missing library for plots.
    """
    try:
        report.parent.mkdir(parents=True, exist_ok=True)
        filled = (report.exists() or report.is_symlink()) and regular(report).st_size
        if filled and not (isinstance(old := read_json(report), dict) and old.keys() >= keys):
            raise InputError(f"{report}: exists and is no report of {command}; give another --out")
        if page and os.path.lexists(page) and regular(page).st_size and title not in page.read_text("utf-8", "replace")[:5000]:
            raise InputError(f"{page}: exists and is no page of {command}; give another --out")
        if not os.access(report.parent, os.W_OK):
            raise InputError(f"{report.parent}: cannot be written (Permission denied)")
    except (OSError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{report}: cannot be written ({getattr(error, 'strerror', None) or error})") from None
    if page and plots:
        pyplot()


def text(value: object) -> str:
    """Escaped for HTML."""
    return html.escape(str(value))


def facts(**values: str) -> str:
    """The figures to see first, each above its name; an underscore in a name is a space."""
    each = (f"<div><b>{text(value)}</b><span>{text(name.replace('_', ' '))}</span></div>" for name, value in values.items())
    return f"<div class='facts'>{''.join(each)}</div>"


def table(head: Sequence[object], rows: Iterable[Sequence[object]], *, words: Set[str] = frozenset()) -> str:
    """A table whose first column names the rows.

    Args:
        head: Names of the columns.
        rows: Cells of each row.
        words: Columns of words, which are set flush left.
    """

    def cells(row: Sequence[object]) -> str:
        kinds = (" class='words'" if name in words else "" for name in head)
        named = zip(head, kinds, row, strict=True)
        return "".join(f"<td data-head='{text(name)}'{kind}>{text(cell)}</td>" for name, kind, cell in named)

    top = "".join(f"<th{' class=words' if name in words else ''}>{text(name)}</th>" for name in head)
    body = "".join(f"<tr>{cells(row)}</tr>" for row in rows)
    return f"<table{' class=wide' if len(head) > 3 else ''}><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>"


def block(value: str, kind: str = "", *, most: int = 4_000) -> str:
    """A text as it stands, of the class `good`, `bad` or none; a long one opens by a click, and says what is cut."""
    more = f" ... {len(value) - most:,} more characters" if len(value) > most else ""
    whole = f"<pre class='{kind}'>{text(value[:most])}{more}</pre>"
    if len(value) <= MAX_OPEN:
        return whole
    return f"<details><summary><pre class='{kind}'>{text(value[: MAX_OPEN // 2])} ...</pre></summary>{whole}</details>"


def card(*parts: str) -> str:
    """A box; parts are HTML."""
    return f"<div class='card'>{''.join(parts)}</div>"


def grid(cards: Iterable[str], kind: str = "grid") -> str:
    """Boxes side by side, as many as the window has room for; `plots` and `pair` are the kinds for wider ones."""
    return f"<div class='{kind}'>{''.join(cards)}</div>"


def next_steps(*steps: tuple[str, str]) -> str:
    """The last section: what to do now, each step a sentence and a command."""
    each = (f"<li>{text(sentence)}{f'<pre>{text(command)}</pre>' if command else ''}</li>" for sentence, command in steps)
    return f"<h2>What next</h2><ul class='next'>{''.join(each)}</ul>"


def plot(figure: Any, alt: str) -> str:
    """A matplotlib figure as SVG in the colors of the page; the figure is closed."""
    buffer = io.StringIO()
    with (
        warnings.catch_warnings(),
        pyplot().rc_context({"svg.hashsalt": "ivl"}),
    ):  # the same names in every run, so that a page is the same, too
        warnings.filterwarnings("ignore", "Glyph")  # of a data set's name that the font cannot write
        figure.savefig(buffer, format="svg", transparent=True, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    pyplot().close(figure)
    drawn = buffer.getvalue()
    drawn = drawn[drawn.index("<svg") + 4 :].replace(INK, "currentColor")
    most = int(1.4 * 96 * figure.get_figwidth())  # enlarged further, its text would be larger than the page's
    return f"<figure class='plot' style='max-width: {most}px'><svg role='img' aria-label='{text(alt)}'{drawn}</figure>"


def picture(source: str | Path | bytes | Image.Image, *, size: int = 160) -> str:
    """A thumbnail; what cannot be read is named instead. Small pictures are shown as they are, their pixels enlarged."""
    try:
        if isinstance(source, Image.Image):
            image = source.copy()
        else:
            data = source if isinstance(source, bytes) else Path(source).read_bytes() if regular(source) else b""
            image, orientation = open_image(io.BytesIO(data))
            image = upright(image, orientation)
        small = max(image.size) <= size // 2
        image.thumbnail((size, size))
        buffer = io.BytesIO()
        image.convert("RGB").save(buffer, **({"format": "PNG"} if small else {"format": "JPEG", "quality": 85}))
    except (OSError, ValueError, Image.DecompressionBombError):
        return f"<i>unreadable image {text(source if isinstance(source, str | Path) else '')}</i>"
    kind, content = ("png", " class='pixels'") if small else ("jpeg", "")
    return f"<img alt=''{content} src='data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}'>"


def pyplot() -> Any:
    """matplotlib.pyplot without a screen, in the style of the pages.

    Raises:
        InputError: if matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise InputError("plots need matplotlib: pip install 'ivl[eval]'") from error
    matplotlib.use("Agg")
    import matplotlib.pyplot
    from matplotlib.rcsetup import cycler

    for name in ("text.color", "axes.labelcolor", "axes.edgecolor", "axes.titlecolor", "xtick.color", "ytick.color"):
        matplotlib.rcParams[name] = INK
    matplotlib.rcParams |= {
        "axes.prop_cycle": cycler(color=COLORS), "axes.spines.top": False, "axes.spines.right": False,
        "axes.titlesize": "medium", "axes.titleweight": "bold", "font.size": 9, "legend.frameon": False,
        "text.parse_math": False,  # names may hold "$"; an axis in logarithms needs a formatter without mathtext
    }  # fmt: skip
    return matplotlib.pyplot
