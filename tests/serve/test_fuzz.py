"""S6 in small: no random request gets a 5xx, none hangs. The 10,000 are benchmarks/serve_fuzz.py."""

from __future__ import annotations

from pathlib import Path

from benchmarks.serve_fuzz import fuzz
from tests.helpers.servers import engine, running


def test_no_random_request_is_answered_with_5xx(tmp_path: Path) -> None:
    with running(engine(tmp_path)) as server:
        out = fuzz(server.url, 150, seed=1)
        assert not out.failures and sum(out.statuses.values()) > 100
        assert server.service.num_open == 0 and server.service.ready
