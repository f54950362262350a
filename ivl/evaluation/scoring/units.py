"""Units of measurement: which words name one, and the factor from one to another."""

from __future__ import annotations

import re
from fractions import Fraction

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
