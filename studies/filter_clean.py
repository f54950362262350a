"""Clean conversations for `studies.filter_quality`: easy-vqa, scikit-image's photographs, and long text that packages ship.

The tuning and the held-out set share no easy-vqa picture, no document and no package that documents come from.
"""

from __future__ import annotations

import importlib
import inspect
import json
import pkgutil
import random
import re
from collections.abc import Callable, Iterator
from email.message import Message as Mail
from functools import cache
from importlib.metadata import distributions
from pathlib import Path
from typing import Literal, cast

import skimage

from examples.quickstart.data import captions
from ivl.evaluation.tasks import easy_vqa
from ivl.types import ImageRef, Message, Record, Text
from studies.filter_structured import MAKERS

Split = Literal["tune", "held-out"]
PACKAGES = {
    "tune": (
        "numpy",
        "json",
        "argparse",
        "email",
        "collections",
        "pathlib",
        "logging",
        "decimal",
        "statistics",
        "tokenizers",
        "PIL",
    ),
    "held-out": ("scipy", "sklearn", "matplotlib", "networkx", "sympy", "hypothesis", "torch.optim", "rich"),
}


def record(source: str, turns: list[tuple[str, str]], image: str | bytes | None = None) -> Record:
    """A row; the picture stands before the first question."""
    talk = []
    for n, (question, answer) in enumerate(turns):
        media = (ImageRef(image),) if image is not None and n == 0 else ()
        talk += [Message("user", (*media, Text(f"\n{question}" if media else question))), Message("assistant", (Text(answer),))]
    return Record(id=source, conversations=(tuple(talk),), source=source)


SENTENCES = {
    "color": (
        "The {shape} in the image is {answer}.",
        "It is {answer}.",
        "The colour of the shape is {answer}.",
        "Looking at the picture, the shape has been filled with {answer}, and the background is much paler.",
        "{Answer}.",
        "The image contains a single shape, and its colour is {answer}.",
    ),
    "shape": (
        "The shape in the image is a {answer}.",
        "It is a {answer}.",
        "The picture shows a {answer}.",
        "There is one shape in the picture. It is a {answer}.",
        "A {answer} is present in the image.",
        "I can see exactly one shape here, which is a {answer}. Nothing else is drawn on the canvas.",
    ),
    "yes/no": (
        "{Answer}.",
        "{Answer}, that is what the image shows.",
        "{Answer}, judging by the picture.",
        "The answer to this question is {answer}.",
        "{Answer}. There is only one shape in the picture, so this is easy to tell.",
    ),
}
CAPTIONS = (
    "A {caption} on a plain background",
    "a {caption}",
    "{caption} drawn on a pale canvas",
    "A picture of a {caption}",
    "A single {caption} is drawn on a pale background.",
    "This small picture shows a {caption}. There is nothing else in it.",
    "The image is very simple: a {caption} lies on an even background. It has sharp edges, and there is no text.",
)
SUFFIXES = ("", "", "\nAnswer the question using a single word or phrase.", "\nAnswer in a full sentence.")


@cache
def _vqa(split: Split) -> dict[str, list[easy_vqa.Row]]:
    """Questions by picture."""
    found: dict[str, list[easy_vqa.Row]] = {}
    for row in easy_vqa.rows("train" if split == "tune" else "test"):
        if all(row.question != other.question for other in found.get(row.image, [])):
            found.setdefault(row.image, []).append(row)
    return found


@cache
def _captions(split: Split) -> list[tuple[str, str]]:
    return sorted(captions([row for rows in _vqa(split).values() for row in rows]).items())


def sentence(row: easy_vqa.Row, rng: random.Random) -> str:
    return rng.choice(SENTENCES[row.kind]).format(answer=row.answer, Answer=row.answer.capitalize(), shape="shape")


