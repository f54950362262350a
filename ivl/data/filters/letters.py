"""How likely letters follow each other in words of Latin script, how rare Chinese characters are, and what else
tells text from noise."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable
from functools import cache

import numpy as np

from ivl.data.filters.text import looks_like_code, split_fences
from ivl.errors import InputError

_FOLD = str.maketrans("łøđıæœð", "lodiaed") | {ord("ß"): "ss", ord("þ"): "th"}
_WORD = re.compile(r"(?<![\w'’])[a-z]{3,}(?![\w'’])")
_LEVELS = """
087787766857787784688776246 955664354646868351878553155 462106000550502500530500040 560306006614401600336500012
770138010730334600442510022 955675454546768353887453535 640004300600300600402400010 751006032500303500442500030
660007002511310600204410010 864666553356768742577450215 450016000300011400033410000 661106003503321600345520030
772157231742622610055510040 674007000610242650021500010 871577374734315710067630051 845563542535668450766554004
560106012400502640634400030 000000000000000000000500000 873358341724455620555532043 861507103725533551268523034
881208117803333730756623154 753446141534666450666521024 470006000500003500320200030 440004003500002400220000020
320203000300000120003000000 742213111301322340134001021 552015000502124400013301021
"""
"""Row: a letter; column: the next one; both of (word edge, a..z). Twice the frequency is one level more, 5 is that of chance.
Counted over messages in 25 European languages, Indonesian and Vietnamese without their marks, and English prose."""
_TABLE = np.array([[int(level) for level in row] for row in _LEVELS.split()], dtype=np.float32)


def levels(text: str) -> np.ndarray:
    """The level of every pair of neighbours in words of three letters or more, edges included; 0 is never seen, 9 the most
    frequent. Words in capitals, with digits or in other scripts have none."""
    text = re.sub(r"\b[A-Z]{2,}\b", " ", text)
    folded = "".join(c for c in unicodedata.normalize("NFKD", text.lower().translate(_FOLD)) if not unicodedata.combining(c))
    words = _WORD.findall(folded)
    letters = np.frombuffer(("`" + "`".join(words) + "`").encode(), dtype=np.uint8).astype(np.int64) - ord("`")
    return _TABLE[letters[:-1], letters[1:]] if words else np.zeros(0, dtype=np.float32)


def rare_han(text: str) -> tuple[int, int]:
    """How many Chinese characters are not in common use in China, Taiwan or Japan, and how many there are."""
    han = re.findall("[\u4e00-\u9fff]", text)
    return sum(not _common(c) for c in han), len(han)


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
_ESCAPED = re.compile(r"(?:\\x[0-9a-fA-F]{2}){2}|\\u[0-9a-fA-F]{4}\\u|&amp;(?:#\d{2,6}|[a-z]{2,8});|锟斤拷|烫烫烫|屯屯屯")


def broken_characters(text: str) -> str:
    if match := _BROKEN.search(text):
        return "replacement character" if match[0] == "\ufffd" else "control or private character"
    if _ESCAPED.search(split_fences(text)[0]) and not looks_like_code(text):
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
    return (
        differ.sum() >= 4 and bool(window_means(differ.astype(float), 32).max() > 0.2) and len(np.unique(script[letters])) >= 3
    )


_SCRIPTS = np.array([
    0x250, 0x370, 0x400, 0x530, 0x590, 0x600, 0x700, 0x900, 0x980, 0xA00, 0xA80, 0xB00, 0xB80, 0xC00, 0xC80, 0xD00, 0xD80,
    0xE00, 0xE80, 0xF00, 0x1000, 0x10A0, 0x1100, 0x1200, 0x13A0, 0x1400, 0x1680, 0x1780, 0x1800, 0x1E00, 0x1F00, 0x2000,
    0x2C00, 0x2E80, 0xA000, 0xA640, 0xAC00, 0xD7B0, 0xF900, 0xFB00, 0xFB50, 0xFF00, 0x10000,
])  # fmt: skip
"""Where a block of another alphabet begins, roughly."""


def most_symbols(text: str, width: int = 32) -> float:
    """Largest share of symbols among `width` neighbours; what draws tables and rulers does not count as one."""
    kept = re.sub(r"[\s|=_*.,:~+#>-]+", "", text)
    symbols = np.array([not c.isalnum() and c < "\u2000" for c in kept], dtype=float)
    return float(window_means(symbols, width).max()) if len(kept) >= width else 0.0
