"""Checks format, size and number of frames of images and videos by their headers, before anything is decoded."""

from __future__ import annotations

import io
import re
import struct
from dataclasses import dataclass

from PIL import Image

from ivl.serve.config import MediaConfig
from ivl.serve.errors import MediaRefusal
from ivl.utils.files import not_itself
from ivl.utils.pictures import FOREIGN, open_image

MAX_READS = 10_000
"""Reads that Pillow may make in a header. A header of more parts than that is made to cost time."""
MAX_SCANS = 100
"""Passes of a progressive JPEG, each of which walks over the whole image; encoders make about ten."""
MAX_BLOCKS = 10_000
"""Blocks of a small GIF; a large one may have one per 128 bytes more."""
WEBP_CANVASES = 4
"""Copies of a picture that the decoder of an animated WebP holds, beside what a still one takes."""
FORMATS = {rb"\x89PNG\r\n\x1a\n": "PNG", rb"\xff\xd8\xff": "JPEG", rb"RIFF.{4}WEBP": "WEBP", rb"GIF8[79]a": "GIF"}
"""Formats that are decoded, by their first bytes."""
CODECS = ("h264", "hevc", "av1", "vp8", "vp9", "mpeg4", "mjpeg", "mpeg1video", "mpeg2video")
"""Video codecs that are decoded; the many others are a large surface for few files."""
_CONTAINERS = {
    rb".{4}(ftyp|moov|mdat|wide|free|skip)": "mov",
    rb"\x1a\x45\xdf\xa3": "matroska",
    rb"RIFF.{4}AVI ": "avi",
}
_REFUSED = {
    rb"II\*\0|MM\0\*|II\+\0|MM\0\+": "TIFF",
    rb"\0\0\0\x0cjP  |\xff\x4f\xff\x51": "JPEG 2000",
    rb"BM": "BMP",
    **FOREIGN,
}


@dataclass(frozen=True)
class MediaHeader:
    """Format by the name of its reader, size in pixels, number of frames."""

    format: str
    width: int
    height: int
    frames: int = 1


