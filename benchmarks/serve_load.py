"""A crowd before the server: 100 clients that ask about 0 to 3 pictures, a third of them leaving before the answer.

    python -m benchmarks.serve_load --minutes 10
    python -m benchmarks.serve_load --minutes 1 --peer

Nano with random float32 weights, prompts of 20 to 400 text tokens, replies of 32 tokens, half of them streamed. Every answer is
compared with what the engine says to that question alone. --peer puts the same crowd before `transformers serve` on the same
weights. Both servers run in a process of their own; the crowd shares the machine with them.
"""

from __future__ import annotations

import asyncio
import base64
import io
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import torch
import tyro
from PIL import Image

import ivl
from ivl.checkpoint import save_model, save_processor
from ivl.model.vlm import VLM
from ivl.processing.chat import user
from ivl.processing.processor import Processor
from ivl.processing.tokenizer import Tokenizer, train_tokenizer
from ivl.recipes.nano import architecture
from ivl.types import ImageRef, SamplingParams
from tests.helpers.engines import enliven

NEW_TOKENS = 32
NUM_QUESTIONS = 200
PATIENCE = 0.5
"""Seconds within which those leave who leave."""
ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Question:
    text: str
    pictures: tuple[bytes, ...]

    def body(self, model: str, *, stream: bool) -> dict[str, Any]:
        urls = [f"data:image/png;base64,{base64.b64encode(data).decode()}" for data in self.pictures]
        parts: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
        content = [*parts, {"type": "text", "text": self.text}]
        message = {"role": "user", "content": content}
        return {"model": model, "messages": [message], "max_tokens": NEW_TOKENS, "temperature": 0.0, "stream": stream}


@dataclass
class Tally:
    seconds: float = 0.0
    latencies: list[float] = field(default_factory=list)
    statuses: Counter[str] = field(default_factory=Counter)
    said: list[tuple[int, str]] = field(default_factory=list)
    memory: list[tuple[float, float]] = field(default_factory=list)
    """Seconds since the start, MB resident."""


def make_model(folder: Path) -> Tokenizer:
    """Nano with random, lively weights and a vocabulary of this repository's docs."""
    texts = [path.read_text() for path in sorted((ROOT / "docs").glob("*.md"))]
    config = architecture()
    tokenizer = train_tokenizer([line for text in texts for line in text.splitlines()], config.decoder.vocab_size)
    torch.manual_seed(0)
    model = VLM(config).eval()
    model.init_weights()
    enliven(model)
    save_model(model, folder)
    save_processor(Processor(config, tokenizer), folder)
    return tokenizer


def questions(tokenizer: Tokenizer, seed: int = 0) -> list[Question]:
    rng, noise = random.Random(seed), np.random.default_rng(seed)
    words = tokenizer.encode((ROOT / "docs" / "architecture.md").read_text())
    pictures = []
    for _ in range(24):
        small = noise.integers(0, 256, (rng.randint(2, 9), rng.randint(2, 9), 3), np.uint8)
        out = io.BytesIO()
        Image.fromarray(small).resize((rng.randint(40, 200), rng.randint(40, 200)), Image.Resampling.NEAREST).save(out, "PNG")
        pictures.append(out.getvalue())
    found = []
    for _ in range(NUM_QUESTIONS):
        at = rng.randrange(len(words) - 400)
        text = tokenizer.decode(words[at : at + rng.randint(20, 400)]).replace("�", "").replace("<", "(").strip()
        found.append(Question(text, tuple(rng.sample(pictures, rng.randint(0, 3)))))
    return found


async def crowd(url: str, model: str, asked: list[Question], clients: int, seconds: float, leave: float, pid: int) -> Tally:
    """So many clients, each asking one question after another."""
    tally, start = Tally(), time.perf_counter()

    async def client(number: int) -> None:
        rng = random.Random(number)
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=300)) as session:
            while time.perf_counter() - start < seconds:
                index, stream = rng.randrange(len(asked)), rng.random() < 0.5
                patience = rng.uniform(0, PATIENCE) if rng.random() < leave else None
                began = time.perf_counter()
                try:
                    async with asyncio.timeout(patience):
                        status, text = await ask(session, url, asked[index].body(model, stream=stream), stream)
                except TimeoutError:
                    tally.statuses["left"] += 1
                    continue
                except aiohttp.ClientError as error:
                    tally.statuses[type(error).__name__] += 1
                    await asyncio.sleep(0.2)
                    continue
                tally.statuses[str(status)] += 1
                if status == 200:
                    tally.latencies.append(time.perf_counter() - began)
                    tally.said.append((index, text))
                else:
                    await asyncio.sleep(0.2)

    async def watch() -> None:
        while time.perf_counter() - start < seconds:
            tally.memory.append((time.perf_counter() - start, resident_mb(pid)))
            await asyncio.sleep(1.0)

    await asyncio.gather(watch(), *(client(number) for number in range(clients)))
    tally.seconds = time.perf_counter() - start
    return tally


async def ask(session: aiohttp.ClientSession, url: str, body: dict[str, Any], stream: bool) -> tuple[int, str]:
    async with session.post(f"{url}/v1/chat/completions", json=body) as response:
        if response.status != 200:
            await response.read()
            return response.status, ""
        if not stream:
            return 200, (await response.json())["choices"][0]["message"]["content"]
        text, done = "", False
        async for line in response.content:
            if line.startswith(b"data: {"):
                event = json.loads(line[6:])
                if "error" in event:
                    return 500, ""
                for choice in event["choices"]:
                    text += choice.get("delta", {}).get("content") or ""
                    done = done or choice.get("finish_reason") is not None
        return (200 if done else 599), text


