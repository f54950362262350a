"""Open questions whose replies a judge rates: MM-Vet, MM-Vet v2, MMHal-Bench and CharXiv."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ivl.evaluation.benchmark import Benchmark
from ivl.evaluation.data import PICTURES, found, literal
from ivl.evaluation.figures import Figure, Figures, mean, points
from ivl.evaluation.prompts import SHORT
from ivl.evaluation.task import Example, JudgeQuestion, Score, Scored
from ivl.types import SamplingParams


@dataclass(frozen=True, kw_only=True)
class Rated(Benchmark):
    """The mean rating."""

    judge: Literal["", "some", "all"] = "all"
    metric: str = "mean rating"
    rule: Callable[[str], float | None]
    """The rating in what the judge says; None where it has none."""

    def read(self, text: str, example: Example, *, judged: bool = False) -> Score | None:
        """Leave the rating to the judge."""
        rating = self.rule(text) if judged else None
        return None if rating is None else Score(value=rating, answer=f"{rating:g}")

    def figure(self, scored: Sequence[Scored]) -> Figure:
        return mean(scored) if self.most == 1 else points(mean(scored))


class MmVet(Rated):
    """A question counts for each of its capabilities, and for their combination."""

    def prepared(self, row: dict[str, Any]) -> dict[str, Any]:
        return row | {"category": ",".join(map(str, literal(row.get("category", []))))}  # the releases have a list

    def text(self, row: Mapping[str, Any]) -> str:
        return self.question(row) if self.prompt == "mpo" else super().text(row)

    def told(self, text: str, example: Example) -> dict[str, str]:
        truth = example.truth.replace("<AND>", " <AND> ").replace("<OR>", " <OR> ")
        return super().told(text, example) | {"truth": truth}

    def categories_of(self, row: Mapping[str, Any]) -> list[list[str]]:
        # VLMEvalKit keeps capabilities and combinations in one table, and counts a question of one capability twice in it.
        combination, only = str(row.get("category", "")), "" if self.defects else "only "
        return [[*combination.split(","), only + combination.replace(",", "_")] if combination else []]


class MmVet2(MmVet):
    """Only the first picture and the text before it are asked, as InternVL's own code does. Its server scores a submission."""

    def prepared(self, row: dict[str, Any]) -> dict[str, Any]:
        text, *pictures = str(row["question"]).split("<IMG>")
        shown = tuple(found(picture.strip(), self.place(), "images") for picture in pictures[:1])
        return super().prepared(row) | {"question": text.strip(), PICTURES: row[PICTURES] or shown}


class MmHal(Rated):
    """The rating is at least 3 for a reply without hallucination, whose share is a figure, too."""

    def told(self, text: str, example: Example) -> dict[str, str]:
        return super().told(text, example) | {"contents": ", ".join(map(str, literal(example.row["image_content"])))}

    def figures(self, scored: Sequence[Scored]) -> Figures:
        overall, *kinds = super().figures(scored).items()
        return dict([overall, ("hallucination rate", mean(scored, lambda s: s.score.value < 3)), *kinds])


def _share(reply: str) -> float | None:
    try:
        value = float(reply)
    except ValueError:
        return None
    return value if 0 <= value <= 1 else None


def _only_rating(reply: str) -> float | None:
    numbers = {float(number) for number in re.findall(r"rating: ([0-6])", reply.lower())}
    return numbers.pop() if len(numbers) == 1 else None


DESCRIPTIVE = {
    "information extraction": (1, 2, 3, 4, 5, 6, 7), "enumeration": (8, 9, 13, 14, 15), "pattern recognition": (11, 16, 18),
    "counting": (10, 12, 19), "compositionality": (17,),
}  # fmt: skip
REASONING = {"text-in-chart": (1,), "text-in-general": (2,), "number-in-chart": (3,), "number-in-general": (4,)}


class CharXiv(Benchmark):
    """Charts of papers. The judge gets instructions that the rows hold, and says whether a reply is right."""

    def categories_of(self, row: Mapping[str, Any]) -> list[list[str]]:
        reasoning = row.get("inst_category") is not None
        number = int(float(row["inst_category" if reasoning else "qid"]))
        kinds = REASONING if reasoning else DESCRIPTIVE
        return [[next((name for name, numbers in kinds.items() if number in numbers), "other")]]

    def to_judge(self, text: str, example: Example) -> JudgeQuestion:
        prompt = str(example.row["grading_query"]).replace("{PREDICTION}", text)
        return JudgeQuestion(
            prompt=prompt, read=_verdict, best=Score(value=1.0), tries=10, warmer=0.0, max_new_tokens=256,
        )  # fmt: skip


def _verdict(said: str) -> Score | None:
    try:
        found = json.loads(said[said.index("{") : said.rindex("}") + 1])
        return Score(value=float(found["score"] == 1), answer=str(found["extracted_answer"]))
    except KeyError:  # the tool counts such a reply as wrong at once
        return Score()
    except (ValueError, RecursionError):
        return None


TASKS = (
    MmVet(
        name="mmvet", file="MMVet", about="open questions that combine capabilities", rows=218, rule=_share, template="mmvet",
        md5="748aa6d4aa9d4de798306a63718455e3", hub="lmms-lab/MMVet",
        columns={"capability": "category", "question_id": "index", "imagename": "image"},
        official="counts replies that its judge gave no number as 0",
    ),
    MmVet2(
        name="mmvet-v2", file="mm-vet-v2", about="open questions that combine capabilities, some about several pictures",
        rows=517, rule=_share, template="mmvet", submission="map", params=SamplingParams(max_new_tokens=1000),
        ending=" Answer this question in detail.", columns={"capability": "category"},
        official="counts replies that its judge gave no number as 0",
    ),
    MmHal(
        name="mmhal", file="mmhal-bench_with_image", rows=96, metric="mean rating, 0 to 6", rule=_only_rating, most=6,
        about="questions of eight kinds that tempt to tell of what is not there", template="mmhal",
        columns={"gt_answer": "answer"}, categories=("question_type",), params=SamplingParams(max_new_tokens=1024),
        official="counts replies without one rating as 0",
    ),
    CharXiv(
        name="charxiv-descriptive", file="CharXiv_descriptive_val", about="four questions of 19 kinds about each chart",
        rows=4000, md5="8507c3740f8ddaedcb6b5c1cfcb3fa06", judge="all", ending=f"\n{SHORT}",
    ),
    CharXiv(
        name="charxiv-reasoning", file="CharXiv_reasoning_val", about="a question that needs reasoning about each chart",
        rows=1000, md5="6fc1a522ad32c2e3d72a89857b8cf10b", judge="all", ending=f"\n{SHORT}",
    ),
)  # fmt: skip
