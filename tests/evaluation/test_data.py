"""Files of benchmarks as others write them: VLMEvalKit's TSV, tables with pictures inside, jsonl with paths."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ivl.errors import InputError
from ivl.evaluation.data import PICTURES, literal, options_of, read_rows
from ivl.evaluation.tasks import TASKS
from ivl.types import ImageRef
from tests.evaluation.rows import PICTURE, base64_of, benchmark, png, write_tsv


def rows(path: Path, **columns: str) -> list[dict[str, Any]]:
    return [row for _, row in read_rows(path, columns)]


def test_pictures_of_a_tsv_are_shared_listed_or_files(tmp_path: Path) -> None:
    green = base64_of(png("green", (64, 64)))
    path = write_tsv(tmp_path / "Set.tsv", [
        {"index": 1, "image": "3", "question": "shows the picture of a later row"},
        {"index": 2, "image": f"['{PICTURE}', '{green}']", "question": "two\nlines\tand a tab"},
        {"index": 3, "image": PICTURE, "question": "its own"},
        {"index": 4, "image": "3", "question": "shared"},
        {"index": 5, "image": "", "question": "none"},
    ])  # fmt: skip
    read = rows(path)
    assert [row[PICTURES] for row in read] == [(png(),), (png(), png("green", (64, 64))), (png(),), (png(),), ()]
    assert read[1]["question"] == "two\nlines\tand a tab" and read[0]["index"] == "1"
    (tmp_path / "images" / "Paths").mkdir(parents=True)
    (tmp_path / "images" / "Paths" / "a.png").write_bytes(png())
    absolute = tmp_path / "b.png"
    absolute.write_bytes(png("blue"))
    path = write_tsv(tmp_path / "Paths.tsv", [{"index": 1, "image_path": f"['a.png', '{absolute}']"}])
    assert rows(path)[0][PICTURES] == (str(tmp_path / "images/Paths/a.png"), str(absolute))


def test_a_cell_of_megabytes_and_options_that_look_missing(tmp_path: Path) -> None:
    big = base64_of(png() + b"x" * 200_000)
    path = write_tsv(tmp_path / "t.tsv", [{"index": 1, "image": big, "A": "None", "B": "NA", "C": "3", "D": "", "E": "later"}])
    (row,) = rows(path)
    assert len(row[PICTURES][0]) > 200_000 and options_of(row) == {"A": "None", "B": "NA", "C": "3", "E": "later"}


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"index": 1, "image": "7"}, r"t\.tsv:2: its picture is that of row '7', which has none"),
        ({"index": 1, "image": "?" * 80}, r"t\.tsv:2: its picture is no base64"),
    ],
)
def test_broken_pictures_are_named(tmp_path: Path, row: dict[str, Any], problem: str) -> None:
    with pytest.raises(InputError, match=problem):
        rows(write_tsv(tmp_path / "t.tsv", [row]))


def test_a_line_with_too_few_cells_is_named(tmp_path: Path) -> None:
    path = tmp_path / "t.tsv"
    path.write_text("index\tquestion\n1\n")
    with pytest.raises(InputError, match=r"t\.tsv:2: has another number of cells"):
        rows(path)


def test_lists_are_read_as_literals_and_nothing_is_executed() -> None:
    assert literal("[" + "1," * 60_000 + "1]") == ["[" + "1," * 60_000 + "1]"]  # a syntax tree of gigabytes, had it megabytes
    assert literal(f"['{'[' * 200_000}', \"it's\", 'a\\'b']") == ["[" * 200_000, "it's", "a'b"]
    assert literal("['a', 'b']") == ["a", "b"] and literal("[__import__('os')]") == ["[__import__('os')]"]
    assert literal("a") == ["a"] and literal(["x"]) == ["x"] and literal("[broken") == ["[broken"]


def write_parquet(path: Path, table: list[dict[str, Any]]) -> Path:
    pq = pytest.importorskip("pyarrow.parquet")
    import pyarrow as pa

    pq.write_table(pa.Table.from_pylist(table), path)
    return path


HUB_ROWS: dict[str, dict[str, Any]] = {
    "mmstar": {"index": 5, "question": "q", "A": "x", "B": "y", "answer": "B", "category": "c",
               "image": {"bytes": png(), "path": ""}},
    "mmmu": {"id": "validation_Art_1", "question": "q <image 1>", "options": "['x', 'y']", "answer": "B", "subfield": "c",
             "image_1": {"bytes": png(), "path": ""}, "image_2": {"bytes": png("blue"), "path": ""}},
    "mmbench-dev-en": {"index": 5, "question": "q", "hint": "nan", "A": "x", "B": "y", "C": "nan", "D": float("nan"),
                       "answer": "B", "L2-category": "c", "image": {"bytes": png(), "path": ""}},
    "ai2d": {"question": "q", "options": ["x", "y"], "answer": "1", "image": {"bytes": png(), "path": ""}},
    "seed-image": {"question_id": "5", "question": "q", "choice_a": "x", "choice_b": "y", "answer": "B", "question_type_id": 3,
                   "data_type": "image", "image": [{"bytes": png(), "path": ""}]},
    "blink": {"idx": "val_1", "question": "q", "sub_task": "c", "choices": ["x", "y"], "answer": "(B)", "prompt": "p",
              "image_1": {"bytes": png(), "path": ""}, "image_2": None},
    "muirbench": {"idx": "5", "task": "c", "question": "q <image>", "options": ["x", "y"], "answer": "B",
                  "image_list": [{"bytes": png(), "path": ""}]},
    "mmmu-pro": {"id": "5", "question": "q", "options": "['x', 'y']", "answer": "B", "subject": "c",
                 "image_1": {"bytes": png(), "path": ""}},
}  # fmt: skip


@pytest.mark.parametrize("name", HUB_ROWS)
def test_tables_of_the_hub_become_the_rows_of_a_tsv(name: str, tmp_path: Path) -> None:
    task = benchmark(name, write_parquet(tmp_path / "rows.parquet", [HUB_ROWS[name]]))
    (example,) = task.examples()
    assert example.answers == ("B",) and options_of(example.row) == {"A": "x", "B": "y"} and example.row["question"][0] == "q"
    assert task.score("B", example).value == 1 and task.score("x", example).value == 0
    pictures = [part for part in example.conversation[0].content if hasattr(part, "source")]
    assert len(pictures) == (2 if name == "mmmu" else 1) and "nan" not in example.conversation[0].text


def test_questions_of_pope_are_counted_anew_in_every_category(tmp_path: Path) -> None:
    rows = [{"question_id": "1", "question": "q", "answer": "yes", "category": kind} for kind in ("random", "popular")]
    assert [e.id for e in benchmark("pope", write_parquet(tmp_path / "rows.parquet", rows)).examples()] == ["0", "1"]


def test_the_release_of_mme_has_a_text_file_for_each_subtask(tmp_path: Path) -> None:
    texts, pictures = tmp_path / "Your_Results", tmp_path / "MME_Benchmark_release_version" / "OCR" / "images"
    texts.mkdir(), pictures.mkdir(parents=True)
    (pictures / "1.jpg").write_bytes(png())
    ask = "Please answer yes or no."
    (texts / "OCR.txt").write_text(f"1.jpg\tIs it red? {ask}\tYes\n1.jpg\tIs it blue? {ask}\tNo\n")
    (texts / "count.txt").write_text(f"2.jpg\tIs there one? {ask}\tNo\n")
    red, blue, one = benchmark("mme", texts).examples()
    assert (red.id, red.truth, red.cluster, red.group) == ("OCR 1", "Yes", "OCR 1.jpg", "OCR") and blue.cluster == red.cluster
    assert red.conversation[0].content[0] == ImageRef(str(pictures / "1.jpg"), 6)
    assert (one.truth, one.group, one.row["image_path"]) == ("No", "count", "2.jpg")
    (texts / "scene.txt").write_text("3.jpg\tIs it?\n")
    with pytest.raises(InputError, match=r"scene\.txt:1: needs picture, question, answer with tabs between"):
        list(benchmark("mme", texts).examples())


def test_questions_of_pope_find_their_answers_in_files_beside(tmp_path: Path) -> None:
    rows = [
        {"question_id": n, "image": "COCO_1.jpg", "text": f"Is there a {what}?", "category": kind}
        for n, what, kind in ((1, "cat", "random"), (1, "dog", "popular"))
    ]
    path = tmp_path / "llava_pope_test.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    with pytest.raises(InputError, match=r"coco_pope_random\.json"):
        list(benchmark("pope", path).examples())
    (tmp_path / "coco").mkdir(), (tmp_path / "val2014").mkdir()
    (tmp_path / "val2014" / "COCO_1.jpg").write_bytes(png())
    for kind, label in (("random", "yes"), ("popular", "no")):
        (tmp_path / "coco" / f"coco_pope_{kind}.json").write_text(json.dumps({"question_id": 1, "label": label}) + "\n")
    cat, dog = benchmark("pope", path).examples()
    assert [(e.id, e.truth, e.group) for e in (cat, dog)] == [("random 1", "Yes", "random"), ("popular 1", "No", "popular")]
    assert cat.conversation[0].content[0].source == str(tmp_path / "val2014" / "COCO_1.jpg")
    assert "Is there a cat?" in cat.conversation[0].text
    path.write_text(json.dumps(rows[0] | {"question_id": 2}))
    with pytest.raises(InputError, match=r"question 2 of random has no answer in .*coco_pope_random\.json"):
        list(benchmark("pope", path).examples())


def test_the_release_of_mm_vet(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "v1_0.png").write_bytes(png())
    row = {
        "imagename": "v1_0.png",
        "question": "What is x?",
        "answer": "-1<AND>-5",
        "imagesource": "",
        "capability": ["ocr", "math"],
    }
    path = tmp_path / "mm-vet.json"
    path.write_text(json.dumps({"v1_0": row, "v1_1": row}))
    first, _ = benchmark("mmvet", path).examples()
    assert first.id == "v1_0" and first.truth == "-1<AND>-5"
    assert first.conversation[0].content[0].source == str(tmp_path / "images" / "v1_0.png")
    assert benchmark("mmvet", path).categories_of(first.row) == [["ocr", "math", "only ocr_math"]]


@pytest.mark.parametrize(
    ("name", "question"),
    [
        ("mmstar", "q\nOptions: A: x, B: y, C: a, b: c, D: z"),
        ("realworldqa", "q\n\nA. x\nB. y\nPlease answer directly with only the letter of the correct option and nothing else."),
        ("ai2d", "q\nA. x\nB. y\nAnswer with the option's letter from the given choices directly."),
    ],
)
def test_options_inside_a_question_become_columns(name: str, question: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"index": 1, "question": question, "answer": "B"}) + "\n")
    (example,) = benchmark(name, path).examples()
    options = {"A": "x", "B": "y"} | ({"C": "a, b: c", "D": "z"} if name == "mmstar" else {})
    assert options_of(example.row) == options and example.row["question"] == "q" and example.answers == ("B",)


def test_other_tables_of_the_hub(tmp_path: Path) -> None:
    picture = {"bytes": png(), "path": ""}
    for name, row, reply in (
        ("hallusionbench", {"category": "VD", "subcategory": "math", "set_id": "0", "figure_id": "1", "question_id": "2",
                            "question": "q", "gt_answer": "1", "image": picture}, "Yes"),
        ("mme", {"question_id": "OCR/0001.jpg", "question": "q", "answer": "Yes", "category": "OCR", "image": picture}, "Yes"),
        ("pope", {"question_id": "1", "question": "q", "answer": "yes", "category": "random", "image": picture}, "Yes"),
        ("ocrbench", {"question": "q", "answer": ["ab"], "question_type": "c", "image": picture}, "ab"),
        ("mmvet", {"question_id": "v1_0", "question": "q", "answer": "a", "capability": "rec", "image": picture}, "0.5"),
        ("mathvista", {"pid": "1", "question": "bare", "query": "q", "decoded_image": picture, "image": "images/1.jpg",
                       "choices": ["x", "y"], "answer": "y", "question_type": "multi_choice", "answer_type": "text",
                       "metadata": {"task": "t", "skills": ["s"]}}, "B"),
    ):  # fmt: skip
        task = benchmark(name, write_parquet(tmp_path / f"{name}.parquet", [row]))
        (example,) = task.examples()
        assert example.conversation[0].text.lstrip().startswith("q"), name
        score = task.score(reply, example)
        assert score.undecided is not None if name == "mmvet" else score.value == 1, name


def test_jsonl_names_pictures_by_paths_below_any_folder_above_it(tmp_path: Path) -> None:
    folder = tmp_path / "data" / "seed"
    folder.mkdir(parents=True)
    (tmp_path / "data" / "a.png").write_bytes(png())
    line = {"index": 1, "question": "q", "A": "x", "answer": "A", "image": "data/a.png"}
    (folder / "seed.jsonl").write_text(json.dumps(line) + "\n")
    assert rows(folder / "seed.jsonl")[0][PICTURES] == (str(tmp_path / "data/a.png"),)


def test_every_benchmark_says_where_its_rows_come_from_and_no_two_share_a_name() -> None:
    assert len({task.name for task in TASKS.values()}) == len(TASKS)
    for task in TASKS.values():
        if hasattr(task, "origin"):
            assert task.file in task.origin and task.about and task.metric


def test_the_documentation_names_every_task() -> None:
    page = (Path(__file__).parents[2] / "docs" / "evaluation.md").read_text()
    assert [name for name in TASKS if f"| `{name}` |" not in page] == []


def test_the_example_of_the_documentation_is_the_file_itself() -> None:
    root = Path(__file__).parents[2]
    page, file = (root / "docs" / "evaluation.md").read_text(), (root / "ivl/evaluation/tasks/muirbench.py").read_text()
    assert "\n".join(f"+{line}" for line in file.splitlines()) in page