def check_image(data: bytes, config: MediaConfig) -> MediaHeader:
    """Return the header of an image that may be decoded.

    Pillow reads the header, so the size that is checked is the size that is decoded.

    Raises:
        MediaRefusal: 413 for too many pixels or frames, else 400.
    """
    kind = _match(FORMATS, data)
    if kind is None:
        name = not_itself(data[:512]).partition(",")[0] or _match(_REFUSED, data) or ("of an unknown format" if data else None)
        raise MediaRefusal(f"the image is {name}; send PNG, JPEG, WebP or GIF" if name else "the image is empty")
    if kind == "JPEG" and data.count(b"\xff\xda") > MAX_SCANS:
        raise _too_many_parts()
    try:
        header = _gif_header(data) if kind == "GIF" else None
        with open_image(_CountedReads(data), [kind])[0] as image:  # without the metadata that Pillow would unpack
            size, layers = image.size, getattr(image, "layer", ())
            if len(layers) != getattr(image, "layers", 0):  # a JPEG with two frame headers
                raise MediaRefusal("the image names two sizes")
            header = header or MediaHeader(kind, *size, getattr(image, "n_frames", 1))
    except MediaRefusal:
        raise
    except Image.DecompressionBombError:
        raise MediaRefusal(f"the image has more than {config.max_pixels:,} pixels; scale it down", 413) from None
    except Exception:  # Pillow raises whatever its readers meet; its messages may hold addresses
        raise damaged("image") from None
    if size != (header.width, header.height):
        raise MediaRefusal("the image names two sizes")
    _check_size(header.width, header.height, config)
    if header.frames > config.max_frames:
        raise MediaRefusal(f"an animation of more than {config.max_frames} frames; send it as a video or shorten it", 413)
    if kind == "WEBP" and header.frames > 1 and header.width * header.height > (most := config.max_pixels // WEBP_CANVASES):
        raise MediaRefusal(f"an animated WebP of more than {most:,} pixels; scale it down, or send one picture of it", 413)
    return header


class _CountedReads(io.BytesIO):
    """A file that refuses to be read too often."""

    num_reads = 0

    def read(self, size: int | None = -1, /) -> bytes:
        self.num_reads += 1
        if self.num_reads > MAX_READS:
            raise _too_many_parts()
        return super().read(size)


def _match(patterns: dict[bytes, str], data: bytes) -> str | None:
    return next((name for pattern, name in patterns.items() if re.match(pattern, data, re.DOTALL)), None)


def _gif_header(data: bytes) -> MediaHeader:
    """Walk over a GIF: Pillow would read its blocks one by one to count the frames, and lets frames outgrow the screen.

    The size is that of the screen and the first frame together, as Pillow has it.
    """
    width, height, flags = struct.unpack_from("<HHB", data, 6)
    at = 13 + _palette_size(flags)
    frames, blocks, most = 0, 0, MAX_BLOCKS + len(data) // 128
    while at < len(data) and data[at] != 0x3B:
        if data[at] == 0x2C:  # a frame
            frames += 1
            left, top, across, down, flags = struct.unpack_from("<HHHHB", data, at + 1)
            if frames == 1:
                width, height = max(width, left + across), max(height, top + down)
            elif left + across > width or top + down > height:
                raise MediaRefusal("the GIF has a frame larger than its screen")
            at += 11 + _palette_size(flags)  # 10 bytes and the code size
        elif data[at] == 0x21:  # an extension
            at += 2
        else:
            at, blocks = at + 1, blocks + 1
            if blocks > most:
                raise _too_many_parts()
            continue
        while at < len(data) and data[at]:  # blocks of up to 255 bytes, the last one empty
            at, blocks = at + 1 + data[at], blocks + 1
            if blocks > most:
                raise _too_many_parts()
        at += 1
    if not frames:
        raise damaged("image")
    return MediaHeader("GIF", width, height, frames)


def _palette_size(flags: int) -> int:
    return 3 << (flags & 7) + 1 if flags & 0x80 else 0


def check_video(data: bytes, config: MediaConfig) -> MediaHeader:
    """Return the header of a video that may be decoded: MP4 or MOV, Matroska or WebM, AVI, or an animated GIF.

    Raises:
        MediaRefusal: 413 for too many pixels, frames or seconds, else 400.
    """
    if data.startswith(b"GIF8"):
        return check_image(data, config)
    container = _match(_CONTAINERS, data)
    if container is None:
        raise MediaRefusal(
            "the video is of an unknown format; send MP4, MOV, WebM, MKV, AVI or GIF" if data else "the video is empty"
        )
    try:
        import av
        from av.error import FFmpegError
    except ImportError:
        raise MediaRefusal("this server reads no video") from None
    options = {"protocol_whitelist": "none", "format_whitelist": container, "max_pixels": str(config.max_pixels)}
    try:
        with av.open(io.BytesIO(data), "r", format=container, options=options) as file:
            if not file.streams.video:
                raise MediaRefusal("the video has no pictures")
            stream = file.streams.video[0]
            if stream.codec_context is None or stream.codec.canonical_name not in CODECS:
                raise MediaRefusal(f"the video's codec is not taken; taken are {', '.join(CODECS)}")
            if not stream.width:  # the reader gives up above max_pixels, among others
                raise MediaRefusal(
                    f"the video's pictures have no readable size, or one above {config.max_pixels:,} pixels", 413
                )
            _check_size(stream.width, stream.height, config)
            if (file.duration or 0) / 1e6 > config.max_video_seconds:
                raise MediaRefusal(f"the video lasts longer than {config.max_video_seconds:g} s", 413)
            frames = 0
            for packet in file.demux(stream):
                frames += bool(packet.size)
                if frames > config.max_video_frames:
                    raise MediaRefusal(f"the video has more than {config.max_video_frames:,} frames", 413)
            if not frames:
                raise MediaRefusal("the video has no pictures")
            return MediaHeader(container, stream.width, stream.height, frames)
    except (FFmpegError, OSError, ValueError, OverflowError, MemoryError) as error:
        raise error if isinstance(error, MediaRefusal) else damaged("video") from None


def damaged(kind: str) -> MediaRefusal:
    """Return the error for a medium that cannot be read to its end."""
    return MediaRefusal(f"the {kind} is damaged or cut short")


def _check_size(width: int, height: int, config: MediaConfig) -> None:
    if min(width, height) < 1:
        raise MediaRefusal(f"an image of {width} x {height} pixels has no content")
    if width * height > config.max_pixels or max(width, height) > config.max_side:
        limits = f"{config.max_pixels:,} pixels and {config.max_side:,} a side"
        raise MediaRefusal(f"{width} x {height} pixels, the limits are {limits}; scale it down", 413)


def _too_many_parts() -> MediaRefusal:
    return MediaRefusal("the image has more parts than an encoder would write; save it again")
