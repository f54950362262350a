"""Numbers with their units, in digits or in English words, compared with a tolerance. Values are exact fractions."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from fractions import Fraction

from ivl.evaluation.scoring.spelling import bare, without_left_side

TOLERANCE = 1e-3
"""Relative tolerance of numbers that are no integers."""
_MOST_DIGITS, _MOST_EXPONENT = 60, 300

_SMALL = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen "
    "nineteen"
)
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety"
_PARTS = {"half": 2, "third": 3, "quarter": 4}
_IN_WORDS = {word: Fraction(n) for n, word in enumerate(_SMALL.split())}
for _n, _ten in enumerate(_TENS.split(), 2):
    _IN_WORDS |= {_ten: Fraction(10 * _n)} | {f"{_ten} {_SMALL.split()[n]}": Fraction(10 * _n + n) for n in range(1, 10)}
_IN_WORDS |= {"half": Fraction(1, 2)} | {f"{one} {part}": Fraction(1, n) for one in ("a", "one") for part, n in _PARTS.items()}
_IN_WORDS |= {"two thirds": Fraction(2, 3), "three quarters": Fraction(3, 4)}
_SCALES = {
    "thousand": 10**3, "million": 10**6, "millions": 10**6, "billion": 10**9, "billions": 10**9, "trillion": 10**12,
    "hundred": 100, "dozen": 12, "mn": 10**6, "bn": 10**9, "k": 10**3, "K": 10**3, "M": 10**6, "B": 10**9,
    "千": 10**3, "万": 10**4, "百万": 10**6, "千万": 10**7, "亿": 10**8,
}  # fmt: skip
_NUMBER = re.compile(
    r"(?P<sign>[+-]? ?)(?P<money>[$€£¥])? ?"
    r"(?:(?P<whole>\d+)? ?(?:\\[dtc]?frac ?\{ ?(?P<up>-?\d+(?:\.\d+)?) ?\} ?\{ ?(?P<down>-?\d+(?:\.\d+)?) ?\})"
    r"|\\[dtc]?frac(?P<digit_up>\d)(?P<digit_down>\d)"
    r"|(?:(?P<mixed>\d+) )?(?P<over>\d+(?:\.\d+)?) ?/ ?(?P<under>\d+(?:\.\d+)?)(?![\d.])"
    r"|(?P<power>10) ?\^ ?(?P<exponent>[+-]?\d+|\{ ?[+-]?\d+ ?\}|\([+-]?\d+\))"
    r"|(?P<digits>\d{1,3}(?:,\d{3})+(?![\d,])(?:\.\d+)?|\d{1,3}(?: \d{3})+(?! ?\d)(?:\.\d+)?|\d{1,3}(?:'\d{3})+(?!\d)(?:\.\d+)?"
    r"|\d+(?:\.\d*)?|\.\d+)"
    r"(?:[eE](?P<e>[+-]?\d+)(?!\w)| ?(?:×|x|\*|·|⋅|\\times|\\cdot) ?10 ?\^ ?(?P<ten>[+-]?\d+|\{ ?[+-]?\d+ ?\}|\([+-]?\d+\)))?)"
)
_SCALE = re.compile(r"百万|千万|[千万亿]|(?:dozen|hundred|thousand|[mb]illions?|trillion|mn|bn|[kKMB])(?![A-Za-z/])")
_ABOUT = re.compile(
    r"(?:#|no\.? ?(?=\d)|about|approximately|approx\.?|around|roughly|nearly|almost|≈|~|大约|约为|约|\\approx) *", re.IGNORECASE
)
_MINUS = re.compile(r"(?:minus|negative|负) *", re.IGNORECASE)


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
    text = re.sub(r"^(\d+) and (?=\d+/\d+)", r"\1 ", re.sub(r"^(?:a|one)(?= dozen)", "1", text, flags=re.IGNORECASE))
    if match := _MINUS.match(text):
        inner = _unsigned(text[match.end() :])
        return inner and replace(inner, value=-inner.value, year=False)
    return _unsigned(text)


def _unsigned(text: str) -> Quantity | None:
    read = _digits(text) or _english(text)
    if read is None:
        return None
    value, integer, places, rest = read
    spaced, rest = rest[:1] == " ", rest.strip()
    scale, money = 1, re.match(r"[+-]? ?([$€£¥])", text)
    if (match := _SCALE.match(rest)) and not (spaced and not money and match[0] in "kKMB"):
        scale, rest = _SCALES[match[0].lower() if len(match[0]) > 1 else match[0]], rest[match.end() :].strip()
    number = Quantity(value=value * scale, integer=integer, places=places, scale=scale)
    if match := re.match(r"(?:%|percent(?:age)?|per cent|pct)(?![A-Za-z])(?: points?)?", rest):
        return replace(number, percent=True) if re.fullmatch(r"(?: of(?: [^\W\d_]+){1,4})?", rest[match.end() :]) else None
    unit = unit_of(rest, spaced=spaced)
    if unit is None or (money and conversion(money[1], unit) is None):
        return None
    if not unit and money:
        unit = money[1]
    return replace(number, unit=unit, year=not unit and bool(re.fullmatch(r"1[5-9]\d\d|20\d\d", text)))


def _digits(text: str) -> tuple[Fraction, bool, int, str] | None:
    """Return the value, whether it is an integer in digits, its decimal places, and the rest of the text."""
    if not (match := _NUMBER.match(text)):
        return None
    part = match.groupdict()
    sign, rest = -1 if "-" in part["sign"] else 1, text[match.end() :]
    if any(len(value or "") > _MOST_DIGITS for value in part.values()):
        return None
    up, down = part["up"] or part["digit_up"] or part["over"], part["down"] or part["digit_down"] or part["under"]
    if up:
        if not Fraction(down):
            return None
        return sign * (Fraction(part["whole"] or part["mixed"] or 0) + Fraction(up) / Fraction(down)), False, 0, rest
    exponent = part["exponent"] or part["e"] or part["ten"]
    power = int(exponent.strip("{}() ")) if exponent else 0
    if abs(power) > _MOST_EXPONENT:
        return None
    digits = re.sub("[, ']", "", part["digits"] or "1").rstrip(".")
    places = len(digits.partition(".")[2])
    return sign * Fraction(digits) * Fraction(10) ** power, not exponent and not places, 0 if exponent else places, rest


def _english(text: str) -> tuple[Fraction, bool, int, str] | None:
    """Read number words as `_digits` reads digits; a scale such as thousand stays in the rest."""
    words = text.replace("-", " ").split()
    for count in (2, 1):
        if (value := _IN_WORDS.get(" ".join(words[:count]).lower())) is not None:
            return value, value.denominator == 1, 0, " " + " ".join(words[count:])
    return None


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


_KNOWN = """
length   1/1000 mm millimeter millimetre 毫米 | 1/100 cm centimeter centimetre 厘米 | 1/10 dm decimeter decimetre 分米
length   1 m meter metre 米 | 1000 km kilometer kilometre 公里 千米 | 127/5000 in inch inches | 381/1250 ft foot feet
length   1143/1250 yd yard | 201168/125 mi mile
mass     1/1000000 mg milligram 毫克 | 1/1000 g gram 克 | 1 kg kilogram 千克 公斤 | 1000 ton tonne 吨
mass     45359237/100000000 lb lbs pound
time     1/1000 ms millisecond 毫秒 | 1 s sec second 秒 秒钟 | 60 min mins minute 分钟 | 3600 h hr hrs hour 小时
time     86400 day 天 | 604800 week 周
month    1 month 月 个月
year     1 year yr 年
volume   1/1000 ml mL milliliter millilitre 毫升 | 1 l L liter litre 升
force    1 N newton 牛 牛顿 | 1000 kN
energy   1 J joule 焦耳 | 1000 kJ
power    1 W watt 瓦 | 1000 kW
voltage  1 V volt 伏
current  1 A amp ampere 安
ohm      1 Ω ohm 欧 欧姆
hertz    1 Hz | 1000 kHz | 1000000 MHz | 1000000000 GHz
pressure 1 Pa | 1000 kPa
angle    1 ° degree deg 度
celsius  1 °C 摄氏度 | 1 degreecelsius
fahrenheit 1 °F 华氏度
dollar   1 $ dollar USD usd 美元 | 1/100 cent
euro     1 € euro EUR eur 欧元
gbp      1 £ GBP gbp 英镑
yuan     1 ¥ yuan RMB rmb CNY 元 人民币
"""


def _units() -> dict[str, tuple[str, Fraction]]:
    units = {}
    for line in _KNOWN.strip().splitlines():
        dimension, entries = line.split(None, 1)
        for entry in entries.split("|"):
            factor, *names = entry.split()
            for name in (*names, *(name + "s" for name in names)):
                units[name] = dimension, Fraction(factor)
                if dimension == "length":
                    units |= {f"{name}^{power}": (f"length^{power}", Fraction(factor) ** power) for power in (2, 3)}
    return units


_UNITS = _units()
_SHORT = {"mph": "mile/h", "kmh": "km/h", "kph": "km/h", "km/hr": "km/h"}
_WORDS = (
    "and or to not no nor than but of in on at if with is are was minus plus times pi e theta alpha beta sin cos tan log ln "
    "sqrt out per more less other others option options"
)
_NOT_UNITS = set(_WORDS.split())
_CLASSIFIERS = "个只条张名人次件本辆头位种台块棵朵支把"
_OF_WHAT = re.compile(r"(?:^| )(?:long|tall|wide|high|deep|old|away|in total|altogether|o'clock)$")


def unit_of(text: str, *, spaced: bool) -> str | None:
    """Return the unit in one spelling; empty for no unit, None for other text. Unknown words are what is counted (`3 dogs`)."""
    text = _OF_WHAT.sub("", text)
    if not text:
        return ""
    if text[0] in _CLASSIFIERS and text not in _UNITS:
        return text[1:] if re.fullmatch(r"[\u4e00-\u9fff]{0,6}", text[1:]) and not set(text) & set("半多以或至到和") else None
    text = re.sub(r"^(square|sq\.?|cubic|cu\.?) (\w+)$", lambda m: f"{m[2]}^{2 if m[1].startswith('sq') else 3}", text)
    text = re.sub(r"^平方(\w+)$", r"\1^2", re.sub(r"^立方(\w+)$", r"\1^3", text))
    text = re.sub(r" ?/ ?| per ", "/", text.replace("^{", "^").rstrip("}")).removesuffix(".")
    text = {"degrees celsius": "°C", "degrees fahrenheit": "°F", "° C": "°C", "° F": "°F"}.get(text.lower(), text)
    for name in (text, text.lower()):
        if measure(name):
            return name
    if re.fullmatch(r"[A-Za-z°]{1,12}(\^[23])?(/[A-Za-z]{1,12}(\^[23])?){1,2}", text):
        return text.lower()
    words = text.lower().split()
    if words and words[0] in _UNITS and len(words) <= 4 and words[1:2] == ["of"]:
        return words[0]
    counted = all(re.fullmatch(r"[^\W\d_]{3,}('s)?", word) for word in words) and not set(words) & _NOT_UNITS
    return " ".join(word.removesuffix("s") for word in words) if spaced and counted and len(words) <= 4 else None


def conversion(unit: str, expected: str) -> Fraction | None:
    """Return the factor from one unit to the other; None if they measure different things."""
    if unit == expected or not unit or not expected:
        return Fraction(1)
    known, expected_known = measure(unit), measure(expected)
    if known and expected_known:
        return known[1] / expected_known[1] if known[0] == expected_known[0] else None
    if known or expected_known:
        return None
    words, expected_words = set(unit.split()), set(expected.split())
    return Fraction(1) if words <= expected_words or expected_words <= words else None


def measure(unit: str) -> tuple[tuple[str, str], Fraction] | None:
    """Return what `cm^2` or `km/h` measures, and the factor to base units; None for unknown units."""
    over, _, under = _SHORT.get(unit, unit).partition("/")
    if over not in _UNITS or (under and under not in _UNITS):
        return None
    (dimension, factor), (per, divisor) = _UNITS[over], _UNITS.get(under, ("", Fraction(1)))
    return (dimension, per), factor / divisor
