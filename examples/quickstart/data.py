"""The quickstart's tokenizer and training rows, from the training split of easy-vqa alone."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from ivl.errors import InputError
from ivl.evaluation.tasks import easy_vqa
from ivl.evaluation.tasks.easy_vqa import COLORS, SHAPES
from ivl.recipes import nano

COLOR_QUESTION, SHAPE_QUESTION = "what color is the shape?", "what shape is in the image?"


def prepare(out: Path) -> None:
    """Write the tokenizer and the three data files."""
    from ivl.checkpoint import save_tokenizer
    from ivl.processing.tokenizer import train_tokenizer

    rows = easy_vqa.rows("train")
    described = captions(rows)
    by_image: dict[str, list[easy_vqa.Row]] = {}
    for row in rows:
        by_image.setdefault(row.image, []).append(row)

    texts = [text for row in rows for text in (row.question, row.answer, "user", "assistant", "system")]
    tokenizer = train_tokenizer([*texts, *described.values()], nano.VOCAB_SIZE)
    if len(tokenizer) != nano.VOCAB_SIZE:
        raise InputError(f"the tokenizer has {len(tokenizer)} tokens, the nano recipe needs {nano.VOCAB_SIZE}")
    save_tokenizer(tokenizer, out / "tokenizer")

    # An image is one row: its questions share the picture's encoding but do not see each other's answers.
    talks = {
        "questions": {image: [turns(f"<image>\n{r.question}", r.answer) for r in asked] for image, asked in by_image.items()},
        "captions": {image: caption_turns(caption) for image, caption in described.items()},
        "language": {
            image: [turns(f"{caption}\n{r.question}", r.answer) for r in by_image[image]]
            for image, caption in described.items()
        },
    }
    (out / "data").mkdir(parents=True, exist_ok=True)
    for name, by_name in talks.items():
        with (out / "data" / f"{name}.jsonl").open("w") as file:
            for image, conversations in by_name.items():
                picture = {} if name == "language" else {"image": image}
                file.write(json.dumps({"id": Path(image).stem, **picture, "conversations": conversations}) + "\n")
    (out / "data" / "done").touch()
    print(
        f"{len(rows):,} training questions about {len(by_image):,} images; "
        f"{len(described):,} of the images are described by what their questions say"
    )


def caption_turns(caption: str) -> list[list[dict[str, str]]]:
    """Ask for each word of a caption in a conversation of its own."""
    questions = (COLOR_QUESTION, SHAPE_QUESTION)
    return [turns(f"<image>\n{question}", word) for question, word in zip(questions, caption.split(), strict=True)]


def turns(question: str, answer: str) -> list[dict[str, str]]:
    """A question and its answer in the reference format of training rows."""
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


def captions(questions: Sequence[easy_vqa.Row]) -> dict[str, str]:
    """Derive a caption such as `blue rectangle` for each image from its questions and answers; keys are image paths.

    Only images whose questions give away both color and shape have a caption. A yes/no question states its words when
    the answer is yes, or when it is no to a negated question.
    """
    stated: dict[str, set[str]] = {}
    for row in questions:
        words = row.question.rstrip("?").split()
        negated = "not" in words or "no" in words
        facts = words if row.kind != "yes/no" or (row.answer == "yes") != negated else []
        stated.setdefault(row.image, set()).update({row.answer, *facts} & {*COLORS, *SHAPES})
    pairs = {image: (words & {*COLORS}, words & {*SHAPES}) for image, words in stated.items()}
    return {image: f"{min(c)} {min(s)}" for image, (c, s) in pairs.items() if len(c) == len(s) == 1}
