"""A real demonstration: a ViT and a language model that nobody here trained are joined, and caption pictures."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch

from examples.real_parts.demonstration import CHOICES, Size, demonstrate
from ivl.utils import html as pages
from studies.claims.study import Arm, Figures, Lab, Results, Study, Verdict


def measure(lab: Lab, arm: str, seed: int) -> Figures:
    """All arms come from one training, which takes every core."""

    def make(folder: Path) -> None:
        torch.set_num_threads(os.cpu_count() or 1)
        demonstrate(folder, size=Size() if lab.scale == 1 else Size(steps=lab.few(200), test=20))

    found = json.loads((lab.once("real/made", make) / "report.json").read_text())
    return found[arm] | ({"written": found["written"]} if arm == "trained" else {})


def judge(results: Results) -> Verdict:
    ours, untrained, blind = (results.figures(arm)[0] for arm in ("trained", "untrained", "blind"))
    best = max(untrained["ci95"][1], blind["ci95"][1])
    above = ours["ci95"][0] > best
    holds = "does not hold here" if not above else "holds" if ours["accuracy"] >= 0.5 else "holds in part"
    low, high = ours["ci95"]
    return Verdict(
        holds,
        f"The right caption of a held-out picture is the likeliest of {CHOICES} in {ours['accuracy']:.1%} of "
        f"{ours['pictures']} pictures (95% interval {low:.1%} to {high:.1%}; chance {1 / CHOICES:.0%}, without training "
        f"{untrained['accuracy']:.1%}, without the picture {blind['accuracy']:.1%}).",
    )


def written(results: Results) -> str:
    """The pictures with what the model writes, unedited."""
    cards = []
    for each in results.figures("trained")[0]["written"] if results.rows["trained"] else []:
        said, caption = pages.text(each["said"]), pages.text(each["caption"])
        cards.append(f"<div class='card'>{pages.picture(each['picture'])}<pre>{said}</pre>{caption}</div>")
    return f"<p>What the model writes about held-out pictures, and their captions:</p><div class='grid'>{''.join(cards)}</div>"


def draw(results: Results, axes: Any) -> None:
    results.bars(axes, "accuracy", f"right caption among {CHOICES}")
    axes.axhline(1 / CHOICES, color="#333", linestyle="--", linewidth=0.8)


STUDY = Study(
    name="real",
    title="A real ViT meets a real language model",
    claim="A projector that is trained on captioned pictures lets a language model see by a ViT that it has never met "
    "(section 3.2).",
    done="DINOv2 ViT-S/14 and SmolLM2-135M-Instruct are joined by `ivl compose`; stage 1 trains the projector on captioned "
    "pictures (Tux Paint's stamps and some photographs), then LoRA the language model, too. Held-out pictures have captions "
    f"that training has not seen; the model chooses among {CHOICES} by likelihood. One seed; intervals are Wilson's over "
    "pictures. Nothing was tuned.",
    arms={
        "trained": Arm("stage 1 and LoRA", seeds=1),
        "stage1": Arm("stage 1", seeds=1),
        "untrained": Arm("untrained projector", seeds=1),
        "blind": Arm("without the picture", seeds=1),
    },
    measure=measure,
    judge=judge,
    needs=("trained", "untrained", "blind"),
    columns={"accuracy": ("right among 20", ".1%"), "pictures": ("pictures", ".0f")},
    draw=draw,
    extra=written,
    costly=True,
)  # fmt: skip
