"""An engine in this process: resolves, loads and accelerates a model."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from ivl import gpu
from ivl.checkpoint import load_model, load_processor, resolve
from ivl.checkpoint.adapter import adapted
from ivl.cpu import accelerate, answers_in_bfloat16
from ivl.errors import InputError, nearest, short
from ivl.generators import LoadConfig
from ivl.gpu.spread import SpreadEngine, spread
from ivl.inference.engine import Engine
from ivl.model.vlm import VLM
from ivl.processing.processor import Processor


def load_engine(name: str | Path, config: LoadConfig | None = None, **engine_options: int) -> Engine:
    """Load a model from a directory or a hub id, and return an engine that runs it.

    Adapters with a name are variants of the engine, one without a name takes the model's place.

    Args:
        engine_options: Arguments of `Engine`, such as max_cache_tokens.

    Raises:
        InputError: if the model or an adapter cannot be found or read, or they do not fit.
    """
    known = [name for name in inspect.signature(Engine).parameters if name not in ("model", "processor", "variants")]
    for option in engine_options.keys() - known:
        fields = [*LoadConfig.__dataclass_fields__, *known]
        raise InputError(f"unknown option {option!r} of a model: {nearest(option, fields, 'options')}")
    config = config or LoadConfig()
    directory = resolve(name)
    if config.tensor_parallel > 1:
        from ivl.generators.ranks import load_shared

        return load_shared(directory, config, engine_options)
    cards = _devices(config.device)
    put = partial(spread, cards=cards) if len(cards) > 1 else None
    models, processor = load_parts(directory, config, str(cards[0]), put)
    kind = Engine if put is None else SpreadEngine
    engine = kind(models.pop(""), processor, variants=models, **engine_options)
    return gpu.accelerate(engine) if engine.model.device.type == "cuda" else engine


def load_parts(
    directory: Path, config: LoadConfig, device: str, split: Callable[[VLM], None] | None = None
) -> tuple[dict[str, VLM], Processor]:
    """Load the model and its variants by name, and the processor of a directory.

    Args:
        split: see `load_model`.
    """
    dtype = None if config.dtype == "auto" else getattr(torch, config.dtype)
    model = load_model(directory, dtype=dtype, device=device, map_embeddings=True, split=split)
    if dtype is None:
        model = model.to(_efficient(model.dtype, device))
    models = {"": model} | {name: adapted(model, adapter) for name, adapter in config.adapters.items()}
    if model.device.type == "cpu":
        for each in models.values():
            accelerate(each)
    processor = accelerate(load_processor(directory))
    if config.max_tiles is not None:
        tiling = processor.tiling
        min_tiles = min(tiling.min_tiles, config.max_tiles)
        processor.tiling = replace(tiling, max_tiles=config.max_tiles, min_tiles=min_tiles)
    return models, processor


def _devices(names: str) -> list[torch.device]:
    """Return the device to load to, or several cards. Raises InputError if this machine does not have them."""
    if names == "auto":
        return [torch.device("cuda" if torch.cuda.is_available() else "cpu")]
    devices: list[torch.device] = []
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    for name in map(str.strip, str(names).split(",")):
        try:
            device = torch.device(name)
        except RuntimeError:
            device = None
        if device is None or not (device.type == "cpu" or (device.type == "cuda" and (device.index or 0) < count)):
            raise InputError(f"device must be auto, cpu or one of {count} cuda devices of this machine, got {short(name)}")
        devices.append(device)
    several = f"device {names}: several devices are different cards by their numbers, as in cuda:0,cuda:1"
    if len(devices) > 1 and (wrong := [device for device in devices if device.index is None or device.type != "cuda"]):
        raise InputError(f"{several}, which {wrong[0]} is not")
    if twice := [device for device in devices if devices.count(device) > 1]:
        raise InputError(f"{several}, but {twice[0]} is named twice")
    return devices


def _efficient(stored: torch.dtype, device: str) -> torch.dtype:
    """Return the stored type, or float32 where computing in the stored type is slow."""
    if not device.startswith("cpu") or stored == torch.float32:
        return stored
    return stored if stored == torch.bfloat16 and answers_in_bfloat16(torch.device(device)) else torch.float32
