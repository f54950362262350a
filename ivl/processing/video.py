"""Videos as frames: the choice of frames, and how they are read.

Training takes one random frame of each interval of the video, inference takes evenly spaced ones, as InternVL's release does.
"""

from __future__ import annotations

import io
import os
import random
import re
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice, pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from ivl.errors import InputError, MediaError
from ivl.processing.image import PixelBudget, check_size, check_source, load_image
from ivl.types import ImageRef, VideoRef
from ivl.utils.budgets import MAX_FRAME_PIXELS, MAX_PIXELS, MAX_TILES, MIN_FRAME_PIXELS
from ivl.utils.files import regular
from ivl.utils.pictures import problem_of, to_rgb

Use = Callable[[Image.Image], Any]
"""What becomes of a frame."""

FrameMode = Literal["even", "rand", "middle", "fps"]
"""even: spread over the whole video (inference). rand, middle: one frame of each of num_frames intervals. fps: a fixed rate."""
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")

OPEN = {
    "format_whitelist": "mov,matroska,webm,avi,mpegts,mpeg,mpegvideo,m4v,h264,hevc,flv,asf,ogg,gif",
    "protocol_whitelist": "file",
}
"""Containers that hold their own pictures: a playlist named .mp4 must not make FFmpeg open the files that it lists."""


def load_frames(
    ref: VideoRef,
    num_frames: int,
    *,
    mode: FrameMode = "even",
    fps: float = 1.0,
    generator: random.Random | None = None,
    root: str = "",
    max_pixels: int = MAX_PIXELS,
    budget: PixelBudget | None = None,
    use: Use = lambda frame: frame,
) -> list[Any]:
    """Read RGB frames in order: num_frames of them, or for mode "fps" at most as many.

    Each frame is handed to `use` as soon as it is decoded, and only what that returns is kept. A frame of a container that has
    more than MAX_FRAME_PIXELS is halved first. A folder gives its images sorted by the last number in their names, a GIF its
    frames, and anything else is decoded with PyAV (the `video` extra). ref.clip keeps the frames that are shown between its two
    times. A video that is too short repeats its last frame; in the modes of training, a folder or a GIF shows each frame once.

    Raises:
        MediaError: naming the file, if it cannot be read, has no frame inside the clip, has frames above max_pixels, or more
            pixels to decode than the budget has left.
    """

    def choose(starts: Sequence[float], rate: float) -> list[int]:
        if ref.frames_by == "time" and starts[-1] > starts[0]:  # Matroska's header may give the rate of the densest part
            rate = (len(starts) - 1) / (starts[-1] - starts[0])
        picked = frame_indices(len(starts), num_frames, mode, rate=rate, fps=fps, generator=generator)
        if mode in ("rand", "middle") and not is_container:
            picked = picked[: len(starts)]
        return _over_time(picked, starts) if ref.frames_by == "time" else picked

    check_source(ref)
    if not 1 <= num_frames <= MAX_TILES:
        raise InputError(f"num_frames must be in 1..{MAX_TILES:,}, got {num_frames}")
    source = ref.source if isinstance(ref.source, bytes) else Path(root) / ref.source
    is_gif = source.startswith(b"GIF8") if isinstance(source, bytes) else source.suffix.lower() == ".gif"
    is_container = not is_gif and (isinstance(source, bytes) or not os.path.isdir(source))  # noqa: PTH112, never raises
    file = _VideoFile(source, ref.clip, max_pixels, choose, budget or PixelBudget(), use)
    try:
        if isinstance(source, Path):
            regular(source)
    except InputError as error:
        raise MediaError("undecodable_media", str(error)) from None
    except (OSError, ValueError):  # ValueError: a null byte in the name
        raise MediaError("missing_media", f"{source}: no such video") from None
    if isinstance(source, Path) and source.is_dir():
        if ref.clip is not None or mode == "fps":
            raise file.error("a folder of frames has no time axis; a clip or a frame rate needs a video file")
        return file.read_folder(source)
    return file.read_container() if is_container else file.read_gif()


