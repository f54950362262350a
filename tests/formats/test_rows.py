import json
import os
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ivl.errors import DataError, InputError
from ivl.formats import text as rows_module
from ivl.formats.rows import open_rows as Rows
from ivl.formats.rows import write_jsonl

objects = st.lists(st.dictionaries(st.text(max_size=4), st.text(max_size=6), max_size=2), min_size=1, max_size=8)


@given(objects, st.sampled_from(["\n", "\r\n"]), st.booleans(), st.integers(1, 9), st.data())
def test_jsonl_index_finds_every_row_and_its_line(tmp_path_factory, values, newline, ends_open, chunk, data):
    lines = [json.dumps(value, ensure_ascii=False) for value in values]
    blanks = data.draw(st.lists(st.integers(0, 2), min_size=len(lines), max_size=len(lines)))
    text = "".join(newline * blank + line + newline for blank, line in zip(blanks, lines, strict=True))
    path = tmp_path_factory.mktemp("rows") / "a.jsonl"
    path.write_bytes((text.removesuffix(newline) if ends_open else text).encode())
    before, rows_module.CHUNK = rows_module.CHUNK, chunk
    try:
        rows = Rows(path)
    finally:
        rows_module.CHUNK = before
    assert [rows[i] for i in range(len(rows))] == values
    numbers = [sum(blanks[: i + 1]) + i + 1 for i in range(len(values))]
    assert [rows.source(i) for i in range(len(rows))] == [f"{path}:{number}" for number in numbers]


@given(objects, st.sampled_from([None, 2]), st.booleans(), st.integers(1, 9))
def test_json_array_index(tmp_path_factory, values, indent, ascii_only, chunk):
    path = tmp_path_factory.mktemp("rows") / "a.json"
    text = json.dumps(values, indent=indent, ensure_ascii=ascii_only)
    path.write_text(text, encoding="utf-8")
    before, rows_module.CHUNK = rows_module.CHUNK, chunk
    try:
        rows = Rows(path)
    finally:
        rows_module.CHUNK = before
    assert [rows[i] for i in range(len(rows))] == values
    assert [rows.source(i) for i in range(len(rows))] == [f"{path}: row {i + 1}" for i in range(len(rows))]


@given(st.lists(st.one_of(st.integers(), st.floats(allow_nan=False), st.text(), st.booleans()), min_size=1), st.integers(1, 3))
def test_an_array_of_anything_is_cut_into_its_elements(tmp_path_factory, values, chunk):
    """Numbers and words may be cut by the end of a piece and still be valid JSON."""
    path = tmp_path_factory.mktemp("rows") / "a.json"
    path.write_text(json.dumps(values), encoding="utf-8")
    before, rows_module.CHUNK = rows_module.CHUNK, chunk
    try:
        rows = Rows(path)
    finally:
        rows_module.CHUNK = before
    assert [json.loads(rows.raw(i)) for i in range(len(rows))] == values


def test_formats_are_said(tmp_path):
    reference = write_jsonl([{"conversations": []}], tmp_path / "a.jsonl")
    openai = write_jsonl([{"messages": []}], tmp_path / "b.jsonl")
    llava = tmp_path / "c.json"
    llava.write_text('[{"conversations": []}]')
    unknown = write_jsonl([{"x": 1}], tmp_path / "d.jsonl")
    said = [Rows(path).format for path in (reference, openai, llava, unknown)]
    assert said == ["reference jsonl", "OpenAI messages jsonl", "LLaVA json", "jsonl of unknown rows"]


def test_a_broken_element_of_an_array_is_one_bad_row(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('[\n{"a": 1},\n{"a": oops}, {"a": "\\\\\\", ]["}\n]')
    rows = Rows(path)
    assert len(rows) == 3 and rows[0] == {"a": 1} and rows[2] == {"a": '\\", ]['}
    with pytest.raises(DataError, match=r"a\.json: row 2: not valid JSON"):
        rows[1]


def test_missing_empty_and_changed_files_are_refused(tmp_path):
    with pytest.raises(InputError, match="cannot be read"):
        Rows(tmp_path / "no.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n\n")
    with pytest.raises(InputError, match="has no rows"):
        Rows(tmp_path / "empty.jsonl")
    (tmp_path / "none.json").write_text("[ ]")
    with pytest.raises(InputError, match="has no rows"):
        Rows(tmp_path / "none.json")
    path = write_jsonl([{"a": 1}, {"a": 2}], tmp_path / "a.jsonl")
    rows = Rows(path)
    assert rows[0] == {"a": 1}
    os.utime(path, ns=(1, 1))
    with pytest.raises(InputError, match="changed while in use"):
        rows[1]


def test_travels_between_processes(tmp_path):
    rows = Rows(write_jsonl([{"a": 1}, {"a": 2}], tmp_path / "a.jsonl"))
    assert rows[1] == pickle.loads(pickle.dumps(rows))[1]
