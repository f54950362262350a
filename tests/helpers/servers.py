"""A tiny model behind a server: in this process for most tests, on a port of its own where connections matter."""

from __future__ import annotations

import asyncio
import base64
import io
import os
import threading
import time
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import ivl
from ivl.inference.engine import Engine
from ivl.parallel.follow import LeadingEngine
from ivl.serve.app import create_app
from ivl.serve.config import ServeConfig
from ivl.serve.run import make_server, open_socket
from ivl.serve.service import Service
from tests.helpers.engines import picture, tiny_directory

KEY = "a-key-of-some-length-0123456789"
CONFIG = ServeConfig(port=0, names=("tiny", "alias"), shutdown_timeout=5.0, keep_alive=5.0)


RANKS = int(os.environ.get("IVL_TEST_TENSOR_PARALLEL", "1"))
"""Processes that share the first model of a file, so that the tests of the server can run with several, file by file."""
leading: list[LeadingEngine] = []


def engine(directory: Path, **options: int) -> Engine:
    options = {"max_cache_tokens": 8192, "block_size": 16, "tensor_parallel": 1 if leading else RANKS, **options}
    loaded = ivl.load(tiny_directory(directory), **options).engine
    if isinstance(loaded, LeadingEngine):
        leading.append(loaded)
    return loaded


def data_url(seed: int) -> str:
    out = io.BytesIO()
    picture(seed).save(out, "PNG")
    return f"data:image/png;base64,{base64.b64encode(out.getvalue()).decode()}"


def says(text: str, *images: str, **options: Any) -> dict[str, Any]:
    """The body of a chat request."""
    parts = [{"type": "image_url", "image_url": {"url": url}} for url in images]
    message = {"role": "user", "content": [*parts, {"type": "text", "text": text}] if parts else text}
    return {"model": "tiny", "messages": [message], "max_tokens": 12, **options}


class Running:
    """A server in a thread: its address, its service and a way to stop it as SIGTERM does."""

    def __init__(self, engine: Engine, config: ServeConfig, keys: tuple[str, ...], page_of: Path | None = None) -> None:
        config = replace(config, max_running=engine.scheduler.max_sequences)
        self.service = Service(engine, config)
        listener = open_socket(config, keys)
        self.address = listener.getsockname()
        self.url = f"http://127.0.0.1:{self.address[1]}"
        app = create_app(self.service, config, keys=keys, page_of=page_of)
        self.server = make_server(app, self.service, config)
        self.thread = threading.Thread(target=lambda: asyncio.run(self.server.serve(sockets=[listener])), daemon=True)
        self.thread.start()
        while not self.server.started:
            self.thread.join(0.01)

    def terminate(self) -> None:
        self.server.should_exit = True


@contextmanager
def running(
    engine: Engine, config: ServeConfig = CONFIG, keys: tuple[str, ...] = (KEY,), page_of: Path | None = None
) -> Generator[Running]:
    server = Running(engine, config, keys, page_of)
    try:
        yield server
    finally:
        server.terminate()
        server.thread.join(20)
        assert not server.thread.is_alive()


def slow(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps of 30 ms or more, so that there is time to stop one."""
    step = engine.step
    monkeypatch.setattr(engine, "step", lambda: (time.sleep(0.03), step()))


def saved(uploads: Path, seed: int, name: str = "", **options: Any) -> str:
    """A picture as a file in uploads."""
    path = uploads / (name or f"{seed}.png")
    picture(seed).save(path, **options)
    return str(path)
