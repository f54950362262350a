"""Mathematical answers compared without a judge, by the rules of VLMEvalKit."""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ivl.evaluation.scoring.extraction import BOX, up_to_brace
from ivl.evaluation.scoring.formulas import ask, formula
from ivl.utils.killable import CallStopped

_CLOSE = 1e-6
_MOST_CHARACTERS, _MOST_BITS, _MOST_BOXES = 1000, 4096, 100
_OPERATIONS: dict[type, Callable[..., Any]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod, ast.Pow: operator.pow, ast.UAdd: operator.pos,
    ast.USub: operator.neg,
}  # fmt: skip
_SIGNS = (
    ("\\left", ""), ("\\right", ""), ("∶", ":"), ("，", ","), ("$", ""), ("\\approx", "="), ("\\simeq", "="), ("\\sim", "="),
    ("^\\prime", "'"), ("^{\\prime}", "'"), ("^\\circ", ""), ("%", ""),
)  # fmt: skip
_SPELLINGS = (("\\dfrac", "\\frac"), ("\\tfrac", "\\frac"), ("\\times", "\\cdot"))


def same_value(prediction: str, truth: str) -> bool:
    """Return whether two texts are equal but for case, or have the same value as arithmetic or as LaTeX without names."""
    given, expected = prediction.lower().strip(), truth.lower().strip()
    if given == expected:
        return True
    if max(len(given), len(expected)) > _MOST_CHARACTERS:
        return False
    if _close(arithmetic(given), arithmetic(expected)):
        return True
    if "%" in given + expected:  # the tool reads no percent signs
        return False
    read = [_Comparison().ask("value", text) for text in (given, expected)]
    left, right = (arithmetic(value[1]) if value else None for value in read)
    return _close(left, right)


def _close(left: complex | None, right: complex | None, tolerance: float = _CLOSE) -> bool:
    try:
        return left is not None and right is not None and abs(left - right) < tolerance
    except OverflowError:
        return False


def arithmetic(text: str) -> complex | None:
    """Return the value of numbers, signs, + - * / // % ** and parentheses, as Python reads them; None for anything else."""
    if len(text) > _MOST_CHARACTERS or not re.fullmatch(r"[\d\s.+*/%()eEjJ_-]+", text):
        return None
    try:
        return _computed(ast.parse(text.strip(), mode="eval").body)
    except (SyntaxError, ValueError, TypeError, ArithmeticError, RecursionError, MemoryError):
        return None


def _computed(node: ast.expr) -> Any:
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float | complex):
        return node.value
    if isinstance(node, ast.UnaryOp) and type(node.op) in _OPERATIONS:
        return _OPERATIONS[type(node.op)](_computed(node.operand))
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATIONS:
        left, right = _computed(node.left), _computed(node.right)
        exact = isinstance(node.op, ast.Pow) and isinstance(left, int) and isinstance(right, int)
        if exact and left.bit_length() * abs(right) > _MOST_BITS:
            raise OverflowError
        return _OPERATIONS[type(node.op)](left, right)
    raise ValueError


def same_answers(
    prediction: str, truth: str, precision: float | Sequence[float] = 1e-8, *, expressions_differ: bool = False
) -> bool:
    r"""Compare the answers in boxes, else in dollar signs on the last line, else the texts, in any order.

    Each answer of one side must match another of the other side as a text, an interval, a number (or a hundredth or a
    hundredfold of it), an expression or an equation. `\pm` makes two answers.

    Args:
        precision: Absolute tolerance of values, for all answers or for each of the prediction.
        expressions_differ: Let expressions match only where they are written alike, as the tool does since a step of its
            comparison is commented out.

    Returns:
        False also where formulas take too long or are too many.
    """
    given, expected = _answers_of(prediction), _answers_of(truth)
    if given is None or expected is None:
        return False
    if given == expected:
        return True
    items, unused = _items(given), _items(expected)
    tolerances = [precision] if isinstance(precision, int | float) else list(precision)
    if len(items) != len(unused) or not tolerances:
        return False
    comparison = _Comparison(alike=expressions_differ)
    for at, item in enumerate(items):
        comparison.tolerance = tolerances[min(at, len(tolerances) - 1)] * 1.01
        if (same := next((other for other in unused if comparison.same_item(item, other)), None)) is None:
            return False
        unused.remove(same)
    return True


