"""Reads the files of benchmarks: VLMEvalKit's TSV, tables of the Hugging Face hub, and jsonl.

Every row comes as texts by column, without empty cells, and with its pictures under PICTURES.
"""

from __future__ import annotations

import ast
import base64
import binascii
import csv
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

from ivl.errors import InputError, short
from ivl.formats.rows import container_of, open_rows
from ivl.utils.budgets import MAX_ROW_MEDIA_BYTES
from ivl.utils.files import file_hash, regular
from ivl.utils.strict_json import read_json

PICTURES = "<pictures>"
"""The key under which a row holds its pictures, as bytes or paths."""
NO_PICTURE = "<no picture>"
"""The key that a row of a TSV has whose picture cell is empty."""
PLACE_OF_ANSWER = "<place of the answer>"
"""The column of a table that counts the right option from 0 is renamed to this."""
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
LONGEST_REFERENCE = 64
"""A picture cell of at most so many characters is the index of the row whose picture is meant."""
MOST_OUTSIDE = 100_000
"""Characters outside of strings in the text of a list. Parsing takes hundreds of bytes for each; lists of pictures have few."""
_STRING = re.compile(r"'[^'\\]*+(?:\\.[^'\\]*+)*+'|\"[^\"\\]*+(?:\\.[^\"\\]*+)*+\"", re.DOTALL)
_PICTURE = re.compile(r"image(?:s|_list|_\d+)?|decoded_image")
_OPTIONS, _OPTION = ("options", "choices", "candidates"), re.compile(r"(?:choice_|option_?)([a-z]|\d)")


def data_root() -> Path:
    """Return the folder of benchmark files: LMUData of the environment if it exists, else ~/LMUData."""
    told = os.environ.get("LMUData")  # noqa: SIM112, the name that VLMEvalKit reads
    return Path(told) if told and Path(told).exists() else Path.home() / "LMUData"


def read_rows(path: Path, columns: Mapping[str, str], *, samples: bool = False) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the rows of a file or folder of rows, each with its place.

    Args:
        columns: New names of columns of tables and jsonl that are called otherwise than in VLMEvalKit's TSV.
        samples: Whether a file of jsonl has samples of lmms-eval.

    Raises:
        InputError: naming the place of what cannot be read.
    """
    if path.suffix in (".tsv", ".csv", ".xlsx"):
        for place, cells in _with_shared_pictures(path):
            row: dict[str, Any] = {key: value for key, value in cells.items() if value and key != "image"}
            if "index" not in row:
                raise InputError(f"{place}: has no index, which every row of a TSV of VLMEvalKit has")
            row["index"] = row["index"].removesuffix(".0")
            if not cells.get("image", "it has no such column").strip():
                row[NO_PICTURE] = True
            yield place, row | {PICTURES: _pictures_of_cell(path, place, cells)}
        return
    for place, row in _rows(path):
        if samples and "prediction" in row:  # VLMEvalKit's predictions as json, which have the columns of its TSV
            yield place, {key: value for key, value in row.items() if value is not None and value != ""} | {PICTURES: ()}
        else:
            yield place, _from_table(_of_sample(row, place) if samples else row, columns, path, place)


def _rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the rows of a table or of jsonl, or those that a JSON object holds by name."""
    if path.suffix == ".json" and container_of(path) == "jsonl":  # it is no list
        with suppress(InputError):
            whole = read_json(path)
            if isinstance(whole, dict) and all(isinstance(row, dict) for row in whole.values()):
                yield from ((f"{path}: {name}", {"index": name, **row}) for name, row in whole.items())
                return
    rows = open_rows(path)
    for index in range(len(rows)):
        yield rows.source(index), rows[index]


def literal(cell: Any) -> list[Any]:
    """Return a cell as a list: the text of a Python list is parsed, anything else is its only item."""
    if isinstance(cell, list | tuple):
        return list(cell)
    text = str(cell).strip()
    if text.startswith("[") and text.endswith("]") and len(_STRING.sub("", text)) <= MOST_OUTSIDE:
        try:
            value = ast.literal_eval(text)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            return [cell]
        return value if isinstance(value, list) else [cell]
    return [cell]


def options_of(row: Mapping[str, Any]) -> dict[str, str]:
    """Return the options of a row by letter."""
    return {letter: str(row[letter]) for letter in LETTERS if row.get(letter) is not None}


def md5(path: Path) -> str:
    """Return the MD5 of a file, computed once as long as it does not change; empty for a folder."""
    if path.is_dir():
        return ""
    try:
        return file_hash(path, "md5")
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None


