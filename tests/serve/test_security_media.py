"""S2 and S4: bombs are refused before decoding, in no time and memory; nothing of a library's words gets out."""

from __future__ import annotations

import asyncio
import base64
import gc
import logging
import os
import random
import re
import struct
import threading
import time
import zlib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from PIL import Image

from ivl.cpu.jpeg import FastLoader
from ivl.errors import InputError
from ivl.processing.video import load_frames
from ivl.serve.media import MediaConfig, MediaGateway, MediaRefusal
from tests.helpers import media as samples
from tests.helpers.media import data_url

ROUNDS = int(os.environ.get("IVL_FUZZ", "5000"))
"""Bad images and bad addresses; a fifth as many bad videos."""
LEAK = re.compile(r"0x[0-9a-f]|/|\\|[A-Za-z0-9+]{24}|Error|object|127\.")
"""Addresses in memory, paths, base64, names of exceptions, addresses in the network."""
EXAMPLE = re.compile(r"data:image/(png|jpeg);base64,\.\.\.")
SEEDS = samples.good()


DROPPED = {"png with 30 MB of text", "png with 30 MB of colours", "apng of 10,000 frames"}
"""Bombs in chunks that are dropped unread: the picture beside them is taken."""


@cache
def bombs() -> dict[str, bytes]:
    vp8x = struct.pack("<4sI4s4sIB3x", b"RIFF", 22, b"WEBP", b"VP8X", 10, 0) + (16_777_215).to_bytes(3, "little") * 2
    vp8l = struct.pack("<4sI4s4sIBI", b"RIFF", 17, b"WEBP", b"VP8L", 5, 0x2F, 16382 | 16382 << 14)
    text = samples.chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(30_000_000), 9))
    colours = samples.chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(30_000_000), 9))
    small = zlib.compress(bytes(10 * 3))
    jpeg = samples.encoded("JPEG")
    at = jpeg.index(b"\xff\xc0") + 5
    return {
        "png of 19000 x 19000 in 44 KB": samples.png_bomb(),
        "png of 2 G x 2 G": samples.png(2**31 - 1, 2**31 - 1),
        "png of 1 x 2 G": samples.png(1, 2**31 - 1),
        "png of 0 x 5": samples.png(0, 5),
        "png of a million chunks": samples.png(10, 10, extra=samples.chunk(b"tEXt", b"") * 1_000_000),
        "png with 30 MB of text": samples.png(10, 10, body=small, extra=text * 40),
        "png with 30 MB of colours": samples.png(10, 10, body=small, extra=colours),
        "gif of 10,000 frames": samples.gif(10_000),
        "gif of 65535 x 65535": samples.gif(1, 65535, 65535),
        "gif that grows": samples.gif(1)[:-1] + samples.gif(1, 60000, 60000)[19:],
        "gif of no frames": samples.gif(0),
        "gif of empty blocks": b"GIF89a" + struct.pack("<HHBBB", 2, 2, 0, 0, 0) + b"!\xfe\1a\0" * 1_000_000,
        "webp of 16 M x 16 M": vp8x,
        "webp of 16383 x 16383": vp8l,
        "jpeg of 65535 x 65535": jpeg[:at] + b"\xff\xff\xff\xff" + jpeg[at + 4 :],
        "jpeg of two sizes": jpeg[:2] + b"\xff\xc0\0\x0b\x08\0\x05\0\x05\1\1\x11\0" + jpeg[2:],
        "jpeg of 1,000 passes": samples.jpeg_scans(1000),
        "jpeg without a frame": b"\xff\xd8" + b"\xff\xe0\0\2" * 1_000_000,
        "apng of 10,000 frames": samples.png(2, 2, body=small, extra=samples.chunk(b"acTL", struct.pack(">II", 10_000, 0))),
        "tiff": samples.encoded("TIFF"),
        "jpeg 2000": samples.encoded("JPEG2000"),
        "jpeg 2000 stream": b"\xff\x4f\xff\x51" + bytes(100),
        "svg": b"<svg width='99999' height='99999'><image href='http://127.0.0.1/'/></svg>",
        "bytes": bytes(10_000_000),
        "one letter": b"G",
    }


