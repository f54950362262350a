"""`ivl serve` as a process: signals under load, restarts, refusals to start."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.helpers.engines import tiny_directory
from tests.helpers.servers import KEY, data_url, says

HEADERS = {"Authorization": f"Bearer {KEY}"}
CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_directory(tmp_path_factory.mktemp("model"))


def start(directory: Path, *options: str, keys: str = KEY) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "ivl", "serve", str(directory), *options]
    env = {**os.environ, "IVL_API_KEYS": keys, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=env)


@contextmanager
def process(directory: Path, *options: str) -> Generator[tuple[subprocess.Popen[str], str, list[dict[str, Any]]]]:
    """A running server, its address, and what it logs."""
    server = start(directory, "--names", "tiny", "--port", "0", *options)
    assert server.stderr is not None
    lines: list[dict[str, Any]] = []
    try:
        while not lines or lines[-1]["event"] != "listening":
            lines.append(json.loads(server.stderr.readline()))
        reader = threading.Thread(target=lambda: lines.extend(json.loads(line) for line in server.stderr or ()), daemon=True)
        reader.start()
        yield server, lines[-1]["address"], lines
    finally:
        server.kill()
        server.wait()


def ask(address: str, number: int, stream: bool) -> str:
    """What became of a request: "whole", "error" (well formed), "refused" (never accepted), else what was wrong."""
    body = says(f"what {number}?", data_url(number), max_tokens=500, ignore_eos=True, stream=stream, temperature=1.0)
    try:
        reply = httpx.post(address + CHAT, json=body, headers=HEADERS, timeout=30)
    except (httpx.ConnectError, httpx.ReadError) as error:
        return "refused" if isinstance(error, httpx.ConnectError) else f"reset: {error!r}"
    if reply.status_code != 200:
        return "error" if set(reply.json()["error"]) == {"message", "type", "param", "code"} else reply.text
    if not stream:
        return "whole" if reply.json()["choices"][0]["finish_reason"] else reply.text
    events = [line[6:] for line in reply.text.split("\n\n") if line.startswith("data: ")]
    if events[-1] != "[DONE]":
        return f"cut: {events[-1]}"
    last = json.loads(events[-2])
    return "error" if "error" in last else "whole" if last["choices"][0]["finish_reason"] else f"cut: {last}"


@pytest.mark.parametrize("seconds", ["0.3", "30"])
def test_sigterm_under_load(directory: Path, seconds: str) -> None:
    with process(directory, "--shutdown-timeout", seconds, "--max-running", "4") as (server, address, lines):
        outcomes: list[str] = []
        threads = [threading.Thread(target=lambda n=n: outcomes.append(ask(address, n, n % 2 == 0))) for n in range(16)]
        for thread in threads:
            thread.start()
        for _ in range(100):
            if "ivl_replies_open 16.0" in httpx.get(f"{address}/metrics", headers=HEADERS).text:
                break
            time.sleep(0.02)
        else:
            raise AssertionError("the load never came")
        server.send_signal(signal.SIGTERM)
        for thread in threads:
            thread.join()
        server.wait(10)
        assert len(outcomes) == 16 and set(outcomes) <= {"whole", "error"}, outcomes
        problems = [line for line in lines if line["level"] == "error" or line.get("status", 200) != 200]
        assert ("error" in outcomes) == (seconds == "0.3"), problems
        assert server.returncode == -signal.SIGTERM


def test_after_kill_9_it_is_ready_again(directory: Path) -> None:
    with process(directory) as (server, address, lines):
        port = address.rpartition(":")[2]
        assert httpx.get(f"{address}/ready", headers=HEADERS).status_code == 200
        threading.Thread(target=ask, args=(address, 1, True), daemon=True).start()
        server.kill()
        server.wait()
        started = time.monotonic()
        with process(directory, "--port", port) as (_, address, lines):
            assert httpx.get(f"{address}/ready", headers=HEADERS).status_code == 200
            load = next(line["seconds"] for line in lines if line["event"] == "loaded")
            assert time.monotonic() - started < load + 15  # the interpreter's own start included, on a busy machine
            assert ask(address, 1, False) == "whole"


@pytest.mark.parametrize(
    ("options", "keys", "words"),
    [
        (("--host", "0.0.0.0"), "", "set IVL_API_KEYS"),
        (("--host", "::"), "", "set IVL_API_KEYS"),
        ((), "short", "a key needs 16"),
        (("--key-file", "none"), "", "cannot read the keys"),
        (("--max-queue", "-1"), "", "max_queue must be at least 0"),
        (("--port", "{taken}"), "", "cannot listen on"),
    ],
)
def test_it_refuses_to_start(
    directory: Path, capsys: Any, monkeypatch: Any, options: tuple[str, ...], keys: str, words: str
) -> None:
    from ivl.cli import main

    monkeypatch.setenv("IVL_API_KEYS", keys)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        options = tuple(option.format(taken=taken.getsockname()[1]) for option in options)
        monkeypatch.setattr(sys, "argv", ["ivl", "serve", str(directory), *options])
        with pytest.raises(SystemExit) as stop:
            main()
    assert stop.value.code == 1 and words in capsys.readouterr().err
