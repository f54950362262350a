"""How soon a run that stopped within a large mixture has its first batch again, and how many rows that reads.

    python -m benchmarks.resume --rows 1000000

Two data sets of text and small pictures, drawn in a shuffled epoch of about as many rows. The loader is placed in the
middle by a saved position, in a new process, as a resumed run is.
"""

from __future__ import annotations

import json
import multiprocessing
import tempfile
import time
from pathlib import Path

import tyro

from ivl.data.config import DataConfig
from ivl.data.loader import Loader
from ivl.data.mixture import Mixture
from tests.helpers.mixtures import picture, processor, turns


def write_mixture(folder: Path, rows: int) -> Path:
    for n in range(100):
        picture(folder / f"{n}.png", 60, 40, seed=n)
    for name, count in (("text", rows // 2), ("pictures", rows - rows // 2)):
        with (folder / f"{name}.jsonl").open("w") as file:
            for n in range(count):
                row: dict = {"id": n, "conversations": turns("what is this", "a red circle " * (1 + n % 40))}
                if name == "pictures":
                    row |= {"image": f"{n % 100}.png", "conversations": turns("<image>what is this", "red " * (1 + n % 9))}
                file.write(json.dumps(row) + "\n")
    entries = {"text": {"annotation": "text.jsonl"}, "pictures": {"annotation": "pictures.jsonl", "repeat_time": 1.5}}
    path = folder / "meta.json"
    path.write_text(json.dumps(entries))
    return path


def resume(config: DataConfig, states: list[dict], ranks: int, out: Path) -> None:
    read = 0
    original = Mixture.record

    def counted(self: Mixture, dataset: int, row: int):
        nonlocal read
        read += 1
        return original(self, dataset, row)

    Mixture.record = counted  # type: ignore[method-assign]
    began = time.monotonic()
    loader = Loader(config, processor(), seed=0, rank=0, world_size=ranks)
    opened = time.monotonic() - began
    loader.restore(states)
    batch = next(iter(loader))
    seconds = time.monotonic() - began
    state = json.dumps(loader.state())
    figures = {
        "ranks": ranks, "open_files_s": round(opened, 2), "first_batch_s": round(seconds, 2), "rows_read": read,
        "samples_of_first_batch": len(batch.ids), "state_bytes": len(state),
    }  # fmt: skip
    out.write_text(json.dumps(figures))


def main(rows: int = 1_000_000, packs: int = 50, max_tokens: int = 8192) -> None:
    """Print the figures, for as many ranks as before and for another number.

    Args:
        rows: Rows of the mixture's files.
        packs: Packs taken before the position is saved, in the middle of the epoch.
        max_tokens: Tokens of a pack.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = DataConfig(mixture=str(write_mixture(folder, rows)), max_tokens=max_tokens, epochs=1, num_workers=0)
        states = []
        for rank in range(2):
            loader = Loader(config, processor(), seed=0, rank=rank, world_size=2)
            state = loader.state()
            state["next"] = len(loader.mixture) // 2 // 2 * 2 + rank
            loader.restore(state)
            stream = iter(loader)
            for _ in range(packs):
                next(stream)
            states.append(json.loads(json.dumps(loader.state())))
        print(f"{rows:,} rows, {len(loader.mixture):,} draws an epoch; resumed at draw {states[0]['next']:,}")
        for ranks in (2, 1, 8):
            out = folder / "out.json"
            process = multiprocessing.get_context("spawn").Process(target=resume, args=(config, states, ranks, out))
            process.start()
            process.join()
            print(out.read_text())


if __name__ == "__main__":
    tyro.cli(main)
