"""Limits of media from outside, and the error for media beyond them."""

from __future__ import annotations

import re
from dataclasses import dataclass

from ivl.errors import InputError

_DOMAIN = re.compile(r"(\*|\.?[a-z0-9_-]+(\.[a-z0-9_-]+)*)(:[0-9]{1,5})?")


class MediaRefusal(InputError):
    """Refuses a medium. The message holds no path, address, base64 or text of a library, and may be shown to anybody.

    status is an HTTP status: 400 unusable, 403 not allowed, 413 too large, 504 too slow.
    """

    def __init__(self, message: str, status: int = 400) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True, kw_only=True)
class MediaConfig:
    """Limits of images and videos in requests."""

    allow_remote: bool = False
    """Fetch http and https addresses; otherwise only data: URLs are taken."""
    allowed_domains: tuple[str, ...] = ()
    """Hosts of remote media: `example.org` is that name, `.example.org` that name and all below it, `*` every public
    name. Ports 80 and 443, or the one given, as in `example.org:8443`."""
    max_bytes: int = 20 << 20
    """Encoded size of an image."""
    max_video_bytes: int = 64 << 20
    """Encoded size of a video."""
    max_pixels: int = 50_000_000
    """Pixels of an image or a video frame."""
    max_side: int = 32_768
    """Width or height of an image or a video frame."""
    max_frames: int = 500
    """Frames of an animated image."""
    max_video_frames: int = 20_000
    """Frames of a video."""
    max_video_seconds: float = 3600.0
    """Length of a video."""
    timeout: float = 20.0
    """Seconds for fetching one medium, redirects included."""
    max_redirects: int = 3
    """Redirects in a row that are followed."""

    def __post_init__(self) -> None:
        for name in ("max_bytes", "max_video_bytes", "max_pixels", "max_side", "max_frames", "max_video_frames"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}")
        for name in ("max_video_seconds", "timeout"):
            if not 0 < getattr(self, name) < 1e6:
                raise ValueError(f"{name} must be above 0 seconds, got {getattr(self, name)}")
        if not 0 <= self.max_redirects <= 20:
            raise ValueError(f"max_redirects must be in 0..20, got {self.max_redirects}")
        for domain in self.allowed_domains:
            if not _DOMAIN.fullmatch(domain):
                raise ValueError(
                    f"allowed_domains: {domain!r} is not a lower-case name such as example.org or .example.org, nor *"
                )
        if self.allow_remote and not self.allowed_domains:
            raise ValueError("allow_remote needs allowed_domains: the names to fetch from, or * for every public one")
