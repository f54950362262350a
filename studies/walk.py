"""Which files of ivl one pack and one request enter: `python -m studies.walk`.

A profiler notes the file of every call while a tiny model of random weights does one training step on rows from a file, and
answers one question about a picture.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from PIL import Image

import ivl
from ivl.data.config import DataConfig
from ivl.data.loader import Loader
from ivl.inference.engine import Engine
from ivl.model.vlm import VLM
from ivl.train.config import Stage, TrainConfig
from ivl.train.loop import train
from ivl.train.stage import apply_stage
from ivl.types import SamplingParams
from tests.helpers.mixtures import make_file, processor

PACKAGE = Path(ivl.__file__).parent


@contextmanager
def walking(title: str) -> Iterator[None]:
    """Print the files and count the functions that are entered inside the block."""
    functions: set[tuple[str, str]] = set()

    def note(frame: FrameType, event: str, _: object) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(str(PACKAGE)):
            functions.add((frame.f_code.co_filename, frame.f_code.co_name))

    sys.setprofile(note)
    try:
        yield
    finally:
        sys.setprofile(None)
    files = sorted({str(Path(file).relative_to(PACKAGE)) for file, _ in functions})
    print(f"{title}: {len(files)} files, {len(functions)} functions\n  {' '.join(files)}")


def main() -> None:
    model = VLM(processor().config)
    model.init_weights()
    apply_stage(model, Stage(trainable=("vision", "projector", "decoder")))
    with tempfile.TemporaryDirectory() as folder:
        data = DataConfig(mixture=str(make_file(Path(folder), 12)), max_tokens=512, num_workers=0)
        config = TrainConfig(precision="fp32", num_steps=1, tensorboard=False)
        with walking("one pack to one step"):
            train(model, Loader(data, processor(), seed=0), config)
    engine = Engine(model.eval(), processor())
    question = ivl.ask("what is this", Image.new("RGB", (44, 40)))
    with walking("one request to its tokens"):
        engine.generate([question], SamplingParams(max_new_tokens=4))


if __name__ == "__main__":
    main()
