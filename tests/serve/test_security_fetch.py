"""S1 and S3: no address leads into the network that the server stands in, no server keeps it busy or fills its memory."""

from __future__ import annotations

import asyncio
import gzip
import time
from collections.abc import Awaitable, Callable
from contextlib import asynccontextmanager

import pytest

from ivl.serve import fetch
from ivl.serve.fetch import Fetcher, is_public
from ivl.serve.media import MediaConfig, MediaGateway, MediaRefusal
from tests.helpers import media as samples

IMAGE = samples.encoded("PNG")
HERE, INSIDE = "127.0.0.1", "127.0.0.2"
"""In these tests the first plays a public address, the second one that is not."""


class Listener:
    """A server on a port of its own, which counts who comes. `answer` gets the path asked for and a writer."""

    def __init__(self, answer: Callable[[str, asyncio.StreamWriter], Awaitable[None]] | None = None) -> None:
        self.answer, self.seen, self.asked = answer, 0, b""

    @asynccontextmanager
    async def on(self, host: str):
        server = await asyncio.start_server(self.serve, host)
        self.port = server.sockets[0].getsockname()[1]
        try:
            yield self
        finally:
            server.close()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.seen += 1
        try:
            self.asked = await reader.readuntil(b"\r\n\r\n")
            if self.answer:
                await self.answer(self.asked.split()[1].decode(), writer)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()


def reply(body: bytes = b"", status: str = "200 OK", **headers: str) -> bytes:
    headers = {"content-length": str(len(body)), **{k.replace("_", "-"): v for k, v in headers.items()}}
    lines = [f"HTTP/1.1 {status}", *(f"{name}: {value}" for name, value in headers.items()), "", ""]
    return "\r\n".join(lines).encode() + body


async def found_at(address: str) -> list[str]:
    return [address]


NAMES = {"good.example": HERE, "other.example": HERE, "inside.example": INSIDE}


async def lookup(host: str, port: int) -> list[str]:
    if host not in NAMES:
        raise OSError("no such name")
    return [NAMES[host]]


def gateway(port: int, **options: object) -> MediaGateway:
    """Fetches from the names of these tests; only HERE passes for public."""
    domains = tuple(f"{name}:{port}" for name in NAMES)
    config = MediaConfig(**{"allow_remote": True, "allowed_domains": domains, "timeout": 2.0, **options})  # type: ignore[arg-type]
    return MediaGateway(config, fetcher=Fetcher(config, lookup=lookup, permitted=lambda address: address == HERE))


HERE_AND_INSIDE = r"""
http://127.0.0.1:{port}/ http://127.0.0.1:{port}/x.png http://127.1:{port}/ http://127.0.1:{port}/ http://0:{port}/
http://0.0.0.0:{port}/ http://2130706433:{port}/ http://0x7f000001:{port}/ http://0x7f.0.0.1:{port}/ http://0177.0.0.1:{port}/
http://017700000001:{port}/ http://127.0.0.1.:{port}/ http://127.127.127.127:{port}/ http://[::1]:{port}/ http://[::]:{port}/
http://[::ffff:127.0.0.1]:{port}/ http://[::ffff:7f00:1]:{port}/ http://[0:0:0:0:0:ffff:127.0.0.1]:{port}/
http://[64:ff9b::7f00:1]:{port}/ http://[2002:7f00:1::]:{port}/ http://[fe80::1%25lo]:{port}/ http://[::127.0.0.1]:{port}/
http://localhost:{port}/ http://LOCALHOST:{port}/ http://localhost.:{port}/ http://169.254.169.254/latest/meta-data
http://[fd00:ec2::254]/latest http://100.100.100.200/ http://168.63.129.16/ http://10.0.0.1/ http://172.16.0.1/
http://192.168.0.1/ http://224.0.0.1/ http://255.255.255.255/ http://good.example\@127.0.0.1:{port}/
http://good.example@127.0.0.1:{port}/ http://user:word@127.0.0.1:{port}/ http://user@good.example:{port}/
http://@127.0.0.1:{port}/ http://good.example:80@127.0.0.1:{port}/ http://127.0.0.1:{port}\@good.example/
http://127.0.0.1:{port}#@good.example/ http://good.example#@127.0.0.1:{port}/ http://127.0.0.1:{port}?@good.example
http:\\127.0.0.1:{port}/ http:/\127.0.0.1:{port}/ http:127.0.0.1:{port}/ http:///127.0.0.1:{port}/ //127.0.0.1:{port}/
127.0.0.1:{port} http://127.0.0.1:{port}%2f@good.example/ http://%31%32%37.0.0.1:{port}/ http://①②⑦.0.0.1:{port}/
http://127。0。0。1:{port}/ http://inside.example:{port}/ http://nothing.example:{port}/ file:///etc/passwd
file://127.0.0.1/etc/passwd FILE:///etc/passwd ftp://127.0.0.1:{port}/ gopher://127.0.0.1:{port}/_GET dict://127.0.0.1:{port}/
ldap://127.0.0.1:{port}/ jar:http://127.0.0.1:{port}/!/ blob:http://127.0.0.1:{port}/ javascript:alert(1) unix:/tmp/x
/etc/passwd ../x.png x.png http://good.example:99999/ http://good.example:-1/ http://good.example:0x50/ http://[::1/ http://
http://. https:// http://..:{port}/
"""
TABLE = [
    *HERE_AND_INSIDE.split(),
    "http://127.0.0.1:{port}/ x",
    " http://127.0.0.1:{port}/",
    "http://127.0.0.1:{port}/\r\nX: y",
    "http://good.example\0/",
    "",
    " ",
]


