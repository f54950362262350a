"""The Python API. Importing it costs little: torch is loaded by `load`.

import ivl
model = ivl.load("runs/quickstart/model")
print(model.chat("What color is the shape?", "picture.png"))
"""

from __future__ import annotations

import base64
import copy
import json
import re
import sys
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast
from urllib.parse import unquote, urlsplit

from ivl.errors import InputError, nearest, short
from ivl.generators import Dtype, LoadConfig
from ivl.types import VIDEO_SUFFIXES, Conversation, Grammar, ImageRef, Message, Part, Role, SamplingParams, Text, VideoRef

if TYPE_CHECKING:
    from typing import BinaryIO

    import numpy as np
    import torch
    from PIL import Image

    from ivl.inference.engine import Engine, Reply, Request

    Medium = str | Path | bytes | BinaryIO | Image.Image | np.ndarray | ImageRef | VideoRef

ROLES: dict[str, Role] = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
_DATA = re.compile(r"data:([\w.+-]*)/?[^,]{0,200};base64,", re.IGNORECASE)


def load(
    name: str | Path,
    *,
    dtype: Dtype | torch.dtype = "auto",
    device: str = "auto",
    max_tiles: int | None = None,
    adapter: str | Path | None = None,
    tensor_parallel: int = 1,
    **engine_options: int,
) -> Model:
    """Load a model, ready for conversations, from a directory or a hub id.

    Args:
        dtype: "auto" keeps the type the weights are stored in, but on a CPU takes float32 for float16 weights, and for
            bfloat16 weights where neither torch nor our kernels multiply them (no AVX2, no Arm BF16).
        device: "auto" is the GPU if there is one; "cuda:0,cuda:1" shares out the decoder's layers over these.
        max_tiles: Tiles an image may be cut into; None takes the checkpoint's.
        adapter: Directory of a LoRA adapter to reply with, which is not merged.
        tensor_parallel: Processes, each on a GPU of its own, that share the model. The others are started here, and end with
            this one; under torchrun the call returns on rank 0 alone.
        engine_options: Arguments of `ivl.inference.engine.Engine`, such as max_cache_tokens.

    Raises:
        InputError: if the model cannot be found or read.
    """
    from ivl.generators.local import load_engine

    name_of_dtype = dtype if isinstance(dtype, str) else cast(Dtype, str(dtype).removeprefix("torch."))
    adapters = () if adapter is None else (str(adapter),)
    config = LoadConfig(
        dtype=name_of_dtype, device=device, max_tiles=max_tiles, adapter=adapters, tensor_parallel=tensor_parallel
    )
    return Model(load_engine(name, config, **engine_options), str(name))


class Model:
    """A loaded model. Keyword options of its methods are those of `SamplingParams`; the default is greedy.

    `json_schema`, a dict or a class of pydantic, is one more: the reply is JSON of this form.
    Safe in threads: calls that run at the same time advance together.
    """

    def __init__(self, engine: Engine, name: str = "") -> None:
        self.engine, self.name = engine, name

    def __repr__(self) -> str:
        model, config = self.engine.model, self.engine.model.config
        count = sum(parameter.numel() for parameter in model.parameters())
        dtype = str(model.dtype).removeprefix("torch.")
        return f"Model({self.name!r}, {count:,} parameters, {dtype}, {model.device}, {config.decoder.family})"

    def chat(self, text: str, *media: Medium | Sequence[Medium], **options: Any) -> str:
        """Return the reply to one question about any number of images or videos."""
        return self.start().send(text, *media, **options)

    def stream(self, text: str, *media: Medium | Sequence[Medium], **options: Any) -> Generator[str, None, None]:
        """Yield the reply piece by piece, as it is generated. Closing the iterator stops the generation."""
        return self.start().stream(text, *media, **options)

    def generate(
        self,
        conversations: Sequence[Conversation | Sequence[Mapping[str, Any]] | str],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        progress: bool | None = None,
        **options: Any,
    ) -> list[Reply]:
        """Reply to many conversations at once; batching changes no reply.

        Args:
            conversations: Each is a text, which is one question, what `ask` makes, or a list of OpenAI's messages.
            params: One for all, or one for each; instead of it, options may be given as to `chat`.
            progress: Whether a bar is shown; None shows it on a terminal, for more than one conversation.

        Raises:
            InputError: for anything else, and as `Chat.stream`.
        """
        if isinstance(conversations, str | bytes | dict) or not isinstance(conversations, Iterable):
            raise InputError(f"conversations must be a list of texts or of conversations, got {short(conversations)}")
        asked = [_conversation(each, f"conversation {number}") for number, each in enumerate(conversations)]
        if params is not None and options:
            raise InputError(f"give params or options such as {min(options)}, not both")
        each_params = _params(options) if params is None else params
        listed = [each_params] if isinstance(each_params, SamplingParams) else each_params
        if not isinstance(listed, tuple | list) or not all(isinstance(each, SamplingParams) for each in listed):
            raise InputError(f"params must be ivl.SamplingParams, or a list with one for each, got {short(params)}")
        if not (sys.stderr.isatty() and len(asked) > 1 if progress is None else progress):
            return self.engine.generate(asked, each_params)
        from ivl.utils.progress import reporting

        with reporting("replies", "replies") as show:
            return self.engine.generate(asked, each_params, show=show)

    def logprobs(self, reply: Reply) -> list[tuple[str, float]]:
        """Return each token of a reply as text with its log-probability, if `logprobs` asked for them."""
        token_bytes = self.engine.processor.tokenizer.token_bytes
        return [(token_bytes(each.token).decode(errors="replace"), each.logprob) for each in reply.logprobs]

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

    def __repr__(self) -> str:
        last = f", last {short(self.messages[-1].text)}" if self.messages else ""
        return f"Chat({len(self.messages)} messages{last})"

    def send(self, text: str, *media: Medium | Sequence[Medium], **options: Any) -> str:
        """Return the whole reply, without white space around it."""
        return "".join(self.stream(text, *media, **options)).strip()

    def stream(self, text: str, *media: Medium | Sequence[Medium], **options: Any) -> Generator[str, None, None]:
        """Yield the reply piece by piece.

        If the iterator is closed early, the reply so far stays in the history, but an empty reply and its question do not.

        Raises:
            InputError: for media that cannot be read, or a conversation longer than the context.
        """
        message = user(text, *media)
        self.request = self.engine.submit((*self.messages, message), _params(options))
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


