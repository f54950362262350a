"""Random requests after the server's own OpenAPI document (schemathesis): no answer may be 5xx, none may hang.

    python -m benchmarks.serve_fuzz --cases 10000
    python -m benchmarks.serve_fuzz --cases 0 --hostile 2000

The second sends bodies of up to 10 MB that are made to cost time or memory, and measures both. A tiny random model in this
process answers, so that the figure is about the server. Half of the cases of the first fit the document, half
break it somewhere; a third carry a known picture where the generator put some string, so that they reach the engine.
"""

from __future__ import annotations

import collections
import json
import math
import multiprocessing
import random
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import hypothesis
import hypothesis.errors
import psutil
import schemathesis
import tyro
from hypothesis import strategies as st
from schemathesis import GenerationMode

from ivl.utils.progress import counting
from tests.helpers.hostile import KINDS, LoopClock, post
from tests.helpers.servers import KEY, Running, data_url, engine, running

HEADERS = {"Authorization": f"Bearer {KEY}"}
SLOW = 20.0
"""Seconds after which an answer counts as a hang."""


@dataclass
class Outcome:
    statuses: collections.Counter[tuple[str, int]]
    failures: list[str]
    slowest: float


def fuzz(url: str, cases: int, *, seed: int = 0, say: Any = lambda: None) -> Outcome:
    """Send so many cases, spread evenly over the routes."""
    document = httpx.get(f"{url}/openapi.json", headers=HEADERS).json()
    schema = schemathesis.openapi.from_dict(document)
    operations = [each.ok() for each in schema.get_all_operations()]
    heavy = [each for each in operations if each.method.upper() == "POST"]
    every = [(each, mode) for each in operations for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE)]
    shares = {(each.label, mode): (8 if each in heavy else 1) for each, mode in every}
    unit = cases / sum(shares.values())
    out = Outcome(collections.Counter(), [], 0.0)
    with httpx.Client(base_url=url, headers=HEADERS, timeout=SLOW) as client:
        for operation, mode in every:
            count = round(unit * shares[operation.label, mode])
            try:
                strategy = operation.as_strategy(generation_mode=mode)
                _send(client, strategy, max(1, count), seed, out, say)
            except hypothesis.errors.Unsatisfiable:
                continue  # nothing about the route can be wrong
            except schemathesis.errors.SchemathesisError:
                continue
    return out


@dataclass
class Flood:
    statuses: collections.Counter[tuple[str, int]]
    failures: list[str]
    slowest: float
    gap: float
    """Longest time for which the event loop stood still."""
    megabytes: float
    """Memory of the process above that before the first body."""


def flood(server: Running, count: int, *, seed: int = 0, largest: int = 10_000_000, say: Any = lambda: None) -> Flood:
    """Send so many hostile bodies of up to `largest` bytes one after another. Only 200 and 4xx are right.

    A process of its own makes and sends them, so that the memory measured is the server's alone.
    """
    rng, process = random.Random(seed), psutil.Process()
    with ProcessPoolExecutor(1, multiprocessing.get_context("fork")) as client:
        attack = partial(client.submit, _attack, server.address)
        for name in KINDS:  # what is allocated once
            attack(name, 10_000, rng.random(), 0).result()
        attack("URLs", 3_000, 0.0, 0).result()  # the model's buffers for ten pictures
        idle, out = process.memory_info().rss, Flood(collections.Counter(), [], 0.0, 0.0, 0.0)
        for _ in range(count):
            name, size = rng.choice(list(KINDS)), int(10 ** rng.uniform(2, math.log10(largest)))
            started = time.perf_counter()
            with LoopClock(server) as clock:
                status, answer = attack(name, size, rng.random(), rng.choice([0, 0, 0, 100, 5000])).result()
            out.gap, out.slowest = max(out.gap, clock.longest), max(out.slowest, time.perf_counter() - started)
            out.megabytes = max(out.megabytes, (process.memory_info().rss - idle) / 1e6)
            out.statuses[name, status] += 1
            if status != 200 and not 400 <= status < 500:
                out.failures.append(f"{name}, {size} bytes: {status} {answer[:200]!r}")
            say()
    return out


def _attack(address: tuple[Any, ...], kind: str, size: int, seed: float, chunk: int) -> tuple[int, bytes]:
    """Send one body from the client's process."""
    server: Any = SimpleNamespace(address=address)
    return post(server, *KINDS[kind](size, random.Random(seed)), chunk=chunk)


