"""What one filter stage says about one row."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Verdict"]


@dataclass(frozen=True, slots=True)
class Verdict:
    """Keep the row or not. `reason` is short and is counted by the report; `score` is the number the stage compared with
    its threshold (None when it has none), which the report plots."""

    keep: bool
    reason: str = ""
    score: float | None = None
