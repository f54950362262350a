"""Tables fit the terminal, or 100 columns: wide ones are turned, and nothing is cut."""

from __future__ import annotations

import pytest

from ivl.utils.progress import print_table


def show(columns: int, rows: int) -> None:
    cells = [[f"{row}-{n}-value" for n in range(columns)] for row in range(rows)]
    print_table([f"column{n}" for n in range(columns)], cells, title="a title")


@pytest.mark.parametrize(("columns", "rows"), [(4, 3), (12, 1), (12, 3), (12, 40)])
def test_every_cell_is_shown_within_100_columns(
    columns: int, rows: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    show(columns, rows)
    said = capsys.readouterr().out
    lines = [line.rstrip() for line in said.splitlines()]
    assert max(map(len, lines)) <= 100 and "a title" in said
    assert all(f"{row}-{n}-value" in said.split() for row in range(rows) for n in range(columns))


def test_a_wide_terminal_shows_a_table_as_it_is(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "180")
    show(12, 2)
    assert len(capsys.readouterr().out.splitlines()) == 4
