"""A local Ray cluster of several processes gives the bytes of one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ivl.filters import run as run_module
from ivl.filters.judge import DataJudge
from ivl.filters.rows import RowChecker
from ivl.filters.run import FilterOptions, run
from tests.filters.test_run import CountingJudge, chain, outputs, world


@pytest.mark.slow
def test_ray_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does it matter that one process did the first half."""
    pytest.importorskip("ray")
    meta = world(tmp_path)
    monkeypatch.setattr(run_module, "BLOCK", 8)

    def work(name: str, options: FilterOptions | None = None, **more: Any) -> None:
        judge = DataJudge(CountingJudge(tmp_path / f"{name}.asked"), name="fake")
        run(chain(), meta, tmp_path / name, options, judge=judge, **more)

    def stop(done: int, total: int, **_: Any) -> None:
        if done > 30:
            raise KeyboardInterrupt

    work("one")
    with pytest.raises(KeyboardInterrupt):
        work("ray", on_progress=stop)
    work("ray", FilterOptions(ray="local", workers=2))
    assert outputs(tmp_path / "one") == outputs(tmp_path / "ray")


def test_parts_cover_every_row_once_in_order() -> None:
    checker = RowChecker(chain(), ())
    checker.files = {"a": range(5), "b": (), "c": range(1), "d": range(600)}  # type: ignore[assignment]
    places = [(name, row) for name, rows in checker.files.items() for row in range(len(rows))]
    for least in (1, 4, 100, 1000):
        parts = checker.parts(least)
        assert [(part.dataset, row) for part in parts for row in range(part.first, part.end)] == places
        assert [part.start for part in parts] == [places.index((part.dataset, part.first)) for part in parts]
        assert len(parts) <= 256 + 3 and [part.number for part in parts] == list(range(len(parts)))
