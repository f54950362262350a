"""CharXiv: charts of papers. A judge grades replies by instructions that the rows hold."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from ivl.evaluation.benchmark import Benchmark
from ivl.evaluation.prompts import SHORT
from ivl.evaluation.task import Example, JudgeQuestion, Score

DESCRIPTIVE = {
    "information extraction": (1, 2, 3, 4, 5, 6, 7), "enumeration": (8, 9, 13, 14, 15), "pattern recognition": (11, 16, 18),
    "counting": (10, 12, 19), "compositionality": (17,),
}  # fmt: skip
REASONING = {"text-in-chart": (1,), "text-in-general": (2,), "number-in-chart": (3,), "number-in-general": (4,)}


class CharXiv(Benchmark):
    """The share of right replies."""

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
    CharXiv(
        name="charxiv-descriptive", file="CharXiv_descriptive_val", about="four questions of 19 kinds about each chart",
        rows=4000, md5="8507c3740f8ddaedcb6b5c1cfcb3fa06", judge="all", ending=f"\n{SHORT}",
    ),
    CharXiv(
        name="charxiv-reasoning", file="CharXiv_reasoning_val", about="a question that needs reasoning about each chart",
        rows=1000, md5="6fc1a522ad32c2e3d72a89857b8cf10b", judge="all", ending=f"\n{SHORT}",
    ),
)  # fmt: skip
