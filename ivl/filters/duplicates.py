"""Near-duplicates: the same conversation about the same media (spec users 5: MinHash for text, perceptual hash for images).

A row is a duplicate of an earlier one if its pictures look the same and its text is the same but for small edits. The same
picture with another question is not, nor is the same question about another picture. Signatures are pure and computed
anywhere; the index is fed in stream order, so that parallel work gives the same output as one process.
"""

from __future__ import annotations

import hashlib
import re
import struct
import unicodedata
import zlib
from array import array
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Any, ClassVar

import numpy as np
from PIL import Image

from ivl.errors import InputError
from ivl.processing.image import load_image
from ivl.types import ImageRef, Record, Text, VideoRef

NUM_HASHES = 64
BANDS = 16
"""Bands of 4 hashes: two texts that share 80% of their shingles meet in one with probability 0.9997, 60% with 0.89."""
THUMB = 8
_HEAD = struct.Struct("<8s16s16sI")
_LOOK = struct.Struct(f"<Q{THUMB * THUMB * 3}s")
_SHINGLE = 5
_PIVOT = re.compile(r"\d+(?:[.,]\d+)*|\b(?:not|no|yes|never|none|nor|without|true|false)\b|n['’]t\b|[是否不没無无未非]")
"""Numbers, and words that turn a sentence into its opposite: rows that differ in these are no duplicates."""


@dataclass(frozen=True, kw_only=True)
class Duplicates:
    """Settings of the search for near-duplicates."""

    name: ClassVar[str] = "duplicates"
    min_similarity: float = 0.75
    """Least share of common character 5-grams (Jaccard, estimated by MinHash) of long texts."""
    min_words: int = 25
    """Shorter texts must be equal but for case, marks and white space: one word may be all that matters."""
    same_similarity: float = 0.9
    """From here on, numbers and words such as `not` may differ, too."""
    max_bits: int = 7
    """Largest distance of two perceptual hashes, of 64 bits."""
    max_colour: int = 14
    """Largest mean difference of colours, 0 to 255, of images scaled to 8 x 8."""

    def __post_init__(self) -> None:
        if not 0 < self.min_similarity <= 1:
            raise ValueError(f"min_similarity must be in (0, 1], got {self.min_similarity}")
        if not 0 <= self.max_bits < 8:
            raise ValueError(f"max_bits must be 0 to 7, got {self.max_bits}")

    def signature(self, record: Record) -> bytes:
        """All that the index needs to know of a row: 44 bytes, 200 for each image and 256 for a long text.

        Raises:
            InputError: naming the row, if an image cannot be read.
        """
        texts, looks, others = [], [], []
        for conversation in record.conversations:
            for message in conversation:
                texts.append(f"\x1e{message.role}\x1f")
                for part in message.content:
                    if isinstance(part, Text):
                        texts.append(part.text)
                    elif isinstance(part, ImageRef):
                        texts.append("\x1d")
                        looks.append(_look(part, record.source))
                    else:
                        texts.append("\x1d")
                        others.append(_video(part))
        text = "".join(texts)
        plain = normalised(text)
        words = len(re.findall(r"[^\W_]+", plain)) + len(re.findall("[\u3040-\u9fff\uac00-\ud7af]", plain)) // 2
        pivots = _digest(" ".join(_PIVOT.findall(text.casefold())), 8)
        head = _HEAD.pack(pivots, _digest(plain, 16), _digest("\n".join(others), 16), len(looks))
        return head + b"".join(looks) + (_minhash(plain) if words >= self.min_words else b"")

    def index(self) -> DuplicateIndex:
        """An empty index with these limits."""
        return DuplicateIndex(self)


