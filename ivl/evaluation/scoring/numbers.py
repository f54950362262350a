"""Numbers with their units, in digits or in English words, compared with a tolerance. Values are exact fractions."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from fractions import Fraction

from ivl.evaluation.scoring.spelling import CARDINALS, bare, without_left_side

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


# -- units

_PREFIXES = {
    "": "1", "m": "0.001", "c": "0.01", "d": "0.1", "k": "1000", "M": "1e6", "G": "1e9", "milli": "0.001", "centi": "0.01",
    "deci": "0.1", "kilo": "1000", "mega": "1e6", "giga": "1e9", "毫": "0.001", "厘": "0.01", "分": "0.1", "千": "1000",
}  # fmt: skip
_TABLE = """
length   1 *m *meter *metre *米 | 1000 公里 | 0.0254 in inch inches | 0.3048 ft foot feet | 0.9144 yd yard | 1609.344 mi mile
mass     1 *g *gram *克 | 1000 公斤 | 1000000 ton tonne 吨 | 453.59237 lb lbs pound
volume   1 *l *L *liter *litre *升
time     1 *s *second *秒 sec 秒钟 | 60 min minute 分钟 | 3600 h hr hour 小时 | 86400 day 天 | 604800 week 周
month    1 month 月 个月
year     1 year yr 年
force    1 *N *newton 牛 牛顿
energy   1 *J *joule 焦耳
power    1 *W *watt 瓦
voltage  1 *V *volt 伏
current  1 *A *amp ampere 安
ohm      1 *Ω *ohm 欧 欧姆
hertz    1 *Hz *hertz
pressure 1 *Pa
angle    1 ° degree deg 度
celsius  1 °C 摄氏度
fahrenheit 1 °F 华氏度
dollar   1 $ dollar USD usd 美元 | 0.01 cent
euro     1 € euro EUR eur 欧元
sterling 1 £ GBP gbp 英镑
yuan     1 ¥ yuan RMB rmb CNY 元 人民币
"""
"""Dimension, factor to its base unit, and names; * marks those that take prefixes."""


def _units() -> dict[str, tuple[str, Fraction]]:
    units = {}
    for line in _TABLE.strip().splitlines():
        dimension, entries = line.split(None, 1)
        for factor, *names in map(str.split, entries.split("|")):
            for name in names:
                for prefix, multiple in (_PREFIXES if name[0] == "*" else {"": "1"}).items():
                    units[prefix + name.lstrip("*")] = dimension, Fraction(factor) * Fraction(multiple)
    units = {f"{name}s": measured for name, measured in units.items()} | units
    lengths = [(name, factor) for name, (dimension, factor) in units.items() if dimension == "length"]
    return units | {f"{name}^{n}": (f"length^{n}", factor**n) for name, factor in lengths for n in (2, 3)}


_UNITS = _units()
_SPELLINGS = {
    "degrees celsius": "°C", "degrees fahrenheit": "°F", "° c": "°C", "° f": "°F", "mph": "mile/h", "kmh": "km/h",
    "kph": "km/h",
}  # fmt: skip
_WORDS = (
    "and or to not no nor than but of in on at if with is are was minus plus times pi e theta alpha beta sin cos tan log ln "
    "sqrt out per more less other others option options"
)
_NOT_COUNTED = frozenset(_WORDS.split())
_CLASSIFIERS = "个只条张名人次件本辆头位种台块棵朵支把"
_OF_WHAT = re.compile(r"(?:^| )(?:long|tall|wide|high|deep|old|away|in total|altogether|o'clock)$")


def unit_of(text: str, *, spaced: bool) -> str | None:
    """Return the unit in one spelling; empty for no unit, None for other text. Unknown words are what is counted (`3 dogs`)."""
    text = _OF_WHAT.sub("", text)
    if not text:
        return ""
    if text[0] in _CLASSIFIERS and text not in _UNITS:
        return text[1:] if re.fullmatch(r"[\u4e00-\u9fff]{0,6}", text[1:]) and not set(text) & set("半多以或至到和") else None
    text = re.sub(r"^(?:((?:square|sq\.?) |平方)|(?:cubic|cu\.?) |立方)(\w+)$", lambda m: f"{m[2]}^{2 if m[1] else 3}", text)
    text = re.sub(r" ?/ ?| per ", "/", text.replace("^{", "^").rstrip("}")).removesuffix(".")
    text = _SPELLINGS.get(text.lower(), text)
    for name in (text, text.lower()):
        if _measure(name):
            return name
    if re.fullmatch(r"[A-Za-z°]{1,12}(\^[23])?(/[A-Za-z]{1,12}(\^[23])?){1,2}", text):
        return text.lower()
    words = text.lower().split()
    if words and words[0] in _UNITS and len(words) <= 4 and words[1:2] == ["of"]:
        return words[0]
    counted = all(re.fullmatch(r"[^\W\d_]{3,}('s)?", word) for word in words) and not _NOT_COUNTED.intersection(words)
    return " ".join(word.removesuffix("s") for word in words) if spaced and counted and len(words) <= 4 else None


def conversion(unit: str, expected: str) -> Fraction | None:
    """Return the factor from one unit to the other; None if they measure different things."""
    if unit == expected or not unit or not expected:
        return Fraction(1)
    known, expected_known = _measure(unit), _measure(expected)
    if known and expected_known:
        return known[1] / expected_known[1] if known[0] == expected_known[0] else None
    if known or expected_known:
        return None
    words, expected_words = set(unit.split()), set(expected.split())
    return Fraction(1) if words <= expected_words or expected_words <= words else None


def _measure(unit: str) -> tuple[tuple[str, str], Fraction] | None:
    """Return what `cm^2` or `km/h` measures, and the factor to base units; None for unknown units."""
    over, _, under = unit.partition("/")
    if over not in _UNITS or (under and under not in _UNITS):
        return None
    (dimension, factor), (per, divisor) = _UNITS[over], _UNITS.get(under, ("", Fraction(1)))
    return (dimension, per), factor / divisor
