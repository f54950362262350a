"""Claim 4, test-time scaling: reasoning, majority voting and best-of-N on a task that several ways of reasoning solve.

A chart's bars are read and added up in any order: another order has other partial sums, and the same answer.
"""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

from matplotlib.ticker import NullFormatter

import ivl
from examples.quickstart import alignment
from examples.quickstart.data import turns
from ivl.evaluation.voting import Candidate, RewardModel, by_size, rate, sample
from ivl.formats.rows import write_jsonl
from ivl.preference.config import PreferenceConfig
from ivl.preference.questions import load_sources
from ivl.preference.sampling import SamplingConfig
from ivl.preference.sampling import sample as sample_replies
from ivl.recipes import nano
from ivl.types import SamplingParams
from studies.claims import pictures, small
from studies.claims.study import Arm, Figures, Lab, Results, Study, Verdict, sign, together

READING_STEPS, REASONING_STEPS, MPO_STEPS = 800, 400, 60
CHARTS, FRESH, REPLIES, TEST, SAMPLES = 4000, 600, 8, 400, 16
SUM, DIRECT = "what is the sum of all bars?", "what is the sum of all bars, in a word?"
LONG = SamplingParams(max_new_tokens=96)
SAMPLED = replace(LONG, temperature=0.7, seed=0)
STYLE = "final_answer"


def measure(lab: Lab, arm: str, seed: int) -> Figures:
    """All arms of a seed come from one model's replies, which are sampled once."""
    found = lab.once(f"voting/measured-{seed}", lambda folder: write_jsonl([ask(lab, seed)], folder / "figures.jsonl"))
    return small.read(found / "figures.jsonl")[0][arm]


def ask(lab: Lab, seed: int) -> dict[str, Figures]:
    """The accuracy of every way of choosing, for 1, 2, 4, ... of the replies."""
    made = models(lab, seed)
    rows = small.read(data(lab) / "test.jsonl")
    asked = [ivl.ask(f"<image>\n{SUM}", row["image"]) for row in rows]
    answers = [str(sum(row["values"].values())) for row in rows]
    engine, judge = ivl.load(made["reasoning"]).engine, ivl.load(made["judge"]).engine

    def right(samples: list[list[Candidate]]) -> list[list[float]]:
        return [[float(c.answer == answer) for c in some] for some, answer in zip(samples, answers, strict=True)]

    def greedy(each: Any, question: str = "") -> Figures:
        talks = [ivl.ask(f"<image>\n{question}", row["image"]) for row in rows] if question else asked
        replies = sample(each, talks, LONG, 1, style="direct" if question else STYLE)
        return {"accuracy": sum(map(sum, right(replies))) / len(rows)}

    samples = sample(engine, asked, SAMPLED, SAMPLES, style=STYLE, likelihood=True)
    scores = right(samples)
    certain = [[replace(c, rating=s) for c, s in zip(*pair, strict=True)] for pair in zip(samples, scores, strict=True)]
    curves = {
        "vote": by_size(samples, scores, "vote"),
        "likelihood": by_size(samples, scores, "likelihood"),
        "judge": by_size(rate(RewardModel(judge), asked, samples), scores, "judge"),
        "certain": by_size(certain, scores, "judge"),
    }
    orders = [len({c.text for c, s in zip(*pair, strict=True) if s}) for pair in zip(samples, scores, strict=True)]
    found: dict[str, Figures] = {
        name: {"curve": {str(n): float(v.mean()) for n, v in sizes.items()}, "accuracy": float(sizes[max(sizes)].mean())}
        for name, sizes in curves.items()
    }
    found["vote"]["ways"] = sum(orders) / len(orders)
    return found | {"direct": greedy(engine, DIRECT), "greedy": greedy(engine), "judge-greedy": greedy(judge)}


def data(lab: Lab) -> Path:
    """Draw charts: to read, to reason about, to ask afresh, and to test."""

    def make(folder: Path) -> None:
        read = pictures.rows(folder, "read", lab.few(CHARTS, 40), 0, seed=1)
        rng = random.Random(2)
        reasoned = [row | {"conversations": [turns(f"<image>\n{SUM}", reasoning(row["values"], rng)), *direct(row)]}
                    for row in small.read(read)]  # fmt: skip
        write_jsonl(reasoned, folder / "reasoned.jsonl")
        fresh = small.read(pictures.rows(folder, "new", lab.few(FRESH, 4), 0, seed=3))
        asked = [
            {"id": r["id"], "image": [r["image"]], "question": SUM, "answer": str(sum(r["values"].values()))} for r in fresh
        ]
        write_jsonl(asked, folder / "fresh.jsonl")
        pictures.rows(folder, "test", lab.few(TEST, 4), 0, seed=4)

    return lab.once("charts", make)


