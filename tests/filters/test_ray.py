"""A local Ray cluster of several processes gives the bytes of one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ivl.filters import folder
from ivl.filters import run as run_module
from ivl.filters.judge import Judge
from ivl.filters.parallel import Blocks
from ivl.filters.run import Progress, run
from tests.filters.test_run import CountingJudge, chain, outputs, world


@pytest.mark.slow
def test_ray_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does it matter that one process did the first half."""
    pytest.importorskip("ray")
    meta = world(tmp_path)
    monkeypatch.setattr(run_module, "BLOCK", 8)
    monkeypatch.setattr(folder, "SYNC_SECONDS", 0.0)

    def work(name: str, **options: Any) -> None:
        judge = Judge(CountingJudge(tmp_path / f"{name}.asked"), name="fake")
        run(chain(), meta, tmp_path / name, judge=judge, **options)

    def stop(progress: Progress) -> None:
        if progress.done > 30:
            raise KeyboardInterrupt

    work("one")
    with pytest.raises(KeyboardInterrupt):
        work("ray", on_progress=stop)
    work("ray", ray="local", workers=2)
    assert outputs(tmp_path / "one") == outputs(tmp_path / "ray")


def test_blocks_cover_every_row_once() -> None:
    for start in range(13):
        for size in (1, 4, 20):
            blocks = Blocks((5, 0, 1, 6), start, size)
            places = [place for n in range(len(blocks)) for place in blocks[n]]
            assert places == [(d, r) for d, count in enumerate((5, 0, 1, 6)) for r in range(count)][start:]
