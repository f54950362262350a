"""`ivl models`: the published models, whose parameters are counted from their configurations."""

from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import groupby
from typing import Annotated

import tyro

from ivl.checkpoint.releases import MODELS, PublishedModel
from ivl.config import ModelConfig


@dataclass(frozen=True, kw_only=True)
class ModelsOptions:
    """List the published models of InternVL2.5, 3 and 3.5 (dense) with their parts and exact parameter counts."""

    json: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print a JSON list of objects, one for each repository, instead of a table."""


def models(args: list[str]) -> None:
    options = tyro.cli(ModelsOptions, prog="ivl models", args=args)
    groups = [(versions, list(group)) for versions, group in groupby(MODELS.values(), key=lambda model: model.versions)]
    if options.json:
        repositories = [(f"{model.hub_id}{end}", model) for ends, group in groups for end in ends for model in group]
        rows = [{"name": name.split("/")[1], "hub_id": name, **describe(model)} for name, model in repositories]
        print(json.dumps(rows, indent=2))
        return
    lines: list[tuple[str, ...]] = [("name", "language model", "vision", "projector", "language", "all")]
    for _, group in groups:
        for model in group:
            counts = (f"{count:,}" for count in count_parameters(model.config).values())
            lines.append((model.hub_id.split("/")[1], model.language, *counts))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for name, language, *counts in lines:
        texts = [name.ljust(widths[0]), language.ljust(widths[1])]
        print("  ".join([*texts, *(count.rjust(width) for count, width in zip(counts, widths[2:], strict=True))]))
    print("\nParameters of each part. On the hub as OpenGVLab/NAME, and with other endings:")
    for ends, group in groups:
        print(f"  {group[0].hub_id.split('/')[1].rpartition('-')[0]}-SIZE{', '.join(end for end in ends if end)}")


def describe(model: PublishedModel) -> dict[str, str | int]:
    """Name the parts of a published model, and count their parameters exactly."""
    vision = f"InternViT-{'6B' if model.config.vision.qk_norm else '300M'}-448px-V2_5"
    counts = count_parameters(model.config)
    named = {f"{name}_parameters": count for name, count in counts.items() if name != "all"}
    return {"vision": vision, "language": model.language, **named, "parameters": counts["all"]}


def count_parameters(config: ModelConfig) -> dict[str, int]:
    """Count the parameters of vision, projector, language model and all of them, without building a model."""
    v, d = config.vision, config.decoder
    v_norm = v.width * (2 if v.norm == "layer_norm" else 1)
    v_attention = 4 * v.width**2 + v.width * (1 + 3 * v.qkv_bias + 2 * v.qk_norm)
    v_layer = v_attention + 2 * v.width * v.mlp_width + v.mlp_width + v.width + 2 * v_norm + 2 * v.width
    vision = v.width * (2 + v.grid**2 + 3 * v.patch_size**2 + 1) + v.num_layers * v_layer
    shuffled = 4 * v.width
    projector = 2 * shuffled + (shuffled + 1) * d.width + (d.width + 1) * d.width
    q_rows, kv_rows = d.num_heads * d.head_dim, d.num_kv_heads * d.head_dim
    d_attention = (d.width + d.qkv_bias) * (q_rows + 2 * kv_rows) + q_rows * d.width + 2 * d.head_dim * d.qk_norm
    d_layer = d_attention + 3 * d.width * d.mlp_width + 2 * d.width
    language = 2 * d.vocab_size * d.width + d.width + d.num_layers * d_layer
    return {"vision": vision, "projector": projector, "language": language, "all": vision + projector + language}
