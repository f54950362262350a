"""Whatever lies in a file, a reader gives Records or an error that names the file and the place: never anything else."""

import json
import random
import struct
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ivl.data.records import read_record, to_record
from ivl.errors import DataError, InputError
from ivl.formats.base import parse_row
from ivl.formats.rows import open_rows, write_jsonl
from ivl.types import Record
from tests.helpers.mixtures import turns
from tests.helpers.row_files import contents, parquet_file, png, tar_file

ROOT = Path("/nowhere")
IMAGE = {"bytes": png(), "path": None}
ROWS = [
    {"id": str(n), "images": [IMAGE] * (n % 3), "messages": [
        {"role": "user", "content": "<image>" * (n % 3) + "what?"}, {"role": "assistant", "content": f"answer {n}" * n}]}
    for n in range(1, 8)
]  # fmt: skip
PLAIN = [{"id": str(n), "conversations": turns("what?", f"answer {n}")} for n in range(7)]


def arrow_file(path: Path, *, stream: bool) -> Path:
    table = pa.Table.from_pylist(ROWS)
    with pa.OSFile(str(path), "wb") as out, (pa.ipc.new_stream if stream else pa.ipc.new_file)(out, table.schema) as writer:
        writer.write_table(table, max_chunksize=3)
    return path


def wds_file(path: Path) -> Path:
    row = {"messages": ROWS[0]["messages"]}
    return tar_file(
        path,
        [(f"k{n}.{kind}", png() if kind == "png" else json.dumps(row).encode()) for n in range(7) for kind in ("png", "json")],
    )


def array_file(path: Path) -> Path:
    path.write_text(json.dumps(PLAIN, indent=1))
    return path


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("whole")
    return {
        "jsonl": write_jsonl(PLAIN, folder / "a.jsonl"),
        "json": array_file(folder / "a.json"),
        "parquet": parquet_file(folder / "a.parquet", ROWS),
        "stream": arrow_file(folder / "a.arrow", stream=True),
        "ipc": arrow_file(folder / "b.arrow", stream=False),
        "tar": wds_file(folder / "a.tar"),
    }


def read(path: Path) -> list[Record | DataError] | InputError:
    """What comes of a file; anything but an InputError that names it escapes and fails the test."""
    try:
        rows = open_rows(path)
    except InputError as error:
        assert str(error).startswith(str(path))
        return error
    found: list[Record | DataError] = []
    assert rows.format
    for index in range(min(len(rows), 50)):
        try:
            found.append(read_record(rows, index, root=ROOT))
        except DataError as error:
            assert str(error).startswith(rows.source(index)) and rows.source(index).startswith(f"{path}:")
            found.append(error)
    return found


def damaged(data: bytes, seed: int) -> bytes:
    """Bytes changed, cut out, doubled, or a number made absurd; or the end cut off."""
    rng = random.Random(seed)
    out = bytearray(data)
    for _ in range(rng.choice([1, 1, 1, 2, 6])):
        at = rng.randrange(len(out) - 8)
        match rng.randrange(6):
            case 0 | 1:
                out[at] = rng.randrange(256)
            case 2:
                out[at : at + 8] = struct.pack("<q", rng.choice([2**63 - 1, -1, 0, 2**31, -(2**40)]))
            case 3:
                del out[at : at + rng.randrange(1, 30)]
            case 4:
                out[at:at] = out[at : at + rng.randrange(1, 600)]
            case _:
                out = out[: max(at, 20)]
        if len(out) < 20:
            break
    return bytes(out)


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet", "stream", "ipc", "tar"])
def test_damaged_files(files, tmp_path, kind):
    whole = files[kind].read_bytes()
    path = tmp_path / files[kind].name
    opened = refused = 0
    for seed in range(250):
        path.write_bytes(damaged(whole, seed))
        found = read(path)
        opened += isinstance(found, list)
        refused += isinstance(found, InputError) or any(isinstance(each, DataError) for each in found)
    assert opened >= 5 and refused > 50  # the damage is neither fatal nor idle


@pytest.mark.parametrize("kind", ["parquet", "tar"])
def test_checksums_leave_no_damage_unseen(files, tmp_path, kind):
    """One changed byte of parquet, or of a tar's headers, is an error or changes nothing that a record holds.

    The names of parquet's columns have no checksum: a row whose `images` have another name has none, and its marks are letters.
    """
    whole = files[kind].read_bytes()
    path = tmp_path / files[kind].name
    right = [contents(each) for each in read(files[kind])]
    rng = random.Random(0)
    for _ in range(400):
        at = rng.randrange(len(whole))
        if kind == "tar":
            at = at // 1024 * 1024 + at % 512  # a header and its block of data take 1024 bytes
        path.write_bytes(whole[:at] + bytes([whole[at] ^ (1 << rng.randrange(8))]) + whole[at + 1 :])
        found = read(path)
        if isinstance(found, list):
            assert len(found) == len(right), at
            for a, b in zip(found, right, strict=True):
                assert isinstance(a, DataError) or contents(a) == b or "<image>" in a.conversations[0][0].text, at


