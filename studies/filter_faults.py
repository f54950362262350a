"""Faults for `studies.filter_quality`, written before the filters were tuned, and as somebody would who wants to get
past them. Every kind has variants; the `unseen` ones come in the held-out set alone.
"""

from __future__ import annotations

import dataclasses
import random
import re
from collections.abc import Callable

from ivl.types import Message, Record, Text
from studies.filter_structured import ADJECTIVES, NOUNS

Edit = Callable[[str, random.Random], str | None]
"""A clean answer -> a faulty one, or None if this answer does not lend itself to the fault."""
SENTENCE_END = re.compile(r"(?<=[.!?])\s+")


def last_answer(record: Record) -> str:
    return record.conversations[-1][-1].text


def with_answer(record: Record, answer: str) -> Record:
    """The record with another last answer."""
    *others, talk = record.conversations
    return dataclasses.replace(record, conversations=(*others, (*talk[:-1], Message("assistant", (Text(answer),)))))


# Repetition loops


def _lead(text: str, rng: random.Random) -> str:
    """A beginning of the answer, up to a word; often all of it."""
    words = text.split(" ")
    return text if rng.random() < 0.5 else " ".join(words[: rng.randint(0, len(words))])


def word_loop(text: str, rng: random.Random) -> str:
    word = rng.choice(re.findall(r"[^\W\d_]{2,}", text) or ["the"])
    return f"{_lead(text, rng)} {rng.choice((' ', ', ', ' and ')).join([word] * rng.randint(16, 90))}"


def phrase_loop(text: str, rng: random.Random) -> str:
    words = text.split() if len(text.split()) > 6 else rng.sample(NOUNS, 8)
    at, size = rng.randrange(max(1, len(words) - 6)), rng.randint(2, 6)
    phrase = " ".join(words[at : at + size]) + " of"
    return f"{_lead(text, rng)} {' '.join([phrase] * rng.randint(8, 60))}"


def _sentences(text: str) -> list[str]:
    found = [s.strip() for s in SENTENCE_END.split(text) if 3 <= len(re.findall(r"[^\W\d_]{2,}", s)) <= 60]
    return found or ["The picture shows the old bridge over the river once more."]


def sentence_loop(text: str, rng: random.Random) -> str:
    return " ".join([_lead(text, rng), *[rng.choice(_sentences(text))] * rng.randint(5, 30)])


def paragraph_loop(text: str, rng: random.Random) -> str:
    said = _sentences(text)
    some = " ".join(rng.sample(said, min(len(said), rng.randint(2, 4))))
    return "\n\n".join([some] * rng.randint(4, 9))


def loop_in_the_middle(text: str, rng: random.Random) -> str:
    loop = [rng.choice(_sentences(text))] * rng.randint(5, 20)
    return " ".join([_lead(text, rng), *loop, "This is all that there is to say about it."])


def corrupted_loop(text: str, rng: random.Random) -> str:
    """Every tenth word or so is another one."""
    words = " ".join([rng.choice(_sentences(text))] * rng.randint(6, 30)).split()
    return " ".join(rng.choice(NOUNS) if rng.random() < 0.1 else word for word in words)


def numbered_loop(text: str, rng: random.Random) -> str:
    said = rng.choice(_sentences(text))
    return "\n".join(f"{n}. {said}" for n in range(1, rng.randint(6, 40)))


def loop_without_spaces(text: str, rng: random.Random) -> str:
    part = rng.choice((*NOUNS, "ha", "abc", "lalo", rng.choice(NOUNS) + rng.choice(NOUNS)))
    return f"{_lead(text, rng)} {part * (rng.randint(60, 400) // len(part) + 6)}"


def chinese_loop(text: str, rng: random.Random) -> str:
    part = rng.choice(
        (
            "图片中有一个红色的圆形",
            "背景是纯色的，没有其他物体。",
            "我们可以看到",
            "蓝色三角形",
            "这张图片展示了一个矩形，它的边缘很清晰。",
        )
    )
    return "图片展示了一个简单的形状。" + part * rng.randint(8, 40)


def alternating_loop(text: str, rng: random.Random) -> str:
    said = [
        *_sentences(text),
        "Then the same thing happens again on the other side.",
        "After that it starts from the beginning.",
    ]
    a, b = rng.sample(said, 2)
    return " ".join([_lead(text, rng), *[a, b] * rng.randint(4, 15)])


def short_tail_loop(text: str, rng: random.Random) -> str:
    """All of the answer, then a phrase a few times, cut within a word."""
    phrase = " ".join(
        [rng.choice(ADJECTIVES), rng.choice(NOUNS), "and the", rng.choice(ADJECTIVES), rng.choice(NOUNS), "near the"]
    )
    loop = " ".join([phrase] * rng.randint(5, 8))
    return f"{text} {loop[: -rng.randint(1, 4)]}"


def restless_loop(text: str, rng: random.Random) -> str:
    """Case and marks change from round to round."""
    said = rng.choice(_sentences(text)).rstrip(".!?")
    rounds = [
        rng.choice((str.upper, str.lower, str.title, str))(said) + rng.choice((".", "!", "...", ";", ""))
        for _ in range(rng.randint(6, 25))
    ]
    return " ".join(rounds)


# Runs of zeros and other characters


