"""Samples of a webdataset tar: neighboring members of one key, such as 17.jpg and 17.json. Nothing is unpacked to disk."""

from __future__ import annotations

import tarfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np

from ivl.errors import DataError, InputError
from ivl.formats.base import parse_row
from ivl.formats.layouts import ROW_KEYS
from ivl.formats.offsets import Arrays, IndexedRows
from ivl.utils.budgets import MAX_ROW_BYTES, MAX_ROW_MEDIA_BYTES, MAX_ROWS
from ivl.utils.files import not_utf8

IMAGES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "jp2", "ppm")
UNREADABLE = ("mp4", "mkv", "webm", "avi", "mov", "mp3", "wav", "flac")


class TarMember(NamedTuple):
    name: str
    kind: str
    """What follows the first dot, such as `jpg` or `0.jpg`, in small letters."""
    start: int
    size: int


class TarRows(IndexedRows):
    """Sample i is members firsts[i] to firsts[i + 1]; member m lies at starts[m] and has sizes[m] bytes.

    `key.json` is the row, as in a jsonl file; its images are the key's image members (`key.jpg`, or `key.0.jpg`,
    `key.1.jpg`, ... in order of their numbers). Without turns in a .json, `key.txt` is a caption: the answer to the bare image.
    Members of other kinds are ignored.

    Raises:
        InputError: if the file is missing, truncated or damaged, or has links, names that lead out of a folder, or a key whose
            members do not stand together.
    """

    array_names = ("starts", "sizes", "name_ends", "firsts", "names")
    row_array = "firsts"

    def __init__(self, path: Path, set_bytes: int | None = None) -> None:
        super().__init__(path, "webdataset", set_bytes)

    def _build(self) -> Arrays:
        columns: dict[str, list[int]] = {"starts": [], "sizes": [], "name_ends": [0], "firsts": []}
        names = bytearray()
        seen: set[str] = set()
        last = None
        for name, start, size in _members(self.path, self._stamp.size):
            key, _ = split_name(name)
            if len(columns["starts"]) >= MAX_ROWS:
                raise InputError(f"{self.path}: has more than {MAX_ROWS:,} members; split it into several files of one folder")
            if key != last:
                if key in seen:
                    raise InputError(f"{self.path}: member {name!r}: the members of a key must stand together")
                seen.add(key)
                last = key
                columns["firsts"].append(len(columns["starts"]))
            names += name.encode()
            for column, value in (("starts", start), ("sizes", size), ("name_ends", len(names))):
                columns[column].append(value)
        columns["firsts"].append(len(columns["starts"]))
        arrays = {column: np.array(values, dtype=np.int64) for column, values in columns.items()}
        return arrays | {"names": np.frombuffer(bytes(names) + bytes(-len(names) % 8), dtype="<i8")}

    def _members_of(self, index: int) -> list[TarMember]:
        arrays = self._arrays
        found = []
        for member in range(*arrays["firsts"][index : index + 2].tolist()):
            first, last = arrays["name_ends"][member : member + 2].tolist()
            words = arrays["names"][first // 8 : -(-last // 8)].tobytes()
            name = words[first % 8 : first % 8 + last - first].decode()
            found.append(TarMember(name, split_name(name)[1], int(arrays["starts"][member]), int(arrays["sizes"][member])))
        return found

    def raw(self, index: int) -> dict[str, Any]:
        """The row with its images as bytes."""
        members = self._members_of(index)
        source = self.source(index)
        kinds = [member.kind for member in members]
        if len(set(kinds)) < len(kinds):
            twice = Counter(kinds).most_common(1)[0][0]
            raise DataError(source, "bad_row", f"two members end in .{twice}")
        for kind in kinds:
            if kind.rpartition(".")[2] in UNREADABLE:
                raise DataError(
                    source, "missing_media", f"a .{kind} inside a tar cannot be played; keep it as a file beside jsonl rows"
                )
        by_kind = {member.kind: member for member in members}
        for part, limit in (([by_kind.get("json"), by_kind.get("txt")], MAX_ROW_BYTES), (members, MAX_ROW_MEDIA_BYTES)):
            if (size := sum(member.size for member in part if member)) > limit:
                raise DataError(source, "too_long", f"members of {size:,} bytes, the limit is {limit:,}")
        row = parse_row(self._bytes(by_kind["json"]), source=source) if "json" in by_kind else {}
        images = [{"bytes": self._bytes(member), "path": member.name} for member in _images(members, source)]
        if not any(row.get(key) is not None for key in ROW_KEYS):
            row |= self._caption(by_kind.get("txt"), len(images), source)
        elif "txt" in by_kind:
            raise DataError(source, "bad_row", "both a .txt and a .json with turns; keep one")
        named = row.get("image") or row.get("images") or []
        count = len(named) if isinstance(named, list) else 1
        if count and count != len(images):
            raise DataError(
                source, "missing_media", f"the .json names {count} images, the tar holds {len(images)} for this key"
            )
        return {"id": split_name(members[0].name)[0], **row, "image": None, "images": images}

    def _bytes(self, member: TarMember) -> bytes:
        return self._read(member.start, member.start + member.size)

    def _caption(self, member: TarMember | None, num_images: int, source: str) -> dict[str, Any]:
        if member is None:
            raise DataError(source, "bad_row", "neither a .json with turns nor a .txt")
        if not num_images:
            raise DataError(source, "missing_media", "a caption without its image")
        try:
            text = self._bytes(member).decode()
        except UnicodeDecodeError as error:
            raise DataError(source, "broken_json", f".txt is not UTF-8 ({error})") from None
        return {"messages": [{"role": "user", "content": "<image>" * num_images}, {"role": "assistant", "content": text}]}

    def source(self, index: int) -> str:
        return f"{self.path}:{split_name(self._members_of(index)[0].name)[0]}"


def split_name(name: str) -> tuple[str, str]:
    """`train/17.0.jpg` -> key `train/17`, kind `0.jpg`."""
    folder, slash, base = name.rpartition("/")
    stem, _, kind = base.partition(".")
    return folder + slash + stem, kind.lower()


def _images(members: list[TarMember], source: str) -> list[TarMember]:
    numbered: list[tuple[int, TarMember]] = []
    for member in members:
        number, dot, suffix = member.kind.rpartition(".")
        if suffix not in IMAGES:
            continue
        if dot and not (number.isascii() and number.isdigit() and len(number) < 10):
            raise DataError(source, "bad_row", f"image members are key.jpg or key.0.jpg, got {member.name!r}")
        numbered.append((int(number) if dot else 0, member))
    numbers = sorted(number for number, _ in numbered)
    if numbers and numbers != list(range(numbers[0], numbers[0] + len(numbers))):
        raise DataError(
            source,
            "missing_media",
            f"the image members are numbered {', '.join(map(str, numbers[:20]))}: some are missing or doubled",
        )
    return [member for _, member in sorted(numbered)]


class _Info(tarfile.TarInfo):
    """A header. tarfile reads the long name or the attributes that some hold at once, however large they are."""

    def _proc_member(self, tarfile: Any) -> Any:
        if self.type in b"xgXLK" and self.size > 1 << 20:
            raise ValueError(f"a header of {self.size:,} bytes")
        return super()._proc_member(tarfile)  # type: ignore[misc]


def _members(path: Path, size: int) -> Iterator[tuple[str, int, int]]:
    """Name, start and size of every file of a tar.

    tarfile takes a damaged header, or no end at all, for the end of the archive; here they are errors.
    """
    try:
        with tarfile.open(path, "r:", tarinfo=_Info) as tar:
            at = -1
            while (info := tar.next()) is not None:
                tar.members = []  # pyright: ignore[reportAttributeAccessIssue] (it would keep them all)
                if not at < info.offset < tar.offset or info.size < 0:
                    raise InputError(f"{path}: damaged header at byte {info.offset}")
                at = info.offset
                if info.isdir():
                    continue
                if not info.isreg() or info.issparse():
                    raise InputError(f"{path}: member {info.name!r} is no plain file")
                name = PurePosixPath(info.name)
                if not_utf8(info.name):  # tarfile keeps such bytes as half surrogates
                    raise InputError(f"{path}: member {info.name!r}: its name is not UTF-8")
                if name.is_absolute() or ".." in name.parts or "\0" in info.name or not name.parts:
                    raise InputError(f"{path}: member {info.name!r} has a name that leads out of a folder")
                if info.offset_data + info.size > size:
                    raise InputError(f"{path}: truncated in member {info.name!r}")
                yield info.name, info.offset_data, info.size
            end = tar.offset
    except (tarfile.TarError, OSError, ValueError, OverflowError, EOFError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path}: is no whole tar file ({error})") from None
    with path.open("rb") as file:
        file.seek(end)
        block = file.read(512)
        if len(block) < 512:
            raise InputError(f"{path}: truncated, the end of the archive is missing")
        while block:
            if block.strip(b"\0"):
                raise InputError(f"{path}: damaged header near byte {end}, or several archives in one file")
            block = file.read(1 << 16)
