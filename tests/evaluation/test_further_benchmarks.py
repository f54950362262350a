"""Benchmarks of short answers, mathematics, several pictures, boxes and videos, from hand-made rows in their formats."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from ivl.errors import InputError
from ivl.evaluation.benchmark import Benchmark
from ivl.evaluation.data import PICTURES
from ivl.evaluation.foreign import submit
from ivl.evaluation.grading import Grader
from ivl.evaluation.task import Example, Score, Scored
from ivl.evaluation.tasks import TASKS
from ivl.evaluation.tasks.cgbench import INSTRUCTIONS, choice_right, clue_overlap
from ivl.evaluation.tasks.choice import names_answer
from ivl.evaluation.tasks.several_pictures import matches
from ivl.types import ImageRef, VideoRef
from tests.evaluation.rows import PICTURE, always_a, base64_of, benchmark, empty, evaluated, figures, perfect, png, write_tsv
from tests.evaluation.scoring.test_official import fuzzed
from tests.evaluation.test_grading import Scripted
from tests.evaluation.test_official_prompts import cases, written

LARGE = base64_of(Image.effect_noise((32, 32), 99).tobytes())
"""Pictures in jsonl are told from paths by their length."""
SHORT = "Answer the question using a single word or phrase."
LETTER = "Answer with the option's letter from the given choices directly."


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def asked(task: Benchmark) -> str:
    """The text of the first question."""
    return written(next(iter(task.examples())).conversation)


def judged(task: Benchmark, *replies: str, folder: Path) -> list[Score]:
    """Scores of the reply `r` to every row, which a scripted judge decides."""
    folder.mkdir(exist_ok=True)
    return Grader(Scripted(*replies), "j", folder / "judge.jsonl").decide([task.score("r", each) for each in task.examples()])


def test_chartqa(tmp_path: Path) -> None:
    rows = [
        {"index": n, "question": "how many?", "answer": answer, "split": split, "image": PICTURE}
        for n, (answer, split) in enumerate((("10", "test_human"), ("A", "test_human"), ("Yes", "test_augmented")))
    ]
    task = benchmark("chartqa", write_tsv(tmp_path / "rows.tsv", rows))
    assert figures(task, perfect, tmp_path) == {"headline": 1, "test_human": 1, "test_augmented": 1}
    assert figures(task, always_a, tmp_path) == {"headline": pytest.approx(1 / 3), "test_human": 0.5, "test_augmented": 0}
    assert figures(task, empty, tmp_path)["headline"] == 0
    assert figures(replace(task, profile="2026-08"), lambda _: "10.52", tmp_path)["headline"] == 0
    for older in (task, replace(task, profile="2026-08", prompt="reference")):
        assert figures(older, lambda _: "10.52", tmp_path)["headline"] == pytest.approx(1 / 3), "5% of the reply's number"
    assert asked(task) == f"<image>\nhow many?\n{SHORT}" and next(iter(task.examples())).conversation[0].content[0] == (
        ImageRef(png(), 12)
    )
    assert asked(replace(task, prompt="reference")) == f"<image>\nhow many? {SHORT}"


def test_a_folder_of_files_is_named_by_them(tmp_path: Path) -> None:
    folder = tmp_path / "chartqa"
    folder.mkdir()
    for split, answer in (("test_human", "10"), ("test_augmented", "Yes")):
        write_jsonl(folder / f"{split}.jsonl", [{"image": "1.png", "question": "q", "question_id": 0, "answer": answer}])
    task = benchmark("chartqa", folder)
    assert figures(task, lambda _: "10", tmp_path) == {"headline": 0.5, "test_augmented": 0, "test_human": 1}
    assert figures(benchmark("chartqa", folder / "test_human.jsonl"), perfect, tmp_path)["test_human"] == 1


@pytest.mark.parametrize(("name", "tiles"), [("docvqa-val", 18), ("infovqa-val", 24)])
def test_documents(name: str, tiles: int, tmp_path: Path) -> None:
    (tmp_path / "1.png").write_bytes(png())
    table = write_tsv(tmp_path / "rows.tsv", [{"index": 1, "question": "who?", "answer": "['abcd', 'x']", "image": PICTURE}])
    lines = write_jsonl(tmp_path / "val.jsonl", [
        {"image": "1.png", "question": "who?", "question_id": 7, "answer": ["abcd", "x"]}
    ])  # fmt: skip
    for path in (table, lines):
        task = benchmark(name, path)
        folder = tmp_path / path.stem
        folder.mkdir()
        assert [figures(task, reply, folder)["headline"] for reply in (perfect, lambda _: "abce", empty)] == [1, 0.75, 0]
        assert figures(task, always_a, folder)["headline"] == 0
        (part, *_), text = next(iter(task.examples())).conversation[0].content, asked(task)
        assert isinstance(part, ImageRef) and part.max_tiles == tiles and text == f"<image>\nwho?\n{SHORT}"


def test_hidden_documents_make_a_list(tmp_path: Path) -> None:
    path = write_tsv(tmp_path / "rows.tsv", [{"index": 7, "question": "who?", "image": PICTURE}])
    result = evaluated(benchmark("docvqa-test", path), lambda _: "Bob", tmp_path)
    assert result.report["value"] is None
    file = submit(tmp_path / "submission", benchmark("docvqa-test", path), result.scored, result.replies)
    assert json.loads(file.read_text()) == [{"questionId": 7, "answer": "Bob"}]


def test_textvqa(tmp_path: Path) -> None:
    people = ["red"] * 6 + ["dark red"] * 2 + ["B"] * 2
    path = write_tsv(tmp_path / "rows.tsv", [{"index": 1, "question": "color?", "answer": str(people), "image": PICTURE}])
    task = benchmark("textvqa", path)
    said = [figures(task, reply, tmp_path)["headline"] for reply in (perfect, lambda _: "Dark red.", always_a, empty)]
    assert said == pytest.approx([1, 0.6, 0, 0])
    (example,) = replace(task, path=write_tsv(path, [{"index": 1, "question": "how many?", "answer": "2"}])).examples()
    example = replace(example, answers=("2",) * 10)
    assert [replace(task, profile=profile).score("2.", example).value for profile in ("2024-12", "2026-08")] == [1, 0]


def test_the_reference_prompt_scores_as_its_code_does(tmp_path: Path) -> None:
    row = {"index": 1, "question": "q", "image": PICTURE, "category": "OCR", "image_path": "x", "A": "red", "B": "green"}
    opened = {key: value for key, value in row.items() if key not in ("A", "B")}
    numbers = {"question_type": "free_form", "answer_type": "float", "precision": "1.0", "choices": "[]"}
    cases: list[tuple[str, dict[str, Any], str, float, float]] = [
        ("mmstar", {**row, "answer": "A"}, "An answer is B", 0, 1),
        ("mmmu", {**opened, "answer": "5"}, "so it is 5.", 1, 1),
        ("mmmu", {**opened, "answer": "5"}, "so it is 15.", 1, 0),
        ("mmmu", {**opened, "answer": "['24/7', '3.429']"}, "so it is 3.43", 0, 1),
        ("mme", {**row, "answer": "No"}, "Not", 0, 1),
        ("pope", {**row, "answer": "Yes"}, "Nothing", 0, 1),
        ("chartqa", {**row, "answer": "10"}, "10.52", 1, 1),
        ("ai2d", {**row, "answer": "A"}, "A. red", 1, 0),
        ("ai2d", {**row, "answer": "A"}, "a ", 0, 1),
        ("seed-image", {**row, "answer": "A"}, "it is red", 1, 0),
        ("seed-image", {**row, "answer": "A"}, "A or B", 0, 1),
    ]
    for name, columns, reply, published, reference in cases:
        task = benchmark(name, write_tsv(tmp_path / f"{name}.tsv", [columns]))
        (example,) = task.examples()
        assert task.score(reply, example).value == published, name
        assert replace(task, prompt="reference").score(reply, example).value == reference, name
    path = write_tsv(tmp_path / "mathvista.tsv", [{**row, **numbers, "answer": "0.7"}])
    task = benchmark("mathvista", path)
    assert [each.value for each in judged(task, "0.65", folder=tmp_path / "j")] == [0]
    assert [each.value for each in judged(replace(task, prompt="reference"), "0.65", folder=tmp_path / "k")] == [1]
    (example,) = replace(task, path=path).examples()
    for reply, undecided, value in (("0.65", False, 1), ("0.9", False, 0), ("about 0.65", True, 0)):
        score = replace(task, prompt="reference").score(reply, example)
        assert (score.undecided is not None, score.value) == (undecided, value), reply


def test_charxiv(tmp_path: Path) -> None:
    rows = [
        {"index": n, "question": "title?", "answer": "x", "grading_query": f"{n}: grade {{PREDICTION}}", "qid": qid,
         "image": PICTURE}
        for n, qid in enumerate((1, 17))
    ]  # fmt: skip
    task = benchmark("charxiv-descriptive", write_tsv(tmp_path / "rows.tsv", rows))
    report = evaluated(task, perfect, tmp_path).report
    assert report["range"] == [0, 1] and set(report["by_type"]) == {"information extraction", "compositionality"}
    replies = ["no json", '{"extracted_answer": "x", "score": 1}', '{"score": 1}']
    scores = judged(task, replies[0], replies[2], replies[1], folder=tmp_path / "j")
    assert [(each.value, each.answer) for each in scores] == [(1, "x"), (0, "")]
    assert asked(task) == f"<image>\ntitle?\n{SHORT}"


def test_mathvision(tmp_path: Path) -> None:
    rows = [
        {"index": 1, "question": "which?", "answer": "A", "choices": "['2', '4']", "category": "algebra", "image": PICTURE},
        {"index": 2, "question": "how many?", "answer": "7", "choices": "[]", "category": "counting", "image": PICTURE},
    ]
    task = benchmark("mathvision", write_tsv(tmp_path / "rows.tsv", rows))
    assert figures(task, perfect, tmp_path) == {"headline": 1, "algebra": 1, "counting": 1}
    assert evaluated(task, always_a, tmp_path).report["range"] == [0.5, 1]
    assert evaluated(task, empty, tmp_path).report["range"] == [0, 1]
    first, second = judged(task, "B", "14/2", folder=tmp_path / "j")
    assert (first.value, first.answer, second.value) == (0, "B", 1)
    assert asked(task) == "<image>\nwhich?"


def test_mathverse(tmp_path: Path) -> None:
    question = "Please directly answer the question.\nQuestion: Find it\nChoices:\nA:1\nB:2"
    rows = [
        {"index": n, "question": question, "query_cot": "Please think.", "question_for_eval": "Find it", "answer": "A",
         "problem_version": version, "metadata": "{'subject': 'Plane', 'subfield': 'Angle'}", "image": PICTURE}
        for n, version in enumerate(("Text Lite", "Vision Only"))
    ]  # fmt: skip
    task = benchmark("mathverse", write_tsv(tmp_path / "rows.tsv", rows))
    assert figures(task, perfect, tmp_path) == {
        "headline": 1, "Text Lite": 1, "Vision Only": 1, "Plane": 1, "Angle": 1,
    }  # fmt: skip
    assert evaluated(task, empty, tmp_path).report["range"] == [0, 1]
    # The judge extracts for both, and compares the one that is not written as the answer.
    scores = judged(task, "A", "A:1", "1", folder=tmp_path / "j")
    assert [each.value for each in scores] == [1, 1]
    assert [each.value for each in judged(task, "B", "C", "0", "0", folder=tmp_path / "k")] == [0, 0]
    assert asked(task) == f"<image>\n{question}"
    assert asked(replace(task, prompt="cot")) == "<image>\nPlease think."
    assert asked(replace(task, prompt="mpo")).endswith("Question:\n\nFind it\nA:1\nB:2")


@pytest.mark.parametrize(("given", "expected"), cases("olympiad_extract"))
def test_the_answer_of_an_olympiad_reply(given: dict[str, Any], expected: str, tmp_path: Path) -> None:
    row = {
        "index": 1,
        "question": "Find x.",
        "final_answer": "['5']",
        "source": "maths_zh_CEE" if given["chinese"] else "maths",
    }
    task = benchmark("olympiadbench", write_tsv(tmp_path / "rows.tsv", [row]))
    (example,) = task.examples()
    assert task.score(given["text"], example).answer == expected


def test_olympiadbench(tmp_path: Path) -> None:
    pytest.importorskip("math_verify")
    rows = [
        {"index": 1, "question": "Find x.", "final_answer": r"['\\frac{1}{2}']", "source": "OE_MM_maths_en_COMP"},
        {"index": 2, "question": "Find y.", "final_answer": "['3,5']", "error": "0.2,1e-8", "source": "OE_TO_physics_en_COMP"},
    ]  # fmt: skip
    task = benchmark("olympiadbench", write_tsv(tmp_path / "rows.tsv", rows))
    assert [each.row.get("error") for each in task.examples()] == [None, "0.2,1e-8"], "exports have the columns that were read"
    assert figures(task, perfect, tmp_path)["headline"] == 1
    replies = {"1": "So the final answer is \\boxed{0.5}.", "2": "So the final answer is 3.1, 5."}
    assert figures(task, lambda e: replies[e.id], tmp_path)["headline"] == 1
    assert figures(replace(task, defects=True), lambda e: replies[e.id], tmp_path)["headline"] == 0.5
    assert figures(task, always_a, tmp_path)["headline"] == figures(task, empty, tmp_path)["headline"] == 0
    rows = [{**rows[1], "error": "0.2,"}, {**rows[1], "answer_type": "Tuple"}]
    task = benchmark("olympiadbench", write_tsv(tmp_path / "rows.tsv", rows))
    assert [task.score("3.1,5", each).value for each in task.examples()] == [1, 0], "an empty error is 1e-8, as that of tuples"


@pytest.mark.parametrize(("given", "expected"), cases("crpe_is_correct"))
def test_an_answer_of_crpe(given: dict[str, Any], expected: bool) -> None:
    assert names_answer(given["prediction"], given["answer"], cut=4) == expected


def test_crpe(tmp_path: Path) -> None:
    rows = [
        {"index": n, "question": "what?", "answer": f"{'ABCD'[n % 4]}. dog", "category": ("subject", "object")[n // 4],
         "image_path": "1.png"}
        for n in range(8)
    ]  # fmt: skip
    task = benchmark("crpe-relation", write_tsv(tmp_path / "CRPE_RELATION.tsv", rows))
    assert figures(task, perfect, tmp_path) == {"headline": 1, "subject": 1, "object": 1}
    assert figures(task, always_a, tmp_path)["headline"] == figures(task, empty, tmp_path)["headline"] == 0
    assert figures(task, lambda e: "B" if e.id == "4" else perfect(e), tmp_path) == {
        "headline": 0.5, "subject": 1, "object": 0,
    }  # fmt: skip
    assert names_answer("the fog", "A. dog", cut=4) and not names_answer("the fog", "A. dog")
    assert asked(task) == "<image>\nwhat?"


def test_mmhal(tmp_path: Path) -> None:
    rows = [
        {"question": f"what {kind}?", "image": LARGE, "image_content": ["a dog"], "gt_answer": "A dog.", "question_type": kind,
         "image_id": "x"}
        for kind in ("attribute", "other")
    ]  # fmt: skip
    task = benchmark("mmhal", write_jsonl(tmp_path / "rows.jsonl", rows))
    report = evaluated(task, perfect, tmp_path).report
    assert report["range"] == [0, 6] and report["by_type"]["hallucination rate"]["range"] == [1, 0]
    scores = judged(task, "Rating: 9", "Good. Rating: 2", "Rating: 4", folder=tmp_path / "j")
    assert [each.value for each in scores] == [4, 2]
    rated = [Scored(*pair) for pair in zip(task.examples(), scores, strict=True)]
    assert task.figures(rated)["hallucination rate"].value == 0.5
    assert asked(task) == "<image>\nwhat attribute?"


def test_mlvu_without_options(tmp_path: Path) -> None:
    row = {"index": 1, "question": "What happens?", "answer": "A dog runs.", "video": "v.mp4", "task_type": "summary"}
    task = benchmark("mlvu-open", write_tsv(tmp_path / "rows.tsv", [row]))
    report = evaluated(task, perfect, tmp_path).report
    assert report["range"] == [0, 10] and report["points"] and set(report["by_type"]) == {"summary"}
    assert [each.value for each in judged(task, "4", "10, 3", "4, 3", folder=tmp_path / "j")] == [7]
    assert "pay attention to every detail. Based on your observations, answer the given questions." in asked(task)


def test_mmvet_v2_asks_for_what_stands_before_the_first_picture(tmp_path: Path) -> None:
    rows = {"v2_0": {"question": "What is it?<IMG>v2_0.png<IMG>And this?<IMG>v2_1.png", "answer": "a", "capability": ["rec"]}}
    (tmp_path / "mm-vet-v2.json").write_text(json.dumps(rows))
    task = benchmark("mmvet-v2", tmp_path / "mm-vet-v2.json")
    assert asked(task) == "<image>\nWhat is it? Answer this question in detail."
    (example,) = task.examples()
    assert example.id == "v2_0" and example.conversation[0].content[0] == ImageRef(str(tmp_path / "v2_0.png"), 6)
    assert [each.value for each in judged(task, "0.5", folder=tmp_path / "j")] == [0.5]


def test_refcoco(tmp_path: Path) -> None:
    box = {"bbox_x1": 100, "bbox_y1": 100, "bbox_x2": 300, "bbox_y2": 200}
    table = [
        {"index": n, "question": "box of it?", "split": split, "width": 400, "height": 300, **box, "image": PICTURE}
        for n, split in enumerate(("RefCOCO_val", "RefCOCO_val", "RefCOCOg_test"))
    ]
    task = benchmark("refcoco", write_tsv(tmp_path / "rows.tsv", table))
    right = "<box>[[250, 333, 750, 667]]</box>"
    assert figures(task, lambda _: right, tmp_path)["headline"] == 1
    half = figures(task, lambda e: right if e.row["index"] == "0" else "", tmp_path)
    assert (half["headline"], half["RefCOCO_val"], half["RefCOCOg_test"]) == (0.25, 0.5, 0)
    assert figures(task, always_a, tmp_path)["headline"] == figures(task, empty, tmp_path)["headline"] == 0

    for answer in ("[100, 100, 300, 200]", "[0.25, 0.333, 0.75, 0.667]"):  # pixels or fractions, where there are no columns
        row = {"index": 1, "question": "box of it?", "split": "s", "width": 400, "height": 300, "answer": answer}
        assert figures(benchmark("refcoco", write_tsv(tmp_path / "one.tsv", [row])), lambda _: right, tmp_path)["headline"] == 1

    folder = tmp_path / "refcoco"
    folder.mkdir()
    row = {"image": "1.jpg", "sent": "left dog", "bbox": [100, 100, 300, 200], "width": 400, "height": 300}
    for split in ("refcoco_val", "refcoco+_testA"):
        write_jsonl(folder / f"{split}.jsonl", [row])
    task = benchmark("refcoco", folder)
    asks = "Please provide the bounding box coordinate of the region this sentence describes: <ref>left dog</ref>"
    assert asked(task) == f"<image>\n{asks}"
    assert figures(task, lambda _: right, tmp_path, name="folder")["refcoco+_testA"] == 1
    assert figures(task, lambda _: "[750, 667, 250, 333]", tmp_path, name="turned")["headline"] == 0, "corners are not ordered"


@pytest.mark.parametrize(("given", "expected"), cases("mantis_reference"))
def test_a_row_of_mantis(given: dict[str, Any], expected: int, tmp_path: Path) -> None:
    row = {**given, "id": "x", "question": "<image> <image>\nIs <image> left?", "images": [LARGE] * 2}
    row["options"] = given["options"] if given["question_type"] == "multi-choice" else []
    task = benchmark("mantis", write_jsonl(tmp_path / "rows.jsonl", [row]))
    (example,) = task.examples()
    assert task.score(given["prediction"], example).value == expected
    form = f"\n(A) one\n(B) two\n{LETTER}" if row["options"] else f"\n{SHORT}"
    assert written(example.conversation) == f"Image-1: <image>\nImage-2: <image>\nIs Image-1 left?{form}"
    assert {part.max_tiles for part in example.conversation[0].content if isinstance(part, ImageRef)} == {6}


@pytest.mark.parametrize(("given", "expected"), cases("mirb_row"))
def test_a_row_of_mirb(given: dict[str, Any], expected: float) -> None:
    assert matches(given["prediction"], given["answer"], given["task"])[0] == expected


def test_mirb(tmp_path: Path) -> None:
    folder = tmp_path / "MIRB"
    folder.mkdir()
    for task, answer in {"count": "3", "analogy": "no", "food": "A", "codeu": "B", "count_concat": "3"}.items():
        rows = [{"questions": "which?", "answers": answer, "images": ["1.png", "2.png"]}]
        (folder / f"{task}.json").write_text(json.dumps(rows))
    task = benchmark("mirb", folder)
    assert figures(task, perfect, tmp_path) == {
        "headline": 1, "Knowledge": 1, "Reasoning": 1, "Perception": 1, "analogy": 1, "codeu": 1, "count": 1, "food": 1,
    }  # fmt: skip
    assert figures(task, always_a, tmp_path)["headline"] == pytest.approx((1 + 0.5 + 0) / 3)
    assert figures(task, empty, tmp_path)["headline"] == pytest.approx((0 + 0.5 + 0) / 3), "no yes is a no"
    assert asked(task) == "Image-1: <image>\nImage-2: <image>\nwhich?\nAnswer with a single word."


def test_mmiu(tmp_path: Path) -> None:
    given = {"input_image_path": ["./a/1.png", "./a/2.png"], "question": "which?", "context": "Select from A: red B: green"}
    rows = [
        {"task": task, "options": "A: red\nB: green", "context": "", "input": given,
         "output": {"output_text": answer}}
        for task, answer in (("point_tracking", "A"), ("point_tracking", "B"), ("Counting", "B"))
    ]  # fmt: skip
    task = benchmark("mmiu", write_jsonl(tmp_path / "mmiu.jsonl", rows))
    assert set(figures(task, perfect, tmp_path).values()) == {1}
    said = figures(task, always_a, tmp_path)
    assert (said["headline"], said["spatial"], said["Counting"]) == (0.25, 0.5, 0)
    assert figures(replace(task, defects=True), always_a, tmp_path)["headline"] == 0.5
    assert (
        figures(task, lambda _: "it is green", tmp_path)["headline"] == 0.75 and figures(task, empty, tmp_path)["headline"] == 0
    )
    text = "Image-1: <image>\nImage-2: <image>\nwhich?\nSelect from A: red B: green"
    assert asked(task) == f"{text}\n{LETTER}"


def seconds(result: str) -> dict[str, Any]:
    return {"response": f'```json\n{{"result": {result}}}\n```', "answer": "[[10, 20]]", "task_mode": "miou", "duration": 100}


@pytest.mark.parametrize(
    ("given", "expected"),
    [*cases("cgbench_post_process"), (seconds('"10, 20"'), -1), (seconds("5"), -1), (seconds("[[0.1, 0.2, 0.3]]"), 1)],
)
def test_a_reply_of_cgbench(given: dict[str, Any], expected: float) -> None:
    if given["task_mode"] == "miou":
        value = clue_overlap(given["response"], json.loads(given["answer"]), given["duration"])
    else:
        value = choice_right(given["response"], given["answer"])
    assert (-1 if value is None else value) == pytest.approx(expected)


def test_cgbench(tmp_path: Path) -> None:
    rows = [
        {"index": 3 * n + k, "qid": n, "task_mode": mode, "question": "which?", "choices": "['red', 'green']", "duration": 100,
         "answer": "[[10, 20]]" if mode == "miou" else "A", "video": "v.mp4", "clue_video_path": "c.mp4"}
        for n in range(2) for k, mode in enumerate(INSTRUCTIONS)
    ]  # fmt: skip
    task = benchmark("cgbench", write_tsv(tmp_path / "rows.tsv", rows))
    assert set(figures(task, perfect, tmp_path).values()) == {1}
    assert figures(task, empty, tmp_path)["headline"] == 0

    def reply(example: Example) -> str:
        return {"0": "B", "2": "[[10, 16]]", "5": "[[10, 12]]"}.get(example.id) or perfect(example)

    assert figures(task, reply, tmp_path) == pytest.approx(
        {"headline": 0.5, "clue_acc": 1, "miou": 0.4, "CRR": 0.5, "acc@iou": 0.1, "rec@iou": 0.6}
    )
    unread = figures(replace(task, defects=True), lambda e: "" if e.id in ("0", "5") else perfect(e), tmp_path)
    assert unread == {"headline": 1, "clue_acc": 1, "miou": 1, "CRR": 1, "acc@iou": 0, "rec@iou": 1}
    text = asked(task)
    assert text.startswith("Frame-1: <image>\n") and text.endswith("Question: which?\n\nA:red\nB:green\n\n")
    clue = list(task.examples())[1].conversation[0].content[0]
    assert isinstance(clue, VideoRef) and str(clue.source).endswith("c.mp4")


ROWS: dict[str, dict[str, Any]] = {
    "docvqa-val": {"answer": "['red']"}, "chartqa": {"answer": "5%", "split": "s"}, "textvqa": {"answer": str(["red"] * 10)},
    "charxiv-reasoning": {"answer": "5", "grading_query": "{PREDICTION}", "inst_category": "1"},
    "mathvision": {"answer": "7", "choices": "[]", "category": "c"},
    "mathverse": {"answer": "A", "problem_version": "v", "metadata": "{}"},
    "crpe-exist": {"answer": "A. dog", "category": "exist"},
    "refcoco": {"width": "4", "height": "3", "answer": "[0, 0, 1, 1]", "split": "s"},
    "mantis": {"answer": "A", "question_type": "multi-choice", "A": "x", "B": "y"},
    "mirb": {"answer": "3", "task": "count"}, "mmiu": {"answer": "A", "A": "x", "B": "y", "context": "c", "task": "t"},
    "cgbench": {"answer": "[[10, 20]]", "task_mode": "miou", "qid": "1", "duration": "9", "video": "v", "choices": "[]"},
}  # fmt: skip


@pytest.mark.parametrize("name", ROWS)
def test_replies_of_any_kind_have_a_score(name: str, tmp_path: Path) -> None:
    pytest.importorskip("math_verify")
    task = benchmark(name, write_tsv(tmp_path / "rows.tsv", [{"index": "1", "question": "q", **ROWS[name]}]))
    (example,), rng = task.examples(), random.Random(0)
    for _ in range(30 if name == "mathvision" else 200):
        reply = fuzzed(rng)[:2000]
        score = task.score(reply, example)
        assert 0 <= score.value <= 1
        if score.undecided:
            assert all(isinstance(score.undecided.read(each), Score | None) for each in ("", reply, "{}", '{"score": []}'))


@pytest.mark.parametrize(
    ("name", "columns"),
    [
        ("crpe-exist", {"index": "x"}),
        ("refcoco", {"width": "wide"}),
        ("cgbench", {"task_mode": "what"}),
        ("mirb", {"task": ""}),
    ],
)
def test_a_row_that_cannot_be_read_is_named(name: str, columns: dict[str, str], tmp_path: Path) -> None:
    path = write_tsv(tmp_path / "rows.tsv", [{"index": "1", "question": "q", **ROWS[name], **columns}])
    with pytest.raises(InputError, match=rf"rows\.tsv:2: .* no row of .*take {TASKS[name].file}\.tsv"):  # type: ignore[attr-defined]
        list(benchmark(name, path).examples())


def test_rows_keep_their_pictures(tmp_path: Path) -> None:
    """A row of the hub holds pictures as bytes."""
    pq = pytest.importorskip("pyarrow.parquet")
    pa = pytest.importorskip("pyarrow")
    row = {"question_id": 1, "question": "color?", "answers": ["red"] * 10, "image": {"bytes": png(), "path": None}}
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "rows.parquet")
    task = benchmark("textvqa", tmp_path / "rows.parquet")
    assert figures(task, perfect, tmp_path)["headline"] == 1
    (example,) = task.examples()
    assert PICTURES not in example.row and example.conversation[0].content[0] == ImageRef(png(), 6)
