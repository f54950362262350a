"""The frame of every study: a claim, its arms and seeds, and one small file of figures for each arm and seed.

A study says in `measure` how one arm of one seed is trained and measured. Everything that a page shows comes from the files.
"""

from __future__ import annotations

import fcntl
import json
import math
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, TypeVar

from benchmarks.machine import processor_name
from ivl.train.config import Precision
from ivl.utils.files import write_json

PRECISION: Precision = "fp32"
"""Every model of every study trains in it: small models gain little from bfloat16, and many processors only imitate that."""
T_95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}
"""Quantiles of Student's distribution, for the 95% interval of the mean of so many values."""
Figures = dict[str, Any]
Setting = TypeVar("Setting")
Holds = Literal["holds", "holds in part", "does not hold here", "not measured yet"]


@dataclass(frozen=True)
class Lab:
    """Where studies work, and how large they are."""

    runs: Path = Path("runs/claims")
    """Data and models; they may be deleted."""
    results: Path = Path("studies/results")
    """Files of figures; those of the full size are committed."""
    scale: float = 1.0
    """Factor on steps, rows and questions."""
    seeds: int = 3

    def few(self, full: float, least: int = 1) -> int:
        """Scale a number of steps, rows or questions, but not below `least`."""
        return max(least, round(full * self.scale))

    def once(self, name: str, make: Callable[[Path], object]) -> Path:
        """Return the folder runs/NAME that `make` fills. One process makes it, the others wait for it."""
        folder = self.runs / name
        folder.parent.mkdir(parents=True, exist_ok=True)
        with folder.with_name(f".{folder.name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not (folder / "done").exists():
                folder.mkdir(exist_ok=True)
                make(folder)
                (folder / "done").touch()
        return folder

    def pick(self, study: str, arm: str, choices: Sequence[Setting], score: Callable[[Setting], float]) -> Any:
        """Return the setting with the best score; all seeds of the arm take it.

        The score must come from validation data. The scores are kept beside the arm's figures.
        """
        path = self.results / study / f"{arm}-setting.json"

        def choose(_: Path) -> None:
            if not path.exists():
                scores = {str(choice): score(choice) for choice in choices}
                write_json(path, {"scores": scores, "picked": max(choices, key=lambda c: scores[str(c)]), **provenance()})

        self.once(f"{study}/{arm}-setting", choose)
        return json.loads(path.read_text())["picked"]


QUICK = Lab(Path("runs/claims/quick"), Path("runs/claims/quick/results"), scale=0.03, seeds=2)


@dataclass(frozen=True)
class Arm:
    """One of the ways that a study compares."""

    about: str
    seeds: int | None = None
    """Most seeds that it is worth; None takes the lab's."""


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds with half of its 95% interval, which is not known of a single seed."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        return statistics.mean(self.values)

    @property
    def half(self) -> float:
        count = len(self.values)
        return T_95[count] * statistics.stdev(self.values) / math.sqrt(count) if count in T_95 else math.nan

    def shown(self, form: str) -> str:
        """Format it as `92.1% ± 0.3%`, by a format of single numbers."""
        margin = "" if math.isnan(self.half) else f" ± {self.half:{form.lstrip('+')}}"
        return f"{self.mean:{form}}{margin}"


@dataclass(frozen=True)
class Verdict:
    """What the figures say about the claim, in one sentence."""

    holds: Holds
    sentence: str


@dataclass(frozen=True)
class Study:
    """A claim of the paper and how it is tried."""

    name: str
    title: str
    claim: str
    """What the paper says, and where."""
    done: str
    """What was done here."""
    arms: Mapping[str, Arm]
    measure: Callable[[Lab, str, int], Figures]
    """Trains and measures an arm of a seed."""
    judge: Callable[[Results], Verdict]
    """Is asked only when all seeds of the arms that it needs are measured."""
    needs: tuple[str, ...]
    """Arms without which there is no verdict."""
    columns: Mapping[str, tuple[str, str]]
    """Figures of the table: key -> title and format."""
    draw: Callable[[Results, Any], None]
    """Draws the figures into the axes of a plot, or into those of several panels."""
    panels: int = 1
    extra: Callable[[Results], str] | None = None
    """HTML that follows on the page."""
    costly: bool = False
    """Runs only when it is asked for."""

    def seeds_of(self, arm: str, lab: Lab) -> int:
        return min(lab.seeds, self.arms[arm].seeds or lab.seeds)

    def tasks(self, lab: Lab) -> list[tuple[str, int]]:
        """Every arm and seed, in the order of the work: all arms of a seed, then the next."""
        return [(arm, seed) for seed in range(lab.seeds) for arm in self.arms if seed < self.seeds_of(arm, lab)]

    def file(self, lab: Lab, arm: str, seed: int) -> Path:
        return lab.results / self.name / f"{arm}-{seed}.json"

    def run(self, lab: Lab, arm: str, seed: int) -> None:
        """Measure an arm of a seed and write its file."""
        began, processor_began = time.monotonic(), time.process_time()
        figures = self.measure(lab, arm, seed)
        taken = {"seconds": time.monotonic() - began, "processor_seconds": time.process_time() - processor_began}
        about = {"study": self.name, "arm": arm, "seed": seed, "scale": lab.scale}
        write_json(self.file(lab, arm, seed), {**about, "figures": figures, **taken, **provenance()})


@dataclass
class Results:
    """The figures of a study, as far as they have been measured."""

    study: Study
    lab: Lab
    rows: dict[str, list[dict[str, Any]]] = field(init=False)
    """What the files hold, by arm and in the order of seeds."""
    missing: list[str] = field(init=False)
    """Arms and seeds without a file, as `ARM-SEED`."""

    def __post_init__(self) -> None:
        self.rows, self.missing = {arm: [] for arm in self.study.arms}, []
        for arm, seed in self.study.tasks(self.lab):
            path = self.study.file(self.lab, arm, seed)
            if path.exists():
                self.rows[arm].append(json.loads(path.read_text()))
            else:
                self.missing.append(path.stem)

    def figures(self, arm: str) -> list[Figures]:
        """The figures of an arm's seeds."""
        return [row["figures"] for row in self.rows[arm]]

    def of(self, arm: str, figure: str) -> Estimate:
        return Estimate(tuple(figures[figure] for figures in self.figures(arm)))

    def gain(self, arm: str, base: str, figure: str) -> Estimate:
        """The difference of two arms, seed by seed; an arm of a single seed stands beside every seed of the other."""
        mine, theirs = self.of(arm, figure).values, self.of(base, figure).values
        theirs = theirs * len(mine) if len(theirs) == 1 else theirs
        return Estimate(tuple(a - b for a, b in zip(mine, theirs, strict=True)))

    def bars(self, axes: Any, figure: str, label: str) -> None:
        """Draw a figure of every arm that has it: bars with intervals, and each seed as a dot."""
        arms = [arm for arm in self.study.arms if any(figure in each for each in self.figures(arm))]
        for at, arm in enumerate(arms):
            found = self.of(arm, figure)
            axes.bar(at, found.mean, color="#9ecae1", yerr=None if math.isnan(found.half) else found.half, capsize=4)
            axes.plot([at] * len(found.values), found.values, "k.", markersize=4)
        axes.set_xticks(range(len(arms)), arms, fontsize=8)
        axes.set_ylabel(label)

    def verdict(self) -> Verdict:
        """What the figures say, once every seed of the arms that it needs is there."""
        if lacking := [arm for arm in self.study.needs if len(self.rows[arm]) < self.study.seeds_of(arm, self.lab)]:
            return Verdict("not measured yet", f"Not measured yet: {', '.join(lacking)}.")
        return self.study.judge(self)


def sign(gain: Estimate) -> Holds:
    """Whether a difference is above zero by its interval. A mean that the seeds do not tell from zero shows nothing."""
    return "holds" if gain.mean - gain.half > 0 else "does not hold here"


def together(signs: Sequence[Holds]) -> Holds:
    """What several parts of a claim say about the whole."""
    return signs[0] if len(set(signs)) == 1 else "holds in part"


def forget(study: Study, lab: Lab) -> None:
    """Delete a study's figures and runs."""
    for folder in (lab.results, lab.runs):
        shutil.rmtree(folder / study.name, ignore_errors=True)


def provenance() -> dict[str, str]:
    """The commit, the date and the machine, for a file of figures."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--exclude", "*"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    return {"commit": commit, "date": datetime.now(UTC).strftime("%Y-%m-%d"), "processor": processor_name()}