def _params(options: dict[str, Any]) -> SamplingParams:
    """Return options of a call as parameters; `json_schema` is one of them."""
    schema, given = options.get("json_schema"), {name: value for name, value in options.items() if name != "json_schema"}
    known = SamplingParams.__dataclass_fields__
    for name in given.keys() - known:
        raise InputError(f"unknown option {name!r}: {nearest(name, [*known, 'json_schema'], 'options')}")
    if schema is None:
        return SamplingParams(**given)
    if given.get("guide") is not None:
        raise InputError("json_schema and guide each say what form the reply has: give one")
    return SamplingParams(**given, guide=_schema_grammar(schema))


def _schema_grammar(schema: Any) -> Grammar:
    from ivl.utils.grammars import close_objects

    if isinstance(schema, type) and hasattr(schema, "model_json_schema"):
        schema = cast(Any, schema).model_json_schema()
    if not isinstance(schema, Mapping):
        raise InputError(f"json_schema must be a dict, or a class of pydantic, got {short(schema)}")
    closed = copy.deepcopy(dict(cast(Mapping[str, Any], schema)))
    try:
        close_objects(closed)
        return Grammar("json_schema", json.dumps(closed, ensure_ascii=False))
    except (TypeError, ValueError) as error:
        raise InputError(f"json_schema is not JSON: {error}") from error


def ask(text: str, *media: Medium | Sequence[Medium], system: str | None = None) -> Conversation:
    """Make a conversation of one question, for `Model.generate`."""
    first = () if system is None else (_system(system),)
    return (*first, user(text, *media))


def user(text: str, *media: Medium | Sequence[Medium]) -> Message:
    """Make a user turn.

    `<image>` or `<video>` in the text marks the place of the next medium of its kind; without such a medium it is letters, and
    with one `\\<image>` is. Without marks media come first, one a line, several images as `Image-1: `, `Image-2: `.

    Raises:
        InputError: for media that are not there, or marks that do not match them in number.
    """
    from ivl.processing import chat

    _check_text(text)
    refs = [medium(cast("Medium", m)) for each in media for m in (each if isinstance(each, list | tuple) else [each])]
    return chat.user(chat.marked(text, refs), *refs)


def _system(text: str) -> Message:
    _check_text(text)
    return Message("system", (Text(text),))


def _check_text(text: object) -> None:
    if not isinstance(text, str):
        raise InputError(f"a question or system message must be a text, got {short(text)}")
    if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
        raise InputError(f"a text with half of a surrogate pair has no tokens: {short(text)}")


def _conversation(given: Any, place: str) -> Conversation:
    """Return one of the forms that `Model.generate` takes as a conversation. place: begins an error."""
    if isinstance(given, str):
        return ask(given)
    if isinstance(given, tuple | list) and given and all(isinstance(message, Message) for message in given):
        return tuple(given)
    if not isinstance(given, tuple | list) or not given or not all(isinstance(message, Mapping) for message in given):
        hint = "; put the messages of one conversation into a list of their own" if isinstance(given, Mapping) else ""
        raise InputError(f"{place} must be a text, or messages of ivl.ask or in OpenAI's form, got {short(given)}{hint}")
    return tuple(_message(message, f"{place}, message {number}") for number, message in enumerate(given))


def _message(given: Mapping[str, Any], place: str) -> Message:
    """Return one of OpenAI's messages as a turn. Marks in its texts are letters: parts show where media stand."""
    from ivl.processing.chat import open_lines

    role, content = given.get("role"), given.get("content")
    if role not in ROLES:
        raise InputError(f"{place}: the role is one of {', '.join(ROLES)}, got {short(role)}")
    if isinstance(content, str) or (content is None and role == "assistant"):
        content = [{"type": "text", "text": content or ""}]
    if not isinstance(content, tuple | list):
        raise InputError(f"{place}: the content is a text or a list of parts, got {short(content)}")
    parts = [_part(part, f"{place}, part {number}") for number, part in enumerate(content)]
    return Message(ROLES[role], tuple(open_lines(parts) if role == "user" else parts))


