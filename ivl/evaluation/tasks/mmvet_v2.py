"""MM-Vet v2: open questions, some about several pictures. Its own server scores a submission; here a judge may."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ivl.errors import InputError
from ivl.evaluation.data import PICTURES, literal
from ivl.evaluation.task import Example
from ivl.evaluation.tasks.mmvet import MmVet
from ivl.types import SamplingParams
from ivl.utils.strict_json import read_json

MARK = "<IMG>"


class MmVet2(MmVet):
    """Only the first picture and the text before it are asked, as InternVL's own code does."""

    def examples(self) -> Iterator[Example]:
        if self.given:
            yield from super().examples()
            return
        place = self.place()
        rows = read_json(place)
        whole = isinstance(rows, dict) and all(
            isinstance(row, dict) and {"question", "answer"} <= {*row} for row in rows.values()
        )
        if not whole:
            raise InputError(f"{place}: must hold questions by name, each with question and answer; {self.origin}")
        for name, row in rows.items():
            text, *pictures = str(row["question"]).split(MARK)
            shown = tuple(str(_folder(place) / picture.strip()) for picture in pictures[:1])
            kinds = {"category": ",".join(map(str, literal(row.get("capability", []))))}
            yield self.example({**row, **kinds, "index": name, "question": text.strip(), PICTURES: shown})

    def suffix(self, row: Mapping[str, Any]) -> str:
        return " Answer this question in detail."


def _folder(place: Path) -> Path:
    return place.parent / "images" if (place.parent / "images").is_dir() else place.parent


TASKS = (
    MmVet2(
        name="mmvet-v2", file="mm-vet-v2", about="open questions that combine capabilities", rows=517, judge="all",
        submission="map",
        metric="mean rating", params=SamplingParams(max_new_tokens=1000), columns={"capability": "category"},
    ),
)  # fmt: skip
