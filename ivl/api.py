"""The Python API. Importing it costs little: torch is loaded by `load`.

import ivl
model = ivl.load("runs/quickstart/model")
print(model.chat("What color is the shape?", "picture.png"))
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from ivl.errors import InputError, nearest, short
from ivl.generators import Dtype, LoadConfig
from ivl.types import VIDEO_SUFFIXES, Conversation, ImageRef, Message, SamplingParams, Text, VideoRef

if TYPE_CHECKING:
    import torch
    from PIL import Image

    from ivl.inference.engine import Engine, Reply, Request

    Medium = str | Path | bytes | Image.Image | ImageRef | VideoRef


def load(
    name: str | Path,
    *,
    dtype: Dtype | torch.dtype = "auto",
    device: str = "auto",
    max_tiles: int | None = None,
    **engine_options: int,
) -> Model:
    """Load a model, ready for conversations, from a directory or a hub id.

    Args:
        dtype: "auto" keeps the type the weights are stored in, but on a CPU takes float32 for float16 weights, and for
            bfloat16 weights where the processor cannot multiply them (no AVX512-BF16, AMX or Arm BF16).
        device: "auto" is the GPU if there is one.
        max_tiles: Tiles an image may be cut into; None takes the checkpoint's.
        engine_options: Arguments of `ivl.inference.engine.Engine`, such as max_cache_tokens.

    Raises:
        InputError: if the model cannot be found or read.
    """
    from ivl.generators.local import load_engine

    name_of_dtype = dtype if isinstance(dtype, str) else cast(Dtype, str(dtype).removeprefix("torch."))
    config = LoadConfig(dtype=name_of_dtype, device=device, max_tiles=max_tiles)
    return Model(load_engine(name, config, **engine_options))


class Model:
    """A loaded model. Keyword options of its methods are those of `SamplingParams`; the default is greedy.

    Safe in threads: calls that run at the same time advance together.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def chat(self, text: str, *media: Medium, **options: Any) -> str:
        """Return the reply to one question about any number of images or videos."""
        return self.start().send(text, *media, **options)

    def stream(self, text: str, *media: Medium, **options: Any) -> Generator[str, None, None]:
        """Yield the reply piece by piece, as it is generated. Closing the iterator stops the generation."""
        return self.start().stream(text, *media, **options)

    def generate(
        self, conversations: Sequence[Conversation | str], params: SamplingParams | Sequence[SamplingParams] | None = None
    ) -> list[Reply]:
        """Reply to many conversations (see `ask`) at once; batching changes no reply. A text is a conversation of one question.

        Raises:
            InputError: for anything else than texts and conversations, and as `Chat.stream`.
        """
        if isinstance(conversations, str | bytes | dict) or not isinstance(conversations, Iterable):
            raise InputError(f"conversations must be a list of texts or of conversations, got {short(conversations)}")
        asked = [ask(each) if isinstance(each, str) else each for each in conversations]
        for number, each in enumerate(asked):
            if not isinstance(each, tuple | list) or not all(isinstance(message, Message) for message in each):
                raise InputError(f"conversation {number} must be a text, or messages as ivl.ask makes them, got {short(each)}")
        each_params = SamplingParams() if params is None else params
        if isinstance(each_params, SamplingParams):
            return self.engine.generate(asked, each_params)
        if not isinstance(each_params, tuple | list) or not all(isinstance(each, SamplingParams) for each in each_params):
            raise InputError(f"params must be ivl.SamplingParams, or a list of one for each conversation, got {short(params)}")
        if len(each_params) != len(asked):
            raise InputError(f"{len(asked)} conversations but {len(each_params)} sampling parameters")
        return self.engine.generate(asked, each_params)

    def start(self, *, system: str | None = None) -> Chat:
        """Start a conversation of several turns; `system` replaces the model's own system message."""
        return Chat(self.engine, system=system)


