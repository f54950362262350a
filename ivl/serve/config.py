"""Limits of a server, and the address on which it listens."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, field

from ivl.serve.media_limits import MediaConfig


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
    """Characters of all texts of a request."""
    max_schema_chars: int = 20_000
    """Characters of a JSON schema."""
    max_schema_depth: int = 32
    """Levels of a JSON schema."""
    max_schema_properties: int = 200
    """Properties of all objects in a JSON schema."""
    max_schema_refs: int = 200
    """References in a JSON schema."""
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
        for name, value in vars(self).items():
            integer = isinstance(value, int) and not isinstance(value, bool)
            least = 0 if name in ("port", "max_queue", "max_videos", "max_images", "max_stop", "max_logprobs") else 1
            if integer and value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
            if isinstance(value, float) and not 0 < value < 1e7:
                raise ValueError(f"{name} must be above 0 and below 10,000,000 seconds, got {value:g}")
        if not all(name.strip() == name != "" for name in self.names):
            raise ValueError(f"names must be words, none of them empty, got {self.names}")
        if self.port > 65535:
            raise ValueError(f"port must be at most 65535, got {self.port}")
        if self.default_new_tokens > self.max_new_tokens:
            raise ValueError(f"default_new_tokens {self.default_new_tokens} is above max_new_tokens {self.max_new_tokens}")

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