def peak(reset: bool = False) -> int:
    """Most resident bytes of this process since the last reset."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) << 10


@pytest.mark.parametrize("name", bombs())
def test_s2_bombs_are_refused_in_no_time_and_memory(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under 100 ms of processor time and 50 MB, and without a decoder having started.

    Decoding the URL's base64 comes on top: its time is that of the processor, whatever the bytes are.
    """
    url = data_url(bombs()[name])
    encoded = url.partition(",")[2]

    def load(self: Image.Image) -> None:
        raise AssertionError("decoding began")

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", load)
    gateway = MediaGateway(MediaConfig(max_bytes=40 << 20))
    asyncio.run(gateway.image(data_url(SEEDS["png"])))  # what is imported once is not the bomb's
    start = time.process_time()
    base64.b64decode(encoded, validate=True)
    base64_seconds = time.process_time() - start
    measured = []
    for _ in range(3):  # threads of earlier tests may still be spinning: the least is the bomb's
        before, start = peak(reset=True), time.process_time()
        refusal = None
        try:
            asyncio.run(gateway.image(url))
        except MediaRefusal as error:
            refusal = error
        measured.append((time.process_time() - start, peak() - before))
        assert (refusal is None) == (name in DROPPED)
        assert refusal is None or (refusal.status in (400, 413) and not LEAK.search(str(refusal)))
    seconds, memory = map(min, zip(*measured, strict=True))
    assert seconds < 0.1 + base64_seconds and memory < 50 << 20, f"{seconds:.3f} s, {memory >> 20} MB"


def test_s2_a_body_shorter_or_longer_than_its_header_stays_within_it() -> None:
    """What passes the header is decoded into no more than the header says."""
    for body in (b"", b"\0", zlib.compress(b"\0\1"), zlib.compress(bytes(60_000_000), 9), b"no zlib"):
        ref = asyncio.run(MediaGateway().image(data_url(samples.png(8, 8, body=body))))
        before = peak(reset=True)
        try:
            assert FastLoader()(ref).shape == (8, 8, 3)
        except InputError as error:
            assert not LEAK.search(str(error)), error
        assert peak() - before < 20 << 20


def test_s2_a_video_whose_pictures_are_larger_than_its_header() -> None:
    data = samples.video("mjpeg", "avi", 2000, 1500, frames=2)
    lie = data.replace(struct.pack("<II", 2000, 1500), struct.pack("<II", 64, 48))
    lie = lie.replace(struct.pack("<HH", 2000, 1500), struct.pack("<HH", 64, 48))
    assert lie != data
    limits = {"max_pixels": 1_000_000}
    with pytest.raises(MediaRefusal) as caught:
        asyncio.run(MediaGateway(MediaConfig(**limits)).video(data_url(lie)))
    assert caught.value.status == 413


def test_s2_playlists_inside_a_container_open_nothing(tmp_path: Path) -> None:
    """A reference of a QuickTime file to another file stays unopened; so does what is named like a video."""
    data = samples.video(form="mov")
    where = str(tmp_path / "secret").encode()
    alias = data.replace(b"url \x00\x00\x00\x01", b"url \x00\x00\x00\x00" + where[:0], 1)
    for twisted in (alias, b"\0\0\0\x20ftypqt  " + bytes(20) + b"#EXTM3U\nfile:///etc/passwd\n"):
        try:
            ref = asyncio.run(MediaGateway().video(data_url(twisted)))
            load_frames(ref, 2)
        except InputError as error:
            assert not LEAK.search(str(error)), error


