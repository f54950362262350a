"""A language model that scores rows: quality by domain, and repetition (InternVL2.5, arXiv:2412.05271, section 4).

The paper gives the domains and the thresholds; the prompts are our own. The judge is any Generator. Every reply is cached as
soon as it arrives, under the judge's name, the sampling and the whole prompt, so that no later run asks for it again.
"""

from __future__ import annotations

import hashlib
import json
import re
import sqlite3
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal

from ivl.errors import InputError
from ivl.filters.rules import FilterVerdict
from ivl.filters.text import shown_text
from ivl.generators import Generator, Refused, answers_of
from ivl.types import Message, Record, SamplingParams, Text
from ivl.utils.files import regular

PROMPTS = {path.stem: path.read_text("utf-8").rstrip("\n") for path in Path(__file__).with_name("prompts").glob("*.txt")}
LOCK_SECONDS = 60
"""How long the cache waits for another process that writes it."""
DOMAINS = ("general", "discipline", "programming", "mathematics")
"""The quality prompt has criteria for each of these."""
STRICTER = """

Reply with the line `Score: N` alone, N a whole number from 0 to 10. No other word."""


@dataclass(frozen=True, kw_only=True)
class DataJudgeConfig:
    """How the judge is asked."""

    max_new_tokens: int = 256
    """Limit of a reply."""
    temperature: float = 0.0
    max_chars: int = 24_000
    """A longer sample is shown without its middle, with a note of how much is missing."""
    batch_size: int = 32
    """Prompts in one batch of a local model."""
    unjudged: Literal["keep", "drop"] = "keep"
    """What happens to a row that the judge refuses or gives no score in two replies; the report counts it either way."""
    max_unjudged_share: float = 0.5
    """More such rows than this, after the first 50, stop the run: the model is too weak to judge."""

    def __post_init__(self) -> None:
        if self.max_chars < 1 or self.batch_size < 1:
            raise ValueError(f"max_chars and batch_size must be >= 1, got {self.max_chars} and {self.batch_size}")
        if not 0 <= self.max_unjudged_share <= 1:
            raise ValueError(f"max_unjudged_share must be in [0, 1], got {self.max_unjudged_share}")
        _ = self.sampling  # checks the other values

    @property
    def sampling(self) -> SamplingParams:
        return SamplingParams(max_new_tokens=self.max_new_tokens, temperature=self.temperature)


@dataclass(frozen=True, kw_only=True)
class JudgedStage:
    """A stage whose score a judge gives, from 0 to 10; lower scores than `min_score` are dropped."""

    template: ClassVar[str]
    min_score: float

    def __post_init__(self) -> None:
        if not 0 <= self.min_score <= 10:
            raise ValueError(f"min_score must be in [0, 10], got {self.min_score}")

    def prompt(self, sample: str, domain: str) -> str:
        return PROMPTS[self.template].format(criteria=PROMPTS[f"criteria_{domain}"], sample=sample)


@dataclass(frozen=True, kw_only=True)
class Quality(JudgedStage):
    """Quality of the whole sample, by the criteria of its domain."""

    template: ClassVar[str] = "quality"
    min_score: float = 7.0


@dataclass(frozen=True, kw_only=True)
class LlmRepetition(JudgedStage):
    """Repetition in the replies."""

    template: ClassVar[str] = "repetition"
    min_score: float = 3.0


class DataJudge:
    """Asks a generator for scores and caches its replies.

    Args:
        name: the cache's name for the judge; another model must have another name.
        cache: an sqlite file that several runs may share.
        threads: requests in flight at once, one conversation each, for generators that are thread-safe. With 1, the
            generator gets batches of config.batch_size.
    """

    def __init__(
        self,
        generator: Generator,
        *,
        name: str,
        cache: str | Path = ":memory:",
        config: DataJudgeConfig | None = None,
        threads: int = 1,
    ) -> None:
        self.generator, self.name, self.threads = generator, name, threads
        self.config = config or DataJudgeConfig()
        self.asked, self.unjudged, self.cache = 0, 0, ReplyCache(cache)

    def verdicts(self, stage: JudgedStage, rows: Sequence[tuple[Record, str]]) -> list[FilterVerdict]:
        """Return a verdict for each (record, domain), in order.

        Raises:
            InputError: if the generator fails, or too few of its replies hold a score.
        """
        prompts = [stage.prompt(sample_text(record, self.config.max_chars), domain) for record, domain in rows]
        replies = self._replies(prompts)
        again = [prompt + STRICTER for prompt in prompts if parse_score(replies[prompt]) is None]
        replies |= self._replies(again)
        scores = [parse_score(replies.get(prompt + STRICTER, replies[prompt])) for prompt in prompts]
        self.asked += len(scores)
        self.unjudged += scores.count(None)
        if self.asked >= 50 and self.unjudged > self.config.max_unjudged_share * self.asked:
            last = next((reply for prompt in again if parse_score(reply := replies[prompt]) is None), None) or ""
            raise InputError(
                f"judge {self.name}: {self.unjudged} of {self.asked} times there was no score; one reply was {last[:200]!r}; "
                "take a stronger judge, or raise max_unjudged_share"
            )
        return [self._verdict(stage, score) for score in scores]

    def _verdict(self, stage: JudgedStage, score: float | None) -> FilterVerdict:
        if score is None:
            return FilterVerdict(self.config.unjudged == "keep", "unjudged")
        if score < stage.min_score:
            return FilterVerdict(False, f"score below {stage.min_score:g}", score)
        return FilterVerdict(True, score=score)

    def _replies(self, prompts: list[str]) -> dict[str, str | None]:
        """Return the reply to each prompt, None where the generator refused. Equal prompts are asked once."""
        replies = {prompt: self.cache.get(self._key(prompt)) for prompt in prompts}
        for prompt, reply in self._ask([prompt for prompt, reply in replies.items() if reply is None]):
            if reply is not None:
                self.cache.put(self._key(prompt), reply)
            replies[prompt] = reply
        return replies

    def _key(self, prompt: str) -> bytes:
        asked = json.dumps([self.name, asdict(self.config.sampling), prompt])
        return hashlib.blake2b(asked.encode(), digest_size=24).digest()

    def _ask(self, prompts: list[str]) -> Iterator[tuple[str, str | None]]:
        """Yield replies as they arrive."""
        size = self.config.batch_size if self.threads == 1 else 1
        batches = [prompts[at : at + size] for at in range(0, len(prompts), size)]
        pool = ThreadPoolExecutor(self.threads)
        try:
            for done in as_completed([pool.submit(self._ask_batch, batch) for batch in batches]):
                yield from done.result()
        finally:
            pool.shutdown(cancel_futures=True)

    def _ask_batch(self, prompts: list[str]) -> list[tuple[str, str | None]]:
        conversations = [(Message("user", (Text(prompt),)),) for prompt in prompts]
        try:
            return list(zip(prompts, answers_of(self.generator, conversations, self.config.sampling), strict=True))
        except Refused:
            if len(prompts) == 1:
                return [(prompts[0], None)]
            return [pair for prompt in prompts for pair in self._ask_batch([prompt])]


