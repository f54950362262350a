"""What filtering out repetition does to a model: `python -m studies.repetition_effect [--out DIR] [--shares 0.03 0.1]`.

nano learns to describe easy-vqa pictures at length, several times from the same start, for the same steps, on the same true
descriptions: as they are after the repetition stages of the filter have removed the injected loops, and with loops in 3% and
in 10% of the rows. Then each describes 200 pictures of the test split greedily, and a reply counts as repetitive when the
filter's detector flags it; what runs into the token limit without ending is counted apart, as a figure no detector has a
part in. A fresh clone runs this alone: images come from the `easy-vqa` package, weights from nothing.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import ivl
from examples.quickstart.data import captions, turns
from ivl.checkpoint import load_tokenizer, save_tokenizer
from ivl.config import ModelConfig
from ivl.data.config import DataConfig
from ivl.evaluation.scoring import wilson
from ivl.evaluation.tasks import easy_vqa
from ivl.evaluation.tasks.easy_vqa import COLORS, SHAPES
from ivl.filters.chain import load_chain
from ivl.filters.repetition import Repetition
from ivl.filters.run import run as run_filter
from ivl.formats.rows import write_jsonl
from ivl.processing.tokenizer import Tokenizer, train_tokenizer
from ivl.recipes import nano
from ivl.runs.config import RunConfig
from ivl.runs.run import run
from ivl.train.config import ObjectiveConfig, OptimConfig, Stage, TrainConfig
from ivl.types import Message, Record, SamplingParams, Text

DETECTOR = Repetition()
QUESTION = "describe the image in detail."
NAME = "what is in the image?"
NUM_OUTPUTS, MAX_NEW_TOKENS, BEGUN = 200, 320, 3
DESCRIPTIONS_PER_IMAGE = 4
VOCAB_SIZE = 420
WARM_UP_STEPS, CONNECT_STEPS, STEPS = 700, 300, 600

OPENINGS = (
    "this is a picture of a {colour} {shape}.", "the image shows a {colour} {shape}.", "here we see a {colour} {shape}.",
    "what stands out is a {colour} {shape}.", "a {colour} {shape} is drawn on a plain ground.",
)  # fmt: skip
COLOUR = ("its color is {colour}.", "anyone would call it {colour}.", "so {colour} is the answer to the question of color.")
SHAPE = ("the only shape here is a {shape}.", "counting corners tells of a {shape}.", "its outline is that of a {shape}.")
ABSENT_COLOUR = (
    "there is no {colour} shape.", "nothing in it is {colour}.", "{colour} does not appear.", "one finds no trace of {colour}.",
    "a {colour} object is missing.", "whoever looks for {colour} looks in vain.", "{colour} was not used by the painter.",
    "it would be wrong to say {colour}.", "we can rule out {colour} as well.", "the palette leaves {colour} aside.",
)  # fmt: skip
ABSENT_SHAPE = (
    "the image does not contain a {shape}.", "no {shape} is present.", "a {shape} would look different.",
    "nobody drew a {shape}.", "it can not be taken for a {shape}.",
)  # fmt: skip
CLOSINGS = ("that is all there is to see.", "more can not be said about it.", "this completes the description.")


def describe(caption: str, rng: random.Random) -> list[str]:
    """A true description of one picture in 13 sentences, from what its questions and answers say, in any order. No wording
    comes twice."""
    colour, shape = caption.split()
    facts = [rng.choice(COLOUR).format(colour=colour), rng.choice(SHAPE).format(shape=shape)]
    for names, forms in ((COLORS, ABSENT_COLOUR), (SHAPES, ABSENT_SHAPE)):
        others = [name for name in names if name not in (colour, shape)]
        facts += [form.format(colour=n, shape=n) for n, form in zip(others, rng.sample(forms, len(others)), strict=True)]
    rng.shuffle(facts)
    return [rng.choice(OPENINGS).format(colour=colour, shape=shape), *facts, rng.choice(CLOSINGS)]


def true_sentences(caption: str) -> set[str]:
    colour, shape = caption.split()
    found = {form.format(colour=colour, shape=shape) for form in (*OPENINGS, *COLOUR, *SHAPE, *CLOSINGS)}
    found |= {form.format(colour=name) for form in ABSENT_COLOUR for name in COLORS if name != colour}
    return found | {form.format(shape=name) for form in ABSENT_SHAPE for name in SHAPES if name != shape}


def loop(sentences: list[str], rng: random.Random) -> str:
    """The description gets stuck: a sentence, or the end of one, comes again and again until the text breaks off."""
    at = rng.randrange(2, len(sentences) - 1)
    words = sentences[at].split()
    stuck = words if rng.random() < 0.5 else words[-rng.randint(2, len(words)) :]
    tail = stuck * (1 + 220 // len(stuck))
    return " ".join([*sentences[: at + 1], *tail[: rng.randint(100, 200)]])


def rows(captions: dict[str, str], *, share: float, seed: int = 0) -> list[dict[str, Any]]:
    """Training rows; `share` of them have a loop injected, and say so under a key that nothing reads. The share changes
    no other row."""
    found: list[dict[str, Any]] = []
    for image, caption in captions.items():
        for copy in range(DESCRIPTIONS_PER_IMAGE):
            key = f"{Path(image).stem}-{copy}"
            rng = random.Random(f"{seed} {key}")
            sentences, injected = describe(caption, rng), rng.random() < share
            text = loop(sentences, rng) if injected else " ".join(sentences)
            talk = turns(f"<image>\n{QUESTION}", text)
            found.append({"id": key, "image": image, "injected": injected, "conversations": talk})
    return found


def repetitive(text: str) -> bool:
    record = Record("", ((Message("user", (Text(NAME),)), Message("assistant", (Text(text),))),), "")
    return not DETECTOR(record).keep


def filtered(raw: Path, out: Path) -> dict[str, int]:
    """Run the filter on a file, with its repetition stage alone; returns how right it was."""
    chain = out / "chain.json"
    chain.parent.mkdir(parents=True, exist_ok=True)
    chain.write_text(json.dumps({"stages": [{"use": "repetition"}]}))
    run_filter(load_chain(chain), raw, out)
    loops = {row["id"] for row in map(json.loads, raw.read_text().splitlines()) if row["injected"]}
    verdicts = [json.loads(line) for line in (out / "verdicts.jsonl").read_text().splitlines()]
    dropped = {verdict["id"] for verdict in verdicts if not verdict["keep"]}
    return {"rows": len(verdicts), "loops": len(loops), "dropped": len(dropped), "loops_dropped": len(loops & dropped)}


def prepare(out: Path, shares: list[float]) -> dict[str, Any]:
    """Tokenizer and data files; how the filter did on each share."""
    train, test = (captions(easy_vqa.rows(split)) for split in ("train", "test"))
    data = out / "data"
    clean = rows(train, share=0)
    tokenizer = train_tokenizer(
        [*(row["conversations"][1]["value"] for row in clean), QUESTION, NAME, "user assistant"], VOCAB_SIZE
    )
    save_tokenizer(tokenizer, out / "tokenizer")
    write_jsonl(rows(test, share=0), data / "held-out.jsonl")
    names = [{"id": image, "image": image, "conversations": turns(f"<image>\n{NAME}", name)} for image, name in train.items()]
    write_jsonl(names, data / "names.jsonl")
    report: dict[str, Any] = {
        "false_positives": sum(repetitive(row["conversations"][1]["value"]) for row in clean) / len(clean)
    }
    for share in shares:
        raw = write_jsonl(rows(train, share=share), data / f"loops-{share:g}.jsonl")
        report[f"{share:g}"] = filtered(raw, data / f"filtered-{share:g}")
    return report


def architecture(tokenizer: Tokenizer) -> ModelConfig:
    """nano with a vocabulary for descriptions."""
    plain = nano.architecture()
    return replace(
        plain,
        decoder=replace(plain.decoder, vocab_size=len(tokenizer)),
        image_token_id=tokenizer.id("<IMG_CONTEXT>"),
        eos_token_ids=(tokenizer.id("<|im_end|>"),),
        pad_token_id=tokenizer.id("<|endoftext|>"),
    )


def warm_up(out: Path) -> RunConfig:
    """The start that all share: ViT and projector name what a picture shows."""
    return RunConfig(
        name="warm-up",
        out_dir=str(out / "warm-up"),
        architecture=architecture(load_tokenizer(out / "tokenizer")),
        tokenizer=str(out / "tokenizer"),
        stage=Stage(trainable=("vision", "projector")),
        objective=ObjectiveConfig(path="ivl.recipes.nano_objectives:flipped_caption_words"),
        data=DataConfig(mixture=str(out / "data/names.jsonl"), num_workers=0, cache_samples=8192, max_tiles=50),
        train=TrainConfig(
            optim=OptimConfig(name="muon", lr=2e-3, warmup_ratio=0.05, min_lr_ratio=0.05),
            num_steps=WARM_UP_STEPS,
            log_every=50,
            tensorboard=False,
        ),
    )


def connect(out: Path) -> RunConfig:
    """Also shared: everything learns to name what a picture shows, so that the decoder looks at it."""
    base = warm_up(out)
    return replace(
        base,
        name="connect",
        out_dir=str(out / "connect"),
        model=str(out / "warm-up/model"),
        stage=Stage(trainable=("vision", "projector", "decoder")),
        objective=ObjectiveConfig(path="ivl.recipes.nano_objectives:flipped_next_token"),
        train=replace(base.train, num_steps=CONNECT_STEPS),
    )


def arm(out: Path, name: str, seed: int) -> RunConfig:
    """Projector and decoder learn to describe, from what the filter kept or from data/NAME.jsonl, and go on naming."""
    rows = out / "data" / name / f"kept/{name.replace('filtered', 'loops')}.jsonl"
    parts = {"names": out / "data/names.jsonl", "descriptions": rows if rows.exists() else out / f"data/{name}.jsonl"}
    mixture = out / f"data/{name}-mixture.json"
    mixture.write_text(json.dumps({part: {"annotation": str(path.absolute())} for part, path in parts.items()}))
    held_out = DataConfig(mixture=str(out / "data/held-out.jsonl"), num_workers=0, max_tokens=3072, cache_samples=512)
    return RunConfig(
        name=f"{name}-{seed}",
        out_dir=str(out / f"{name}-seed{seed}"),
        model=str(out / "connect/model"),
        stage=Stage(trainable=("projector", "decoder")),
        data=DataConfig(mixture=str(mixture), num_workers=0, cache_samples=1 << 14, max_tokens=3072),
        val_data=held_out,
        val_every=100,
        val_packs=6,
        train=TrainConfig(
            optim=OptimConfig(name="muon", lr=2e-3, warmup_ratio=0.1, min_lr_ratio=0.05),
            num_steps=STEPS,
            log_every=50,
            seed=seed,
            tensorboard=False,
        ),
    )


def trained(config: RunConfig) -> Path:
    """The run's model; a finished run is not trained again."""
    model = Path(config.run_dir) / "model"
    return model if model.exists() else run(config)