def zeros(join: str, unit: str = "0") -> Edit:
    def edit(text: str, rng: random.Random) -> str:
        run = join.join([unit] * rng.choice((rng.randint(36, 60), rng.randint(60, 500))))
        at = rng.choice((0, len(text), text.find(" ") + 1))
        return rng.choice((run, f"{text[:at]} {run} {text[at:]}", f"{text} {run}"))

    return edit


def dirty_zeros(text: str, rng: random.Random) -> str:
    """One zero in twenty or so is another digit."""
    return f"{text} " + "".join(rng.choice("123456789") if rng.random() < 0.05 else "0" for _ in range(rng.randint(80, 400)))


def character_run(text: str, rng: random.Random) -> str:
    char = rng.choice("aAxXeE1!?#@。！哈\u200b9🙂ー~$&%")
    run = char * rng.randint(210, 600) if char == "~" else char * rng.randint(45, 400)
    return rng.choice((run, f"{text}{run}", f"{text[: len(text) // 2]}{run}{text[len(text) // 2 :]}"))


# Truncation: what a limit of tokens does to answers of a dozen words or more. Something like a sentence must be left.

MIN_WORDS, MIN_LEFT = 12, 6
SENTENCE = re.compile(r"(?<![^\s\"'(])[A-Z][^.!?\n]*(?:\n[^.!?\n]+)*[.!?](?=\s|$)")


def _in_code(text: str, at: int) -> bool:
    """Whether the paragraph of this place is indented, has a prompt or lies in a fence."""
    start, end = text.rfind("\n\n", 0, at) + 1, text.find("\n\n", at)
    paragraph = text[start : end if end > 0 else len(text)].strip("\n")
    return paragraph.startswith(("    ", "\t", "..")) or ">>> " in paragraph or text.count("```", 0, at) % 2 == 1


def _cut(text: str, places: str, rng: random.Random) -> str | None:
    """Cuts after a match of `places` within a sentence of prose, so that a dozen words become six or more."""
    if len(text.split()) < MIN_WORDS:
        return None
    found = [
        text[: sentence.start() + place.end()]
        for sentence in SENTENCE.finditer(text)
        if not _in_code(text, sentence.start())
        for place in re.finditer(places, sentence[0])
        if len(sentence[0].split()) >= MIN_LEFT and len(sentence[0][: place.end()].split()) >= 3
    ]
    found = [left for left in found if len(left.split()) >= MIN_LEFT]
    return rng.choice(found) if found else None


def cut_in_word(text: str, rng: random.Random) -> str | None:
    return _cut(text, rf"\b[^\W\d_]{{{rng.randint(1, 4)}}}(?=[^\W\d_]{{2}})", rng)


def cut_after_word(text: str, rng: random.Random) -> str | None:
    """After a word that another one follows in the same sentence."""
    return _cut(text, r"[^\W\d_](?= [^\W\d_])", rng)


def cut_after_comma(text: str, rng: random.Random) -> str | None:
    return _cut(text, r"[^\W\d_],(?= )", rng)


def cut_near_the_end(text: str, rng: random.Random) -> str | None:
    """Only the last few characters of the last sentence are missing."""
    return (
        _cut(text, rf"[^\W\d_]{{3}}(?=[^\W\d_]{{{rng.randint(2, 4)}}}[.!?]$)", rng)
        if text.rstrip().endswith((".", "!", "?"))
        else None
    )


def cut_anywhere(text: str, rng: random.Random) -> str | None:
    """Also in code, tables, headings and references, where nothing may show it."""
    return text[: rng.randint(len(text) // 5, len(text) - 2)] if len(text.split()) >= MIN_WORDS else None


def cut_in_bracket(text: str, rng: random.Random) -> str | None:
    left = cut_after_word(text, rng)
    return left and left + rng.choice((" (as one", ' which is called "the', " (see the left", " (for example, a", " [compare"))


def cut_in_second_paragraph(text: str, rng: random.Random) -> str | None:
    if not text.endswith("."):
        return None
    a, b = (f"{rng.choice(ADJECTIVES)} {rng.choice(NOUNS)}" for _ in range(2))
    more = f"The {a} beside it belongs to the {b} that we have seen before"
    return f"{text}\n\n{more[: rng.randint(25, len(more) - 1)].rstrip()}"


@dataclasses.dataclass(frozen=True)
class Kind:
    """Variants of a fault; `unseen` ones are kept for the held-out set."""

    seen: tuple[Edit, ...]
    unseen: tuple[Edit, ...]

    def variants(self, split: str) -> tuple[Edit, ...]:
        return self.seen if split == "tune" else self.seen + self.unseen


KINDS = {
    "repetition loops": Kind(
        (
            word_loop,
            phrase_loop,
            sentence_loop,
            paragraph_loop,
            loop_in_the_middle,
            corrupted_loop,
            numbered_loop,
            loop_without_spaces,
            chinese_loop,
        ),
        (alternating_loop, short_tail_loop, restless_loop),
    ),
    "zero runs": Kind(
        (zeros(""), zeros(" "), zeros(", "), zeros(", ", "0.0"), zeros("\n"), zeros(" ", "000"), dirty_zeros, character_run),
        (zeros(", ", "0x00"), zeros("|"), zeros("", "０"), zeros("0.")),
    ),
    "truncated": Kind(
        (cut_in_word, cut_after_word, cut_after_comma, cut_near_the_end), (cut_in_bracket, cut_in_second_paragraph)
    ),
}
EXTRA = {"truncated anywhere": Kind((cut_anywhere,), ())}
"""Reported, without a target."""
