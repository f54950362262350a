"""Does preference training help? `python -m studies.preference_effect`, after `make quickstart`.

nano learns to reason about several pictures from supervised data in which many answers carry a plausible mistake, replies to
fresh questions many times, and its checked replies become pairs. From the same start, with as many steps of the same size, it
then trains by MPO, by DPO alone, and supervised on the chosen replies; once also by MPO on Dropout-NTP pairs. All are asked the
same held-out questions about pictures of the test split. Writes report.json, report.md and report.html to --out.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from examples.quickstart import alignment
from examples.quickstart.ranks import spawn
from ivl.api import load
from ivl.errors import InputError
from ivl.preference.config import PreferenceConfig
from ivl.preference.pairs import read_pairs
from ivl.preference.sampling import DropoutConfig, continue_without_images
from ivl.recipes import nano
from ivl.runs.config import RunConfig
from ivl.train.config import ObjectiveConfig
from ivl.utils import html as pages

T_95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}
"""Quantiles of Student's distribution for the interval of a mean of so many runs."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--start", type=Path, default=Path(nano.RUN) / "model", help="model of the quickstart")
    parser.add_argument("--out", type=Path, default=Path("runs/preference-effect"))
    parser.add_argument("--sft-steps", type=int, default=300)
    parser.add_argument("--steps", type=int, default=50, help="steps of every method")
    parser.add_argument("--questions", type=int, default=1000, help="questions sampled")
    parser.add_argument("--replies", type=int, default=8, help="replies to each")
    parser.add_argument("--held-out", type=int, default=2000, help="test questions")
    parser.add_argument("--held-out-seed", type=int, default=10, help="settings were picked with 9, never 10")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--lr", type=float, default=5e-5)
    parser.add_argument("--beta", type=float, default=nano.BETA, help="of every preference loss")
    parser.add_argument("--only", default="", help="one method, to look at a setting")
    parser.add_argument("--why", action="store_true", help="two more, to tell what comes of the loss and what of the data")
    args = parser.parse_args()
    if not args.start.exists():
        raise SystemExit(f"{args.start}: no model; run `make quickstart` first, or name one with --start")
    try:
        experiment(args)
    except InputError as error:
        raise SystemExit(f"preference_effect: {error}") from None


def experiment(args: argparse.Namespace) -> None:
    out: Path = args.out
    out.mkdir(parents=True, exist_ok=True)
    sft = supervised(args)
    pairs, dropout = preference_data(args, sft)
    chosen_rows(pairs / "pairs.jsonl", out / "chosen.jsonl")
    results: dict[str, list[dict[str, Any]]] = {"SFT": [alignment.held_out(sft, args.held_out, out, seed=args.held_out_seed)]}
    print("SFT", results["SFT"][0], flush=True)
    for method in methods(args):
        for seed in range(1 if method == "MPO, Dropout-NTP" else args.seeds):
            config = configuration(method, seed, args, sft, pairs, dropout)
            model = trained(config)
            results.setdefault(method, []).append(
                alignment.held_out(model, args.held_out, out, seed=args.held_out_seed) | {"seconds": seconds_of(config)}
            )
            print(method, seed, results[method][-1], flush=True)
    write(args, results)


def methods(args: argparse.Namespace) -> list[str]:
    every = ["MPO", "DPO alone", "SFT on chosen", "MPO, Dropout-NTP"]
    if args.why:
        every += ["Generation alone", "MPO, twice the steps"]
    return [method for method in every if method == args.only or not args.only]


def supervised(args: argparse.Namespace) -> Path:
    data = alignment.write_reasoning(args.out / "reasoning.jsonl", args.sft_steps)
    base = nano.reason()
    return trained(
        replace(
            base, out_dir=str(args.out / "sft"), model=str(args.start),
            data=replace(base.data, mixture=str(data)), train=replace(base.train, num_steps=args.sft_steps),
        )
    )  # fmt: skip


def preference_data(args: argparse.Namespace, model: Path) -> tuple[Path, Path]:
    """Directories of correctness pairs and of Dropout-NTP pairs, made by the model itself."""
    began = time.monotonic()
    replies = alignment.write_pairs(model, args.out, questions=args.questions, replies=args.replies)
    print(f"{args.questions * args.replies:,} replies in {time.monotonic() - began:.0f} s", flush=True)
    config = DropoutConfig(params=alignment.SAMPLED)
    continued = continue_without_images(
        load(model).engine, replies, args.out / "dropout.jsonl", model=str(model), config=config
    )
    alignment.pair_up(continued, args.out / "dropout-pairs")
    return args.out / "pairs", args.out / "dropout-pairs"


