"""Rows a second of an evaluation beside a plain loop of transformers' generate: `python -m benchmarks.evaluation_rows MODEL`.

Both sides answer the same questions about easy-vqa's pictures with the same weights, greedily and by turns. The loop asks one
question at a time, as evaluation scripts do. What is timed goes from rows to scores: pictures are opened and cut into tiles,
prompts rendered, replies written and compared. Loading and a first round of a few rows, which compiles kernels, are left out.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch

import ivl
from ivl.checkpoint.convert import convert
from ivl.evaluation.config import EvalConfig
from ivl.evaluation.run import evaluate
from ivl.evaluation.tasks import find
from ivl.model.vlm import normalize

WARM_ROWS = 16


def main() -> None:
    """Time both sides and print the medians and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--rows", type=int, default=1000)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    from transformers import InternVLForConditionalGeneration

    task, engine = find("easy-vqa"), ivl.load(arguments.model, dtype="float32").engine
    examples = [example for example, _ in zip(task.examples(), range(arguments.rows), strict=False)]
    processor, tokens = engine.processor, task.params.max_new_tokens
    with tempfile.TemporaryDirectory() as folder:
        theirs = Path(folder) / "theirs"
        convert(arguments.model, theirs, to="transformers", dtype="float32")
        model = InternVLForConditionalGeneration.from_pretrained(theirs, dtype=torch.float32).eval()

        @torch.inference_mode()
        def loop(rows: int) -> float:
            right = 0.0
            for example in examples[:rows]:
                prompt = processor.prompt(example.conversation)
                ids_1T = prompt.tokens_T[None]
                replied_1T = model.generate(
                    input_ids=ids_1T, attention_mask=torch.ones_like(ids_1T), max_new_tokens=tokens, do_sample=False,
                    pixel_values=normalize(prompt.tiles_GSSC, torch.float32), pad_token_id=processor.config.eos_token_ids[0],
                )  # fmt: skip
                reply = processor.tokenizer.decode(replied_1T[0, ids_1T.shape[1] :].tolist())
                right += float(task.score(reply, example))  # type: ignore[arg-type]
            return right / rows

        def ours(rows: int) -> float:
            config = EvalConfig(limit=rows, fresh=True)
            return evaluate(task, engine, config, model="bench", predictions=Path(folder) / "p.jsonl")["value"]

        seconds: dict[str, list[float]] = {"ivl": [], "generate": []}
        for rows in (min(WARM_ROWS, len(examples)), *[len(examples)] * arguments.repeats):
            for side, run in (("ivl", ours), ("generate", loop)):
                began = time.perf_counter()
                value = run(rows)
                seconds[side].append(time.perf_counter() - began)
                print(f"{side:9} {rows:,} rows, {rows / seconds[side][-1]:8.1f} a second, {value:.1%} right", flush=True)
    medians = {side: statistics.median(times[1:]) for side, times in seconds.items()}
    print(f"ratio of medians {medians['generate'] / medians['ivl']:.2f}")


if __name__ == "__main__":
    main()
