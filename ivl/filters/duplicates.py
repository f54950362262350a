"""Near-duplicates: the same conversation about the same media, by MinHash for texts and perceptual hashes for images.

A row is a duplicate of an earlier one if its images look the same and its text is the same but for small edits. The same
image with another question is no duplicate, nor is the same question about another image. An image counts as the earliest
one that it looks like. Signatures are pure and can be computed anywhere; the search is by buckets on disk and gives what
comparing row by row would give.
"""

from __future__ import annotations

import hashlib
import re
import struct
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from itertools import combinations
from pathlib import Path
from typing import Any, ClassVar

import imagehash
import numpy as np
from datasketch import MinHash
from PIL import Image

from ivl.errors import DataError, MediaError
from ivl.filters.buckets import MapInOrder, earliest_alike, words_of, write_items
from ivl.processing.image import load_image
from ivl.types import ImageRef, Record, Text
from ivl.utils.shuffles import mix
from ivl.utils.unicode import normal_form

BANDS, NUM_HASHES = 16, 64
"""Bands of 4 hashes: two texts that share 80% of their shingles meet in one with probability 0.9997, 60% with 0.89."""
SHINGLE = 5
THUMB, DETAIL = 8, 32
"""Sides of the thumbnails that are compared in color and in gray."""
_HEAD = struct.Struct("<8s16s16sI")
_LOOK = struct.Struct(f"<Q{THUMB * THUMB * 3}s{DETAIL * DETAIL}s")
_ONES = np.array([byte.bit_count() for byte in range(256)], np.uint8)
_PIVOT = re.compile(r"\d+(?:[.,]\d+)*|\b(?:not|no|yes|never|none|nor|without|true|false)\b|n['’]t\b|[是否不没無无未非]")
"""Numbers, and words that turn a sentence into its opposite: rows that differ in these are no duplicates."""


@dataclass(frozen=True, kw_only=True)
class Duplicates:
    """Limits of the search for near-duplicates."""

    min_similarity: float = 0.75
    """Least share of common character 5-grams (Jaccard, estimated by MinHash) of long texts."""
    min_words: int = 25
    """Shorter texts must be equal but for case, punctuation and white space: one word may be all that matters."""
    same_similarity: float = 0.9
    """From this similarity on, numbers and words such as `not` may differ, too."""
    max_bits: int = 7
    """Largest distance of two perceptual hashes, of 64 bits."""
    max_color: int = 14
    """Largest mean difference of colors, 0 to 255, of images scaled to 8 x 8."""
    max_detail: int = 24
    """Largest difference of gray, 0 to 255, at any place of images scaled to 32 x 32. It tells pages of one layout apart:
    copies as JPEG or in another size differ by at most 19, receipts of other items and prices by 29 and more."""

    def __post_init__(self) -> None:
        if not 0 < self.min_similarity <= 1:
            raise ValueError(f"min_similarity must be in (0, 1], got {self.min_similarity}")
        if not 0 <= self.max_bits < 8:
            raise ValueError(f"max_bits must be 0 to 7, got {self.max_bits}")

    def signature(self, record: Record) -> bytes:
        """Compute all that the search needs of a row: 44 bytes, 1,224 for each image and 256 for a long text.

        Videos are compared by name and clip: decoding them costs more than training on them twice.

        Raises:
            DataError: if an image cannot be read.
        """
        texts, looks, videos = [], [], []
        for message in (message for conversation in record.conversations for message in conversation):
            texts.append(f"\x1e{message.role}\x1f")
            for part in message.content:
                texts.append(part.text if isinstance(part, Text) else "\x1d")
                if isinstance(part, ImageRef):
                    looks.append(_look(part, record.source))
                elif not isinstance(part, Text):
                    videos.append(repr((part.source, part.clip)))
        text = "".join(texts)
        plain = normalized(text)
        words = len(re.findall(r"[^\W_]+", plain)) + len(re.findall("[\u3040-\u9fff\uac00-\ud7af]", plain)) // 2
        pivots = _digest(" ".join(_PIVOT.findall(text.casefold())), 8)
        head = _HEAD.pack(pivots, _digest(plain, 16), _digest("\n".join(videos), 16), len(looks))
        return head + b"".join(looks) + (_minhash(plain) if words >= self.min_words else b"")


