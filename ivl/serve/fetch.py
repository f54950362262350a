"""Fetches remote media without giving clients access to the network that the server stands in (SSRF).

One parser reads an address: yarl, by which aiohttp connects. Only allowed names pass, no addresses in numbers. Each name is
resolved once, every address is checked, and the connection is pinned to them. A redirect is a new address. Bytes and time are
limited while reading.
"""

from __future__ import annotations

import asyncio
import ipaddress
import re
import socket
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult
from yarl import URL

from ivl.serve.config import MediaConfig
from ivl.serve.errors import MediaRefusal

MAX_URL = 8192
MAX_FETCHES = 16
"""Fetches at the same time. Others wait, and their timeout includes the wait."""
REDIRECTS = (301, 302, 303, 307, 308)
PORTS = {"http": 80, "https": 443}
_NAME = re.compile(r"(?=.{1,253}\Z)([a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?\.)*[a-z]([a-z0-9-]{0,61}[a-z0-9])?")
"""A host name. Its last label begins with a letter, so that no way of writing an address is one."""
_NOT_PUBLIC = [
    ipaddress.ip_network(block)
    for block in (
        # IANA's special-purpose blocks, multicast, reserved blocks, and the virtual machine host of Azure.
        "0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12", "192.0.0.0/24",
        "192.0.2.0/24", "192.31.196.0/24", "192.52.193.0/24", "192.88.99.0/24", "192.168.0.0/16", "192.175.48.0/24",
        "198.18.0.0/15", "198.51.100.0/24", "203.0.113.0/24", "224.0.0.0/4", "240.0.0.0/4", "168.63.129.16/32",
        # The same inside 2000::/3; 2001::/23 holds Teredo, 2002::/16 is 6to4.
        "2001::/23", "2001:db8::/32", "2002::/16", "2620:4f:8000::/48", "3fff::/20",
    )
]  # fmt: skip
_UNICAST6 = ipaddress.ip_network("2000::/3")

Lookup = Callable[[str, int], Awaitable[list[str]]]
"""Addresses of a name, as text, given name and port."""


def is_public(address: str) -> bool:
    """Whether an address is global unicast. One that embeds another (mapped, NAT64, 6to4, Teredo) is not."""
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:
        return False
    if ip.version == 6 and ip not in _UNICAST6:
        return False
    return not any(ip.version == block.version and ip in block for block in _NOT_PUBLIC)


