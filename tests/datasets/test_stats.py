import json
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ivl.cli.data import main
from ivl.data.config import DataConfig
from ivl.datasets.inspect import inspect
from ivl.datasets.stats import PERCENTILES, DatasetStats, Histogram, total
from ivl.datasets.stats_report import MAX_SOURCES, write_report
from ivl.errors import InputError
from ivl.types import ImageRef, Message, Record, Text
from tests.helpers.mixtures import make_file, processor


def histogram(values) -> Histogram:
    made = Histogram()
    for value in values:
        made.add(value)
    return made


@given(st.lists(st.integers(0, 10**7), min_size=1, max_size=200))
def test_percentiles_are_those_of_the_numbers_within_a_percent(values):
    made = histogram(values)
    for percent in PERCENTILES:
        exact = np.percentile(values, percent, method="inverted_cdf")
        assert exact * 0.99 <= made.percentile(percent) <= exact
    assert made.percentile(100) == max(values) and made.mean == pytest.approx(np.mean(values))


@given(st.lists(st.integers(0, 10**6)), st.lists(st.integers(0, 10**6)))
def test_merged_is_counted_together(a, b):
    merged = histogram(a)
    merged.merge(histogram(b))
    assert merged == histogram(a + b)


def test_memory_does_not_grow_with_the_data():
    assert len(histogram(range(0, 10**7, 97)).counts) < 4000


def test_a_row_is_counted():
    image = ImageRef("a.png")
    talk = (Message("user", (image, Text("what is this?"))), Message("assistant", (Text("a red circle"),)))
    stats = DatasetStats("one")
    stats.add(Record("1", (talk, talk + talk), "rows:1"), size=(50, 3))
    assert (stats.conversations, stats.turns, stats.images, stats.videos) == (2, 3, 1, 0)
    assert (stats.tokens, stats.tiles, stats.characters) == (50, 3, 3 * 25)
    assert stats.turns_per_conversation.counts == {1: 1, 2: 1}


def test_report_is_one_file(tmp_path):
    path = make_file(tmp_path, 30)
    *_, stats = inspect(DataConfig(mixture=str(path)), processor())
    page = write_report(tmp_path / "out", [stats, DatasetStats("<empty>")], mixture=str(path), model="tiny").read_text()
    assert "tokens per sample" in page.lower() and "class='plot'" in page and "&lt;empty&gt;" in page
    assert not re.search(r"""(?:src|href)=["'](?!data:|#)""", page)
    saved = json.loads((tmp_path / "out/stats.json").read_text())
    assert saved["total"]["tokens"] == stats.tokens == sum(
        int(value) * count for value, count in saved["total"]["tokens_per_sample"]["bins"].items()
    )  # fmt: skip
    assert saved["datasets"]["rows"]["rows"] == 30 and saved["model"] == "tiny"


def test_many_sources_without_a_model(tmp_path):
    found = []
    for n in range(MAX_SOURCES + 5):
        *_, stats = inspect(DataConfig(mixture=str(make_file(tmp_path / str(n), n + 1))))
        stats.name = f"set{n}"
        found.append(stats)
    page = write_report(tmp_path / "out", found, mixture="m", model=None).read_text()
    assert all(f">set{n}</td>" in page for n in range(MAX_SOURCES + 5)) and "in characters" in page
    assert total(found).rows == sum(range(1, MAX_SOURCES + 6))


def test_nothing_to_plot(tmp_path):
    with pytest.raises(InputError, match="no row could be read"):
        write_report(tmp_path, [DatasetStats("bad", rows=1, bad=1)], mixture="m.json", model=None)


def test_files_of_others_are_refused_before_the_scan(tmp_path, monkeypatch):
    rows, out = make_file(tmp_path, 3), tmp_path / "out"
    out.mkdir()
    (tmp_path / "file").write_text("mine")
    for name in ("stats.json", "stats.html"):
        (out / name).write_text('{"mine": 1}')
        with pytest.raises(InputError, match=rf"{name}: exists and is no (report|page) of ivl data stats"):
            main(["stats", str(rows), "--out", str(out)])
        assert (out / name).read_text() == '{"mine": 1}'
        (out / name).unlink()
    (out / "stats.json").symlink_to("nowhere")
    with monkeypatch.context() as patch:
        patch.setattr("ivl.datasets.inspect.inspect", lambda *_, **__: pytest.fail("rows were read"))
        for place in (tmp_path / "file", "/dev/full", out):
            with pytest.raises(InputError, match="cannot be written"):
                main(["stats", str(rows), "--out", str(place)])
    assert (tmp_path / "file").read_text() == "mine" and (out / "stats.json").is_symlink()
    (out / "stats.json").unlink()
    for _ in range(2):  # its own report is replaced
        main(["stats", str(rows), "--out", str(out)])
    assert json.loads((out / "stats.json").read_text())["total"]["rows"] == 3
