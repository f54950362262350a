"""JSON files from strangers."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import pytest

from ivl.errors import InputError
from ivl.utils.strict_json import from_json, read_json

BAD = {
    "empty": (b"", "not valid JSON"),
    "cut": (b'{"a": [1', "not valid JSON"),
    "nan": (b'{"a": NaN}', "NaN is no finite number"),
    "infinity": (b'{"a": -Infinity}', "-Infinity is no finite number"),
    "huge number": (b'{"a": 1e999}', "1e999 is no finite number"),
    "digits": (b"1" * 10_000, "not valid JSON"),
    "latin-1": (b'{"a": "\xe9"}', "utf-8"),
    "utf-16": ('{"a": 1}'.encode("utf-16"), "utf-8"),
    "twice": (b'{"b": {"a": 1, "a": 2}}', "key 'a' twice"),
    "deep": (b"[" * 150 + b"]" * 150, "more than 100 levels"),
    "very deep": (b'{"a":' * 500_000, "nested too deep"),
    "twice among many": (b'{"%s":0,"a":0}' % b'":0,"'.join([b"a", *(b"%d" % n for n in range(200_000))]), "key 'a' twice"),
    "many values": (b"[" + b"[]," * 2_500_001 + b"1]", "5,000,003 values of JSON, of which 5,000,000 are read"),
    "raw surrogate": (b'{"a": "\xed\xa0\xbd"}', "utf-8"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_not_strict_json_is_one_line_with_file_and_reason(tmp_path: Path, name: str) -> None:
    data, reason = BAD[name]
    path = tmp_path / "config.json"
    path.write_bytes(data)
    with pytest.raises(InputError, match=reason) as refused:
        read_json(path)
    assert str(refused.value).startswith(str(path))
    assert len(str(refused.value)) < len(str(path)) + 300


def test_special_missing_and_oversized_files_are_refused_before_they_are_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "zero").symlink_to("/dev/zero")
    (tmp_path / "large.json").write_text("1" * 1_000)
    for path, reason in (
        (tmp_path / "fifo", "regular file"),
        (tmp_path / "zero", "regular file"),
        (tmp_path, "Is a directory"),
        (tmp_path / "none", "No such file"),
        (tmp_path / ("x" * 300), "File name too long"),
        (tmp_path / "x\0y", "null byte"),
        (tmp_path / "\ud800", "surrogates not allowed"),
        (tmp_path / "large.json", "more than 999 bytes"),
    ):
        with pytest.raises(InputError, match=reason):
            read_json(path, limit=999)


def test_links_marks_of_order_and_escapes_of_bytes_in_names_are_read(tmp_path: Path) -> None:
    (tmp_path / "real.json").write_bytes(b'\xef\xbb\xbf{"a": "\\udce9", "b": 1.5}')
    (tmp_path / "link.json").symlink_to("real.json")
    assert read_json(tmp_path / "link.json") == {"a": "\udce9", "b": 1.5}
    with pytest.raises(InputError, match="surrogates not allowed"):
        read_json(tmp_path / "link.json", surrogates=False)
    (tmp_path / "pair.json").write_text('"\\ud83d\\ude00"')
    assert read_json(tmp_path / "pair.json", surrogates=False) == "\U0001f600"


@dataclass
class Known:
    name: int = 0


def test_a_key_of_a_million_letters_is_a_short_line() -> None:
    with pytest.raises(InputError, match=r"unknown key .xxx.*; keys are name") as refused:
        from_json(Known, {"x" * 1_000_000: 1}, "file")
    assert len(str(refused.value)) < 200
