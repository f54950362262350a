"""Processor files beside a model, so that transformers' AutoProcessor opens the directory with nothing copied by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ivl.checkpoint.config_json import load_config
from ivl.checkpoint.vocabulary import load_tokenizer, save_tokenizer
from ivl.model.vlm import PIXEL_MEAN, PIXEL_STD
from ivl.processing.chat import Template, template_of
from ivl.processing.processor import Processor
from ivl.processing.tokenizer import IMAGE_END, IMAGE_START, PLACEHOLDER
from ivl.utils.files import write_json

BICUBIC = 3
VIDEO_TOKEN = "<video>"


def load_processor(directory: str | Path) -> Processor:
    """Read config.json and the tokenizer of a model directory of either dialect."""
    return Processor(load_config(directory), load_tokenizer(directory))


def save_processor(processor: Processor, directory: str | Path) -> None:
    """Write the tokenizer, image, video and processor files, which both dialects read; config.json is the checkpoint's."""
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


def jinja(template: Template, system_message: str | None) -> str:
    """The template in the language of transformers' chat templates; renders what chat.render does, except BOS.

    BOS comes from the post-processor of tokenizer.json.
    """

    def header(role: str) -> str:
        return _quoted(template.header.format(role="\0") + "\n").replace("\\x00", f"' + {role} + '")

    system = template.system_message if system_message is None else system_message
    end = _quoted(template.end + template.newline)
    default = f"{{{{ {header(_quoted('system'))} + {_quoted(system)} + {end} }}}}" if system else ""
    return "".join(
        [
            "{%- if messages[0]['role'] != 'system' -%}" + default + "{%- endif -%}" if default else "",
            "{%- for message in messages -%}",
            "{%- set content = message['content'] -%}",
            "{%- if content is string -%}{%- set content = [{'type': 'text', 'text': content}] -%}{%- endif -%}",
            # An empty system turn means no system message.
            "{%- if message['role'] != 'system' or content | map(attribute='text') | join -%}",
            "{{ " + header("message['role']") + " }}",
            # Media given before the text rather than marked in it stand on lines of their own.
            "{%- set texts = content | selectattr('type', 'equalto', 'text') | list -%}",
            "{%- set ns = namespace(lines=content[0]['type'] != 'text' and texts and texts[0]['text']"
            " and texts[0]['text'][0] == texts[0]['text'][0].strip()) -%}",
            "{%- for part in content -%}",
            "{%- if part['type'] == 'text' -%}{%- set ns.lines = false -%}{{ part['text'] }}",
            "{%- else -%}",
            "{{ " + _quoted(VIDEO_TOKEN) + " if part['type'] == 'video' else " + _quoted(PLACEHOLDER) + " }}",
            "{%- if ns.lines -%}{{ '\\n' }}{%- endif -%}",
            "{%- endif -%}",
            "{%- endfor -%}",
            "{{ " + end + " }}",
            "{%- endif -%}",
            "{%- endfor -%}",
            "{%- if add_generation_prompt -%}{{ " + header(_quoted("assistant")) + " }}{%- endif -%}",
        ]
    )


def _quoted(text: str) -> str:
    """A string literal of the template language."""
    text = text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n").replace("\0", "\\x00")
    return f"'{text}'"
