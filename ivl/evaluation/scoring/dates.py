"""Days, months and times of day, in the spellings of documents."""

from __future__ import annotations

import re
from datetime import date

from ivl.evaluation.scoring.quantities import chinese_integer
from ivl.evaluation.scoring.spelling import bare

_MONTHS = "january february march april may june july august september october november december"
_NAMES = {name[: length or None]: n for length in (0, 3) for n, name in enumerate(_MONTHS.split(), 1)} | {"sept": 9}
_MONTH = "(?P<name>" + "|".join(sorted(_NAMES, key=len, reverse=True)) + r")\.?"
_DAY, _YEAR = r"(?P<day>\d{1,2})(?:st|nd|rd|th)?", r"(?P<year>\d{4})"
_WRITTEN = [
    re.compile(rf"{_MONTH} {_DAY}(?:,? {_YEAR})?"),
    re.compile(rf"{_DAY} (?:of )?{_MONTH}(?:,? {_YEAR})?"),
    re.compile(rf"{_DAY}-{_MONTH}-{_YEAR}"),
    re.compile(rf"{_MONTH},? {_YEAR}"),
    re.compile(r"(?P<year>\d{4})(?P<mark>[-/.])(?P<month>\d{1,2})(?P=mark)(?P<day>\d{1,2})"),
    re.compile(r"(?P<year>\d{4})[-/](?P<month>\d{1,2})"),
    re.compile(r"(?:(?P<year>\d{4})年)?(?P<month>\d{1,2})月(?:(?P<day>\d{1,2})[日号]?)?"),
]
_IN_FIGURES = re.compile(r"(\d{1,2})([-/.])(\d{1,2})\2(\d{4}|\d{2})")
_TIME = re.compile(r"(\d{1,2}):(\d{2})(?::(\d{2}))?(?: ?([ap])\.?m\.?)?")

Day = tuple[int | None, int, int | None]
"""Year, month and day; None is not said."""


def days(text: str) -> dict[str, Day]:
    """The day a text names, by the order it is read in: `any`, or, for figures such as 05/03/2018, `dmy` and `mdy`; else {}."""
    text = bare(text).lower()
    if len(text) > 60:
        return {}
    text = re.sub("[零〇一二三四五六七八九十]{1,4}(?=[年月日号])", lambda found: str(chinese_integer(found[0])), text)
    text = re.sub(r"^(?:mon|tues|wednes|thurs|fri|satur|sun)day,? |^the |^on ", "", text).removeprefix("the ")
    for pattern in _WRITTEN:
        if found := pattern.fullmatch(text):
            part = found.groupdict()
            month = int(part["month"]) if part.get("month") else _NAMES[part["name"]]
            day = _day(part.get("year"), month, part.get("day"))
            return {"any": day} if day else {}
    if found := _IN_FIGURES.fullmatch(text):
        first, _, second, year = found.groups()
        year = year if len(year) == 4 else f"20{year}" if int(year) < 70 else f"19{year}"
        readings = {"dmy": _day(year, int(second), first), "mdy": _day(year, int(first), second)}
        return {order: day for order, day in readings.items() if day}
    return {}


def _day(year: str | None, month: int, day: str | None) -> Day | None:
    try:
        date(int(year or 2000), month, int(day or 1))
    except ValueError:
        return None
    return (int(year) if year else None, month, int(day) if day else None)


def same_day(prediction: str, truth: str) -> bool | None:
    """None unless both are days. Figures are read in the same order on both sides."""
    said, meant = days(prediction), days(truth)
    if not said or not meant:
        return None
    return any(a == b and (x == y or "any" in (x, y)) for x, a in said.items() for y, b in meant.items())


def same_time(prediction: str, truth: str) -> bool | None:
    """None unless both are times of day; a missing am or pm is understood."""
    said, meant = (_TIME.fullmatch(bare(text).lower()) for text in (prediction, truth))
    if not said or not meant:
        return None
    return bool(_seconds(said, meant[4]) & _seconds(meant, said[4]))


def _seconds(found: re.Match[str], other_half: str | None) -> set[int]:
    hour, minute, second = int(found[1]), int(found[2]), int(found[3] or 0)
    if hour > 24 or minute > 59 or second > 59:
        return set()
    if found[4]:
        hour = hour % 12 + (12 if found[4] == "p" else 0)
    hours = {hour} if found[4] or not other_half or hour > 12 else {hour % 12 + (12 if other_half == "p" else 0)}
    return {hour * 3600 + minute * 60 + second for hour in hours}