def resident_mb(pid: int) -> float:
    line = next(line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) / 1024


def serve(command: list[str], url: str, log: Path, path: str = "") -> subprocess.Popen[bytes]:
    """A server that answers, once it does."""
    env = {**os.environ, "TRANSFORMERS_VERBOSITY": "error"} | ({"PYTHONPATH": path} if path else {})
    with log.open("wb") as out:
        server = subprocess.Popen(command, stdout=out, stderr=out, env=env)
    import urllib.request

    for _ in range(600):
        time.sleep(0.2)
        if server.poll() is not None:
            sys.exit(f"the server ended: {log.read_text()[-2000:]}")
        try:
            urllib.request.urlopen(f"{url}/health", timeout=5)
            return server
        except OSError:
            continue
    sys.exit("the server did not start")


def report(name: str, tally: Tally) -> float:
    """Prints the figures; returns answers per second."""
    rate = len(tally.latencies) / tally.seconds
    p50, p95 = (statistics.quantiles(tally.latencies, n=20)[at] for at in (9, 18)) if len(tally.latencies) > 1 else (0, 0)
    print(f"{name}: {len(tally.latencies)} answers in {tally.seconds:.0f} s = {rate:.2f}/s, p50 {p50:.2f} s, p95 {p95:.2f} s")
    print(f"  {dict(tally.statuses)}")
    return rate


def main(
    minutes: float = 10.0, clients: int = 100, leave: float = 0.3, peer: bool = False, peer_minutes: float | None = None,
    peer_continuous_batching: bool = False, peer_path: str = "", port: int = 8437,
) -> None:  # fmt: skip
    """A crowd before `ivl serve`, and before `transformers serve`.

    Args:
        minutes: How long.
        clients: How many.
        leave: Share of questions whose client does not wait for the answer.
        peer: Ask transformers serve, too.
        peer_minutes: How long that.
        peer_continuous_batching: Give it --continuous-batching.
        peer_path: Folder of packages that only the peer needs, such as torchvision.
        port: Port of the servers; the next one is used, too.
    """
    good = True
    with tempfile.TemporaryDirectory() as folder:
        directory, url = Path(folder) / "nano", f"http://127.0.0.1:{port}"
        asked = questions(make_model(directory))
        command = [sys.executable, "-m", "ivl", "serve", str(directory), "--port", str(port), "--dtype", "float32"]
        server = serve(command, url, Path(folder) / "log")
        try:
            asyncio.run(crowd(url, "nano", asked, clients, 5, leave, server.pid))  # warm
            tally = asyncio.run(crowd(url, "nano", asked, clients, minutes * 60, leave, server.pid))
        finally:
            server.send_signal(signal.SIGTERM)
            server.wait(60)
        ours = report("ivl serve", tally)
        settled = [mb for seconds, mb in tally.memory if seconds > tally.seconds / 5]
        growth = tally.memory[-1][1] / settled[0] - 1 if settled else 0.0
        print(f"  memory {settled[0]:.0f} MB after a fifth of the time, {tally.memory[-1][1]:.0f} MB at the end: {growth:+.1%}")
        model = ivl.load(directory, dtype="float32")
        expected: dict[int, str] = {}
        for index in {index for index, _ in tally.said}:
            question = asked[index]
            asked_alone = user(question.text, *(ImageRef(data) for data in question.pictures))
            reply = model.generate([(asked_alone,)], SamplingParams(max_new_tokens=NEW_TOKENS))
            expected[index] = reply[0].text
        wrong = sum(text != expected[index] for index, text in tally.said)
        failed = sum(count for status, count in tally.statuses.items() if status not in ("200", "left", "429"))
        print(f"  {wrong} of {len(tally.said)} answers differ from the engine's own, {len(set(expected.values()))} distinct")
        print(f"  {failed} failed")
        good = wrong == failed == 0 and growth < 0.05
        if peer:
            theirs, url = Path(folder) / "theirs", f"http://127.0.0.1:{port + 1}"
            subprocess.run(
                [sys.executable, "-m", "ivl", "convert", str(directory), str(theirs), "--to", "transformers"], check=True
            )
            program = str(Path(sys.executable).with_name("transformers"))
            command = [program, "serve", str(theirs), "--port", str(port + 1), "--host", "127.0.0.1", "--device", "cpu"]
            command += ["--continuous-batching"] if peer_continuous_batching else []
            server = serve(command, url, Path(folder) / "log", peer_path)
            try:
                tally = asyncio.run(crowd(url, str(theirs), asked, clients, 60 * (peer_minutes or minutes), leave, server.pid))
            finally:
                server.kill()
                server.wait()
            rate = report("transformers serve", tally)
            same = sum(text == expected.get(index) for index, text in tally.said)
            print(f"  {same} of {len(tally.said)} answers are as ours")
            print(f"  ivl serve answers {ours / rate if rate else float('inf'):.1f}x as many")
            if not rate:
                print((Path(folder) / "log").read_text()[-3000:])
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    tyro.cli(main)