@pytest.mark.parametrize("remote", [False, True])
def test_s1_no_address_of_the_table_is_ever_connected_to(remote: bool) -> None:
    """More than 60 ways to say "here"; every one refused by rule, and the listener sees nobody, with any domain allowed."""
    assert len(TABLE) >= 60

    async def run() -> None:
        async with Listener().on(HERE) as here, Listener().on(INSIDE) as inside:
            domains = ("*", f"*:{here.port}", f"*:{inside.port}", "good.example")
            config = MediaConfig(allow_remote=remote, allowed_domains=domains, timeout=2.0)

            async def names(host: str, port: int) -> list[str]:
                table = {"localhost": HERE, "inside.example": INSIDE, "good.example": INSIDE}
                return await found_at(table[host]) if host in table else []

            media = MediaGateway(config, fetcher=Fetcher(config, lookup=names))
            for port in (here.port, inside.port):
                for url in TABLE:
                    for get in (media.image, media.video):
                        with pytest.raises(MediaRefusal) as caught:
                            await get(url.replace("{port}", str(port)))
                        assert caught.value.status in (400, 403), url
                        assert "127" not in str(caught.value) and "passwd" not in str(caught.value), caught.value
            assert here.seen == inside.seen == 0

    asyncio.run(run())


PRIVATE = """
0.0.0.0 10.1.2.3 100.64.0.1 127.0.0.1 127.255.255.255 169.254.169.254 172.31.0.1 192.0.0.8 192.0.2.1 192.88.99.1
192.168.1.1 198.18.0.1 198.51.100.1 203.0.113.1 224.0.0.1 239.255.255.255 240.0.0.1 255.255.255.255 168.63.129.16 :: ::1
::ffff:8.8.8.8 ::8.8.8.8 64:ff9b::808:808 64:ff9b:1::1 100::1 2001::1 2001:db8::1 2002:808:808::1 3fff::1 5f00::1 fc00::1
fd00:ec2::254 fe80::1 fe80::1%lo fec0::1 ff02::1 x
"""


@pytest.mark.parametrize("address", PRIVATE.split())
def test_s1_addresses_that_are_not_public(address: str) -> None:
    assert not is_public(address)


def test_s1_public_addresses_are() -> None:
    assert all(map(is_public, ("8.8.8.8", "93.184.216.34", "172.32.0.1", "192.0.3.1", "2606:2800:220:1::1", "2a00:1450::1")))


def test_s1_one_private_address_among_public_ones_spoils_them_all() -> None:
    async def run() -> None:
        async def names(host: str, port: int) -> list[str]:
            return ["93.184.216.34", "127.0.0.1"]

        config = MediaConfig(allow_remote=True, allowed_domains=("*",))
        with pytest.raises(MediaRefusal, match="not on the public internet") as caught:
            await MediaGateway(config, fetcher=Fetcher(config, lookup=names)).image("http://good.example/")
        assert caught.value.status == 403

    asyncio.run(run())


def test_s1_a_name_is_resolved_once_and_the_connection_pinned() -> None:
    """A name that is public when checked and private when asked again: nobody asks again."""

    async def run() -> None:
        async def serve(path: str, writer: asyncio.StreamWriter) -> None:
            writer.write(reply(IMAGE))

        async with Listener(serve).on(HERE) as here, Listener().on(INSIDE) as inside:
            answers = [HERE, INSIDE, INSIDE]

            async def flips(host: str, port: int) -> list[str]:
                return [answers.pop(0)]

            config = MediaConfig(allow_remote=True, allowed_domains=(f"*:{here.port}",))
            media = MediaGateway(config, fetcher=Fetcher(config, lookup=flips, permitted=lambda address: address == HERE))
            assert (await media.image(f"http://good.example:{here.port}/a.png")).source == IMAGE
            assert len(answers) == 2 and here.seen == 1
            with pytest.raises(MediaRefusal, match="not on the public internet"):  # the next request looks again
                await media.image(f"http://good.example:{here.port}/a.png")
            assert here.seen == 1 and inside.seen == 0
            assert b"Host: good.example" in here.asked and b"identity" in here.asked and b"Cookie" not in here.asked

    asyncio.run(run())


