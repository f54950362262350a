"""A server whose model lies on two processes answers, and ends with the name of a process that dies."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

from tests.helpers.engines import tiny_directory


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_a_server_ends_with_the_name_of_a_process_that_dies(tmp_path):
    command = [
        sys.executable, "-m", "ivl", "serve", str(tiny_directory(tmp_path / "model")), "--tensor-parallel", "2",
        "--device", "cpu", "--port", "0", "--max-cache-tokens", "2048",
    ]  # fmt: skip
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen(command, stderr=log, env={**os.environ, "OMP_NUM_THREADS": "1"})
    try:
        while not (found := re.search(r"http://127.0.0.1:\d+/v1", (tmp_path / "log").read_text())):
            assert server.poll() is None, (tmp_path / "log").read_text()
            time.sleep(0.05)
        body = {"messages": [{"role": "user", "content": "red?"}], "max_tokens": 5}
        request = urllib.request.Request(
            f"{found[0]}/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=60) as reply:
            assert json.load(reply)["usage"]["completion_tokens"] > 0
        [follower] = children(server.pid)
        os.kill(follower, signal.SIGKILL)
        began = time.monotonic()
        assert server.wait(30) == 1
        print(f"ended {time.monotonic() - began:.1f} s after its rank")
        words = (tmp_path / "log").read_text()
        assert f"ivl serve: rank 1 (process {follower}) was ended by signal 9" in words, words
    finally:
        server.kill()
