"""Benchmarks from hand-made rows: figures of known predictors, and those that the official tools gave for the same rows."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ivl.cli.eval import evaluate as command
from ivl.errors import InputError
from ivl.evaluation.benchmark import Benchmark
from ivl.evaluation.config import Method
from ivl.evaluation.data import LETTERS, PICTURES
from ivl.evaluation.run import evaluate, figures_of
from ivl.evaluation.task import Score, Scored
from ivl.evaluation.tasks import TASKS
from ivl.types import TextDelta
from tests.evaluation.rows import PICTURE, always_a, base64_of, benchmark, empty, evaluated, figures, perfect, write_tsv

CASES = [json.loads(line) for line in Path(__file__).with_name("golden.jsonl").read_text().splitlines()]
OPTIONS = ("red", "green", "blue", "yellow")


def cases(scorer: str) -> list[Any]:
    return [pytest.param(case["input"], case["expected"], id=case["id"]) for case in CASES if case["scorer"] == scorer]


def plain(name: str) -> Benchmark:
    task = TASKS[name]
    assert isinstance(task, Benchmark)
    return task


def scored(task: Benchmark, rows: Sequence[dict[str, Any]]) -> list[Scored]:
    """Score rows that hold a reply under `prediction`."""
    examples = [task.example({"question": "q", "index": str(at), PICTURES: (), **row}) for at, row in enumerate(rows)]
    return [Scored(e, task.score(str(row["prediction"]), e)) for e, row in zip(examples, rows, strict=True)]


def values(task: Benchmark, rows: list[Scored]) -> dict[str, float]:
    return {name: figure.value for name, figure in task.figures(rows).items()}


def choice_rows(count: int, **more: Any) -> list[dict[str, Any]]:
    """Questions whose right letter goes round."""
    return [
        {"index": n, "question": f"which {n}?", **dict(zip("ABCD", OPTIONS, strict=True)), "answer": "ABCD"[n % 4],
         "category": f"c{n % 2}", "image": PICTURE, **more}
        for n in range(count)
    ]  # fmt: skip


def circular_rows() -> list[dict[str, Any]]:
    """Questions with 2, 3 and 4 options, in as many rotations."""
    rows = []
    for index, size in ((1, 2), (2, 3), (3, 4)):
        for k in range(size):
            texts = [OPTIONS[(at + k) % size] for at in range(size)]
            rows.append({"index": index + 1_000_000 * k, "question": "which?", **dict(zip(LETTERS, texts, strict=False)),
                         "answer": LETTERS[texts.index("green")], "category": "c", "l2-category": "l", "split": "dev",
                         "image": PICTURE})  # fmt: skip
    return rows


def yes_no_rows() -> list[dict[str, Any]]:
    return [
        {"index": f"VD_math_0_{s}_{f}_{q}", "question": "is it?", "answer": ("Yes", "No")[(f + q) % 2], "category": "VD",
         "l2-category": "math", "image": PICTURE}
        for s in range(2) for f in range(2) for q in range(2)
    ]  # fmt: skip


def mme_rows() -> list[dict[str, Any]]:
    return [
        {"index": 2 * n + m, "question": "is it?", "answer": ("Yes", "No")[m], "category": category,
         "image_path": f"{category}/{n}.jpg", "image": PICTURE}
        for n, category in enumerate(("OCR", "OCR", "code_reasoning")) for m in range(2)
    ]  # fmt: skip


CHOICES = ("mmstar", "ai2d", "ai2d-no-mask", "seed-image", "seed-2-plus", "realworldqa", "blink", "muirbench", "mmt-bench",
           "mmmu", "mmmu-pro")  # fmt: skip


@pytest.mark.parametrize("name", CHOICES)
def test_plain_choices(name: str, tmp_path: Path) -> None:
    task = benchmark(name, write_tsv(tmp_path / "rows.tsv", choice_rows(8)))
    assert set(figures(task, perfect, tmp_path).values()) == {1.0}
    assert figures(task, always_a, tmp_path) == {"headline": 0.25, "c0": 0.5, "c1": 0.0}
    report = evaluated(task, empty, tmp_path).report
    assert (report["value"], report["range"]) == (0.0, [0.0, 1.0]) and report["undecided"]["replies"] == 8


@pytest.mark.parametrize("name", ["video-mme", "mvbench", "mlvu", "longvideobench"])
def test_choices_about_videos(name: str, tmp_path: Path) -> None:
    rows = [{key: value for key, value in row.items() if key != "image"} | {"video": "v"} for row in choice_rows(4)]
    task = benchmark(name, write_tsv(tmp_path / "rows.tsv", rows))
    assert [figures(task, reply, tmp_path)["headline"] for reply in (perfect, always_a)] == [1, 0.25]
    assert evaluated(task, empty, tmp_path).report["range"] == [0, 1]


def test_letters_that_are_no_options_decide_about_videos(tmp_path: Path) -> None:
    row = {"index": 1, "question": "which?", "A": "red", "B": "green", "answer": "A", "video": "v"}
    path = write_tsv(tmp_path / "rows.tsv", [row])
    for name, reply, letter in (
        ("video-mme", "Dogs: A", "D"), ("video-mme", "Eagles: A", "A"), ("longvideobench", "Eagles: A", "E"),
    ):  # fmt: skip
        (example,) = (task := benchmark(name, path)).examples()
        assert task.score(reply, example).answer == letter, reply
    (example,) = (task := benchmark("mvbench", path)).examples()
    said = [[replace(task, prompt=prompt).score(reply, example).value for reply in ("Answer: A", "red")]
            for prompt in ("published", "reference")]  # fmt: skip
    assert said == [[1, 1], [1, 0]], "InternVL's own code compares the first word alone"


@pytest.mark.parametrize("name", ["ocrvqa", "gqa"])
def test_answers_that_are_equal_or_not(name: str, tmp_path: Path) -> None:
    rows = [{"index": n, "question": "what?", "answer": answer, "image": PICTURE} for n, answer in enumerate(("Cat", "two"))]
    task = benchmark(name, write_tsv(tmp_path / "rows.tsv", rows))
    assert [figures(task, reply, tmp_path)["headline"] for reply in (perfect, lambda _: "cat ", always_a, empty)] == [
        1,
        0.5,
        0,
        0,
    ]


@pytest.mark.parametrize("name", ["mmbench-dev-en-v11", "mmbench-dev-cn", "ccbench"])
def test_circular_choices(name: str, tmp_path: Path) -> None:
    task = benchmark(name, write_tsv(tmp_path / "rows.tsv", circular_rows()))
    assert set(figures(task, perfect, tmp_path).values()) == {1.0}
    assert set(figures(task, always_a, tmp_path).values()) == {0.0}
    report = evaluated(task, perfect, tmp_path).report
    assert report["n"] == 3 and report["by_type"]["l"]["n"] == 3
    assert evaluated(task, perfect, tmp_path, config=config(limit=4)).report["n"] == 1, "rotations stay together"


def config(**options: Any) -> Any:
    from ivl.evaluation.config import EvalConfig

    return EvalConfig(**options)


def test_hallusionbench(tmp_path: Path) -> None:
    rows = [*yes_no_rows(), {**yes_no_rows()[0], "index": "VD_math_1_9_0_0", "image": ""}]
    task = benchmark("hallusionbench", write_tsv(tmp_path / "rows.tsv", rows))
    assert set(figures(task, perfect, tmp_path).values()) == {1.0}
    said = figures(task, lambda _: "Yes", tmp_path)
    assert (said["headline"], said["aAcc"], said["fAcc"], said["qAcc"]) == (pytest.approx(1 / 6), 0.5, 0, 0)
    report = evaluated(task, perfect, tmp_path, config=config(limit=5)).report
    assert report["n"] == 4, "a set stays whole, and a row without a picture is left out"
    assert figures(task, always_a, tmp_path)["headline"] == 0


def test_mme(tmp_path: Path) -> None:
    task = benchmark("mme", write_tsv(tmp_path / "rows.tsv", mme_rows()))
    assert figures(task, perfect, tmp_path) == {
        "headline": 400, "perception": 200, "reasoning": 200, "OCR": 200, "code_reasoning": 200,
    }  # fmt: skip
    assert figures(task, lambda _: "Yes", tmp_path)["headline"] == 100
    assert figures(task, empty, tmp_path)["headline"] == 0
    report = evaluated(task, lambda e: perfect(e) if e.row["index"] < "2" else "Yes", tmp_path).report
    assert report["points"] and report["ci95"][0] < report["value"] < report["ci95"][1]


def test_pope(tmp_path: Path) -> None:
    rows = [
        {"index": n, "question": "is there?", "answer": ("Yes", "No")[n % 2], "image": PICTURE,
         "category": "random,popular,adversarial" if n < 4 else "random"}
        for n in range(6)
    ]  # fmt: skip
    task = benchmark("pope", write_tsv(tmp_path / "rows.tsv", rows))
    assert set(figures(task, perfect, tmp_path).values()) == {1.0}
    said = figures(task, lambda _: "yes.", tmp_path)
    assert (said["recall"], said["precision"], said["acc"], said["headline"]) == (1, 0.5, 0.5, pytest.approx(2 / 3))
    assert figures(task, always_a, tmp_path)["headline"] == 0


def test_ocrbench(tmp_path: Path) -> None:
    rows = [{"index": n, "question": "text?", "answer": "['ab', 'cd']", "category": "Regular Text Recognition",
             "image": PICTURE}
            for n in range(3)]  # fmt: skip
    task = benchmark("ocrbench", write_tsv(tmp_path / "rows.tsv", rows))
    assert figures(task, lambda _: "it says CD", tmp_path) == {
        "headline": 3, "Text Recognition": 3, "Regular Text Recognition": 3,
    }  # fmt: skip
    assert figures(task, always_a, tmp_path)["headline"] == figures(task, empty, tmp_path)["headline"] == 0


def test_mathvista(tmp_path: Path) -> None:
    kinds = [("multi_choice", "text", "y", "['x', 'y']"), ("free_form", "integer", "7", "[]"), 
             ("free_form", "float", "1.5", "[]"),
             ("free_form", "text", "cat", "[]"), ("free_form", "list", "[1, 2]", "[]")]  # fmt: skip
    rows = [{"index": n, "question": "q", "question_type": q, "answer_type": a, "answer": answer, "choices": c, "task": "t",
             "skills": "['s', 'r']", "image": PICTURE} for n, (q, a, answer, c) in enumerate(kinds)]  # fmt: skip
    task = benchmark("mathvista", write_tsv(tmp_path / "rows.tsv", rows))
    assert figures(task, perfect, tmp_path) == {"headline": 1, "prefetch rate": 1, "s": 1, "r": 1, "t": 1}
    report = evaluated(task, always_a, tmp_path).report
    assert report["range"] == [0, 0.8] and report["undecided"]["replies"] == 4
    assert evaluated(task, empty, tmp_path).report["range"] == [0, 1]


def test_mmvet_without_a_judge_is_a_range(tmp_path: Path) -> None:
    rows = [{"index": n, "question": "q", "answer": "a", "category": "rec,ocr", "image": PICTURE} for n in range(2)]
    task = benchmark("mmvet", write_tsv(tmp_path / "rows.tsv", rows))
    report = evaluated(task, perfect, tmp_path).report
    assert report["range"] == [0, 1] and set(report["by_type"]) == {"rec", "ocr", "only rec_ocr"}
    assert "range" not in evaluated(task, perfect, tmp_path, config=config(undecided="wrong")).report


def test_hidden_answers_give_no_score(tmp_path: Path) -> None:
    rows = [{key: value for key, value in row.items() if key != "answer"} for row in circular_rows()]
    for name in ("mmbench-test-en-v11", "mmmu-test"):
        result = evaluated(benchmark(name, write_tsv(tmp_path / "rows.tsv", rows)), always_a, tmp_path)
        assert result.report["value"] is None and {s.score.answer for s in result.scored} == {"A"}
    task = benchmark("mmmu-test", write_tsv(tmp_path / "hub.tsv", [row | {"answer": "?"} for row in rows]))
    assert {example.answers for example in task.examples()} == {()}
    with pytest.raises(InputError, match=r"some\.tsv:3: rows before have no answer"):
        list(benchmark("mmbench-test-en", write_tsv(tmp_path / "some.tsv", [rows[0], circular_rows()[1]])).examples())


def test_a_file_of_something_else_is_named(tmp_path: Path) -> None:
    task = benchmark("mmstar", write_tsv(tmp_path / "rows.tsv", [{"index": 1, "text": "q"}]))
    with pytest.raises(
        InputError, match=r"rows\.tsv:2: has no column 'question', so it is no row of MMStar; take MMStar\.tsv of"
    ):
        list(task.examples())


@pytest.mark.parametrize(
    ("name", "row", "problem"),
    [
        ("hallusionbench",
         {"index": "5", "question": "q", "answer": "Yes", "category": "c", "l2-category": "l", "image": PICTURE},
         "is no row of HallusionBench"),
        ("mmbench-dev-en", {"index": "five", "question": "q", "A": "x", "answer": "A", "image": PICTURE},
         "is no row of MMBench"),
        ("mmmu", {"index": 1, "question": "q", "A": "x", "answer": "A", "image": base64_of(b"no picture" * 9)},
         "a picture cannot be decoded"),
        ("hallusionbench", {"index": "a_b_c_0_1", "question": "q", "answer": "Yes", "category": "c", "l2-category": "l",
                            "image": PICTURE}, "is no row of HallusionBench"),
        ("mmstar", {"index": 1, "question": "q", "A": "x", "B": "y", "answer": "b"}, "answer 'b' is no letter of an option"),
        ("mmstar", {"index": 1, "question": "q", "A": "x", "B": "y"}, "has no answer"),
        ("mmstar", {"index": 1, "question": "q", "A": "x", "B": "y", "answer": "A", "image": ""}, "picture cell is empty"),
        ("docvqa-val", {"index": 1, "question": "q", "answer": "x", "image": ""}, "picture cell is empty"),
        ("mmstar", {"question": "q", "A": "x", "B": "y", "answer": "A"}, "has no index"),
        ("ocrbench", {"index": 1, "question": "q", "answer": "x"}, "has no column 'category'"),
        ("charxiv-reasoning", {"index": 1, "question": "q", "answer": "x", "grading_query": "g"}, "has no column 'qid'"),
        ("video-mme", {"index": 1, "question": "q", "answer": "A", "video": "v"}, "it has no options"),
    ],
)  # fmt: skip
def test_a_row_that_cannot_be_read_is_named(name: str, row: dict[str, Any], problem: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=rf"rows\.tsv:2: .*{problem}"):
        list(benchmark(name, write_tsv(tmp_path / "rows.tsv", [row])).examples())


def test_a_missing_or_different_file_says_where_it_comes_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LMUData", str(tmp_path))
    task = plain("mmstar")
    with pytest.raises(
        InputError, match=r"MMStar\.tsv: no such file; .* \(MD5 e1ecd2140806c1b1bbf54b43372efb9e\), or .*MMStar"
    ):
        list(task.examples())
    with pytest.raises(InputError, match=r"MMStar\.tsv: no such file"):
        command(["no-model", "--task", "mmstar"])
    write_tsv(tmp_path / "MMStar.tsv", choice_rows(2))
    with pytest.raises(InputError, match=r"has MD5 \w{32}; take MMStar\.tsv .* as it is with --data"):
        list(task.examples())


# -- the values of the official tools


@pytest.mark.parametrize(("given", "expected"), cases("mmbench_circular_group"))
def test_a_rotated_question(given: dict[str, Any], expected: dict[str, Any]) -> None:
    task = plain("mmbench-dev-en-v11")
    assert values(task, scored(task, given["rows"])) == {"Overall": expected["hit"]}


@pytest.mark.parametrize(("given", "expected"), cases("mcq_report_acc"))
def test_tables_of_choices(given: dict[str, Any], expected: dict[str, Any]) -> None:
    task = plain("mmmu")
    rows = [{**row, "l2-category": row["l2_category"], "A": "x", "answer": "A"} for row in given["rows"]]
    examples = [task.example({"index": str(at), "question": "q", **row}) for at, row in enumerate(rows)]
    hits = [Scored(e, Score(value=float(row["hit"]))) for e, row in zip(examples, rows, strict=True)]
    table = {f"{split} {name}": value for split, row in expected.items() for name, value in row.items() if value is not None}
    assert values(task, hits) == pytest.approx(table)
    assert figures_of(task, hits, "range")["value"] == expected["validation"]["Overall"], "the headline is that of validation"


@pytest.mark.parametrize(("given", "expected"), cases("mmmu_row_vlmevalkit"))
def test_a_row_of_mmmu(given: dict[str, Any], expected: dict[str, Any]) -> None:
    task = plain("mmmu")
    (each,) = scored(task, [{"answer": given["answer"], **given["choices"], "prediction": given["prediction"]}])
    assert each.score.value == expected["hit"]


@pytest.mark.parametrize(("given", "expected"), cases("mcq_no_judge"))
def test_a_choice_without_a_judge(given: dict[str, Any], expected: str) -> None:
    task = plain("mmstar")
    (each,) = scored(task, [{"answer": "E", **given["choices"], "prediction": given["prediction"]}])
    assert (each.score.answer or "Z") == expected


@pytest.mark.parametrize(("given", "expected"), cases("mme_rating"))
def test_sums_of_mme(given: dict[str, Any], expected: dict[str, float]) -> None:
    task = plain("mme")
    found = values(task, scored(task, given["rows"]))
    assert {name: found[name] for name in expected} == pytest.approx(expected)
    assert found["Overall"] == pytest.approx(expected["perception"] + expected["reasoning"])


@pytest.mark.parametrize(("given", "expected"), cases("hallusion_rating"))
def test_shares_of_hallusionbench(given: dict[str, Any], expected: dict[str, Any]) -> None:
    task = plain("hallusionbench")
    found = {name: 100 * value for name, value in values(task, scored(task, given["rows"])).items()}
    assert found.pop("Overall") == pytest.approx(expected["headline_mean"])
    table = {(f"{part} {name}" if part != "Overall" else name): value
             for part, row in expected["per_split"].items() for name, value in row.items()}  # fmt: skip
    assert found == pytest.approx(table)


@pytest.mark.parametrize(("given", "expected"), cases("pope_rating"))
def test_figures_of_pope(given: dict[str, Any], expected: dict[str, Any]) -> None:
    task = plain("pope")
    found = {name: 100 * value for name, value in values(task, scored(task, given["rows"])).items()}
    for part, row in expected.items():
        for name, value in row.items():
            key = name if part == "Overall" else f"{part} {'F1' if name == 'Overall' else name}"
            assert found[key] == pytest.approx(value), key


@pytest.mark.parametrize(("given", "expected"), cases("ocrbench_total"))
def test_hits_of_ocrbench(given: dict[str, Any], expected: dict[str, Any]) -> None:
    task = replace(plain("ocrbench"), defects=True)  # an empty reply is read back as nan, which contains an a
    found = values(task, scored(task, [{**row, "answer": str(row["answers"])} for row in given["rows"]]))
    assert found["Overall"] == expected["Final Score"] and found["Text Recognition"] == expected["Text Recognition"]


@pytest.mark.parametrize(("given", "expected"), cases("mathvista_acc"))
def test_figures_of_mathvista(given: dict[str, Any], expected: dict[str, Any]) -> None:
    task = plain("mathvista")
    rows = scored(task, given["rows"])
    found = values(task, rows)
    assert {name: 100 * found[name] for name in expected} == pytest.approx({k: v["acc"] for k, v in expected.items()})
    assert 100 * found["prefetch rate"] == pytest.approx(expected["Overall"]["prefetch_rate"])


@pytest.mark.parametrize(("given", "expected"), cases("mmvet_acc"))
def test_figures_of_mmvet(given: dict[str, Any], expected: dict[str, Any]) -> None:
    task = replace(plain("mmvet"), defects=True)
    examples = [task.example({**row, "question": "q", "answer": "a", "index": str(row["index"])}) for row in given["rows"]]
    found = values(task, [Scored(e, Score(value=row["score"])) for e, row in zip(examples, given["rows"], strict=True)])
    table = {name: row["acc"] for name, row in expected["capability"].items()}
    table |= {name: row["acc"] for name, row in expected["combination"].items()}
    assert {name: 100 * value for name, value in found.items()} == pytest.approx(table)


@pytest.mark.parametrize(("given", "expected"), cases("mlvu_check"))
def test_a_choice_of_mlvu(given: dict[str, Any], expected: bool, tmp_path: Path) -> None:
    path = tmp_path / "MLVU_MCQ.tsv"
    path.touch()
    task = benchmark("mlvu", path)
    row = {"index": "1", "question": "q", "video": "v", **given["choices"], "answer": given["gt"][1]}
    assert (task.score(given["prediction"], task.example(row)).value == 1) == expected


def test_replies_of_any_kind_have_a_score(tmp_path: Path) -> None:
    pieces = ["A", "B", "(C)", "answer is", "Final answer:", "\\boxed{", "}", "yes", "no", "不是", "\n", "[[1,2]]", "1e999",
              "nan",
              "\ud800", "\x00", "½", "None", '{"result":', "(", ")", "[", "0.5", "red", " ", "x" * 50]  # fmt: skip
    rng, path = random.Random(0), tmp_path / "rows.tsv"
    path.touch()
    row = {"index": "VD_a_0_1_2_3", "question": "q", "A": "red", "B": "3", "C": "13", "answer": "B", "category": "c",
           "video": "v", "l2-category": "l", "question_type": "multi_choice", "answer_type": "text",
           "image_path": "p", PICTURES: ()}  # fmt: skip
    ours = (
        "mmstar",
        "hallusionbench",
        "mme",
        "mmmu",
        "mmmu-pro",
        "ocrbench",
        "mathvista",
        "mmvet",
        "mvbench",
        "mlvu",
        "video-mme",
    )
    for name in ours:
        for prompt in ("published", "cot", "mpo"):
            task = benchmark(name, path, prompt=prompt, profile="2026-08" if prompt == "cot" else "2024-12")
            example = task.example({**row, "answer": "Yes"} if name in ("hallusionbench", "mme") else row)
            for _ in range(50):
                reply = "".join(rng.choice(pieces) for _ in range(rng.randrange(30)))
                score = task.score(reply, example)
                assert 0 <= score.value <= 1
                if score.undecided:
                    assert all(isinstance(score.undecided.read(each), Score | None) for each in ("", reply, "A", "0.5"))


def test_a_vote_counts_replies_that_are_read_alike(tmp_path: Path) -> None:
    task = benchmark("mmstar", write_tsv(tmp_path / "rows.tsv", choice_rows(1)))
    replies = iter(["B. green", "A", "It is A.", "(A) red", "B. green"])

    class Sampled:
        fingerprint = "sampled"

        def stream(self, prompt: Any, params: Any) -> Any:
            yield TextDelta(next(replies), finish_reason="stop")

    method = Method(samples=5, select="vote")
    report = evaluate(task, Sampled(), config(method=method), model="m", predictions=tmp_path / "p.jsonl")
    assert report["value"] == 1, "three ways to write A are three votes"


@pytest.mark.parametrize(("given", "expected"), cases("mmbench_video_rating"))
def test_ratings_of_videos(given: dict[str, Any], expected: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "rows.tsv").touch()
    task = benchmark("mmbench-video", tmp_path / "rows.tsv")
    rows = []
    for row in given["rows"]:
        rated = row["score"] >= 0
        example = task.example({**row, "index": str(row["index"]), "question": "q", "answer": "a", "video": "v"})
        rows.append(Scored(example, Score(value=row["score"]) if rated else task.grade("a", example)))
    found = {name: f"{value:.2f}" for name, value in values(task, rows).items()}
    assert {name: found[name] for name in expected["coarse_all"]} == expected["coarse_all"]
    assert {name: found[f"{name}, rated"] for name in expected["coarse_valid"]} == expected["coarse_valid"]