def vqa_rows(split: Split, rng: random.Random) -> Iterator[Record]:
    """One question with a short answer, one with a sentence, or several about one picture. Pictures come again with other
    questions, questions come again with other pictures, but no picture twice with the same question."""
    left = {image: rng.sample(rows, len(rows)) for image, rows in _vqa(split).items()}
    images = rng.sample(sorted(left), len(left))
    while images:
        rng.shuffle(images)
        for image in images:
            style = rng.choice(("short", "sentence", "talk"))
            take = [left[image].pop() for _ in range(min(len(left[image]), rng.randint(2, 5) if style == "talk" else 1))]
            short = style == "short" or (style == "talk" and rng.random() < 0.3)
            turns = [(row.question, row.answer if short else sentence(row, rng)) for row in take]
            if short:
                turns[0] = (turns[0][0] + rng.choice(SUFFIXES[:3]), turns[0][1])
            yield record(take[0].id, turns, image)
        images = [image for image in images if left[image]]


def caption_rows(split: Split, rng: random.Random) -> Iterator[Record]:
    asks = ("Describe the image.", "What is in the picture?", "Write a caption.", "Give a short description of this image.")
    for image, caption in rng.sample(_captions(split), len(_captions(split))):
        yield record(f"caption-{Path(image).stem}", [(rng.choice(asks), rng.choice(CAPTIONS).format(caption=caption))], image)


PHOTOS: dict[str, list[str]] = json.loads(Path(__file__).with_name("filter_photos.json").read_text())
"""By file of scikit-image: what the photograph shows, and sentences that are true of it."""
OPENINGS = (
    "The image shows {x}.",
    "This is a picture of {x}.",
    "In this photograph one can see {x}.",
    "The photograph shows {x}.",
    "What we see here is {x}.",
    "The main subject is {x}.",
    "Here is {x}.",
    "At the centre of the image there is {x}.",
    "{X} can be seen in this picture.",
    "The picture was taken to show {x}.",
)
ASKS = (
    "Describe the image in detail.",
    "What does this photograph show?",
    "What is in the picture?",
    "Please write a caption.",
    "Tell me what you see.",
)


NUM_PHOTOS = 250


def photo_rows(split: Split, rng: random.Random) -> Iterator[Record]:
    """Captions, descriptions of several sentences and short talks. Of the first, which make the clean set, no two about
    one photograph share more than half of their sentences; what comes later is only made faulty."""
    seen: dict[str, list[set]] = {}
    for n in range(20_000):
        name = rng.choice(sorted(PHOTOS))
        subject, *details = PHOTOS[name]
        style = rng.choice(("caption", "description", "list", "talk"))
        opening = rng.choice(OPENINGS).format(x=subject, X=subject.capitalize())
        some = rng.sample(details, rng.randint(1, len(details)))
        ask = rng.choice(ASKS)
        if style == "caption":
            turns = [(ask, rng.choice((subject, subject.capitalize(), f"A photograph of {subject}", opening)))]
        elif style == "description":
            turns = [(ask, " ".join([opening, *some]) if rng.random() < 0.7 else "\n\n".join([opening, " ".join(some)]))]
        elif style == "list":
            turns = [
                (
                    "List what can be said about the image.",
                    "\n".join(f"{i}. {each}" for i, each in enumerate([opening, *some], 1)),
                )
            ]
        else:
            turns = [
                (ask, opening),
                *[(rng.choice(("What else?", "Anything else?", "Go on.", "And what more?")), each) for each in some],
            ]
        said = {part for _, answer in turns for part in re.split(r"(?<=[.])\s+(?:\d+[.] )?", answer.removeprefix("1. "))}
        others = seen.setdefault(name, [])
        if sum(map(len, seen.values())) > NUM_PHOTOS or all(2 * len(said & other) <= len(said | other) for other in others):
            others.append(said)
            yield record(f"photo-{n}", turns, str(Path(skimage.__file__).parent / "data" / name))


def _triples(text: str) -> set[tuple[str, ...]]:
    words = ["", *re.findall(r"\w+", text.casefold()), ""]
    return set(zip(words, words[1:], words[2:], strict=False))


