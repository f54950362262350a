"""Processor files beside a model, so that transformers' AutoProcessor opens the directory with nothing copied by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ivl.checkpoint.config_json import load_config
from ivl.checkpoint.config_table import CODE_REPOS, MODEL_TYPE
from ivl.checkpoint.sections import Values, open_section
from ivl.checkpoint.vocabulary import load_tokenizer, save_tokenizer
from ivl.model.vlm import PIXEL_MEAN, PIXEL_STD
from ivl.processing.chat import TEMPLATES, Template, template_of
from ivl.processing.processor import Processor
from ivl.processing.tokenizer import IMAGE_END, IMAGE_START, PLACEHOLDER
from ivl.utils.files import write_json

BICUBIC = 3
VIDEO_TOKEN = "<video>"


def load_processor(directory: str | Path) -> Processor:
    """Read config.json and the tokenizer of a model directory of either dialect."""
    config = load_config(directory)
    open_section(Path(directory) / "config.json").read("template", Values(str, choices=tuple(TEMPLATES)), "")
    return Processor(config, load_tokenizer(directory))


def save_processor(processor: Processor, directory: str | Path) -> None:
    """Write the tokenizer, image, video and processor files, which both dialects read.

    config.json is the checkpoint's and is written before: beside one of the original dialect, an InternLM2 that has its
    tokenizer.model names the original tokenizer class.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    config, tiling = processor.config, processor.tiling
    template = jinja(template_of(config.template), config.system_message)
    save_tokenizer(
        processor.tokenizer,
        directory,
        processor_class="InternVLProcessor",
        model_max_length=config.decoder.max_positions,
        chat_template=template,
        extra_special_tokens={
            "start_image_token": IMAGE_START,
            "end_image_token": IMAGE_END,
            "context_image_token": PLACEHOLDER,
            "video_token": VIDEO_TOKEN,
        },
        **_slow_class(processor, directory),
    )
    (directory / "chat_template.jinja").write_text(template, encoding="utf-8")
    pixels: dict[str, Any] = {
        "processor_class": "InternVLProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"height": tiling.tile_size, "width": tiling.tile_size},
        "resample": BICUBIC,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(PIXEL_MEAN),
        "image_std": list(PIXEL_STD),
    }
    tiles = {"crop_to_patches": tiling.dynamic, "min_patches": tiling.min_tiles, "max_patches": tiling.max_tiles}
    write_json(directory / "preprocessor_config.json", {**pixels, "image_processor_type": "GotOcr2ImageProcessorFast", **tiles})
    write_json(
        directory / "video_preprocessor_config.json",
        {**pixels, "video_processor_type": "InternVLVideoProcessor", "do_sample_frames": False},
    )
    write_json(
        directory / "processor_config.json",
        {"processor_class": "InternVLProcessor", "image_seq_length": config.tokens_per_tile},
    )


def _slow_class(processor: Processor, directory: Path) -> dict[str, Any]:
    """Keys that name InternLM2's own tokenizer class, which the original training code needs.

    It finds by an attribute of that class that `<s>` starts each text; with any other class, each turn is trained with one.
    """
    model_type = open_section(directory / "config.json", optional=True).values.get("model_type")
    family = processor.config.decoder.family
    if processor.tokenizer.sentencepiece is None or family != "internlm2" or model_type != MODEL_TYPE["internvl_chat"]:
        return {}
    name = f"{CODE_REPOS[family]}--tokenization_internlm2.InternLM2Tokenizer"
    return {"tokenizer_class": "InternLM2Tokenizer", "auto_map": {"AutoTokenizer": [name, None]}}


def jinja(template: Template, system_message: str | None) -> str:
    """The template in the language of transformers' chat templates; renders what chat.render does, except BOS.

    BOS comes from the post-processor of tokenizer.json.
    """
    before, after = template.header.split("{role}")
    system = template.system_message if system_message is None else system_message
    texts = {"before": before, "after": after + "\n", "end": template.end + template.newline, "system": system or ""}
    texts = {name: text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n") for name, text in texts.items()}
    body = Path(__file__).with_name("chat_template.jinja").read_text("utf-8").rstrip("\n")
    texts["strips"] = "yes" if template.strips else ""
    return "".join(f"{{%- set {name} = '{text}' -%}}\n" for name, text in texts.items()) + body