def chosen_rows(pairs: Path, to: Path) -> None:
    """Every chosen reply once, as supervised data."""
    rows = {}
    for pair in read_pairs(pairs):
        turns = [{"from": "human", "value": pair["question"]}, {"from": "gpt", "value": pair["chosen"]}]
        rows[json.dumps([pair["image"], turns])] = {"id": pair["id"], "image": pair["image"], "conversations": turns}
    alignment.write_rows(to, rows.values())


def configuration(method: str, seed: int, args: argparse.Namespace, sft: Path, pairs: Path, dropout: Path) -> RunConfig:
    base = nano.mpo()
    name = method.lower().replace(" ", "-").replace(",", "")
    origin = dropout if "Dropout" in method else pairs
    data = replace(base.data, mixture=str(origin / "pairs.jsonl"))
    optim = replace(base.train.optim, lr=args.lr)
    mpo = PreferenceConfig(beta=args.beta, reference_dir=str(args.out / f"reference-{origin.name}"))
    config = replace(
        base, name=f"{name}-{seed}", out_dir=str(args.out / f"{name}-{seed}"), model=str(sft), data=data, objective=mpo,
        train=replace(base.train, num_steps=args.steps, seed=seed, optim=optim, log_every=20),
    )  # fmt: skip
    if method == "DPO alone":
        return replace(config, objective=replace(mpo, sigmoid=1.0, bco=0.0, generation=0.0))
    if method == "Generation alone":  # supervised training on the chosen replies, at MPO's pace: rejected ones fill half a pack
        return replace(config, objective=replace(mpo, sigmoid=0.0, bco=0.0))
    if method == "MPO, twice the steps":  # as many chosen replies as "SFT on chosen" sees
        return replace(config, train=replace(config.train, num_steps=2 * args.steps))
    if method == "SFT on chosen":
        return replace(config, objective=ObjectiveConfig(), data=replace(data, mixture=str(args.out / "chosen.jsonl")))
    return config


def trained(config: RunConfig) -> Path:
    """Train in two ranks, unless it was done before."""
    model = Path(config.run_dir) / "model"
    if not model.exists():
        shutil.rmtree(config.run_dir, ignore_errors=True)
        spawn(_run, (config,), nano.RANKS)
    return model


def _run(config: RunConfig) -> None:
    from ivl.runs.run import run

    run(config)


def seconds_of(config: RunConfig) -> float:
    last = json.loads((Path(config.run_dir) / "metrics.jsonl").read_text().splitlines()[-1])
    return round(last["seconds"], 1)


def interval(values: list[float]) -> float:
    """Half of the 95% interval of the mean over seeds."""
    return T_95[len(values)] * statistics.stdev(values) / math.sqrt(len(values)) if len(values) in T_95 else float("nan")


def write(args: argparse.Namespace, results: dict[str, list[dict[str, Any]]]) -> None:
    settings = {key: str(value) for key, value in vars(args).items()}
    (args.out / "report.json").write_text(json.dumps({"settings": settings, "results": results}, indent=2) + "\n")
    head = ["method", "seeds", "accuracy", "95%", "gain", "reasoning right", "malformed", "endless"]
    start = results["SFT"][0]["accuracy"]
    rows = []
    for method, runs in results.items():
        accuracies = [run["accuracy"] for run in runs]
        mean, half = statistics.mean(accuracies), interval(accuracies)
        shares = [f"{statistics.mean(run[key] for run in runs):.1%}" for key in ("reasoning", "malformed", "endless")]
        shown = "" if math.isnan(half) else f"± {half:.1%}"
        rows.append([method, len(runs), f"{mean:.1%}", shown, f"{mean - start:+.1%}", *shares])
    lines = ["| " + " | ".join(map(str, row)) + " |" for row in [head, ["---"] * len(head), *rows]]
    (args.out / "report.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
    figure, axis = pages.pyplot().subplots(figsize=(8, 3), layout="constrained")
    for at, runs in enumerate(results.values()):
        accuracies = [run["accuracy"] for run in runs]
        half = interval(accuracies)
        axis.bar(at, statistics.mean(accuracies), color="#9ecae1", yerr=None if math.isnan(half) else half, capsize=4)
        axis.plot([at] * len(accuracies), accuracies, "k.", markersize=4)
    axis.axhline(start, color="#333", linewidth=0.8, linestyle=":")
    axis.set_xticks(range(len(results)), results)
    axis.set(ylabel="held-out accuracy", ylim=(max(0, start - 0.15), None))
    page = pages.page("Preference training on nano", pages.table(head, rows), pages.plot(figure, "accuracy by method"))
    (args.out / "report.html").write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
