"""`ivl serve`: a model behind OpenAI's interface."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated

from tyro.conf import OmitArgPrefixes, Positional, arg

from ivl.checkpoint import model_name, resolve
from ivl.cli.options import parse
from ivl.errors import InputError
from ivl.generators import LoadConfig
from ivl.serve.auth import load_keys
from ivl.serve.config import ServeConfig


@dataclass(frozen=True, kw_only=True)
class ServeOptions:
    """Serve a model to OpenAI's clients: chat with images and video, completions, streaming."""

    model: Annotated[Positional[str], arg(metavar="MODEL")]
    """A model directory or hub id."""
    config: Annotated[ServeConfig, arg(name="")] = field(default_factory=ServeConfig)
    web: bool = False
    """Also serve a page at / to talk with the model in a browser."""
    key_file: Path | None = None
    """File of API keys, one a line. IVL_API_KEYS may hold more, separated by commas."""
    load: OmitArgPrefixes[LoadConfig] = field(default_factory=LoadConfig)
    max_context: int | None = None
    """Tokens of prompt and reply together; by default what the model was trained for."""
    max_cache_tokens: int | None = None
    """Tokens in the cache: those of all running replies, and as much of finished ones as there is room for."""
    max_batch_tokens: int = 2048
    """Tokens computed in one step; fewer keep streams smoother while long prompts are read."""


def serve(args: list[str]) -> None:
    """Run `ivl serve`."""
    options = parse(ServeOptions, "serve", args)
    try:
        from ivl.serve.log import set_up_log
        from ivl.serve.run import open_socket, run
    except ImportError as error:
        raise InputError(f'a server needs {error.name}: pip install "ivl[serve]"') from error
    from ivl.generators.local import load_engine
    from ivl.serve.service import Service

    if options.load.is_follower:
        load_engine(options.model, options.load)
    keys = load_keys(options.key_file)
    adapters = options.load.adapters
    config = replace(options.config, names=options.config.names or (model_name(adapters.get("", options.model)),))
    if twice := adapters.keys() & set(config.names):
        raise InputError(f"{min(twice)} names the model and an adapter: give one of them another name (--names, --adapter)")
    listener = open_socket(config, keys)
    set_up_log()
    started = time.perf_counter()
    directory = resolve(options.model)
    limits = {name: getattr(options, name) for name in ("max_context", "max_cache_tokens", "max_batch_tokens")}
    limits = {name: limit for name, limit in limits.items() if limit is not None}
    try:
        engine = load_engine(directory, options.load, max_sequences=config.max_running, **limits)
    except (MemoryError, RuntimeError, OverflowError) as error:
        reason = next(iter(str(error).splitlines()), "")[:200]
        raise InputError(f"{directory}: no memory for the model and its cache (see --max-cache-tokens): {reason}") from error
    service, seconds = Service(engine, config), time.perf_counter() - started
    run(service, config, listener, keys=keys, load_seconds=seconds, page_of=directory if options.web else None)