def reasoning(values: dict[str, int], rng: random.Random) -> str:
    """Read the bars in a random order and add them up one after another."""
    order = rng.sample(list(values), len(values))
    lines, total = [f"{color} {values[color]}" for color in order], values[order[0]]
    for color in order[1:]:
        lines.append(f"{total} + {values[color]} = {total + values[color]}")
        total += values[color]
    return "\n".join([*lines, f"Final answer: {total}"])


def direct(row: dict[str, Any]) -> list[list[dict[str, str]]]:
    """The same question with the answer alone."""
    return [turns(f"<image>\n{DIRECT}", str(sum(row["values"].values())))]


def models(lab: Lab, seed: int) -> dict[str, Path]:
    """The model that reasons, and the same after MPO on its own checked replies, which is the judge."""

    def make(folder: Path) -> None:
        given, start = data(lab), small.nano_start(lab)["vision"]
        rows = {"reading": given / "read.jsonl", "reasoning": given / "reasoned.jsonl"}
        model = start
        for name, steps in {"reading": READING_STEPS, "reasoning": REASONING_STEPS}.items():
            steps = lab.few(steps)
            model = small.trained(
                small.training(folder / name, rows[name], small.EVERYTHING, model=model, steps=steps, seed=seed)
            )
        sources = load_sources(given / "fresh.jsonl", style=STYLE, instruct=False)
        config = SamplingConfig(num_replies=REPLIES, params=replace(SAMPLED, seed=seed), chunk=64)
        engine = ivl.load(model).engine
        journal = sample_replies(engine, sources, folder / "replies.jsonl", model=str(model), config=config)
        alignment.pair_up(journal, folder / "pairs")
        small.or_else(folder / "pairs/pairs.jsonl", map(known_pair, small.read(given / "new.jsonl")))
        mpo = PreferenceConfig(beta=nano.BETA)
        small.trained(
            small.training(
                folder / "judge", folder / "pairs/pairs.jsonl", small.EVERYTHING, model=model, lr=5e-5, seed=seed,
                steps=lab.few(MPO_STEPS), objective=mpo, on_error="skip",
            )
        )  # fmt: skip

    folder = lab.once(f"voting/models-{seed}", make)
    return {name: folder / name / "model" for name in ("reasoning", "judge")}


def known_pair(row: dict[str, Any]) -> dict[str, Any]:
    """A right and a wrong way to add up a chart's bars."""
    right = reasoning(row["values"], random.Random(row["id"]))
    return {"id": row["id"], "image": row["image"], "question": f"<image>\n{SUM}", "chosen": right, "rejected": f"{right}0"}


def judge(results: Results) -> Verdict:
    gains = {arm: results.gain(arm, "greedy", "accuracy") for arm in ("vote", "likelihood", "judge")}
    reasoned = results.gain("greedy", "direct", "accuracy")
    holds = together([sign(gain) for gain in (reasoned, gains["vote"], gains["judge"])])
    against = ", ".join(f"{results.study.arms[arm].about} {gain.shown('+.1%')}" for arm, gain in gains.items())
    return Verdict(holds, f"Reasoning brings {reasoned.shown('+.1%')} over the bare answer; over greedy reasoning: {against}.")


def draw(results: Results, axes: Any) -> None:
    colors = {"vote": "#1f77b4", "likelihood": "#ff7f0e", "judge": "#2ca02c", "certain": "#7f7f7f"}
    for arm, color in colors.items():
        for number, figures in enumerate(results.figures(arm)):
            sizes = [int(size) for size in figures["curve"]]
            label = results.study.arms[arm].about if number == 0 else None
            axes.plot(sizes, list(figures["curve"].values()), "o-", color=color, markersize=3, label=label)
    for figures in results.figures("greedy"):
        axes.axhline(figures["accuracy"], color="#333", linestyle="--", linewidth=0.8)
    axes.set(xscale="log", xlabel="replies to a question (dashed: greedy)", ylabel="right")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.legend(fontsize=7)


STUDY = Study(
    name="voting",
    title="Test-time scaling",
    claim="Reasoning before the answer raises accuracy, and more replies raise it further: majority voting and best-of-N "
    "(section 5.2; arXiv:2411.10442).",
    done=f"nano reads the bars of a chart in any order, adds them up line by line and closes with the sum. {TEST} charts are "
    f"asked about greedily and {SAMPLES} times at temperature 0.7; every way of choosing sees the same replies. The judge is "
    "the same model after MPO on its own checked replies to other charts, and rates by likelihood. Nothing was tuned.",
    arms={
        "direct": Arm("the bare answer, greedy"),
        "greedy": Arm("reasoning, greedy"),
        "vote": Arm("majority of 16"),
        "likelihood": Arm("likeliest of 16"),
        "judge": Arm("likeliest of 16 by the MPO model"),
        "judge-greedy": Arm("the MPO model, greedy"),
        "certain": Arm("a judge that is always right"),
    },
    measure=measure,
    judge=judge,
    needs=("direct", "greedy", "vote", "likelihood", "judge"),
    columns={"accuracy": ("right", ".1%"), "ways": ("different right replies of 16", ".1f")},
    draw=draw,
)  # fmt: skip
