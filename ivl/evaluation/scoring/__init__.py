"""What an answer is worth: metrics of benchmarks, answers taken out of replies, and whether they are right.

The lowest layer. Its import is light: rapidfuzz and math-verify (extra `eval`) are loaded where they are used.
"""

from ivl.evaluation.scoring.extraction import Extracted, Problem, Style, extract, fix_answer
from ivl.evaluation.scoring.metrics import (
    Box,
    anls,
    choice_letter,
    edit_distance,
    exact_match,
    iou,
    normalise,
    relaxed_accuracy,
    vqa_accuracy,
    wilson,
)
from ivl.evaluation.scoring.symbolic import COMPARER
from ivl.evaluation.scoring.verification import ACCEPT, Mode, correct, mode_for, verify

__all__ = [
    "ACCEPT",
    "COMPARER",
    "Box",
    "Extracted",
    "Mode",
    "Problem",
    "Style",
    "anls",
    "choice_letter",
    "correct",
    "edit_distance",
    "exact_match",
    "extract",
    "fix_answer",
    "iou",
    "mode_for",
    "normalise",
    "relaxed_accuracy",
    "verify",
    "vqa_accuracy",
    "wilson",
]
