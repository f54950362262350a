"""Hashes of the generator that wrote a prediction, of the judge that chose it, and of its question."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import torch

from ivl.evaluation.voting import Rater, RatingJudge, RewardModel
from ivl.types import Conversation, Part, Text, VideoRef
from ivl.utils.files import file_hash

PIECE = 1 << 16
"""Words of a tensor that are summed at a time: they stay in a processor's cache."""


def of_generator(generator: Any) -> dict[str, str]:
    """Return values that change when the replies of a generator may change.

    They stand for the weights, the configuration and the processor of an engine, or for the url and the model of an endpoint.
    Any other generator may have a string `fingerprint`; without one only its class is known.
    """
    generator = getattr(generator, "engine", generator)
    model, own = getattr(generator, "model", None), getattr(generator, "fingerprint", None)
    if isinstance(own, str):
        return {"generator": own}
    if isinstance(model, torch.nn.Module):
        processor: Any = generator.processor
        return {
            "weights": _weights(model),
            "configuration": _hash(repr(processor.config).encode()),
            "tokenizer": _hash(processor.tokenizer.backend.to_str().encode()),
            "tiling": str(processor.tiling),
        }
    if url := getattr(generator, "url", ""):
        return {"endpoint": f"{url} {model}"}
    return {"generator": type(generator).__qualname__}


def of_judge(judge: Rater | None) -> dict[str, str]:
    """Return values that change when the ratings of a judge may change; of a function only its name is known."""
    if judge is None:
        return {}
    if isinstance(judge, RatingJudge | RewardModel):
        return {"kind": type(judge).__name__, "name": judge.name, **of_generator(judge.generator)}
    return {"kind": "function", "name": getattr(judge, "__qualname__", type(judge).__qualname__)}


def of_question(conversation: Conversation, answers: tuple[str, ...]) -> str:
    """Hash a conversation, with the bytes of its pictures and videos wherever they lie, and the accepted answers."""
    turns = [[message.role, [_part(part) for part in message.content]] for message in conversation]
    return _hash(json.dumps([turns, answers]).encode())


def _part(part: Part) -> list[Any]:
    if isinstance(part, Text):
        return ["text", part.text]
    if isinstance(part, VideoRef):
        return ["video", _content(part.source), part.num_frames, part.clip, *(["time"] * (part.frames_by == "time"))]
    return ["image", _content(part.source), part.max_tiles]


def _content(source: Any) -> str:
    """Hash the bytes of a file, of a folder's files, or of a picture in memory; a name without a file stands for itself."""
    if isinstance(source, bytes):
        return _hash(source)
    if not isinstance(source, str | Path):
        return _hash(source.tobytes(), f"{source.mode} {source.size}".encode())
    try:
        if Path(source).is_dir():
            return _hash(*(f"{path.name} {_content(path)}".encode() for path in sorted(Path(source).iterdir())))
        return file_hash(source, "sha256")[:16]
    except OSError:  # asking the question names what is wrong
        return str(source)


def _weights(model: torch.nn.Module) -> str:
    """Hash names, types and bytes of all tensors where they are: sums of their words, each times a random number."""
    random, parts = torch.randint(-(2**63), 2**63 - 1, (PIECE,), generator=torch.Generator().manual_seed(0)), []
    for name, tensor in model.state_dict().items():
        flat = tensor.detach().contiguous().reshape(-1)
        start, size = flat.storage_offset() * flat.element_size(), flat.numel() * flat.element_size()
        words = flat.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[math.gcd(start, size, 8)])
        random = random.to(words.device)
        sums = torch.stack([(piece * random[: len(piece)]).sum() for piece in words.split(PIECE)])
        parts.append(f"{name} {tensor.dtype} {tuple(tensor.shape)} {sums.tolist()}")
    return _hash("\n".join(parts).encode())


def _hash(*parts: bytes) -> str:
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]
