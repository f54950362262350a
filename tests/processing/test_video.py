"""Which frames are taken, and that a real mp4, a GIF and a folder give exactly those."""

from __future__ import annotations

import random
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ivl.errors import InputError
from ivl.processing.video import frame_indices, load_frames
from ivl.types import VideoRef

NUM, RATE = 40, 10


def shade(n: int) -> int:
    return 20 + 5 * n


def frame(n: int) -> np.ndarray:
    return np.full((48, 64, 3), shade(n), dtype=np.uint8)


@pytest.fixture(scope="module")
def videos(tmp_path_factory) -> Path:
    """The same 40 grey frames at 10 a second, frame n of shade 20 + 5n: three video files, a GIF, a folder."""
    root = tmp_path_factory.mktemp("videos")
    for name in ("a.mp4", "a.avi", "a.ts"):  # exact time stamps; none; none that seeking finds
        encode(root / name)
    images = [Image.fromarray(frame(n)) for n in range(NUM)]
    images[0].save(root / "a.gif", save_all=True, append_images=images[1:], duration=1000 // RATE, loop=0)
    (root / "folder").mkdir()
    for n, image in enumerate(images):
        image.save(root / "folder" / f"clip7_frame{n}.png")  # unpadded: alphabetical order would be wrong
    return root


def encode(file: Path) -> None:
    av = pytest.importorskip("av")
    with av.open(str(file), "w") as out:
        stream = out.add_stream("mpeg4", rate=RATE)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.gop_size, stream.max_b_frames = 12, 2
        stream.bit_rate = 8_000_000
        for n in range(NUM):
            picture = av.VideoFrame.from_ndarray(frame(n), format="rgb24")
            picture.pts, picture.time_base = n, Fraction(1, RATE)
            out.mux(stream.encode(picture))
        out.mux(stream.encode(None))


def seen(images: list[Image.Image]) -> list[int]:
    """Frame numbers, read off the shades."""
    return [round((np.asarray(image).mean() - shade(0)) / 5) for image in images]


@pytest.mark.parametrize("name", ["a.mp4", "a.avi", "a.ts", "a.gif", "folder", "folder/"])
def test_all_sources_give_the_same_frames(videos, name):
    ref = VideoRef(name)
    for num_frames in (1, 8, 40, 45):
        expected = frame_indices(NUM, num_frames, "even")
        images = load_frames(ref, num_frames, root=str(videos))
        assert seen(images) == expected and images[0].size == (64, 48) and images[0].mode == "RGB"
    rand = load_frames(ref, 7, mode="rand", generator=random.Random(3), root=str(videos))
    assert seen(rand) == frame_indices(NUM, 7, "rand", generator=random.Random(3))
    assert seen(load_frames(ref, 5, mode="middle", root=str(videos))) == [3, 11, 19, 27, 35]


@pytest.mark.parametrize("name", ["a.mp4", "a.avi", "a.gif"])
def test_clip_and_rate(videos, name):
    clip = load_frames(VideoRef(name, clip=(1.0, 2.05)), 11, mode="middle", root=str(videos))
    assert seen(clip) == list(range(10, 21))
    assert seen(load_frames(VideoRef(name), 100, mode="fps", fps=2, root=str(videos))) == [2, 8, 12, 18, 22, 28, 32, 38]
    assert seen(load_frames(VideoRef(name), 3, mode="fps", fps=2, root=str(videos))) == [2, 8, 12]
    with pytest.raises(InputError, match=r"no frame between 9.0 s and 10.0 s"):
        load_frames(VideoRef(name, clip=(9.0, 10.0)), 4, root=str(videos))


def test_inference_rule():
    assert frame_indices(100, 8, "even") == [6, 18, 31, 43, 56, 68, 80, 93]
    for total in (1, 5, 33, 1000):
        for n in (1, 8, 32):
            step = (total - 1) / n
            assert frame_indices(total, n, "even") == [int(step / 2 + np.round(step * k)) for k in range(n)]


def test_training_rule():
    generator = random.Random(0)
    bounds = [0, 12, 25, 37, 50]
    for _ in range(200):
        picked = frame_indices(50, 4, "rand", generator=generator)
        assert all(low <= i <= high - 2 for i, low, high in zip(picked, bounds[:-1], bounds[1:], strict=True))
    for _ in range(50):  # an interval of one frame: a sorted random subset
        picked = frame_indices(9, 6, "rand", generator=generator)
        assert picked == sorted(set(picked)) and len(picked) == 6 and max(picked) < 9
    assert frame_indices(3, 5, "rand", generator=generator) == [0, 1, 2, 2, 2]
    assert frame_indices(3, 5, "middle") == [0, 1, 2, 2, 2]
    assert frame_indices(50, 4, "middle") == [5, 18, 30, 43]
    assert frame_indices(50, 8, "rand", generator=random.Random(5)) == frame_indices(50, 8, "rand", generator=random.Random(5))
    with pytest.raises(ValueError, match="generator"):
        frame_indices(50, 4, "rand")


def test_bad_videos_are_named(videos, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.mp4").write_bytes(b"not a video")
    (tmp_path / "text.gif").write_bytes(b"not a gif")
    whole = (videos / "a.mp4").read_bytes()
    (tmp_path / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "playlist.mp4").write_text(f"#EXTM3U\n#EXTINF:4,\n{videos / 'a.ts'}\n#EXT-X-ENDLIST\n")
    (tmp_path / "unnumbered").mkdir()
    Image.new("RGB", (2, 2)).save(tmp_path / "unnumbered" / "frame.png")
    for name in ("empty", "text.mp4", "text.gif", "cut.mp4", "gone.mp4", "unnumbered", "playlist.mp4"):
        with pytest.raises(InputError, match=name):
            load_frames(VideoRef(name), 4, root=str(tmp_path))
    with pytest.raises(InputError, match="no time axis"):
        load_frames(VideoRef("folder", clip=(0, 1)), 4, root=str(videos))
    for name in ("a.mp4", "a.gif", "folder"):
        with pytest.raises(InputError, match="limit is 3,071"):
            load_frames(VideoRef(name), 4, root=str(videos), max_pixels=64 * 48 - 1)


def test_a_turned_video_is_shown_upright(tmp_path):
    av = pytest.importorskip("av")
    image = np.zeros((48, 64, 3), dtype=np.uint8)
    image[:, :32] = 255  # the left half is white
    with av.open(str(tmp_path / "turned.mp4"), "w") as out:
        stream = out.add_stream("mpeg4", rate=RATE)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.set_display_rotation(90)  # players turn it to the left: the white half comes to lie below
        out.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        out.mux(stream.encode(None))
    (shown,) = load_frames(VideoRef("turned.mp4"), 1, root=str(tmp_path))
    assert shown.size == (48, 64)
    assert np.asarray(shown)[40:].mean() > 200 and np.asarray(shown)[:24].mean() < 50


def test_without_pyav_the_extra_is_named(videos, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(InputError, match=r"ivl\[video\]"):
        load_frames(VideoRef("a.mp4"), 4, root=str(videos))
    assert len(load_frames(VideoRef("a.gif"), 4, root=str(videos))) == 4


@pytest.mark.parametrize("mode", ["rand", "middle"])
def test_a_folder_or_gif_of_few_frames_shows_each_once_in_training(tmp_path, mode):
    images = [Image.fromarray(frame(n)) for n in range(4)]
    images[0].save(tmp_path / "a.gif", save_all=True, append_images=images[1:], duration=100)
    (tmp_path / "folder").mkdir()
    for n, image in enumerate(images):
        image.save(tmp_path / "folder" / f"{n}.png")
    for name in ("a.gif", "folder"):
        for num_frames, expected in ((8, [0, 1, 2, 3]), (4, [0, 1, 2, 3])):
            shown = load_frames(VideoRef(name), num_frames, mode=mode, generator=random.Random(1), root=str(tmp_path))
            assert seen(shown) == expected
        assert len(load_frames(VideoRef(name), 8, root=str(tmp_path))) == 8, "inference repeats frames"


def variable_rate(file: Path) -> list[float]:
    """30 frames in the first second, then 10 in ten seconds; returns when each starts."""
    av = pytest.importorskip("av")
    starts = [n / 30 for n in range(30)] + [1.0 + n for n in range(10)]
    with av.open(str(file), "w") as out:
        stream = out.add_stream("mpeg4", rate=30)
        stream.width, stream.height, stream.pix_fmt, stream.bit_rate = 64, 48, "yuv420p", 8_000_000
        stream.codec_context.time_base = Fraction(1, 30)
        for n, start in enumerate(starts):
            picture = av.VideoFrame.from_ndarray(frame(n), format="rgb24")
            picture.pts, picture.time_base = round(start * 30), Fraction(1, 30)
            out.mux(stream.encode(picture))
        out.mux(stream.encode(None))
    return starts


def test_frames_of_a_variable_rate_over_time(tmp_path):
    starts = variable_rate(tmp_path / "a.mkv")
    by_index = seen(load_frames(VideoRef("a.mkv"), 8, root=str(tmp_path)))
    assert by_index == frame_indices(40, 8, "even") and sum(starts[n] < 1 for n in by_index) == 6
    by_time = seen(load_frames(VideoRef("a.mkv", frames_by="time"), 8, root=str(tmp_path)))
    wanted = [10 / 39 * (39 / 16 + 39 / 8 * k) for k in range(8)]
    assert max(abs(starts[n] - time) for n, time in zip(by_time, wanted, strict=True)) <= 0.55
    assert sum(starts[n] < 1 for n in by_time) == 1 and by_time == sorted(by_time)
    late = load_frames(VideoRef("a.mkv", clip=(0.5, 5.5), frames_by="time"), 5, mode="middle", root=str(tmp_path))
    assert [0.5 <= starts[n] <= 5.5 for n in seen(late)] == [True] * 5 and seen(late)[1:] == [31, 32, 33, 34]
    every_second = load_frames(VideoRef("a.mkv", frames_by="time"), 40, mode="fps", fps=1, root=str(tmp_path))
    assert 10 <= len(every_second) <= 11 and sum(starts[n] < 1 for n in seen(every_second)) == 1
    with pytest.raises(InputError, match="frames_by of a video must be index or time, got 'x'"):
        load_frames(VideoRef("a.mkv", frames_by="x"), 8, root=str(tmp_path))


@pytest.mark.parametrize("name", ["a.mp4", "a.gif", "folder"])
def test_over_time_is_over_frames_at_a_constant_rate(videos, name):
    for mode in ("even", "middle", "rand"):
        over = [
            seen(load_frames(VideoRef(name, frames_by=by), n, mode=mode, generator=random.Random(n), root=str(videos)))
            for by in ("index", "time")
            for n in (1, 7, 40)
        ]
        assert over[:3] == over[3:]


@pytest.mark.parametrize("name", ["front.mp4", "a.mkv", "a.ts", "a.avi"])
def test_a_video_that_is_cut_at_its_end_is_read_as_far_as_it_goes(tmp_path, name):
    av = pytest.importorskip("av")
    with av.open(str(tmp_path / name), "w", options={"movflags": "faststart"} if name == "front.mp4" else {}) as out:
        stream = out.add_stream("mpeg4", rate=RATE)
        stream.width, stream.height, stream.pix_fmt, stream.gop_size, stream.bit_rate = 64, 48, "yuv420p", 12, 8_000_000
        noise = np.random.default_rng(0).integers(-9, 10, (NUM, 48, 64, 3))
        for n in range(NUM):
            picture = av.VideoFrame.from_ndarray((frame(n) + noise[n]).astype(np.uint8), format="rgb24")
            picture.pts, picture.time_base = n, Fraction(1, RATE)
            out.mux(stream.encode(picture))
        out.mux(stream.encode(None))
    whole = (tmp_path / name).read_bytes()
    counts = set()
    for size in range(len(whole) * 6 // 10, len(whole) * 7 // 10, len(whole) // 200):
        (tmp_path / f"cut-{name}").write_bytes(whole[:size])
        shown = seen(load_frames(VideoRef(f"cut-{name}"), NUM, mode="middle", root=str(tmp_path)))
        left = len(set(shown))
        assert len(shown) == NUM and shown[: left - 2] == list(range(left - 2))  # decoders of a .ts show half frames, too
        counts.add(left)
    assert 20 <= min(counts) < max(counts) <= 30


def test_an_mp4_without_its_index_is_named(videos, tmp_path):
    whole = (videos / "a.mp4").read_bytes()
    (tmp_path / "a.mp4").write_bytes(whole[: len(whole) - 100])
    for source, words in (
        (str(tmp_path / "a.mp4"), ""),
        (whole[: len(whole) // 2], "before the index at its end; get the file"),
    ):
        with pytest.raises(InputError, match=f"damaged, or cut short {words}".strip()):
            load_frames(VideoRef(source), 4)


@pytest.mark.parametrize("name", ["a.mp4", "a.gif"])
def test_what_is_no_video_is_named(tmp_path, name):
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 1\n"
    for content, words in (
        (pointer, "git lfs pull"),
        (b"<html></html>", "a web page"),
        (b"", "empty"),
        (b"\xff\xd8\xff\xe0", "an image; give it as one"),
        (b"RIFF\0\0\0\0WEBPVP8X", "an image; give it as one"),
        (b"\0\0\0\x14ftypisom\0\0\2\0isom" + b"\0\0\0\x08free", "damaged, or cut short before the index"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match=words):
            load_frames(VideoRef(name), 4, root=str(tmp_path))
