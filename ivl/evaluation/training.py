"""A task as a small evaluation during training, so that a run shows the curve of a benchmark."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from ivl.evaluation.task import Scored, limited, score_of
from ivl.evaluation.tasks import find
from ivl.generators import answers_of
from ivl.inference.engine import Engine
from ivl.model.vlm import VLM
from ivl.processing.processor import Processor

LONGEST_REPLY = 256
"""Tokens of a reply during training, where a model that rambles would take hours."""


def curve_of(name: str, limit: int, processor: Processor) -> Callable[[VLM], dict[str, float]]:
    """Return a function that gives a model's figures on the first questions of a task. The questions are read now.

    Replies that only a judge could decide count as wrong.
    """
    task = find(name)
    examples = limited(task.examples(), limit)
    params = replace(task.params, max_new_tokens=min(task.params.max_new_tokens, LONGEST_REPLY))

    def figures(model: VLM) -> dict[str, float]:
        replies = answers_of(Engine(model, processor), [example.conversation for example in examples], params)
        scores = [score_of(task, reply, example) for reply, example in zip(replies, examples, strict=True)]
        return {key: figure.value for key, figure in task.figures(list(map(Scored, examples, scores))).items()}

    return figures
