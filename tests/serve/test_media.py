"""What comes in is what the model sees; what may not come in is refused with a status and a clean word."""

from __future__ import annotations

import asyncio
import base64

import numpy as np
import pytest
from PIL import Image

from ivl.config import TilingConfig
from ivl.cpu.jpeg import FastLoader
from ivl.processing.image import load_image, tile_image
from ivl.processing.video import load_frames
from ivl.serve.media import MediaConfig, MediaGateway, MediaRefusal
from ivl.types import ImageRef, VideoRef
from tests.helpers import media as samples
from tests.helpers.media import data_url


def image(url: str, **limits: object) -> ImageRef:
    return asyncio.run(MediaGateway(MediaConfig(**limits)).image(url))  # type: ignore[arg-type]


def video(url: str, **limits: object) -> VideoRef:
    return asyncio.run(MediaGateway(MediaConfig(**limits)).video(url, num_frames=3))  # type: ignore[arg-type]


def refused(url: str, *, status: int = 400, match: str = ".", get=image, **limits: object) -> None:
    with pytest.raises(MediaRefusal, match=match) as caught:
        get(url, **limits)
    assert caught.value.status == status, caught.value


@pytest.mark.parametrize("name", samples.good())
def test_every_kind_becomes_the_pixels_of_the_processor(name: str) -> None:
    data = samples.good()[name]
    ref = image(data_url(data, "text/html" if name == "png" else "image/png"))  # the media type is only a claim
    assert ref == ImageRef(data) and load_image(ref).mode == "RGB"
    shown = load_image(ref).size
    assert shown == ((48, 64) if name == "jpeg turned" else (6, 5) if name == "png 16 bit" else (64, 48))
    assert np.array_equal(FastLoader()(ref), np.asarray(load_image(ImageRef(data))))


@pytest.mark.parametrize(("width", "height"), [(1, 1), (1, 20_000), (20_000, 1), (3, 2000)])
def test_extreme_shapes_are_answered(width: int, height: int) -> None:
    """Each a crash of some server."""
    ref = image(data_url(samples.encoded("PNG", Image.new("RGB", (width, height), "red"))))
    tiles = tile_image(FastLoader()(ref), TilingConfig())
    assert tiles.shape[1:] == (448, 448, 3) and tiles[0, 0, 0].tolist() == [255, 0, 0]


def test_max_tiles_go_along() -> None:
    gateway = MediaGateway()
    assert asyncio.run(gateway.image(data_url(samples.encoded("PNG")), max_tiles=3)).max_tiles == 3


@pytest.mark.parametrize(
    "url",
    ["data:image/png,abc", "data:image/png;base64", "data:;base64 ,AAAA", "data:image/png;base64,AA AA",
     "data:image/png;base64,AAA",
     "data:image/png;base64,AA\nAA", "data:image/png;base64,AA-_", "data:image/png;base64,====",
     "data:image/png;base64,%41AAA",
     "data:image/png;base64,AAAAé", "data:" + "a" * 1000 + ";base64,AAAA", "data:", "data:image/png;base64,AA==AA=="],
)  # fmt: skip
def test_malformed_data_urls(url: str) -> None:
    refused(url, match="data: URL")


def test_sizes_are_checked_before_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    data = samples.encoded("PNG")
    assert image(data_url(data), max_bytes=len(data))
    refused(data_url(data), max_bytes=len(data) - 1, status=413)
    monkeypatch.setattr(base64, "b64decode", None)
    refused(data_url(bytes(10_000)), max_bytes=9000, status=413, match="more than 9,000 bytes")


def test_large_base64_stops_no_stream() -> None:
    """133 MB took another server two minutes; here the loop goes on."""
    url = data_url(samples.encoded("PNG") + bytes(30_000_000))

    async def beats() -> int:
        gateway, count = MediaGateway(MediaConfig(max_bytes=40 << 20)), 0
        task = asyncio.create_task(gateway.image(url))
        while not task.done():
            await asyncio.sleep(0.001)
            count += 1
        await task
        return count

    assert asyncio.run(beats()) >= 3


