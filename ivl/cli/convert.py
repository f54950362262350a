"""`ivl convert`, `ivl compose`, `ivl merge`: model directories from model directories."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

if TYPE_CHECKING:
    from ivl.checkpoint.weights import ByteProgress

Flag = Annotated[bool, tyro.conf.FlagCreatePairsOff]
Dialect = Literal["internvl_chat", "transformers"]
Dtype = Literal["keep", "bfloat16", "float16", "float32"]


def convert(args: list[str]) -> None:
    tyro.cli(run_convert, prog="ivl convert", args=args)


def run_convert(
    src: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SRC")],
    dst: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DST")],
    *,
    to: Literal["keep", "internvl_chat", "transformers", "gguf"] = "keep",
    dtype: Literal["keep", "bfloat16", "float16", "float32", "q8_0"] = "keep",
    quantize: Literal["no", "int8", "int4"] = "no",
    group_size: Literal[32, 64, 128] = 32,
    zero_point: Flag = False,
    quantize_head: Literal["int8", "int4"] = "int8",
    quantize_vision: Literal["no", "w8a8"] = "no",
    force: Flag = False,
    weights_only: Flag = False,
    max_shard_gb: float = 5.0,
) -> None:
    """Rewrite a model in the other library's dialect, with quantized weights, or as GGUF files.

    Args:
        src: Model directory or hub id.
        dst: Directory to write.
        to: Dialect to write: that of the original repository, that of transformers, or the two GGUF files of llama.cpp;
            keep is that of the source.
        dtype: Type of the written weights; q8_0 (8 bits) is for gguf.
        quantize: Weights of the language model as integers: int8 with a scale per row, or int4 with a scale per group.
            Embeddings keep their type.
        group_size: Input elements that share a scale of int4.
        zero_point: Give int4 groups a zero point, too.
        quantize_head: The output head beside int4; in 4 bits it is read faster and loses most of all layers.
        quantize_vision: Weights of the ViT in 8 bits, its activations rounded to 8 bits per token as they come.
        force: Replace dst if it is a model directory.
        weights_only: Leave out tokenizer and preprocessor files.
        max_shard_gb: Largest weights file, in GB.
    """
    from ivl.checkpoint import convert as operation
    from ivl.errors import InputError
    from ivl.quant.layers import Scheme, Schemes

    if max_shard_gb <= 0:
        raise InputError(f"--max-shard-gb is {max_shard_gb}, must be above 0")
    if zero_point and quantize != "int4":
        raise InputError("--zero-point is for --quantize int4")
    int8, int4 = Scheme(bits=8), Scheme(bits=4, group=group_size, symmetric=not zero_point)
    schemes = Schemes(
        language={"no": None, "int8": int8, "int4": int4}[quantize],
        head=None if quantize == "no" else int4 if quantize == "int4" and quantize_head == "int4" else int8,
        vision=None if quantize_vision == "no" else Scheme(bits=8, activations=True),
    )
    if to == "gguf":
        if schemes.named():
            raise InputError("--quantize is not for --to gguf, which has formats of its own: --dtype q8_0")
        if weights_only:
            raise InputError("--weights-only is not for --to gguf: llama.cpp needs the tokenizer in the file")
        with _progress(f"writing {dst}") as progress:
            storage = None if dtype == "keep" else dtype
            wider = operation.convert_to_gguf(src, dst, storage=storage, force=force, progress=progress)
        note = f"; {wider} matrices do not fit q8_0 (rows no multiple of 32) and are float16" if wider else ""
        print(f"{dst}: {operation.LANGUAGE_GGUF} and {operation.VISION_GGUF} written{note}")
        return
    if dtype == "q8_0":
        raise InputError("--dtype q8_0 is for --to gguf; safetensors take bfloat16, float16 or float32")
    with _progress(f"writing {dst}") as progress:
        losses = operation.convert(
            src,
            dst,
            to=None if to == "keep" else to,
            dtype=operation.DTYPES.get(dtype),
            schemes=schemes,
            force=force,
            weights_only=weights_only,
            max_shard_bytes=int(max_shard_gb * 1e9),
            progress=progress,
        )
    if not losses:
        print(f"{dst}: {'' if to == 'keep' else f'{to} '}model written")
        return
    names = ", ".join(f"{name} {scheme.name}" for name, scheme in schemes.named().items())
    print(f"{dst}: written with {names}; of {len(losses)} layers these lost most (share of the weights; quantization.json):")
    for loss in losses[:5]:
        print(f"  {loss.error:7.3%}  {loss.layer}")


def compose(args: list[str]) -> None:
    tyro.cli(run_compose, prog="ivl compose", args=args)


def run_compose(
    out: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")],
    *,
    vit: str,
    llm: str,
    projector: str | None = None,
    to: Dialect = "internvl_chat",
    dtype: Dtype = "keep",
    seed: int = 0,
    force: Flag = False,
) -> None:
    """Build a model from a vision transformer, a language model and a projector.

    Args:
        out: Directory to write.
        vit: InternViT or InternVL, directory or hub id.
        llm: Qwen2.5, InternLM2.5, LLaMA or InternVL, directory or hub id; or a GGUF file.
        projector: InternVL whose projector is taken; without one, a fresh one is drawn.
        to: Dialect to write.
        dtype: Type of the written weights; keep is the narrowest that holds every part unchanged.
        seed: Of every drawn number.
        force: Replace out if it is a model directory.
    """
    from ivl.checkpoint import compose as operation
    from ivl.checkpoint.convert import DTYPES
    from ivl.checkpoint.files import new_directory

    with _progress(f"writing {out}") as progress, new_directory(out, force=force) as part:
        operation.compose(vit, llm, projector, part, seed=seed, dtype=DTYPES.get(dtype), dialect=to, progress=progress)
    print(f"{out}: composed model written")


def merge(args: list[str]) -> None:
    tyro.cli(run_merge, prog="ivl merge", args=args)


def run_merge(
    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")],
    adapter: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="ADAPTER")],
    out: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")],
    *,
    force: Flag = False,
) -> None:
    """Merge a LoRA adapter into its model.

    Args:
        model: Model directory or hub id.
        adapter: Directory of the adapter, as PEFT writes it.
        out: Directory to write.
        force: Replace out if it is a model directory.
    """
    from ivl.checkpoint import adapter as operation
    from ivl.checkpoint.files import new_directory

    with new_directory(out, force=force) as part:
        operation.merge(model, adapter, part)
    print(f"{out}: merged model written")


@contextmanager
def _progress(title: str) -> Iterator[ByteProgress]:
    """A bar of bytes on stderr."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(title, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
