"""Answers taken out of replies, and whether they are right.

The import is light: rapidfuzz and math-verify (extra `eval`) are loaded where they are used.
"""

from ivl.evaluation.scoring.extraction import AnswerStyle, Extracted, FormatProblem, extract, fix_answer
from ivl.evaluation.scoring.metrics import anls, edit_distance, exact_match, normalize, summary, wilson
from ivl.evaluation.scoring.verification import ACCEPT, AnswerMode, AnswerVerdict, compare, correct, mode_for, verify

__all__ = [
    "ACCEPT",
    "AnswerMode",
    "AnswerStyle",
    "AnswerVerdict",
    "Extracted",
    "FormatProblem",
    "anls",
    "compare",
    "correct",
    "edit_distance",
    "exact_match",
    "extract",
    "fix_answer",
    "mode_for",
    "normalize",
    "summary",
    "verify",
    "wilson",
]
