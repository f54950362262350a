"""What an image or a video says of itself, read from its first bytes before any decoder sees it.

Two readers, ours and the decoder's own, must agree on the size of an image, so that what was checked is what is decoded.
"""

from __future__ import annotations

import io
import re
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from PIL import Image

from ivl.serve.limits import MediaConfig, MediaError

MAX_PARTS = 10_000
"""Chunks of a PNG or WebP, segments of a JPEG, blocks of a small GIF: nobody writes more."""
MAX_SCANS = 100
"""Passes of a progressive JPEG, each of which walks over the whole image; encoders make about ten."""
TAKEN = "PNG, JPEG, WebP or GIF"
CODECS = ("h264", "hevc", "av1", "vp8", "vp9", "mpeg4", "mjpeg", "mpeg1video", "mpeg2video")
"""Video codecs that are decoded; the many others are a large surface for few files."""
_REFUSED = {
    "TIFF": rb"II\*\0|MM\0\*|II\+\0|MM\0\+",
    "JPEG 2000": rb"\0\0\0\x0cjP  |\xff\x4f\xff\x51",
    "JPEG XL": rb"\0\0\0\x0cJXL |\xff\x0a",
    "AVIF or HEIF": rb".{4}ftyp(avif|avis|heic|heix|hevc|mif1|msf1)",
    "BMP": rb"BM",
    "PDF": rb"\s*%PDF",
    "PostScript": rb"\s*%!|\xc5\xd0\xd3\xc6",
    "Photoshop": rb"8BPS",
    "an icon": rb"\0\0[\1\2]\0",
    "SVG": rb"(\xef\xbb\xbf)?\s*(<\?xml|<!--|<svg)",
    "a web page": rb"(\xef\xbb\xbf)?\s*(?i:<!doctype|<html)",
}


@dataclass(frozen=True)
class Header:
    """Format by Pillow's name, size in pixels, number of frames."""

    format: str
    width: int
    height: int
    frames: int = 1


def check_image(data: bytes, config: MediaConfig) -> Header:
    """The header of an image that may be decoded.

    Raises:
        MediaError: 413 for too many pixels or frames, else 400.
    """
    header = image_header(data)
    _check_size(header.width, header.height, config)
    if header.frames > config.max_frames:
        raise MediaError(f"an animation of more than {config.max_frames} frames; send it as a video or shorten it", 413)
    try:
        with Image.open(io.BytesIO(data), formats=[header.format]) as image:
            size = image.size
    except Exception:  # Pillow's readers raise whatever their parsing meets; its words may hold addresses
        raise damaged("image") from None
    if size != (header.width, header.height):
        raise MediaError("the image names two sizes")
    return header


def image_header(data: bytes) -> Header:
    """Format, size and frames of an image, decoding nothing.

    Raises:
        MediaError: if it is of another format or its header is damaged.
    """
    for magic, read in _READERS.items():
        if re.match(magic, data, re.DOTALL):
            try:
                return read(data)
            except (struct.error, IndexError):
                raise damaged("image") from None
    for name, magic in _REFUSED.items():
        if re.match(magic, data, re.DOTALL):
            raise MediaError(f"the image is {name}; send {TAKEN}")
    raise MediaError(f"the image is of an unknown format; send {TAKEN}" if data else "the image is empty")


def check_video(data: bytes, config: MediaConfig) -> None:
    """Passes a video that may be decoded: MP4 or MOV, Matroska or WebM, AVI, or an animated GIF.

    Raises:
        MediaError: 413 for too many pixels, frames or seconds, else 400.
    """
    if data.startswith(b"GIF8"):
        check_image(data, config)
        return
    container = next((name for magic, name in _CONTAINERS.items() if re.match(magic, data, re.DOTALL)), None)
    if container is None:
        raise MediaError(
            "the video is of an unknown format; send MP4, MOV, WebM, MKV, AVI or GIF" if data else "the video is empty"
        )
    try:
        import av
        from av.error import FFmpegError
    except ImportError:
        raise MediaError("this server reads no video") from None
    options = {"protocol_whitelist": "none", "format_whitelist": container, "max_pixels": str(config.max_pixels)}
    try:
        with av.open(io.BytesIO(data), "r", format=container, options=options) as file:
            if not file.streams.video:
                raise MediaError("the video has no pictures")
            stream = file.streams.video[0]
            if stream.codec_context is None or stream.codec.canonical_name not in CODECS:
                raise MediaError(f"the video's codec is not taken; taken are {', '.join(CODECS)}")
            if not stream.width:  # what the reader gives up on, above max_pixels among others
                raise MediaError(f"the video's pictures have no readable size, or one above {config.max_pixels:,} pixels", 413)
            _check_size(stream.width, stream.height, config)
            if (file.duration or 0) / 1e6 > config.max_video_seconds:
                raise MediaError(f"the video lasts longer than {config.max_video_seconds:g} s", 413)
            frames = 0
            for packet in file.demux(stream):
                frames += bool(packet.size)
                if frames > config.max_video_frames:
                    raise MediaError(f"the video has more than {config.max_video_frames:,} frames", 413)
            if not frames:
                raise MediaError("the video has no pictures")
    except (FFmpegError, OSError, ValueError, OverflowError, MemoryError) as error:
        raise error if isinstance(error, MediaError) else damaged("video") from None


