"""A local Ray cluster of several processes gives the bytes of one process."""

from __future__ import annotations

from pathlib import Path

import pytest

from ivl.data.filters import run as run_module
from ivl.data.filters.chain import load_chain
from ivl.data.filters.judge import Judge
from ivl.data.filters.parallel import Blocks
from ivl.data.filters.run import run
from ivl.errors import InputError
from tests.data.filters.test_run import CountingJudge, chain, outputs, world


@pytest.mark.slow
def test_ray_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ray = pytest.importorskip("ray")
    meta = world(tmp_path)
    monkeypatch.setattr(run_module, "BLOCK", 8)
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        for name, config in (("rules", load_chain("heuristic")), ("judged", chain())):
            for ways in ({}, {"ray": "local"}):
                out = tmp_path / f"{name}-{len(ways)}"
                judge = Judge(CountingJudge(tmp_path / f"{out}.asked"), name="fake") if config.needs_judge else None
                run(config, meta, out, judge=judge, **ways)
            assert outputs(tmp_path / f"{name}-0") == outputs(tmp_path / f"{name}-1")
        with pytest.raises(InputError, match="datasketch is gone"):
            monkeypatch.setattr("ivl.data.filters.parallel.Outcome.from_json", _fail)
            run(chain(judged=False), meta, tmp_path / "failed", ray="local")
    finally:
        ray.shutdown()
    monkeypatch.undo()
    run(chain(judged=False), meta, tmp_path / "failed")  # goes on without Ray
    run(chain(judged=False), meta, tmp_path / "whole")
    assert outputs(tmp_path / "failed") == outputs(tmp_path / "whole")


def _fail(row: object) -> None:
    raise InputError("datasketch is gone")


def test_blocks_cover_every_row_once() -> None:
    for start in range(13):
        for size in (1, 4, 20):
            blocks = Blocks((5, 0, 1, 6), start, size)
            places = [place for n in range(len(blocks)) for place in blocks[n]]
            assert places == [(d, r) for d, count in enumerate((5, 0, 1, 6)) for r in range(count)][start:]