def test_other_formats_are_refused_by_name() -> None:
    for form, name in {"TIFF": "TIFF", "JPEG2000": "JPEG 2000", "BMP": "BMP", "PDF": "PDF", "EPS": "PostScript"}.items():
        refused(data_url(samples.encoded(form)), match=f"the image is {name}; send PNG, JPEG, WebP or GIF")
    for text, name in {
        "<svg xmlns=''/>": "SVG",
        "<?xml version='1.0'?><svg/>": "SVG",
        " <!DOCTYPE html>": "a web page",
    }.items():
        refused(data_url(text.encode()), match=name)
    refused(data_url(samples.encoded("PPM")), match="unknown format")
    refused(data_url(b""), match="empty")


def test_limits_have_edges() -> None:
    data = data_url(samples.encoded("PNG"))
    assert image(data, max_pixels=64 * 48, max_side=64)
    refused(data, max_pixels=64 * 48 - 1, status=413, match="64 x 48 pixels")
    refused(data, max_side=63, status=413)
    assert image(data_url(samples.gif(9)), max_frames=9)
    refused(data_url(samples.gif(10)), max_frames=9, status=413, match="animation of more than 9 frames")
    moving = samples.good()["webp moving"]
    refused(data_url(moving), max_frames=1, status=413)
    assert image(data_url(moving), max_pixels=4 * 64 * 48) and image(data_url(samples.encoded("WEBP")), max_pixels=64 * 48)
    refused(data_url(moving), max_pixels=4 * 64 * 48 - 1, status=413, match="animated WebP of more than 3,071 pixels")


@pytest.mark.parametrize("form", ["mp4", "mov", "matroska", "avi"])
def test_videos_are_read_from_memory(form: str) -> None:
    ref = video(data_url(samples.video(form=form), "video/mp4"))
    assert isinstance(ref.source, bytes) and ref.num_frames == 3
    assert [round(np.asarray(frame).mean()) for frame in load_frames(ref, 3)] == pytest.approx([20, 25, 35], abs=2)


def test_a_gif_is_a_video_too() -> None:
    assert len(load_frames(video(data_url(samples.good()["gif moving"])), 2)) == 2


def test_limits_of_videos() -> None:
    url = data_url(samples.video(frames=5, rate=1))
    assert video(url, max_video_frames=5, max_pixels=64 * 48)
    refused(url, get=video, max_video_frames=4, status=413, match="more than 4 frames")
    refused(url, get=video, max_pixels=64 * 48 - 1, status=413)
    refused(url, get=video, max_video_seconds=4, status=413, match="longer than 4 s")
    refused(url, get=video, max_video_bytes=900, status=413)


def test_videos_that_are_none() -> None:
    refused(data_url(samples.encoded("PNG")), get=video, match="unknown format")
    refused(data_url(b""), get=video, match="empty")
    refused(data_url(samples.video()[:600]), get=video, match="damaged|no pictures")
    refused(data_url(samples.video("jpeg2000", "mov")), get=video, match="codec is not taken")
    lists = (
        b"#EXTM3U\n#EXTINF:1,\nhttp://127.0.0.1/x.ts\n", b"ffconcat version 1.0\nfile /etc/passwd\n",
        b"v=0\nm=video 5004 RTP/AVP 96\n", b"RIFF\x10\0\0\0WAVEfmt ", b"\x00\x00\x01\xba" + bytes(64),
    )  # fmt: skip
    for text in lists:
        refused(data_url(text, "application/vnd.apple.mpegurl"), get=video, match="unknown format")


def test_configs_are_checked() -> None:
    for wrong in (
        {"max_bytes": 0}, {"timeout": 0}, {"max_redirects": -1}, {"max_redirects": 99}, {"allow_remote": True},
        {"allow_remote": True, "allowed_domains": ("http://a.org",)}, {"allowed_domains": ("A.org",)},
        {"allowed_domains": ("*.a.org",)},
    ):  # fmt: skip
        with pytest.raises(ValueError):
            MediaConfig(**wrong)
