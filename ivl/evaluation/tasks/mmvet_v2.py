"""MM-Vet v2: open questions, some about several pictures. Its own server scores a submission; here a judge may."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ivl.evaluation.data import PICTURES
from ivl.evaluation.task import Example
from ivl.evaluation.tasks.mmvet import MmVet
from ivl.types import SamplingParams
from ivl.utils.strict_json import read_json

MARK = "<IMG>"


class MmVet2(MmVet):
    """Only the first picture and the text before it are asked, as InternVL's own code does."""

    def examples(self) -> Iterator[Example]:
        place = self.place()
        for name, row in read_json(place).items():
            text, picture, *_ = str(row["question"]).split(MARK)
            pictures = (str(_folder(place) / picture.strip()),)
            yield self.example({**row, "index": name, "question": text.strip(), PICTURES: pictures})

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
