"""Limits of a server, and the address on which it listens."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass, field
from typing import Any

_DOMAIN = re.compile(r"(\*|\.?[a-z0-9_-]+(\.[a-z0-9_-]+)*)(:[0-9]{1,5})?")

_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://([a-z0-9._-]+|\[[0-9a-f:.]+\])(:[0-9]{1,5})?")
"""As browsers write it. Neither `*` nor `null`, under which any page could come."""


def _check_numbers(config: Any, zero: tuple[str, ...]) -> None:
    """Raise ValueError for a whole number below 1, or below 0 for those in zero, or seconds that are no time."""
    for name, value in vars(config).items():
        integer, least = isinstance(value, int) and not isinstance(value, bool), int(name not in zero)
        if integer and value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
        if isinstance(value, float) and not 0 < value < 1e7:
            raise ValueError(f"{name} must be above 0 and below 10,000,000 seconds, got {value:g}")


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
        _check_numbers(self, zero=("max_redirects",))
        if self.max_redirects > 20:
            raise ValueError(f"max_redirects must be at most 20, got {self.max_redirects}")
        for domain in self.allowed_domains:
            if not _DOMAIN.fullmatch(domain):
                raise ValueError(
                    f"allowed_domains: {domain!r} is not a lower-case name such as example.org or .example.org, nor *"
                )
        if self.allow_remote and not self.allowed_domains:
            raise ValueError("allow_remote needs allowed_domains: the names to fetch from, or * for every public one")


@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """Limits and addresses of a server. A request above a limit is refused with the limit in the message."""

    host: str = "127.0.0.1"
    """Address to listen on. An address that other machines can reach needs a key, or no_key."""
    port: int = 8000
    """Port to listen on; 0 takes a free one."""
    no_key: bool = False
    """Listen on any address without a key: everybody who reaches the port may use the model."""
    allowed_hosts: tuple[str, ...] = ()
    """Names that a Host header may hold. By default any with a key, and this machine's own without one, so that no web
    page can reach the server through a name of its own."""
    allow_origin: tuple[str, ...] = ()
    """Origins, such as `https://chat.example.org`, whose pages in a browser may use the server (CORS). By default none may."""
    names: tuple[str, ...] = ()
    """Names of the model for clients; responses carry the first."""

    max_running: int = 64
    """Replies generated together."""
    max_queue: int = 128
    """Replies that may wait; more get status 429."""
    max_n: int = 8
    """Replies to one prompt."""
    max_body_bytes: int = 64 << 20
    """Size of a request."""
    max_held_bytes: int = 512 << 20
    """Size of all requests that are read or wait to be prepared."""
    max_json_items: int = 50_000
    """Texts, keys, lists, objects and commas in the JSON of a request; token ids of a prompt count as one each."""
    max_messages: int = 1000
    """Messages of a conversation."""
    max_images: int = 32
    """Images of a conversation."""
    max_videos: int = 4
    """Videos of a conversation."""
    max_frames: int = 64
    """Frames taken from a video."""
    max_pixels_per_request: int = 500_000_000
    """Pixels of all images and frames of a request. Of the frames that a video has beside those taken, 16 count as one."""
    max_image_tiles: int = 40
    """Tiles that a request may ask for per image."""
    max_request_tiles: int = 128
    """Tiles of all images and frames of a request."""
    max_text_chars: int = 400_000
    """Characters of all texts of a request. In UTF-8 they may have one and a half times as many bytes."""
    max_schema_chars: int = 20_000
    """Characters of a JSON schema."""
    max_schema_depth: int = 32
    """Levels of a JSON schema."""
    max_schema_properties: int = 200
    """Properties of all objects in a JSON schema."""
    max_schema_refs: int = 200
    """References in a JSON schema."""
    max_tools: int = 128
    """Tools that a request may offer."""
    max_prompt_tokens: int | None = None
    """Tokens of a prompt; by default what the context holds."""
    max_new_tokens: int = 4096
    """Tokens that a request may ask for."""
    default_new_tokens: int = 1024
    """Tokens of a reply whose request names no limit."""
    max_stop: int = 4
    """Stop strings of a request."""
    max_stop_chars: int = 256
    """Characters of a stop string."""
    max_logprobs: int = 20
    """Alternatives per token."""

    prepare_threads: int = 2
    """Threads that decode images and tokenize."""
    request_timeout: float = 600.0
    """Seconds for a whole reply, including the time in the queue."""
    body_timeout: float = 60.0
    """Seconds for a client to send its request."""
    header_timeout: float = 10.0
    """Seconds for a client to send the headers of a request."""
    write_timeout: float = 30.0
    """Seconds that a client may leave a full buffer unread."""
    keep_alive: float = 15.0
    """Seconds that an idle connection is kept."""
    ping: float = 15.0
    """Seconds of silence after which a stream carries a comment."""
    shutdown_timeout: float = 30.0
    """Seconds that running replies may take after SIGTERM."""
    max_connections: int = 1000
    """Open connections."""

    media: MediaConfig = field(default_factory=MediaConfig)
    """Limits of single images and videos, and whether remote ones are fetched."""

    def __post_init__(self) -> None:
        _check_numbers(self, zero=("port", "max_queue", "max_videos", "max_images", "max_stop", "max_logprobs"))
        if not all(name.strip() == name != "" for name in self.names):
            raise ValueError(f"names must be words, none of them empty, got {self.names}")
        for origin in self.allow_origin:
            if not _ORIGIN.fullmatch(origin):
                raise ValueError(f"allow_origin: {origin!r} is not an origin such as https://chat.example.org or app://notes")
        if self.port > 65535:
            raise ValueError(f"port must be at most 65535, got {self.port}")
        if self.default_new_tokens > self.max_new_tokens:
            raise ValueError(f"default_new_tokens {self.default_new_tokens} is above max_new_tokens {self.max_new_tokens}")

    @property
    def max_text_bytes(self) -> int:
        """Size in UTF-8 of all texts of a request: a tokenizer takes time and memory by the byte."""
        return self.max_text_chars * 3 // 2

    @property
    def max_json_bytes(self) -> int:
        """Size of a request beside its media: all text may be escaped, at 12 bytes a character."""
        return 12 * self.max_text_chars + (1 << 20)

    @property
    def is_local(self) -> bool:
        """Whether only this machine can reach the address."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False
