"""A task is asked during training, and its figures go where the validation loss goes."""

from __future__ import annotations

from pathlib import Path

import pytest

from ivl.errors import InputError
from ivl.runs.run import run
from tests.helpers.training import changed
from tests.runs.helpers import rows

TASK = """
import ivl
from ivl.evaluation.task import Example, Task


class Short(Task):
    name, metric, params = "short", "length", ivl.SamplingParams(max_new_tokens=3)

    def examples(self):
        for n in range(5):
            group = "even" if n % 2 == 0 else "odd"
            yield Example(id=str(n), conversation=ivl.ask(f"what is {n}?"), answers=("x",), group=group)

    def score(self, reply, example):
        return float(len(reply) < 1000)
"""


def test_a_run_shows_the_curve_of_a_task(config, tmp_path: Path) -> None:
    (tmp_path / "short.py").write_text(TASK)
    run(changed(config, num_steps=4, eval_tasks=(f"{tmp_path}/short.py:Short",), eval_every=2, eval_limit=3))
    found = [row for row in rows(config) if row.get("evaluation") == "Short"]
    assert [row["step"] for row in found] == [2, 4]
    assert all((row["all"], row["even"], row["odd"]) == (1.0, 1.0, 1.0) for row in found)


def test_an_unknown_task_stops_the_run_before_its_first_step(config) -> None:
    with pytest.raises(InputError, match="unknown task 'easyvqa'; did you mean 'easy-vqa"):
        run(changed(config, eval_tasks=("easyvqa",)))
