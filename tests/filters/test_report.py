"""The report counts what happened, shows what a person should look at, and needs nothing but itself."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from ivl.filters.chain import read_chain
from ivl.filters.judge import DataJudge
from ivl.filters.run import run
from ivl.formats.rows import write_jsonl
from tests.filters.test_run import CountingJudge
from tests.helpers.mixtures import picture, turns


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 rows whose answers have 1 to 60 characters, of which more than 40 are too many; 20 rows with pictures, exempt."""
    place = tmp_path_factory.mktemp("report")
    write_jsonl([{"id": f"t{n}", "conversations": turns("<b>&", "é" * n)} for n in range(1, 61)], place / "text.jsonl")
    for n in range(20):
        picture(place / f"{n}.png", 300, 200, seed=n)
    shown = [{"id": f"p{n}", "image": f"{n}.png", "conversations": turns("what?", "x" * 50)} for n in range(20)]
    (place / "19.png").write_bytes(b"no image")
    write_jsonl([*shown, {"id": "bad"}], place / "shown.jsonl")
    (place / "meta.json").write_text(json.dumps({"text": {"annotation": "text.jsonl"}, "shown": {"annotation": "shown.jsonl"}}))
    first = {"use": "length", "max_answer": 40, "exempt": ["shown"]}
    stages = [first, {"use": "quality"}, {"use": "length", "name": "again", "max_answer": 49}]
    chain = read_chain({"about": "<about>", "stages": stages}, "chain")
    run(chain, place / "meta.json", place / "out", judge=DataJudge(CountingJudge(place / "asked"), name="<judge>"))
    return place / "out"


def test_figures(out: Path) -> None:
    report = json.loads((out / "report.json").read_text())
    stages = {stage["name"]: stage for stage in report["stages"]}
    assert report["rows"] == 81 and report["judge"] == "<judge>"
    unreadable = stages["unreadable"]
    assert (unreadable["reached"], unreadable["dropped"], unreadable["exempt"], unreadable["limit"]) == (81, 1, 0, None)
    length = stages["length"]
    assert (length["reached"], length["dropped"], length["exempt"]) == (60, 20, 20)
    assert length["limit"] == 40 and length["reasons"] == {"answer too long": 20}
    assert (sum(length["histogram"]["kept"]), sum(length["histogram"]["dropped"])) == (40, 20)
    quality = stages["quality"]
    assert quality["reached"] == 60 and len(quality["histogram"]["kept"]) == 11 and sum(quality["histogram"]["kept"][:7]) == 0
    assert quality["dropped"] == sum(quality["histogram"]["dropped"]) > 0
    assert stages["again"]["reached"] == 60 - quality["dropped"]
    for name, rows in (("text", 60), ("shown", 21)):
        each = report["datasets"][name]
        assert each["rows"] == rows == each["kept"] + sum(each["dropped"].values())
    assert report["kept"] == sum(each["kept"] for each in report["datasets"].values())


def test_page(out: Path) -> None:
    page = (out / "report.html").read_text()
    assert "mathdefault" not in page  # plots read no mathtext
    assert "<about>" not in page and "&lt;about&gt;" in page and "&lt;judge&gt;" in page and "<b>&</" not in page
    assert not re.search(r"(?:src|href)=['\"](?!data:|#)", page)
    assert page.count("class='plot'") == 3 and page.count("data:image/jpeg;base64,") >= 3
    assert "answer too long" in page and "bad_row" in page and len(page) < 1_000_000


def test_examples_are_spread_over_reasons(tmp_path: Path) -> None:
    rows = [turns("?", "a" * (30 if n % 50 else 3)) for n in range(500)]
    write_jsonl([{"conversations": talk} for talk in rows], tmp_path / "rows.jsonl")
    chain = read_chain({"stages": [{"use": "length", "min_answer": 5, "max_answer": 20}]}, "chain")
    report = run(chain, tmp_path / "rows.jsonl", tmp_path / "out")
    assert report["kept"] == 0 and list(report["stages"][1]["reasons"].items()) == [
        ("answer too long", 490),
        ("answer too short", 10),
    ]
    page = (tmp_path / "out/report.html").read_text()
    assert page.count("class='bad'>answer too short") == page.count("class='bad'>answer too long") == 4
