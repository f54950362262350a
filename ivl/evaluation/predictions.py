"""The file of predictions: a first line that says what they depend on, and a line for each, saved as they come."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ivl.errors import InputError, short
from ivl.evaluation.voting import Candidate
from ivl.utils.jsonl import AppendLog
from ivl.utils.strict_json import from_json

FORMAT = "predictions 2"
"""The first value of every file; a file without it is never changed."""
OPTIONAL = frozenset(("samples", "read", "cluster"))
"""Keys that are left out of a line where they hold nothing."""
REMEDY = "--fresh forgets them, --predictions names another file"


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """One line of a predictions file."""

    id: str
    asked: str
    """Hash of the question and of its answers."""
    group: str
    answers: tuple[str, ...]
    prediction: str
    """The reply that counts."""
    score: float
    samples: tuple[Candidate, ...] = ()
    """All replies, where the method notes more than the text of one."""
    read: str = ""
    """What the extractor read in the answer."""
    cluster: str = ""


def beside(predictions: Path, kind: str) -> Path:
    """Return the path of another file of the same run, such as `NAME.scores.jsonl`."""
    return predictions.with_name(predictions.name.removesuffix(".jsonl").removesuffix(".predictions") + f".{kind}")


class PredictionsFile:
    """A file of predictions that belongs to one process at a time, and that a later run continues.

    Args:
        about: What the predictions depend on; objects may be nested.
        fresh: Forget what the file holds.

    Raises:
        InputError: if another process writes the file, it is no predictions file, or it holds predictions of something else.
    """

    def __init__(self, path: Path, about: dict[str, Any], *, fresh: bool = False) -> None:
        self.saved: list[Prediction] = []
        header = {"ivl": FORMAT, **about}

        def take(number: int, row: dict[str, Any]) -> bool:
            if number == 1:
                _check_header(path, row, header, fresh=fresh)
            else:
                self.saved.append(from_json(Prediction, row, f"{path}:{number}"))
            return not fresh

        self._log = AppendLog(path)
        if not self._log.resume(f'{{"ivl": "{FORMAT}"'.encode(), take, REMEDY):
            self._log.append([header])
            self._log.sync()

    def append(self, predictions: list[Prediction]) -> None:
        """Save predictions; they are on disk when this returns."""
        rows = (asdict(prediction) for prediction in predictions)
        self._log.append({key: value for key, value in row.items() if key not in OPTIONAL or value} for row in rows)
        self._log.sync()

    def __enter__(self) -> PredictionsFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._log.close()


def _check_header(path: Path, row: dict[str, Any], header: dict[str, Any], *, fresh: bool) -> None:
    if row.get("ivl") != FORMAT:
        raise InputError(f"{path}: is no file of predictions, or one of an older ivl; name another with --predictions")
    saved, expected = dict(_flat(row)), dict(_flat(header))
    for key in {**expected, **saved}:
        if not fresh and saved.get(key) != expected.get(key):
            values = f"{short(saved.get(key))}, this run has {short(expected.get(key))}"
            raise InputError(f"{path}: holds predictions with {key} {values}; {REMEDY}")


def _flat(value: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the values of nested objects with their keys, as `params.temperature`."""
    for key, inner in value.items():
        if isinstance(inner, dict):
            yield from _flat(inner, f"{prefix}{key}.")
        else:
            yield prefix + key, list(inner) if isinstance(inner, tuple) else inner
