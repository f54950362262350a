"""A saved processor opens in transformers and gives the same ids and pixels.

AutoProcessor itself needs torchvision there (its video processor does), which this project does not install; without it the
parts are opened one by one, as AutoProcessor would. Pixels are equal with the PIL backend; torchvision's resize of the same
image differs by a few grey levels.
"""

from __future__ import annotations

import importlib.util
import json
import os
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from ivl.checkpoint import save_processor
from ivl.model.vlm import normalize
from ivl.processing.chat import TEMPLATES, open_lines
from ivl.processing.processor import Processor
from ivl.processing.tokenizer import train_tokenizer
from ivl.types import ImageRef, Message, Text
from tests.helpers.processors import processor_for

os.environ.setdefault("HF_HUB_OFFLINE", "1")
transformers = pytest.importorskip("transformers")


def opened(directory):
    """transformers' processor of a directory, with the PIL image backend."""
    from transformers.models.internvl.processing_internvl import InternVLProcessor

    if importlib.util.find_spec("torchvision"):
        whole = transformers.AutoProcessor.from_pretrained(directory)
        whole.image_processor = transformers.AutoImageProcessor.from_pretrained(directory, backend="pil")
        return whole
    assert json.loads((directory / "processor_config.json").read_text())["processor_class"] == "InternVLProcessor"

    class WithoutVideo(InternVLProcessor):
        def check_argument_for_proper_class(self, argument_name, argument):
            return type(argument)  # it would ask for the video processor, which cannot be imported

    return WithoutVideo(
        image_processor=transformers.AutoImageProcessor.from_pretrained(directory),
        tokenizer=transformers.AutoTokenizer.from_pretrained(directory),
        video_processor=None,
        image_seq_length=json.loads((directory / "processor_config.json").read_text())["image_seq_length"],
        chat_template=(directory / "chat_template.jinja").read_text(encoding="utf-8"),
    )


def theirs(processor, conversation, *, raw=False, **options):
    """Our conversation in their words: in a list, media before the first text stand on lines of their own."""

    def part(part):
        return {"type": "text", "text": part.text} if isinstance(part, Text) else {"type": "image", "image": part.source}

    def content(parts):
        return [part(p) for p in (parts if raw or open_lines(parts) == list(parts) else (Text(""), *parts))]

    messages = [{"role": m.role, "content": content(m.content)} for m in conversation]
    text = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    images = [p.source for m in conversation for p in m.content if isinstance(p, ImageRef)]
    return processor(text=[text], images=images or None, return_tensors="pt", **options)


def picture(width: int, height: int) -> ImageRef:
    noise = np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return ImageRef(Image.fromarray(noise))


@pytest.mark.parametrize("most", [1, 6, 12])
def test_same_ids_and_pixels(tokenizer, tmp_path, most):
    ours = processor_for(tokenizer, max_tiles=most)
    save_processor(ours, tmp_path)
    other = opened(tmp_path)
    for size in [(28, 28), (100, 50), (33, 90), (640, 480), (300, 17), (56, 57), (1, 40)]:
        image = picture(*size)
        for content in ((image, Text("What is the colour? 你好")), (Text("See "), image, Text("here."))):
            conversation = (Message("user", content),)
            prompt, batch = ours.prompt((Message("user", tuple(open_lines(content))),)), theirs(other, conversation, raw=True)
            assert batch["input_ids"][0].tolist() == prompt.tokens_T.tolist(), size
            difference = (batch["pixel_values"] - normalize(prompt.tiles_GSSC, torch.float32)).abs().max()
            assert batch["pixel_values"].shape == (len(prompt.tiles_GSSC), 3, 28, 28) and difference < 1e-6, size


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("system_message", [None, "", "Say 'it' \\ \"so\".\n{{ x }}"])
def test_chat_template_is_the_renderer(tokenizer, tmp_path, template, system_message):
    if template == "phi3-chat":
        tokenizer = train_tokenizer(["a b"], 300)
        tokenizer.add_special(["<|end|>", "<|system|>", "<|user|>", "<|assistant|>"])
    config = replace(processor_for(tokenizer, template).config, system_message=system_message)
    ours = Processor(config, tokenizer)
    save_processor(ours, tmp_path)
    other = opened(tmp_path)
    image, second = picture(28, 28), picture(29, 28)
    said = Message("assistant", (Text("It is red."),))
    for turns in [
        (Message("user", (Text("Hi"),)),),
        (Message("system", (Text("Mine."),)), Message("user", (Text("Hi"),))),
        (Message("system", (Text(""),)), Message("user", (Text("Hi"),))),
        (Message("user", (image, Text("\nWhat?"))), said, Message("user", (Text("And <box>?"),))),
        (Message("user", (image, second, Text("Compare."))), said, Message("user", (image, Text("Now?")))),
        (Message("user", (image, second, Text(" same?"))),),
        (
            Message("user", (Text(" Hi \n"), image)),
            Message("assistant", (Text(" It is. "),)),
            Message("user", (Text("\nSo? "),)),
        ),
        (Message("user", (Text("a "), image, Text("b"), second, Text("c"))),),
        (Message("user", (image,)),),
    ]:
        prompt = ours.prompt(turns)
        # Their processor gives every image the whole budget (ours shares it between the images), so one tile each here.
        batch = theirs(other, turns, max_patches=1)
        assert batch["input_ids"][0].tolist() == prompt.tokens_T.tolist()


def test_named_tokens(tokenizer, tmp_path):
    save_processor(processor_for(tokenizer), tmp_path)
    other = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for name, token in (("start_image", "<img>"), ("end_image", "</img>"), ("context_image", "<IMG_CONTEXT>")):
        assert getattr(other, f"{name}_token") == token and getattr(other, f"{name}_token_id") == tokenizer.id(token)
    assert other.eos_token == "<|im_end|>" and other.pad_token == "<|endoftext|>"
    assert other.model_max_length == processor_for(tokenizer).config.decoder.max_positions
    text = "Plain text, 你好 and <ref>a cat</ref>."
    assert other.encode(text) == tokenizer.encode(text) and other.decode(tokenizer.encode(text)) == text
