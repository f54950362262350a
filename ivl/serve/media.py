"""The gateway for images and videos from outside: data: URLs, and remote addresses where allowed."""

from __future__ import annotations

import asyncio
import binascii
import re
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import TypeVar

from ivl.serve.config import MediaConfig
from ivl.serve.errors import MediaRefusal
from ivl.serve.fetch import Fetcher, too_large
from ivl.serve.sniff import MediaHeader, check_image, check_video
from ivl.serve.turns import Turns, after
from ivl.types import ImageRef, VideoRef

__all__ = ["MediaConfig", "MediaGateway", "MediaRefusal"]

T = TypeVar("T")
R = TypeVar("R", bound=ImageRef | VideoRef)
INLINE = 1 << 16
"""Smaller base64 is decoded where it arrives; larger is in a thread, since it would stop every stream."""
NUM_THREADS = 2
"""Threads that decode base64 and check headers; keys take them by turns."""
DECODED_AT_ONCE = 1 << 18
"""Characters of base64, a multiple of four."""
_BARE = re.compile(r"(?:[\w.+/-]{0,100};?base64,)?[\w+/-]{40}[\w+/\s-]*={0,2}")
"""The beginning of base64 that lacks `data:` before it. An address has a colon, and the path of a file a dot."""
_BLANKS = re.compile(rb"(?:\\[nrt]|\s)*\Z")
"""What may follow a data: URL: a line break, which JSON escapes."""
_DATA = re.compile(rb"data:[\w.+-]*/?[\w.+-]*(;[\w.+-]+=[\w.+-]*){0,4};base64,", re.IGNORECASE)


class MediaGateway:
    """Turns an address into a medium whose size and format are checked, and which is not decoded yet.

    Images come back as ImageRef of bytes, videos as VideoRef of bytes; the Processor decodes them, once. A damaged body
    shows only there, as an InputError.
    """

    def __init__(self, config: MediaConfig | None = None, *, fetcher: Fetcher | None = None) -> None:
        warnings.filterwarnings("ignore", module="PIL")  # they concern damaged metadata, and hold a path of this machine
        self.config = config or MediaConfig()
        self.fetcher = fetcher or Fetcher(self.config)
        self._threads = ThreadPoolExecutor(NUM_THREADS, "ivl-media")
        self._turns = Turns(NUM_THREADS)

    async def image(self, url: str, *, max_tiles: int | None = None) -> ImageRef:
        """Return an image by its address. max_tiles: its own tile cap. Raises MediaRefusal."""
        return (await self.read(ImageRef(url, max_tiles), url))[0]

    async def video(self, url: str, *, num_frames: int | None = None) -> VideoRef:
        """Return a video or an animated GIF by its address. num_frames: how many are shown. Raises MediaRefusal."""
        return (await self.read(VideoRef(url, num_frames), url))[0]

    async def read(self, ref: R, url: str | bytearray, group: str = "") -> tuple[R, MediaHeader]:
        """Return a reference to the bytes at an address, with their header.

        Args:
            ref: What the medium is taken for: an image, or a video.
            url: Its address; bytes are a data: URL.
            group: Whose medium it is. Groups take the threads by turns.

        Raises:
            MediaRefusal: with the reason and an HTTP status.
        """
        is_image = isinstance(ref, ImageRef)
        max_bytes = self.config.max_bytes if is_image else self.config.max_video_bytes
        if isinstance(url, str) and not is_data_url(url):
            if _BARE.fullmatch(url[:1000]):
                raise MediaRefusal("base64 without a data: prefix; write data:image/jpeg;base64,...")
            data = await self.fetcher.get(url, max_bytes)
        else:
            decode = partial(from_data_url, url, max_bytes)
            data = decode() if len(url) <= INLINE else await self._in_thread(decode, group)
        check = check_image if is_image else check_video
        header = await self._in_thread(partial(check, data, self.config), group)  # a small one may take long, too
        return replace(ref, source=data), header

    async def _in_thread(self, work: Callable[[], T], group: str) -> T:
        """Return the result of work, which is done in a thread at a turn of its group."""
        await self._turns.acquire(group)
        job = self._threads.submit(work)
        after(job, partial(self._turns.release, group))
        return await asyncio.wrap_future(job)


def is_data_url(url: str) -> bool:
    """Whether an address holds its medium itself."""
    return url[:5].lower() == "data:"


def from_data_url(url: str | bytearray, max_bytes: int) -> bytes:
    """Return the bytes of a base64 data: URL. Its media type is ignored; the size is checked before decoding.

    Raises:
        MediaRefusal: 413 above max_bytes, 400 if it is malformed.
    """
    encoded = url.encode(errors="replace") if isinstance(url, str) else url
    header = _DATA.match(encoded, 0, 512)
    if header is None:
        raise MediaRefusal("a data: URL must look like data:image/png;base64,...")
    start = header.end()
    blanks = _BLANKS.search(encoded, max(start, len(encoded) - 20))
    end = len(encoded) if blanks is None else blanks.start()
    if (end - start) // 4 * 3 > max_bytes + 2:
        raise too_large(max_bytes)
    try:
        if encoded.find(b"=", start, end - 2) >= 0:
            raise ValueError("padding before the end")
        # In slices, as each holds the interpreter, and with it every stream, while it is decoded.
        slices = (encoded[at : min(end, at + DECODED_AT_ONCE)] for at in range(start, end, DECODED_AT_ONCE))
        data = b"".join([binascii.a2b_base64(part, strict_mode=True) for part in slices])
    except ValueError:
        raise MediaRefusal("the data: URL is not strict base64: the standard alphabet with padding, no line breaks") from None
    if len(data) > max_bytes:
        raise too_large(max_bytes)
    return data
