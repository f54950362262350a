"""What is done with scores: two runs compared, the OpenCompass average, files of other tools written and read."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest

from ivl.cli.eval import evaluate as command
from ivl.errors import InputError
from ivl.evaluation.average import EIGHT, PUBLISHED, as_text, average, published_of
from ivl.evaluation.benchmark import Benchmark
from ivl.evaluation.config import EvalConfig
from ivl.evaluation.data import read_rows
from ivl.evaluation.foreign import export, submit, write_table
from ivl.evaluation.results import compare, mcnemar
from ivl.evaluation.task import Example
from tests.evaluation.rows import always_a, benchmark, evaluated, perfect, write_tsv
from tests.evaluation.test_benchmarks import choice_rows, circular_rows, mme_rows, yes_no_rows

CASES = [json.loads(line) for line in Path(__file__).with_name("golden.jsonl").read_text().splitlines()]


def mostly(right: int) -> Any:
    return lambda example: perfect(example) if int(example.id) < right else "none of them"


@pytest.fixture
def task(tmp_path: Path) -> Benchmark:
    return benchmark("mmstar", write_tsv(tmp_path / "MMStar.tsv", choice_rows(40)))


def test_two_runs_are_compared_on_the_same_questions(task: Benchmark, tmp_path: Path) -> None:
    for name, right in (("a", 10), ("b", 30)):
        evaluated(task, mostly(right), tmp_path, name=name)
    found = compare(tmp_path / "a.json", tmp_path / "b.jsonl")
    assert found["means"] == [0.25, 0.75] and found["difference"] == 0.5 and found["only_right"] == [0, 20]
    assert found["ci95"][0] > 0.3 and found["mcnemar_p"] == pytest.approx(2 * 0.5**20)
    assert found["headline"]["difference"] == pytest.approx(0.5) and found["headline"]["ci95"] == pytest.approx(found["ci95"])
    same = compare(tmp_path / "a.json", tmp_path / "a.json")
    assert same["difference"] == 0 and same["ci95"] == [0, 0] and same["mcnemar_p"] == 1
    (tmp_path / "c.scores.jsonl").write_text("mine\n")
    with pytest.raises(InputError, match=r"c\.scores\.jsonl: exists and is no file of scores"):
        evaluated(task, mostly(10), tmp_path, name="c")


@pytest.mark.parametrize(
    ("line", "broken"),
    [(0, {"n": "a"}), (0, {"headline": [["a", []]]}), (0, {"headline": [[1, [["x", "y", 1]]]]}), (1, {"value": "x"}),
     (2, {"answers": 1}), (2, {"value": None})],
)  # fmt: skip
def test_damaged_scores_are_named(task: Benchmark, tmp_path: Path, line: int, broken: dict[str, Any]) -> None:
    evaluated(task, mostly(3), tmp_path, name="a")
    path = tmp_path / "a.scores.jsonl"
    rows = list(map(json.loads, path.read_text().splitlines()))
    rows[line] |= broken
    path.write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(InputError, match=rf"a\.scores\.jsonl:{line + 1}: not "):
        compare(tmp_path / "a.json", tmp_path / "a.json")
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(InputError, match="is a pipe"):
        compare(tmp_path / "a.json", tmp_path / "a.json")


def test_the_headline_of_groups_is_compared_by_its_own_rule(tmp_path: Path) -> None:
    task = benchmark("mmbench-dev-en-v11", write_tsv(tmp_path / "rows.tsv", circular_rows()))
    for name, reply in (("a", always_a), ("b", perfect)):
        evaluated(task, reply, tmp_path, name=name)
    assert compare(tmp_path / "a.jsonl", tmp_path / "b.jsonl")["headline"]["values"] == [0.0, 1.0]


def test_mcnemar_is_the_exact_test() -> None:
    assert mcnemar(0, 0) == 1 and mcnemar(5, 5) == 1 and mcnemar(1, 9) == pytest.approx(22 / 1024)


def test_runs_without_a_common_question_are_refused(task: Benchmark, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"x\.scores\.jsonl: cannot be read .*; `ivl eval` writes it"):
        compare(tmp_path / "x.json", tmp_path / "x.json")
    (tmp_path / "y.scores.jsonl").write_text("{broken\n")
    with pytest.raises(InputError, match=r"y\.scores\.jsonl:1: not valid JSON"):
        compare(tmp_path / "y.json", tmp_path / "y.json")


def test_runs_of_other_tasks_or_metrics_are_refused_and_old_files_are_not(task: Benchmark, tmp_path: Path) -> None:
    for name in ("a", "b"):
        evaluated(task, mostly(10), tmp_path, name=name)
    path = tmp_path / "b.scores.jsonl"
    first, *rows = path.read_text().splitlines(keepends=True)
    about = json.loads(first)
    assert (about["task"], about["metric"]) == ("mmstar", "accuracy")
    for change, told in (({"metric": "F1"}, "mmstar by F1"), ({"task": "pope"}, "pope by accuracy")):
        path.write_text("".join([json.dumps(about | change) + "\n", *rows]))
        with pytest.raises(InputError, match=rf"a\.scores\.jsonl is of mmstar by accuracy, .*b\.scores\.jsonl of {told}; "):
            compare(tmp_path / "a.json", tmp_path / "b.json")
    del about["metric"]
    path.write_text("".join([json.dumps(about) + "\n", *rows]))
    assert compare(tmp_path / "a.json", tmp_path / "b.json")["n"] == 40
    path.write_text(json.dumps(about) + "\n")
    with pytest.raises(InputError, match="have no question in common"):
        compare(tmp_path / "a.json", tmp_path / "b.json")


def report(folder: Path, task: str, value: float | None, **more: Any) -> Path:
    path = folder / f"{task}.json"
    ci95 = [value, value] if value is not None else None
    path.write_text(json.dumps({"task": task, "value": value, "ci95": ci95, "model": "OpenGVLab/InternVL2_5-8B-MPO", **more}))
    return path


@pytest.mark.parametrize("case", [c for c in CASES if c["scorer"] == "opencompass_average"], ids=lambda case: case["id"])
def test_published_scores_have_the_official_mean(case: dict[str, Any]) -> None:
    scores = list(case["input"].values())[1:]
    assert PUBLISHED[case["input"]["model"]] == tuple(scores)
    assert math.fsum(scores) / 8 == pytest.approx(case["expected"]["mean"], abs=6e-4)


def test_the_average_needs_all_eight(tmp_path: Path) -> None:
    tasks = [ways[0] for _, ways in EIGHT.values()]
    values = dict(zip(EIGHT, PUBLISHED["InternVL2.5-8B-MPO"], strict=True))
    paths = [
        report(tmp_path, each, value / EIGHT[name][0])
        for (name, value), way in zip(values.items(), tasks, strict=True)
        for each in way
    ]
    found = average(paths)
    assert found["average"] == pytest.approx([70.375] * 2) and found["published"] == pytest.approx(70.375)
    assert "average                         70.4        70.4        +0.0" in as_text(found)
    found = average([path for path in paths if path.stem != "mmvet"])
    assert found["average"] is None and as_text(found).endswith("no average: MMVet missing")
    report(tmp_path, "mmvet", 0.5, range=[0.5, 0.7])
    assert average(paths)["average"] == pytest.approx([70.375 - 16.9 / 8, 70.375 + 3.1 / 8])
    with pytest.raises(InputError, match=r"mmstar\.json: a second report of mmstar"):
        average([*paths, tmp_path / "mmstar.json"])


def test_names_of_models_are_found_however_they_are_spelled() -> None:
    assert published_of("/models/InternVL2_5-1B/") == PUBLISHED["InternVL2.5-1B"]
    assert published_of("my-model") is None


def test_predictions_of_vlmevalkit_are_written_and_scored_again(task: Benchmark, tmp_path: Path, capsys: Any) -> None:
    result = evaluated(task, mostly(10), tmp_path)
    replies = result.replies
    files = export("tsv", tmp_path / "out", task, {**result.report, "model": "org/My Model"}, result.scored, replies)
    assert [file.name for file in files] == ["My_Model_MMStar.tsv", "My_Model_MMStar_acc.csv"]
    head = files[0].read_text().splitlines()[0].split("\t")
    assert head == ["index", "question", "A", "B", "C", "D", "answer", "category", "prediction"]
    assert files[1].read_text().splitlines()[:2] == ["split,Overall,c0,c1", "none,0.25,0.25,0.25"]
    files[1].write_text("of VLMEvalKit itself")
    export("tsv", tmp_path / "out", task, {**result.report, "model": "org/My Model"}, result.scored, replies)
    assert files[1].with_name("My_Model_MMStar_acc.csv.old").read_text() == "of VLMEvalKit itself"
    assert len([*files[0].parent.iterdir()]) == 3, "what is the same is not written anew"
    command(["--score", str(files[0]), "--out", str(tmp_path / "again.json")])
    again = json.loads((tmp_path / "again.json").read_text())
    assert (again["value"], again["range"], again["n"]) == (result.report["value"], result.report["range"], 40)
    printed = capsys.readouterr().out
    assert "all  accuracy 25.00%" in printed and printed.count("accuracy") == 1  # the metric of the headline alone
    assert json.loads((tmp_path / "again.predictions.jsonl").read_text().splitlines()[0])["task"] == "mmstar"


def test_samples_of_lmms_eval_are_written_and_scored_again(task: Benchmark, tmp_path: Path) -> None:
    result = evaluated(task, mostly(30), tmp_path)
    results, samples = export("lmms-eval", tmp_path / "out", task, result.report, result.scored, result.replies)
    assert json.loads(results.read_text())["results"]["mmstar"]["accuracy,none"] == 0.75
    row = json.loads(samples.read_text().splitlines()[0])
    assert row["resps"] == [["A"]] and row["doc"]["question"] == "which 0?" and row["doc_id"] == 0
    command(["--score", str(samples), "--out", str(tmp_path / "again.json")])
    assert json.loads((tmp_path / "again.json").read_text())["value"] == 0.75


def test_a_file_that_names_no_benchmark_is_told(tmp_path: Path) -> None:
    path = write_tsv(tmp_path / "mine.tsv", choice_rows(2))
    with pytest.raises(InputError, match=r"mine\.tsv: its name tells no benchmark of .* --task"):
        command(["--score", str(path)])
    with pytest.raises(InputError, match=r"mine\.tsv: has no replies under `prediction`"):
        command(["--score", str(path), "--task", "mmstar"])
    write_tsv(path, [{**row, "prediction": row["answer"]} for row in choice_rows(2)])
    command(["--score", str(path), "--task", "mmstar", "--predictions", str(tmp_path / "p.jsonl")])
    write_tsv(path, [{**row, "prediction": "A", "image": ""} for row in choice_rows(2)])
    with pytest.raises(InputError, match=r"mine\.tsv:2: holds a reply and no picture; .* with --score"):
        list(benchmark("mmstar", path).examples())
    with pytest.raises(InputError, match="leave out --data and --metric"):
        command(["--score", str(path), "--data", str(path), "--metric", "exact"])


def test_the_name_of_a_file_of_predictions_tells_model_and_benchmark(tmp_path: Path) -> None:
    """Its rules may be named without --task, and the reports of a model's files make one average."""
    rows = [row | {"prediction": "The answer is blue", "l2_category": None} for row in choice_rows(4)]
    (tmp_path / "InternVL2_5-8B_MMStar.json").write_text(json.dumps(rows))  # PRED_FORMAT=json
    write_tsv(tmp_path / "InternVL2_5-8B_AI2D_TEST.tsv", rows)
    (tmp_path / "OpenGVLab__InternVL2_5-8B").mkdir()
    samples = [{"doc_id": n, "doc": {**row, "image": None}, "resps": [["B"]]} for n, row in enumerate(rows)]
    path = tmp_path / "OpenGVLab__InternVL2_5-8B" / "20241201_samples_realworldqa.jsonl"
    path.write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    reports = []
    for file in (tmp_path / "InternVL2_5-8B_MMStar.json", tmp_path / "InternVL2_5-8B_AI2D_TEST.tsv", path):
        reports.append(tmp_path / f"{file.stem}-report.json")
        command(["--score", str(file), "--extraction", "2026-08", "--out", str(reports[-1])])
        assert json.loads(reports[-1].read_text())["value"] == 0.25  # one of four answers is B, all are read as B
    assert average(reports)["model"] == "InternVL2_5-8B" and average(reports)["rows"][1]["published"] == 63.2


