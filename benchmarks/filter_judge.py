"""The weak judge of `benchmarks.filter_quality`: SmolLM2-135M-Instruct scores clean and off-topic rows.

It reads text alone, so it can only notice answers that do not fit their question, never those that do not fit the picture.
"""

from __future__ import annotations

import dataclasses
import random
import tempfile
from collections import Counter
from pathlib import Path

from benchmarks.filter_clean import streams
from ivl.api import load
from ivl.compose import compose
from ivl.data.filters.judge import Judge, JudgeConfig, Quality
from ivl.model.checkpoint import save_model
from ivl.types import Message, Record
from tests.model.checkpoints import random_model, tiny_like
from tests.packages import smollm2_gguf


def off_topic(records: list[Record], seed: int) -> list[Record]:
    """Every record with the answers of another one about another picture."""
    order = random.Random(seed).sample(range(len(records)), len(records))
    answers = {a: records[b] for a, b in zip(order, order[1:] + order[:1], strict=True)}
    return [_with_answers(record, answers[n]) for n, record in enumerate(records)]


def _with_answers(record: Record, other: Record) -> Record:
    said = [message for message in other.conversations[0] if message.role == "assistant"]
    talk: list[Message] = []
    for message in record.conversations[0]:
        talk.append(said[len(talk) // 2 % len(said)] if message.role == "assistant" else message)
    return dataclasses.replace(record, conversations=(tuple(talk),))


def measure(count: int, split: str, seed: int, min_score: float = 7.0) -> dict:
    """Shares dropped of `count` clean rows with pictures and of as many off-topic ones, and the area under the curve."""
    supply = streams(split, seed)  # type: ignore[arg-type]
    kinds = ("easy-vqa", "easy-vqa captions", "photographs")
    clean = [next(supply[kinds[n % len(kinds)]]) for n in range(count)]
    rows = {"clean": clean, "off-topic": off_topic(clean, seed)}
    with tempfile.TemporaryDirectory() as folder:
        save_model(random_model(tiny_like("1B")), Path(folder) / "vit")
        compose(Path(folder) / "vit", smollm2_gguf(), None, Path(folder) / "judge")
        config = JudgeConfig(max_new_tokens=48, batch_size=16, max_unjudged_share=1.0)
        judge = Judge(load(Path(folder) / "judge").engine, name="smollm2-135m-instruct", config=config)
        verdicts = {
            kind: judge.verdicts(Quality(min_score=min_score), [(r, "general") for r in some]) for kind, some in rows.items()
        }
    scores = {kind: [v.score for v in found if v.score is not None] for kind, found in verdicts.items()}
    pairs = [(a > b) + (a == b) / 2 for a in scores["clean"] for b in scores["off-topic"]]
    return {
        "rows": count,
        "dropped": {kind: sum(not v.keep for v in found) / count for kind, found in verdicts.items()},
        "unjudged": {kind: sum(v.score is None for v in found) / count for kind, found in verdicts.items()},
        "scores": {kind: dict(sorted(Counter(found).items())) for kind, found in scores.items()},
        "auc": sum(pairs) / len(pairs) if pairs else None,
    }
