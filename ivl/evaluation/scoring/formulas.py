"""Formulas compared by math-verify, in a process of their own with limits of time and memory."""

from __future__ import annotations

import importlib.util
import itertools
import logging
import re
from collections.abc import Callable
from typing import Any, cast

from ivl.errors import InputError
from ivl.evaluation.scoring.spelling import plain, without_left_side
from ivl.utils.killable import CallStopped, Killable

_MOST_CHARACTERS, _DEEPEST = 400, 40
_COMMANDS = {
    "π": "pi", "∞": "infty", "≤": "le", "≥": "ge", "≠": "ne", "±": "pm", "∓": "mp", "×": "times", "÷": "div", "·": "cdot",
    "⋅": "cdot", "θ": "theta", "α": "alpha", "β": "beta", "∪": "cup", "∩": "cap", "∈": "in", "∠": "angle", "∅": "emptyset",
}  # fmt: skip
_FUNCTIONS = "sin cos tan cot sec csc log ln exp lim max min mod pi arcsin arccos arctan sqrt infty inf gcd"
_WORDS = "am an as at be by do go he if in is it me my no of on or so to up us we"
_NAMES, _NO_PRODUCTS = set(_FUNCTIONS.split()), set(_WORDS.split())
_HOPELESS = re.compile(r"\d\d ?\^ ?[{(]? ?\d+ ?\^|\^ ?[{(]? ?\d+ ?\^ ?[{(]? ?\d+ ?\^|\d{4} ?!|! ?\) ?!")
"""Powers and factorials with more digits than can be written. Others that take too long meet the limits."""
_UNIT = re.compile(r"(?:(?<=[\d})π])|(?<=\\pi)) (?:mm|cm|dm|m|km|units?)(?:\^\{?[23]\}?)?$")


def same_formula(prediction: str, truth: str) -> bool | None:
    """Compare two formulas; None if one of them is no formula (`dog` is not d * o * g) or too large to be read.

    Raises:
        CallStopped: if the comparison met a limit, naming the formulas.
        InputError: if math-verify is not installed.
    """
    given, expected = formula(prediction), formula(truth)
    if given is None or expected is None:
        return None
    (left, right), (expected_left, expected_right) = without_left_side(given), without_left_side(expected)
    if bool(left) != bool(expected_left) and ("=" in given) != ("=" in expected):
        given, expected = right, expected_right
    if "".join(given.split()) == "".join(expected.split()):
        return True
    try:
        return bool(verified(expected, given))
    except CallStopped as limit:
        raise CallStopped(f"the comparison of '{expected[:80]}' and '{given[:80]}' took {limit}") from None


def verified(truth: str, prediction: str) -> bool:
    """Return whether math-verify finds a truth and a prediction the same."""
    return ask("same", truth, prediction)


def ask(operation: str, *formulas: str) -> Any:
    """Ask the worker for an operation: `same`, `value` or `multiple`, which are functions below.

    Raises:
        CallStopped: if it met a limit.
        InputError: if math-verify is not installed.
    """
    if importlib.util.find_spec("math_verify") is None:
        raise InputError('comparing formulas needs math-verify; install it with `pip install "ivl[eval]"`')
    return _worker(operation, *formulas)


_worker = Killable("ivl.evaluation.scoring.formulas:operations", cpu_seconds=1, wall_seconds=60, megabytes=512)
"""Only processor time decides, so that a busy machine does not."""


