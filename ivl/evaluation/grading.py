"""Asks a judge about replies that a task's rule leaves undecided. What the judge says is kept in a file.

A judge's reply is found again by the judge's name, the whole prompt, which holds its version, the question and the reply, and
the number of the try. A reply that no try decides stays undecided: no letter is drawn, and no zero is given.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ivl.errors import InputError
from ivl.evaluation.prompts import texts_of
from ivl.evaluation.task import JudgeQuestion, Score
from ivl.generators import Generator, Refused, answers_of
from ivl.types import Message, SamplingParams, Text
from ivl.utils.jsonl import AppendLog

FORMAT = "judge replies 1"
_PROMPTS = texts_of("judges")
ASKED_AT_A_TIME = 64
"""Questions between two savings."""
MOST_STEPS = 4
"""Further questions about one reply: a judge may first extract and then compare."""


@dataclass
class Grader:
    """A judge and the file of its replies."""

    generator: Generator
    name: str
    path: Path
    asked: int = 0
    """Questions to the judge in this process, those from the file not counted."""
    saved: dict[str, str] = field(default_factory=dict[str, str])
    unread: str | None = None
    """The last of its replies that decided nothing."""

    def decide(self, scores: Sequence[Score]) -> list[Score]:
        """Return the scores with the judge's decisions. A score that stays undecided is the one that asked first."""
        decided = list(scores)
        with AppendLog(self.path) as log:
            if not log.resume(f'{{"ivl": "{FORMAT}"'.encode(), self._take):
                log.append([{"ivl": FORMAT}])
            steps = [(at, score.undecided) for at, score in enumerate(scores) if score.undecided]
            for _ in range(MOST_STEPS):
                further: list[tuple[int, JudgeQuestion]] = []
                for at, score in self._step(steps, log):
                    if score.undecided:
                        further.append((at, score.undecided))
                    else:
                        decided[at] = score
                steps = further
        return decided

    def _take(self, number: int, row: dict[str, Any]) -> bool:
        if number == 1 and row.get("ivl") != FORMAT:
            raise InputError(f"{self.path}: is no file of a judge's replies; name another --out or --predictions")
        if number > 1:
            self.saved[row["key"]] = row["reply"]
        return True

    def _step(self, questions: list[tuple[int, JudgeQuestion]], log: AppendLog) -> list[tuple[int, Score]]:
        """Ask until every question has a score that can be read, or no try is left."""
        read: list[tuple[int, Score]] = []
        tried = 0
        while questions := [(at, question) for at, question in questions if tried < question.tries]:
            replies, left = self._replies([question for _, question in questions], tried, log), questions
            questions = []
            for (at, question), reply in zip(left, replies, strict=True):
                score = question.read(reply)
                if score is None:
                    self.unread = reply
                    questions.append((at, question))
                else:
                    read.append((at, score))
            tried += 1
        return read

    def _replies(self, questions: list[JudgeQuestion], tried: int, log: AppendLog) -> list[str]:
        keys = [self._key(question, tried) for question in questions]
        todo = [(key, q) for key, q in dict(zip(keys, questions, strict=True)).items() if key not in self.saved]
        for start in range(0, len(todo), ASKED_AT_A_TIME):
            batch = todo[start : start + ASKED_AT_A_TIME]
            replies = self._ask([question for _, question in batch], tried)
            new = {key: reply for (key, _), reply in zip(batch, replies, strict=True)}
            log.append({"key": key, "reply": reply} for key, reply in new.items())
            log.sync()
            self.saved |= new
            self.asked += len(batch)
        return [self.saved[key] for key in keys]

    def _ask(self, questions: list[JudgeQuestion], tried: int) -> list[str]:
        """Return the judge's replies, empty where it cannot take a question, which then stays undecided."""
        params = [
            SamplingParams(max_new_tokens=q.max_new_tokens, temperature=tried * q.warmer, seed=tried if tried else None)
            for q in questions
        ]
        prompts = [(Message("user", (Text(question.prompt),)),) for question in questions]
        try:
            return answers_of(self.generator, prompts, params)
        except InputError as error:  # one of them is too long, or against the rules
            if hasattr(self.generator, "url") and not isinstance(error, Refused):
                raise  # the endpoint does not answer
            return [""] if len(questions) == 1 else [reply for question in questions for reply in self._ask([question], tried)]

    def _key(self, question: JudgeQuestion, tried: int) -> str:
        parts = self.name, question.prompt, str(tried), str(question.max_new_tokens), str(question.warmer)
        return hashlib.sha256("\0".join(parts).encode("utf-8", "surrogatepass")).hexdigest()[:32]


def judge_prompt(name: str, **values: str) -> str:
    """Return the prompt of a file in judges/, filled in."""
    return _PROMPTS[name].format(**values)


def if_right(score: Score) -> Score:
    """Return the score that an undecided reply has if it is right."""
    return replace(score.undecided.best, undecided=None) if score.undecided else score