def find_duplicates(
    limits: Duplicates,
    signatures: Callable[[int], Iterable[tuple[int, bytes]]],
    num_parts: int,
    folder: Path,
    mapped: MapInOrder = map,  # pyright: ignore[reportArgumentType] (it is a class)
) -> np.ndarray:
    """Find the rows that duplicate an earlier one which is none itself.

    Args:
        signatures: gives the numbers of the rows of a part, and their signatures.
        folder: an empty one for intermediate files.
        mapped: a map over parts, perhaps in several processes.

    Returns:
        int64 [2, D]: the numbers of the duplicates in ascending order, and of the earliest row that each is like.
    """
    search = _Search(limits, signatures, folder)
    num_looks = list(mapped(search.write_looks, range(num_parts)))
    np.save(folder / "numbers.npy", earliest_alike(_Looks(limits), folder, num_looks, mapped))
    firsts = np.cumsum([0, *num_looks]).tolist()
    sizes = list(mapped(search.write_rows, [(part, firsts[part]) for part in range(num_parts)]))
    found = [np.zeros((2, 0), np.int64)]
    for kind, counts in zip((_ShortTexts(), _Sketches(limits)), zip(*sizes, strict=True), strict=True):
        rows_N = np.concatenate([np.load(folder / f"{kind.name}.{part}.rows.npy") for part in range(num_parts)])
        alike_N = earliest_alike(kind, folder, counts, mapped)
        later = np.flatnonzero(alike_N != np.arange(len(alike_N)))
        found.append(np.stack([rows_N[later], rows_N[alike_N[later]]]))
    both = np.concatenate(found, axis=1)
    return both[:, np.argsort(both[0])]


@dataclass(frozen=True)
class _Search:
    """The steps of a search that take one part at a time."""

    limits: Duplicates
    signatures: Callable[[int], Iterable[tuple[int, bytes]]]
    folder: Path

    def write_looks(self, part: int) -> int:
        """Write the looks of all images of a part."""
        looks = []
        for _, signature in self.signatures(part):
            num_images = _HEAD.unpack_from(signature)[3]
            looks.append(signature[_HEAD.size : _HEAD.size + num_images * _LOOK.size])
        return write_items(_Looks(self.limits), self.folder, part, words_of(b"".join(looks), _Looks.width))

    def write_rows(self, at: tuple[int, int]) -> tuple[int, int]:
        """Write the short and the long texts of a part, whose media have numbers by now; the first has that of `at`."""
        part, image = at
        numbers = np.load(self.folder / "numbers.npy", mmap_mode="r")
        rows: tuple[list[int], list[int]] = [], []
        items: tuple[list[bytes], list[bytes]] = [], []
        for row, signature in self.signatures(part):
            pivots, text, videos, num_images = _HEAD.unpack_from(signature)
            end = _HEAD.size + num_images * _LOOK.size
            media = _digest(repr((numbers[image : image + num_images].tolist(), num_images)).encode() + videos, 8)
            image += num_images
            is_long = len(signature) > end
            # Equal bands mean equal hashes and equal media, since the media flip bits of every hash.
            sketch = np.frombuffer(signature, dtype="<u4", offset=end) ^ np.uint32(zlib.crc32(media))
            rows[is_long].append(row)
            items[is_long].append(pivots + sketch.tobytes() if is_long else _digest(media + text + pivots, 16))
        kinds = _ShortTexts(), _Sketches(self.limits)
        for kind, numbers_N, data in zip(kinds, rows, items, strict=True):
            np.save(self.folder / f"{kind.name}.{part}.rows.npy", np.array(numbers_N, dtype=np.int64))
            write_items(kind, self.folder, part, words_of(b"".join(data), kind.width))
        return len(rows[0]), len(rows[1])