def _answers_of(text: str) -> str | None:
    """Return the answers of a text, joined by commas, without decoration; None for a box left open."""
    starts = [match.end() for match in re.finditer(re.escape(BOX), text)]
    boxes = [up_to_brace(text[start:]) for start in starts[: _MOST_BOXES + 1]]
    if len(boxes) > _MOST_BOXES or None in boxes:
        return None
    if boxes:
        text = ",".join(box for box in boxes if box is not None)
    elif formulas := re.findall(r"\$(.*?)\$", text.strip().split("\n")[-1]):
        text = ",".join(formulas)
    if "\\in " in text:
        text = text.split("\\in ")[1]
    for sign, plain in _SIGNS:
        text = text.replace(sign, plain)
    return re.sub(r"\\(?:mathrm|mathbf)\{~?([^}]*)\}", r"\1", text.strip("\n,.:;^_=+`!@#$%&*~，。"))


def _items(text: str) -> list[str]:
    """Split at commas outside brackets, without Chinese characters, and write out plus or minus."""
    items, depth = [""], 0
    for character in re.sub("[\u4e00-\u9fff]+", "", text):
        depth += (character in "([") - (character in ")]")
        if character == "," and depth == 0:
            items.append("")
        else:
            items[-1] += character
    items = [item.strip() for item in (items if items[-1] else items[:-1])]
    return [signed for item in items for signed in dict.fromkeys(item.replace("\\pm", sign) for sign in "+-")]


@dataclass
class _Comparison:
    """Compares pairs of answers. Formulas are few in an answer, so that asking about many of them ends."""

    alike: bool = False
    tolerance: float = 0.0
    left: int = 30
    """Questions to the worker; a stopped one counts as fifteen."""

    def ask(self, operation: str, *formulas: str) -> Any:
        """Return the worker's answer; None if it has none in its limits."""
        try:
            self.left -= 1
            return ask(operation, *formulas) if self.left >= 0 else None
        except CallStopped:
            self.left -= 14
            return None

    def same_item(self, given: str, expected: str) -> bool:
        if given and given == expected:
            return True
        both = given, expected
        if max(map(len, both)) > _MOST_CHARACTERS:
            return False
        intervals = all(text.startswith(("(", "[")) and text.endswith((")", "]")) for text in both)
        if (intervals and self.same_interval(*both)) or self.same_number(*both):
            return True
        equations = ["=" in text for text in both]
        if not all(equations) and self.same_expression(*both):
            return True
        return all(text.count("=") == 1 for text in both) and bool(self.ask("multiple", *both))

    def same_number(self, given: str, expected: str) -> bool:
        try:
            number, truth = float(given), float(expected)
        except ValueError:
            return False
        return any(abs(reading - truth) <= self.tolerance for reading in (number / 100, number, number * 100))

    def same_interval(self, given: str, expected: str) -> bool:
        ones, others = given.split("\\cup"), expected.split("\\cup")
        pairs = list(zip(ones, others, strict=False))
        if len(ones) != len(others) or not all(a and b and (a[0], a[-1]) == (b[0], b[-1]) for a, b in pairs):
            return False
        ends = (zip(a.strip("[]()").split(","), b.strip("[]()").split(","), strict=False) for a, b in pairs)
        return all(self.same_expression(a, b) for pair in ends for a, b in pair)

    def same_expression(self, given: str, expected: str) -> bool:
        given, expected = (text.split("=")[1] if "=" in text else text for text in (given, expected))
        if (tokens := _tokens(given)) and tokens == _tokens(expected):
            return True
        if self.alike:
            return False
        read, meant = self.ask("value", given), self.ask("value", expected)
        if read and meant:
            return _close(read[0], meant[0], self.tolerance)
        a, b = formula(given), formula(expected)
        return bool(a and b and self.ask("same", b, a))


def _tokens(text: str) -> list[str]:
    for spelling, usual in _SPELLINGS:
        text = text.replace(spelling, usual)
    text = re.sub(r"\^\{(\w)\}", r"^\1", re.sub(r"\\frac(\d)(\d)", r"\\frac{\1}{\2}", text))
    return re.findall(r"\\[A-Za-z]+|[^\s\\]|\\(?![,;!: ])", re.sub(r"\\[,;!: ]", "", text).strip().removeprefix("+"))
