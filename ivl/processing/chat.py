"""Rendering of conversations as tokens, for training and for inference: training tokens up to a reply are the prompt.

Each turn is encoded by itself: text never merges across a control token. The header of an assistant turn never merges with
the reply, so a prompt is a prefix of the trained tokens, whatever the reply begins with.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeVar, cast

from ivl.errors import InputError
from ivl.processing.tokenizer import IMAGE_END, IMAGE_START, PLACEHOLDER, Tokenizer
from ivl.types import Conversation, ImageRef, Message, Part, Role, Text, VideoRef

INTERNVL2_5_SYSTEM = (
    "你是书生·万象，英文名是InternVL，是由上海人工智能实验室、清华大学及多家合作单位联合开发的多模态大语言模型。"
)
OLDER_SYSTEM = "你是由上海人工智能实验室联合商汤科技开发的书生多模态大模型，英文名叫InternVL, 是一个有用无害的人工智能助手。"
MediumKind = Literal["image", "video"]
_MARK = re.compile(r"\\?<(image|video)>")
_Piece = TypeVar("_Piece")


@dataclass(frozen=True, kw_only=True)
class Template:
    """The form of a turn: header, a newline, the text, end, newline."""

    system_message: str
    """Used for a conversation without a system turn; empty for none."""
    header: str = "<|im_start|>{role}"
    """One control token, or one followed by the role."""
    end: str = "<|im_end|>"
    newline: str = "\n"
    """Text after the end."""
    strips: bool = False
    """Whether turns of user and assistant lose the white space around them."""


_CHATML = Template(system_message="")
_OLDER = Template(system_message=OLDER_SYSTEM, newline="")
TEMPLATES = {
    "internvl2_5": replace(_CHATML, system_message=INTERNVL2_5_SYSTEM),
    "plain-chatml": _CHATML,
    "Hermes-2": _OLDER,
    "internlm2-chat": replace(_OLDER, strips=True),
    "phi3-chat": replace(_OLDER, header="<|{role}|>", end="<|end|>"),
}


@dataclass(frozen=True)
class Rendered:
    """A conversation as tokens; `render` fills the lists."""

    ids: list[int]
    trained: list[bool]
    """For each token, whether it is trained: part of a reply, or the end of one."""
    cuts: list[tuple[int, int]]
    """For each reply, how many tokens and media the conversation has if it ends there."""

    def add(self, ids: Sequence[int], *, trained: bool = False) -> None:
        """Append tokens."""
        self.ids.extend(ids)
        self.trained.extend([trained] * len(ids))


def template_of(name: str) -> Template:
    """The template of a name in config.json; raises InputError for an unknown one."""
    if name not in TEMPLATES:
        raise InputError(f"unknown template {name!r}; known are {', '.join(TEMPLATES)}")
    return TEMPLATES[name]


def render(
    conversation: Conversation,
    num_tiles: Sequence[int],
    tokenizer: Tokenizer,
    *,
    template: str = "internvl2_5",
    system_message: str | None = None,
    tokens_per_tile: int = 256,
    reply: bool = False,
) -> Rendered:
    """Render a conversation.

    Args:
        num_tiles: one number per medium, in order: tiles of an image, or frames of a video (one tile each).
        system_message: replaces the template's ('' for none); a system turn of the conversation replaces both.
        reply: stop where the assistant is to speak: behind the header of its next turn, or within a last turn of its own, which
            it goes on with. Otherwise the last turn is rendered to its end.

    Raises:
        InputError: without a user turn, for media elsewhere, a wrong num_tiles; to be trained: turns out of order, no reply.
    """
    _check(conversation, num_tiles, strict=not reply)
    form = template_of(template)
    system = form.system_message if system_message is None else system_message
    turns = list(conversation)
    if turns[0].role != "system":
        turns.insert(0, Message("system", (Text(system),)))
    if not turns[0].text:
        del turns[0]

    out = Rendered([], [], [])
    counts, num_media = iter(num_tiles), 0
    out.add([] if tokenizer.bos is None else [tokenizer.bos])
    for number, turn in enumerate(turns, 1):
        head, opening = _header(form, turn.role, tokenizer)
        out.add([head])
        begun = reply and number == len(turns) and turn.role == "assistant"
        if form.strips and turn.role != "system":
            turn = replace(turn, content=_stripped(turn.content, end=not begun))
        if turn.role == "assistant":
            out.add(tokenizer.encode(opening))
            out.add(_continue(opening, turn.text, tokenizer), trained=True)
            if begun:
                return out
            out.add([tokenizer.id(form.end)], trained=True)
            out.add(tokenizer.encode(form.newline))
            out.cuts.append((len(out.ids), num_media))
        else:
            out.add(_body(opening, turn.content, counts, tokenizer, tokens_per_tile))
            out.add([tokenizer.id(form.end), *tokenizer.encode(form.newline)])
            num_media += sum(not isinstance(part, Text) for part in turn.content)
    if reply:
        head, opening = _header(form, "assistant", tokenizer)
        out.add([head, *tokenizer.encode(opening)])
    return out


def _header(form: Template, role: Role, tokenizer: Tokenizer) -> tuple[int, str]:
    """The control token that opens a turn, and the text between it and the content."""
    written = form.header.format(role=role)
    control = written[: written.index(">") + 1]
    return tokenizer.id(control), written[len(control) :] + "\n"


def _continue(opening: str, text: str, tokenizer: Tokenizer) -> list[int]:
    """Ids of a text after an opening, without those of the opening.

    The two are encoded together, since SentencePiece puts a space before text that is encoded alone. Where the first letters
    would merge with the opening (a reply that begins with a newline), the text is encoded alone.
    """
    head, both = tokenizer.encode(opening), tokenizer.encode(opening + text)
    return both[len(head) :] if both[: len(head)] == head else tokenizer.encode(text)


def _body(
    opening: str, content: Sequence[Part], counts: Iterator[int], tokenizer: Tokenizer, tokens_per_tile: int
) -> list[int]:
    """Ids of a system or user turn: text between two media is encoded whole, media are placeholders between brackets."""
    start, placeholder, end = (tokenizer.id(token) for token in (IMAGE_START, PLACEHOLDER, IMAGE_END))
    ids: list[int] = []
    text = opening

    def show(num_tiles: int) -> None:
        nonlocal text
        ids.extend([*tokenizer.encode(text), start, *[placeholder] * (tokens_per_tile * num_tiles), end])
        text = ""

    for part in content:
        if isinstance(part, Text):
            text += part.text
        elif isinstance(part, ImageRef):
            show(next(counts))
        else:  # the form of supervised training, for inference too; the reference has several (docs/reference.md)
            for frame in range(1, next(counts) + 1):
                text += f"Frame-{frame}: " if frame == 1 else f"\nFrame-{frame}: "
                show(1)
    return ids + tokenizer.encode(text)


def _stripped(content: Sequence[Part], *, end: bool) -> tuple[Part, ...]:
    """The content without white space at its beginning and, with `end`, at its end."""
    parts = list(content)
    for at, strip in ((0, str.lstrip), (-1, str.rstrip if end else str)):
        if parts and isinstance(part := parts[at], Text):
            parts[at] = Text(strip(part.text))
    return tuple(parts)


def open_lines(content: Sequence[Text | _Piece]) -> list[Text | _Piece]:
    """Put media that a list of parts gives before its text on lines of their own.

    `(image, image, "Compare.")` becomes `<image>`, newline, `<image>`, newline, `Compare.`. Where white space follows the
    leading media, the list itself says how they stand; where a text comes first, even an empty one, nothing is added.
    """
    lead = next((n for n, part in enumerate(content) if isinstance(part, Text)), len(content))
    text = "".join(part.text for part in content[lead : lead + 1] if isinstance(part, Text))
    if not text or text[0].isspace():
        return list(content)
    return [part for medium in content[:lead] for part in (medium, Text("\n"))] + list(content[lead:])


def pieces(text: str, kinds: Collection[MediumKind]) -> list[tuple[str, MediumKind | None]]:
    """Cut a text at its marks: what stands before each with the mark's kind, then the rest with None.

    `<image>` and `<video>` are marks if their kind is among kinds, else letters. So they are behind a backslash, which goes.
    """
    found: list[tuple[str, MediumKind | None]] = []
    before, at = "", 0
    for match in _MARK.finditer(text):
        before += text[at : match.start()]
        at = match.end()
        if match[1] not in kinds:
            before += match[0]
        elif match[0].startswith("\\"):
            before += match[0][1:]
        else:
            found.append((before, cast(MediumKind, match[1])))
            before = ""
    return [*found, (before + text[at:], None)]


def user(text: str, *media: ImageRef | VideoRef) -> Message:
    """Make a user turn: a mark takes the next medium of its kind (see `pieces`); without marks media come first, a line each.

    Raises:
        InputError: if there are marks and their number differs from the number of media.
    """
    kinds = _kinds(media)
    found = pieces(text, kinds)
    if len(found) == 1:
        return Message("user", (*(part for medium in media for part in (medium, Text("\n"))), Text(found[0][0])))
    if sorted(str(kind) for _, kind in found[:-1]) != sorted(kinds):
        given = f"{len(found) - 1} <image> or <video> marks but {len(media)} media in {text[:80]!r}"
        raise InputError(f"{given}; a mark takes a medium of its kind, and \\<image> is the letters")
    parts: list[Part] = []
    left = list(zip(kinds, media, strict=True))
    for before, kind in found:
        parts += [Text(before)] if before else []
        parts += [left.pop(next(n for n, each in enumerate(left) if each[0] == kind))[1]] if kind else []
    return Message("user", tuple(parts))


def marked(text: str, media: Sequence[ImageRef | VideoRef]) -> str:
    """The text with marks for its media. A text that has marks stays; else the marks come first, each on a line of its own.

    Several images are marked as `Image-1: <image>`, `Image-2: <image>`, as VLMEvalKit asks InternVL.
    """
    kinds = _kinds(media)
    if len(pieces(text, kinds)) > 1:
        return text
    marks = [f"<{kind}>" for kind in kinds]
    if len(marks) > 1 and "video" not in kinds:
        marks = [f"Image-{n}: {mark}" for n, mark in enumerate(marks, 1)]
    return "".join(f"{mark}\n" for mark in marks) + text


def _kinds(media: Sequence[ImageRef | VideoRef]) -> list[MediumKind]:
    return ["video" if isinstance(ref, VideoRef) else "image" for ref in media]


def _check(conversation: Conversation, num_tiles: Sequence[int], *, strict: bool) -> None:
    """Raise InputError unless a user speaks and users alone show media; strict: also unless turns alternate with replies."""
    expected: Role = "user"
    for number, message in enumerate(conversation, 1):
        if message.role == "system" and (number == 1 or not strict):
            continue
        if message.role != expected and (strict or message.role not in ("user", "assistant")):
            raise InputError(f"turn {number} is from {message.role}, expected {expected}")
        if strict and message.role == "assistant" and not message.text.strip():
            raise InputError(f"turn {number} is an empty reply")
        expected = "assistant" if message.role == "user" else "user"
    if not any(message.role == "user" for message in conversation):
        raise InputError("the conversation has no user turn")
    media = [(m.role, part) for m in conversation for part in m.content if not isinstance(part, Text)]
    if wrong := [role for role, _ in media if role != "user"]:
        raise InputError(f"images and videos belong in user turns, found one in a turn of {wrong[0]}")
    if len(media) != len(num_tiles):
        raise InputError(f"{len(media)} media but {len(num_tiles)} tile counts")
