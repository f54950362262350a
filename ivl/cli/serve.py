"""`ivl serve`: a model behind OpenAI's interface."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import tyro

from ivl.api import Dtype, load
from ivl.checkpoint import resolve
from ivl.errors import InputError
from ivl.serve.auth import load_keys
from ivl.serve.config import ServeConfig
from ivl.serve.run import open_socket, run, set_up_log
from ivl.serve.service import Service


def serve(args: list[str]) -> None:
    try:
        tyro.cli(main, prog="ivl serve", args=args)
    except ValueError as error:  # a limit that makes no sense
        raise error if isinstance(error, InputError) else InputError(str(error)) from error


def main(
    model: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="MODEL")]],
    /,
    *,
    config: Annotated[ServeConfig, tyro.conf.arg(name="")] = ServeConfig(),  # noqa: B008  (frozen)
    web: bool = False,
    key_file: Path | None = None,
    dtype: Dtype = "auto",
    device: str = "auto",
    max_tiles: int | None = None,
    max_context: int | None = None,
    max_cache_tokens: int | None = None,
    max_batch_tokens: int = 2048,
) -> None:
    """Serve a model to OpenAI's clients: chat with images and video, completions, streaming.

    Args:
        model: A model directory or hub id.
        web: Also a page at / to talk with the model in a browser.
        key_file: File of API keys, one a line. IVL_API_KEYS may hold more, with commas between them.
        dtype: Type of the weights; auto is the stored one where the processor computes in it well, else float32.
        device: cpu, cuda, or auto.
        max_tiles: Tiles an image may be cut into (more sees finer detail and takes longer).
        max_context: Prompt and reply together, in tokens; by default what the model was trained for.
        max_cache_tokens: Tokens of all running replies and what is kept of finished ones.
        max_batch_tokens: Tokens computed in one step; fewer keep streams smoother while long prompts are read.
    """
    keys = load_keys(key_file)
    config = replace(config, names=config.names or (Path(model).name,))
    listener = open_socket(config, keys)
    set_up_log()
    started = time.perf_counter()
    options = {"max_context": max_context, "max_cache_tokens": max_cache_tokens, "max_batch_tokens": max_batch_tokens}
    given = {key: value for key, value in options.items() if value is not None}
    directory = resolve(model)
    loaded = load(directory, dtype=dtype, device=device, max_tiles=max_tiles, max_sequences=config.max_running, **given)
    service, seconds = Service(loaded.engine, config), time.perf_counter() - started
    run(service, config, listener, keys=keys, load_seconds=seconds, page_of=directory if web else None)