def test_a_broken_sheet_is_named(tmp_path: Path) -> None:
    pytest.importorskip("openpyxl")
    (tmp_path / "m_MMStar.xlsx").write_bytes(b"PK\x03\x04 broken")
    with pytest.raises(InputError, match=r"m_MMStar\.xlsx: is no xlsx file"):
        command(["--score", str(tmp_path / "m_MMStar.xlsx")])


def test_submissions_have_the_form_of_the_server(tmp_path: Path) -> None:
    rows = [{"id": f"test_{n}", **{k: v for k, v in row.items() if k != "answer"}} for n, row in enumerate(choice_rows(2))]
    path = write_tsv(tmp_path / "rows.tsv", rows)
    task = benchmark("mmmu-test", path)
    result = evaluated(task, lambda _: "The answer is B.", tmp_path)
    assert json.loads(submit(tmp_path / "s", task, result.scored, result.replies).read_text()) == {"test_0": "B", "test_1": "B"}
    task = benchmark("mmbench-test-en-v11", path)
    result = evaluated(task, always_a, tmp_path)
    read = list(read_rows(submit(tmp_path / "t", task, result.scored, result.replies), {}))
    assert [row["prediction"] for _, row in read] == ["A", "A"]


def test_tables_of_yes_and_no_are_in_percent_but_for_sums(tmp_path: Path) -> None:
    for name, rows, line in (("hallusionbench", yes_no_rows(), "none,100.0,100.0"), ("mme", mme_rows(), "none,400.0,200.0")):
        task = benchmark(name, write_tsv(tmp_path / f"{name}.tsv", rows))
        result = evaluated(task, perfect, tmp_path)
        _, table = export("tsv", tmp_path / "out", task, result.report, result.scored, result.replies)
        assert table.name.endswith("_score.csv") and table.read_text().splitlines()[1].startswith(line)


def test_a_sheet_needs_its_library(tmp_path: Path) -> None:
    try:
        import openpyxl  # noqa: F401
    except ImportError:
        with pytest.raises(InputError, match="writing xlsx needs openpyxl"):
            write_table(tmp_path / "x.xlsx", [{"a": 1}])
    else:
        write_table(tmp_path / "x.xlsx", [{"a": 1}])
        with pytest.raises(InputError, match="32,767 characters at most"):
            write_table(tmp_path / "x.xlsx", [{"a": "x" * 40_000}])


def test_the_page_shows_wrong_answers_and_what_was_read(task: Benchmark, tmp_path: Path) -> None:
    from ivl.evaluation.report import write

    def reply(example: Example) -> str:
        return "I say B" if int(example.id) else "no <idea>"

    write(tmp_path / "r.json", evaluated(task, reply, tmp_path, config=EvalConfig(limit=5)))
    page = (tmp_path / "r.html").read_text()
    assert "Wrong answers: 3 of 5" in page or "Wrong answers: 4 of 5" in page
    assert "read as &#x27;B&#x27;, worth 0; expected" in page and "no &lt;idea&gt;" in page and "undecided" in page
    assert page.count("data:image/") >= 3 and "MD5" not in page
