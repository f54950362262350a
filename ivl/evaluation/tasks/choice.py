"""Multiple choice: the options are columns A, B, ... of a row, and a reply names one by letter or text."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ivl.evaluation.benchmark import Benchmark
from ivl.evaluation.data import PLACE_OF_ANSWER, literal, options_of
from ivl.evaluation.figures import Figure, Figures, all_right, average, by
from ivl.evaluation.prompts import CHINESE, COT_CHOICE, LETTER, LETTER_ZH
from ivl.evaluation.scoring.open_answers import open_answer_right
from ivl.evaluation.scoring.options import REFUSED, infer_option, leading_option
from ivl.evaluation.task import Example, Score, Scored

_LINE = re.compile(r"^([A-J])[.:] +(.*\S)", re.MULTILINE)
ROTATION = 1_000_000
"""The index of a question's rotation k is the question's own plus k times this."""


@dataclass(frozen=True, kw_only=True)
class Choice(Benchmark):
    """A benchmark of choices, scored by the share of right letters. A judge matches a reply that names none or several."""

    judge: Literal["", "some", "all"] = "some"
    template: str = "choice"
    tries: int = 3
    official: str = (
        "draws a letter or Z at random after three such replies of its judge, and without a judge counts them as wrong"
    )
    reduced: bool = True
    circular: bool = False
    """Every question comes with its options rotated, and counts only if all its rows are right."""
    headline: str = ""
    """The split whose score is the benchmark's; empty takes all rows."""
    reference_letter: Callable[[str, Mapping[str, str]], str] = leading_option
    """How InternVL's own code reads the letter of a reply."""
    means_of_categories: bool = False
    """The figure of a coarse category is the mean of its fine ones, whatever their sizes."""

    def question(self, row: Mapping[str, Any]) -> str:
        hint = f"{row['hint']}\n" if row.get("hint") and self.prompt != "mpo" else ""  # VLMEvalKit's MPO prompt has none
        options = "".join(f"\n{letter}. {text}" for letter, text in options_of(row).items())
        return f"{hint}{row['question']}{options}"

    def request(self, row: Mapping[str, Any]) -> str:
        chinese = CHINESE.search(self.question(row))
        if options_of(row):
            return "\n" + (LETTER_ZH if chinese else LETTER)
        return "\n" + ("请直接回答问题。" if chinese else "Answer the question directly.")

    def cot(self, published: str) -> str:
        return published.replace(LETTER, "").strip() + "\n" + COT_CHOICE

    def cluster(self, row: Mapping[str, Any]) -> str:
        if not self.circular:
            return ""
        return f"question {row['g_index'] if row.get('g_index') is not None else int(row['index']) % ROTATION}"

    def prepared(self, row: dict[str, Any]) -> dict[str, Any]:
        """Take the options out of a question that holds them, one a line or in one line behind `Options: `."""
        text = str(row["question"]) if not options_of(row) else ""
        lines = list(_LINE.finditer(text))
        before, found, after = text.rpartition("\nOptions: ")
        pieces = re.split(r"(?:^|, )([A-H]): ", after) if found else [""]
        if [match[1] for match in lines] == list("ABCDEFGHIJ"[: len(lines)]) and len(lines) > 1:
            return row | {match[1]: match[2] for match in lines} | {"question": text[: lines[0].start()].rstrip("\n")}
        if len(pieces) > 3 and not pieces[0]:
            return row | dict(zip(pieces[1::2], pieces[2::2], strict=True)) | {"question": before}
        return row

    def answers(self, row: Mapping[str, Any]) -> tuple[str, ...]:
        answers = super().answers(row)
        if answers and options_of(row) and not re.fullmatch("[A-Z]", answers[0]):
            raise ValueError(f"its answer {answers[0]!r} is no letter of an option")
        return answers

    def options(self, example: Example) -> tuple[dict[str, str], str]:
        """Return the options and the right letter; of an open question the answer as A and `Other Answers` as B."""
        if options := options_of(example.row):
            return options, example.truth
        return {"A": example.truth, "B": "Other Answers"}, "A"

    def told(self, text: str, example: Example) -> dict[str, str]:
        options, _ = self.options(example)
        return super().told(text, example) | {"options": " ".join(f"{k}. {v}" for k, v in options.items())}

    def read(self, text: str, example: Example, *, judged: bool = False) -> Score | None:
        """Compare the letter that the text names.

        Under the reference prompt, InternVL's own code counts: the first letter or text, or the parser of open answers.
        """
        options, truth = self.options(example)
        if self.prompt == "reference":
            opened = not options_of(example.row)
            said = text.strip() if opened else self.reference_letter(text, options)
            right = open_answer_right(text, list(map(str, literal(example.truth)))) if opened else said == truth
            return Score(value=float(right), answer=said)
        letter = infer_option(text, options, self.profile)
        if letter is None or (judged and letter not in (*options, REFUSED)):
            return None
        return Score(value=float(letter == truth), answer=letter)

    def figure(self, scored: Sequence[Scored]) -> Figure:
        return all_right(scored, lambda s: s.cluster) if self.circular else super().figure(scored)

    def figures(self, scored: Sequence[Scored]) -> Figures:
        splits = by(scored, lambda s: [str(s["split"])])
        if len(splits) == 1 or (self.headline and self.headline not in splits):
            return self._table(scored)
        parts = ({"": scored} if not self.headline else {}) | dict(sorted(splits.items(), key=lambda x: x[0] != self.headline))
        return {f"{split} {name}".strip(): each for split, rows in parts.items() for name, each in self._table(rows).items()}

    def _table(self, scored: Sequence[Scored]) -> Figures:
        table = super().figures(scored)
        if self.means_of_categories:
            for name, rows in by([s for s in scored if s["l2-category"]], lambda s: [str(s["l2-category"])]).items():
                table[name] = average(map(self.figure, by(rows, lambda s: [str(s["category"])]).values()))
        return table