def damaged(kind: str) -> MediaError:
    return MediaError(f"the {kind} is damaged or cut short")


def _check_size(width: int, height: int, config: MediaConfig) -> None:
    if min(width, height) < 1:
        raise MediaError(f"a picture of {width} x {height} pixels has no content")
    if width * height > config.max_pixels or max(width, height) > config.max_side:
        limits = f"{config.max_pixels:,} pixels and {config.max_side:,} a side"
        raise MediaError(f"{width} x {height} pixels, the limits are {limits}; scale it down", 413)


def _png(data: bytes) -> Header:
    frames = 1
    for kind, start, _ in _chunks(data, 8, ">I4s", 4):
        if kind == b"acTL":
            frames = struct.unpack_from(">I", data, start)[0]
        if kind == b"IEND":
            break
    if data[12:16] != b"IHDR":
        raise damaged("image")
    return Header("PNG", *struct.unpack_from(">II", data, 16), frames)


def _webp(data: bytes) -> Header:
    size, frames = None, 0
    for kind, start, _ in _chunks(data, 12, "<4sI", 0, even=True):
        frames += kind == b"ANMF"
        if size is None and kind == b"VP8X":
            width, height = (int.from_bytes(data[start + at : start + at + 3], "little") + 1 for at in (4, 7))
            size = width, height
        elif size is None and kind == b"VP8L":
            bits = struct.unpack_from("<I", data, start + 1)[0]
            size = (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
        elif size is None and kind == b"VP8 ":
            width, height = struct.unpack_from("<HH", data, start + 6)
            size = width & 0x3FFF, height & 0x3FFF
    if size is None:
        raise damaged("image")
    return Header("WEBP", *size, max(1, frames))


def _chunks(data: bytes, at: int, layout: str, tail: int, *, even: bool = False) -> Iterator[tuple[bytes, int, int]]:
    """Kind, start and length of each chunk; length and kind are told apart by their types."""
    for _ in range(MAX_PARTS):
        if at + 8 > len(data):
            return
        first, second = struct.unpack_from(layout, data, at)
        kind, length = (second, first) if isinstance(second, bytes) else (first, second)
        yield kind, at + 8, length
        at += 8 + length + tail + (length & 1 if even else 0)
    raise _too_many_parts()


def _jpeg(data: bytes) -> Header:
    if data.count(b"\xff\xda") > MAX_SCANS:
        raise _too_many_parts()
    at = 2
    for _ in range(MAX_PARTS):
        if data[at] != 0xFF:
            at += 1
            continue
        marker = data[at + 1]
        if marker in (0xFF, 0x00, 0x01) or 0xD0 <= marker <= 0xD8:  # fill bytes and markers without a body
            at += 1 if marker == 0xFF else 2
            continue
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            height, width = struct.unpack_from(">HH", data, at + 5)
            return Header("JPEG", width, height)
        if marker in (0xD9, 0xDA):
            raise damaged("image")
        at += 2 + struct.unpack_from(">H", data, at + 2)[0]
    raise _too_many_parts()


def _gif(data: bytes) -> Header:
    """The size is that of the screen and of the first frame together, as Pillow has it."""
    width, height, flags = struct.unpack_from("<HHB", data, 6)
    at = 13 + _palette(flags)
    frames, blocks, most = 0, 0, MAX_PARTS + len(data) // 128
    while at < len(data) and data[at] != 0x3B:
        if data[at] == 0x2C:
            frames += 1
            left, top, across, down, flags = struct.unpack_from("<HHHHB", data, at + 1)
            if frames == 1:
                width, height = max(width, left + across), max(height, top + down)
            elif left + across > width or top + down > height:
                raise MediaError("the GIF has a frame larger than its screen")
            at += 11 + _palette(flags)  # 10 bytes and the code size
        elif data[at] == 0x21:
            at += 2
        else:
            at += 1
            blocks += 1
            if blocks > most:
                raise _too_many_parts()
            continue
        while at < len(data) and data[at]:
            at += 1 + data[at]
            blocks += 1
            if blocks > most:
                raise _too_many_parts()
        at += 1
    if not frames:
        raise damaged("image")
    return Header("GIF", width, height, frames)


def _palette(flags: int) -> int:
    return 3 << (flags & 7) + 1 if flags & 0x80 else 0


def _too_many_parts() -> MediaError:
    return MediaError("the image is made of more parts than any honest one; save it again")


_READERS: dict[bytes, Callable[[bytes], Header]] = {
    rb"\x89PNG\r\n\x1a\n": _png,
    rb"\xff\xd8\xff": _jpeg,
    rb"RIFF.{4}WEBP": _webp,
    rb"GIF8[79]a": _gif,
}
_CONTAINERS = {
    rb".{4}(ftyp|moov|mdat|wide|free|skip)": "mov",
    rb"\x1a\x45\xdf\xa3": "matroska",
    rb"RIFF.{4}AVI ": "avi",
}
