"""Formulas compared by math-verify, in a process of their own with limits of time and memory."""

from __future__ import annotations

import atexit
import functools
import importlib.util
import itertools
import json
import os
import re
import select
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import IO, cast

from ivl.errors import InputError
from ivl.evaluation.scoring.spelling import plain, without_left_side

CPU_SECONDS, WALL_SECONDS, MEGABYTES = 0.3, 2.0, 512
"""Limits of one comparison. Processor time ends it first, so that a verdict hardly depends on how busy the machine is."""
_MOST_CHARACTERS, _DEEPEST = 400, 40

_COMMANDS = {
    "π": r"\pi ", "∞": r"\infty ", "≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ", "±": r"\pm ", "∓": r"\mp ", "×": r"\times ",
    "÷": r"\div ", "·": r"\cdot ", "⋅": r"\cdot ", "°": r"^{\circ}", "θ": r"\theta ", "α": r"\alpha ", "β": r"\beta ",
    "∪": r"\cup ", "∩": r"\cap ", "∈": r"\in ", "∠": r"\angle ",
    "∅": r"\emptyset ", r"\varnothing": r"\emptyset ",
}  # fmt: skip
_FUNCTIONS = "sin cos tan cot sec csc log ln exp lim max min mod pi arcsin arccos arctan sqrt infty inf gcd"
_WORDS = "am an as at be by do go he if in is it me my no of on or so to up us we"
_NAMES, _NO_PRODUCTS = set(_FUNCTIONS.split()), set(_WORDS.split())
_HOPELESS = re.compile(r"\d\d ?\^ ?[{(]? ?\d+ ?\^|\^ ?[{(]? ?\d+ ?\^ ?[{(]? ?\d+ ?\^|\d{4} ?!|! ?\) ?!")
"""Powers and factorials with more digits than can be written. Others that take too long meet the limits."""
_UNIT = re.compile(r"(?:(?<=[\d})π])|(?<=\\pi)) (?:mm|cm|dm|m|km|units?)(?:\^\{?[23]\}?)?$")


class ComparisonStopped(Exception):
    """A comparison of formulas met a limit of time or memory."""


class FormulaComparer:
    """Compares formulas in a worker process, which is replaced when a limit ends it; safe to use from threads and after a fork.

    Args:
        cpu_seconds: Processor time of one comparison.
        wall_seconds: Time of one comparison.
        megabytes: Memory of one comparison, on Linux.
    """

    def __init__(
        self, *, cpu_seconds: float = CPU_SECONDS, wall_seconds: float = WALL_SECONDS, megabytes: float = MEGABYTES
    ) -> None:
        self.wall_seconds = wall_seconds
        worker = Path(__file__).with_name("formula_worker.py")
        # -P: the worker's directory must not come before the libraries.
        self._command = [sys.executable, "-P", str(worker), str(cpu_seconds), str(megabytes)]
        self._process: subprocess.Popen[str] | None = None
        self._lock = threading.Lock()
        os.register_at_fork(after_in_child=self._forget)
        atexit.register(self.close)

    def same(self, prediction: str, truth: str) -> bool:
        """Compare two LaTeX formulas as math-verify does.

        Raises:
            ComparisonStopped: if the comparison met a limit.
            InputError: if math-verify is not installed, or its process does not start.
        """
        request = json.dumps([truth, prediction]) + "\n"
        with self._lock:
            for _ in range(2):  # a worker that was lost since the last comparison is replaced once
                process = self._started()
                answer = self._ask(process, request)
                if answer in ("true\n", "false\n"):
                    return answer == "true\n"
                process.kill()
                if process.wait() == -signal.SIGPROF or answer != "":
                    break
            raise ComparisonStopped(f"the comparison of '{truth[:80]}' and '{prediction[:80]}' met a limit")

    def close(self) -> None:
        """End the worker."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()

    def _ask(self, process: subprocess.Popen[str], request: str) -> str | None:
        """Return the answer's line; an empty one if the worker is gone, None if it takes too long."""
        try:
            cast(IO[str], process.stdin).write(request)
            cast(IO[str], process.stdin).flush()
        except BrokenPipeError:
            return ""
        output = cast(IO[str], process.stdout)
        return output.readline() if select.select([output], [], [], self.wall_seconds)[0] else None

    def _started(self) -> subprocess.Popen[str]:
        if self._process is not None and self._process.poll() is None:
            return self._process
        if importlib.util.find_spec("math_verify") is None:
            raise InputError('comparing formulas needs math-verify; install it with `pip install "ivl[eval]"`')
        self._process = subprocess.Popen(
            self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
            start_new_session=True,
        )  # fmt: skip
        if cast(IO[str], self._process.stdout).readline() != '"ready"\n':
            raise InputError("math-verify does not start; `python -c 'import math_verify'` shows why")
        return self._process

    def _forget(self) -> None:
        """After a fork the worker is the parent's, and a thread that is not here may hold the lock."""
        self._process, self._lock = None, threading.Lock()


@functools.cache
def shared_comparer() -> FormulaComparer:
    """Return the comparer that the whole process uses."""
    return FormulaComparer()


def same_formula(prediction: str, truth: str) -> bool | None:
    """Compare two formulas; None if one of them is no formula (`dog` is not d * o * g) or too large to be read.

    Raises:
        ComparisonStopped, InputError: as `FormulaComparer.same`.
    """
    given, expected = formula(prediction), formula(truth)
    if given is None or expected is None:
        return None
    (left, right), (expected_left, expected_right) = without_left_side(given), without_left_side(expected)
    if bool(left) != bool(expected_left) and ("=" in given) != ("=" in expected):
        given, expected = right, expected_right
    return "".join(given.split()) == "".join(expected.split()) or shared_comparer().same(given, expected)


def formula(text: str) -> str | None:
    """Write the text in LaTeX if it looks like a formula of reasonable size; None otherwise."""
    if len(text) > 4 * _MOST_CHARACTERS:
        return None
    text = _UNIT.sub("", plain(text).strip("$ ").rstrip("."))
    text = re.sub(r"√ ?(\d+|[a-zA-Z]|\{[^{}]*\})", lambda match: r"\sqrt{" + match[1].strip("{}") + "}", text)
    text = re.sub(r"√ ?\(([^()]*)\)", r"\\sqrt{\1}", text)
    text = re.sub(r"(?<![\\a-zA-Z])(?:pi|sqrt)(?![a-zA-Z])", lambda match: "\\" + match[0], text)
    for character, command in _COMMANDS.items():
        text = text.replace(character, command)
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
