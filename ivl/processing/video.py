"""A video becomes frames: which ones (spec 2.4 and 11), and how they are read."""

from __future__ import annotations

import io
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from ivl.errors import InputError
from ivl.processing.image import MAX_PIXELS, load_image, to_rgb
from ivl.types import ImageRef, VideoRef

Mode = Literal["even", "rand", "middle", "fps"]
"""even: spread over the whole video (inference). rand, middle: one frame of each of num_frames intervals. fps: a fixed rate."""
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")

OPEN = {
    "format_whitelist": "mov,matroska,webm,avi,mpegts,mpeg,mpegvideo,m4v,h264,hevc,flv,asf,ogg,gif",
    "protocol_whitelist": "file",
}
"""Containers that hold their own pictures: a playlist named .mp4 must not make FFmpeg open what it lists."""


def load_frames(
    ref: VideoRef,
    num_frames: int,
    *,
    mode: Mode = "even",
    fps: float = 1.0,
    generator: random.Random | None = None,
    root: str = "",
    max_pixels: int = MAX_PIXELS,
) -> list[Image.Image]:
    """RGB frames in order: num_frames of them, or for mode "fps" at most as many.

    A folder gives its images sorted by the last number in their names, a GIF its frames, and anything else is decoded with
    PyAV (the `video` extra). ref.clip keeps the frames shown from its first to its second second. A video that is too
    short repeats its last frame.

    Raises:
        InputError: naming the file, if it cannot be read, has no frame inside the clip, or has frames above max_pixels.
    """
    if isinstance(ref.source, bytes):
        read = _from_gif if ref.source.startswith(b"GIF8") else _from_file
        return read(_Encoded(ref.source), ref, num_frames, mode, fps, generator, max_pixels)
    path = Path(root) / ref.source
    if path.is_dir():
        return _from_folder(path, ref, num_frames, mode, generator, max_pixels)
    if not path.exists():
        raise InputError(f"{path}: no such video")
    read = _from_gif if path.suffix.lower() == ".gif" else _from_file
    return read(path, ref, num_frames, mode, fps, generator, max_pixels)


@dataclass(frozen=True)
class _Encoded:
    """A video in memory, where a path is expected. Its name in messages says nothing about its owner."""

    data: bytes

    def __str__(self) -> str:
        return f"video of {len(self.data)} bytes"


_Place = Path | _Encoded


def _opened(path: _Place) -> Any:
    return io.BytesIO(path.data) if isinstance(path, _Encoded) else str(path)


def frame_indices(
    total: int, num_frames: int, mode: Mode, *, rate: float = 0.0, fps: float = 1.0, generator: random.Random | None = None
) -> list[int]:
    """Which of `total` frames are taken. rate is the video's frames a second, needed for mode "fps"."""
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


def _from_folder(
    path: Path, ref: VideoRef, num_frames: int, mode: Mode, generator: random.Random | None, max_pixels: int
) -> list[Image.Image]:
    if ref.clip is not None or mode == "fps":
        raise InputError(f"{path}: a folder of frames has no time axis; a clip or a frame rate needs a video file")
    files = [file for file in path.iterdir() if file.suffix.lower() in SUFFIXES]
    if not files:
        raise InputError(f"{path}: no frames here; expected files ending in {', '.join(SUFFIXES)}")
    numbered = []
    for file in files:
        numbers = re.findall(r"\d+", file.stem)
        if not numbers:
            raise InputError(f"{file}: a frame's name must hold its number")
        numbered.append((int(numbers[-1]), file.name, file))
    files = [file for *_, file in sorted(numbered)]
    picked = frame_indices(len(files), num_frames, mode, generator=generator)
    images = {i: load_image(ImageRef(str(files[i])), max_pixels=max_pixels) for i in sorted(set(picked))}
    return [images[i] for i in picked]


def _from_gif(
    path: _Place, ref: VideoRef, num_frames: int, mode: Mode, fps: float, generator: random.Random | None, max_pixels: int
) -> list[Image.Image]:
    try:
        with Image.open(_opened(path), formats=["GIF"]) as gif:
            _check_size(path, gif.width, gif.height, max_pixels)
            total = getattr(gif, "n_frames", 1)
            starts, now = [], 0
            for n in range(total):
                gif.seek(n)
                starts.append(now / 1000)
                now += gif.info.get("duration", 100)
            kept = _clipped(path, starts, ref.clip)
            picked = [kept[i] for i in _pick(kept, num_frames, mode, 1000 * total / now if now else 10.0, fps, generator)]
            images = {}
            for n in sorted(set(picked)):
                gif.seek(n)
                images[n] = to_rgb(gif.copy())
            return [images[n] for n in picked]
    except Exception as error:  # Pillow's readers raise whatever their parsing meets
        raise _unreadable(path, error) from error


