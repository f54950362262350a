"""The process in which formulas are compared. Run as a script by ivl.evaluation.scoring.symbolic; imports nothing of ivl.

Requests are JSON lines [truth, prediction] on stdin, answers JSON lines on stdout: true, false or null (given up). The
libraries are loaded once; a child forked from here does the work, so that one killed by its limits is replaced in milliseconds.
"""

from __future__ import annotations

import json
import logging
import os
import resource
import signal
import sys
from pathlib import Path

FORMULAS_TO_WARM_UP = (
    r"\frac{1}{2}",
    r"2\sqrt{3}",
    "x^2-1",
    "(1,2)",
    r"\{1,2\}",
    "y=2x+1",
    "2y=4x+2",
    r"x \ge 3",
    r"\sin(2\pi)",
)


def main() -> None:
    cpu_seconds, wall_seconds, megabytes = (float(argument) for argument in sys.argv[1:4])
    same = comparison()
    for formula in FORMULAS_TO_WARM_UP:
        same(formula, formula)
        same(formula, r"\sqrt{x}+1")
    requests, answers = sys.stdin.buffer, sys.stdout.buffer
    child: Child | None = None
    answers.write(b'"ready"\n')
    answers.flush()
    for line in requests:
        child = child or Child(same, cpu_seconds, wall_seconds, megabytes)
        if (answer := child.ask(line)) is None:
            child, answer = None, b"null\n"
        answers.write(answer)
        answers.flush()


def comparison():
    """truth, prediction -> whether they are the same formula."""
    from math_verify import parse, verify
    from math_verify.parser import LatexExtractionConfig, NormalizationConfig
    from sympy import Eq, I, simplify

    # The library's own time limits use the alarm signal, which this process needs; it says so at every call.
    logging.disable(logging.CRITICAL)
    # Not its rule for units, by which 2ab is 2 and 5 cm is 5 m.
    spelling = NormalizationConfig(
        basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="all", equations=False
    )
    config = [LatexExtractionConfig(boxed_match_priority=0, normalization_config=spelling)]

    def read(formula: str):
        found = parse(f"${formula}$", config, fallback_mode="no_fallback", parsing_timeout=None)  # type: ignore[arg-type]
        return [imaginary(each) for each in found if not isinstance(each, str)]

    def imaginary(formula):
        """An i among numbers is the imaginary unit."""
        symbols = getattr(formula, "free_symbols", ())
        return formula.subs(dict.fromkeys(symbols, I)) if {str(each) for each in symbols} == {"i"} else formula

    def same(truth: str, prediction: str) -> bool:
        meant, said = read(truth), read(prediction)
        if not meant or not said:
            return False
        return verify(meant, said, timeout_seconds=None) or same_equation(meant[0], said[0])

    def same_equation(a, b) -> bool:
        """y = 2x + 4 is 2y - 4x = 8."""
        if not isinstance(a, Eq) or not isinstance(b, Eq) or a.free_symbols != b.free_symbols:
            return False
        share = simplify((a.lhs - a.rhs) / (b.lhs - b.rhs))  # pyright: ignore[reportOperatorIssue]
        return share.is_number and share.is_finite is True and share != 0

    return same


class Child:
    """A fork that compares until it meets a limit. The kernel ends it: SIGPROF and SIGALRM kill by default, even while one
    operation on huge numbers never returns to Python."""

    def __init__(self, same, cpu_seconds: float, wall_seconds: float, megabytes: float) -> None:
        there, self._to = os.pipe()
        self._from, back = os.pipe()
        self.pid = os.fork()
        if self.pid:
            os.close(there)
            os.close(back)
            self._answers = os.fdopen(self._from, "rb")
            return
        os.close(self._to)
        os.close(self._from)
        try:
            _work(same, os.fdopen(there, "rb"), back, cpu_seconds, wall_seconds, int(megabytes * 2**20))
        finally:
            os._exit(0)

    def ask(self, line: bytes) -> bytes | None:
        """The answer, None if the child died over it."""
        try:
            os.write(self._to, line)
            answer = self._answers.readline()
        except BrokenPipeError:
            answer = b""
        if answer.endswith(b"\n"):
            return answer
        self.stop()
        return None

    def stop(self) -> None:
        os.close(self._to)
        self._answers.close()
        os.waitpid(self.pid, 0)


def _work(same, requests, answers: int, cpu_seconds: float, wall_seconds: float, room: int) -> None:
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    if sys.platform == "linux":
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + room, used + room))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for line in requests:
        signal.setitimer(signal.ITIMER_PROF, cpu_seconds)
        signal.setitimer(signal.ITIMER_REAL, wall_seconds)
        try:
            answer = same(*json.loads(line))
        except (MemoryError, RecursionError):
            return
        except Exception:  # whatever the libraries raise on a formula, it is not the same
            answer = False
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        os.write(answers, b"true\n" if answer else b"false\n")


if __name__ == "__main__":
    main()
