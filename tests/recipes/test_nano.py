"""The quickstart's parts: captions read off the questions, data files, stages that fit together."""

from __future__ import annotations

from dataclasses import replace

import pytest

pytest.importorskip("easy_vqa")

from examples.quickstart.data import captions, prepare
from examples.quickstart.run import STAGES
from ivl.evaluation.tasks import easy_vqa
from ivl.recipes import nano
from tests.helpers.training import changed


def test_captions_agree_with_every_answer() -> None:
    rows = easy_vqa.rows("train")
    described = captions(rows)
    assert len(described) > 3500
    for row in rows:
        if row.image in described and row.kind != "yes/no":
            assert row.answer in described[row.image].split()


def test_a_negated_question_states_its_words_when_answered_no() -> None:
    def row(question: str, answer: str) -> easy_vqa.Row:
        return easy_vqa.Row(id=question, image="i", question=question, answer=answer, kind=easy_vqa.kind(answer))

    rows = [
        row("is there not a circle?", "no"),
        row("is no red shape present?", "yes"),
        row("what color is the circle?", "teal"),
    ]
    assert captions(rows) == {"i": "teal circle"}
    assert captions(rows[:2]) == {}


def test_every_stage_runs_on_what_the_stage_before_left(tmp_path, monkeypatch) -> None:
    from ivl.checkpoint import load_model
    from ivl.runs.run import run

    monkeypatch.chdir(tmp_path)
    prepare(tmp_path / nano.RUN)
    for recipe in STAGES:
        config = recipe()
        run(changed(config, data=replace(config.data, max_tokens=1024, max_tiles=2), num_steps=2, tensorboard=False))
    model = load_model(nano.stage2().run_dir + "/model")
    assert model.config == nano.architecture()
