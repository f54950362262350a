"""Claim 3: square averaging of the loss lies between token averaging, which favors long answers, and sample averaging."""

from __future__ import annotations

import random

from ivl.formats.rows import write_jsonl
from studies.claims import descriptions, small
from studies.claims.study import Arm, Figures, Lab, Results, Study, Verdict

STEPS, OUTPUTS, TEST_PICTURES = 300, 200, 250


def measure(lab: Lab, arm: str, seed: int) -> Figures:
    given, out = descriptions.data(lab), lab.runs / f"reweighting/{arm}-{seed}"
    parts = [given / "descriptions.jsonl", small.data(lab) / "train-questions.jsonl"]
    model = descriptions.start(lab)
    config = small.training(out, parts, small.EVERYTHING, model=model, steps=lab.few(STEPS), seed=seed, averaging=arm)
    model = small.trained(config)
    questions = small.read(small.data(lab) / "test-questions.jsonl")
    questions = random.Random(7).sample(questions, lab.few(TEST_PICTURES, 8))
    short = small.exact(model, write_jsonl(questions, out / "short.jsonl"))
    long = small.exact(model, given / "test-descriptions.jsonl")
    said = descriptions.measured(descriptions.said(model, lab.few(OUTPUTS)))
    small.drop(out)
    return {"short": short["accuracy"], "long_loss": long["loss"], "true": said["true"], "tokens": said["tokens"]}


def judge(results: Results) -> Verdict:
    short = {arm: results.of(arm, "short").mean for arm in results.study.arms}
    loss = {arm: results.of(arm, "long_loss").mean for arm in results.study.arms}
    between = [
        short["token"] <= short["square"] <= short["sample"],
        loss["token"] <= loss["square"] <= loss["sample"],
    ]
    holds = "holds" if all(between) else "holds in part" if any(between) else "does not hold here"
    return Verdict(
        holds,
        f"Short answers are right in {short['token']:.1%}, {short['square']:.1%} and {short['sample']:.1%} of questions by "
        f"token, square and sample averaging, and the loss of long ones is {loss['token']:.3f}, {loss['square']:.3f} and "
        f"{loss['sample']:.3f}: square averaging lies between in {sum(between)} of the two.",
    )


STUDY = Study(
    name="reweighting",
    title="Loss reweighting",
    claim="Token averaging biases gradients toward long answers and sample averaging toward short ones; square averaging "
    "balances them (section 3.4).",
    done="nano learns a mixture of easy-vqa's questions with answers of one word and of descriptions in 13 sentences, for "
    f"{STEPS} steps from one start, by each of the three averagings. Measured on pictures of the test split. Nothing was "
    "tuned.",
    arms={
        "token": Arm("token averaging"),
        "square": Arm("square averaging"),
        "sample": Arm("sample averaging"),
    },
    measure=measure,
    judge=judge,
    needs=("token", "square", "sample"),
    columns={
        "short": ("one-word answers right", ".1%"),
        "long_loss": ("loss of descriptions", ".3f"),
        "true": ("descriptions without a false sentence", ".1%"),
        "tokens": ("tokens of a description", ".0f"),
    },
    draw=lambda results, axes: results.bars(axes, "short", "one-word answers right"),
)  # fmt: skip
