"""Videos are tiled as they are decoded, within a budget of pixels."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ivl.data.records import to_record
from ivl.errors import DataError, InputError, MediaError
from ivl.processing import video
from ivl.processing.chat import user
from ivl.processing.image import PixelBudget
from ivl.processing.processor import Processor
from ivl.processing.tokenizer import Tokenizer
from ivl.processing.video import load_frames
from ivl.types import ImageRef, Message, Record, Text, VideoRef
from tests.helpers.mixtures import processor
from tests.processing.test_video import NUM, seen, shade, videos  # noqa: F401, a fixture


def still(path: Path, num_frames: int, width: int, height: int, *, codec: str = "mpeg4", gop: int = 12) -> Path:
    """A video of frames of one shade each."""
    av = pytest.importorskip("av")
    with av.open(str(path), "w") as out:
        stream = out.add_stream(codec, rate=10)
        stream.width, stream.height, stream.pix_fmt, stream.gop_size = width, height, "yuv420p", gop
        for n in range(num_frames):
            frame = av.VideoFrame.from_ndarray(np.full((height * 3 // 2, width), 60 + n, np.uint8), format="yuv420p")
            frame.pts, frame.time_base = n, Fraction(1, 10)
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    return path


MEASURE = """
import resource, sys
import av
from tests.helpers.mixtures import processor
from ivl.processing.chat import user
from ivl.types import VideoRef
processor = processor()
processor.prompt((user("what?", VideoRef(sys.argv[2], num_frames=2)),))
used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
prompt = processor.prompt((user("what?", VideoRef(sys.argv[1], num_frames=6)),))
assert len(prompt.tiles_GSSC) == 6
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - used >> 10)
"""


def test_large_frames_are_tiled_one_by_one(tmp_path: Path) -> None:
    """Six frames of 4096 x 4096 are 300 MB as RGB."""
    paths = [still(tmp_path / "large.mp4", 6, 4096, 4096), still(tmp_path / "small.mp4", 6, 64, 64)]
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, *map(str, paths)], capture_output=True, text=True, check=True, timeout=100
    )
    assert int(done.stdout) < 300


def test_frames_above_the_limit_are_halved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(video, "MAX_FRAME_PIXELS", 1000)
    (frame,) = load_frames(VideoRef(str(still(tmp_path / "a.mp4", 1, 64, 50))), 1)
    assert frame.size == (32, 25)


def test_frames_are_used_as_they_are_decoded(videos: Path) -> None:  # noqa: F811
    alive, most = [], []

    def use(image: Image.Image) -> int:
        alive.append(image)
        most.append(len(alive))
        return seen([alive.pop()])[0]

    for name in ("a.mp4", "a.avi", "a.ts", "a.gif", "folder"):
        shades = load_frames(VideoRef(name), 45, root=str(videos), use=use)
        assert shades == [round((5 * n) / 5) for n in video.frame_indices(NUM, 45, "even")], name
    assert set(most) == {1} and shade(0) == 20


@pytest.mark.parametrize("name", ["a.mp4", "a.avi", "a.ts", "a.gif", "folder"])
def test_all_decoded_frames_count(videos: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    monkeypatch.setattr(video, "MIN_FRAME_PIXELS", 1)
    pixels = 64 * 48
    with pytest.raises(MediaError, match=r"max_pixels_per_request"):
        load_frames(VideoRef(name), 8, root=str(videos), budget=PixelBudget(7 * pixels))
    budget = PixelBudget(1000 * pixels)
    load_frames(VideoRef(name), 8, root=str(videos), budget=budget)
    assert 8 * pixels <= budget.limit - budget.left <= 2 * NUM * pixels


def test_a_gif_of_a_million_tiny_frames_is_refused(tmp_path: Path) -> None:
    frame = b"\x2c" + struct.pack("<HHHHB", 0, 0, 1, 1, 0) + b"\2\2\x44\1\0"
    header = b"GIF89a" + struct.pack("<HHBBB", 1, 1, 0x80, 0, 0) + b"\0\0\0\xff\xff\xff"
    path = tmp_path / "a.gif"
    path.write_bytes(header + frame * 1_000_000 + b";")
    with pytest.raises(MediaError, match=r"a\.gif: 50,000 pixels to decode, of which 0 are left"):
        load_frames(VideoRef(str(path)), 2, budget=PixelBudget(50_000 * 1000))
    path.write_bytes(header + frame * 3 + b";")
    assert len(load_frames(VideoRef(str(path)), 2)) == 2


def test_skipped_frames_are_counted_before_they_are_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = still(tmp_path / "a.mp4", 100, 64, 48, gop=1000)

    def decode(*_: object) -> None:
        raise AssertionError("decoding began")

    monkeypatch.setattr(video, "_decode_by_seeking", decode)
    with pytest.raises(MediaError, match=r"a\.mp4: \d+,\d+ pixels to decode, of which 61,440 are left"):
        load_frames(VideoRef(str(path)), 2, budget=PixelBudget(20 * 64 * 48))


def test_a_request_has_one_budget_for_all_media(tmp_path: Path) -> None:
    short = processor()
    limited = Processor(short.config, short.tokenizer, short.tiling, max_pixels_per_request=2500)
    images = [ImageRef(Image.new("RGB", (40, 30), color)) for color in ("red", "green", "blue")]
    assert len(limited.prompt((user("what?", *images[:2]),)).tiles_GSSC)
    with pytest.raises(MediaError, match=r"the limit is 100; scale it down; all media of a request may have 2,500 pixels"):
        limited.prompt((user("what?", *images),))
    with pytest.raises(DataError, match=r"a:1: .*max_pixels_per_request") as caught:
        limited.sample(Record("1", ((user("what?", *images), Message("assistant", (Text("red"),))),), "a:1"))
    assert caught.value.kind == "undecodable_media"


def test_special_files_are_refused_by_name(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.mp4")
    os.mkfifo(tmp_path / "a.gif")
    (tmp_path / "b.mp4").symlink_to("/dev/zero")
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "folder" / "1.png")
    for name, kind in (("a.mp4", "a pipe"), ("a.gif", "a pipe"), ("b.mp4", "a device"), ("folder", "a pipe")):
        with pytest.raises(MediaError, match=f"{name}.*: is {kind}, not a regular file"):
            load_frames(VideoRef(name), 2, root=str(tmp_path))


@pytest.mark.parametrize("source", [None, 5, np.zeros(3), b"", ""])
def test_what_is_no_video_is_one_line(source: object) -> None:
    with pytest.raises(InputError, match=r"a video must be a path or bytes|empty path or no bytes"):
        load_frames(VideoRef(source), 2)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"num_frames must be in 1\.\.1,000"):
        load_frames(VideoRef("a.mp4"), 10**9)


def test_conversations_of_anything_else_are_one_line() -> None:
    mine = processor()
    for content in ((Text(None),), None):  # type: ignore[arg-type]
        with pytest.raises(InputError, match="content must be a tuple of Text, ImageRef and VideoRef"):
            Message("user", content)  # type: ignore[arg-type]
    for wrong in (None, 5, "what?", (None,)):
        with pytest.raises(InputError, match="a conversation must be Messages of Text and media"):
            mine.prompt(wrong)  # type: ignore[arg-type]
    for source in (None, np.zeros((4, 4, 3), np.uint8), b""):
        with pytest.raises(InputError, match=r"an image must be a path|no bytes"):
            mine.prompt((Message("user", (ImageRef(source), Text("what?"))),))  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"not a text that can be encoded: .*ud800"):
        mine.prompt((user("what \ud800?"),))


def test_long_texts_are_refused_before_they_are_encoded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    mine = processor()

    def encode(*_: object) -> None:
        raise AssertionError("encoding began")

    monkeypatch.setattr(Tokenizer, "encode", encode)
    answer = Message("assistant", (Text("a" * 1_000_001),))
    with pytest.raises(DataError, match=r"a:1: 1,000,003 characters, the limit is 1,000,000") as caught:
        mine.sample(Record("1", ((user("hi"), answer),), "a:1"))
    assert caught.value.kind == "too_long"
    with pytest.raises(InputError, match="characters, the limit is 1,000,000"):
        mine.prompt((user("a" * 1_000_001),))
    row = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "a " * 600_000}]}
    with pytest.raises(DataError, match="a:1: 1,200,002 characters, the limit of a row is 1,000,000") as caught:
        to_record(row, source="a:1", root=tmp_path)
    assert caught.value.kind == "too_long"


class Panic:
    """A vocabulary whose program panics, raises or is interrupted."""

    def __init__(self, backend: Any, error: BaseException) -> None:
        self.backend, self.error = backend, error

    def __getattr__(self, name: str) -> Any:
        return getattr(self.backend, name)

    def encode_batch_fast(self, *_: object, **__: object) -> None:
        raise self.error


def test_a_panic_of_the_tokenizer_is_a_bad_row_and_an_interruption_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    mine = processor()  # which other tests share
    panic = type("PanicException", (BaseException,), {})("retry limit")
    record, backend = Record("1", ((user("hi"), Message("assistant", (Text("yes"),))),), "a:1"), mine.tokenizer.backend
    monkeypatch.setattr(mine.tokenizer, "backend", Panic(backend, panic))
    with pytest.raises(DataError, match="a:1: the tokenizer fails at a text of"):
        mine.sample(record)
    for error in (KeyboardInterrupt(), SystemExit(3)):
        monkeypatch.setattr(mine.tokenizer, "backend", Panic(backend, error))
        with pytest.raises(type(error)):
            mine.sample(record)
    mine.tokenizer.backend = backend  # the tests share the processor


def test_ten_million_spaces_are_one_line() -> None:
    with pytest.raises(InputError, match="the tokenizer fails at a text of 10,000,001 characters"):
        processor().tokenizer.encode(" " * 10_000_001)
