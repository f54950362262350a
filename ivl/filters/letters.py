"""How likely letters follow each other in words of Latin script, how rare Chinese characters are, and what else
tells text from noise."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Callable
from functools import cache
from importlib import resources

import numpy as np

from ivl.errors import InputError
from ivl.filters.text import looks_like_code, without_code

_FOLD = str.maketrans("łøđıæœð", "lodiaed") | {ord("ß"): "ss", ord("þ"): "th"}
_WORD = re.compile(r"(?<![\w'’])[a-z]{3,}(?![\w'’])")


@cache
def _common_triples() -> np.ndarray:
    """bool [27, 27, 27] over word edge and a..z. trigrams.txt has two letters and all that follow them, edges as `_`; it was
    counted over messages in 25 European languages, Indonesian and Vietnamese without their marks, and English prose."""
    table = np.zeros((27, 27, 27), dtype=bool)
    for line in resources.files("ivl.filters").joinpath("trigrams.txt").read_text("ascii").splitlines():
        (first, second), followers = line.split(" ")
        for third in followers:
            table[_number(first), _number(second), _number(third)] = True
    return table


def _number(letter: str) -> int:
    return 0 if letter == "_" else ord(letter) - ord("a") + 1


def strange_triples(text: str) -> np.ndarray:
    """For every three neighbours in words of three letters or more, edges included: 1.0 if no language here has them, else 0.0.
    Words in capitals, with digits or in other scripts are left out."""
    text = re.sub(r"\b[A-Z]{2,}\b", " ", text)
    folded = "".join(c for c in unicodedata.normalize("NFKD", text.lower().translate(_FOLD)) if not unicodedata.combining(c))
    words = "`" + "`".join(_WORD.findall(folded)) + "`"
    letters = np.frombuffer(words.encode(), dtype=np.uint8).astype(np.int64) - ord("`")
    if len(letters) < 3:
        return np.zeros(0)
    inside = letters[1:-1] != 0
    return (~_common_triples()[letters[:-2], letters[1:-1], letters[2:]])[inside].astype(np.float64)


def rare_han(text: str) -> tuple[int, int]:
    """How many Chinese characters are not in common use in China, Taiwan or Japan, and how many there are."""
    han = Counter(re.findall("[\u4e00-\u9fff]", text))
    return sum(n for char, n in han.items() if not _common(char)), han.total()


def _common(char: str) -> bool:
    for codec, first, last in (("gb2312", 0xB0, 0xF7), ("big5", 0xA4, 0xC6), ("shift_jis", 0x88, 0x97)):
        encoded = char.encode(codec, "ignore")
        if encoded and first <= encoded[0] <= last:
            return True
    return False


def window_means(values: np.ndarray, width: int) -> np.ndarray:
    """The mean of every `width` neighbours; of all values if there are fewer."""
    width = min(width, len(values))
    total = np.concatenate(([0.0], np.cumsum(values, dtype=np.float64)))
    return (total[width:] - total[:-width]) / width


_BROKEN = re.compile(
    "[\x00-\x08\x0b\x0e-\x1f\x7f\x80-\x84\x86-\x9f\ud800-\udfff\ue000-\uf8ff\ufdd0-\ufdef\ufffd-\uffff\U000f0000-\U0010ffff]"
)
_ESCAPED = re.compile(
    r"(?:\\x[0-9a-fA-F]{2}){2}|\\u[0-9a-fA-F]{4}\\u|&amp;(?:#\d{2,6}|[a-z]{2,8});|锟斤拷|烫烫烫|屯屯屯|[A-Za-z][\u0400-\u04ff][\u00a0-\u00bf]"
)


def broken_characters(text: str) -> str:
    if match := _BROKEN.search(text):
        return "replacement character" if match[0] == "\ufffd" else "control or private character"
    if _ESCAPED.search(without_code(text)) and not looks_like_code(text):
        return "escaped bytes or entities"
    if not text.isascii() and _badness()(text) > len(text) // 2_000:
        return "mojibake"
    return ""


@cache
def _badness() -> Callable[[str], int]:
    try:
        from ftfy.badness import badness
    except ImportError as error:
        raise InputError("ftfy is not installed, which finds mojibake: pip install 'ivl[data]'") from error
    return badness


def mixed_scripts(text: str) -> bool:
    """Neighbouring letters of different alphabets, again and again. East Asian scripts and Latin may touch any other."""
    if text.isascii():
        return False
    points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
    letters = np.array([c.isalpha() for c in text])
    script = np.searchsorted(_SCRIPTS, points, side="right")
    both = letters[1:] & letters[:-1]
    differ = both & (script[1:] != script[:-1])
    if differ.sum() < 4:
        return False
    return bool(window_means(differ.astype(float), 32).max() > (0.2 if len(np.unique(script[letters])) > 2 else 0.5))


_SCRIPTS = np.array([
    0x250, 0x370, 0x400, 0x530, 0x590, 0x600, 0x700, 0x900, 0x980, 0xA00, 0xA80, 0xB00, 0xB80, 0xC00, 0xC80, 0xD00, 0xD80,
    0xE00, 0xE80, 0xF00, 0x1000, 0x10A0, 0x1100, 0x1200, 0x13A0, 0x1400, 0x1680, 0x1780, 0x1800, 0x1E00, 0x1F00, 0x2000,
    0x2C00, 0x2E80, 0xA000, 0xA640, 0xAC00, 0xD7B0, 0xF900, 0xFB00, 0xFB50, 0xFF00, 0x10000,
])  # fmt: skip
"""Where a block of another alphabet begins, roughly."""


def most_symbols(text: str, width: int = 32) -> float:
    """Largest share of `@$%^&!?<>{}\\~;` and the like among `width` neighbours, white space aside. What draws tables, and the
    brackets and quotes of code, do not count."""
    kept = re.sub(r"[\s|=_*.,:+#>\-\[\]()'\"`/]+|\\\\[A-Za-z]+", "", text)
    symbols = np.array([not c.isalnum() and c < "\u2000" for c in kept], dtype=float)
    return float(window_means(symbols, width).max()) if len(kept) >= width else 0.0