def test_s1_no_other_name_passes_the_pin() -> None:
    with pytest.raises(OSError):
        asyncio.run(fetch._Pinned("good.example", [HERE]).resolve("other.example", 80))


@pytest.mark.parametrize("hops", [0, 1, 2, 3, 4, 5])
@pytest.mark.parametrize(
    "target",
    [
        "http://inside.example:{port}/",
        "http://127.0.0.2:{port}/",
        "//inside.example:{port}/",
        "http://good.example@127.0.0.2:{port}/",
        "file:///etc/passwd",
        "http:\\\\127.0.0.2:{port}/",
    ],
)
def test_s1_every_hop_is_checked_again(hops: int, target: str) -> None:
    """0 to 5 honest redirects, then one to the inside."""

    async def run() -> None:
        async with Listener().on(INSIDE) as inside:

            async def serve(path: str, writer: asyncio.StreamWriter) -> None:
                left = int(path.rsplit("/", 1)[1])
                where = f"/to/{left - 1}" if left else target.replace("{port}", str(inside.port))
                writer.write(reply(status="302 Found", location=where, set_cookie="a=b"))

            async with Listener(serve).on(HERE) as here:
                domains = (f"*:{here.port}", f"*:{inside.port}")
                media = gateway(here.port, allowed_domains=domains, max_redirects=6)
                with pytest.raises(MediaRefusal) as caught:
                    await media.image(f"http://good.example:{here.port}/from/{hops}")
                assert caught.value.status in (400, 403) and "redirects more" not in str(caught.value)
                assert (here.seen, inside.seen) == (hops + 1, 0)

    asyncio.run(run())


def test_s1_redirects_are_followed_up_to_the_limit() -> None:
    async def run() -> None:
        async def serve(path: str, writer: asyncio.StreamWriter) -> None:
            left = int(path.removeprefix("/"))
            writer.write(reply(status="307 Temporary Redirect", location=f"/{left - 1}") if left else reply(IMAGE))

        async with Listener(serve).on(HERE) as here:
            media = gateway(here.port, max_redirects=3)
            assert (await media.image(f"http://good.example:{here.port}/3")).source == IMAGE
            with pytest.raises(MediaRefusal, match="redirects more than 3 times"):
                await media.image(f"http://good.example:{here.port}/4")
            assert here.seen == 8

    asyncio.run(run())


def test_s1_off_unless_switched_on_and_only_for_the_names_given() -> None:
    def status(url: str, *domains: str, remote: bool = True) -> int:
        config = MediaConfig(allow_remote=remote, allowed_domains=domains)
        try:
            Fetcher(config).checked(url)
        except MediaRefusal as error:
            return error.status
        return 200

    assert status("https://good.example/a", "good.example", remote=False) == 403
    assert status("https://good.example/a", "good.example") == status("http://GOOD.example:80/a", "good.example") == 200
    for url in (
        "https://evil.example/",
        "https://a.good.example/",
        "https://good.example.evil.org/",
        "https://evilgood.example/",
    ):
        assert status(url, "good.example") == 403
    assert status("https://a.b.good.example/", ".good.example") == status("https://good.example/", ".good.example") == 200
    assert status("https://evilgood.example/", ".good.example") == 403
    assert status("https://good.example:8443/", "good.example") == status("https://good.example/", "good.example:8443") == 403
    assert status("https://good.example:8443/", "good.example:8443") == 200
    assert status("https://anything.example/", "*") == 200 and status("https://anything.example:22/", "*") == 403


def test_s1_proxies_of_the_environment_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> None:
        async def serve(path: str, writer: asyncio.StreamWriter) -> None:
            writer.write(reply(IMAGE))

        async with Listener(serve).on(HERE) as here, Listener().on(INSIDE) as proxy:
            for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "https_proxy"):
                monkeypatch.setenv(name, f"http://{INSIDE}:{proxy.port}")
            await gateway(here.port).image(f"http://good.example:{here.port}/")
            assert (here.seen, proxy.seen) == (1, 0)

    asyncio.run(run())


def fetched(answer: Callable[[asyncio.StreamWriter], Awaitable[None]], **limits: object) -> tuple[MediaRefusal | bytes, float]:
    """What the gateway makes of a server, and after how many seconds."""

    async def run() -> tuple[MediaRefusal | bytes, float]:
        async with Listener(lambda path, writer: answer(writer)).on(HERE) as here:
            media = gateway(here.port, **limits)
            start = time.monotonic()
            try:
                outcome = (await media.image(f"http://good.example:{here.port}/")).source
                assert isinstance(outcome, bytes)
            except MediaRefusal as error:
                outcome = error
            return outcome, time.monotonic() - start

    return asyncio.run(run())


