"""`ivl chat`: talk to a model about images and video."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from ivl.api import Dtype, load, medium
from ivl.errors import InputError
from ivl.types import Grammar, ImageRef, SamplingParams, VideoRef

if TYPE_CHECKING:
    from ivl.api import Chat

HELP = "/image PATH adds a picture or video to the next question, /clear starts anew, /quit ends; Ctrl-C stops a reply"


def chat(args: list[str]) -> None:
    tyro.cli(run, prog="ivl chat", args=args)


def run(
    model: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="MODEL")]],
    media: tyro.conf.Positional[Annotated[tuple[str, ...], tyro.conf.arg(metavar="[IMAGE|VIDEO ...]")]] = (),
    /,
    *,
    prompt: Annotated[str | None, tyro.conf.arg(aliases=["-p"])] = None,
    system: str | None = None,
    max_new_tokens: int = 1024,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    presence_penalty: float = 0.0,
    frequency_penalty: float = 0.0,
    stop: tuple[str, ...] = (),
    seed: int | None = None,
    json: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False,
    json_schema: Path | None = None,
    choice: tuple[str, ...] = (),
    regex: str | None = None,
    max_tiles: int | None = None,
    frames: int = 8,
    dtype: Dtype = "auto",
    device: str = "auto",
    stats: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False,
) -> None:
    """Talk to a model about images and video. Without a prompt the conversation is interactive.

    Args:
        model: A model directory or hub id.
        media: Images, videos, animated GIFs or folders of frames.
        prompt: Ask this, print the reply and stop; a single dash reads it from standard input.
        system: System message in place of the model's own.
        max_new_tokens: Longest reply, in tokens.
        temperature: 0 takes the most likely token; above 0 samples.
        top_p: Sample from the smallest set of tokens that has this probability.
        top_k: Sample from this many most likely tokens; 0 is all.
        min_p: Sample from tokens at least this times as likely as the most likely one; 0 is all.
        repetition_penalty: Above 1 makes tokens that have occurred less likely.
        presence_penalty: Above 0 makes tokens that the reply has less likely.
        frequency_penalty: The same for every time that they came.
        stop: End the reply before any of these strings.
        seed: Makes sampling repeatable.
        json: The reply is a JSON object.
        json_schema: The reply is JSON that this schema, a file, allows.
        choice: The reply is one of these.
        regex: The reply matches this pattern, from its first character to its last.
        max_tiles: Tiles an image may be cut into (more sees finer detail and takes longer).
        frames: Frames taken from a video.
        dtype: Type of the weights; auto is the stored one where the processor computes in it well (bfloat16 needs
            AVX512-BF16, AMX or Arm BF16), else float32.
        device: cpu, cuda, or auto.
        stats: Print times and speeds to standard error.
    """
    try:
        params = SamplingParams(
            max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p,
            repetition_penalty=repetition_penalty, presence_penalty=presence_penalty, frequency_penalty=frequency_penalty,
            stop=stop, seed=seed, guide=guide_of(json, json_schema, choice, regex),
        )  # fmt: skip
    except ValueError as error:
        raise InputError(str(error)) from error
    if frames < 1:
        raise InputError(f"--frames must be at least 1, got {frames}")

    def find(path: str) -> ImageRef | VideoRef:
        ref = medium(path)
        return replace(ref, num_frames=frames) if isinstance(ref, VideoRef) else ref

    refs = [find(path) for path in media]  # a typo should not cost the time of loading a model
    if prompt == "-":
        prompt = sys.stdin.read().strip()
    if prompt is not None and not prompt and not refs:
        raise InputError("the prompt is empty")
    started = time.perf_counter()
    loaded = load(model, dtype=dtype, device=device, max_tiles=max_tiles)
    if stats:
        name = str(loaded.engine.model.dtype).removeprefix("torch.")
        print(f"load {time.perf_counter() - started:.2f} s ({name} on {loaded.engine.model.device})", file=sys.stderr)
    options = {name: getattr(params, name) for name in params.__dataclass_fields__}

    def answer(conversation: Chat, text: str, refs: list[ImageRef | VideoRef]) -> None:
        try:
            for piece in conversation.stream(text, *refs, **options):
                print(piece, end="", flush=True)
        finally:
            print(flush=True)
        if stats:
            print(describe(conversation), file=sys.stderr)
        request = conversation.request
        if request and request.finish_reason == "length":
            print(f"[cut after {len(request.tokens)} tokens: see --max-new-tokens]", file=sys.stderr)

    if prompt is not None:
        answer(loaded.start(system=system), prompt, refs)
    else:
        interact(lambda: loaded.start(system=system), answer, find, refs)


def guide_of(any_json: bool, schema: Path | None, choices: tuple[str, ...], regex: str | None) -> Grammar | None:
    """The one guide that was asked for."""
    given = [any_json, schema is not None, bool(choices), regex is not None]
    if sum(given) > 1:
        raise InputError("give one of --json, --json-schema, --choice and --regex: a reply has one form")
    if any_json:
        return Grammar("json")
    if schema is not None:
        try:
            text = schema.read_text(encoding="utf-8")
            json.loads(text)
        except (OSError, ValueError) as error:
            raise InputError(f"{schema}: not a schema that can be read ({error})") from error
        return Grammar("json_schema", text)
    if choices:
        return Grammar("choice", json.dumps(choices))
    return Grammar("regex", regex) if regex is not None else None


def describe(conversation: Chat) -> str:
    """Times and speeds of the last reply."""
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


def interact(
    start: Callable[[], Chat],
    answer: Callable[[Chat, str, list[ImageRef | VideoRef]], None],
    find: Callable[[str], ImageRef | VideoRef],
    refs: list[ImageRef | VideoRef],
) -> None:
    """Questions from the terminal until /quit or the end of input."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (line editing and history for input())
    print(HELP, file=sys.stderr)
    conversation = start()
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
            if command in ("/quit", "/exit"):
                return
            if command == "/clear":
                conversation, refs = start(), []
            elif command in ("/image", "/video"):
                refs = [*refs, find(rest.strip())]
            elif command.startswith("/"):
                print(f"unknown command {command}: {HELP}", file=sys.stderr)
            elif line:
                answer(conversation, line, refs)
                refs = []
        except KeyboardInterrupt:
            refs = []
            print("[stopped]", file=sys.stderr)
        except InputError as error:
            print(f"{error}", file=sys.stderr)