def frame_indices(
    total: int, num_frames: int, mode: FrameMode, *, rate: float = 0.0, fps: float = 1.0, generator: random.Random | None = None
) -> list[int]:
    """Choose num_frames of `total` frames. rate is the video's frames a second, needed for mode "fps"."""
    if total < 1 or num_frames < 1:
        raise ValueError(f"need at least one frame, got {num_frames} of {total}")
    if mode == "even":
        step = (total - 1) / num_frames
        return [int(step / 2 + np.round(step * k)) for k in range(num_frames)]
    if mode == "fps":
        times = np.arange(0.5 / fps, (total / rate) + 0.5 / fps, 1 / fps)
        picked = [int(i) for i in np.around(times * rate) if i < total]
        return picked[:num_frames] or [total // 2]  # shorter than half a gap
    taken = min(num_frames, total)
    bounds = np.linspace(0, total, taken + 1).astype(int).tolist()
    intervals = list(pairwise(bounds))
    if mode == "middle":
        picked = [(first + end - 1) // 2 for first, end in intervals]
    elif generator is None:
        raise ValueError('mode "rand" needs a generator')
    elif all(end - first > 1 for first, end in intervals):
        picked = [generator.randrange(first, end - 1) for first, end in intervals]
    else:
        picked = sorted(generator.sample(range(total), taken))
    return picked + [picked[-1]] * (num_frames - taken)


def _over_time(picked: list[int], starts: Sequence[float]) -> list[int]:
    """Replace each chosen frame by the one nearest to the time that its number would have at a constant rate."""
    gap, starts_N = (starts[-1] - starts[0]) / max(1, len(starts) - 1), np.asarray(starts)
    return [int(np.abs(starts_N - (starts[0] + gap * n)).argmin()) for n in picked] if gap else picked


@dataclass(frozen=True)
class _VideoFile:
    """A video by path or in memory, and which of its frames are wanted."""

    source: Path | bytes
    clip: tuple[float, float] | None
    max_pixels: int
    choose: Callable[[Sequence[float], float], list[int]]
    """Picks frames, given when each starts and their rate a second."""
    budget: PixelBudget
    use: Use

    def error(self, problem: str | Exception) -> MediaError:
        """The error for a problem, or for the error of a library.

        The name of a video in memory says nothing about its owner, and a library's words about it are kept back.
        """
        if isinstance(problem, MediaError):
            return problem
        if isinstance(problem, Exception):
            with io.BytesIO(self.source) if isinstance(self.source, bytes) else self.source.open("rb") as file:
                problem = problem_of(problem, file.read(512), "video", quote=not isinstance(self.source, bytes))
        return MediaError("undecodable_media", f"{self.name}: {problem}")

    @property
    def name(self) -> str:
        return f"video of {len(self.source)} bytes" if isinstance(self.source, bytes) else str(self.source)

    def open(self) -> str | io.BytesIO:
        """The video as Pillow and PyAV take it."""
        return io.BytesIO(self.source) if isinstance(self.source, bytes) else str(self.source)

    def pick(self, starts: Sequence[float], rate: float) -> list[int]:
        """Choose among the frames that start within the clip, or among all without one."""
        first, last = self.clip or (0.0, float("inf"))
        frames = [n for n, start in enumerate(starts) if first - 1e-6 <= start <= last + 1e-6]
        if not frames:
            raise self.error(f"no frame between {first} s and {last} s; it lasts {starts[-1]:.3f} s")
        return [frames[i] for i in self.choose([starts[n] for n in frames], rate)]

    def bounded(self, container: Any) -> Any:
        """The video stream, with max_pixels set for its decoder, too: a picture may be larger than the container says."""
        stream = container.streams.video[0]
        stream.codec_context.options = {"max_pixels": str(self.max_pixels)}
        return stream

    def read_folder(self, folder: Path) -> list[Image.Image]:
        files = [file for file in folder.iterdir() if file.suffix.lower() in SUFFIXES]
        if not files:
            raise self.error(f"no frames here; expected files ending in {', '.join(SUFFIXES)}")
        if unnumbered := [file.name for file in files if not re.search(r"\d", file.stem)]:
            raise self.error(f"the name of a frame must hold its number, got {unnumbered[0]}")
        files.sort(key=lambda file: (int(re.findall(r"\d+", file.stem)[-1]), file.name))
        picked = self.choose(range(len(files)), 0.0)
        wanted = {i: ImageRef(str(files[i])) for i in sorted(set(picked))}
        frames = {i: self.use(self.budget.load(load_image, ref, "", self.max_pixels)) for i, ref in wanted.items()}
        return [frames[i] for i in picked]

    def read_gif(self) -> list[Any]:
        try:
            with Image.open(self.open(), formats=["GIF"]) as gif:
                check_size(gif.size, self.name, self.max_pixels)
                now, starts = 0, list[float]()
                with suppress(EOFError):  # behind the last frame
                    while True:
                        self.budget.spend(max(MIN_FRAME_PIXELS, gif.width * gif.height), self.name)
                        gif.seek(len(starts))
                        starts.append(now / 1000)
                        now += gif.info.get("duration", 100)
                picked = self.pick(starts, 1000 * len(starts) / now if now else 10.0)
                frames = {}
                for n in sorted(set(picked)):
                    gif.seek(n)
                    frames[n] = self.use(to_rgb(gif.copy()))
                return [frames[n] for n in picked]
        except Exception as error:  # Pillow's readers raise whatever their parsing meets
            raise self.error(error) from error

    def read_container(self) -> list[Any]:
        try:
            import av
            from av.error import FFmpegError
        except ImportError as error:
            raise self.error("reading video needs PyAV: pip install 'ivl[video]'") from error

        def open_container() -> Any:
            return av.open(self.open(), options=OPEN)

        try:
            with open_container() as container:
                if not container.streams.video:
                    raise self.error("no video stream in this file" if container.streams else ValueError("no streams"))
                stream = container.streams.video[0]
                size = stream.width, stream.height
                check_size(size, self.name, self.max_pixels)
                times, keys = _timestamps(container, stream)
                if not times:
                    raise self.error("no frames in this file; it is damaged, or cut short")
                base, rate = float(stream.time_base or 1), float(stream.average_rate or 0)
            seconds = [(time - times[0]) * base for time in times]
            picked = self.pick(seconds, rate or len(times) / max(seconds[-1], 1e-9))
            frames: dict[int, Any] = {}
            if keys:
                self.budget.spend(_num_decoded(times, sorted(set(picked)), keys) * size[0] * size[1], self.name)
                with open_container() as container:
                    for n, frame in _decode_by_seeking(self.bounded(container), container, times, sorted(set(picked)), keys):
                        frames[n] = self.use(_upright(frame))
            if any(n not in frames for n in picked):  # formats without exact time stamps or exact seeking: AVI, MPEG-TS
                self.budget.spend((max(picked) + 1) * size[0] * size[1], self.name)
                with open_container() as container:
                    decoded = enumerate(_decode(container, self.bounded(container)))
                    for n, frame in islice(decoded, max(picked) + 1):
                        if n in picked:
                            frames[n] = self.use(_upright(frame))
            if missing := [n for n in picked if n not in frames]:
                raise self.error(f"the frame at {seconds[missing[0]]:.3f} s cannot be decoded")
            return [frames[n] for n in picked]
        except (FFmpegError, OSError, ValueError) as error:
            raise self.error(error) from error


def _timestamps(container: Any, stream: Any) -> tuple[list[int], list[int]]:
    """Times of all frames in the order they are shown, and of key frames, in units of the stream; nothing is decoded.

    If a frame lacks the time at which it is shown, decoding times replace all, and there are no key frames: no seeking.
    """
    packets = [packet for packet in container.demux(stream) if packet.size and not packet.is_discard]
    while packets and packets[-1].is_corrupt:  # the end of the file cuts through it
        packets.pop()
    if all(packet.pts is not None for packet in packets):
        return sorted(packet.pts for packet in packets), sorted(p.pts for p in packets if p.is_keyframe)
    return sorted(packet.dts or 0 for packet in packets), []


def _decode(container: Any, stream: Any) -> Iterator[Any]:
    """Decode all frames but those that the end of the file cuts through."""
    for packet in container.demux(stream):
        try:
            yield from packet.decode()
        except ValueError:  # FFmpeg's error for invalid data is one
            if not packet.is_corrupt:
                raise


def _num_decoded(times: Sequence[int], wanted: Sequence[int], keys: Sequence[int]) -> int:
    """How many frames are decoded for the wanted ones, from the last key frame before each."""
    total, done = 0, -1
    for n in wanted:
        key = keys[max(0, bisect_right(keys, times[n]) - 1)]
        first = max(done + 1, bisect_left(times, key))
        total, done = total + max(0, n + 1 - first), n
    return total


def _decode_by_seeking(
    stream: Any, container: Any, times: Sequence[int], wanted: Sequence[int], keys: Sequence[int]
) -> Iterator[tuple[int, Any]]:
    """Decode the wanted frames, seeking to the last key frame before each where that saves decoding."""
    frames: Iterator[Any] = iter(())
    at: int | None = None
    for n in wanted:
        target = times[n]
        start = keys[max(0, bisect_right(keys, target) - 1)]
        if at is None or start > at:
            container.seek(start, stream=stream, backward=True)
            frames = _decode(container, stream)
        for frame in islice(frames, len(times)):
            at = frame.pts
            if at is not None and at >= target:
                if at == target:
                    yield n, frame
                break


def _upright(frame: Any) -> Image.Image:
    """The frame as players show it, rotated as the container says, and halved until it has at most MAX_FRAME_PIXELS."""
    width, height = frame.width, frame.height
    while width * height > MAX_FRAME_PIXELS:
        width, height = -(-width // 2), -(-height // 2)
    halved = {} if width == frame.width else {"width": width, "height": height, "interpolation": "AREA"}
    image = frame.to_image(**halved)
    return image.rotate(frame.rotation, expand=True) if frame.rotation else image
