"""Every study of the claims runs, at the smallest size; the pages come from the files of figures alone."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

import ivl
from ivl.formats.rows import write_jsonl
from studies.claims import STUDIES, compression, descriptions, filtering, pictures, preference, report, scaling, small, voting
from studies.claims.run import run_arm, run_study
from studies.claims.study import Estimate, Lab, Results, Study, Verdict, sign, together

ROOT = Path(__file__).parents[2]
ARMS = (
    ("scaling", "random"), ("scaling", "moved"), ("compression", "jpeg"), ("reweighting", "square"),
    ("filtering", "filtered-10"), ("packing", "alone"), ("preference", "dropout"), ("preference", "chosen"),
    ("voting", "vote"), ("stages", "without-stage1"),
)  # fmt: skip
"""Arms that go through all of the code between them. tests/test_smollm2.py joins the parts of those beside SmolLM2."""


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    place = tmp_path_factory.mktemp("claims")
    return Lab(place / "runs", place / "results", scale=1e-4, seeds=1)


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """Smaller packs, decoders and grids than any real size has."""
    monkeypatch.setattr(small, "PACK_TOKENS", 768)
    monkeypatch.setattr(small, "VISION_STEPS", 1)
    monkeypatch.setattr(scaling, "POINTS", (1 / 16, 1.0))
    monkeypatch.setattr(scaling, "RATES", (1e-3,))
    monkeypatch.setattr(scaling, "WIDE", {**scaling.WIDE, "num_layers": 1})
    monkeypatch.setattr(preference, "SETTINGS", [(5e-5, 2.0)])
    monkeypatch.setattr(compression, "QUALITIES", (10, 20, 30, 40, 50, 100))
    monkeypatch.setattr(preference, "REPLIES", 2)
    monkeypatch.setattr(voting, "REPLIES", 2)
    monkeypatch.setattr(voting, "SAMPLES", 2)
    monkeypatch.setattr("ivl.runs.run.draw", lambda *_: None)


@pytest.mark.parametrize(("name", "arm"), ARMS)
def test_every_study_gives_figures(lab: Lab, name: str, arm: str) -> None:
    study = STUDIES[name]
    assert arm in study.arms
    study.run(lab, arm, 0)
    record = json.loads(study.file(lab, arm, 0).read_text())
    assert {"commit", "date", "processor", "processor_seconds"} <= record.keys() and record["arm"] == arm
    shown = [record["figures"][key] for key in study.columns if key in record["figures"]]
    assert shown and all(math.isfinite(value) for value in shown)


def test_one_pass_tells_what_greedy_decoding_says(lab: Lab, tmp_path: Path) -> None:
    (row,) = small.read(small.data(lab) / "train-captions.jsonl")[:1]
    rows = write_jsonl([row], tmp_path / "rows.jsonl")
    start = small.nano_start(lab)["stage2"]
    model = small.trained(small.training(tmp_path / "run", rows, small.EVERYTHING, model=start, steps=40))
    talks = row["conversations"]
    replies = ivl.load(model).generate([ivl.ask(question["value"], row["image"]) for question, _ in talks], max_new_tokens=4)
    assert [reply.text for reply in replies] == [answer["value"] for _, answer in talks]
    assert small.exact(model, rows)["accuracy"] == 1.0
    talks[0][1]["value"] = "yes"
    assert small.exact(model, write_jsonl([row], tmp_path / "wrong.jsonl"))["accuracy"] == 0.5


def test_the_command_names_the_arms_that_fail(tmp_path: Path) -> None:
    (tmp_path / "runs/claims/quick").mkdir(parents=True)
    (tmp_path / "runs/claims/quick/packing").write_text("a file where the study's logs would lie")
    command = [sys.executable, "-m", "studies.claims", "--quick", "--only", "packing", "--seeds", "1"]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "failed: packing/" in done.stderr
    assert all("File exists" in line for line in done.stdout.splitlines() if " failed: " in line)


def test_every_study_is_tried() -> None:
    assert {name for name, _ in ARMS} == {name for name, study in STUDIES.items() if not study.costly}


def test_needed_rows_lie_between_points_by_their_logarithms() -> None:
    points = [{"rows": 1.0, "accuracy": 0.2}, {"rows": 4.0, "accuracy": 0.8}]
    assert scaling.needed(points, 0.5, "rows") == pytest.approx(2.0)
    assert scaling.needed(points, 0.1, "rows") == 1.0 and scaling.needed(points, 0.9, "rows") == math.inf


def figures_of(rows: float, accuracy: float) -> dict[str, object]:
    axes = ("rows", "seconds", "flops")
    points = [{**dict.fromkeys(axes, share * rows), "accuracy": accuracy} for share in (0.1, 1.0)]
    return {"curve": points, "accuracy": accuracy, "shuffled": 0.5}


def fake(lab: Lab, study: Study, figures: dict[str, list[dict[str, object]]]) -> Results:
    for arm, seeds in figures.items():
        for seed, each in enumerate(seeds):
            dataclasses.replace(study, measure=lambda *_, each=each: each).run(lab, arm, seed)
    return Results(study, lab)


def test_scaling_holds_where_the_moved_vit_needs_a_tenth(tmp_path: Path) -> None:
    lab = Lab(tmp_path / "runs", tmp_path / "results")
    assert Results(scaling.STUDY, lab).verdict() == Verdict("not measured yet", "Not measured yet: moved, random.")
    good, poor = [figures_of(100, 0.9)] * 3, [figures_of(100, 0.8)] * 3
    results = fake(lab, scaling.STUDY, {"moved": good, "random": poor})
    assert results.verdict().holds == "holds" and "10.0% (10.0% to 10.0%) of its rows" in results.verdict().sentence
    assert "From nothing it ends at 80.0% ± 0.0%; features of other pictures give" in results.verdict().sentence
    results = fake(lab, scaling.STUDY, {"moved": poor, "random": good})
    assert results.verdict().holds == "does not hold here"
    report.save_plot(results, tmp_path)
    assert (tmp_path / "claims-scaling.png").stat().st_size > 10_000
    page = report.markdown([results])
    assert "Not run yet: warmed-0, projector-0, " in page and "| moved ViT, projector only | not run yet |" in page


def test_estimates() -> None:
    assert Estimate((0.5,)).shown(".1%") == "50.0%"
    assert Estimate((0.4, 0.5, 0.6)).shown(".1%") == "50.0% ± 24.8%"  # 4.303 * 0.1 / sqrt(3)
    assert Estimate((0.4, 0.5, 0.6)).shown("+.1%") == "+50.0% ± 24.8%"
    signs = [sign(Estimate(values)) for values in ((1.0, 1.1), (-1.0, 5.0), (-1.0, 0.5), (1.0,))]
    assert signs == ["holds", *["does not hold here"] * 3]
    assert together(signs) == "holds in part" and together(signs[1:]) == "does not hold here"


def test_settings_are_picked_once_by_their_scores(tmp_path: Path) -> None:
    lab, asked = Lab(tmp_path / "runs", tmp_path / "results"), []

    def score(rate: float) -> float:
        asked.append(rate)
        return -abs(rate - 2)

    assert [lab.pick("study", "arm", (1.0, 2.0, 3.0), score) for _ in range(2)] == [2.0, 2.0]
    assert asked == [1.0, 2.0, 3.0]
    assert json.loads((tmp_path / "results/study/arm-setting.json").read_text())["scores"]["1.0"] == -1.0


def test_loops_are_injected_into_their_share_alone() -> None:
    text = " ".join(descriptions.describe("blue circle", random.Random(0)))
    rows = [{"id": str(n), "conversations": [{"value": "?"}, {"value": text}]} for n in range(400)]
    looped = [filtering.with_loop(row, 0.1) for row in rows]
    assert 20 <= sum(row["injected"] for row in looped) <= 60
    for row in looped:
        assert descriptions.repetitive(row["conversations"][1]["value"]) == row["injected"]
    assert not any(
        filtering.with_loop(row, 0.03)["injected"] and not wide["injected"] for row, wide in zip(rows, looped, strict=True)
    )


def test_charts_show_their_values() -> None:
    image, values = pictures.chart(random.Random(3))
    for at, (color, value) in enumerate(values.items()):
        column = [image.getpixel((10 + 20 * at, y)) for y in range(pictures.SIDE)]
        assert column.count(pictures.COLORS[color]) == value * pictures.UNIT + 1
    reasoning = voting.reasoning(values, random.Random(0))
    assert reasoning.endswith(f"Final answer: {sum(values.values())}") and reasoning.count("+") == 2


def test_the_page_in_docs_is_that_of_the_files() -> None:
    """Nobody writes a figure into docs/claims.md by hand."""
    results = [Results(study, Lab()) for study in STUDIES.values()]
    assert (ROOT / report.DOCS).read_text() == report.markdown(results), "run `python -m studies.claims.report`"


def test_what_is_measured_is_not_measured_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lab = Lab(tmp_path / "runs", tmp_path / "results", seeds=1)
    arms = {"random": scaling.STUDY.arms["random"]}
    study = dataclasses.replace(scaling.STUDY, arms=arms, measure=lambda *_: {"accuracy": 0.5})
    study.run(lab, "random", 0)
    assert run_study(study, lab) == [] and "every arm has its figures" in capsys.readouterr().out


def test_a_failing_arm_leaves_its_reason_in_its_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lab = Lab(tmp_path / "runs", tmp_path / "results")

    def measure(*_: object) -> dict[str, object]:
        print("training")
        raise ValueError("no such rows")

    monkeypatch.setitem(STUDIES, "scaling", dataclasses.replace(scaling.STUDY, measure=measure))
    with pytest.raises(ValueError, match="no such rows"):
        run_arm("scaling", lab, "random", 0)
    log = (tmp_path / "runs/scaling/random-0.log").read_text()
    assert log.startswith("training\n") and "ValueError: no such rows" in log
    assert not scaling.STUDY.file(lab, "random", 0).exists()
