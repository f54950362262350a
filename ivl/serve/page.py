"""The page: a chat with images and videos, streamed replies, tiles and boxes to look at (gradio)."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import gradio as gr
from fastapi import FastAPI
from gradio.components import Component
from gradio.themes import Default
from gradio.utils import get_upload_folder

from ivl.serve.config import ServeConfig
from ivl.serve.examples import read_examples
from ivl.serve.page_chat import PageChat, PageSession, PageSettings
from ivl.serve.page_gate import PageGate
from ivl.serve.service import Service
from ivl.types import SamplingParams

KEPT = (600, 7200)
"""Seconds between two searches for old files of visitors, and the age at which a file is old."""
FORGOTTEN = 7200
"""Seconds of silence after which a conversation is forgotten."""
DIRECTORY = "GRADIO_TEMP_DIR"
MATHS = [
    {"left": left, "right": right, "display": left in ("$$", "\\[")}
    for left, right in (("$$", "$$"), ("\\[", "\\]"), ("\\(", "\\)"))
]
CSS = """
.gradio-container { width: 100%; min-width: 0; max-width: min(60rem, 100vw) !important }
.gradio-container { margin: auto; padding: .5rem !important }
.gradio-container > .main { padding: .25rem !important }
footer, #chat [aria-label=Clear], #chat [aria-label=Share], #tiles [aria-label=Share] { display: none !important }
#chat { height: calc(100dvh - 24rem) !important; min-height: 20rem }
#chat img, #chat video { max-height: 14rem; width: auto; max-width: 100%; object-fit: contain }
#chat .message { overflow-wrap: anywhere }
#chat .placeholder { padding: 1rem; text-align: center }
#status { min-height: 1.5rem; padding: 0 .25rem }
#status p { margin: 0; font-size: .85rem; overflow-wrap: anywhere }
.gradio-container:has(#status .running) #ask .submit-button { display: none }
.gradio-container:not(:has(#status .running)) #ask .stop-button { display: none }
#title h1 { font-size: 1.1rem; margin: 0; overflow-wrap: anywhere }
#examples .gallery-item { padding: .25rem .5rem; font-size: .85rem }
#examples .gallery-item img { width: 2.5rem; height: 2.5rem; object-fit: cover }
#tiles .grid-wrap { max-height: none; min-height: 0 }
#tiles .grid-container { grid-template-columns: repeat(auto-fill, minmax(7rem, 1fr)) }
"""


def build_page(page_chat: PageChat, *, title: str, examples: list[dict[str, Any]]) -> gr.Blocks:
    """Lay out the page. examples: values of the input box, see `ivl.serve.examples`."""
    with gr.Blocks(title=title, analytics_enabled=False, delete_cache=KEPT) as page:
        with gr.Row(equal_height=True):
            gr.Markdown(f"# {title}", elem_id="title", sanitize_html=True)
            clear = gr.Button("New conversation", size="sm", scale=0, min_width=150, elem_id="clear")
        session = gr.State(PageSession(), time_to_live=FORGOTTEN, delete_callback=PageSession.clear)
        chat = gr.Chatbot(
            show_label=False, buttons=["copy"], feedback_options=None, elem_id="chat", allow_tags=False, reasoning_tags=[],
            latex_delimiters=MATHS, placeholder="Drop images or a video below, paste them, or just ask.",
        )  # fmt: skip
        status = gr.Markdown(elem_id="status", container=False)
        # "image" and "video" are gradio's words for every such type; the gateway decides by content.
        box = gr.MultimodalTextbox(
            show_label=False, file_count="multiple", file_types=["image", "video"], placeholder="Ask about the images",
            submit_btn=True, stop_btn=True, autofocus=True, elem_id="ask",
            max_plain_text_length=10 * page_chat.config.max_text_chars,  # longer text would become a file
        )  # fmt: skip
        if examples:
            rows = [[example] for example in examples]
            gr.Examples(rows, [box], label="This model can answer", examples_per_page=6, elem_id="examples")
        with gr.Accordion("How it answers", open=False, elem_id="how"):
            controls = sampling_controls(page_chat)
        with gr.Accordion("What the model sees", open=False, elem_id="sees"):
            tiles = gr.Gallery(
                show_label=False, columns=4, height="auto", object_fit="contain", interactive=False, buttons=[], elem_id="tiles"
            )

        async def ask(sent: dict[str, Any] | None, session: PageSession, *values: Any) -> AsyncIterator[tuple[Any, ...]]:
            sent = sent or {}
            async for view in page_chat.ask(sent.get("text") or "", sent.get("files") or [], session, read_controls(*values)):
                # The box is changed as seldom as can be: its visitor may be writing, and the browser mixes up quick changes.
                text = gr.skip() if view.taken is None else gr.MultimodalTextbox(value=None if view.taken else sent)
                line = f'<span class="{"running" if view.running else "idle"}">{view.status}</span>'
                rest = (gr.skip() if value is None else value for value in (view.chat, view.tiles))
                yield text, session, line, *rest

        def restart(session: PageSession) -> tuple[Any, ...]:
            session.clear()
            return [], "", []

        box.submit(
            ask, [box, session, *controls], [box, session, status, chat, tiles],
            api_visibility="private", concurrency_limit=None, show_progress="hidden",
        )  # fmt: skip
        box.stop(PageSession.stop, [session], None, api_visibility="private", show_progress="hidden")
        clear.click(restart, [session], [chat, status, tiles], api_visibility="private", show_progress="hidden")
    page.queue(default_concurrency_limit=None, api_open=False)
    return page


def sampling_controls(page_chat: PageChat) -> list[Component]:
    """Add the controls whose values `read_controls` takes."""
    most = min(page_chat.service.processor.tiling.max_tiles, page_chat.config.max_image_tiles)
    longest = min(page_chat.config.max_new_tokens, page_chat.service.engine.max_context)
    with gr.Row():
        temperature = gr.Slider(0, 2, 0, step=0.05, label="temperature", info="0 always takes the most likely token")
        top_p = gr.Slider(0.05, 1, 1, step=0.05, label="top p", info="share of probability to sample from")
    with gr.Row():
        penalty = gr.Slider(1, 2, 1, step=0.05, label="repetition penalty", info="1 is off")
        tokens = gr.Slider(1, longest, min(512, longest), step=1, label="longest reply", info="tokens")
    with gr.Row():
        max_tiles = gr.Slider(1, max(2, most), most, step=1, label="tiles", info="tile cap of an image")
        frames = page_chat.config.max_frames
        num_frames = gr.Slider(1, max(2, frames), min(8, frames), step=1, label="frames", info="taken from a video")
    system = gr.Textbox(label="system message", placeholder="the model's own", lines=1)
    return [temperature, top_p, penalty, tokens, max_tiles, num_frames, system]


def read_controls(
    temperature: float, top_p: float, penalty: float, tokens: float, max_tiles: float, num_frames: float, system: str | None
) -> PageSettings:
    """Return the values of the controls. Raises TypeError or ValueError for values that no control has."""
    params = SamplingParams(
        temperature=float(temperature), top_p=float(top_p), repetition_penalty=float(penalty), max_new_tokens=int(tokens)
    )
    return PageSettings(params=params, max_tiles=int(max_tiles), num_frames=int(num_frames), system=system or "")


def add_page(app: FastAPI, service: Service, config: ServeConfig, directory: Path) -> None:
    """Mount the page at /, behind the same guard as every route: with keys, browsers ask for one as password.

    Files that visitors send go to a directory that only this user can read: GRADIO_TEMP_DIR if that is set, else one that
    ends with the process.

    Args:
        directory: The model's directory, whose examples are shown.

    Raises:
        InputError: if the examples cannot be read.
    """
    examples = read_examples(directory)
    if not os.environ.get(DIRECTORY):
        os.environ[DIRECTORY] = tempfile.mkdtemp(prefix="ivl-page-")
        atexit.register(shutil.rmtree, os.environ[DIRECTORY], ignore_errors=True)
    uploads = Path(get_upload_folder())
    title = config.names[0] if config.names else directory.name
    page = build_page(PageChat(service, config, uploads, app.state.gateway, app.state.finished), title=title, examples=examples)
    theme = Default(font=("system-ui", "sans-serif"), font_mono=("ui-monospace", "monospace"))  # nothing is fetched elsewhere
    inner = FastAPI(openapi_url=None)
    gr.mount_gradio_app(
        inner, page, path="/", max_file_size=config.media.max_video_bytes, show_error=False, ssr_mode=False,
        enable_monitoring=False, mcp_server=False, run_history=False, theme=theme, css=CSS, footer_links=[],
    )  # fmt: skip
    app.mount("/", PageGate(inner, service, uploads))
    outside = app.router.lifespan_context

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[Any]:
        async with outside(app) as state, inner.router.lifespan_context(inner):
            yield state

    app.router.lifespan_context = lifespan