@pytest.mark.parametrize("kind", ["json", "parquet", "ipc", "tar"])
def test_truncated_files_are_refused(files, tmp_path, kind):
    whole = files[kind].read_bytes().rstrip(b"\0") if kind == "tar" else files[kind].read_bytes()
    path = tmp_path / files[kind].name
    for length in {0, 1, 3, 4, 8, 100, len(whole) // 3, len(whole) // 2, len(whole) - 300, len(whole) - 5, len(whole) - 1}:
        path.write_bytes(whole[:length])
        assert isinstance(read(path), InputError), length


def test_a_damaged_line_leaves_the_others_alone(files, tmp_path):
    lines = files["jsonl"].read_bytes().splitlines()
    rng = random.Random(0)
    for _ in range(200):
        broken = rng.randrange(len(lines))
        bad = damaged(lines[broken], rng.random()).replace(b"\n", b" ") or b"x"
        path = tmp_path / "a.jsonl"
        path.write_bytes(b"\n".join([*lines[:broken], bad, *lines[broken + 1 :]]))
        found = read(path)
        right = [rows_of(PLAIN, n) for n in range(len(PLAIN))]
        assert [each for n, each in enumerate(map(said, found)) if n != broken] == [
            each for n, each in enumerate(right) if n != broken
        ]


def said(found: Record | DataError):
    return contents(found) if isinstance(found, Record) else found


def rows_of(rows: list[dict], n: int):
    return contents(to_record(rows[n], source="x", root=ROOT))


@given(st.binary(max_size=200), st.sampled_from(["a.jsonl", "a.json", "a.parquet", "a.arrow", "a.tar", "a"]))
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_random_bytes(tmp_path, data, name):
    (tmp_path / name).write_bytes(data)
    read(tmp_path / name)


HUGE = st.sampled_from([10**400, -(10**30), 1e308, float("inf"), float("nan"), 2**63])
LEAVES = st.none() | st.booleans() | st.integers() | HUGE | st.text(max_size=5)
INNER = (
    "conversations", "messages", "texts", "from", "value", "role", "content", "type", "text", "image", "index", "url", "path",
    "bytes", "user", "assistant", "loss",
)  # fmt: skip
values = st.recursive(
    LEAVES | st.sampled_from(["<image>", "a\0b", "../x", "data:,", "\ud800"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(INNER), inner, max_size=3),
    max_leaves=8,
)
KEYS = [
    "id",
    "conversations",
    "messages",
    "texts",
    "image",
    "images",
    "video",
    "videos",
    "clip",
    "system",
    "tools",
    "objects",
    "audio",
]
WHOLE = [
    PLAIN[0],
    {"messages": PLAIN[0]["conversations"], "image": "a.png"},
    {"texts": [{"user": "q", "assistant": "a"}], "images": ["a", "b"]},
]


def swapped(row, path: list[int], value):
    """The row with one of its values, at any depth, replaced."""
    if not isinstance(row, dict | list) or not row or not path:
        return value
    keys = list(row) if isinstance(row, dict) else range(len(row))
    at = keys[path[0] % len(keys)]
    new = swapped(row[at], path[1:], value)
    return row | {at: new} if isinstance(row, dict) else [*row[:at], new, *row[at + 1 :]]


@given(
    st.sampled_from(WHOLE),
    st.lists(st.integers(0, 9), min_size=1, max_size=4),
    values,
    st.dictionaries(st.sampled_from(KEYS), values, max_size=2),
)
@settings(max_examples=400, deadline=None)
def test_wrong_types_in_every_field(row, path, value, more):
    row = swapped(row, path, value)
    row = row | more if isinstance(row, dict) else row
    for given_row in (json.dumps(row).encode(), *([row] if isinstance(row, dict) else [])):
        try:
            parsed = parse_row(given_row, source="f:1") if isinstance(given_row, bytes) else given_row
            record = to_record(parsed, source="f:1", root=ROOT)
        except DataError as error:
            assert str(error).startswith("f:1: ")
            str(error).encode("utf-8", "backslashreplace")
        else:
            assert all(message.text.strip() for talk in record.conversations for message in talk if message.role == "assistant")


@pytest.mark.parametrize("depth", [50, 300, 600, 900, 950, 980, 5000, 100_000])
@pytest.mark.parametrize("key", KEYS)
def test_deep_nesting(key, depth):
    row = json.dumps(PLAIN[0])[:-1].encode()
    for left, right in ((b"[", b"]"), (b'{"a":', b"}")):
        deep = (
            row
            + b', "images": '
            + left * depth
            + b"1"
            + right * depth
            + f', "{key}": '.encode()
            + left * depth
            + b"1"
            + right * depth
            + b"}"
        )
        with pytest.raises(DataError, match=r"^f:1: "):
            to_record(parse_row(deep, source="f:1"), source="f:1", root=ROOT)
