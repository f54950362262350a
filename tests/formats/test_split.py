"""Rows that are kept for validation: an exact share, by content alone, equal rows on one side."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ivl.data.config import DataConfig
from ivl.data.loader import Loader
from ivl.errors import InputError
from ivl.formats.rows import open_rows, write_jsonl
from ivl.formats.split import part_of
from tests.helpers.mixtures import make_file, processor

ROWS = [{"id": n, "text": f"row {n}"} for n in range(200)]


def parts(path: Path, share: float) -> tuple[list[int], list[int]]:
    """Ids of the rows to train on and of those that are kept."""
    rows = open_rows(path)
    both = (part_of(rows, share, validation=validation) for validation in (False, True))
    trained, kept = ([each[n]["id"] for n in range(len(each))] for each in both)
    return trained, kept


@pytest.mark.parametrize(("share", "count"), [(0.1, 20), (0.005, 1), (0.0001, 1), (0.5, 100), (0.999, 199)])
def test_the_share_is_exact_and_every_row_is_on_one_side(tmp_path: Path, share: float, count: int) -> None:
    trained, kept = parts(write_jsonl(ROWS, tmp_path / "a.jsonl"), share)
    assert len(kept) == count and sorted([*trained, *kept]) == list(range(200))
    assert trained == sorted(trained), "in the file's order"


def test_sides_follow_from_content_and_not_from_order_or_file(tmp_path: Path) -> None:
    _, kept = parts(write_jsonl(ROWS, tmp_path / "a.jsonl"), 0.1)
    _, again = parts(write_jsonl(ROWS[::-1], tmp_path / "b.jsonl"), 0.1)
    (tmp_path / "c.json").write_text(json.dumps(ROWS))
    _, of_array = parts(tmp_path / "c.json", 0.1)
    assert set(kept) == set(again) == set(of_array)
    _, larger = parts(tmp_path / "a.jsonl", 0.2)
    assert set(kept) < set(larger)
    more = [*ROWS, *({"id": n, "text": "new"} for n in range(200, 220))]
    _, grown = parts(write_jsonl(more, tmp_path / "d.jsonl"), 0.1)
    assert len(set(kept) & set(grown)) >= 18, "a row seldom changes its side when others come"


def test_equal_rows_are_on_one_side(tmp_path: Path) -> None:
    rows = [{"id": n % 50, "text": "same"} for n in range(200)]
    trained, kept = parts(write_jsonl(rows, tmp_path / "a.jsonl"), 0.1)
    assert not set(trained) & set(kept) and len(kept) == 20


def test_tables_and_damaged_rows(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet

    pyarrow.parquet.write_table(arrow.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    trained, kept = parts(tmp_path / "a.parquet", 0.1)
    assert len(kept) == 20 and sorted([*trained, *kept]) == list(range(200))
    (tmp_path / "b.jsonl").write_text('{"id": 1}\n{not json\n{"id": 2}\n{"id": 3}\n')
    rows = open_rows(tmp_path / "b.jsonl")
    assert sum(len(part_of(rows, 0.5, validation=validation)) for validation in (False, True)) == 4


@pytest.mark.parametrize("rows", [[{"id": 1}], [{"id": 1}] * 5])
def test_too_few_rows_are_refused(tmp_path: Path, rows: list[dict]) -> None:
    with pytest.raises(InputError, match=r"a\.jsonl:1: .* too few, or too much alike"):
        part_of(open_rows(write_jsonl(rows, tmp_path / "a.jsonl")), 0.1, validation=True)


def test_loaders_of_the_two_parts_meet_no_sample_twice(tmp_path: Path) -> None:
    path = make_file(tmp_path / "data", 30)

    def ids(**options: bool) -> list[str]:
        data = DataConfig(mixture=str(path), val_share=0.2, max_tokens=300, max_tiles=40, num_workers=0, epochs=1, **options)
        loader = Loader(data, processor(), seed=0)
        return [id for batch in loader for id in batch.ids]

    trained, kept = ids(), ids(validation=True)
    assert len(kept) == 6 and len(trained) == 24 and len({*trained, *kept}) == 30
    with pytest.raises(InputError, match="val_share must be in"):
        DataConfig(mixture="x", validation=True)
