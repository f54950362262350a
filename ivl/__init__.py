"""InternVL2.5 in plain PyTorch."""

import os

# Large tensors in huge pages: torch reads weights about a fifth faster from them, and gets them with far fewer page
# faults. torch looks at this once, so it has no effect where torch was imported before ivl.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

from ivl.api import Chat, Model, ask, load
from ivl.errors import InputError
from ivl.types import Conversation, ImageRef, Message, SamplingParams, Text, VideoRef


def __getattr__(name: str) -> str:
    if name == "__version__":
        from importlib.metadata import version

        return version("ivl")
    raise AttributeError(f"module 'ivl' has no attribute {name!r}")


__all__ = [
    "Chat",
    "Conversation",
    "ImageRef",
    "InputError",
    "Message",
    "Model",
    "SamplingParams",
    "Text",
    "VideoRef",
    "ask",
    "load",
]
