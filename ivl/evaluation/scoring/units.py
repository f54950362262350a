"""Units of measure, and words for what is counted."""

from __future__ import annotations

import re
from fractions import Fraction

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
            for name in names:
                units[name] = units[name + "s"] = dimension, Fraction(factor)
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
    """The unit in one spelling; empty for no unit, None for what is none. Unknown words count as what is counted."""
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
    """What turns one unit into the other; None if they differ."""
    if unit == expected or not unit or not expected:
        return Fraction(1)
    known, expected_known = measure(unit), measure(expected)
    if known and expected_known:
        return known[1] / expected_known[1] if known[0] == expected_known[0] else None
    if known or expected_known:
        return None
    said, meant = set(unit.split()), set(expected.split())
    return Fraction(1) if said <= meant or meant <= said else None


def measure(unit: str) -> tuple[tuple[tuple[str, int], ...], Fraction] | None:
    """Dimensions with their powers and the factor to base units, of `cm^2` or `km/h`; None for what is not known."""
    dimensions: dict[str, int] = {}
    total = Fraction(1)
    for place, part in enumerate(_SHORT.get(unit, unit).split("/")):
        base, _, power = part.partition("^")
        if base not in _UNITS or power not in ("", "2", "3"):
            return None
        signed = int(power or 1) * (-1 if place else 1)
        dimension, factor = _UNITS[base]
        dimensions[dimension] = dimensions.get(dimension, 0) + signed
        total *= factor**signed
    return tuple(sorted(dimensions.items())), total