class Fetcher:
    """Fetches remote media within the limits. `lookup` and `permitted` are for tests."""

    def __init__(
        self, config: MediaConfig, *, lookup: Lookup | None = None, permitted: Callable[[str], bool] = is_public
    ) -> None:
        self.config = config
        self._lookup = lookup or self._system_lookup
        self._permitted = permitted
        self._names = ThreadPoolExecutor(4, "ivl-names")  # slow name servers keep no other thread busy
        self._slots = asyncio.Semaphore(MAX_FETCHES)

    async def get(self, url: str, max_bytes: int) -> bytes:
        """Return the body at an http or https address.

        Raises:
            MediaRefusal: 403 if it may not be fetched, 413 above max_bytes, 504 above config.timeout, else 400.
        """
        try:
            async with asyncio.timeout(self.config.timeout), self._slots:
                return await self._follow(self.checked(url), max_bytes)
        except TimeoutError:
            raise MediaRefusal(f"the medium was not fetched within {self.config.timeout:g} s", 504) from None
        except MediaRefusal:
            raise
        except (aiohttp.ClientError, OSError, ValueError):
            raise MediaRefusal("the medium cannot be fetched: its server cannot be reached or does not speak HTTP") from None

    def checked(self, text: str, base: URL | None = None) -> URL:
        """Return the address to connect to, relative to base.

        Raises:
            MediaRefusal: if it is malformed (400) or not allowed (403).
        """
        if not self.config.allow_remote:
            raise MediaRefusal("this server fetches no media; send them as data: URLs", 403)
        if len(text) > MAX_URL or any(not "!" <= c <= "~" or c == "\\" for c in text):
            raise MediaRefusal(
                "the URL is too long, or has blanks, backslashes, control or non-ASCII characters; percent-encode it"
            )
        try:
            url = base.join(URL(text)) if base else URL(text)
            scheme, host, port = url.scheme, url.raw_host or "", url.port
            has_login = url.raw_user is not None or url.raw_password is not None or "@" in url.raw_authority
        except ValueError:
            raise MediaRefusal("the URL is malformed") from None
        if scheme not in PORTS:
            raise MediaRefusal("media are taken from data:, http: and https: URLs only")
        if has_login:
            raise MediaRefusal("the URL holds a user name or password; media are fetched without")
        if not _NAME.fullmatch(host):
            raise MediaRefusal("the URL needs a host name; addresses in numbers are refused", 403)
        if base and base.scheme == "https" and scheme == "http":
            raise MediaRefusal("the medium's server redirects from https to http; refused", 403)
        if not any(_allows(entry, host, port, PORTS[scheme]) for entry in self.config.allowed_domains):
            raise MediaRefusal("the URL's domain and port are not among those that this server fetches media from", 403)
        return url

    async def _follow(self, url: URL, max_bytes: int) -> bytes:
        for _ in range(self.config.max_redirects + 1):
            pinned = _Pinned(url.raw_host or "", await self._addresses(url))
            connector = aiohttp.TCPConnector(resolver=pinned, use_dns_cache=False, force_close=True, limit=1)
            async with (
                aiohttp.ClientSession(
                    connector=connector,
                    cookie_jar=aiohttp.DummyCookieJar(),
                    auto_decompress=False,
                    trust_env=False,
                    timeout=aiohttp.ClientTimeout(total=None),  # one deadline holds for all hops
                    headers={"Accept-Encoding": "identity", "User-Agent": "ivl"},
                ) as session,
                session.get(url, allow_redirects=False) as response,
            ):
                if response.status not in REDIRECTS:
                    return await _body(response, max_bytes)
                url = self.checked(response.headers.get("Location", ""), url)
        raise MediaRefusal(f"the medium's server redirects more than {self.config.max_redirects} times")

    async def _addresses(self, url: URL) -> list[str]:
        """Return all addresses of the host. One address that is not public refuses the host."""
        try:
            addresses = await self._lookup(url.raw_host or "", url.port or 0)
        except (OSError, UnicodeError):
            addresses = []
        if not addresses:
            raise MediaRefusal("the URL's host is unknown")
        if not all(self._permitted(address) for address in addresses):
            raise MediaRefusal("the URL's host is not on the public internet", 403)
        return addresses

    async def _system_lookup(self, host: str, port: int) -> list[str]:
        loop = asyncio.get_running_loop()
        places = await loop.run_in_executor(self._names, lambda: socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))
        return list(dict.fromkeys(str(place[0]) for *_, place in places))


class _Pinned(AbstractResolver):
    """Resolves one name to the addresses that were checked."""

    def __init__(self, host: str, addresses: list[str]) -> None:
        self._host, self._addresses = host, addresses

    async def resolve(
        self,
        host: str,
        port: int = 0,
        family: int = socket.AF_UNSPEC,  # noqa: ARG002, aiohttp asks for it
    ) -> list[ResolveResult]:
        if host != self._host:
            raise OSError("a name other than the one that was checked")
        return [
            ResolveResult(
                hostname=host,
                host=address,
                port=port,
                family=socket.AF_INET6 if ":" in address else socket.AF_INET,
                proto=socket.IPPROTO_TCP,
                flags=socket.AI_NUMERICHOST,
            )
            for address in self._addresses
        ]

    async def close(self) -> None:
        pass


def _allows(entry: str, host: str, port: int | None, usual: int) -> bool:
    name, _, own_port = entry.partition(":")
    if port != (int(own_port) if own_port else usual):
        return False
    return name == "*" or host == name.removeprefix(".") or (name.startswith(".") and host.endswith(name))


async def _body(response: aiohttp.ClientResponse, max_bytes: int) -> bytes:
    """Return the body as sent: never decompressed, and never more than max_bytes, whatever the headers claim."""
    if response.status != 200:
        raise MediaRefusal(f"the medium's server answers with status {response.status}")
    if response.headers.get("Content-Encoding", "identity").lower() != "identity":
        raise MediaRefusal("the medium's server sends it compressed; refused")
    if (response.content_length or 0) > max_bytes:
        raise too_large(max_bytes)
    body = bytearray()
    async for chunk in response.content.iter_chunked(1 << 16):
        body += chunk
        if len(body) > max_bytes:
            raise too_large(max_bytes)
    return bytes(body)


def too_large(max_bytes: int) -> MediaRefusal:
    """Return the error for a medium above the limit."""
    return MediaRefusal(f"the medium has more than {max_bytes:,} bytes", 413)