@cache
def documents(split: Split) -> tuple[tuple[str, str], ...]:
    """(title, text) of docstrings, data set descriptions, licences and read-mes, no two alike."""
    found: dict[str, str] = {}
    for package in PACKAGES[split]:
        module = importlib.import_module(package)
        modules = [module]
        for info in pkgutil.iter_modules(getattr(module, "__path__", ())):
            if not info.name.startswith(("_", "tests", "conftest", "report")):
                try:
                    modules.append(importlib.import_module(f"{package}.{info.name}"))
                except ImportError:  # a part that needs what is not installed
                    continue
        for each in modules:
            for name, thing in [("", each), *sorted(vars(each).items())]:
                if not name.startswith("_") and (inspect.isclass(thing) or callable(thing) or not name):
                    text = inspect.getdoc(thing)
                    if text and str(getattr(thing, "__module__", package)).startswith(package.split(".")[0]):
                        found.setdefault(f"{each.__name__}.{name}".strip("."), text)
    for distribution in distributions():
        name = distribution.metadata["Name"].lower()
        if (sum(map(ord, name)) % 2 == 0) == (split == "tune"):
            body = cast(Mail, distribution.metadata).get_payload() or distribution.metadata["Description"] or ""
            for n, section in enumerate(re.split(r"\n(?=#{2,3} |\S[^\n]*\n[=-]{3,}\n)", str(body))):
                found[f"the read-me of {name}, part {n}"] = section.strip()
    descr = Path(importlib.import_module("sklearn").__file__ or "").parent / "datasets" / "descr"
    for n, file in enumerate(sorted(descr.glob("*.rst"))):
        if n % 2 == (split == "tune"):
            for k, section in enumerate(file.read_text().split("\n\n\n")):
                found[f"{file.stem} {k}"] = section
    return tuple(_distinct((title, text) for title, text in sorted(found.items()) if 200 <= len(text) <= 8000))


def _distinct(texts: Iterator[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    """Leaves out texts that share more than half of their word triples with one before: an oracle without hashing."""
    where: dict[tuple[str, ...], list[int]] = {}
    sizes: list[int] = []
    for title, text in texts:
        triples = _triples(text)
        shared: dict[int, int] = {}
        for triple in triples:
            for other in where.get(triple, ()):
                shared[other] = shared.get(other, 0) + 1
        if any(n > 0.35 * min(len(triples), sizes[other]) for other, n in shared.items()) or len(triples) < 20:
            continue
        for triple in triples:
            where.setdefault(triple, []).append(len(sizes))
        sizes.append(len(triples))
        yield title, text


def document_rows(split: Split, rng: random.Random) -> Iterator[Record]:
    asks = ("Explain {x}.", "What is {x}?", "Please document {x}.", "Tell me about {x} in detail.")
    for title, text in rng.sample(documents(split), len(documents(split))):
        yield record(title, [(rng.choice(asks).format(x=title), text)])


def structured_rows(split: Split, rng: random.Random) -> Iterator[Record]:
    """Lists, tables, code, verses with a refrain, formulas, boxes and Chinese: what naive filters drop."""
    seen = set()
    for n in range(100_000):
        ask, answer = rng.choice(MAKERS)(rng, n)
        if answer not in seen:
            seen.add(answer)
            yield record(f"structured-{n}", [(ask, answer)])


SHARES: dict[str, tuple[Callable[[Split, random.Random], Iterator[Record]], float]] = {
    "easy-vqa": (vqa_rows, 0.61),
    "easy-vqa captions": (caption_rows, 0.08),
    "photographs": (photo_rows, 0.05),
    "documents": (document_rows, 0.16),
    "lists, tables, code, ...": (structured_rows, 0.10),
}


def streams(split: Split, seed: int) -> dict[str, Iterator[Record]]:
    """A stream of clean rows of each kind; what was drawn does not come again."""
    return {kind: make(split, random.Random(f"{seed} {kind}")) for kind, (make, _) in SHARES.items()}