@dataclass(frozen=True)
class _Looks:
    """Images that look the same. Of 9 pieces of their hashes, which differ in at most 7 bits, at least 2 are equal."""

    limits: Duplicates
    name: ClassVar[str] = "looks"
    width: ClassVar[int] = _LOOK.size // 4

    def keys(self, items_NW: np.ndarray) -> np.ndarray:
        bits_N = np.ascontiguousarray(items_NW[:, :2]).view("<u8")[:, 0]
        pieces = [(bits_N >> np.uint64(7 * n)) & np.uint64(255 if n == 8 else 127) for n in range(9)]
        pairs = [(a << np.uint64(8)) | b | np.uint64(n << 16) for n, (a, b) in enumerate(combinations(pieces, 2))]
        return mix(np.stack(pairs, axis=1))

    def alike(self, items_NW: np.ndarray, first_P: np.ndarray, second_P: np.ndarray) -> np.ndarray:
        differ_PB = (items_NW[first_P, :2] ^ items_NW[second_P, :2]).view(np.uint8)
        alike_P = _ONES[differ_PB].sum(axis=1) <= self.limits.max_bits
        first, second = (items_NW[each[alike_P], 2:].view(np.uint8).astype(np.int16) for each in (first_P, second_P))
        colors, details = np.split(np.abs(first - second), [THUMB * THUMB * 3], axis=1)
        alike_P[alike_P] = (colors.mean(axis=1) <= self.limits.max_color) & (details.max(axis=1) <= self.limits.max_detail)
        return alike_P


class _ShortTexts:
    """Short texts that are equal, about equal media."""

    name: ClassVar[str] = "texts"
    width: ClassVar[int] = 4

    def keys(self, items_NW: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(items_NW[:, :2]).view("<u8")

    def alike(self, items_NW: np.ndarray, first_P: np.ndarray, second_P: np.ndarray) -> np.ndarray:
        return (items_NW[first_P] == items_NW[second_P]).all(axis=1)


@dataclass(frozen=True)
class _Sketches:
    """Long texts that are similar, about equal media: 2 words of pivots, and the hashes, of which a whole band is equal."""

    limits: Duplicates
    name: ClassVar[str] = "sketches"
    width: ClassVar[int] = 2 + NUM_HASHES

    def keys(self, items_NW: np.ndarray) -> np.ndarray:
        bands_NBH = np.ascontiguousarray(items_NW[:, 2:]).view("<u8").reshape(len(items_NW), BANDS, NUM_HASHES // BANDS // 2)
        keys_NB = np.broadcast_to(np.arange(BANDS, dtype=np.uint64), bands_NBH.shape[:2])
        for n in range(bands_NBH.shape[2]):
            keys_NB = mix(keys_NB ^ bands_NBH[:, :, n])
        return keys_NB

    def alike(self, items_NW: np.ndarray, first_P: np.ndarray, second_P: np.ndarray) -> np.ndarray:
        first_PW, second_PW = items_NW[first_P], items_NW[second_P]
        same_P = (first_PW[:, :2] == second_PW[:, :2]).all(axis=1)
        least_P = np.where(same_P, self.limits.min_similarity, self.limits.same_similarity)
        return (first_PW[:, 2:] == second_PW[:, 2:]).mean(axis=1) >= least_P


def normalized(text: str) -> str:
    """Fold case, replace compatibility forms, drop punctuation and leave one space between words."""
    return " ".join(re.sub(r"[.,!?;:…'\"“”‘’。，！？；：、()\s]+", " ", normal_form("NFKC", text).casefold()).split())


def _minhash(plain: str) -> bytes:
    """Return NUM_HASHES little-endian 32-bit hashes of the set of character 5-grams."""
    grams = sorted({plain[i : i + SHINGLE] for i in range(max(1, len(plain) - SHINGLE + 1))})
    sketch = MinHash(num_perm=NUM_HASHES, hashfunc=zlib.crc32, permutations=_permutations(), scheme="affine32")
    for start in range(0, len(grams), 4096):  # the library makes a table of all grams by all hashes
        sketch.update_batch([gram.encode("utf-8", "surrogatepass") for gram in grams[start : start + 4096]])
    return sketch.hashvalues.astype("<u4").tobytes()


@cache
def _permutations() -> Any:
    return MinHash(num_perm=NUM_HASHES, scheme="affine32").permutations


def _look(ref: ImageRef, source: str) -> bytes:
    """Compute the perceptual hash and the colors of an image."""
    try:
        image = load_image(ref)
    except MediaError as error:
        raise DataError(source, error.kind, str(error)) from None
    thumb = image.resize((THUMB, THUMB), Image.Resampling.BOX)
    detail = image.convert("L").resize((DETAIL, DETAIL), Image.Resampling.BICUBIC)
    return _LOOK.pack(int(str(imagehash.phash(image)), 16), thumb.tobytes(), detail.tobytes())


def _digest(data: bytes | str, size: int) -> bytes:
    data = data.encode("utf-8", "surrogatepass") if isinstance(data, str) else data
    return hashlib.blake2b(data, digest_size=size).digest()