def outputs(model: Path) -> list[dict[str, Any]]:
    """Greedy descriptions of held-out pictures, kept beside the model. Each goes on from the first sentences of a true one,
    so that no two are the same task."""
    path = model.parent / "outputs.jsonl"
    if not path.exists():
        described = captions(easy_vqa.rows("test"))
        images = list(described)[:: max(1, len(described) // NUM_OUTPUTS)][:NUM_OUTPUTS]
        begun = [" ".join(describe(described[image], random.Random(image))[:BEGUN]) for image in images]
        asked = [(*ivl.ask(QUESTION, i), Message("assistant", (Text(text),))) for i, text in zip(images, begun, strict=True)]
        replies = ivl.load(model).engine.generate(asked, SamplingParams(max_new_tokens=MAX_NEW_TOKENS))
        write_jsonl(
            (
                {"image": Path(image).stem, "caption": described[image], "begun": text, "said": reply.text,
                 "tokens": len(reply.tokens), "ended": reply.finish_reason == "stop"}
                for image, text, reply in zip(images, begun, replies, strict=True)
            ),
            path,
        )  # fmt: skip
    return [json.loads(line) for line in path.read_text().splitlines()]


def whole(row: dict[str, Any]) -> str:
    return row["begun"] + row["said"]


def sentences_of(row: dict[str, Any]) -> list[str]:
    """Whole sentences of an output, its true beginning included."""
    return [f"{sentence.strip()}." for sentence in whole(row).split(".")[:-1]]


def measure(found: list[dict[str, Any]]) -> dict[str, Any]:
    """Shares with 95% Wilson intervals, over the outputs of all seeds."""
    count = len(found)
    figures: dict[str, Any] = {"outputs": count, "mean_tokens": sum(row["tokens"] for row in found) / count}
    checks: dict[str, Callable[[dict[str, Any]], bool]] = {
        "repetitive": lambda row: repetitive(whole(row)),
        "endless": lambda row: not row["ended"],
        "says_a_sentence_twice": lambda row: len(set(sentences_of(row))) < len(sentences_of(row)),
        "says_nothing_false": lambda row: set(sentences_of(row)) <= true_sentences(row["caption"]),
    }
    for name, check in checks.items():
        hits = sum(map(check, found))
        figures[name] = {"share": hits / count, "ci95": wilson(hits, count)}
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/repetition-effect"))
    parser.add_argument("--shares", type=float, nargs="+", default=[0.03, 0.1], help="shares of rows that get a loop")
    parser.add_argument("--seeds", type=int, default=2, help="trainings of each kind; outputs are pooled")
    options = parser.parse_args()
    out, shares = options.out, options.shares
    report = out / "filter.json"
    if not report.exists():
        filter_report = prepare(out, shares)
        report.write_text(json.dumps(filter_report, indent=2))
    print(report.read_text())
    trained(warm_up(out))
    trained(connect(out))
    # One training stands for every filtered file: they hold the same rows but for those that had a loop.
    arms = {f"filtered-{shares[0]:g}": f"{shares[0]:.0%} loops, filtered"}
    arms |= {f"loops-{share:g}": f"{share:.0%} loops" for share in shares}
    found: dict[str, list[list[dict[str, Any]]]] = {name: [] for name in arms}
    for seed in range(options.seeds):
        for name in arms:
            found[name].append(outputs(trained(arm(out, name, seed))))
            print(name, seed, json.dumps(measure(found[name][-1])), flush=True)
        figures = {
            name: {
                "title": arms[name],
                **measure([row for each in by_seed for row in each]),
                "by_seed": [*map(measure, by_seed)],
            }
            for name, by_seed in found.items()
        }
        result = {"steps": STEPS, "seeds": seed + 1, "filter": json.loads(report.read_text()), "arms": figures}
        (out / "result.json").write_text(json.dumps(result, indent=2))
        plot(out, result)
    print(f"{out / 'result.json'}, {out / 'repetition_effect.png'}")


def plot(out: Path, result: dict[str, Any]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    arms = result["arms"]
    measures = {"repetitive": "flagged as\nrepetitive", "endless": "never ends", "says_a_sentence_twice": "a sentence\ntwice"}
    colours = ("#2ca02c", "#ff7f0e", "#d62728", "#9467bd")
    width = 0.8 / len(arms)
    for number, figures in enumerate(arms.values()):
        shares = [figures[name]["share"] for name in measures]
        bounds = [figures[name]["ci95"] for name in measures]
        error = [[max(0.0, s - low) for s, (low, _) in zip(shares, bounds, strict=True)],
                 [max(0.0, high - s) for s, (_, high) in zip(shares, bounds, strict=True)]]  # fmt: skip
        at = [place + (number - (len(arms) - 1) / 2) * width for place in range(len(measures))]
        left.bar(at, shares, width, yerr=error, capsize=2, color=colours[number], label=figures["title"])
    left.set_xticks(range(len(measures)), measures.values())
    left.set_ylabel(f"share of {next(iter(arms.values()))['outputs']} greedy outputs")
    left.yaxis.set_major_formatter("{x:.0%}")
    left.legend(fontsize=8)
    for number, (name, figures) in enumerate(arms.items()):
        for seed in range(result["seeds"]):
            lines = (out / f"{name}-seed{seed}" / "metrics.jsonl").read_text().splitlines()
            points = [row for row in map(json.loads, lines) if "evaluation" in row]
            label = figures["title"] if seed == 0 else None
            right.plot(
                [p["step"] for p in points], [p["loss"] for p in points], color=colours[number], linewidth=1, label=label
            )
    right.set(xlabel="step", ylabel="loss on held-out clean descriptions", ylim=(0, 1))
    right.legend(fontsize=8)
    figure.savefig(out / "repetition_effect.png", dpi=90)


if __name__ == "__main__":
    main()
