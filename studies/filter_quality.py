"""How well the filters without a model find faults: `python -m studies.filter_quality --out runs/filter-quality`.

5,000 clean conversations and 500 of each fault kind, seeded. Thresholds were chosen on `--split tune`; the figures to publish
are those of `--split held-out`, which has other pictures, documents and packages, and fault variants that tuning never saw.
Off-topic answers need a judge: `--judge 200` asks SmolLM2-135M-Instruct about so many rows of both kinds.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from rich.progress import track

from ivl.filters.duplicates import Duplicates, find_duplicates
from ivl.filters.repetition import Repetition
from ivl.filters.rules import Leaks, Length, RepeatedLines, Rule, Runs, Truncated
from ivl.types import Record
from studies.filter_clean import SHARES, streams
from studies.filter_copies import DUPLICATES
from studies.filter_faults import EXTRA, KINDS, Edit, last_answer, with_answer

NUM_CLEAN, NUM_FAULTS = 5000, 500
SEEDS = {"tune": 1, "held-out": 4}
RULES: dict[str, Rule] = {
    "length": Length(), "runs": Runs(), "repeated_lines": RepeatedLines(), "truncated": Truncated(), "leaks": Leaks(),
    "repetition": Repetition(),
}  # fmt: skip
DUPLICATE = "duplicates"


@dataclass(frozen=True)
class Labelled:
    record: Record
    kind: str
    """`clean`, or the fault."""
    part: str
    """Of clean rows where they are from, of faults the variant."""


def clean_rows(split: str, seed: int, supply: dict[str, Iterator[Record]]) -> list[Labelled]:
    rows = [
        Labelled(next(supply[part]), "clean", part)
        for part, (_, share) in SHARES.items()
        for _ in range(round(share * NUM_CLEAN))
    ]
    random.Random(seed).shuffle(rows)
    return rows


def fault_rows(split: str, seed: int, supply: dict[str, Iterator[Record]]) -> list[Labelled]:
    """Each kind NUM_FAULTS times, variants in turn, made of clean rows that are not in the clean set."""
    rng, rows = random.Random(f"{seed} faults"), []
    for kind, variants in {**KINDS, **EXTRA}.items():
        chosen = variants.variants(split)
        for n in range(NUM_FAULTS):
            edit = chosen[n % len(chosen)]
            name = getattr(edit, "__qualname__", "").replace(".<locals>.edit", "")
            rows.append(Labelled(_faulty(edit, supply, rng), kind, name))
    return rows


def _faulty(edit: Edit, supply: dict[str, Iterator[Record]], rng: random.Random) -> Record:
    """The next clean row that lends itself to the fault, with it. An answer may be too short."""
    while True:
        (part,) = rng.choices(list(supply), [SHARES[part][1] for part in supply])
        base = next(supply[part], None)
        if base is None:  # documents and captions end
            del supply[part]
            continue
        answer = edit(last_answer(base), rng)
        if answer is not None and answer != last_answer(base):
            return with_answer(base, answer)


def duplicate_rows(split: str, seed: int, clean: list[Labelled]) -> list[Labelled]:
    """The clean rows, and after its original, somewhere, a near copy of 500 of them; ids of copies end in `=`."""
    rng, placed = random.Random(f"{seed} duplicates"), [(float(n), row) for n, row in enumerate(clean)]
    chosen = DUPLICATES[split]
    pool = rng.sample(range(len(clean)), len(clean))
    for n in range(NUM_FAULTS):
        edit, copy, at = chosen[n % len(chosen)], None, 0
        while copy is None:
            at = pool.pop(0)
            copy = edit(clean[at].record, rng)
            if copy is None:
                pool.append(at)
        placed.append((rng.uniform(at, len(clean)), Labelled(copy, DUPLICATE, edit.__name__)))
    return [row for _, row in sorted(placed, key=lambda pair: pair[0])]


def judge_pointwise(rows: list[Labelled], rules: dict[str, Rule]) -> list[dict[str, str]]:
    """What each rule says of each row: reasons by rule name, of rules that would drop it."""
    found = []
    for row in track(rows, description="rules"):
        verdicts = {name: rule(row.record) for name, rule in rules.items()}
        found.append({name: verdict.reason for name, verdict in verdicts.items() if not verdict.keep})
    return found


def duplicates_among(rows: list[Labelled]) -> list[int | None]:
    """For each row the number of the earlier one that it duplicates."""
    limits = Duplicates()
    signatures = [limits.signature(row.record) for row in track(rows, description="duplicates")]
    with TemporaryDirectory() as folder:
        found = dict(zip(*find_duplicates(limits, lambda _: enumerate(signatures), 1, Path(folder)).tolist(), strict=True))
    return [found.get(number) for number in range(len(rows))]


def measure(split: str, seed: int, failures: int = 0) -> dict:
    supply = streams(split, seed)  # type: ignore[arg-type]
    clean = clean_rows(split, seed, supply)
    faults = fault_rows(split, seed, supply)
    rows = clean + faults
    started = time.perf_counter()
    said = judge_pointwise(rows, RULES)
    rules_seconds = time.perf_counter() - started
    stream = duplicate_rows(split, seed, clean)
    started = time.perf_counter()
    doubles = duplicates_among(stream)
    duplicate_seconds = time.perf_counter() - started
    wrong_doubles = [row for row, found in zip(stream, doubles, strict=True) if row.kind == "clean" and found is not None]
    by_rule = {name: Counter() for name in (*RULES, DUPLICATE)}
    parts: dict[str, Counter] = {}
    dropped = {id(row.record) for row, reasons in zip(rows, said, strict=True) if reasons}
    dropped_clean = {id(row.record) for row in wrong_doubles} | (dropped & {id(row.record) for row in clean})
    for row, reasons in zip(rows, said, strict=True):
        for name in reasons:
            by_rule[name][row.kind] += 1
        parts.setdefault(f"{row.kind}: {row.part}", Counter())[
            id(row.record) in (dropped_clean if row.kind == "clean" else dropped)
        ] += 1
    for row, found in zip(stream, doubles, strict=True):
        by_rule[DUPLICATE][row.kind] += found is not None
        if row.kind == DUPLICATE:
            parts.setdefault(f"{row.kind}: {row.part}", Counter())[found is not None] += 1
    show(failures, rows, said, stream, doubles)
    recall = {kind: sum(id(r.record) in dropped for r in faults if r.kind == kind) / NUM_FAULTS for kind in {**KINDS, **EXTRA}}
    recall[DUPLICATE] = by_rule[DUPLICATE][DUPLICATE] / NUM_FAULTS
    return {
        "split": split,
        "seed": seed,
        "clean": len(clean),
        "recall": recall,
        "false_positives": len(dropped_clean) / len(clean),
        "by_rule": by_rule,
        "parts": {name: {"rows": c.total(), "dropped": c[True]} for name, c in sorted(parts.items())},
        "rows_per_second": {"rules": round(len(rows) / rules_seconds), "duplicates": round(len(stream) / duplicate_seconds)},
    }


def show(count: int, rows: list[Labelled], said: list[dict], stream: list[Labelled], doubles: Sequence[int | None]) -> None:
    """Prints so many failures of each kind, to look at."""
    seen: Counter = Counter()
    for row, reasons in zip(rows, said, strict=True):
        if bool(reasons) == (row.kind == "clean"):
            key = f"{row.kind}: {row.part}"
            seen[key] += 1
            if seen[key] <= count:
                print(f"--- {key} {row.record.id} {reasons}\n{last_answer(row.record)[-400:]!r}")
    for row, found in zip(stream, doubles, strict=True):
        if (found is not None) == (row.kind == "clean"):
            key = f"{DUPLICATE} {row.kind}: {row.part}"
            seen[key] += 1
            if seen[key] <= count:
                other = stream[int(found)].record if found else None
                print(f"--- {key} {row.record.id}\n{last_answer(row.record)[-300:]!r}")
                print(repr(other and (other.id, last_answer(other)[-300:])))


def markdown(result: dict) -> str:
    kinds = [*KINDS, DUPLICATE, *EXTRA]
    lines = [
        "| | rows | " + " | ".join(result["by_rule"]) + " | **all rules** |",
        "|---" * (len(result["by_rule"]) + 3) + "|",
    ]
    for kind in kinds:
        cells = [f"{100 * result['by_rule'][rule].get(kind, 0) / NUM_FAULTS:.1f}" for rule in result["by_rule"]]
        lines.append(f"| {kind}, recall % | {NUM_FAULTS} | {' | '.join(cells)} | **{100 * result['recall'][kind]:.1f}** |")
    cells = [f"{100 * result['by_rule'][rule].get('clean', 0) / result['clean']:.2f}" for rule in result["by_rule"]]
    total = f"**{100 * result['false_positives']:.2f}**"
    return "\n".join([*lines, f"| clean, dropped % | {result['clean']} | {' | '.join(cells)} | {total} |"])


def plot(result: dict, path: Path) -> None:
    """Recall of each kind and the false positives of each rule as bars."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.4), layout="constrained")
    kinds = [*KINDS, DUPLICATE]
    bars = left.barh(kinds, [100 * result["recall"][kind] for kind in kinds], color="#4363d8")
    left.bar_label(bars, fmt="%.1f", padding=2)
    left.axvline(95, color="#e6194b", linestyle="--", linewidth=1)
    left.set(xlim=(0, 115), xlabel="recall, %", title=f"{NUM_FAULTS} faulty rows of each kind")
    rules = list(result["by_rule"])
    wrong = [100 * result["by_rule"][rule].get("clean", 0) / result["clean"] for rule in rules]
    bars = right.barh([*rules, "all"], [*wrong, 100 * result["false_positives"]], color=["#808000"] * len(rules) + ["#9a6324"])
    right.bar_label(bars, fmt="%.2f", padding=2)
    right.axvline(1, color="#e6194b", linestyle="--", linewidth=1)
    right.set(xlim=(0, 1.25), xlabel="dropped, %", title=f"{result['clean']} clean rows")
    left.invert_yaxis()
    right.invert_yaxis()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--split", choices=SEEDS, default="held-out")
    parser.add_argument("--seed", type=int)
    parser.add_argument("--failures", type=int, default=0, help="print so many mistakes of each kind")
    parser.add_argument("--judge", type=int, default=0, help="ask the weak judge about so many clean and off-topic rows")
    parser.add_argument("--out", type=Path, default=Path("runs/filter-quality"))
    args = parser.parse_args()
    seed = SEEDS[args.split] if args.seed is None else args.seed
    args.out.mkdir(parents=True, exist_ok=True)
    if args.judge:
        from studies import filter_judge

        judged = filter_judge.measure(args.judge, args.split, seed)
        print(json.dumps(judged, indent=1))
        (args.out / f"{args.split}-judge.json").write_text(json.dumps(judged, indent=1))
        return
    result = measure(args.split, seed, args.failures)
    print(markdown(result))
    for name, part in result["parts"].items():
        print(f"{name:45} {part['rows']:5} {100 * part['dropped'] / part['rows']:6.1f}% dropped")
    print(result["rows_per_second"])
    (args.out / f"{args.split}.json").write_text(json.dumps(result, indent=1))
    (args.out / f"{args.split}.md").write_text(markdown(result) + "\n")
    plot(result, args.out / f"{args.split}.png")


if __name__ == "__main__":
    main()
