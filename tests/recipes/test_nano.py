"""The quickstart's parts: captions read off the questions, data files, stages that fit together."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("easy_vqa")

from examples.quickstart.data import captions, prepare
from examples.quickstart.run import STAGES
from ivl.evaluation.tasks import easy_vqa
from ivl.recipes import nano
from ivl.utils.signals import Interruption
from tests.helpers.training import changed

ROOT = Path(__file__).parent.parent.parent


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


def wait_and_save(folder: Path) -> None:
    """What a rank of the next test does: it says that it runs, and saves when it is asked to end."""
    rank = os.environ["RANK"]
    with Interruption(f"rank {rank} saves") as stop:
        (folder / f"{rank}.running").touch()
        while not stop():
            time.sleep(0.05)
        time.sleep(0.5)
        (folder / f"{rank}.saved").touch()
    raise SystemExit(143)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_quickstart_lets_its_ranks_save_and_says_no_traceback(tmp_path: Path, number: int, code: int) -> None:
    script = (
        "import sys; from pathlib import Path; from examples.quickstart import ranks, run\n"
        "from tests.recipes.test_nano import wait_and_save\n"
        "folder = Path(sys.argv.pop())\n"
        "run.quickstart = lambda _: ranks.spawn(wait_and_save, (folder,), 2)\n"
        "run.main()\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)], cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    deadline = time.monotonic() + 90
    while len(list(tmp_path.glob("*.running"))) < 2 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    os.killpg(process.pid, number)  # as a terminal does
    _, said = process.communicate(timeout=60)
    assert process.returncode == code and "Traceback" not in said and "rank 0 saves" in said, said
    assert sorted(path.name for path in tmp_path.glob("*.saved")) == ["0.saved", "1.saved"]
    assert ("the same command goes on from here" in said) == (number == signal.SIGINT)
