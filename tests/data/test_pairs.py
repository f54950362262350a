"""Rows of preference pairs: read, written and read again, and never taken for other rows."""

from pathlib import Path

import pytest

from ivl.data.config import DataConfig
from ivl.data.loader import Loader
from ivl.data.records import to_record
from ivl.datasets.rows import from_record
from ivl.errors import DataError
from ivl.formats.rows import write_jsonl
from tests.helpers.mixtures import picture, processor, turns

PAIR = {"id": "p", "question": "what is this", "chosen": "a red circle", "rejected": "a square"}


def read(row: dict, **options):
    return to_record(row, source="rows.jsonl:1", root=Path(), **options)


@pytest.mark.parametrize("layout", ["reference", "openai", "sharegpt", "swift"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"image": "a.png"},
        {"image": ["a.png", "b.png"], "question": "<image> and <image>?"},
        {"prompt": [*turns("what is this", "a circle"), {"from": "human", "value": "which colour"}], "question": None},
        {"system": "be brief"},
    ],
)
def test_a_pair_is_written_as_a_pair(layout, changes):
    record = read(PAIR | changes)
    row = from_record(record, layout=layout)
    assert record.is_pair and {"chosen", "rejected"} <= row.keys()
    assert read(row) == record and len(record.conversations) == 2


def test_a_forced_layout_reads_pairs_too():
    row = {"messages": [{"role": "user", "content": "what is this"}], "chosen": "a red circle", "rejected": "a square"}
    assert read(row, layout="openai").conversations == read(PAIR).conversations


def test_empty_columns_make_no_pair():
    record = read({"conversations": turns("what is this", "a circle"), "chosen": None, "rejected": None})
    assert not record.is_pair and len(record.conversations) == 1


def test_replies_to_different_prompts_are_no_pair():
    row = {"chosen": turns("what is this", "a red circle"), "rejected": turns("what is that", "a square")}
    with pytest.raises(DataError, match=r"rows\.jsonl:1: .*a pair has one prompt"):
        read(row)


@pytest.mark.parametrize(
    "rejected", ["a red circle", "a red circle ", "\n a red circle\t", [{"role": "assistant", "content": " a red circle"}]]
)
def test_sides_that_differ_in_white_space_alone_are_refused(rejected):
    with pytest.raises(DataError, match="the same but for white space"):
        read(PAIR | {"rejected": rejected})


@pytest.mark.parametrize("wanted", [True, False])
def test_pairs_and_other_rows_are_not_taken_for_each_other(tmp_path, wanted):
    """Two questions about a picture are also two conversations, and the rejected reply of a pair is none to learn from."""
    picture(tmp_path / "a.png", 40, 40)
    talks = [turns("<image>\nwhat is this", "a circle"), turns("<image>\nwhat colour", "red")]
    rows = [PAIR, {"image": "a.png", "conversations": talks}]
    config = DataConfig(mixture=str(write_jsonl(rows, tmp_path / "rows.jsonl")), num_workers=0, epochs=1, shuffle=False)
    [batch] = Loader(config, processor(), seed=0)
    assert len(batch.layout.new_lens) == 4
    with pytest.raises(DataError, match=r"rows\.jsonl:2: not a preference pair" if wanted else r"rows\.jsonl:1: a preference"):
        list(Loader(config, processor(), seed=0, pairs=wanted))
