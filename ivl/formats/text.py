"""Rows of a .jsonl file, a JSON array or indented JSON objects, found through their byte offsets, so that memory stays flat."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Literal

import numpy as np

from ivl.errors import DataError, InputError
from ivl.formats.base import parse_row
from ivl.formats.offsets import Arrays, IndexedRows
from ivl.utils.budgets import MAX_ROW_BYTES, MAX_ROWS
from ivl.utils.progress import reporting

CHUNK = 1 << 20
SLOW = 1 << 28
"""Files of more bytes show their progress while they are indexed."""
BOM = b"\xef\xbb\xbf"
_INDENTED = re.compile(rb"\{([^\n]*,)?\s*\n\s*\"")
"""An object that goes on in the next line."""
_STEPS = np.zeros(256, np.int8)
"""What each byte adds to the depth of brackets."""
_STEPS[list(b"[{")], _STEPS[list(b"]}")] = 1, -1
_IS_STRUCTURE = np.zeros(256, bool)
_IS_STRUCTURE[list(b'[]{},"\\')] = True

Advance = Callable[[int], None]


class TextRows(IndexedRows):
    """Row i begins at byte starts[i] and ends before starts[i + 1], but for white space and the comma of an array.

    A row of jsonl is named by its line: 1 + i, and the blank lines before it. `gaps` holds the rows that follow blank lines,
    `blanks` how many of these come before each such row. A row of an array, or of several lines, is named by its number.

    Raises:
        InputError: if the file is missing or empty, or its text is UTF-16.
    """

    array_names = ("starts", "gaps", "blanks")
    row_array = "starts"

    def __init__(self, path: Path, container: Literal["json", "jsonl"], set_bytes: int | None = None) -> None:
        super().__init__(path, container, set_bytes)

    def _build(self) -> Arrays:
        size = self._stamp.size
        with self.path.open("rb") as file:
            head = file.read(4096)
        if head.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\0" in head[:4]:
            raise InputError(f"{self.path}: is UTF-16 or UTF-32; save it as UTF-8, as `iconv -f UTF-16 -t UTF-8` does")
        index = _index_lines if self.container == "jsonl" else _index_objects if _INDENTED.match(_body(head)) else _index_array
        slow = size >= SLOW
        with reporting(f"indexing {self.path.name}", "bytes") if slow else nullcontext() as show:
            try:
                return index(self.path, (lambda at: show(at, size)) if show else lambda _: None)
            except OSError as error:
                raise InputError(f"{self.path}: cannot be read ({error.strerror})") from None

    def raw(self, index: int) -> bytes:
        start, end = self._arrays["starts"][index : index + 2].tolist()
        if end - start > MAX_ROW_BYTES:
            raise DataError(self.source(index), "too_long", f"{end - start:,} bytes, the limit of a row is {MAX_ROW_BYTES:,}")
        return self._read(start, end).rstrip(b" \t\r\n" if self.container == "jsonl" else b" \t\r\n,")

    def source(self, index: int) -> str:
        if self.container == "json":
            return f"{self.path}: row {index + 1}"
        gap = int(np.searchsorted(self._arrays["gaps"], index, side="right"))
        return f"{self.path}:{1 + index + (int(self._arrays['blanks'][gap - 1]) if gap else 0)}"


def is_json(head: bytes) -> bool:
    """Whether a file that begins so is an array, or objects of several lines: rows that lines do not tell apart."""
    body = _body(head)
    return body[:1] == b"[" or bool(_INDENTED.match(body))


def _body(head: bytes) -> bytes:
    return head.removeprefix(BOM).lstrip()


def _index_lines(path: Path, advance: Advance) -> Arrays:
    """The start of every line that is not blank, and the end of the file; the blank lines before each row that follows some.

    Blank is an empty line or a lone carriage return.
    """
    starts: list[np.ndarray] = []
    gaps: list[np.ndarray] = []
    blanks: list[np.ndarray] = []
    at = line_start = num_rows = num_blanks = 0
    last = 0  # the byte before the chunk
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            bytes_N = np.frombuffer(chunk, dtype=np.uint8)
            breaks = np.flatnonzero(bytes_N == ord("\n"))
            if len(breaks):
                ends = breaks + at
                lines = np.concatenate([[line_start], ends[:-1] + 1])
                before = bytes_N[np.maximum(breaks, 1) - 1]
                if breaks[0] == 0:
                    before[0] = last
                full = ends - lines > (before == ord("\r"))
                starts.append(lines[full])
                # The last of neighboring blank lines says how many there were.
                follow, firsts = np.unique((num_rows + np.cumsum(full))[~full][::-1], return_index=True)
                count = int((~full).sum())
                gaps.append(follow)
                blanks.append(num_blanks + count - firsts)
                num_rows, num_blanks = num_rows + int(full.sum()), num_blanks + count
                line_start = int(ends[-1]) + 1
            last = chunk[-1]
            at += len(chunk)
            _check_rows(path, num_rows)
            advance(at)
    if at - line_start > (last == ord("\r")):
        starts.append(np.array([line_start]))
    arrays = {"starts": [*starts, [at]], "gaps": [*gaps, []], "blanks": [*blanks, []]}
    return {name: np.concatenate(parts).astype(np.int64) for name, parts in arrays.items()}


def _check_rows(path: Path, num_rows: int) -> None:
    if num_rows > MAX_ROWS:
        raise InputError(f"{path}: has more than {MAX_ROWS:,} rows; split it into several files of one folder")


def _index_array(path: Path, advance: Advance) -> Arrays:
    """The place behind the opening bracket and behind every comma between two elements, and that of the closing bracket.

    Brackets and commas count where they are in no string. Whether an element is valid JSON is seen when it is read.
    """
    with path.open("rb") as file:
        head = file.read(4096)
        at = len(head) - len(head.removeprefix(BOM).lstrip())
        if head[at : at + 1] != b"[":
            raise DataError(f"{path}:1", "broken_json", "not a JSON array")
        file.seek(at)
        starts, num_rows, depth, state = [np.array([at + 1])], 1, 0, (False, 0)
        while chunk := file.read(CHUNK):
            places_K, codes_K, outside_K, state = _structure(chunk, *state)
            depth_K = depth + np.cumsum(_STEPS[codes_K] * outside_K, dtype=np.int64)
            closed = np.flatnonzero(depth_K == 0)
            stop = int(places_K[closed[0]]) if len(closed) else len(chunk)
            commas = places_K[outside_K & (codes_K == ord(",")) & (depth_K == 1) & (places_K < stop)]
            starts.append(at + commas + 1)
            num_rows += len(commas)
            _check_rows(path, num_rows)
            at, depth = at + stop, int(depth_K[-1]) if len(depth_K) else depth
            advance(at)
            if len(closed):
                rest = chunk[stop + 1 :]
                while not rest.strip() and (rest := file.read(CHUNK)):
                    pass
                problem = f"something follows the array, which ends after row {num_rows}" if rest.strip() else ""
                return _array(path, np.concatenate([*starts, [at]]), problem)
    return _array(path, np.concatenate([*starts, [at]]), "the array is not closed")


def _index_objects(path: Path, advance: Advance) -> Arrays:
    """The beginning of the file and the place behind every object; one that is not closed is the last row, and broken."""
    with path.open("rb") as file:
        at = len(BOM) if file.read(len(BOM)) == BOM else 0
        file.seek(at)
        starts, num_rows, depth, state, rest = [np.array([at])], 0, 0, (False, 0), b""
        while chunk := file.read(CHUNK):
            places_K, codes_K, outside_K, state = _structure(chunk, *state)
            depth_K = depth + np.cumsum(_STEPS[codes_K] * outside_K, dtype=np.int64)
            ends = places_K[outside_K & (codes_K == ord("}")) & (depth_K == 0)]
            starts.append(at + ends + 1)
            num_rows += len(ends)
            _check_rows(path, num_rows)
            rest = chunk[int(ends[-1]) + 1 :] if len(ends) else rest.strip() or chunk.strip()[:1]
            at, depth = at + len(chunk), int(depth_K[-1]) if len(depth_K) else depth
            advance(at)
    none = np.zeros(0, np.int64)
    return {"starts": np.concatenate([*starts, [at] if rest.strip() else none]).astype(np.int64), "gaps": none, "blanks": none}


def _array(path: Path, starts: np.ndarray, problem: str) -> Arrays:
    """The index of an array. With a problem, the error of the first broken element, which is most likely its cause."""
    with path.open("rb") as file:
        for row in range(len(starts) - 1) if problem else ():
            file.seek(starts[row])
            piece = file.read(min(int(starts[row + 1] - starts[row]), MAX_ROW_BYTES + 1))
            parse_row(piece.rstrip(b" \t\r\n,"), source=f"{path}: row {row + 1}")
        file.seek(starts[-2])
        if not file.read(min(int(starts[-1] - starts[-2]), MAX_ROW_BYTES)).strip():  # nothing before the closing bracket
            problem, starts = problem or ("a comma before the end of the array" if len(starts) > 2 else ""), starts[-1:]
    if problem:
        raise DataError(str(path), "broken_json", problem)
    none = np.zeros(0, np.int64)
    return {"starts": starts, "gaps": none, "blanks": none}


def _structure(chunk: bytes, quoted: bool, slashes: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, tuple[bool, int]]:
    """The places of the K bytes of a chunk that may be structure, these bytes, and whether each is in no string.

    Args:
        quoted, slashes: whether the chunk begins in a string, and how many backslashes come right before it.

    Returns:
        Also the two values for the next chunk.
    """
    bytes_N = np.frombuffer(chunk, dtype=np.uint8)
    places_K = np.flatnonzero(_IS_STRUCTURE[bytes_N])
    if not len(places_K):
        none = places_K.astype(bool)
        return places_K, bytes_N[places_K], none, (quoted, 0)
    codes_K, order_K = bytes_N[places_K], np.arange(len(places_K))
    slash_K = codes_K == ord("\\")
    follows_K = np.concatenate([[slashes > 0 and places_K[0] == 0], slash_K[:-1] & (np.diff(places_K) == 1)])
    run_K = order_K - np.maximum.accumulate(np.where(follows_K, -slashes, order_K))  # backslashes right before each
    inside_K = (np.cumsum((codes_K == ord('"')) & (run_K % 2 == 0)) + quoted) % 2 == 1
    slashes = int(run_K[-1]) + 1 if slash_K[-1] and places_K[-1] == len(chunk) - 1 else 0
    return places_K, codes_K, ~inside_K, (bool(inside_K[-1]), slashes)