def _send(client: httpx.Client, strategy: Any, count: int, seed: int, out: Outcome, say: Any) -> None:
    settings = hypothesis.settings(
        max_examples=count, deadline=None, database=None, phases=[hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck), derandomize=False,
    )  # fmt: skip

    @hypothesis.seed(seed)
    @settings
    @hypothesis.given(case=strategy, picture=st.integers(0, 2))
    def one(case: Any, picture: int) -> None:
        body = _with_picture(case.body) if picture == 0 else case.body
        known = isinstance(body, dict | list | str | int | float | bool | type(None))
        content = json.dumps(body).encode() if known else None
        headers = {k: v for k, v in (case.headers or {}).items() if _sendable(k) and _sendable(v)}
        path = case.formatted_path
        if case.method.upper() == "POST":
            headers = {"Content-Type": "application/json", **headers, **HEADERS}
        else:
            headers, content = {**headers, **HEADERS}, None
        started = time.perf_counter()
        label = f"{case.method} {case.operation.path}"
        try:
            response = client.request(case.method, path, content=content, headers=headers, params=_query(case.query))
        except httpx.TimeoutException:
            out.failures.append(f"{label}: no answer within {SLOW} s: {str(body)[:300]}")
            return
        except (httpx.InvalidURL, httpx.LocalProtocolError, UnicodeError):
            return  # this client would not send it
        out.slowest = max(out.slowest, time.perf_counter() - started)
        out.statuses[label, response.status_code] += 1
        if response.status_code >= 500:
            out.failures.append(f"{label}: {response.status_code} {response.text[:200]} for {str(content)[:500]}")
        elif (
            response.status_code >= 400 and case.method != "HEAD" and response.headers.get("content-type") == "application/json"
        ):
            assert set(response.json()["error"]) == {"message", "type", "param", "code"}
        say()

    one()


def _query(query: Any) -> Any:
    return query if isinstance(query, dict) else None


def _sendable(text: Any) -> bool:
    return isinstance(text, str) and text.isascii() and text.isprintable()


def _with_picture(body: Any) -> Any:
    """The same body with short replies, and real pictures at its image places."""
    if isinstance(body, dict):
        changed = {key: _with_picture(value) for key, value in body.items()}
        if "url" in changed:
            changed["url"] = data_url(1)
        if "messages" in changed or "prompt" in changed:
            changed["model"] = "tiny"
        return changed
    return [_with_picture(value) for value in body] if isinstance(body, list) else body


def main(cases: int = 10_000, hostile: int = 0, seed: int = 0) -> None:
    """Fuzz a tiny server.

    Args:
        cases: Requests to send.
        hostile: Hostile bodies to send.
        seed: What they are drawn from.
    """
    with tempfile.TemporaryDirectory() as folder, running(engine(Path(folder))) as server:
        started = time.perf_counter()
        with counting() as bar:
            task = bar.add_task("hostile bodies", total=hostile, note="")
            bodies = flood(server, hostile, seed=seed, say=lambda: bar.advance(task)) if hostile else None
        with counting() as bar:
            task = bar.add_task("cases", total=cases, note="")
            out = fuzz(server.url, cases, seed=seed, say=lambda: bar.advance(task))
        seconds = time.perf_counter() - started
        alive = httpx.get(f"{server.url}/ready", headers=HEADERS).status_code == 200 and server.service.num_open == 0
    if bodies is not None:
        for (label, status), count in sorted(bodies.statuses.items()):
            print(f"{count:6}  {status}  {label}")
        print(f"slowest {bodies.slowest:.2f} s, event loop still for {bodies.gap:.3f} s, {bodies.megabytes:.0f} MB above idle")
        out.failures += bodies.failures
    for (label, status), count in sorted(out.statuses.items()):
        print(f"{count:6}  {status}  {label}")
    print(
        f"{sum(out.statuses.values())} answers in {seconds:.0f} s, slowest {out.slowest:.2f} s; idle and ready after: {alive}"
    )
    print("\n".join(out.failures[:20]) or "no answer was 5xx, none hung")
    if out.failures or not alive:
        sys.exit(1)


if __name__ == "__main__":
    tyro.cli(main)
