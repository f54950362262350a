"""The pages build as a site without a warning, and links to sources lead to pages of the site."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("zensical", reason="zensical builds the site (extra docs)")
ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("site")
    done = subprocess.run([sys.executable, str(ROOT / "docs/build.py"), str(place)], capture_output=True, text=True)
    assert done.returncode == 0 and "Warning" not in done.stdout + done.stderr, done.stdout + done.stderr
    return place


def test_every_page_is_there(site: Path) -> None:
    for page in (ROOT / "docs").rglob("*.md"):
        name = page.relative_to(ROOT / "docs").with_suffix("")
        assert (site / ("" if name.name == "index" else name) / "index.html").exists() or (
            site / name.parent / "index.html"
        ).exists()
    assert (site / "source/ivl/model/vlm.py/index.html").exists()


def test_api_is_made_of_docstrings(site: Path) -> None:
    page = (site / "api/index.html").read_text()
    for name in re.findall(r"^::: (\S+)", (ROOT / "docs/api.md").read_text(), re.MULTILINE):
        assert f'id="{name}"' in page, name
    assert "logprobs" in page and ":::" not in page


def test_links_lead_somewhere(site: Path) -> None:
    broken = []
    for page in site.rglob("index.html"):
        for link in re.findall(r'(?:href|src)="([^"#?:]+)["#?]', page.read_text()):
            target = (site / link.lstrip("/") if link.startswith("/") else page.parent / link).resolve()
            if not target.exists():
                broken.append((str(page.relative_to(site)), link))
    assert not broken
