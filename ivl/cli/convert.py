"""`ivl convert`, `ivl compose`, `ivl merge`: model directories from model directories."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from ivl.checkpoint.config_table import Dialect, StoredDtype
from ivl.cli.options import parse
from ivl.errors import InputError
from ivl.utils.progress import reporting

if TYPE_CHECKING:
    from ivl.quant.layers import QuantPlan

Flag = Annotated[bool, tyro.conf.FlagCreatePairsOff]


@dataclass(frozen=True, kw_only=True)
class QuantizeOptions:
    """Linear layers that are written as integers."""

    quantize: Literal["no", "int8", "int4"] = "no"
    """Weights of the language model as integers: int8 with a scale per row, or int4 with a scale per group. Embeddings keep
    their type."""
    group_size: Literal[32, 64, 128] = 32
    """Input elements that share a scale of int4."""
    zero_point: Flag = False
    """Give int4 groups a zero point, too."""
    quantize_head: Literal["int8", "int4"] = "int8"
    """The output head beside int4; in 4 bits it is read faster and loses most of all layers."""
    quantize_vision: Literal["no", "w8a8"] = "no"
    """Weights of the ViT in 8 bits; its activations are rounded to 8 bits per token when it runs."""

    def schemes(self) -> QuantPlan:
        """Return the scheme of each part of the model."""
        from ivl.quant.layers import QuantConfig, QuantPlan

        if self.zero_point and self.quantize != "int4":
            raise InputError("--zero-point is for --quantize int4")
        int8, int4 = QuantConfig(bits=8), QuantConfig(bits=4, group=self.group_size, symmetric=not self.zero_point)
        return QuantPlan(
            language={"no": None, "int8": int8, "int4": int4}[self.quantize],
            head=None if self.quantize == "no" else int4 if self.quantize == self.quantize_head == "int4" else int8,
            vision=None if self.quantize_vision == "no" else QuantConfig(bits=8, activations=True),
        )


@dataclass(frozen=True, kw_only=True)
class ConvertOptions:
    """Rewrite a model in the other library's dialect, with quantized weights, or as GGUF files."""

    src: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SRC")]
    """Model directory or hub id."""
    dst: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DST")]
    """Directory to write."""
    to: Literal["keep", "internvl_chat", "transformers", "gguf"] = "keep"
    """Dialect to write: that of the original repository, that of transformers, or the two GGUF files of llama.cpp; keep is
    that of the source."""
    dtype: StoredDtype | Literal["q8_0"] = "keep"
    """Type of the written weights; q8_0 (8 bits) is for gguf."""
    quantization: Annotated[QuantizeOptions, tyro.conf.arg(name="")] = field(default_factory=QuantizeOptions)
    force: Flag = False
    """Replace DST if it is a model directory."""
    weights_only: Flag = False
    """Leave out tokenizer and preprocessor files."""
    max_shard_gb: float = 5.0
    """Largest weights file, in GB."""


@dataclass(frozen=True, kw_only=True)
class ComposeOptions:
    """Build a model from a vision transformer, a language model and a projector."""

    out: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
    """Directory to write."""
    vit: str
    """InternViT or InternVL, directory or hub id."""
    llm: str
    """Qwen2.5, Qwen3, InternLM2.5, LLaMA or InternVL, directory or hub id; or a GGUF file."""
    projector: str | None = None
    """InternVL whose projector is taken; without one, a fresh one is drawn."""
    to: Dialect = "internvl_chat"
    """Dialect to write."""
    dtype: StoredDtype = "keep"
    """Type of the written weights; keep is the narrowest that holds every part unchanged."""
    seed: int = 0
    """Seed of every drawn number."""
    force: Flag = False
    """Replace OUT if it is a model directory."""


@dataclass(frozen=True, kw_only=True)
class MergeOptions:
    """Merge a LoRA adapter into its model, or the adapters that the original training code left inside a model directory."""

    paths: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="MODEL [ADAPTER] OUT")]
    """Model directory or hub id, directory of the adapter as PEFT writes it, and directory to write. Without an adapter, the
    model directory holds adapters itself."""
    force: Flag = False
    """Replace OUT if it is a model directory."""
    allow_base: Flag = False
    """Merge into a model that the adapter was not trained from."""


def convert(args: list[str]) -> None:
    options = parse(ConvertOptions, "convert", args)
    schemes = options.quantization.schemes()
    if not 0 < options.max_shard_gb <= 1e6:
        raise InputError(f"--max-shard-gb is {options.max_shard_gb}, must be above 0 and at most 1000000")
    from ivl.checkpoint.convert import convert as convert_model

    with reporting(f"writing {options.dst}", "MB") as progress:
        report = convert_model(
            options.src, options.dst, to=options.to, dtype=options.dtype, schemes=schemes, force=options.force,
            weights_only=options.weights_only, max_shard_bytes=int(options.max_shard_gb * 1e9), progress=progress,
        )  # fmt: skip
    wider = f"; {report.wider} matrices do not fit q8_0 (rows no multiple of 32) and are float16" if report.wider else ""
    print(f"{options.dst}: {'' if options.to == 'keep' else f'{options.to} '}model written{wider}")
    if report.losses:
        parts = ", ".join(f"{name} {scheme.name}" for name, scheme in schemes.by_part().items())
        print(f"{parts}; of {len(report.losses)} layers these lost most (share of the weights; quantization.json):")
        print(*(f"  {loss.error:7.3%}  {loss.layer}" for loss in report.losses[:5]), sep="\n")


def compose(args: list[str]) -> None:
    options = parse(ComposeOptions, "compose", args)
    from ivl.checkpoint.compose import compose as compose_model

    with reporting(f"writing {options.out}", "MB") as progress:
        compose_model(**vars(options), progress=progress)
    print(f"{options.out}: composed model written")


def merge(args: list[str]) -> None:
    options = parse(MergeOptions, "merge", args)
    from ivl.checkpoint.adapter import merge as merge_adapter

    if len(options.paths) not in (2, 3):
        raise InputError(f"ivl merge takes MODEL [ADAPTER] OUT, got {len(options.paths)} names")
    model, *adapter, out = options.paths
    merge_adapter(model, adapter[0] if adapter else None, out, force=options.force, allow_base=options.allow_base)
    print(f"{out}: merged model written")
