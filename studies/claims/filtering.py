"""Claim 4, filtering: a few repetitive rows make a model repeat itself; the repetition filter takes them out."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from examples.quickstart import alignment
from ivl.filters.chain import load_chain
from ivl.filters.run import run as run_filter
from ivl.formats.rows import write_jsonl
from studies.claims import descriptions, small
from studies.claims.study import Arm, Figures, Lab, Results, Study, Verdict, sign, together

STEPS, OUTPUTS, REASONED = 400, 200, 400
ARMS = {"whole-3": 0.03, "filtered-3": 0.03, "whole-10": 0.10, "filtered-10": 0.10}
"""Shares of descriptions that get stuck in a loop, before the filter."""


def measure(lab: Lab, arm: str, seed: int) -> Figures:
    given, out = descriptions.data(lab), lab.runs / f"filtering/{arm}-{seed}"
    told = lab.once(f"filtering/data-{arm}", lambda folder: write_data(lab, arm, folder))
    parts = [told / "rows.jsonl", given / "names.jsonl", given / "reasoning.jsonl"]
    trainable = ("projector", "decoder")
    config = small.training(out, parts, trainable, model=descriptions.start(lab), steps=lab.few(STEPS), seed=seed)
    model = small.trained(config)
    found = descriptions.measured(descriptions.said(model, lab.few(OUTPUTS)))
    found["loss"] = small.exact(model, given / "test-descriptions.jsonl")["loss"]
    reasoned = alignment.held_out(model, lab.few(REASONED), out, seed=10)
    small.drop(out)
    return (
        found | {f"reasoning_{key}": value for key, value in reasoned.items()} | json.loads((told / "filter.json").read_text())
    )


def write_data(lab: Lab, arm: str, folder: Path) -> None:
    """Write an arm's descriptions, and what the filter did to them."""
    rows = small.read(descriptions.data(lab) / "descriptions.jsonl")
    looped = [with_loop(row, ARMS[arm]) for row in rows]
    raw = write_jsonl(looped, folder / "raw.jsonl")
    loops = {row["id"] for row in looped if row["injected"]}
    if arm.startswith("whole"):
        write_jsonl(looped, folder / "rows.jsonl")
        dropped: set[str] = set()
    else:
        (folder / "chain.json").write_text(json.dumps({"stages": [{"use": "repetition"}]}))
        run_filter(load_chain(folder / "chain.json"), raw, folder / "filtered")
        verdicts = small.read(folder / "filtered/verdicts.jsonl")
        dropped = {row["id"] for row in verdicts if not row["keep"]}
        write_jsonl((row for row in looped if row["id"] not in dropped), folder / "rows.jsonl")
    counts = {"rows": len(rows), "loops": len(loops), "dropped": len(dropped), "loops_dropped": len(loops & dropped)}
    (folder / "filter.json").write_text(json.dumps(counts))


def with_loop(row: dict[str, Any], share: float) -> dict[str, Any]:
    """Get `share` of the rows stuck: a sentence, or the end of one, comes again and again until the text breaks off.

    The share changes no other row.
    """
    rng = random.Random(f"loop {row['id']}")
    if rng.random() >= share:
        return row | {"injected": False}
    question, answer = row["conversations"]
    sentences = [f"{each.strip()}." for each in answer["value"].split(".")[:-1]]
    at = rng.randrange(2, len(sentences) - 1)
    words = sentences[at].split()
    stuck = words if rng.random() < 0.5 else words[-rng.randint(2, len(words)) :]
    tail = stuck * (1 + 220 // len(stuck))
    text = " ".join([*sentences[: at + 1], *tail[: rng.randint(100, 200)]])
    return row | {"injected": True, "conversations": [question, answer | {"value": text}]}


def judge(results: Results) -> Verdict:
    endless, twice = results.gain("whole-10", "filtered-10", "endless"), results.gain("whole-3", "filtered-3", "twice")
    reasoned = results.gain("filtered-10", "whole-10", "reasoning_accuracy")
    share = {(arm, figure): results.of(arm, figure).shown(".1%") for arm in ARMS for figure in ("endless", "twice")}
    return Verdict(
        together([sign(endless), sign(twice)]),
        f"Replies that never end: {share['whole-10', 'endless']} with 10% of loops and {share['filtered-10', 'endless']} after "
        f"the filter; replies that say a sentence twice: {share['whole-3', 'twice']} with 3% and "
        f"{share['filtered-3', 'twice']} after it. The filter changes reasoned answers at 10% by {reasoned.shown('+.1%')}.",
    )


STUDY = Study(
    name="filtering",
    title="Filtering repetition",
    claim="Even a few thousand repetitive rows among millions make a model fall into loops, above all in long reasoning; the "
    "filter pipeline takes them out (section 3.5, figure 5).",
    done=f"nano learns to describe easy-vqa pictures in 13 sentences, and to reason about several pictures, for {STEPS} steps "
    "from one start: on descriptions of which 3% or 10% get stuck in a loop, and on what the repetition stage of `ivl data "
    f"filter` keeps of them. Then it goes on greedily from the first sentences of {OUTPUTS} descriptions of test pictures, "
    f"and answers {REASONED} questions with reasoning. Nothing was tuned.",
    arms={
        "whole-3": Arm("3% loops"),
        "filtered-3": Arm("3% loops, filtered"),
        "whole-10": Arm("10% loops"),
        "filtered-10": Arm("10% loops, filtered"),
    },
    measure=measure,
    judge=judge,
    needs=tuple(ARMS),
    columns={
        "repetitive": ("flagged as repetitive", ".1%"),
        "endless": ("never ends", ".1%"),
        "twice": ("says a sentence twice", ".1%"),
        "true": ("says nothing false", ".1%"),
        "loss": ("loss on clean descriptions", ".3f"),
        "reasoning_accuracy": ("reasoned answers right", ".1%"),
        "reasoning_endless": ("reasoning never ends", ".1%"),
    },
    draw=lambda results, axes: results.bars(axes, "twice", "says a sentence twice"),
)  # fmt: skip
