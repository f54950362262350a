"""Long answers for the studies of filtering and of reweighting: easy-vqa pictures described in 13 sentences.

The start that both studies share names what a picture shows. It has a tokenizer with the words of the descriptions.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import ivl
from examples.quickstart.compositions import compositions, training_row
from examples.quickstart.data import captions, turns
from ivl.checkpoint import load_tokenizer, save_tokenizer
from ivl.evaluation.tasks import easy_vqa
from ivl.evaluation.tasks.easy_vqa import COLORS, SHAPES
from ivl.filters.repetition import Repetition
from ivl.formats.rows import write_jsonl
from ivl.processing.tokenizer import train_tokenizer
from ivl.recipes import nano
from ivl.types import Message, Record, SamplingParams, Text
from studies.claims import small
from studies.claims.study import Figures, Lab

DETECTOR = Repetition()
QUESTION, NAME = "describe the image in detail.", "what is in the image?"
PER_PICTURE, BEGUN, MAX_NEW_TOKENS = 4, 3, 320
"""Descriptions of a picture, sentences that a reply goes on from, and its longest continuation."""
VOCAB_SIZE = 470

OPENINGS = (
    "this is a picture of a {colour} {shape}.", "the image shows a {colour} {shape}.", "here we see a {colour} {shape}.",
    "what stands out is a {colour} {shape}.", "a {colour} {shape} is drawn on a plain ground.",
)  # fmt: skip
COLOUR = ("its color is {colour}.", "anyone would call it {colour}.", "so {colour} is the answer to the question of color.")
SHAPE = ("the only shape here is a {shape}.", "counting corners tells of a {shape}.", "its outline is that of a {shape}.")
ABSENT_COLOUR = (
    "there is no {colour} shape.", "nothing in it is {colour}.", "{colour} does not appear.", "one finds no trace of {colour}.",
    "a {colour} object is missing.", "whoever looks for {colour} looks in vain.", "{colour} was not used by the painter.",
    "it would be wrong to say {colour}.", "we can rule out {colour} as well.", "the palette leaves {colour} aside.",
)  # fmt: skip
ABSENT_SHAPE = (
    "the image does not contain a {shape}.", "no {shape} is present.", "a {shape} would look different.",
    "nobody drew a {shape}.", "it can not be taken for a {shape}.",
)  # fmt: skip
CLOSINGS = ("that is all there is to see.", "more can not be said about it.", "this completes the description.")


def describe(caption: str, rng: random.Random) -> list[str]:
    """A true description of one picture in 13 sentences, from what its questions and answers say, in any order. No wording
    comes twice."""
    colour, shape = caption.split()
    facts = [rng.choice(COLOUR).format(colour=colour), rng.choice(SHAPE).format(shape=shape)]
    for names, forms in ((COLORS, ABSENT_COLOUR), (SHAPES, ABSENT_SHAPE)):
        others = [name for name in names if name not in (colour, shape)]
        facts += [form.format(colour=n, shape=n) for n, form in zip(others, rng.sample(forms, len(others)), strict=True)]
    rng.shuffle(facts)
    return [rng.choice(OPENINGS).format(colour=colour, shape=shape), *facts, rng.choice(CLOSINGS)]


def true_sentences(caption: str) -> set[str]:
    colour, shape = caption.split()
    found = {form.format(colour=colour, shape=shape) for form in (*OPENINGS, *COLOUR, *SHAPE, *CLOSINGS)}
    found |= {form.format(colour=name) for form in ABSENT_COLOUR for name in COLORS if name != colour}
    return found | {form.format(shape=name) for form in ABSENT_SHAPE for name in SHAPES if name != shape}


def rows(pictures: dict[str, str], per_picture: int = 1) -> list[dict[str, Any]]:
    """Rows of true descriptions; each follows from its id alone."""
    found = []
    for image, caption in pictures.items():
        for copy in range(per_picture):
            key = f"{Path(image).stem}-{copy}"
            text = " ".join(describe(caption, random.Random(key)))
            found.append({"id": key, "image": image, "conversations": turns(f"<image>\n{QUESTION}", text)})
    return found


def data(lab: Lab) -> Path:
    """Write the tokenizer and the rows: names, descriptions, questions and reasoning of training pictures that are not held
    out, and descriptions of test pictures."""

    def make(folder: Path) -> None:
        asked = easy_vqa.rows("train")
        named = {i: c for i, c in captions(asked).items() if int(Path(i).stem) % small.HELD_OUT}
        named = dict(list(named.items())[: lab.few(len(named), 40)])
        long = rows(named, PER_PICTURE)
        reasoned = list(map(training_row, compositions("train", lab.few(12_000, 64), seed=1, prefix="reason")))
        spoken = [turn["value"] for row in (*long, *reasoned) for turn in row["conversations"]]
        words = [text for row in asked for text in (row.question, row.answer)]
        tokenizer = train_tokenizer([*spoken, *words, *named.values(), QUESTION, NAME, "user assistant"], VOCAB_SIZE)
        save_tokenizer(tokenizer, folder / "tokenizer")
        write_jsonl(long, folder / "descriptions.jsonl")
        write_jsonl(reasoned, folder / "reasoning.jsonl")
        names = [{"id": i, "image": i, "conversations": turns(f"<image>\n{NAME}", c)} for i, c in named.items()]
        write_jsonl(names, folder / "names.jsonl")
        test = list(test_pictures(lab.few(400, 8)).items())
        write_jsonl(rows(dict(test)), folder / "test-descriptions.jsonl")

    return lab.once("descriptions", make)


def test_pictures(count: int) -> dict[str, str]:
    """Some pictures of the test split with their captions."""
    found = captions(easy_vqa.rows("test"))
    return {image: found[image] for image in list(found)[:: max(1, len(found) // count)][:count]}


def start(lab: Lab) -> Path:
    """The model that all arms start from: ViT and projector learn to name, then everything learns to say the names."""

    def make(folder: Path) -> None:
        given = data(lab)
        tokenizer, plain = load_tokenizer(given / "tokenizer"), nano.architecture()
        architecture = replace(
            plain, decoder=replace(plain.decoder, vocab_size=len(tokenizer)), image_token_id=tokenizer.id("<IMG_CONTEXT>"),
            eos_token_ids=(tokenizer.id("<|im_end|>"),), pad_token_id=tokenizer.id("<|endoftext|>"),
        )  # fmt: skip
        names, steps = given / "names.jsonl", lab.few(700)
        seeing = small.training(
            folder / "vision", names, ("vision", "projector"), steps=steps, objective=small.VISION_WORDS, max_tiles=50
        )
        model = small.trained(replace(seeing, architecture=architecture, tokenizer=str(given / "tokenizer")))
        small.trained(
            small.training(folder / "connect", names, small.EVERYTHING, model=model, steps=lab.few(300),
                           objective="ivl.recipes.nano_objectives:flipped_next_token")
        )  # fmt: skip

    return lab.once("descriptions-start", make) / "connect/model"


def said(model: Path, count: int) -> list[dict[str, Any]]:
    """Greedy descriptions of test pictures. Each goes on from a true beginning, so that no two are one task."""
    pictures = test_pictures(count)
    begun = {image: " ".join(describe(caption, random.Random(image))[:BEGUN]) for image, caption in pictures.items()}
    asked = [(*ivl.ask(QUESTION, image), Message("assistant", (Text(text),))) for image, text in begun.items()]
    replies = ivl.load(model).engine.generate(asked, SamplingParams(max_new_tokens=MAX_NEW_TOKENS))
    return [
        {"caption": pictures[image], "text": begun[image] + reply.text, "tokens": len(reply.tokens),
         "ended": reply.finish_reason == "stop"}
        for image, reply in zip(pictures, replies, strict=True)
    ]  # fmt: skip


def repetitive(text: str) -> bool:
    """Whether the filter's detector flags a text."""
    return not DETECTOR(Record("", ((Message("user", (Text(NAME),)), Message("assistant", (Text(text),))),), "")).keep


def measured(found: list[dict[str, Any]]) -> Figures:
    """Shares of replies that are repetitive, that run into the limit, that say something twice, and that say nothing false."""
    sentences = [[f"{each.strip()}." for each in row["text"].split(".")[:-1]] for row in found]
    checks: dict[str, Callable[[int], bool]] = {
        "repetitive": lambda n: repetitive(found[n]["text"]),
        "endless": lambda n: not found[n]["ended"],
        "twice": lambda n: len(set(sentences[n])) < len(sentences[n]),
        "true": lambda n: set(sentences[n]) <= true_sentences(found[n]["caption"]),
    }
    shares = {name: sum(map(check, range(len(found)))) / len(found) for name, check in checks.items()}
    return shares | {"tokens": sum(row["tokens"] for row in found) / len(found), "outputs": len(found)}
