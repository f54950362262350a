"""A chain of named stages, read from a JSON file.

{"about": "...", "domain": "general", "domains": {"*math*": "mathematics"}, "groups": {"academic": ["docvqa*"]},
 "judge": {"unjudged": "keep"},
 "stages": [{"use": "length", "max_answer": 20000}, {"use": "quality", "min_score": 7, "exempt": ["academic"]}]}
"""

from __future__ import annotations

import importlib
import json
from dataclasses import asdict, dataclass, field, fields
from fnmatch import fnmatchcase
from functools import lru_cache
from pathlib import Path
from typing import Any

from ivl.errors import InputError, nearest
from ivl.filters.judge import DOMAINS, DataJudgeConfig, JudgedStage
from ivl.utils.strict_json import from_json, read_json

UNREADABLE = "unreadable"
"""The stage that reports give to rows that cannot be read."""
FILTERS: dict[str, tuple[str, str | None]] = {
    "length": ("ivl.filters.rules:Length", "max_answer"),
    "runs": ("ivl.filters.rules:Runs", "max_letters"),
    "repeated_lines": ("ivl.filters.rules:RepeatedLines", "max_share"),
    "repetition": ("ivl.filters.repetition:Repetition", "limit"),
    "leaks": ("ivl.filters.rules:Leaks", None),
    "truncated": ("ivl.filters.rules:Truncated", None),
    "duplicates": ("ivl.filters.duplicates:Duplicates", None),
    "quality": ("ivl.filters.judge:Quality", "min_score"),
    "llm_repetition": ("ivl.filters.judge:LlmRepetition", "min_score"),
}
"""The class of each filter, imported when a chain uses it, and its field that reports draw as the limit of the score."""
CONFIGS = Path(__file__).with_name("configs")


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    """The keys that a stage has beside the thresholds of its filter."""

    use: str
    name: str = ""
    """The stage's name in reports; by default the filter's."""
    exempt: tuple[str, ...] = ()
    """Patterns of data set names, or groups of them, that skip the stage."""

    def __post_init__(self) -> None:
        if self.name == UNREADABLE:
            raise ValueError(f"name must be a word other than {UNREADABLE!r}")


@dataclass(frozen=True)
class FilterStage:
    """One stage of a chain."""

    name: str
    use: str
    rule: Any
    """A Rule, a JudgedStage, or Duplicates, which compares rows with earlier ones."""
    exempt: tuple[str, ...] = ()

    @property
    def judged(self) -> bool:
        return isinstance(self.rule, JudgedStage)

    @property
    def compares(self) -> bool:
        return hasattr(self.rule, "signature")

    @property
    def limit(self) -> float | None:
        """The score that reports draw as the limit."""
        name = FILTERS[self.use][1]
        return getattr(self.rule, name) if name else None

    def exempts(self, dataset: str) -> bool:
        return _matches(dataset, self.exempt)


@dataclass(frozen=True, kw_only=True)
class ChainConfig:
    """The file of a chain. Patterns are those of a shell and ignore case."""

    about: str = ""
    """A line for the report."""
    domain: str = "general"
    """Domain of a data set that no pattern of `domains` fits."""
    domains: dict[str, str] = field(default_factory=dict)
    """Domain by pattern of the data set's name."""
    groups: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Names for lists of patterns."""
    judge: DataJudgeConfig = field(default_factory=DataJudgeConfig)
    stages: tuple[Any, ...]
    """For each stage the filter it uses, its name, its exemptions and its thresholds."""

    def __post_init__(self) -> None:
        if not self.stages:
            raise ValueError("`stages` must be a list of at least one stage")
        for domain in (self.domain, *self.domains.values()):
            if domain not in DOMAINS:
                raise ValueError(f"unknown domain {domain!r}; {nearest(domain, DOMAINS, 'domains')}")


@dataclass(frozen=True)
class Chain:
    """A chain with its stages built."""

    config: ChainConfig
    stages: tuple[FilterStage, ...]

    @property
    def needs_judge(self) -> bool:
        return any(stage.judged for stage in self.stages)

    def spelled_out(self) -> dict[str, Any]:
        """Return the configuration with every default."""
        stages = [entry | asdict(stage.rule) for entry, stage in zip(self.config.stages, self.stages, strict=True)]
        return asdict(self.config) | {"stages": stages}

    def to_text(self) -> str:
        """Return the configuration with every default as JSON to be edited."""
        return json.dumps(self.spelled_out(), indent=2, ensure_ascii=False) + "\n"

    def domain_of(self, dataset: str) -> str:
        """Return the domain of the first pattern that fits."""
        domains = self.config.domains.items()
        return next((domain for pattern, domain in domains if _matches(dataset, (pattern,))), self.config.domain)


@lru_cache(10_000)
def _matches(dataset: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(dataset.casefold(), pattern.casefold()) for pattern in patterns)


def load_chain(name: str | Path) -> Chain:
    """Read a chain that comes with ivl by its name, or one from a file.

    Raises:
        InputError: naming the file, the stage and the key.
    """
    shipped = {path.stem: path for path in sorted(CONFIGS.glob("*.json"))}
    path = shipped.get(str(name), Path(name))
    if path.suffix != ".json" and not path.is_file():
        raise InputError(f"{name}: no such filter; {nearest(name, shipped, 'shipped ones')}, or give a .json file")
    return read_chain(read_json(path), str(name))


def read_chain(values: Any, where: str) -> Chain:
    """Build the chain that a JSON object describes; `where` names it in errors."""
    config = from_json(ChainConfig, values, where)
    stages = tuple(_stage(entry, config.groups, f"{where}: stage {n}") for n, entry in enumerate(config.stages, 1))
    names = [stage.name for stage in stages]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise InputError(f"{where}: two stages are called {twice[0]!r}; give one a `name` of its own")
    return Chain(config, stages)


def _stage(entry: Any, groups: dict[str, tuple[str, ...]], where: str) -> FilterStage:
    use = entry.get("use") if isinstance(entry, dict) else entry
    if not isinstance(use, str) or use not in FILTERS or not isinstance(entry, dict):
        raise InputError(f"{where}: `use` must be a filter, got {use!r}; {nearest(use, FILTERS, 'filters')}")
    where = f"{where} ({use})"
    module, _, name = FILTERS[use][0].partition(":")
    try:
        kind = getattr(importlib.import_module(module), name)
    except ImportError as error:
        raise InputError(f"{where}: needs the package {error.name}: pip install 'ivl[data]'") from None
    rule = from_json(kind, entry, where, extra=[each.name for each in fields(StageConfig)])
    config = from_json(StageConfig, entry, where, extra=[each.name for each in fields(kind)])
    patterns = tuple(pattern for each in config.exempt for pattern in groups.get(each, (each,)))
    return FilterStage(config.name or use, use, rule, patterns)
