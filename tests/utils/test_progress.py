"""Tables fit the terminal, or 100 columns: wide ones are turned, and nothing is cut."""

from __future__ import annotations

import pytest
from rich.table import Table

from ivl.utils.progress import print_table


def table(columns: int, rows: int) -> Table:
    made = Table(box=None, title="a title")
    for n in range(columns):
        made.add_column(f"column{n}", no_wrap=True)
    for row in range(rows):
        made.add_row(*(f"{row}-{n}-value" for n in range(columns)))
    return made


@pytest.mark.parametrize(("columns", "rows"), [(4, 3), (12, 1), (12, 3), (12, 40)])
def test_every_cell_is_shown_within_100_columns(
    columns: int, rows: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    print_table(table(columns, rows))
    said = capsys.readouterr().out
    lines = [line.rstrip() for line in said.splitlines()]
    assert max(map(len, lines)) <= 100 and "a title" in said
    assert all(f"{row}-{n}-value" in said.split() for row in range(rows) for n in range(columns))


def test_a_wide_terminal_shows_a_table_as_it_is(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "180")
    print_table(table(12, 2))
    assert len(capsys.readouterr().out.splitlines()) == 4
