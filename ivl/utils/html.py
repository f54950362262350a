"""Report pages: one self-contained HTML file with tables, plots and small pictures. Plots need the `eval` extra."""

from __future__ import annotations

import base64
import html
import io
import os
from collections.abc import Sequence, Set
from pathlib import Path
from typing import Any

from PIL import Image

from ivl.errors import InputError
from ivl.utils.files import regular
from ivl.utils.pictures import open_image, upright
from ivl.utils.strict_json import read_json

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 64rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
h1 { font-size: 1.5rem } h2 { font-size: 1.15rem; margin-top: 2rem } img { max-width: 100% } img.plot { width: 100% }
div.table { overflow-x: auto } table { border-collapse: collapse; white-space: nowrap }
td, th { padding: .2rem 0 .2rem 1.2rem; text-align: right } td:first-child, th:first-child { padding-left: 0; text-align: left }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(15rem, 1fr)); gap: 1rem }
.card { border-top: 1px solid #ddd; padding-top: .5rem; overflow-wrap: anywhere }
.card img { height: 5rem; margin-right: .3rem }
pre { white-space: pre-wrap; margin: .3rem 0; font-size: 13px } .good { color: #1b6e20 } .bad { color: #b00020 }
"""


def page(title: str, *sections: str, style: str = "") -> str:
    """A whole page; sections are HTML. style: rules of the page's own, after the common ones."""
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width">'
    body = "\n".join(sections)
    return (
        f'<!doctype html><html lang="en">{head}<title>{text(title)}</title><style>{STYLE}{style}</style>\n'
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


def table(head: Sequence[object], rows: Sequence[Sequence[object]]) -> str:
    def line(tag: str, cells: Sequence[object]) -> str:
        return "<tr>" + "".join(f"<{tag}>{text(cell)}" for cell in cells)

    return f"<div class='table'><table>{line('th', head)}{''.join(line('td', row) for row in rows)}</table></div>"


def plot(figure: Any, alt: str) -> str:
    """A matplotlib figure, which is closed."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, bbox_inches="tight")
    pyplot().close(figure)
    return f"<img class='plot' alt='{text(alt)}' src='{_data('png', buffer.getvalue())}'>"


def picture(source: str | Path | bytes | Image.Image, *, size: int = 160) -> str:
    """A thumbnail; what cannot be read is named instead."""
    try:
        if isinstance(source, Image.Image):
            image = source.copy()
        else:
            data = source if isinstance(source, bytes) else Path(source).read_bytes() if regular(source) else b""
            image, orientation = open_image(io.BytesIO(data))
            image = upright(image, orientation)
        image.thumbnail((size, size))
        buffer = io.BytesIO()
        image.convert("RGB").save(buffer, format="JPEG", quality=85)
    except (OSError, ValueError, Image.DecompressionBombError):
        return f"<i>unreadable image {text(source if isinstance(source, str | Path) else '')}</i>"
    return f"<img alt='' src='{_data('jpeg', buffer.getvalue())}'>"


def pyplot() -> Any:
    """matplotlib.pyplot without a screen.

    Raises:
        InputError: if matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise InputError("plots need matplotlib: pip install 'ivl[eval]'") from error
    matplotlib.use("Agg")
    import matplotlib.pyplot

    return matplotlib.pyplot


def _data(kind: str, content: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