class DuplicateIndex:
    """Rows seen so far. Feed it in stream order; only rows that are no duplicates are remembered, by about 1 kB each."""

    def __init__(self, limits: Duplicates) -> None:
        self.limits = limits
        self.keys: list[str] = []
        self._images = _Images(limits.max_bits, limits.max_colour)
        self._exact: dict[bytes, int] = {}
        self._texts = _Texts(limits)

    def __len__(self) -> int:
        """Rows remembered."""
        return len(self.keys)

    def seen(self, signature: bytes, key: str) -> str | None:
        """The key of the earliest row found that this one duplicates, else None, and the row is remembered under its key."""
        pivots, text, others, num_images = _HEAD.unpack_from(signature)
        at = _HEAD.size + num_images * _LOOK.size
        looks = [self._images.find(signature[i : i + _LOOK.size]) for i in range(_HEAD.size, at, _LOOK.size)]
        media = _digest(repr((looks, num_images)).encode() + others, 8)
        exact = _digest(media + text + pivots, 16)
        found = self._exact.get(exact)
        hashes = np.frombuffer(signature, dtype=np.uint32, offset=at)
        if found is None and len(hashes):
            found = self._texts.find(hashes, media, pivots)
        if found is not None:
            return self.keys[found]
        self._exact[exact] = len(self.keys)
        if len(hashes):
            self._texts.add(hashes, media, pivots, len(self.keys))
        self.keys.append(key)
        return None


class _Images:
    """Gives every image the number of the first one that looks like it."""

    def __init__(self, max_bits: int, max_colour: int) -> None:
        self.max_bits, self.max_colour = max_bits, max_colour
        self._known: dict[bytes, int] = {}
        # Hashes that differ in max_bits bits agree in one of max_bits + 1 pieces.
        edges = np.linspace(0, 64, max_bits + 2).astype(int).tolist()
        self._pieces = [(low, (1 << (high - low)) - 1) for low, high in pairwise(edges)]
        self._buckets: dict[tuple[int, int], array] = {}
        self._hashes, self._thumbs = _Rows(1, np.uint64), _Rows(THUMB * THUMB * 3, np.uint8)

    def find(self, look: bytes) -> int:
        digest = _digest(look, 12)
        if digest in self._known:
            return self._known[digest]
        bits, thumb = _LOOK.unpack(look)
        colours = np.frombuffer(thumb, dtype=np.uint8)
        places = [(piece, bits >> low & mask) for piece, (low, mask) in enumerate(self._pieces)]
        near = np.unique(np.concatenate([np.array(self._buckets.get(place, ()), dtype=np.int64) for place in places]))
        near = near[np.bitwise_count(self._hashes[near][:, 0] ^ np.uint64(bits)) <= self.max_bits]
        apart = np.abs(self._thumbs[near].astype(np.int16) - colours).mean(axis=1) if len(near) else np.zeros(0)
        near = near[apart <= self.max_colour]
        number = int(near[0]) if len(near) else len(self._hashes)
        self._known[digest] = number
        if not len(near):
            self._hashes.append(np.array([bits], dtype=np.uint64))
            self._thumbs.append(colours)
            for place in places:
                self._buckets.setdefault(place, array("I")).append(number)
        return number


