"""Formulas compared by math-verify, in a process of their own with limits of time and memory."""

from __future__ import annotations

import atexit
import importlib.util
import json
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

from ivl.errors import InputError
from ivl.evaluation.scoring.spelling import plain, without_left_side

CPU_SECONDS, WALL_SECONDS, MEGABYTES = 0.3, 0.7, 512
"""Of one comparison. Processor time ends it first, so that a verdict hardly depends on how busy the machine is."""
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
"""Powers and factorials with more digits than can be written. What gets past this meets the limits."""
_UNIT = re.compile(r"(?:(?<=[\d})π])|(?<=\\pi)) (?:mm|cm|dm|m|km|units?)(?:\^\{?[23]\}?)?$")


class Comparer:
    """A worker process that is started at the first comparison and again when it is lost; safe to use from threads and after
    a fork. The start takes about a second; a comparison at most WALL_SECONDS."""

    def __init__(self) -> None:
        self.given_up = 0
        """Comparisons that met a limit; they count as different."""
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = 0
        self._lock = threading.Lock()
        os.register_at_fork(after_in_child=self._forget)

    def same(self, prediction: str, truth: str) -> bool:
        """Whether two LaTeX formulas are equal as math-verify sees it.

        Raises:
            InputError: if math-verify is not installed.
        """
        with self._lock:
            request = json.dumps([truth, prediction]).encode() + b"\n"
            answer = self._ask(request) or self._ask(request)
            if answer not in (b"true\n", b"false\n"):
                self.given_up += 1
            return answer == b"true\n"

    def start(self) -> None:
        """Start now rather than at the first comparison.

        Raises:
            InputError: if math-verify is not installed, or its process does not start.
        """
        with self._lock:
            self._started()

    def close(self) -> None:
        process, self._process = self._process, None
        if process is not None and self._owner == os.getpid():
            process.stdin.close()  # type: ignore[union-attr]
            process.stdout.close()  # type: ignore[union-attr]
            process.wait()

    def _ask(self, request: bytes) -> bytes:
        process = self._started()
        try:
            process.stdin.write(request)  # type: ignore[union-attr]
            process.stdin.flush()  # type: ignore[union-attr]
            answer = process.stdout.readline()  # type: ignore[union-attr]
        except BrokenPipeError:
            answer = b""
        if not answer.endswith(b"\n"):
            process.kill()
            process.wait()
            self._process = None
        return answer

    def _started(self) -> subprocess.Popen[bytes]:
        if self._process is None or self._process.poll() is not None:
            if importlib.util.find_spec("math_verify") is None:
                raise InputError('comparing formulas needs math-verify; install it with `pip install "ivl[eval]"`')
            worker = Path(__file__).with_name("symbolic_worker.py")
            limits = [str(CPU_SECONDS), str(WALL_SECONDS), str(MEGABYTES)]
            # -P: the worker's directory must not come before the libraries.
            self._process = subprocess.Popen(
                [sys.executable, "-P", str(worker), *limits],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True,
            )  # fmt: skip
            self._owner = os.getpid()
            if self._process.stdout.readline() != b'"ready"\n':  # type: ignore[union-attr]
                raise InputError("math-verify does not start; `python -c 'import math_verify'` shows why")
        return self._process

    def _forget(self) -> None:
        """After a fork the worker is the parent's, and the lock may be held by a thread that is not here."""
        self._process, self._lock = None, threading.Lock()


COMPARER = Comparer()
atexit.register(COMPARER.close)


def same_formula(prediction: str, truth: str) -> bool | None:
    """Whether two formulas are equal; None if one of them is no formula (`dog` is not d * o * g) or too large to be read.

    Raises:
        InputError: if math-verify is not installed.
    """
    said, meant = formula(prediction), formula(truth)
    if said is None or meant is None:
        return None
    (left, _), (expected_left, _) = without_left_side(said), without_left_side(meant)
    if bool(left) != bool(expected_left) and ("=" in said) != ("=" in meant):
        said, meant = without_left_side(said)[1], without_left_side(meant)[1]
    return "".join(said.split()) == "".join(meant.split()) or COMPARER.same(said, meant)


def formula(text: str) -> str | None:
    """The text in LaTeX if it looks like a formula of reasonable size, else None."""
    if len(text) > 4 * _MOST_CHARACTERS:
        return None
    text = _UNIT.sub("", plain(text).strip("$ ").rstrip("."))
    text = re.sub(r"√ ?(\d+|[a-zA-Z]|\{[^{}]*\})", lambda found: r"\sqrt{" + found[1].strip("{}") + "}", text)
    text = re.sub(r"√ ?\(([^()]*)\)", r"\\sqrt{\1}", text)
    text = re.sub(r"(?<![\\a-zA-Z])(?:pi|sqrt)(?![a-zA-Z])", lambda found: "\\" + found[0], text)
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
    deepest = depth = 0
    for character in text:
        depth += (character in "{([") - (character in "})]")
        deepest = max(deepest, depth)
    return deepest <= _DEEPEST
