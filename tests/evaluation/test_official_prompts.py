"""The prompts and tile budgets of benchmarks, word for word as VLMEvalKit's adapter of InternVL2.5 writes them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from ivl.evaluation.benchmark import Benchmark
from ivl.evaluation.data import PICTURES
from ivl.evaluation.tasks import TASKS
from ivl.evaluation.tasks.video import VideoChoice, VideoRated
from ivl.types import Conversation, ImageRef, Text, VideoRef
from tests.evaluation.rows import png

CASES = [json.loads(line) for line in Path(__file__).with_name("golden.jsonl").read_text().splitlines()]
FILES = {task.file: task for task in TASKS.values() if isinstance(task, Benchmark)}


def cases(scorer: str) -> list[Any]:
    return [pytest.param(case["input"], case["expected"], id=case["id"]) for case in CASES if case["scorer"] == scorer]


def written(conversation: Conversation) -> str:
    """The text of a question, with marks where its pictures are."""
    parts = conversation[0].content
    marks = {
        ImageRef: lambda _: "<image>",
        VideoRef: lambda v: "\n".join(f"Frame-{n}: <image>" for n in range(1, v.num_frames + 1)),
    }
    return "".join(part.text if isinstance(part, Text) else marks[type(part)](part) for part in parts)


def row_of(row: Mapping[str, Any], pictures: int) -> dict[str, Any]:
    return {"index": "1", "answer": "A", **row, PICTURES: (png(),) * pictures}


@pytest.mark.parametrize(("asked", "expected"), cases("internvl_prompt"))
def test_prompts_are_the_published_ones(asked: dict[str, Any], expected: dict[str, Any]) -> None:
    task = FILES.get(asked["dataset"])
    if task is None:
        pytest.skip(f"{asked['dataset']} is no benchmark here")
    mpo = asked["mpo_model"] and (asked["USE_COT"] or asked["dataset"] in ("MMStar", "HallusionBench", "OCRBench"))
    prompt = "mpo" if mpo else "cot" if asked["USE_COT"] else "published"
    task = replace(task, prompt=prompt, defects="MMMU_Pro" in asked["dataset"])
    conversation = task.conversation(row_of(asked["row"], asked["images"]))
    text = written(conversation)
    if "prompt" in expected:
        assert text == expected["prompt"]
    else:
        assert len(text) == expected["length"] and hashlib.sha256(text.encode()).hexdigest() == expected["sha256"]
    assert {part.max_tiles for part in conversation[0].content if isinstance(part, ImageRef)} == {expected["max_num"]}


@pytest.mark.parametrize(("asked", "expected"), cases("internvl_tiles"))
def test_pictures_share_the_tiles(asked: dict[str, Any], expected: int) -> None:
    task = FILES[asked["dataset"]]
    assert task.budgets(asked["images"]) == [expected] * asked["images"]


def test_video_prompts_are_the_published_ones(tmp_path: Path) -> None:
    for name, row, words in (
        ("video-mme", {"question": "What?", "A": "x", "B": "y"},
         "Frame-1: <image>\nFrame-2: <image>\n\nThese are the frames of a video. Select the best answer to the following "
         "multiple-choice question based on the video. Respond with only the letter (A, B, C, or D) of the correct option.\n"
         "Question: What?\nA. x\nB. y \nAnswer with the option's letter from the given choices directly."),
        ("mvbench", {"question": "What?", "candidates": "['x', 'y']", "answer": "y"},
         "Frame-1: <image>\nFrame-2: <image>\nCarefully watch the video and pay attention to the cause and sequence of events, "
         "the detail and movement of objects, and the action and pose of persons. Based on your observations, select the best "
         "option that accurately addresses the question.\nQuestion: What?\nOptions:\n(A) x\n(B) y\nOnly give the best option."),
    ):  # fmt: skip
        task = TASKS[name]
        assert isinstance(task, VideoChoice)
        path = tmp_path / f"{task.file}.tsv"
        path.write_text("x")
        task = replace(task, frames=2, path=path)
        assert written(task.conversation(task.prepared({"index": "1", "video": "v", "answer": "A", **row}))) == words


@pytest.mark.parametrize(("asked", "expected"), cases("internvl_video_prompt"))
def test_video_prompts_of_the_adapter(asked: dict[str, Any], expected: dict[str, Any], tmp_path: Path) -> None:
    first, *_ = texts = [message["value"] for message in asked["messages"] if message["type"] == "text"]
    frames = sum(message["type"] == "image" for message in asked["messages"])
    task = FILES[asked["dataset"]]
    assert isinstance(task, VideoChoice | VideoRated)
    path = tmp_path / f"{task.file}.tsv"
    path.touch()
    options = {"A": "x", "B": "y"} if "x\n" in texts[1] else {}
    row = {"index": "1", "video": "v", "question": "What?", "answer": "A", **options}
    assert written(replace(task, frames=frames, before=first, path=path).conversation(row)) == expected["prompt"]


def test_the_first_picture_of_mmmu_is_enlarged() -> None:
    task = FILES["MMMU_DEV_VAL"]
    row = row_of({"question": "q", "A": "x"}, 3)
    sizes = [p.size if isinstance(p, Image.Image) else p for p in task.pictures(row)]
    assert sizes == [(32, 32), png(), png()]
    assert task.budgets(3) == [12, 12, 12] and replace(task, prompt="reference").budgets(3) == [12, 1, 1]


@pytest.mark.parametrize(
    ("name", "row", "prompt", "words"),
    [
        ("mmmu", {"question": "q <image 1>"}, "reference", "q <image 1>\nAnswer the question using a single word or phrase."),
        ("mme", {"question": "q?"}, "reference", "q? Answer the question using a single word or phrase."),
        ("pope", {"question": "q?"}, "reference", "q? Answer the question using a single word or phrase."),
        ("mmstar", {"question": "q", "A": "x"}, "plain", "q\nA. x"),
        ("muirbench", {"question": "is <image> in <image>?", "A": "<image>", PICTURES: (png(),) * 3}, "plain",
         "is <Image-1> in <Image-2>?\nA. <Image-3>"),
        ("muirbench", {"question": "<image> <image> same?", PICTURES: (png(),) * 2}, "plain", " same?"),
        ("mmbench-dev-en-v11", {"question": "q", "A": "x", "hint": "h"}, "mpo",
         "Your task is to answer the question below. Give step by step reasoning before you answer, and when you're ready to "
         'answer, please use the format "Final answer: .."\n\nQuestion:\n\nq\nA. x'),
        ("mmmu-pro", {"question": "q", "A": "x", "B": "y"}, "published",
         "q\nA. x\nB. y\nAnswer with the option letter from the given choices directly."),
        ("mmmu-pro-vision", {}, "cot",
         "Write out the multiple-choice question in the image and then solve it. The last line of your response should be of "
         "the following format: 'Answer: $LETTER' (without quotes) where LETTER is one of options. Think step by step before "
         "answering."),
        ("mmvet", {"question": "q"}, "mpo", "q"),
    ],
)  # fmt: skip
def test_other_prompts(name: str, row: dict[str, Any], prompt: Any, words: str) -> None:
    task = TASKS[name]
    assert isinstance(task, Benchmark)
    assert replace(task, prompt=prompt).text({"index": "1", "answer": "A", **row}) == words


def test_a_chinese_question_is_asked_in_chinese() -> None:
    task = FILES["MMBench_DEV_CN_V11"]
    assert (
        task.text({"question": "这是什么？", "A": "猫", "B": "狗", "hint": "看图"})
        == "看图\n这是什么？\nA. 猫\nB. 狗\n请直接回答选项字母。"
    )


def test_choices_are_reasoned_about_in_any_language_and_without_options() -> None:
    task = replace(FILES["MMBench_DEV_CN_V11"], prompt="cot")
    asked = task.text({"question": "这是什么？", "A": "猫"})
    assert asked.startswith("这是什么？\nA. 猫\n请直接回答选项字母。\nAnswer the preceding multiple choice question.")
    asked = replace(FILES["MMMU_DEV_VAL"], prompt="cot").text({"question": "q", "answer": "5"})
    assert asked.startswith("q\nAnswer the question directly.\nAnswer the preceding multiple choice question.")
