"""Numbers with their units, in digits or in English words, compared with a tolerance. Values are exact fractions."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from fractions import Fraction

from ivl.evaluation.scoring.spelling import CARDINALS, bare, without_left_side
from ivl.evaluation.scoring.units import conversion, unit_of

TOLERANCE = 1e-3
"""Relative tolerance of numbers that are no integers."""
_MOST_DIGITS, _MOST_EXPONENT = 60, 300

_PARTS = {"half": "1/2", "third": "1/3", "quarter": "1/4"}
_IN_WORDS = {word: str(n) for n, word in enumerate(CARDINALS)} | {"half": "1/2", "a dozen": "1 dozen"}
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety"
for _n, _ten in enumerate(_TENS.split(), 2):
    _IN_WORDS |= {_ten: str(10 * _n)} | {f"{_ten} {CARDINALS[n]}": str(10 * _n + n) for n in range(1, 10)}
_IN_WORDS |= {f"{one} {part}": digits for one in ("a", "one") for part, digits in _PARTS.items()}
_IN_WORDS |= {"two thirds": "2/3", "three quarters": "3/4"}
_SCALES = {
    "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12, "hundred": 100, "dozen": 12, "mn": 10**6,
    "bn": 10**9, "k": 10**3, "K": 10**3, "M": 10**6, "B": 10**9, "千": 10**3, "万": 10**4, "百万": 10**6, "千万": 10**7,
    "亿": 10**8,
}  # fmt: skip
_SCALE = re.compile(r"([千百]?万|[千亿])|(dozen|hundred|thousand|[mb]illion|trillion|mn|bn|[kKMB])s?(?![A-Za-z/])")
_FRAC = re.compile(r" ?\\[dtc]?frac ?(?:\{ ?(-?[\d.]+) ?\} ?\{ ?(-?[\d.]+) ?\}|(\d)(\d))")
_POWER = re.compile(r"(?<=\d) ?(?:×|x|\*|·|⋅|\\times|\\cdot) ?10 ?\^ ?[({]? ?([+-]?\d+)(?: ?[)}])?")
_NUMBER = re.compile(
    r"([+-]?) ?([$€£¥]?) ?(?:(?:(?P<whole>\d+) )?(?P<up>-?\d+(?:\.\d+)?) ?/ ?(?P<down>-?\d+(?:\.\d+)?)(?![\d.])"
    r"|(?P<digits>\d{1,3}(?P<mark>[, '])\d{3}(?:(?P=mark)\d{3})*(?![\d,]| \d)(?:\.\d+)?|\d+(?:\.\d*)?|\.\d+)"
    r"(?:[eE](?P<power>[+-]?\d+)(?!\w))?)"
)
_ABOUT = re.compile(
    r"(?:#|no\.? ?(?=\d)|about|approximately|approx\.?|around|roughly|nearly|almost|≈|~|大约|约为|约|\\approx) *", re.IGNORECASE
)
_MINUS = re.compile(r"(?:minus|negative|负) *", re.IGNORECASE)
_PERCENT = re.compile(r"(?:%|percent(?:age)?|per cent|pct)(?![A-Za-z])(?: points?)?(?: of(?: [^\W\d_]+){1,4})?")


@dataclass(frozen=True, kw_only=True)
class Quantity:
    """A number with its unit, and how it is written."""

    value: Fraction
    unit: str = ""
    """A known unit or other words; empty if the text names none."""
    percent: bool = False
    """With a percent sign; 12% has the value 12."""
    integer: bool = False
    """Written in digits without a point, fraction or exponent."""
    places: int = 0
    """Digits after the point."""
    scale: int = 1
    """The factor of a word such as million, which the value contains."""
    year: bool = False
    """Four digits from 1500 to 2099 and nothing else."""


def quantity(text: str) -> Quantity | None:
    """Read a text that is one number; None for anything else (a range, a list, a formula, a variable)."""
    text = bare(text).removesuffix("左右")
    if len(text) > 120 or re.fullmatch(r"(?:1\d|20)\d0'?s", text):  # 1990s is a decade
        return None
    text = text[match.end() :] if (match := _ABOUT.match(text)) else text
    text = "-" + _in_digits(text[match.end() :]) if (match := _MINUS.match(text)) else _in_digits(text)
    text = re.sub(r"^(\d+) and (?=\d+/\d+)", r"\1 ", _FRAC.sub(r" \1\3/\2\4", text)).strip()
    text = _POWER.sub(r"e\1", re.sub(r"^([+-]? ?)10 ?\^", r"\g<1>1*10^", text))
    if not (match := _NUMBER.match(text)) or any(len(part or "") > _MOST_DIGITS for part in match.groups()):
        return None
    part, power = match.groupdict(), int(match["power"] or 0)
    if abs(power) > _MOST_EXPONENT or (part["down"] and not Fraction(part["down"])):
        return None
    if part["up"]:
        value, digits = Fraction(part["whole"] or 0) + Fraction(part["up"]) / Fraction(part["down"]), ""
    else:
        digits = re.sub("[, ']", "", part["digits"]).rstrip(".")
        value = Fraction(digits) * Fraction(10) ** power
    exact = Quantity(
        value=-value if match[1] == "-" else value,
        integer=digits.isdecimal() and not part["power"],
        places=0 if part["power"] else len(digits.partition(".")[2]),
        year=bool(re.fullmatch(r"1[5-9]\d\d|20\d\d", text)),
    )
    return _with_unit(exact, text[match.end() :], money=match[2])


def _with_unit(number: Quantity, rest: str, money: str) -> Quantity | None:
    """Read what follows a number: a scale such as million, a percent sign, a unit; None for anything else."""
    spaced, rest = rest[:1] == " ", rest.strip()
    if (match := _SCALE.match(rest)) and not (spaced and not money and match[0] in "kKMB"):
        scale, rest = _SCALES[match[1] or match[2]], rest[match.end() :].strip()
        number = replace(number, value=number.value * scale, scale=scale)
    if match := _PERCENT.match(rest):
        return replace(number, percent=True) if match.end() == len(rest) else None
    unit = unit_of(rest, spaced=spaced)
    if unit is None or (money and conversion(money, unit) is None):
        return None
    return replace(number, unit=unit or money)


def _in_digits(text: str) -> str:
    """Write in digits the number words that a text begins with."""
    words = text.replace("-", " ").split()
    for count in (2, 1):
        if digits := _IN_WORDS.get(" ".join(words[:count]).lower()):
            return " ".join([digits, *words[count:]])
    return text


def same_quantity(prediction: Quantity, truth: Quantity, *, tolerance: float = TOLERANCE, relaxed: bool = False) -> bool:
    """Compare two numbers: integers exactly, others up to the tolerance; known units are converted.

    A unit or percent sign that only one side has is taken as understood.

    Args:
        tolerance: A share of the truth.
        relaxed: The tolerance also holds for integers other than years, as for charts (ChartQA, arXiv:2203.10244), and
            millions may be understood from an axis.
    """
    if (factor := conversion(prediction.unit, truth.unit)) is None:
        return False
    value = prediction.value * factor
    values = {value}
    if prediction.percent != truth.percent:
        values.add(value / 100 if prediction.percent else value * 100)
    if relaxed and 1 in (prediction.scale, truth.scale):
        values.add(value * truth.scale / prediction.scale)
    return any(_close(reading, prediction, truth, Fraction(tolerance), relaxed) for reading in values)


def _close(value: Fraction, prediction: Quantity, truth: Quantity, tolerance: Fraction, relaxed: bool) -> bool:
    if value == truth.value:
        return True
    if (relaxed and truth.year) or (not relaxed and prediction.integer and truth.integer and value.denominator == 1):
        return False
    if abs(value - truth.value) <= tolerance * abs(truth.value):
        return True
    finer = prediction.places > truth.places or not (prediction.places or prediction.integer)
    return truth.places >= 2 and finer and round(value, truth.places) == truth.value


def quantities(prediction: str, truth: str) -> tuple[Quantity, Quantity] | None:
    """Read both texts as numbers, None unless both are; `x = 5` is 5 unless the other names another unknown."""
    (left, given), (expected_left, expected) = without_left_side(bare(prediction)), without_left_side(bare(truth))
    if left and expected_left and left != expected_left:
        return None
    a, b = quantity(given), quantity(expected)
    return (a, b) if a and b else None
