"""A page to talk with the model: pictures and videos in, streamed replies, tiles and boxes to look at (gradio)."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr
from fastapi import FastAPI
from gradio.components import Component
from gradio.themes import Default
from PIL import Image

from ivl.errors import InputError
from ivl.processing.boxes import draw_boxes, parse_boxes
from ivl.processing.chat import user
from ivl.processing.image import load_image
from ivl.processing.processor import Processor
from ivl.serve.config import ServeConfig
from ivl.serve.examples import read_examples
from ivl.serve.inspect import check_image, check_video
from ivl.serve.limits import MediaConfig
from ivl.serve.service import Service, Stream
from ivl.types import VIDEO_SUFFIXES, Conversation, ImageRef, Message, SamplingParams, Text, VideoRef

UPDATES_PER_SECOND = 20
"""The page is redrawn at most so often; every redraw sends the whole reply."""
MAX_TILES_SHOWN = 64
SYSTEM_FONTS = ("system-ui", "sans-serif")
CSS = """
.gradio-container { max-width: 60rem !important; margin: auto }
footer { display: none !important }
"""


@dataclass
class Session:
    """One visitor's conversation; kept on the server, so that pictures are sent once. Changed in place: when a visitor stops
    a reply, gradio drops what its generator would still hand out."""

    messages: Conversation = ()


def build_page(service: Service, processor: Processor, *, title: str, media: MediaConfig, examples: list[dict]) -> gr.Blocks:
    """The page. examples: values of the input box, see `ivl.serve.examples`."""
    talk = Talk(service, processor, media)
    with gr.Blocks(title=title, analytics_enabled=False, delete_cache=(3600, 86400)) as page:
        gr.Markdown(f"### {title}")
        session = gr.State(Session())
        chat = gr.Chatbot(
            show_label=False, height="55vh", buttons=["copy"], feedback_options=None, elem_id="chat", allow_tags=False,
            placeholder="Drop pictures or a video below, paste them, or just ask.",
        )  # fmt: skip
        # "image" and "video" are gradio's words for every such type; what is taken is decided by content.
        box = gr.MultimodalTextbox(
            show_label=False, file_count="multiple", file_types=["image", "video"], placeholder="Ask about the pictures",
            stop_btn=True, submit_btn=True, autofocus=True, elem_id="ask", max_plain_text_length=100_000,
        )  # fmt: skip
        status = gr.Markdown(elem_id="status")
        if examples:
            gr.Examples([[example] for example in examples], [box], label="This model can answer", examples_per_page=6)
        with gr.Accordion("How it answers", open=False):
            controls = sampling_controls(processor)
            clear = gr.Button("New conversation", elem_id="clear")
        with gr.Accordion("What the model sees", open=False, elem_id="sees"):
            tiles = gr.Gallery(label="Tiles", columns=4, height="auto", object_fit="contain", interactive=False, format="png")
        with gr.Accordion("Boxes in the reply", open=False, visible=False) as drawn:
            boxes = gr.Gallery(label="Boxes", columns=2, height="auto", object_fit="contain", interactive=False)

        asked = box.submit(
            talk.ask, [box, chat, session, *controls], [box, chat, session, status, tiles, boxes, drawn],
            api_visibility="private", concurrency_limit=None,
        )  # fmt: skip
        box.stop(None, cancels=[asked], api_visibility="private")
        clear.click(
            lambda: ([], Session(), "", [], []),
            None,
            [chat, session, status, tiles, boxes],
            cancels=[asked],
            api_visibility="private",
        )
    page.queue(default_concurrency_limit=None)
    return page


def sampling_controls(processor: Processor) -> list[Component]:
    most = processor.tiling.max_tiles
    with gr.Row():
        temperature = gr.Slider(0, 2, 0, step=0.05, label="temperature", info="0 always takes the likeliest word")
        top_p = gr.Slider(0.05, 1, 1, step=0.05, label="top p", info="share of probability kept")
    with gr.Row():
        longest = gr.Slider(1, 4096, 512, step=1, label="longest reply", info="tokens")
        num_tiles = gr.Slider(1, max(2, most), most, step=1, label="tiles", info="most pieces a picture is cut into")
    system = gr.Textbox(label="system message", placeholder="the model's own", lines=1)
    return [temperature, top_p, longest, num_tiles, system]


class Talk:
    """From what a visitor sends to what the page shows."""

    def __init__(self, service: Service, processor: Processor, media: MediaConfig) -> None:
        self.service, self.processor, self.media = service, processor, media

    async def ask(
        self, sent: dict[str, Any], shown: list[dict], session: Session, temperature: float, top_p: float, longest: float,
        max_tiles: float, system: str,
    ) -> AsyncIterator[tuple]:  # fmt: skip
        """Values of the input box, chat, session, status line, tiles and boxes, again and again as the reply grows."""
        text, files = (sent.get("text") or "").strip(), [Path(f) for f in sent.get("files") or []]
        if not text and not files:
            yield gr.skip(), shown, session, "Ask something first.", gr.skip(), gr.skip(), gr.skip()
            return
        shown = [*shown, *({"role": "user", "content": {"path": str(file)}} for file in files)]
        shown.append({"role": "user", "content": text or "(no words)"})
        yield gr.MultimodalTextbox(None), shown, session, "Reading …", gr.skip(), [], gr.Accordion(visible=False)
        try:
            message = await asyncio.to_thread(self.message, text, files, int(max_tiles))
            messages = (*session.messages, message)
            conversation = (Message("system", (Text(system.strip()),)), *messages) if system.strip() else messages
            params = SamplingParams(temperature=temperature, top_p=top_p, max_new_tokens=int(longest))
            tiles = await asyncio.to_thread(self.tiles, conversation) if files else gr.skip()
            stream = await self.service.submit(conversation, params)
        except (InputError, ValueError) as error:
            yield (
                {"text": text, "files": [str(f) for f in files]},
                shown[: -1 - len(files)],
                session,
                f"⚠ {error}",
                *[gr.skip()] * 3,
            )
            return
        said, ended = "", "stopped"
        try:
            yield gr.skip(), [*shown, _says("…")], session, "Looking …", tiles, gr.skip(), gr.skip()
            async for said, ended in growing(stream):  # noqa: B007 - the last value counts
                yield gr.skip(), [*shown, _says(said)], session, tally(stream), *[gr.skip()] * 3
        except InputError as error:
            ended = f"⚠ {error}"
        finally:  # the stop button and a visitor who leaves close this generator
            stream.cancel()
            if said.strip():
                session.messages = (*messages, Message("assistant", (Text(said.strip()),)))
        pictures = self.boxes(said, conversation)
        line = f"{tally(stream)}{'' if ended == 'stop' else f' · {ENDINGS.get(ended, ended)}'}"
        yield (
            gr.skip(),
            [*shown, _says(said if said.strip() else "(nothing)")],
            session,
            line,
            gr.skip(),
            pictures,
            gr.Accordion(visible=bool(pictures), open=True),
        )

    def message(self, text: str, files: list[Path], max_tiles: int) -> Message:
        """Files are checked as those of any request are; several pictures are named by number (spec 3.2)."""
        media = [self.medium(file, max_tiles) for file in files]
        kinds = ["<video>" if isinstance(ref, VideoRef) else "<image>" for ref in media]
        if len(kinds) > 1 and "<video>" not in kinds:
            kinds = [f"Image-{n}: {mark}" for n, mark in enumerate(kinds, 1)]
        marks = "" if "<image>" in text or "<video>" in text else "".join(f"{kind}\n" for kind in kinds)
        return user(marks + text, *media)

    def medium(self, file: Path, max_tiles: int) -> ImageRef | VideoRef:
        data = file.read_bytes()
        if file.suffix.lower() in VIDEO_SUFFIXES:
            check_video(data, self.media)
            return VideoRef(data)
        check_image(data, self.media)
        return ImageRef(data, max_tiles)

    def tiles(self, conversation: Conversation) -> list[Image.Image]:
        """The tiles of the conversation, as the ViT gets them."""
        return [Image.fromarray(tile.numpy()) for tile in self.processor.prompt(conversation).tiles_GSSC[:MAX_TILES_SHOWN]]

    def boxes(self, said: str, conversation: Conversation) -> list[tuple[Image.Image, str]]:
        """The last picture with the boxes of the reply."""
        found = parse_boxes(said)
        refs = [part for message in conversation for part in message.content if isinstance(part, ImageRef)]
        if not found.groundings or not refs:
            return []
        caption = ", ".join(g.phrase for g in found.groundings if g.phrase) or f"{len(found.groundings)} boxes"
        return [(draw_boxes(load_image(refs[-1]), found.groundings), caption)]


ENDINGS = {"length": "cut at the longest reply", "stopped": "stopped"}


def _says(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


async def growing(stream: Stream) -> AsyncIterator[tuple[str, str]]:
    """The reply so far and how it ended, not more often than a page can be redrawn."""
    said, ended, last = "", "stopped", 0.0
    clock = asyncio.get_running_loop().time
    async for delta in stream:
        said += delta.text
        ended = delta.finish_reason or ended
        if delta.finish_reason or clock() - last >= 1 / UPDATES_PER_SECOND:
            last = clock()
            yield said, ended


def tally(stream: Stream) -> str:
    """Counts and times of a request, in one line."""
    request = stream.request
    times, count = request.timings(), len(request.tokens)
    parts = [f"{request.num_prompt:,} tokens in" + (f" ({request.num_cached:,} known)" if request.num_cached else "")]
    if request.num_tiles:
        parts.append(f"{request.num_tiles} tiles {times.vision:.2f} s")
    parts.append(f"read in {times.prefill:.2f} s")
    parts.append(f"{count:,} tokens out" + (f", {(count - 1) / times.decode:.0f}/s" if count > 1 and times.decode > 0 else ""))
    return " · ".join(parts)


def add_page(app: FastAPI, service: Service, config: ServeConfig, directory: Path) -> None:
    """Puts the page at /, behind the same guard as every route: with keys, browsers ask for one as password.

    directory: the model's, whose examples are shown.

    Raises:
        InputError: if the examples cannot be read.
    """
    title = config.names[0] if config.names else directory.name
    page = build_page(service, service.processor, title=title, media=config.media, examples=read_examples(directory))
    pictures = str((directory / "examples").resolve())
    theme = Default(font=SYSTEM_FONTS, font_mono=("ui-monospace", "monospace"))  # nothing is fetched elsewhere
    gr.mount_gradio_app(
        app, page, path="/", max_file_size=config.media.max_video_bytes, allowed_paths=[pictures],
        show_error=False, ssr_mode=False, enable_monitoring=False, mcp_server=False, theme=theme, css=CSS, footer_links=[],
    )  # fmt: skip