def mutated(data: bytes, rng: random.Random) -> bytes:
    """Damage of the kinds that files suffer, or that somebody thought of."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 5, 30))):
        at = rng.randrange(len(out)) if rng.random() < 0.6 else rng.randrange(min(len(out), 64))
        kind = rng.randrange(6)
        if kind == 0:
            out[at] = rng.randrange(256)
        elif kind == 1:
            out[at : at + 4] = rng.choice((b"\xff\xff\xff\xff", b"\0\0\0\0", b"\x7f\xff\xff\xff", b"\0\0\0\1"))[: len(out) - at]
        elif kind == 2:
            del out[at : at + rng.randrange(1, 40)]
        elif kind == 3:
            out[at:at] = rng.randbytes(rng.randrange(1, 40))
        elif kind == 4:
            out[at:at] = out[at : at + rng.randrange(1, 200)]
        else:
            del out[max(at, 8) :]
        if len(out) < 2:
            return bytes(out)
    if out.startswith(b"\x89PNG") and rng.random() < 0.7:  # right checksums let the damage in
        return resealed(bytes(out))
    return bytes(out)


def resealed(data: bytes) -> bytes:
    out, at = data[:8], 8
    while at + 12 <= len(data):
        length = min(int.from_bytes(data[at : at + 4], "big"), len(data) - at - 12)
        out += samples.chunk(data[at + 4 : at + 8], data[at + 8 : at + 8 + length])
        at += 12 + length
    return out


def clean(error: Exception, logged: str) -> None:
    assert isinstance(error, InputError), repr(error)
    assert getattr(error, "status", 400) in (400, 403, 413), error
    assert not LEAK.search(EXAMPLE.sub("", str(error))), error
    assert not LEAK.search(logged), logged


@pytest.fixture
def undisturbed() -> Iterator[None]:
    """Nothing that earlier tests left is destroyed meanwhile: a task that is still pending says so in the log when it is."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def test_s4_bad_images_are_clean_errors(
    undisturbed: None, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    """What a request with an image goes through before the model: in every case pixels, or a 4xx that tells nothing."""
    rng, gateway, outcomes = random.Random(0), MediaGateway(MediaConfig(max_pixels=1_000_000)), {"shown": 0, "refused": 0}
    caplog.set_level(logging.DEBUG, "PIL")
    caplog.set_level(logging.INFO)
    seeds = list(SEEDS.values())

    async def run() -> None:
        for n in range(ROUNDS):
            data = mutated(seeds[n % len(seeds)], rng)
            try:
                ref = await gateway.image(data_url(data))
                assert FastLoader()(ref, max_pixels=1_000_000).shape[2] == 3
                outcomes["shown"] += 1
            except InputError as error:
                outcomes["refused"] += 1
                clean(error, "")

    logging.getLogger("PIL").setLevel(logging.WARNING)
    asyncio.run(run())
    logged = capfd.readouterr()
    own = ("ivl-media", threading.current_thread().name)  # servers of earlier tests may still be ending in other threads
    told = [caplog.handler.format(record) for record in caplog.records if str(record.threadName).startswith(own)]
    clean(InputError(""), "\n".join(told).replace("/", "") + logged.out + logged.err)
    assert outcomes["refused"] > ROUNDS / 4, outcomes


def test_s4_bad_videos_are_clean_errors(undisturbed: None, capfd: pytest.CaptureFixture[str]) -> None:
    rng, gateway = random.Random(0), MediaGateway(MediaConfig(max_pixels=1_000_000))
    seeds = [samples.video(form=form) for form in ("mp4", "matroska", "avi")] + [SEEDS["gif moving"]]
    refused = 0

    async def run() -> None:
        nonlocal refused
        for n in range(ROUNDS // 5):
            try:
                ref = await gateway.video(data_url(mutated(seeds[n % len(seeds)], rng)), num_frames=2)
                assert len(load_frames(ref, 2, max_pixels=1_000_000)) == 2
            except InputError as error:
                refused += 1
                clean(error, "")

    asyncio.run(run())
    logged = capfd.readouterr()
    assert not logged.out + logged.err and refused


def test_s4_bad_addresses_are_clean_errors() -> None:
    rng = random.Random(0)
    config = MediaConfig(allow_remote=True, allowed_domains=("*",), timeout=1.0)
    gateways = MediaGateway(), MediaGateway(config, fetcher=_offline(config))
    seeds = [
        data_url(SEEDS["gif"]),
        "http://good.example:80/a/b.png?c=d#e",
        "https://[::1]:443/",
        "file:///etc/passwd",
        "data:,x",
    ]

    async def run() -> None:
        for n in range(ROUNDS):
            url = mutated(seeds[n % len(seeds)].encode(), rng).decode("latin1")
            for gateway in gateways:
                try:
                    await gateway.image(url)
                except InputError as error:
                    clean(error, "")

    asyncio.run(run())


def _offline(config: MediaConfig):
    from ivl.serve.fetch import Fetcher

    async def lookup(host: str, port: int) -> list[str]:
        return []

    return Fetcher(config, lookup=lookup)
