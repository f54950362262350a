"""Videos as frames: the choice of frames, and how they are read.

Training takes one random frame of each interval of the video, inference takes evenly spaced ones, as InternVL's release does.
"""

from __future__ import annotations

import io
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from ivl.errors import MediaError
from ivl.processing.image import MAX_PIXELS, load_image, to_rgb
from ivl.types import ImageRef, VideoRef

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
) -> list[Image.Image]:
    """Read RGB frames in order: num_frames of them, or for mode "fps" at most as many.

    A folder gives its images sorted by the last number in their names, a GIF its frames, and anything else is decoded with
    PyAV (the `video` extra). ref.clip keeps the frames shown from its first to its second second. A video that is too
    short repeats its last frame.

    Raises:
        MediaError: naming the file, if it cannot be read, has no frame inside the clip, or has frames above max_pixels.
    """

    def choose(total: int, rate: float) -> list[int]:
        return frame_indices(total, num_frames, mode, rate=rate, fps=fps, generator=generator)

    source = ref.source if isinstance(ref.source, bytes) else Path(root) / ref.source
    file = _VideoFile(source, ref.clip, max_pixels, choose)
    if isinstance(source, bytes):
        return file.read_gif() if source.startswith(b"GIF8") else file.read_container()
    if source.is_dir():
        if ref.clip is not None or mode == "fps":
            raise file.error("a folder of frames has no time axis; a clip or a frame rate needs a video file")
        return file.read_folder(source)
    if not source.exists():
        raise MediaError("missing_media", f"{source}: no such video")
    return file.read_gif() if source.suffix.lower() == ".gif" else file.read_container()


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


@dataclass(frozen=True)
class _VideoFile:
    """A video by path or in memory, and which of its frames are wanted."""

    source: Path | bytes
    clip: tuple[float, float] | None
    max_pixels: int
    choose: Callable[[int, float], list[int]]
    """Picks frames, given how many there are and their rate a second."""

    def error(self, problem: str | Exception) -> MediaError:
        """The error for a problem, or for the error of a library.

        The name of a video in memory says nothing about its owner, and a library's words about it are kept back.
        """
        if isinstance(problem, MediaError):
            return problem
        in_memory = isinstance(self.source, bytes)
        if isinstance(problem, Exception):
            words = "damaged or cut short" if in_memory else f"{type(problem).__name__}: {problem}"
            problem = f"not a readable video ({words})"
        name = f"video of {len(self.source)} bytes" if isinstance(self.source, bytes) else self.source
        return MediaError("undecodable_media", f"{name}: {problem}")

    def open(self) -> str | io.BytesIO:
        """The video as Pillow and PyAV take it."""
        return io.BytesIO(self.source) if isinstance(self.source, bytes) else str(self.source)

    def check_size(self, width: int, height: int) -> None:
        if width * height > self.max_pixels:
            raise self.error(f"frames of {width} x {height} pixels, the limit is {self.max_pixels:,}")

    def pick(self, starts: Sequence[float], rate: float) -> list[int]:
        """Choose among the frames that start within the clip, or among all without one."""
        first, last = self.clip or (0.0, float("inf"))
        frames = [n for n, start in enumerate(starts) if first - 1e-6 <= start <= last + 1e-6]
        if not frames:
            raise self.error(f"no frame between {first} s and {last} s; it lasts {starts[-1]:.3f} s")
        return [frames[i] for i in self.choose(len(frames), rate)]

    def bounded(self, container: Any) -> Any:
        """The container's stream, with the limit for its decoder, which believes the sizes in the pictures alone."""
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
        picked = self.choose(len(files), 0.0)
        images = {i: load_image(ImageRef(str(files[i])), max_pixels=self.max_pixels) for i in sorted(set(picked))}
        return [images[i] for i in picked]

    def read_gif(self) -> list[Image.Image]:
        try:
            with Image.open(self.open(), formats=["GIF"]) as gif:
                self.check_size(gif.width, gif.height)
                total = getattr(gif, "n_frames", 1)
                starts: list[float] = []
                now = 0
                for n in range(total):
                    gif.seek(n)
                    starts.append(now / 1000)
                    now += gif.info.get("duration", 100)
                picked = self.pick(starts, 1000 * total / now if now else 10.0)
                images = {}
                for n in sorted(set(picked)):
                    gif.seek(n)
                    images[n] = to_rgb(gif.copy())
                return [images[n] for n in picked]
        except Exception as error:  # Pillow's readers raise whatever their parsing meets
            raise self.error(error) from error

    def read_container(self) -> list[Image.Image]:
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
                    raise self.error("no video stream in this file")
                stream = container.streams.video[0]
                self.check_size(stream.width, stream.height)
                times, keys = _timestamps(container, stream)
                if not times:
                    raise self.error("no frames in this file")
                base, rate = float(stream.time_base or 1), float(stream.average_rate or 0)
            seconds = [(time - times[0]) * base for time in times]
            picked = self.pick(seconds, rate or len(times) / max(seconds[-1], 1e-9))
            images: dict[int, Image.Image] = {}
            if keys:
                with open_container() as container:
                    images = _decode_by_seeking(self.bounded(container), container, times, sorted(set(picked)), keys)
            if any(n not in images for n in picked):  # formats without exact time stamps or exact seeking: AVI, MPEG-TS
                with open_container() as container:
                    frames: Any = enumerate(container.decode(self.bounded(container)))
                    images = {n: _upright(frame) for n, frame in islice(frames, max(picked) + 1) if n in picked}
            if missing := [n for n in picked if n not in images]:
                raise self.error(f"the frame at {seconds[missing[0]]:.3f} s cannot be decoded")
            return [images[n] for n in picked]
        except (FFmpegError, OSError, ValueError) as error:
            raise self.error(error) from error


def _timestamps(container: Any, stream: Any) -> tuple[list[int], list[int]]:
    """Times of all frames in the order they are shown, and of key frames, in units of the stream; nothing is decoded.

    Where the times to show are not written, decoding times replace them, and there are no key frames.
    """
    packets = [packet for packet in container.demux(stream) if packet.size and not packet.is_discard]
    if all(packet.pts is not None for packet in packets):
        return sorted(packet.pts for packet in packets), sorted(p.pts for p in packets if p.is_keyframe)
    return sorted(packet.dts or 0 for packet in packets), []


def _decode_by_seeking(
    stream: Any, container: Any, times: Sequence[int], wanted: Sequence[int], keys: Sequence[int]
) -> dict[int, Image.Image]:
    """Decode the wanted frames, seeking to the last key frame before each where that saves decoding."""
    images: dict[int, Image.Image] = {}
    frames: Any = iter(())
    at: int | None = None
    for n in wanted:
        target = times[n]
        start = max((key for key in keys if key <= target), default=keys[0])
        if at is None or start > at:
            container.seek(start, stream=stream, backward=True)
            frames = container.decode(stream)
        for frame in frames:
            at = frame.pts
            if at is not None and at >= target:
                if at == target:
                    images[n] = _upright(frame)
                break
    return images


def _upright(frame: Any) -> Image.Image:
    """The frame as players show it, with the container's rotation."""
    image = frame.to_image()
    return image.rotate(frame.rotation, expand=True) if frame.rotation else image
