"""What `ivl train --dry-run` checks beside the plan: that model and data are there and fit, and how long the run is."""

from __future__ import annotations

import shlex
from collections.abc import Iterator

from ivl.checkpoint import load_tokenizer, resolve
from ivl.checkpoint.hub import is_remote
from ivl.data.config import DataConfig
from ivl.data.loader import Loader
from ivl.data.mixture import Mixture, load_mixture
from ivl.datasets.estimate import PackEstimate, estimate_packs
from ivl.errors import InputError
from ivl.processing.processor import Processor
from ivl.runs.build import read_architecture
from ivl.runs.config import RunConfig
from ivl.utils.metrics import import_tracker

SAMPLED = 200
"""Rows of each kind of data that are encoded."""


class Check:
    """What is known of a run before it starts: `facts` by name, its `length`, and `problems` that would stop it."""

    def __init__(self, config: RunConfig, *, ranks: int = 1) -> None:
        self.config, self.ranks = config, ranks
        self.facts: dict[str, str] = {}
        self.length = ""
        self.problems: list[str] = []
        processor = self._processor()
        for name, data in (("data", config.data), ("validation", config.val_data)):
            if data is not None:
                self._try(self._read, name, data, processor)
        for package in config.train.log_to:
            self._try(import_tracker, package)

    def describe(self) -> str:
        """Return the facts, a line each."""
        lines = [f"{name:11}{text}" for name, text in self.facts.items()]
        return "\n".join(lines)

    def _try(self, check: object, *arguments: object) -> None:
        try:
            check(*arguments)  # type: ignore[operator]
        except InputError as error:
            self.problems.append(str(error))

    def _processor(self) -> Processor | None:
        """Return the run's processor, if model and tokenizer are on this machine."""
        config, name = self.config, self.config.tokenizer or self.config.model
        try:
            if not name:
                raise InputError("a random start needs `tokenizer`, a directory with tokenizer.json or tokenizer.model")
            if is_remote(name):
                self.facts["model"] = f"{name} is no directory here; as a hub id it would be fetched, so no row is encoded now"
                return None
            return Processor(read_architecture(config), load_tokenizer(resolve(name)))
        except InputError as error:
            self.problems.append(str(error))
            return None

    def _read(self, name: str, data: DataConfig, processor: Processor | None) -> None:
        """Open the rows, and encode some of them if there is a processor."""
        specs = load_mixture(data.mixture, root=data.root, format=data.format)
        mixture = Mixture(specs, seed=0, val_share=data.val_share, validation=data.validation)
        rows = sum(len(rows) for rows in mixture.files)
        self.facts[name] = f"{rows:,} rows of {len(specs)} data set{'s' * (len(specs) > 1)}, {len(mixture):,} drawn an epoch"
        if processor is None:
            return
        loader = Loader(data, processor, seed=self.config.train.seed, world_size=self.ranks, pairs=self.config.objective.pairs)
        estimate = estimate_packs(loader, SAMPLED)
        self.facts[name] += "; " + ", ".join(_about_rows(estimate))
        if bad := sum(part.bad for part in estimate.datasets):
            files = " ".join(dict.fromkeys(shlex.quote(spec.annotation) for spec in specs))
            found = f"{bad} of {estimate.sampled:,} rows that were tried cannot be used, such as {estimate.first_bad}"
            if data.on_error == "refuse":
                self.problems.append(f"{name}: {found}; `ivl data validate {files}` names them all")
            else:
                self.facts[name] += f"; {found}, and are left out"
        if estimate.over_budget and data.over_budget == "refuse" and data.on_error == "refuse":
            self.problems.append(
                f"{name}: {estimate.over_budget} of {estimate.sampled} rows are larger than a pack; see --data.over-budget"
            )
        if name == "data":
            self.length = self._length(estimate, len(mixture))

    def _length(self, estimate: PackEstimate, draws: int) -> str:
        train, data = self.config.train, self.config.data
        packs = draws if data.max_samples == 1 and not estimate.dropped else estimate.packs * self.ranks
        about, epochs = "" if packs == draws else "about ", data.epochs or 1
        length = -(-packs * epochs // train.packs_per_step)
        if train.num_steps is None or (data.epochs and length < train.num_steps):
            ends = f"; the data end before {train.num_steps:,}, see --data.epochs" if train.num_steps else ""
            return f"{about}{length:,} for {epochs} epoch{'s' * (epochs > 1)}{ends}"
        return f"{train.num_steps:,}, about {train.num_steps * train.packs_per_step / packs:.2f} epochs"


def _about_rows(estimate: PackEstimate) -> Iterator[str]:
    tokens, tiles = (max(getattr(part, name) for part in estimate.datasets) for name in ("max_tokens", "max_tiles"))
    yield f"{estimate.tokens_per_sample:,.0f} tokens and {estimate.tiles_per_sample:.1f} tiles each"
    yield f"the largest of {estimate.sampled:,} has {tokens:,} and {tiles}"
