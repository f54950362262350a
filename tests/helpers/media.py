"""Images and videos to send: good ones, and ones that lie."""

from __future__ import annotations

import base64
import io
import struct
import zlib
from typing import Any

import numpy as np
from PIL import Image


def picture(width: int = 64, height: int = 48) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8))


def encoded(form: str, image: Image.Image | None = None, **options: Any) -> bytes:
    stream = io.BytesIO()
    (image or picture()).save(stream, form, **options)
    return stream.getvalue()


def data_url(data: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def good() -> dict[str, bytes]:
    """One image of each kind that is taken."""
    image = picture()
    exif = Image.Exif()
    exif[0x0112] = 6
    return {
        "png": encoded("PNG"),
        "png palette": encoded("PNG", image.convert("P")),
        "png clear": encoded("PNG", image.convert("RGBA")),
        "png 16 bit": encoded("PNG", Image.fromarray(np.full((5, 6), 40000, np.uint16))),
        "png 1 bit": encoded("PNG", image.convert("1")),
        "jpeg": encoded("JPEG"),
        "jpeg progressive": encoded("JPEG", progressive=True),
        "jpeg grey": encoded("JPEG", image.convert("L")),
        "jpeg cmyk": encoded("JPEG", image.convert("CMYK")),
        "jpeg turned": encoded("JPEG", exif=exif),
        "webp": encoded("WEBP"),
        "webp lossless": encoded("WEBP", image.convert("RGBA"), lossless=True),
        "webp moving": encoded("WEBP", save_all=True, append_images=[image.rotate(180)]),
        "gif": encoded("GIF"),
        "gif moving": encoded("GIF", save_all=True, append_images=[image.rotate(180)]),
    }


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(width: int, height: int, *, bits: int = 1, body: bytes = b"", extra: bytes = b"") -> bytes:
    """A grey PNG with any header, whatever its body."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + extra + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def png_bomb(side: int = 19_000) -> bytes:
    """About 44 KB that decode to side x side pixels."""
    return png(side, side, body=zlib.compress(bytes(side * (1 + (side + 7) // 8)), 9))


def gif(frames: int, width: int = 2, height: int = 2) -> bytes:
    block = struct.pack("<BHHHHB", 0x2C, 0, 0, width, height, 0) + b"\2\2\x84\x51\0"
    return b"GIF89a" + struct.pack("<HHBBB", width, height, 0x80, 0, 0) + bytes(6) + block * frames + b";"


def jpeg_scans(scans: int) -> bytes:
    """A progressive JPEG that repeats its last pass."""
    data = encoded("JPEG", progressive=True)
    last = data.rindex(b"\xff\xda")
    return data[:last] + data[last:-2] * scans + data[-2:]


def video(codec: str = "mpeg4", form: str = "mp4", width: int = 64, height: int = 48, frames: int = 5, rate: int = 10) -> bytes:
    import av

    stream = io.BytesIO()
    with av.open(stream, "w", format=form) as out:
        track: Any = out.add_stream(codec, rate=rate)
        track.width, track.height = width, height
        track.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        for n in range(frames):
            frame = av.VideoFrame.from_ndarray(np.full((height, width, 3), 20 + n * 5, np.uint8), format="rgb24")
            frame.pts = n
            out.mux(track.encode(frame))
        out.mux(track.encode(None))
    return stream.getvalue()
