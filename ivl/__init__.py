"""InternVL2.5 in plain PyTorch."""

from ivl.api import Chat, Model, ask, load
from ivl.errors import InputError
from ivl.types import Conversation, ImageRef, Message, SamplingParams, Text, VideoRef

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
