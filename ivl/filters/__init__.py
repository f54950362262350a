"""Filters for training data: named stages, each giving a verdict with a reason (arXiv:2412.05271, data filtering)."""

from ivl.filters.verdict import Verdict

__all__ = ["Verdict"]
