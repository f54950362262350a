"""The one way in for images and videos of requests: data: URLs, and remote ones where that is allowed."""

from __future__ import annotations

import asyncio
import base64
import binascii
import re
import warnings
from collections.abc import Callable
from typing import TypeVar

from ivl.serve.fetch import Fetcher, too_large
from ivl.serve.inspect import check_image, check_video
from ivl.serve.limits import MediaConfig, MediaError
from ivl.types import ImageRef, VideoRef

__all__ = ["MediaConfig", "MediaError", "MediaGateway"]

T = TypeVar("T")
INLINE = 1 << 16
"""Smaller media are read where they arrive; larger ones in a thread, since decoding base64 would stop every stream."""
_DATA = re.compile(r"data:[\w.+-]*/?[\w.+-]*(;[\w.+-]+=[\w.+-]*){0,4};base64,", re.ASCII | re.IGNORECASE)


class MediaGateway:
    """Turns what a request points to into media whose size and format are checked, and which are decoded nowhere else.

    Images come back as ImageRef of bytes, videos as VideoRef of bytes: what Processor decodes, upright, once. What only
    decoding shows (a damaged body) is an InputError there, as clean as ours.
    """

    def __init__(self, config: MediaConfig | None = None, *, fetcher: Fetcher | None = None) -> None:
        warnings.filterwarnings("ignore", module="PIL")  # of damaged metadata, with a path of this machine
        self.config = config or MediaConfig()
        self.fetcher = fetcher or Fetcher(self.config)

    async def image(self, url: str, *, max_tiles: int | None = None) -> ImageRef:
        """An image by its address; max_tiles is its own tile cap.

        Raises:
            MediaError: saying what is wrong, with an HTTP status.
        """
        data = await self._bytes(url, self.config.max_bytes)
        await _away(len(data), lambda: check_image(data, self.config))
        return ImageRef(data, max_tiles)

    async def video(self, url: str, *, num_frames: int | None = None) -> VideoRef:
        """A video or an animated GIF by its address; num_frames is how many of its frames are shown.

        Raises:
            MediaError: saying what is wrong, with an HTTP status.
        """
        data = await self._bytes(url, self.config.max_video_bytes)
        await asyncio.to_thread(check_video, data, self.config)
        return VideoRef(data, num_frames)

    async def _bytes(self, url: str, max_bytes: int) -> bytes:
        if url[:5].lower() == "data:":
            return await _away(len(url), lambda: from_data_url(url, max_bytes))
        return await self.fetcher.get(url, max_bytes)


def from_data_url(url: str, max_bytes: int) -> bytes:
    """The bytes of a base64 data: URL, whose media type is not believed. The size is checked before decoding.

    Raises:
        MediaError: 413 above max_bytes, 400 if it is malformed.
    """
    header = _DATA.match(url, 0, 512)
    if header is None:
        raise MediaError("a data: URL must look like data:image/png;base64,...")
    length = len(url) - header.end()
    if length // 4 * 3 > max_bytes + 2:
        raise too_large(max_bytes)
    try:
        data = base64.b64decode(url[header.end() :], validate=True)
    except (binascii.Error, ValueError):
        raise MediaError("the data: URL is not strict base64: the standard alphabet with padding, no line breaks") from None
    if len(data) > max_bytes:
        raise too_large(max_bytes)
    return data


async def _away(size: int, work: Callable[[], T]) -> T:
    """The work's result; large work is done in a thread."""
    return await asyncio.to_thread(work) if size > INLINE else work()
