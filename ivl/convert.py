"""Rewrite a model directory in the other dialect, whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from ivl.errors import InputError
from ivl.model.checkpoint import load_config, resolve
from ivl.model.checkpoint.config_write import generation_json, to_json
from ivl.model.checkpoint.files import MAX_SHARD_BYTES, Progress, write_json, write_shards
from ivl.model.checkpoint.keymaps import Dialect, key_map
from ivl.model.checkpoint.model_dir import empty_model, open_weights, read
from ivl.processing.processor import Processor

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def convert(
    source: str | Path,
    target: str | Path,
    *,
    to: Dialect,
    dtype: torch.dtype | None = None,
    force: bool = False,
    weights_only: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: Progress | None = None,
) -> None:
    """Rewrite a model directory or hub id in a dialect: configuration, weights, tokenizer and preprocessor files.

    Tensors stream from shard to shard, so any size fits a small machine.

    Args:
        dtype: of the written weights; None keeps that of the source.
        force: replace the target if it is a model directory.
        weights_only: do not ask for, and do not write, tokenizer and preprocessor files.

    Raises:
        InputError: if the source is not one complete model, or the target exists; the target is then untouched.
    """
    directory = resolve(source)
    config = load_config(directory)
    model = empty_model(config)
    weights, entries = open_weights(directory, model)
    dtype = dtype or weights.main_dtype
    config_json = to_json(config, to, str(dtype).removeprefix("torch."))
    processor = None if weights_only else Processor.load(directory)
    ours = {entry.ours: entry for entry in entries}
    with new_directory(target, force=force) as out:
        write_shards(
            out,
            key_map(model, to),
            {name: parameter.shape for name, parameter in model.named_parameters()},
            lambda entry: read(ours[entry.ours], weights),
            dtype=dtype,
            max_shard_bytes=max_shard_bytes,
            progress=progress,
        )
        write_json(out / "generation_config.json", generation_json(config))
        if processor:
            processor.save(out)
        write_json(out / "config.json", config_json)


@contextmanager
def new_directory(target: str | Path, *, force: bool = False) -> Iterator[Path]:
    """A directory to write into that becomes the target when the block ends well, and vanishes when it does not.

    Raises:
        InputError: if the target is there already and force is not given, or if it is no model directory.
    """
    target = Path(target).absolute()
    occupied = target.exists() and not (target.is_dir() and not any(target.iterdir()))
    if occupied and not force:
        raise InputError(f"{target}: exists; name another directory, or give --force to replace it")
    if occupied and not (target / "config.json").is_file():
        raise InputError(f"{target}: has no config.json, so it is no model directory and will not be replaced")
    # Beside the target, so that a rename suffices; the process id keeps two runs apart.
    part = target.with_name(f".{target.name}.part-{os.getpid()}")
    old = target.with_name(f".{target.name}.old-{os.getpid()}")
    try:
        part.mkdir(parents=True)
    except OSError as error:
        raise InputError(f"{target}: cannot be written: {error}") from None
    try:
        yield part
        if target.exists():
            target.rename(old)
        part.rename(target)
    except BaseException:
        if old.exists() and not target.exists():
            old.rename(target)
        shutil.rmtree(part, ignore_errors=True)
        raise
    shutil.rmtree(old, ignore_errors=True)