def _with_shared_pictures(path: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield the cells of a TSV, each reference to another row's picture replaced by that picture.

    A file with references is read three times, so that pictures of all other rows need not stay in memory.
    """
    shared: dict[str, str] = {}
    for place, row in _cells(path):
        if cell := _reference(row):
            if not shared:
                wanted = {_reference(other) for _, other in _cells(path)}
                shared = {other["index"]: other["image"] for _, other in _cells(path) if other.get("index") in wanted}
            row["image"] = shared.get(cell, "")
            if len(row["image"]) <= LONGEST_REFERENCE:
                raise InputError(f"{place}: its picture is that of row {short(cell)}, which has none")
        yield place, row


def _reference(row: Mapping[str, str]) -> str:
    """Return the index of the row whose picture is meant; empty for a row with its own."""
    return cell if len(cell := row.get("image", "")) <= LONGEST_REFERENCE else ""


def _cells(path: Path) -> Iterator[tuple[str, dict[str, str]]]:
    if path.suffix == ".xlsx":
        yield from _sheet(path)
        return
    csv.field_size_limit(MAX_ROW_MEDIA_BYTES * 4 // 3)  # a cell holds megabytes of base64
    try:
        regular(path)
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, delimiter="," if path.suffix == ".csv" else "\t")
            for row in reader:
                place = f"{path}:{reader.line_num}"
                if None in row or None in row.values():
                    raise InputError(f"{place}: has another number of cells than the first line names")
                yield place, row
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from None


def _sheet(path: Path) -> Iterator[tuple[str, dict[str, str]]]:
    try:
        import openpyxl
    except ImportError:
        raise InputError(f"{path}: reading xlsx needs openpyxl: pip install openpyxl; or save it as tsv") from None
    try:
        sheet = openpyxl.load_workbook(path, read_only=True, data_only=True).worksheets[0]
        lines = iter(sheet.iter_rows(values_only=True))
        head = [str(name) for name in next(lines)]
        for number, line in enumerate(lines, 2):
            yield f"{path}:{number}", {name: "" if cell is None else str(cell) for name, cell in zip(head, line, strict=False)}
    except (OSError, ValueError, KeyError, IndexError, StopIteration, BadZipFile) as error:
        raise InputError(f"{path}: is no xlsx file that can be read ({error})") from None


def _pictures_of_cell(path: Path, place: str, cells: Mapping[str, str]) -> tuple[bytes | str, ...]:
    if not cells.get("image"):
        if "image" in cells or not cells.get("image_path"):
            return ()
        return tuple(
            found(str(name), path, "images", f"images/{path.stem.removesuffix('_local')}")
            for name in literal(cells["image_path"])
        )
    try:
        return tuple(base64.b64decode(str(item), validate=True) for item in literal(cells["image"]))
    except (binascii.Error, ValueError) as error:
        raise InputError(f"{place}: its picture is no base64 ({error})") from None


def _from_table(raw: Mapping[str, Any], columns: Mapping[str, str], path: Path, place: str) -> dict[str, Any]:
    """Return a row of a hub table or of jsonl with the columns of a TSV: options as A, B, ..., an answer as its letter."""
    row: dict[str, Any] = {columns.get(key, key): value for key, value in raw.items() if not _missing(key, value)}
    pictures: list[bytes | str] = []
    decoded = "decoded_image" in row
    for key in [key for key in row if _PICTURE.fullmatch(key)]:
        value = row.pop(key)
        if key != "image" or not decoded:  # else it is the name of a file that the table does not have
            pictures += [_picture(item, path, place) for item in (value if isinstance(value, list) else literal(value))]
    for key in [key for key in _OPTIONS if key in row]:
        texts = literal(row.pop(key))
        row |= {letter: _unlettered(str(text), letter) for letter, text in zip(LETTERS, texts, strict=False)}
    for key in [key for key in row if _OPTION.fullmatch(key)]:
        name = key[-1]
        row[LETTERS[int(name)] if name.isdigit() else name.upper()] = str(row.pop(key))
    place_of_answer = str(row.pop(PLACE_OF_ANSWER, ""))
    if place_of_answer:
        row["answer"] = LETTERS[int(place_of_answer)] if place_of_answer.isdigit() else place_of_answer
    if match := re.fullmatch(r"\(([A-Z])\)", str(row.get("answer"))):
        row["answer"] = match[1]
    return row | {PICTURES: tuple(pictures)}


def _missing(key: str, value: Any) -> bool:
    """Return whether a cell is empty. MMBench's tables on the hub write absent options and hints as `nan`."""
    return value is None or value == "" or value != value or (value == "nan" and (key == "hint" or len(key) == 1))


def _unlettered(text: str, letter: str) -> str:
    """Take the letter off an option that is written with it, as in `(A) cat` and `A. cat`."""
    return re.sub(rf"^(?:\({letter}\)|{letter}\.)\s+", "", text)


def _picture(value: Any, path: Path, place: str) -> bytes | str:
    if isinstance(value, Mapping):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, str) and len(value) > 512:
        with_head = value.partition("base64,")
        try:
            return base64.b64decode(with_head[2] or value, validate=True)
        except (binascii.Error, ValueError):
            value = None
    if isinstance(value, str) and value:
        return found(value, path, "images")
    if not isinstance(value, bytes) or not value:
        raise InputError(f"{place}: a picture must be bytes, base64 or a path, got {short(value)}")
    return value


def found(name: str, path: Path, *folders: str) -> str:
    """Return the path of a picture or video, which may be relative to any folder above the rows; else beside them."""
    for parent in path.absolute().parents:
        for folder in (*folders, ""):
            if (place := parent / folder / name).exists():  # the folders do not count if the name is absolute
                return str(place)
    return str(path.parent / name)


def _of_sample(sample: Mapping[str, Any], place: str) -> dict[str, Any]:
    """Return the row of a sample of lmms-eval, with the reply under `prediction`."""
    try:
        reply = sample["resps"] if sample.get("resps") else sample["filtered_resps"]  # the second may be cut out of the first
        while isinstance(reply, list):
            reply = reply[0]
        return {"index": sample["doc_id"], **sample["doc"], "prediction": str(reply)}
    except (KeyError, TypeError, IndexError) as error:
        raise InputError(f"{place}: is no sample of lmms-eval ({type(error).__name__} {error})") from None
