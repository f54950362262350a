"""The weak judge of `studies.filter_quality`: SmolLM2-135M-Instruct scores clean and off-topic rows.

It reads text alone, so it can only notice answers that do not fit their question, never those that do not fit the picture.
"""

from __future__ import annotations

import dataclasses
import random
import re
import tempfile
from collections import Counter
from pathlib import Path

import torch

from examples.real_parts.parts import smollm2
from ivl.api import Model, load
from ivl.checkpoint import save_model
from ivl.checkpoint.compose import compose
from ivl.filters.judge import DataJudge, DataJudgeConfig, Quality
from ivl.generators import answers_of
from ivl.types import Layout, Message, Record, SamplingParams, Text
from studies.filter_clean import streams
from tests.helpers.checkpoints import random_model, tiny_like


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


def measure(count: int, split: str, seed: int) -> dict:
    """Three ways to ask the judge about `count` clean rows with pictures and as many off-topic ones.

    The engine's own stage (scores of 0 to 10, threshold 7); a plain question for yes or no; and no question at all: how much
    likelier the answer's tokens become when the question stands before them, dropped below the 5% lowest of the clean rows.
    """
    supply = streams(split, seed)  # type: ignore[arg-type]
    kinds = ("easy-vqa", "easy-vqa captions", "photographs")
    clean = [next(supply[kinds[n % len(kinds)]]) for n in range(count)]
    rows = {"clean": clean, "off-topic": off_topic(clean, seed)}
    with tempfile.TemporaryDirectory() as folder:
        save_model(random_model(tiny_like("1B")), Path(folder) / "vit")
        compose(Path(folder) / "vit", smollm2(), None, Path(folder) / "judge")
        model = load(Path(folder) / "judge")
        return {
            "rows": count,
            "quality stage": _staged(model, rows),
            "yes or no": _asked(model, rows),
            "likelihood": _likelihood(model, rows),
        }


def _staged(model: Model, rows: dict[str, list[Record]]) -> dict:
    config = DataJudgeConfig(max_new_tokens=32, batch_size=16, max_unjudged_share=1.0)
    judge = DataJudge(model.engine, name="smollm2-135m-instruct", config=config)
    verdicts = {kind: judge.verdicts(Quality(), [(row, "general") for row in some]) for kind, some in rows.items()}
    return {
        "dropped": {kind: sum(not v.keep for v in found) / len(found) for kind, found in verdicts.items()},
        "no score in the reply": {kind: sum(v.score is None for v in found) / len(found) for kind, found in verdicts.items()},
    }


def _asked(model: Model, rows: dict[str, list[Record]]) -> dict:
    said = {}
    for kind, some in rows.items():
        prompts = [f"{_turns(row)}\n\nDoes every answer fit its question? Reply with yes or no." for row in some]
        talks = [(Message("system", (Text("You check answers."),)), Message("user", (Text(prompt),))) for prompt in prompts]
        replies = answers_of(model.engine, talks, SamplingParams(max_new_tokens=6))
        said[kind] = Counter((re.findall("[a-z]+", reply.lower()) or [""])[0] for reply in replies)
    return {
        "dropped": {kind: said[kind]["no"] / len(some) for kind, some in rows.items()},
        "neither yes nor no": {kind: 1 - (said[kind]["no"] + said[kind]["yes"]) / len(some) for kind, some in rows.items()},
    }


def _turns(row: Record) -> str:
    return "\n".join(f"{'Question' if m.role == 'user' else 'Answer'}: {m.text.strip()}" for m in row.conversations[0])


@torch.no_grad()
def _likelihood(model: Model, rows: dict[str, list[Record]]) -> dict:
    gains = {kind: [_gain(model, row) for row in some] for kind, some in rows.items()}
    limit = sorted(gains["clean"])[len(gains["clean"]) // 20]
    wins = [(a > b) + (a == b) / 2 for a in gains["clean"] for b in gains["off-topic"]]
    return {
        "dropped": {kind: sum(gain < limit for gain in found) / len(found) for kind, found in gains.items()},
        "area under the curve": sum(wins) / len(wins),
    }


def _gain(model: Model, row: Record) -> float:
    """Mean gain in nats a token of the answers from their questions."""
    talk = row.conversations[0]
    total, tokens = 0.0, 0
    for question, answer in zip(talk[::2], talk[1::2], strict=True):
        with_question = _log_probs(model, f"Question: {question.text.strip()}\nAnswer:", f" {answer.text}")
        without = _log_probs(model, "Answer:", f" {answer.text}")
        total, tokens = total + float((with_question - without).sum()), tokens + len(without)
    return total / tokens


def _log_probs(model: Model, prompt: str, answer: str) -> torch.Tensor:
    vlm, tokenizer = model.engine.model, model.engine.processor.tokenizer
    before, after = tokenizer.encode(prompt), tokenizer.encode(answer)
    ids = torch.tensor(before + after)
    logits_TV = vlm.head(vlm(ids, Layout.packed((len(ids),)))).float()
    return logits_TV[len(before) - 1 : -1].log_softmax(-1).gather(1, ids[len(before) :, None])[:, 0]