def _mmbench(split: str, language: str, version: str, **more: Any) -> Choice:
    name = "-".join(filter(None, ("mmbench", split, language, version)))
    file = "_".join(filter(None, ("MMBench", split.upper(), language.upper(), version.upper())))
    hidden = ": answers are hidden, makes a submission" * (split == "test")
    about = f"MMBench {'v1.1' if version else 'v1.0'}, {split}, {language}{hidden}"
    return Choice(
        name=name, file=file, about=about, hub="lmms-lab/MMBench", circular=True, submission="table",
        columns={"L2-category": "l2-category"}, **more,
    )  # fmt: skip


class SeedImage(Choice):
    """The table of the hub has videos, too."""

    def keep(self, row: Mapping[str, Any]) -> bool:
        return row.get("data_type", "image") == "image"


class Crpe(Benchmark):
    """CRPE: objects and their relations. The share of questions whose four rotations are all right."""

    def cluster(self, row: Mapping[str, Any]) -> str:
        return f"question {int(row['index']) // 4}"

    def read(self, text: str, example: Example, *, judged: bool = False) -> Score | None:
        """Compare the letter, or look for the text of the answer."""
        return Score(value=float(names_answer(text, example.truth, cut=4 if self.defects else 3)), answer=text.strip())

    def figure(self, scored: Sequence[Scored]) -> Figure:
        return all_right(scored, lambda s: s.cluster)


def names_answer(reply: str, answer: str, *, cut: int = 3) -> bool:
    """Return whether a reply begins with the answer's letter, or has no capital A to D first and contains its text.

    Args:
        cut: Characters of the letter before the text. The tool cuts four, and so the first of the text.
    """
    if len(reply) == 1 or reply[:1] in tuple("ABCD"):
        return reply[:1] == answer[:1]
    return bool(reply) and answer[cut:].lower() in reply.lower()


TASKS = (
    _mmbench("dev", "en", "v11", md5="30c05be8f2f347a50be25aa067248184"),
    _mmbench("dev", "cn", "v11", md5="593f9b5f6bea453d870a798b34ae4f37"),
    _mmbench("test", "en", "v11", md5="8d1a704e791df6f5d9fb3ef782b65365"),
    _mmbench("test", "cn", "v11", md5="156e6569f9547afb16603eca16e85373"),
    *(_mmbench(s, language, "", rows=n) for s, n in (("dev", 4329), ("test", 6666)) for language in ("en", "cn")),
    Choice(name="ccbench", file="CCBench", about="culture of China", rows=2040, circular=True, hub="lmms-lab/MMBench"),
    Choice(
        name="mmstar", file="MMStar", about="questions that need the picture", rows=1500, hub="Lin-Chen/MMStar",
        md5="e1ecd2140806c1b1bbf54b43372efb9e", categories=("category", "l2_category"),
    ),
    Choice(
        name="ai2d", file="AI2D_TEST", about="diagrams of school books, letters drawn over the labels (with mask)", rows=3088,
        md5="0f593e0d1c7df9a3d69bf1f947e71975", hub="lmms-lab/ai2d", columns={"answer": PLACE_OF_ANSWER},
        reference_letter=lambda text, _: text.strip().upper(),
    ),
    Choice(name="ai2d-no-mask", file="AI2D_TEST_NO_MASK", about="the same without the letters", rows=3088),
    SeedImage(
        name="seed-image", file="SEEDBench_IMG", about="nine kinds of questions about photographs", rows=14232,
        hub="lmms-lab/SEED-Bench", columns={"text": "question", "question_type_id": "category", "question_id": "index"},
        reference_letter=lambda text, _: text[:1],
    ),
    Choice(name="seed-2-plus", file="SEEDBench2_Plus", about="charts, maps and web pages", rows=2277),
    Choice(name="realworldqa", file="RealWorldQA", about="photographs taken from cars and by phone", rows=765),
    Choice(
        name="blink", file="BLINK", about="14 tasks of visual perception, up to four pictures", rows=1901,
        hub="BLINK-Benchmark/BLINK", columns={"idx": "index", "sub_task": "category", "prompt": "full_prompt"},
    ),
    Choice(name="mmt-bench", file="MMT-Bench_VAL", about="162 kinds of tasks", rows=3127, means_of_categories=True),
    Choice(name="mmt-bench-all", file="MMT-Bench_ALL", about="all of it, answers are hidden", rows=31325, submission="table"),
    Crpe(
        name="crpe-exist", file="CRPE_EXIST", about="whether objects are there", md5="315584e23ac1ff7f8719ed3b7ad90f08",
        categories=("category",), reduced=True,
    ),
    Crpe(
        name="crpe-relation", file="CRPE_RELATION", about="subjects, predicates and objects of relations",
        md5="bad7094cde0b572288f4b119c2d0c656", categories=("category",), reduced=True,
    ),
)  # fmt: skip
