"""What several tests of the server share."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The place of a model that a page is served for."""
    return tmp_path_factory.mktemp("page") / "model"