class ReplyCache:
    """Replies in an sqlite file, which several runs may share. The file is opened, or made, when it is first used."""

    def __init__(self, path: str | Path = ":memory:") -> None:
        self.path = path

    def get(self, key: bytes) -> str | None:
        """Return the reply under a key, if there is one."""
        rows = self._execute("SELECT reply FROM replies WHERE key = ?", key)
        return rows[0][0] if rows and isinstance(rows[0][0], str) else None

    def put(self, key: bytes, reply: str) -> None:
        """Keep a reply; it is on disk when this returns. Lone surrogates, which sqlite cannot hold, become question marks."""
        self._execute("INSERT OR REPLACE INTO replies VALUES (?, ?)", key, reply.encode("utf-8", "replace").decode())

    def _execute(self, statement: str, *values: bytes | str) -> list[tuple[Any, ...]]:
        try:
            return self._db.execute(statement, values).fetchall()
        except (OSError, sqlite3.Error) as error:
            raise InputError(
                f"{self.path}: cannot be used as the judge's cache ({error}); is another program writing it, or the disk full? "
                "The same command goes on. If the file is damaged, remove it, and the judge is asked again"
            ) from None

    @cached_property
    def _db(self) -> sqlite3.Connection:
        """The connection. A database of something else is refused before anything is written to it."""
        if self.path != ":memory:":
            Path(self.path).parent.mkdir(parents=True, exist_ok=True)
            if Path(self.path).exists():
                regular(self.path)
        db = sqlite3.connect(self.path, timeout=LOCK_SECONDS, isolation_level=None)
        tables = [name for (name,) in db.execute("SELECT name FROM sqlite_master WHERE name NOT LIKE 'sqlite_%'")]
        if tables not in ([], ["replies"]):
            raise InputError(f"{self.path}: holds {', '.join(tables)}, so it is no judge's cache; name another --judge-cache")
        if tables:
            db.execute("SELECT key, reply FROM replies LIMIT 0")
        db.execute("PRAGMA journal_mode=WAL")
        db.execute("PRAGMA synchronous=NORMAL")
        db.execute("CREATE TABLE IF NOT EXISTS replies (key BLOB PRIMARY KEY, reply TEXT NOT NULL) WITHOUT ROWID")
        return db


def sample_text(record: Record, max_chars: int) -> str:
    """Show a record to the judge: turns under their roles, media as `[image]` and `[video]`."""
    turns = [[f"[{message.role}]\n{shown_text(message)}" for message in talk] for talk in record.conversations]
    text = "\n\n---\n\n".join(map("\n\n".join, turns))
    if len(text) <= max_chars:
        return text
    half = max_chars // 2
    return f"{text[:half]}\n[... {len(text) - 2 * half:,} characters are not shown ...]\n{text[len(text) - half :]}"


_NUMBER = r"(?<![\d.,-])(\d{1,3}(?:[.,]\d+)?)(?!\d|[.,]\d)(?: ?(?:/|out of) ?(\d{1,9})(?!\d))?(?! ?(?:-|–|—|to\b) ?\d)"
_LABELLED = re.compile(
    r"(?<![a-z])(?:score|rating|grade|评分|得分|分数) ?(?:0 ?(?:-|–|to) ?10 )?(?:is|of|为)? ?" + _NUMBER, re.IGNORECASE
)
_ANY, _ALONE = re.compile(_NUMBER, re.IGNORECASE), re.compile(f"{_NUMBER}[ .]{{0,9}}", re.IGNORECASE)
_DECORATION = dict.fromkeys(map(ord, "\"'*_`()[]:：="), " ")


def parse_score(reply: str | None) -> float | None:
    """Read the score from 0 to 10 that a reply ends with: the last `Score: N`, else `N/10`, else a number alone.

    Other scales, ranges and numbers below 0 or above 10 are no score. Marks and white space become single spaces first, so
    that no pattern repeats without a bound: reading is linear in the length of the reply.
    """
    plain = " ".join((reply or "").translate(_DECORATION).split())
    found = list(_LABELLED.finditer(plain)) or [match for match in _ANY.finditer(plain) if match[2] == "10"]
    last = found[-1] if found else _ALONE.fullmatch(plain)
    if last is None:
        return None
    score = float(last[1].replace(",", "."))
    return score if score <= 10 and last[2] in (None, "10") else None