class Chat:
    """A conversation of several turns: `messages` is its history, `request` the last request, with its timings."""

    def __init__(self, engine: Engine, *, system: str | None = None) -> None:
        self.engine = engine
        self.system = system
        self.messages: Conversation = () if system is None else (_system(system),)
        self.request: Request | None = None

    def send(self, text: str, *media: Medium, **options: Any) -> str:
        """Return the whole reply, without white space around it."""
        return "".join(self.stream(text, *media, **options)).strip()

    def stream(self, text: str, *media: Medium, **options: Any) -> Generator[str, None, None]:
        """Yield the reply piece by piece.

        If the iterator is closed early, the reply so far stays in the history, but an empty reply and its question do not.

        Raises:
            InputError: for media that cannot be read, or a conversation longer than the context.
        """
        message = user(text, *media)
        known = SamplingParams.__dataclass_fields__
        for name in options.keys() - known:
            raise InputError(f"unknown option {name!r}: {nearest(name, known, 'options')}")
        self.request = self.engine.submit((*self.messages, message), SamplingParams(**options))
        reply = ""
        try:
            with closing(self.engine.deltas(self.request)) as deltas:
                for delta in deltas:
                    reply += delta.text
                    if delta.text:
                        yield delta.text
        finally:
            if reply.strip():
                self.messages = (*self.messages, message, Message("assistant", (Text(reply.strip()),)))


def ask(text: str, *media: Medium, system: str | None = None) -> Conversation:
    """Make a conversation of one question, for `Model.generate`."""
    first = () if system is None else (_system(system),)
    return (*first, user(text, *media))


def user(text: str, *media: Medium) -> Message:
    """Make a user turn.

    `<image>` or `<video>` in the text marks the place of the next medium. Without marks media come first, one a line, several
    images as `Image-1: `, `Image-2: `.

    Raises:
        InputError: for media that are not there, or marks that do not match them in number.
    """
    from ivl.processing import chat

    _check_text(text)
    refs = [medium(m) for m in media]
    return chat.user(chat.marked(text, refs), *refs)


def _system(text: str) -> Message:
    _check_text(text)
    return Message("system", (Text(text),))


def _check_text(text: object) -> None:
    if not isinstance(text, str):
        raise InputError(f"a question or system message must be a text, got {short(text)}")
    if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
        raise InputError(f"a text with half of a surrogate pair has no tokens: {short(text)}")


def medium(source: Medium) -> ImageRef | VideoRef:
    """Make an image or video reference: folders, video files and animated GIFs are videos, everything else is an image.

    Raises:
        InputError: if there is no such file, or it is not an image by its first bytes.
    """
    if isinstance(source, ImageRef | VideoRef):
        return source
    from PIL import Image, UnidentifiedImageError

    from ivl.utils.pictures import open_image

    if isinstance(source, bytes | Image.Image):
        return ImageRef(source)
    if not isinstance(source, str | Path):
        array = "; PIL.Image.fromarray makes an image of an array" if hasattr(source, "shape") else ""
        raise InputError(f"an image or video is a path, bytes, a PIL image or a reference, got {type(source).__name__}{array}")
    path, found, reason = Path(source), False, ""
    try:
        path = path.expanduser()
        found = path.is_file() or path.is_dir()  # reading a pipe or a device might never end
    except (OSError, ValueError, RuntimeError) as error:  # a name that no file can have
        reason = f" ({str(error)[:60]})"
    if not found:
        raise InputError(f"{str(source)[:200]}: no such image or video{reason}")
    if path.is_dir() or path.suffix.lower() in VIDEO_SUFFIXES:
        return VideoRef(str(path))
    try:
        with path.open("rb") as stream:
            image, _ = open_image(stream)
            moving = image.format == "GIF" and getattr(image, "n_frames", 1) > 1
    except (UnidentifiedImageError, OSError, ValueError, IndexError, Image.DecompressionBombError) as error:
        raise InputError(f"{source}: not an image that can be read ({error})") from error
    return VideoRef(str(path)) if moving else ImageRef(str(path))
