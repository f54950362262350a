"""MPO beside TRL's DPOTrainer with the same three losses: `python -m benchmarks.mpo_against_trl`.

InternVL2.5-1B in small (41M parameters, the 1B's shares of ViT, decoder layers and head), written by ivl and read by both; the
same pairs, each with one 448-pixel tile and its 256 tokens, 20 to 200 words of prompt and replies of 10 to 150 tokens; float32
weights and bfloat16 autocast, as TRL's own default is; AdamW, no gradient checkpointing, the same pairs in every step. First
both train a few steps and must show the same losses; then each side stays loaded in a process of its own and they take turns,
a pass over the pairs each. Useful tokens are those of both sequences of a pair, without padding. Peak memory is the most a
process ever held resident, reference log-probabilities included.

TRL is given what it refuses by its own way: for data with images it wants a processor (which in transformers needs torchvision)
and keeps the reference model beside the policy. Here it gets tokens, a collator that adds the pixels, and its
`precompute_ref_log_probs`; `--copy` lets a frozen copy run along on both sides instead.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.mpo_sides import Job, make_pairs
from benchmarks.partner import Partner

SIDES = ("ours", "trl")
SPEED, MEMORY = 2.0, 0.7
"""Wanted: useful tokens a second, ours over TRL's; peak memory, ours over TRL's."""
TOLERANCE = {"fp32": 1e-5, "bf16": 1e-3}
"""Greatest relative difference of losses."""


def started(side: str, job: str, threads: int, tuned: bool = False) -> Partner:
    """What a side writes besides answers is shown if it fails."""
    environment = {
        "OMP_NUM_THREADS": str(threads), "TRANSFORMERS_VERBOSITY": "error", "HF_HUB_OFFLINE": "1",
        # ivl's own settings, which TRL's side must not get from an import, but may be given.
        "THP_MEM_ALLOC_ENABLE": "0" if side == "trl" and not tuned else "1",
    }  # fmt: skip
    if side == "trl" and tuned:
        environment |= {"MALLOC_MMAP_THRESHOLD_": str(2**30), "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1)}
    log = tempfile.TemporaryFile("w+")  # noqa: SIM115
    return Partner("-m", "benchmarks.mpo_sides", side, str(threads), job, environment=environment, log=log)


def play(job: Job, threads: int, tuned: bool = False) -> dict[str, Any]:
    """Seconds of every round, peak memory and losses of both sides."""
    text = json.dumps(dataclasses.asdict(job))
    sides: dict[str, Partner] = {}
    found: dict[str, Any] = {side: {"seconds": []} for side in SIDES}
    try:
        for side in SIDES:
            sides[side] = started(side, text, threads, tuned)
            sides[side].answer()
        for number in range(job.rounds):
            for side in SIDES if number % 2 else SIDES[::-1]:
                row = sides[side].run()
                found[side]["seconds"].append(row["seconds"])
                found[side]["peak_bytes"] = row["peak_bytes"]
        for side in SIDES:
            found[side] |= sides[side].answer()
    finally:
        for one in sides.values():
            one.process.kill()  # a failed side leaves the other waiting
            one.process.wait()
    return found


def check(job: Job, threads: int) -> dict[str, float]:
    """Greatest relative difference of the losses: of the first step with all three terms, of pairs by themselves, for over
    several pairs TRL's generation term is the mean over tokens and ours over replies; and of two steps without BCO, whose
    shift TRL does not have.

    Raises:
        RuntimeError: if they are not the same.
    """
    one = dataclasses.replace(job, pairs=1, pairs_a_step=1, rounds=1)
    found = {}
    for name, case in (
        ("first step", one),
        ("two steps without BCO", dataclasses.replace(one, pairs=2, weights=(0.8, 0.0, 1.0))),
    ):
        sides = play(case, threads)
        both = list(zip(sides["ours"]["losses"], sides["trl"]["losses"], strict=True))
        found[name] = max(abs(a - b) / b for a, b in both)
        if not found[name] <= TOLERANCE[job.precision]:
            raise RuntimeError(f"{name}, {job.precision}: losses differ by {found[name]:.1e}, more than rounding: {both}")
    return found


def measure(job: Job, threads: int, tuned: bool = False) -> dict[str, Any]:
    """The first round warms up."""
    found = play(job, threads, tuned)
    tokens = sum(pair.num_tokens for pair in make_pairs(job))
    for side in SIDES:
        rounds = found[side]["seconds"][1:]
        found[side] |= {"tokens_per_second": tokens / statistics.median(rounds), "spread": [tokens / s for s in rounds]}
    ours, trl = (found[side] for side in SIDES)
    found["speed"] = ours["tokens_per_second"] / trl["tokens_per_second"]
    found["memory"] = ours["peak_bytes"] / trl["peak_bytes"]
    return found


def report(job: Job, found: dict[str, Any]) -> Table:
    reference = "a frozen copy" if job.copy else "computed before"
    table = Table(title=f"MPO, {job.pairs_a_step} pairs a step, {job.precision}, reference {reference}")
    for column in ("", "ours", "TRL", "ratio", "target"):
        table.add_column(column, justify="left" if not column else "right")
    speeds = [f"{found[side]['tokens_per_second']:,.0f}" for side in SIDES]
    peaks = [f"{found[side]['peak_bytes'] / 1e9:.2f}" for side in SIDES]
    marks = ["green" if good else "red" for good in (found["speed"] >= SPEED, found["memory"] <= MEMORY)]
    table.add_row("useful tokens/s", *speeds, f"[{marks[0]}]{found['speed']:.2f}[/]", f">= {SPEED}")
    table.add_row("peak memory, GB", *peaks, f"[{marks[1]}]{found['memory']:.2f}[/]", f"<= {MEMORY}")
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--pairs", type=int, default=8, help="in all; a round goes through them once")
    parser.add_argument("--pairs-a-step", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=4, help="the first warms up")
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--copy", action="store_true", help="a frozen copy of the model is the reference, on both sides")
    parser.add_argument("--attention", choices=("sdpa", "eager"), default="sdpa", help="of transformers")
    parser.add_argument("--group", action="store_true", help="steps of pairs of similar length, which spares TRL padding")
    parser.add_argument("--tuned", action="store_true", help="TRL gets ivl's settings of huge pages and freed memory, too")
    parser.add_argument("--only", choices=("check", "measure"), help="one of the two parts")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("runs/mpo_against_trl.json"))
    args = parser.parse_args()
    console, result = Console(width=100), {}
    with tempfile.TemporaryDirectory() as folder:
        model = started("model", f"{folder}/model", args.threads)
        result["parameters"] = model.answer()
        model.process.wait()
        job = Job(
            model=f"{folder}/model", pairs=args.pairs, pairs_a_step=args.pairs_a_step, rounds=args.rounds,
            precision=args.precision, copy=args.copy, attention=args.attention, group=args.group,
        )  # fmt: skip
        if args.only != "measure":
            result["check"] = check(job, args.threads)
            console.print("losses differ by " + ", ".join(f"{v:.1e} ({k})" for k, v in result["check"].items()))
        if args.only != "check":
            result["found"] = measure(job, args.threads, args.tuned)
            console.print(report(job, result["found"]))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps({"job": vars(args) | {"out": str(args.out)}, **result}, indent=2) + "\n")


if __name__ == "__main__":
    main()
