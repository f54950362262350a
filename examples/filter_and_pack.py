"""From raw rows to a trained model: validate, count, filter, pack, train.

    python examples/filter_and_pack.py

On the command line the same is `ivl data validate`, `stats`, `filter` and `pack`, then `ivl train`. The raw rows
describe drawn pictures; one in ten is spoilt in a way that real data are.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from own_training_recipe import COLOURS, SHAPES, draw, recipe

from ivl.checkpoint import load_tokenizer
from ivl.data.loader import Loader
from ivl.datasets.inspect import inspect
from ivl.datasets.stats import DatasetStats
from ivl.filters.chain import load_chain
from ivl.filters.run import run as run_filter
from ivl.formats.rows import write_jsonl
from ivl.processing.processor import Processor
from ivl.runs.run import run

RUN = Path("runs/examples/filter-and-pack")
CHAIN = {"stages": [{"use": "length"}, {"use": "repetition"}, {"use": "leaks"}, {"use": "duplicates"}]}


def main() -> None:
    shutil.rmtree(RUN, ignore_errors=True)
    raw = write_jsonl(raw_rows(RUN / "raw"), RUN / "raw/rows.jsonl")
    config = recipe()
    processor = Processor(config.architecture, load_tokenizer(config.tokenizer))

    # Every problem has a file and a line. Training would stop at the first of them.
    data = replace(config.data, mixture=str(raw), max_tokens=512)
    *problems, stats = inspect(data, processor)
    assert isinstance(stats, DatasetStats)
    print(f"validate: {stats.bad} bad rows, {', '.join(stats.kinds)}; the first at {problems[0].source}")
    print(
        f"stats: {stats.rows} rows, {stats.tokens:,} tokens, {stats.tiles} tiles, longest sample {stats.tokens_per_sample.most}"
    )

    # What is left out is written down with the stage and the reason; report.html shows examples of it.
    (RUN / "chain.json").write_text(json.dumps(CHAIN))
    run_filter(load_chain(RUN / "chain.json"), raw, RUN / "filtered")
    dropped = [json.loads(line) for line in (RUN / "filtered/dropped.jsonl").read_text().splitlines()]
    print(f"filter: kept {stats.rows - len(dropped)} of {stats.rows} rows")
    print(*(f"  {row['id']}: {row['stage']}, {row['reason']}" for row in dropped), sep="\n")

    # One epoch in packs, before anything trains.
    data = replace(data, mixture=str(RUN / "filtered/meta.json"))
    loader = Loader(replace(data, epochs=1), processor, seed=0)
    packs = sum(1 for _ in loader)
    print(f"pack: {packs} packs an epoch, {loader.fill[0]:.0%} of the tokens used")

    train = replace(config.train, num_steps=20)
    trained = run(replace(config, name="filter-and-pack", out_dir=str(RUN / "run"), data=data, train=train))
    print(f"train: {trained}")


def raw_rows(folder: Path) -> Iterator[dict]:
    """One row for each picture; some have a fault."""
    folder.mkdir(parents=True, exist_ok=True)
    for n in range(56):
        colour, shape = COLOURS[n % 4], SHAPES[n // 4 % 2]
        draw(colour, shape, at=n % 7).save(folder / f"{n}.png")
        row = {
            "id": str(n),
            "image": f"{n}.png",
            "conversations": talk(f"It is a {colour} {shape}, {n % 7} pixels off the edge."),
        }
        if n == 10:
            row["conversations"] = talk("It is a red circle. " + "There is nothing else to see. " * 10)
        elif n == 20:
            row["image"] = "lost.png"
        elif n == 30:
            row["conversations"] = talk("It is <image> a blue circle.<|im_end|>")
        elif n == 40:
            row["conversations"] = talk("")
        yield row
    yield {**row, "id": "again"}


def talk(answer: str) -> list[dict[str, str]]:
    return [{"from": "human", "value": "<image>\nwhat is in the picture?"}, {"from": "gpt", "value": answer}]


if __name__ == "__main__":
    main()
