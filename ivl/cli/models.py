"""`ivl models`: the published models, whose parameters are counted from their configurations."""

from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import groupby
from typing import Annotated

import tyro

from ivl.checkpoint.releases import MODELS, PublishedModel, count_parameters
from ivl.cli.options import parse


@dataclass(frozen=True, kw_only=True)
class ModelsOptions:
    """List the published models of InternVL2.5, 3 and 3.5 (dense) with their parts and exact parameter counts."""

    json: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print a JSON list of objects, one for each repository, instead of a table."""


def models(args: list[str]) -> None:
    options = parse(ModelsOptions, "models", args)
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
    print("The 9B is counted with InternLM3's 128,512 rows; how many its image tokens add is not known here.")


def describe(model: PublishedModel) -> dict[str, str | int]:
    """Name the parts of a published model, and count their parameters exactly."""
    vision = f"InternViT-{'6B' if model.config.vision.qk_norm else '300M'}-448px-V2_5"
    counts = count_parameters(model.config)
    named = {f"{name}_parameters": count for name, count in counts.items() if name != "all"}
    return {"vision": vision, "language": model.language, **named, "parameters": counts["all"]}
