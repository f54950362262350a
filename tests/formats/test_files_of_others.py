"""Files as people bring them: indented JSON, arrays, UTF-16, and pointers or web pages in place of the file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ivl.data.config import DataConfig
from ivl.data.mixture import load_mixture
from ivl.datasets.inspect import inspect
from ivl.errors import DataError, InputError
from ivl.formats.rows import open_rows
from ivl.utils.strict_json import read_json
from tests.helpers.mixtures import turns

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"
PAGE = b"\n<!DOCTYPE html>\n<html><head></head><body>404</body></html>"
ROWS = [{"id": n, "conversations": turns(f'say "{{" and }}\\ {n}', "a, [b]")} for n in range(3)]


def written(rows: list[dict], form: str) -> str:
    if form == "array":
        return json.dumps(rows)
    if form == "indented array":
        return json.dumps(rows, indent=2)
    if form == "wrapped":
        return "\r\n\r\n".join(json.dumps(row, separators=(",\r\n ", ": ")) for row in rows)
    indent = {"indented": 4, "tight": 0}[form]
    return "\n".join(json.dumps(row, indent=indent) for row in rows) + "\n"


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows"])
@pytest.mark.parametrize("bom", ["", "\ufeff"])
@pytest.mark.parametrize("form", ["array", "indented array", "indented", "tight", "wrapped"])
def test_rows_that_lines_do_not_tell_apart_are_named_by_number(tmp_path: Path, form: str, bom: str, name: str) -> None:
    file = tmp_path / name
    file.write_text(bom + written(ROWS, form), encoding="utf-8")
    rows = open_rows(file)
    assert [rows[n] for n in range(len(rows))] == ROWS
    assert rows.source(1) == f"{file}: row 2" and rows.container == "json"
    assert len(load_mixture(file)) == 1 and load_mixture(file)[0].annotation == str(file)
    assert len(open_rows(file, format="jsonl")) == 3


def test_a_folder_may_mix_lines_and_arrays(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    (tmp_path / "b.jsonl").write_text(written(ROWS, "indented"))
    rows = open_rows(tmp_path)
    assert [rows[n] for n in range(6)] == ROWS * 2 and rows.container == "json"
    assert rows.source(0) == f"{tmp_path / 'a.jsonl'}:1" and rows.source(3) == f"{tmp_path / 'b.jsonl'}: row 1"


def test_one_indented_row_is_no_meta_file(tmp_path: Path) -> None:
    pairs: list[dict[str, Any]] = [{"question": "q", "chosen": "a", "rejected": "b"}, {"prompt": [{}], "completion": [{}]}]
    for row in (ROWS[0], {"instruction": "q", "output": "a"}, {"query": "q", "response": "a"}, *pairs):
        (tmp_path / "one.json").write_text(json.dumps(row, indent=1))
        [spec] = load_mixture(tmp_path / "one.json")
        assert open_rows(spec.annotation)[0] == row


def test_meta_files_of_others(tmp_path: Path) -> None:
    """A data set named as a key of rows, nulls, paths as Windows writes them; rows under a key are named."""
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "rows.jsonl").write_text(json.dumps(ROWS[0]))
    meta = tmp_path / "meta.json"
    meta.write_text(json.dumps({"query": {"annotation": "sub\\rows.jsonl", "root": None, "repeat_time": 1}}))
    [spec] = load_mixture(meta)
    assert (spec.name, Path(spec.annotation), spec.root) == ("query", tmp_path / "sub" / "rows.jsonl", str(tmp_path))
    meta.write_text(json.dumps({"data": ROWS}))
    with pytest.raises(
        InputError, match=r"meta\.json: dataset 'data': is a list of 3 rows; write that list alone, as `jq \.data`"
    ):
        load_mixture(meta)


def test_an_indented_row_that_is_broken_is_one_problem(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    text = written(ROWS, "indented")
    file.write_text(text.replace('"id": 1,', '"id": 1') + '{"id": 4,\n "conv')
    problems = [str(each) for each in inspect(DataConfig(mixture=str(file))) if isinstance(each, DataError)]
    assert [problem.partition(": not valid")[0] for problem in problems] == [f"{file}: row 2", f"{file}: row 4"]


@pytest.mark.parametrize("content", [b"question,answer\nq,a\n", b"a: 1\n", b"\x89PNG\r\n", b"some words"])
def test_files_of_another_kind_are_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "rows.csv").write_bytes(content)
    with pytest.raises(InputError, match=r"rows\.csv: is neither a meta JSON nor rows, which are JSON lines"):
        load_mixture(tmp_path / "rows.csv")


def test_lines_stay_lines(tmp_path: Path) -> None:
    """A damaged first line is one bad row, whatever follows."""
    file = tmp_path / "rows.jsonl"
    for damaged in ('{"id": 1, "conv', "{", '{"id": 1,', "", "  "):
        file.write_text(damaged + "\n" + "\n".join(map(json.dumps, ROWS)))
        rows = open_rows(file)
        assert rows.container == "jsonl" and rows[len(rows) - 1] == ROWS[2] and rows.source(len(rows) - 1) == f"{file}:4"


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("form", ["array", "indented", "lines"])
def test_utf_16_is_named(tmp_path: Path, encoding: str, form: str) -> None:
    file = tmp_path / "rows.jsonl"
    text = "\n".join(map(json.dumps, ROWS)) if form == "lines" else written(ROWS, form)
    file.write_text(text, encoding=encoding)
    with pytest.raises(InputError, match=r"rows\.jsonl: is UTF-16 or UTF-32; save it as UTF-8"):
        open_rows(file)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (POINTER, "git-LFS pointer.*git lfs pull"),
        (PAGE, "web page.*download it again"),
        (b"PK\3\4\x14\0", "archive.*unpack it"),
    ],
)
def test_pointers_and_web_pages_are_named(tmp_path: Path, content: bytes, words: str) -> None:
    for name in ("a.jsonl", "a.json", "a.parquet", "a.arrow", "a.tar"):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match=words):
            open_rows(tmp_path / name)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "part-0.parquet").write_bytes(content)
    with pytest.raises(InputError, match=words):
        open_rows(tmp_path / "b")
    with pytest.raises(InputError, match=words):
        read_json(tmp_path / "a.json")
