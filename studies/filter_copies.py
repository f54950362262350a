"""Near copies of whole rows for `studies.filter_quality`: what must count as a duplicate."""

from __future__ import annotations

import dataclasses
import io
import random
import re
from collections.abc import Callable

from PIL import Image

from ivl.processing.image import load_image
from ivl.types import ImageRef, Message, Record, Text
from studies.filter_faults import last_answer, with_answer
from studies.filter_structured import NOUNS


def exact_copy(record: Record, rng: random.Random) -> Record:
    return record


def _each_text(record: Record, change: Callable[[str], str], roles: tuple[str, ...] = ("user", "assistant")) -> Record:
    talks = tuple(
        tuple(
            Message(m.role, tuple(Text(change(p.text)) if isinstance(p, Text) and m.role in roles else p for p in m.content))
            for m in talk
        )
        for talk in record.conversations
    )
    return dataclasses.replace(record, conversations=talks)


def other_spacing(record: Record, rng: random.Random) -> Record:
    return _each_text(
        record, lambda text: rng.choice((f"{text} ", f" {text}\n", re.sub(" ", "  ", text), text.replace("\n", "\n\n")))
    )


def other_case(record: Record, rng: random.Random) -> Record:
    change = rng.choice((str.lower, str.upper, lambda text: text.rstrip("."), lambda text: text.replace("?", " ?")))
    return _each_text(record, change)


def other_quotes(record: Record, rng: random.Random) -> Record:
    return _each_text(
        record, lambda text: text.replace("'", "’").replace('"', "“").replace("...", "…").replace(" ", "\u00a0", 1)
    )


def _changed_image(record: Record, change: Callable[[Image.Image], tuple[Image.Image, str, dict]]) -> Record | None:
    if not any(isinstance(part, ImageRef) for talk in record.conversations for message in talk for part in message.content):
        return None

    def changed(part):
        if not isinstance(part, ImageRef):
            return part
        image, kind, options = change(load_image(part))
        with io.BytesIO() as file:
            image.save(file, kind, **options)
            return ImageRef(file.getvalue())

    talks = tuple(tuple(Message(m.role, tuple(changed(p) for p in m.content)) for m in talk) for talk in record.conversations)
    return dataclasses.replace(record, conversations=talks)


def recompressed_image(record: Record, rng: random.Random) -> Record | None:
    return _changed_image(record, lambda image: (image, "JPEG", {"quality": rng.randint(50, 95)}))


def resized_image(record: Record, rng: random.Random) -> Record | None:
    factor = rng.choice((0.5, 0.7, 1.5, 2))
    return _changed_image(
        record, lambda image: (image.resize((int(image.width * factor), int(image.height * factor))), "PNG", {})
    )


def _is_long(record: Record) -> bool:
    return sum(len(m.text.split()) for talk in record.conversations for m in talk) >= 45


def typos(record: Record, rng: random.Random) -> Record | None:
    """A few letters of a long text are wrong."""

    def change(text: str) -> str:
        chars = list(text)
        letters = [at for at, c in enumerate(chars) if c.isalpha()]
        for at in rng.sample(letters, min(len(letters), max(1, len(chars) // 200))):
            chars[at] = rng.choice("aeiours")
        return "".join(chars)

    return _each_text(record, change, ("assistant",)) if _is_long(record) else None


def word_changed(record: Record, rng: random.Random) -> Record | None:
    def change(text: str) -> str:
        words = text.split(" ")
        places = [
            at
            for at, word in enumerate(words)
            if word.isalpha() and word.lower() not in ("no", "not", "yes", "true", "false", "never", "none")
        ]
        for at in rng.sample(places, min(len(places), 1 + len(words) // 60)):
            words[at] = rng.choice(NOUNS)
        return " ".join(words)

    return _each_text(record, change, ("assistant",)) if _is_long(record) and len(record.conversations[0]) == 2 else None


def polite(record: Record, rng: random.Random) -> Record | None:
    """Words before the question and after the answer."""
    if not _is_long(record):
        return None
    first = rng.choice(("Please. ", "Hello! ", "I have a question. "))
    asked = (
        _each_text(record, lambda text: first + text.lstrip("\n"), ("user",)) if len(record.conversations[0]) == 2 else record
    )
    return with_answer(asked, last_answer(asked) + rng.choice((" Thank you.", " I hope this helps!", "")))


DUPLICATES = {
    "tune": (exact_copy, other_spacing, other_case, recompressed_image, resized_image, typos, word_changed),
    "held-out": (
        exact_copy,
        other_spacing,
        other_case,
        recompressed_image,
        resized_image,
        typos,
        word_changed,
        other_quotes,
        polite,
    ),
}
