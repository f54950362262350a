"""Near-duplicates: the same conversation about the same media, by MinHash for texts and perceptual hashes for images.

A row is a duplicate of an earlier one if its images look the same and its text is the same but for small edits. The same
image with another question is no duplicate, nor is the same question about another image. Signatures are pure and can be
computed anywhere; the index takes them in the order of the rows, so that parallel work gives the same output as one process.
"""

from __future__ import annotations

import hashlib
import re
import struct
import unicodedata
import zlib
from array import array
from collections import defaultdict
from dataclasses import dataclass
from functools import cache
from typing import Any

import imagehash
import numpy as np
from datasketch import MinHash, MinHashLSH
from PIL import Image

from ivl.errors import DataError, MediaError
from ivl.processing.image import load_image
from ivl.types import ImageRef, Record, Text

BANDS, NUM_HASHES = 16, 64
"""Bands of 4 hashes: two texts that share 80% of their shingles meet in one with probability 0.9997, 60% with 0.89."""
SHINGLE = 5
THUMB = 8
_HEAD = struct.Struct("<8s16s16sI")
_LOOK = struct.Struct(f"<Q{THUMB * THUMB * 3}s")
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

    def __post_init__(self) -> None:
        if not 0 < self.min_similarity <= 1:
            raise ValueError(f"min_similarity must be in (0, 1], got {self.min_similarity}")
        if not 0 <= self.max_bits < 8:
            raise ValueError(f"max_bits must be 0 to 7, got {self.max_bits}")

    def signature(self, record: Record) -> bytes:
        """Compute all that the index needs of a row: 44 bytes, 200 for each image and 256 for a long text.

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

    def index(self) -> DuplicateIndex:
        """Return an empty index with these limits."""
        return DuplicateIndex(self)


class DuplicateIndex:
    """The rows seen so far, without duplicates. It takes about 100 bytes for a row, 500 for an image, 5 kB for a long text."""

    def __init__(self, limits: Duplicates) -> None:
        self.limits = limits
        self.keys: list[Any] = []
        self._images = _ImageIndex(limits)
        self._exact: dict[bytes, int] = {}
        self._texts = MinHashLSH(num_perm=NUM_HASHES, params=(BANDS, NUM_HASHES // BANDS))
        self._sketches: dict[int, tuple[bytes, np.ndarray]] = {}

    def seen(self, signature: bytes, key: Any) -> Any:
        """Return the key of the earliest row that this one duplicates; if there is none, add the row and return None."""
        pivots, text, videos, num_images = _HEAD.unpack_from(signature)
        at = _HEAD.size + num_images * _LOOK.size
        numbers = [self._images.number(signature[i : i + _LOOK.size]) for i in range(_HEAD.size, at, _LOOK.size)]
        media = _digest(repr((numbers, num_images)).encode() + videos, 8)
        exact = _digest(media + text + pivots, 16)
        found = self._exact.get(exact)
        if found is None and len(signature) > at:
            # Equal bands mean equal hashes and equal media, since the media flip bits of every hash.
            sketch_N = np.frombuffer(signature, dtype=np.uint32, offset=at) ^ np.uint32(zlib.crc32(media))
            minhash = MinHash(hashvalues=sketch_N, permutations=_permutations(), scheme="affine32")
            rows: Any = self._texts.query(minhash)
            found = min((row for row in rows if self._similar(row, sketch_N, pivots)), default=None)
            if found is None:
                self._texts.insert(len(self.keys), minhash, check_duplication=False)
                self._sketches[len(self.keys)] = pivots, sketch_N
        if found is not None:
            return self.keys[found]
        self._exact[exact] = len(self.keys)
        self.keys.append(key)
        return None

    def _similar(self, row: int, sketch_N: np.ndarray, pivots: bytes) -> bool:
        same_pivots, other_N = pivots == self._sketches[row][0], self._sketches[row][1]
        least = self.limits.min_similarity if same_pivots else self.limits.same_similarity
        return bool((sketch_N == other_N).mean() >= least)


class _ImageIndex:
    """Gives every image the number of the first one that looks like it.

    Hashes of 64 bits that differ in at most 7 agree in at least one of their 8 bytes, so that only images in the bucket of a
    common byte are compared.
    """

    def __init__(self, limits: Duplicates) -> None:
        self.limits = limits
        self._known: dict[bytes, int] = {}
        self._looks: list[tuple[int, bytes]] = []
        self._buckets: defaultdict[tuple[int, int], array[int]] = defaultdict(lambda: array("I"))

    def number(self, look: bytes) -> int:
        digest = _digest(look, 12)
        if digest not in self._known:
            bits, thumb = _LOOK.unpack(look)
            buckets = [self._buckets[place] for place in enumerate(look[:8])]
            near = (n for n in set().union(*buckets) if (self._looks[n][0] ^ bits).bit_count() <= self.limits.max_bits)
            same = [n for n in near if _color_distance(self._looks[n][1], thumb) <= self.limits.max_color]
            if not same:
                for bucket in buckets:
                    bucket.append(len(self._looks))
                self._looks.append((bits, thumb))
            self._known[digest] = min(same, default=len(self._looks) - 1)
        return self._known[digest]


def _color_distance(thumb: bytes, other: bytes) -> float:
    return float(np.abs(np.frombuffer(thumb, np.uint8) - np.frombuffer(other, np.uint8).astype(np.int16)).mean())


def normalized(text: str) -> str:
    """Fold case, replace compatibility forms, drop punctuation and leave one space between words."""
    return " ".join(re.sub(r"[.,!?;:…'\"“”‘’。，！？；：、()\s]+", " ", unicodedata.normalize("NFKC", text).casefold()).split())


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
    return _LOOK.pack(int(str(imagehash.phash(image)), 16), thumb.tobytes())


def _digest(data: bytes | str, size: int) -> bytes:
    data = data.encode("utf-8", "surrogatepass") if isinstance(data, str) else data
    return hashlib.blake2b(data, digest_size=size).digest()
