"""Claim 2: random JPEG compression in training makes a model robust to damaged pictures."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from PIL import Image

from ivl.formats.rows import write_jsonl
from ivl.processing.augment import CORRUPTIONS, Augmentation, Corruption, corrupt
from studies.claims import pictures, small
from studies.claims.study import Arm, Figures, Lab, Results, Study, Verdict, sign, together

SEEING_STEPS, STEPS, CHARTS, NUMBERS, TEST = 1200, 400, 3000, 5000, 200
QUALITIES = tuple(range(10, 101, 10))
STRENGTH = 0.5
"""Of the other corruptions, which neither arm has seen."""


def measure(lab: Lab, arm: str, seed: int) -> Figures:
    given, out = data(lab), lab.runs / f"compression/{arm}-{seed}"
    mixture = out / "mixture.json"
    entry = {"annotation": str((given / "train.jsonl").absolute()), "data_augment": arm == "jpeg"}
    mixture.parent.mkdir(parents=True, exist_ok=True)
    mixture.write_text(json.dumps({"details": entry}))
    steps = lab.few(STEPS)
    config = small.training(out / "run", mixture, small.EVERYTHING, model=start(lab), steps=steps, seed=seed)
    config = replace(config, data=replace(config.data, augmentation=Augmentation()))
    model = small.trained(config)
    found = {path.stem: small.exact(model, path)["accuracy"] for path in sorted((given / "damaged").glob("*.jsonl"))}
    small.drop(out)
    low, others = [found[f"jpeg-{q}"] for q in QUALITIES[:5]], [found[kind] for kind in CORRUPTIONS]
    means = {"low": sum(low) / len(low), "others": sum(others) / len(others)}
    return {"clean": found["clean"], **means, "by_damage": found}


def data(lab: Lab) -> Path:
    """Draw the pictures, and the test pictures once for every damage."""

    def make(folder: Path) -> None:
        pictures.rows(folder, "train", lab.few(CHARTS, 40), lab.few(NUMBERS, 40), seed=1)
        test = small.read(pictures.rows(folder, "test", lab.few(TEST, 6), lab.few(TEST, 6), seed=2))
        damages: dict[str, tuple[str, float]] = {"clean": ("clean", 0.0)}
        damages |= {f"jpeg-{quality}": ("jpeg", quality) for quality in QUALITIES}
        damages |= {kind: (kind, STRENGTH) for kind in CORRUPTIONS}
        for name, (kind, strength) in damages.items():
            write_jsonl(
                (damaged(row, kind, strength, folder / "damaged" / name) for row in test), folder / f"damaged/{name}.jsonl"
            )

    return lab.once("details", make)


def damaged(row: dict[str, Any], kind: str, strength: float, folder: Path) -> dict[str, Any]:
    """Write a row's picture with a damage, and return the row that shows it."""
    path = folder / Path(row["image"]).name
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.open(row["image"]).convert("RGB")
    if kind == "jpeg":
        image.save(jpeg := path.with_suffix(".jpg"), quality=int(strength))
        image = Image.open(jpeg)
    elif kind != "clean":
        image = corrupt(image, cast(Corruption, kind), strength, seed=int(path.stem))
    image.save(path)
    return row | {"image": str(path.absolute())}


def start(lab: Lab) -> Path:
    """The model that both arms start from: nano's decoder, and a ViT that has seen undamaged details."""
    vision = small.nano_start(lab)["vision"]

    def make(out: Path) -> None:
        steps = lab.few(SEEING_STEPS)
        small.trained(small.training(out, data(lab) / "train.jsonl", small.EVERYTHING, model=vision, steps=steps))

    return lab.once("compression/start", make) / "model"


def judge(results: Results) -> Verdict:
    low, others, clean = (results.gain("jpeg", "plain", figure) for figure in ("low", "others", "clean"))
    return Verdict(
        together([sign(low), sign(others)]),
        f"Compression in training changes accuracy by {low.shown('+.1%')} on pictures of quality 10 to 50, by "
        f"{others.shown('+.1%')} on other corruptions, and by {clean.shown('+.1%')} on undamaged ones.",
    )


def draw(results: Results, axes: Any) -> None:
    for arm, color in {"plain": "#7f7f7f", "jpeg": "#2ca02c"}.items():
        for number, figures in enumerate(results.figures(arm)):
            values = [figures["by_damage"][f"jpeg-{q}"] for q in QUALITIES]
            label = results.study.arms[arm].about if number == 0 else None
            axes.plot(QUALITIES, values, "o-", color=color, markersize=3, label=label)
    axes.set(xlabel="JPEG quality of the test pictures", ylabel="right")
    axes.legend(fontsize=8)


STUDY = Study(
    name="compression",
    title="Random JPEG compression",
    claim="Compressing training pictures as JPEG at a random quality of 75 to 100 makes the model robust to noisy pictures "
    "(section 3.4).",
    done="nano learns to read the bars of small charts and numbers of two digits on a noisy ground, with and without "
    f"compression, for {STEPS} steps from one start that knows undamaged pictures. The same {2 * TEST} new pictures are then "
    "asked about at ten JPEG qualities and under five other corruptions at half of their strength. Nothing was tuned.",
    arms={"plain": Arm("without compression"), "jpeg": Arm("JPEG at 75 to 100")},
    measure=measure,
    judge=judge,
    needs=("plain", "jpeg"),
    columns={"clean": ("undamaged", ".1%"), "low": ("quality 10 to 50", ".1%"), "others": ("other corruptions", ".1%")},
    draw=draw,
)  # fmt: skip