def _from_file(
    path: _Place, ref: VideoRef, num_frames: int, mode: Mode, fps: float, generator: random.Random | None, max_pixels: int
) -> list[Image.Image]:
    try:
        import av
        from av.error import FFmpegError
    except ImportError as error:
        raise InputError(f"{path}: reading video needs PyAV: pip install 'ivl[video]'") from error
    try:
        with av.open(_opened(path), options=OPEN) as container:
            if not container.streams.video:
                raise InputError(f"{path}: no video stream in this file")
            stream = container.streams.video[0]
            _check_size(path, stream.width, stream.height, max_pixels)
            times, keys = _timestamps(container, stream)
            if not times:
                raise InputError(f"{path}: no frames in this file")
            base, rate = float(stream.time_base or 1), float(stream.average_rate or 0)
        seconds = [(time - times[0]) * base for time in times]
        kept = _clipped(path, seconds, ref.clip)
        rate = rate or len(times) / max(seconds[-1], 1e-9)
        picked = [kept[i] for i in _pick(kept, num_frames, mode, rate, fps, generator)]
        images: dict[int, Image.Image] = {}
        if keys:
            with _bounded(av.open(_opened(path), options=OPEN), max_pixels) as container:
                images = _decode_by_seeking(container, times, sorted(set(picked)), keys)
        if any(n not in images for n in picked):  # formats without exact time stamps or exact seeking: AVI, MPEG-TS
            with _bounded(av.open(_opened(path), options=OPEN), max_pixels) as container:
                images = _decode_by_counting(container, set(picked))
        if missing := [n for n in picked if n not in images]:
            raise InputError(f"{path}: the frame at {seconds[missing[0]]:.3f} s cannot be decoded")
        return [images[n] for n in picked]
    except (FFmpegError, OSError, ValueError) as error:
        raise _unreadable(path, error) from error


def _bounded(container: Any, max_pixels: int) -> Any:
    """A decoder believes the sizes in the pictures, whatever the container says: the limit holds for it, too."""
    container.streams.video[0].codec_context.options = {"max_pixels": str(max_pixels)}
    return container


def _timestamps(container: Any, stream: Any) -> tuple[list[int], list[int]]:
    """Times of all frames in the order they are shown, and of key frames, read without decoding, in units of the stream.

    There are no key frames where times to show are not written and decoding times stand in for them.
    """
    packets = [packet for packet in container.demux(stream) if packet.size and not packet.is_discard]
    if all(packet.pts is not None for packet in packets):
        return sorted(packet.pts for packet in packets), sorted(p.pts for p in packets if p.is_keyframe)
    return sorted(packet.dts or 0 for packet in packets), []


def _decode_by_seeking(
    container: Any, times: Sequence[int], wanted: Sequence[int], keys: Sequence[int]
) -> dict[int, Image.Image]:
    """The frames of these numbers; jumps to the last key frame before each where that saves decoding."""
    stream = container.streams.video[0]
    images: dict[int, Image.Image] = {}
    frames, at = iter(()), None
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


def _decode_by_counting(container: Any, wanted: set[int]) -> dict[int, Image.Image]:
    images: dict[int, Image.Image] = {}
    for n, frame in enumerate(container.decode(container.streams.video[0])):
        if n in wanted:
            images[n] = _upright(frame)
        if len(images) == len(wanted):
            break
    return images


def _upright(frame: Any) -> Image.Image:
    """As players show it: the container's rotation applied."""
    image = frame.to_image()
    return image.rotate(frame.rotation, expand=True) if frame.rotation else image


def _pick(
    kept: Sequence[int], num_frames: int, mode: Mode, rate: float, fps: float, generator: random.Random | None
) -> list[int]:
    return frame_indices(len(kept), num_frames, mode, rate=rate, fps=fps, generator=generator)


def _clipped(path: _Place, starts: Sequence[float], clip: tuple[float, float] | None) -> list[int]:
    """Numbers of the frames that start within the clip, all of them without one."""
    if clip is None:
        return list(range(len(starts)))
    first, last = clip
    kept = [n for n, start in enumerate(starts) if first - 1e-6 <= start <= last + 1e-6]
    if not kept:
        raise InputError(f"{path}: no frame between {first} s and {last} s; it lasts {starts[-1]:.3f} s")
    return kept


def _check_size(path: _Place, width: int, height: int, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise InputError(f"{path}: frames of {width} x {height} pixels, the limit is {max_pixels:,}")


def _unreadable(path: _Place, error: Exception) -> InputError:
    if isinstance(error, InputError):
        return error
    if isinstance(path, _Encoded):  # comes from outside: nothing of the library's words goes back there
        return InputError(f"{path}: not a readable video (damaged or cut short)")
    return InputError(f"{path}: not a readable video ({type(error).__name__}: {error})")
