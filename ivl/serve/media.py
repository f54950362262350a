"""The gateway for images and videos from outside: data: URLs, and remote addresses where allowed."""

from __future__ import annotations

import asyncio
import base64
import binascii
import re
import warnings
from collections.abc import Callable
from typing import TypeVar

from ivl.serve.fetch import Fetcher, too_large
from ivl.serve.media_limits import MediaConfig, MediaRefusal
from ivl.serve.sniff import check_image, check_video
from ivl.types import ImageRef, VideoRef

__all__ = ["MediaConfig", "MediaGateway", "MediaRefusal"]

T = TypeVar("T")
INLINE = 1 << 16
"""Smaller media are read where they arrive; larger ones in a thread, since decoding base64 would stop every stream."""
_DATA = re.compile(r"data:[\w.+-]*/?[\w.+-]*(;[\w.+-]+=[\w.+-]*){0,4};base64,", re.ASCII | re.IGNORECASE)


class MediaGateway:
    """Turns an address into a medium whose size and format are checked, and which is not decoded yet.

    Images come back as ImageRef of bytes, videos as VideoRef of bytes; the Processor decodes them, once. A damaged body
    shows only there, as an InputError.
    """

    def __init__(self, config: MediaConfig | None = None, *, fetcher: Fetcher | None = None) -> None:
        warnings.filterwarnings("ignore", module="PIL")  # they concern damaged metadata, and hold a path of this machine
        self.config = config or MediaConfig()
        self.fetcher = fetcher or Fetcher(self.config)

    async def image(self, url: str, *, max_tiles: int | None = None) -> ImageRef:
        """Return an image by its address. max_tiles: its own tile cap.

        Raises:
            MediaRefusal: with the reason and an HTTP status.
        """
        data = await self._read_url(url, self.config.max_bytes)
        await _in_thread(len(data), lambda: check_image(data, self.config))
        return ImageRef(data, max_tiles)

    async def video(self, url: str, *, num_frames: int | None = None) -> VideoRef:
        """Return a video or an animated GIF by its address. num_frames: how many of its frames are shown.

        Raises:
            MediaRefusal: with the reason and an HTTP status.
        """
        data = await self._read_url(url, self.config.max_video_bytes)
        await asyncio.to_thread(check_video, data, self.config)
        return VideoRef(data, num_frames)

    async def _read_url(self, url: str, max_bytes: int) -> bytes:
        if is_data_url(url):
            return await _in_thread(len(url), lambda: from_data_url(url, max_bytes))
        return await self.fetcher.get(url, max_bytes)


def is_data_url(url: str) -> bool:
    """Whether an address holds its medium itself."""
    return url[:5].lower() == "data:"


def from_data_url(url: str, max_bytes: int) -> bytes:
    """Return the bytes of a base64 data: URL. Its media type is ignored; the size is checked before decoding.

    Raises:
        MediaRefusal: 413 above max_bytes, 400 if it is malformed.
    """
    header = _DATA.match(url, 0, 512)
    if header is None:
        raise MediaRefusal("a data: URL must look like data:image/png;base64,...")
    length = len(url) - header.end()
    if length // 4 * 3 > max_bytes + 2:
        raise too_large(max_bytes)
    try:
        data = base64.b64decode(url[header.end() :], validate=True)
    except (binascii.Error, ValueError):
        raise MediaRefusal("the data: URL is not strict base64: the standard alphabet with padding, no line breaks") from None
    if len(data) > max_bytes:
        raise too_large(max_bytes)
    return data


async def _in_thread(size: int, work: Callable[[], T]) -> T:
    """Return the result of work, which is done in a thread if it is large."""
    return await asyncio.to_thread(work) if size > INLINE else work()
