"""`ivl chat`: talk to a model about images and video."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated

from tyro.conf import FlagCreatePairsOff, OmitArgPrefixes, Positional, Suppress, arg

from ivl.api import Chat, Model, load, medium
from ivl.cli.options import ReplyLoadConfig, parse
from ivl.errors import InputError
from ivl.types import FramesBy, Grammar, ImageRef, SamplingParams, VideoRef
from ivl.utils.strict_json import read_json
from ivl.utils.terminal import printable

HELP = "/image PATH adds an image or video to the next question, /clear starts anew, /quit ends; Ctrl-C stops a reply"
Media = tuple[ImageRef | VideoRef, ...]


@dataclass(frozen=True, kw_only=True)
class ReplyOptions(SamplingParams):
    """How a reply is sampled, and its form."""

    guide: Suppress[Grammar | None] = None
    logprobs: Suppress[int | None] = None
    ignore_eos: Suppress[bool] = False
    json: FlagCreatePairsOff[bool] = False
    """The reply is a JSON object."""
    json_schema: Path | None = None
    """The reply is JSON that follows this schema, a file."""
    choice: tuple[str, ...] = ()
    """The reply is one of these texts."""
    regex: str | None = None
    """The reply matches this pattern from its first character to its last."""

    def params(self) -> SamplingParams:
        """Return the parameters with the grammar of the one form that was asked for."""
        forms = {"json": self.json, "json_schema": self.json_schema, "choice": self.choice, "regex": self.regex}
        kinds = [kind for kind, value in forms.items() if value not in (False, None, ())]
        if len(kinds) > 1:
            raise InputError("give one of --json, --json-schema, --choice and --regex: a reply has one form")
        value = json.dumps(self.choice) if self.choice else self.regex or ""
        if self.json_schema is not None:
            value = json.dumps(read_json(self.json_schema))
        options = {name: value for name, value in asdict(self).items() if name not in forms}
        return SamplingParams(**options | {"guide": Grammar(kinds[0], value) if kinds else None})  # type: ignore[arg-type]


@dataclass(frozen=True, kw_only=True)
class ChatOptions:
    """Talk to a model about images and video. Without a prompt the conversation is interactive."""

    model: Annotated[Positional[str], arg(metavar="MODEL")]
    """A model directory or hub id."""
    media: Annotated[Positional[tuple[str, ...]], arg(metavar="[IMAGE|VIDEO ...]")] = ()
    """Images, videos, animated GIFs or folders of frames."""
    prompt: Annotated[str | None, arg(aliases=["-p"])] = None
    """Ask this, print the reply and stop; a single dash reads it from standard input."""
    system: str | None = None
    """System message in place of the model's own."""
    frames: int = 8
    """Frames taken from a video."""
    frames_by: FramesBy = "index"
    """Spread them over the numbers of the frames, or over time, which differs where the frame rate varies."""
    stats: FlagCreatePairsOff[bool] = False
    """Print times and speeds to standard error."""
    reply: OmitArgPrefixes[ReplyOptions] = field(default_factory=ReplyOptions)
    load: OmitArgPrefixes[ReplyLoadConfig] = field(default_factory=ReplyLoadConfig)


def chat(args: list[str]) -> None:
    """Run `ivl chat`."""
    options = parse(ChatOptions, "chat", args)
    params = options.reply.params()
    if options.frames < 1:
        raise InputError(f"--frames must be at least 1, got {options.frames}")
    media = tuple(_open(path, options) for path in options.media)  # before loading a model, which takes its time
    prompt = sys.stdin.read().strip() if options.prompt == "-" else options.prompt
    if prompt is not None and not prompt and not media:
        raise InputError("the prompt is empty")
    started = time.perf_counter()
    given = asdict(options.load.with_one_adapter())
    given["adapter"] = next(iter(given["adapter"]), None)
    model = load(options.model, **given)
    if options.stats:
        from ivl.cpu.kernels.features import level

        dtype, device = str(model.engine.model.dtype).removeprefix("torch."), model.engine.model.device
        place = f"{device}, level {level()}" if device.type == "cpu" else device
        print(f"load {time.perf_counter() - started:.2f} s ({dtype} on {place})", file=sys.stderr)
    if prompt is None:
        _interact(model, params, media, options)
    else:
        _answer(model.start(system=options.system), prompt, media, params, stats=options.stats)


def _open(path: str, options: ChatOptions) -> ImageRef | VideoRef:
    try:
        ref = medium(path)
    except InputError as error:
        raise InputError(f"{error}; a question goes behind -p") if " " in path else error from None
    frames, over = options.frames, options.frames_by
    return replace(ref, num_frames=frames, frames_by=over) if isinstance(ref, VideoRef) else ref


def _answer(conversation: Chat, text: str, media: Media, params: SamplingParams, *, stats: bool) -> None:
    """Print the reply to a question as it is generated."""
    try:
        for piece in conversation.stream(text, *media, **vars(params)):
            print(_shown(piece) if sys.stdout.isatty() else piece, end="", flush=True)
    finally:
        print(flush=True)
    if stats:
        print(_describe(conversation), file=sys.stderr)
    request = conversation.request
    if request and request.finish_reason == "length":
        print(f"[cut after {len(request.tokens)} tokens: see --max-new-tokens]", file=sys.stderr)


def _shown(piece: str) -> str:
    """Return a piece of a reply, or a name, without what would rule the terminal, but with its lines."""
    return "\n".join("\t".join(map(printable, line.split("\t"))) for line in piece.split("\n"))


def _describe(conversation: Chat) -> str:
    """Return times and speeds of the last reply."""
    request = conversation.request
    assert request is not None
    t, num_new, num_cached = request.timings, len(request.tokens), request.num_cached
    num_read = request.num_prompt - num_cached
    speed = f" = {(num_new - 1) / t.decode:,.1f} tokens/s" if num_new > 1 and t.decode > 0 else ""
    reading = f" = {num_read / t.prefill:,.0f} tokens/s" if t.prefill > 0 else ""
    return (
        f"prepare {t.prepare:.2f} s | queue {t.queue:.2f} s | vision {t.vision:.2f} s ({request.num_tiles} tiles) | "
        f"prefill {t.prefill:.2f} s ({num_read} tokens{reading}; {num_cached} cached) | "
        f"decode {t.decode:.2f} s ({num_new} tokens{speed})"
    )


def _interact(model: Model, params: SamplingParams, media: Media, options: ChatOptions) -> None:
    """Answer questions from the terminal until /quit or the end of input."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (line editing and history for input())
    print(HELP, file=sys.stderr)
    conversation = model.start(system=options.system)
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print("\n/quit or Ctrl-D ends", file=sys.stderr)
            continue
        try:
            command, _, rest = line.partition(" ")
            if command in ("/quit", "/exit") or line in ("exit", "quit"):
                return
            if command == "/clear":
                conversation, media = model.start(system=options.system), ()
            elif command in ("/image", "/video"):
                media = (*media, _open(rest.strip(), options))
                print(f"{rest.strip()} goes with the next question ({len(media)} in all)", file=sys.stderr)
            elif command == "/help":
                print(HELP, file=sys.stderr)
            elif command.startswith("/"):
                print(f"unknown command {command}: {HELP}", file=sys.stderr)
            elif line:
                _answer(conversation, line, media, params, stats=options.stats)
                media = ()
        except KeyboardInterrupt:
            media = ()
            print("[stopped]", file=sys.stderr)
        except InputError as error:
            print(printable(error), file=sys.stderr)
