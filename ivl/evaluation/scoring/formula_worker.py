"""The process that compares formulas with math-verify. `formulas` runs it as a script; it imports nothing of ivl.

Requests are JSON lines [truth, prediction] on standard input, answers are JSON lines on standard output: true, false, or null
for a comparison without enough memory. A comparison over its processor time ends the process.
"""

from __future__ import annotations

import json
import logging
import resource
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

WARM_UP = (r"\frac{1}{2}", r"2\sqrt{3}", "x^2-1", "(1,2)", r"\{1,2\}", "y=2x+1", r"x \ge 3", r"\sin(2\pi)")


def main() -> None:
    """Answer requests until standard input ends. Arguments: seconds of processor time, megabytes."""
    cpu_seconds, megabytes = float(sys.argv[1]), float(sys.argv[2])
    same = comparison()
    for formula in WARM_UP:  # loads what the libraries load at first use, which would count against the first comparison
        same(formula, formula)
        same(formula, r"\sqrt{x}+1")
    _limit_memory(megabytes)
    answer: bool | str | None = "ready"
    while True:
        print(json.dumps(answer), flush=True)
        if answer is None or not (line := sys.stdin.readline()):
            return
        # The kernel ends the process: one operation on huge numbers may never return to Python.
        signal.setitimer(signal.ITIMER_PROF, cpu_seconds)
        try:
            answer = bool(same(*json.loads(line)))
        except (MemoryError, RecursionError):
            answer = None
        except Exception:  # whatever the libraries raise on a formula, it is not the same
            answer = False
        signal.setitimer(signal.ITIMER_PROF, 0)


def _limit_memory(megabytes: float) -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform == "linux":
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        limit = used + int(megabytes * 2**20)
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def comparison() -> Callable[[str, str], Any]:
    """Load math-verify and return a function (truth, prediction) -> whether they are the same formula."""
    from math_verify import parse, verify
    from math_verify.parser import LatexExtractionConfig, NormalizationConfig
    from sympy import I

    # The library's own time limits use the alarm signal and are off; it warns about that at every call.
    logging.disable(logging.CRITICAL)
    # Its rule for units is off, too: by it 2ab is 2 and 5 cm is 5 m.
    spelling = NormalizationConfig(
        basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="all", equations=False
    )
    config = [LatexExtractionConfig(boxed_match_priority=0, normalization_config=spelling)]

    def read(formula: str) -> list[Any]:
        parts = parse(f"${formula}$", config, fallback_mode="no_fallback", parsing_timeout=None)  # type: ignore[arg-type]
        return [imaginary(part) for part in parts if not isinstance(part, str)]

    def imaginary(formula: Any) -> Any:
        """Take an i among numbers for the imaginary unit."""
        symbols = getattr(formula, "free_symbols", ())
        return formula.subs(dict.fromkeys(symbols, I)) if {str(symbol) for symbol in symbols} == {"i"} else formula

    def same(truth: str, prediction: str) -> Any:
        expected, given = read(truth), read(prediction)
        if not expected or not given:
            return False
        return verify(expected, given, timeout_seconds=None)

    return same


if __name__ == "__main__":
    main()
