"""A video becomes frames: which ones (spec 2.4 and 11), and how they are read."""

from __future__ import annotations

import random
from typing import Literal

from PIL import Image

from ivl.types import VideoRef

Mode = Literal["even", "rand", "middle", "fps"]


def load_frames(
    ref: VideoRef,
    num_frames: int,
    *,
    mode: Mode = "even",
    fps: float = 1.0,
    generator: random.Random | None = None,
    root: str = "",
) -> list[Image.Image]:
    raise NotImplementedError
