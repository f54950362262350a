"""Answers taken out of replies, and whether they are right.

The import is light: rapidfuzz and math-verify (extra `eval`) are loaded where they are used.
"""

from ivl.evaluation.scoring.extraction import AnswerStyle, extract, fix_answer
from ivl.evaluation.scoring.metrics import anls, exact_match, normalize, summary, wilson
from ivl.evaluation.scoring.verification import AnswerMode, compare, mode_for

__all__ = [
    "AnswerMode", "AnswerStyle", "anls", "compare", "exact_match", "extract", "fix_answer", "mode_for", "normalize", "summary",
    "wilson",
]  # fmt: skip
