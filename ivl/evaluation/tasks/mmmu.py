"""MMMU and MMMU-Pro: questions of 30 college subjects, some of them without options."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from ivl.errors import InputError, short
from ivl.evaluation.data import options_of
from ivl.evaluation.prompts import LETTER, SHORT
from ivl.evaluation.scoring.options import last_option, option_behind
from ivl.evaluation.task import Example, Score
from ivl.evaluation.tasks.choice import Choice

FORMAT = (
    "The last line of your response should be of the following format: 'Answer: $LETTER' (without quotes) where LETTER is one "
    "of options."
)
DIRECT = "Answer with the option letter from the given choices directly."


class Mmmu(Choice):
    """The first picture is enlarged twice in both directions."""

    def pictures(self, row: Mapping[str, Any]) -> Sequence[str | bytes | Image.Image]:
        pictures = super().pictures(row)
        try:
            files = (io.BytesIO(each) if isinstance(each, bytes) else each for each in pictures[:1])
            first = [(file if isinstance(file, Image.Image) else Image.open(file)).convert("RGB") for file in files]
        except (OSError, ValueError, Image.DecompressionBombError) as error:
            raise InputError(f"a picture cannot be decoded ({short(str(error))})") from None
        return (*(each.resize((2 * each.width, 2 * each.height), Image.Resampling.BILINEAR) for each in first), *pictures[1:])

    def answers(self, row: Mapping[str, Any]) -> tuple[str, ...]:
        return () if self.submission and row.get("answer") == "?" else super().answers(row)  # as the hub's table hides them

    def budgets(self, pictures: int) -> list[int]:
        """Give the first picture all tiles and the others one, in the reference prompt."""
        return [self.tiles, *[1] * (pictures - 1)] if self.prompt == "reference" and pictures else super().budgets(pictures)

    def request(self, row: Mapping[str, Any]) -> str:
        return "\n" + (LETTER if options_of(row) else SHORT) if self.prompt == "reference" else super().request(row)


@dataclass(frozen=True, kw_only=True)
class MmmuPro(Mmmu):
    """Ten options. The prompts are those of InternVL's own code, from which the published scores come.

    VLMEvalKit's adapter asks these questions without their options; --defects repeats that.
    """

    vision: bool = False
    """The question is in the picture."""

    def question(self, row: Mapping[str, Any]) -> str:
        if self.defects:
            return str(row["question"])
        return "" if self.vision else super().question(row) + "\n"

    def request(self, row: Mapping[str, Any]) -> str:
        return "" if self.defects else f"{DIRECT} {FORMAT}" if self.vision else DIRECT

    def cot(self, published: str) -> str:
        first = "Answer the preceding multiple choice question."
        if self.vision:
            first = "Write out the multiple-choice question in the image and then solve it."
        asked = published.replace(DIRECT, "").replace(FORMAT, "").rstrip(" ")
        return f"{asked}{first} {FORMAT} Think step by step before answering."

    def answer_of(self, reply: str) -> str:
        return reply

    def read(self, text: str, example: Example, *, judged: bool = False) -> Score | None:
        """Read the letter behind the last `Answer:`, else by the parser of MMMU's authors."""
        options, truth = self.options(example)
        letter = None if judged else option_behind(text, "Answer:", options) or last_option(text, options, ("{} ", "{}."))
        return Score(value=float(letter == truth), answer=letter) if letter else super().read(text, example, judged=judged)


TASKS = (
    Mmmu(
        name="mmmu", file="MMMU_DEV_VAL", about="30 college subjects; the score is that of the split validation", rows=1050,
        md5="585e8ad75e73f75dcad265dfd0417d64", hub="MMMU/MMMU", tiles=12, headline="validation",
        columns={"subfield": "category"},
    ),
    Mmmu(
        name="mmmu-test", file="MMMU_TEST", about="the same, answers are hidden: makes a submission", rows=10500, tiles=12,
        submission="map", hub="MMMU/MMMU", columns={"subfield": "category"},
    ),
    MmmuPro(
        name="mmmu-pro", file="MMMU_Pro_10c", about="the same with ten options", rows=1730,
        md5="22cee868fe6b680d14b99bfff6db8172", hub="MMMU/MMMU_Pro", columns={"subject": "category"},
    ),
    MmmuPro(
        name="mmmu-pro-vision", file="MMMU_Pro_V", about="the same, the question written in the picture", rows=1730,
        vision=True, md5="d01441a87b3dbe721b5a04652ae38009", hub="MMMU/MMMU_Pro", columns={"subject": "category"},
    ),
)  # fmt: skip
