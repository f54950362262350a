"""Run benchmarks.gpu on the pretended card twice: `python -m tests.helpers.card_check LIBRARY FOLDER`.

FOLDER/gpu.json is what it finds there. For FOLDER/timed.json the sections that need a real card run, too, compiled graphs as
plain calls, for there is no compiler for it; their rates mean nothing.
"""

from __future__ import annotations

import sys
from pathlib import Path

from tests.helpers import pretend

TIMED = ("serving plan", "limits", "inference", "training", "compile", "cards")


def main(library: Path, folder: Path) -> None:
    pretend.start(library)
    import torch

    torch.set_num_threads(1)
    from benchmarks import gpu
    from ivl.parallel import compile as compiling

    code = gpu.main(["--size", "tiny", "--out", str(folder / "gpu.json")])
    gpu.is_real = lambda: True
    gpu.SECTIONS = tuple(each for each in gpu.SECTIONS if each[0] in TIMED)
    plain = compiling.compile_layers
    compiling.compile_layers = lambda model: plain(model, "eager")
    gpu.main(["--size", "tiny", "--out", str(folder / "timed.json")])
    sys.exit(code)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