def operations() -> Callable[..., Any]:
    """Load math-verify and return a function of the name of an operation and formulas."""
    import latex2sympy2_extended
    import sympy
    from math_verify import parse, verify
    from math_verify.parser import LatexExtractionConfig, NormalizationConfig

    # The library's own time limits use the alarm signal and are off; it warns about that at every call.
    logging.disable(logging.CRITICAL)
    # Its rule for units is off, too: by it 2ab is 2 and 5 cm is 5 m.
    spelling = NormalizationConfig(
        basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="all", equations=False
    )
    config = [LatexExtractionConfig(boxed_match_priority=0, normalization_config=spelling)]
    latex, simplify = cast(Callable[[str], Any], latex2sympy2_extended.latex2sympy), cast(Callable[[Any], Any], sympy.simplify)

    def read(text: str) -> list[Any]:
        parts = parse(f"${text}$", config, fallback_mode="no_fallback", parsing_timeout=None)  # type: ignore[arg-type]
        return [imaginary(part) for part in parts if not isinstance(part, str)]

    def imaginary(part: Any) -> Any:
        """Take an i among numbers for the imaginary unit."""
        symbols = getattr(part, "free_symbols", ())
        return part.subs(dict.fromkeys(symbols, sympy.I)) if {str(symbol) for symbol in symbols} == {"i"} else part

    def same(truth: str, prediction: str) -> bool:
        expected, given = read(truth), read(prediction)
        return bool(expected and given and verify(expected, given, timeout_seconds=None))

    def value(text: str) -> tuple[complex, str]:
        """Return the value of LaTeX, and what sympy writes it as."""
        expression = latex(text)
        return complex(expression.evalf()), str(expression)

    def multiple(first: str, second: str) -> bool:
        """Return whether one equation is a whole multiple of the other."""
        left, right = (latex(a) - latex(b) for a, b in (text.split("=") for text in (first, second)))
        quotients = simplify(left / right), simplify(right / left)
        return any(bool(quotient.is_Integer) and quotient != 0 for quotient in quotients)

    def call(operation: str, *formulas: str) -> Any:
        try:
            return {"same": same, "value": value, "multiple": multiple}[operation](*formulas)
        except (MemoryError, RecursionError):
            raise
        except Exception:  # whatever the libraries raise on a formula, it is not the same and has no value
            return None

    # What the libraries load at first use would count against the first call.
    for text in (r"\frac{1}{2}", r"2\sqrt{3}", "x^2-1", "(1,2)", r"\{1,2\}", "y=2x+1", r"x \ge 3", r"\sin(2\pi)"):
        call("same", text, text)
        call("same", text, r"\sqrt{x}+1")
        call("value", text)
    call("multiple", "y=2x", "2y=4x")
    return call


def formula(text: str) -> str | None:
    """Write the text in LaTeX if it looks like a formula of reasonable size; None otherwise."""
    if len(text) > 4 * _MOST_CHARACTERS:
        return None
    text = _UNIT.sub("", plain(text).strip("$ ").rstrip("."))
    text = re.sub(r"√ ?(?:\(([^()]*)\)|\{([^{}]*)\}|(\d+|[a-zA-Z]))", r"\\sqrt{\1\2\3}", text)
    text = re.sub(r"(?<![\\a-zA-Z])(?:pi|sqrt)(?![a-zA-Z])", lambda match: "\\" + match[0], text)
    for character, command in _COMMANDS.items():
        text = text.replace(character, f"\\{command} ")
    text = text.replace("°", r"^{\circ}").replace(r"\varnothing", r"\emptyset ")
    if re.search(r"(?:sin|cos|tan|cot|sec|csc)(?![a-z])", text):
        text = re.sub(r"(\d+(?:\.\d+)?) ?\^\{\\circ\}", r"\\frac{\1\\pi}{180}", text)
    readable = text and len(text) <= _MOST_CHARACTERS and text.isprintable()
    return text if readable and _looks_like_one(text) else None


def _looks_like_one(text: str) -> bool:
    if re.fullmatch(r"\d+([-:]\d+)+", text) or re.search(r"(?<![_\d])\d+ \d", text) or _HOPELESS.search(text):
        return False
    if not re.search(r"[\d\\+*/^=<>_!|-]", text) and not re.fullmatch(r"[a-z]{1,2}", text):
        return False
    words = re.findall(r"[^\W\d_]+", re.sub(r"\\[a-zA-Z]+(\{[a-z*]+\})?", " ", text))
    if not all((len(word) <= 2 and word.isascii() and word not in _NO_PRODUCTS) or word.lower() in _NAMES for word in words):
        return False
    depths = itertools.accumulate((character in "{([") - (character in "})]") for character in text)
    return max(depths, default=0) <= _DEEPEST