def _part(given: Any, place: str) -> Part:
    """Return a part of a message: text, or `image_url`, `image`, `video_url`, `video` with what `medium` takes."""
    kind = given.get("type") if isinstance(given, Mapping) else None
    if kind == "text":
        _check_text(given.get("text"))
        return Text(given["text"])
    if kind not in ("image_url", "image", "video_url", "video"):
        raise InputError(f"{place}: a part has the type text, image_url, image, video_url or video, got {short(given)}")
    value = given.get(kind)
    ref = medium(cast("Medium", value.get("url") if isinstance(value, Mapping) else value))
    is_video = kind.startswith("video") and isinstance(ref, ImageRef) and isinstance(ref.source, str | bytes)
    return VideoRef(cast(Any, ref).source) if is_video else ref


def medium(source: Medium) -> ImageRef | VideoRef:
    """Make an image or video reference: folders, video files and animated GIFs are videos, everything else is an image.

    Args:
        source: A path (also as file: URL), a data: URL, bytes or an open file, a PIL image, a reference, or an array of uint8,
            height x width x 3.

    Raises:
        InputError: if there is no such file, or it is not an image by its first bytes.
    """
    if isinstance(source, ImageRef | VideoRef):
        return source
    from PIL import Image

    if hasattr(source, "read") and not isinstance(source, str | Path | Image.Image):
        try:
            source = cast(Any, source).read()
        except (OSError, ValueError) as error:  # closed, for writing, or of text with other bytes
            raise InputError(f"cannot read the open file of an image: {str(error)[:100]}; open it with mode 'rb'") from None
        if not isinstance(source, bytes):
            raise InputError(f"an open file of an image gives bytes, got {type(source).__name__}; open it with mode 'rb'")
    if isinstance(source, bytes | Image.Image):
        return ImageRef(source)
    if hasattr(source, "shape"):
        return ImageRef(_from_array(source))
    if not isinstance(source, str | Path):
        raise InputError(
            f"an image or video is a path, bytes, a PIL image, an array or a reference, got {type(source).__name__}"
        )
    if isinstance(source, str) and (scheme := source[:8].partition(":")[0].lower()) in ("http", "https", "data", "file"):
        if scheme.startswith("http"):
            raise InputError(f"{short(source)}: nothing is fetched; download it, and pass the path or the bytes")
        if scheme == "data":
            return _from_data_url(source)
        source = unquote(urlsplit(source).path)
    return _from_path(source)


def _from_array(array: Any) -> Image.Image:
    from PIL import Image

    shape, dtype = tuple(array.shape), str(array.dtype).removeprefix("torch.")
    if dtype != "uint8" or len(shape) not in (2, 3) or shape[2:] not in ((), (3,), (4,)) or 0 in shape or hasattr(array, "cpu"):
        array_of = f"{type(array).__name__} of {dtype} {' x '.join(map(str, shape))}"
        raise InputError(f"an image as an array is a numpy array of uint8, height x width x 3, got {array_of}")
    return Image.fromarray(array)


def _from_data_url(url: str) -> ImageRef | VideoRef:
    if (header := _DATA.match(url)) is None:
        raise InputError(f"a data: URL must look like data:image/png;base64,..., got {short(url, 40)}")
    try:
        data = base64.b64decode(url[header.end() :].strip(), validate=True)
    except ValueError:
        raise InputError(f"the data: URL {short(url, 40)} is not base64") from None
    return VideoRef(data) if header[1].lower() == "video" else ImageRef(data)


def _from_path(source: str | Path) -> ImageRef | VideoRef:
    from ivl.utils.files import is_bare_base64
    from ivl.utils.pictures import open_image, problem_of

    path, found, reason = Path(source), False, ""
    if not str(source):
        raise InputError("an image or video has an empty path")
    try:
        path = path.expanduser()
        found = path.is_file() or path.is_dir()  # reading a pipe or a device might never end
    except (OSError, ValueError, RuntimeError) as error:  # a name that no file can have
        reason = f" ({str(error)[:60]})"
    if not found and is_bare_base64(str(source)):
        raise InputError(
            f"{short(str(source), 40)}: base64 without a prefix; write data:image/png;base64,..., or pass the bytes"
        )
    if not found:
        raise InputError(f"{str(source)[:200]}: no such image or video{reason}")
    if path.is_dir() or path.suffix.lower() in VIDEO_SUFFIXES:
        return VideoRef(str(path))
    head = b"?"
    try:
        with path.open("rb") as stream:
            head = stream.read(512)
            stream.seek(0)
            image, _ = open_image(stream)
            moving = image.format == "GIF" and getattr(image, "n_frames", 1) > 1
    except Exception as error:  # Pillow's readers raise whatever their parsing meets
        raise InputError(f"{source}: {problem_of(error, head, quote=True)}") from error
    return VideoRef(str(path)) if moving else ImageRef(str(path))