def refused(answer: Callable[[asyncio.StreamWriter], Awaitable[None]], status: int, **limits: object) -> float:
    error, seconds = fetched(answer, **limits)
    assert isinstance(error, MediaRefusal) and error.status == status, error
    return seconds


SENT = 0


async def pour(writer: asyncio.StreamWriter, piece: bytes = bytes(1 << 16), pause: float = 0.0) -> None:
    global SENT
    SENT = 0
    for _ in range(100_000):
        writer.write(piece)
        await writer.drain()
        SENT += len(piece)
        await asyncio.sleep(pause)


@pytest.mark.parametrize(
    "head", [b"", b"Transfer-Encoding: chunked\r\n", b"Content-Length: 1000\r\n", b"Content-Length: 99999999999\r\n"]
)
def test_s3_endless_bodies_end_at_the_cap(head: bytes) -> None:
    async def serve(writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\n" + head + b"\r\n")
        await pour(writer, b"10000\r\n" + bytes(1 << 16) + b"\r\n" if b"chunked" in head else bytes(1 << 16))

    short = b" 1000\r" in head  # what goes beyond the length given is not read; what is left is no image
    assert refused(serve, 400 if short else 413, max_bytes=1 << 20) < 1
    assert SENT < 16 << 20  # the cap, and what lies in the buffers of two sockets


def test_s3_slow_servers_end_at_the_deadline() -> None:
    async def silent(writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(5)

    async def slow_head(writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nX: ")
        await pour(writer, b"x", 0.01)

    async def slow_body(writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 5000\r\n\r\n")
        await pour(writer, b"x", 0.01)

    for serve in (silent, slow_head, slow_body):
        assert 0.2 < refused(serve, 504, timeout=0.3) < 1.3


def test_s3_slow_redirects_share_one_deadline() -> None:
    async def serve(writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(0.15)
        writer.write(reply(status="302 Found", location="/again"))

    assert refused(serve, 504, timeout=0.5, max_redirects=20) < 1.5


def test_s3_slow_names_end_at_the_deadline() -> None:
    async def run() -> None:
        async def names(host: str, port: int) -> list[str]:
            await asyncio.sleep(5)
            return [HERE]

        config = MediaConfig(allow_remote=True, allowed_domains=("*",), timeout=0.2)
        with pytest.raises(MediaRefusal, match=r"within 0.2 s"):
            await MediaGateway(config, fetcher=Fetcher(config, lookup=names)).image("http://good.example/")

    asyncio.run(run())


def test_s3_lengths_and_types_are_only_claims() -> None:
    async def serve(writer: asyncio.StreamWriter) -> None:
        writer.write(head + IMAGE)

    head = reply(content_type="text/html", content_length=str(len(IMAGE)))
    assert fetched(serve)[0] == IMAGE
    head = b"HTTP/1.0 200 OK\r\n\r\n"
    assert fetched(serve)[0] == IMAGE
    head = reply(content_length=str(len(IMAGE) + 100))
    refused(serve, 400)
    head = reply(content_length=str(99 << 20))
    refused(serve, 413)
    head = reply(content_length="-5")
    refused(serve, 400)


def test_s3_nothing_is_unpacked() -> None:
    bomb = gzip.compress(bytes(50 << 20))

    async def serve(writer: asyncio.StreamWriter) -> None:
        writer.write(head + bomb)

    for encoding in ("gzip", "deflate", "br", "gzip, gzip", "zstd"):
        head = reply(content_encoding=encoding, content_length=str(len(bomb)))
        refused(serve, 400)
    head = reply(content_length=str(len(bomb)), content_type="image/png")
    error, _ = fetched(serve)
    assert "is an archive" in str(error)


def test_s3_nonsense_is_a_clean_400() -> None:
    async def serve(writer: asyncio.StreamWriter) -> None:
        writer.write(answer)

    answers = (
        b"",
        b"hello",
        b"HTTP/1.1 200 OK\r\n" + b"a: b\r\n" * 100_000,
        b"HTTP/1.1 200 OK\r\nX: " + b"x" * 100_000,
        b"HTTP/1.1 abc\r\n\r\n",
        reply(status="404 Not Found"),
        reply(status="302 Found"),
        reply(status="206 Partial Content"),
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        reply(status="302 Found", location="http://[::1"),
    )
    for answer in answers:
        error, _ = fetched(serve, timeout=2.0)
        assert isinstance(error, MediaRefusal) and error.status in (400, 403), answer[:60]
        assert "good.example" not in str(error) and "127" not in str(error)