class _Texts:
    """MinHash LSH: texts that agree in a band of hashes, with the same media, are compared by all hashes.

    A hash table of chains in flat arrays takes 430 bytes a text, a tenth of one made of sets.
    """

    def __init__(self, limits: Duplicates) -> None:
        self.limits = limits
        self._hashes, self._groups, self._rows = _Rows(NUM_HASHES, np.uint32), _Rows(2, np.uint64), array("I")
        # Entry e is band e % BANDS of text e // BANDS: where a chain begins, by key; and the entry before.
        self._heads, self._before = array("i", [-1]) * (1 << 12), array("i")

    def find(self, hashes: np.ndarray, media: bytes, pivots: bytes) -> int | None:
        mask, near = len(self._heads) - 1, set()
        for key in _band_keys(hashes, media):
            entry = self._heads[key & mask]
            while entry >= 0:
                near.add(entry // BANDS)
                entry = self._before[entry]
        texts = np.array(sorted(near), dtype=np.int64)
        ours = np.frombuffer(media + pivots, dtype=np.uint64)
        same_media, same_pivots = (self._groups[texts] == ours).T  # chains hold strangers, too
        similar = (self._hashes[texts] == hashes).mean(axis=1)
        limits = np.where(same_pivots, self.limits.min_similarity, self.limits.same_similarity)
        texts = texts[same_media & (similar >= limits)]
        return self._rows[int(texts[0])] if len(texts) else None

    def add(self, hashes: np.ndarray, media: bytes, pivots: bytes, row: int) -> None:
        self._hashes.append(hashes)
        self._groups.append(np.frombuffer(media + pivots, dtype=np.uint64))
        self._rows.append(row)
        if len(self._rows) * BANDS <= len(self._heads):
            self._link(hashes, media)
            return
        self._heads, self._before = array("i", [-1]) * (2 * len(self._heads)), array("i")
        for text in range(len(self._rows)):
            self._link(self._hashes[text], self._groups[text, 0].tobytes())

    def _link(self, hashes: np.ndarray, media: bytes) -> None:
        mask = len(self._heads) - 1
        for key in _band_keys(hashes, media):
            self._before.append(self._heads[key & mask])
            self._heads[key & mask] = len(self._before) - 1


class _Rows:
    """A table that grows by doubling."""

    def __init__(self, width: int, dtype: type) -> None:
        self._table, self._used = np.zeros((64, width), dtype=dtype), 0

    def __len__(self) -> int:
        return self._used

    def __getitem__(self, rows: Any) -> np.ndarray:
        return self._table[rows]

    def append(self, row: np.ndarray) -> None:
        if self._used == len(self._table):
            self._table = np.concatenate((self._table, np.zeros_like(self._table)))
        self._table[self._used] = row
        self._used += 1


def normalised(text: str) -> str:
    """Text as it is compared: case folded, compatibility forms replaced, no sentence marks, one space between words."""
    return " ".join(re.sub(r"[.,!?;:…'\"“”‘’。，！？；：、()\s]+", " ", unicodedata.normalize("NFKC", text).casefold()).split())


def _minhash(plain: str) -> bytes:
    """NUM_HASHES little-endian 32-bit hashes of the set of character 5-grams."""
    try:
        from datasketch import MinHash
    except ImportError as error:
        raise InputError("datasketch is not installed, which finds near-duplicates: pip install 'ivl[data]'") from error
    grams = sorted({plain[i : i + _SHINGLE] for i in range(max(1, len(plain) - _SHINGLE + 1))})
    sketch = MinHash(num_perm=NUM_HASHES, hashfunc=zlib.crc32, permutations=_permutations(), scheme="affine32")
    for start in range(0, len(grams), 4096):  # the library makes a table of all grams by all hashes
        sketch.update_batch([gram.encode("utf-8", "surrogatepass") for gram in grams[start : start + 4096]])
    return sketch.hashvalues.astype("<u4").tobytes()


@cache
def _permutations() -> Any:
    from datasketch import MinHash

    return MinHash(num_perm=NUM_HASHES, scheme="affine32").permutations


def _band_keys(hashes: np.ndarray, media: bytes) -> list[int]:
    salt = zlib.crc32(media)
    bands = hashes.reshape(BANDS, -1)
    return [zlib.crc32(band.tobytes(), salt + number) for number, band in enumerate(bands)]


def _look(ref: ImageRef, source: str) -> bytes:
    """Perceptual hash and colours of an image."""
    try:
        import imagehash
    except ImportError as error:
        raise InputError("imagehash is not installed, which finds equal images: pip install 'ivl[data]'") from error
    try:
        image = load_image(ref)
    except InputError as error:
        raise InputError(f"{source}: {error}") from None
    bits = int(str(imagehash.phash(image)), 16)
    thumb = image.resize((THUMB, THUMB), Image.Resampling.BOX)
    return _LOOK.pack(bits, thumb.tobytes())


def _video(ref: VideoRef) -> str:
    """Videos are compared by name and clip: decoding them costs more than training on them twice."""
    return repr((ref.source, ref.clip))


def _digest(data: bytes | str, size: int) -> bytes:
    data = data.encode("utf-8", "surrogatepass") if isinstance(data, str) else data
    return hashlib.blake2b(data, digest_size=size).digest()
