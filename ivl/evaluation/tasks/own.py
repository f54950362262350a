"""Rows of one's own: every format that training reads; a row's last turn is the answer that a reply is compared with."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ivl.data.mixture import load_mixture
from ivl.data.records import read_record
from ivl.errors import InputError, short
from ivl.evaluation.config import Metric
from ivl.evaluation.data import md5
from ivl.evaluation.figures import Figures, mean
from ivl.evaluation.grading import judge_prompt
from ivl.evaluation.scoring import anls, compare, exact_match
from ivl.evaluation.scoring.boxes import Corners, box_in, overlap
from ivl.evaluation.scoring.metrics import relaxed, vqa_accuracy, vqa_form
from ivl.evaluation.scoring.options import infer_option
from ivl.evaluation.scoring.verification import FEWEST_PEOPLE
from ivl.evaluation.task import Example, JudgeQuestion, Score, Scored, Task
from ivl.formats.rows import open_rows
from ivl.formats.split import part_of

_OPTION = re.compile(r"^[(（]?([A-Z])[.):．）：、]\s*(.+?)\s*$", re.MULTILINE)


def _vqa(text: str, answers: Sequence[str]) -> float:
    if len(answers) >= FEWEST_PEOPLE:
        return vqa_accuracy(text, answers, older=True)
    said, *accepted = (vqa_form(each, older=True) for each in (text, *answers))
    return float(said in accepted)


TEXT_METRICS: dict[str, Callable[[str, Sequence[str]], float]] = {
    "exact": exact_match,
    "relaxed": lambda text, answers: any(relaxed(text, answer) for answer in answers),
    "anls": anls,
    "vqa": _vqa,
    "math": lambda text, answers: compare(text, answers, mode="math").score,
}
"""Metrics that compare a reply with the answers alone."""


class OwnData(Task):
    """The questions of files, folders and mixtures, as training reads them, scored by one metric.

    A row may have `answers`, a list of accepted ones, beside its last turn. Rows with several conversations give a question for
    each, and these stay together. Every row is asked once, whatever its repeat_time, also of a file that is named twice.
    An id is the row's number; where there are several data sets, it begins with the name, or the file where names are the same.
    """

    def __init__(self, data: tuple[str, ...], metric: Metric, name: str, val_share: float, root: str | None) -> None:
        self.metric, self.name, self.val_share, self.root = metric, name, val_share, root
        self.specs = list({(spec.annotation, spec.root): spec for spec in load_mixture(data, root=root)}.values())

    def examples(self) -> Iterator[Example]:
        """Yield the rows as questions; of a preference pair the chosen reply is the answer.

        Raises:
            InputError: naming the row whose answer the metric cannot use.
        """
        unusable = {"choice": "names none of the options", "iou": "has no box"}.get(self.metric, "")
        names = [spec.name for spec in self.specs]
        for spec in self.specs:
            rows = part_of(open_rows(spec.annotation, format=spec.format), self.val_share, validation=True)
            name = spec.name if names.count(spec.name) == 1 else spec.annotation
            for index in range(len(rows)):
                record, listed = read_record(rows, index, root=Path(spec.root)), rows[index].get("answers")
                row = f"{name}/{index}" if len(self.specs) > 1 else str(index)
                conversations = record.conversations[:1] if record.is_pair else record.conversations
                several = len(conversations) > 1
                for number, (*asked, last) in enumerate(conversations):
                    example = Example(
                        id=f"{row}-{number}" if several else row, conversation=tuple(asked),
                        answers=tuple(map(str, listed)) if isinstance(listed, list) and listed else (last.text.strip(),),
                        cluster=f"row {row}" if several else "", row={"question": asked[-1].text, "id": record.id},
                    )  # fmt: skip
                    if unusable and not all(self._read(answer, example) for answer in example.answers):
                        told = " or ".join(map(short, example.answers))
                        raise InputError(f"{record.source}: the answer {told} {unusable}; another --metric may read it")
                    yield example

    def _read(self, text: str, example: Example) -> str | Corners | None:
        """Return the option or the box of a text."""
        if self.metric == "iou":
            return box_in(text)
        return infer_option(text, dict(_OPTION.findall(str(example.row["question"]))))

    def score(self, reply: str, example: Example) -> Score:
        """Score by the metric. Options are read in the question, boxes are compared in their own unit."""
        answers, text = example.answers, reply.strip()
        if self.metric == "judge":
            prompt = judge_prompt("own", question=str(example.row["question"]), truth=" or ".join(answers), reply=text)
            return Score(answer=text, undecided=JudgeQuestion(prompt=prompt, read=_verdict, best=Score(value=1.0, answer=text)))
        if self.metric == "choice":
            letter = self._read(text, example)
            return Score(value=float(letter in [self._read(answer, example) for answer in answers]), answer=str(letter or ""))
        if self.metric == "iou":
            boxes, said = [box for answer in answers if (box := box_in(answer))], box_in(text)
            value = max((overlap(said, box) for box in boxes), default=0.0) if said else 0.0
            return Score(value=value, answer=str(list(said or ())))
        return Score(value=float(TEXT_METRICS[self.metric](text, answers)), answer=text)

    def figures(self, scored: Sequence[Scored]) -> Figures:
        hits: Figures = {"IoU >= 0.5": mean(scored, lambda s: s.score.value >= 0.5)} if self.metric == "iou" else {}
        return {"all": mean(scored), **hits}

    def settings(self) -> dict[str, Any]:
        files = [{"file": spec.annotation, "md5": md5(Path(spec.annotation))} for spec in self.specs]
        given = {name: value for name in ("root", "val_share") if (value := getattr(self, name))}
        return {"data": {**(files[0] if len(files) == 1 else {"files": files}), **given}}


def _verdict(reply: str) -> Score | None:
    match = re.fullmatch(r"\W*([01])\W*", reply)
    return Score(value=float(match[1]), answer=match[1]) if match else None
