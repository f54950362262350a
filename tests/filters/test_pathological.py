"""Texts of 100 kB made to stop a reader: every rule, and the reader of a judge's scores, takes linear time."""

from __future__ import annotations

import time

import pytest

from ivl.filters.chain import load_chain
from ivl.filters.judge import parse_score
from ivl.filters.text import looks_like_code, prose
from ivl.types import Message, Record, Text

SIZE = 100_000
UNITS = (
    "Score \n", "Score", "score ( [", "*", "_`", "score: *", "Score: 7 -", "0 - 10 ", "7/", "out of ", "评分", " \n", " ", "\t",
    "\n", "```\n", "```", "~~~ x\n", "`", "$", "$$ ", "\\( ", "\\((", "<box>", "</a", "<a ", "https://", "|", "| \n", "| |",
    "x", "x ", "a.", "0", "0 ", "1,1.", "[", ")", "f(", ") ", "=", "a = ", "> ", ">>> ", "- ", "1. ", "a 1", "not ", "\ud83d",
    "字", "def f", "\r", "\x1e", "<|", "[INST", "### Human", "Human :",
    "\u0301\u0316",
)  # fmt: skip
JUDGED = ("Score" + " \n" * 50_000 + "x", "Score" * 20_000 + ": 7", "Score (0" + " - 10" * 20_000, "7 out " * 15_000 + "of 10")


def seconds(function, *args) -> float:
    start = time.process_time()
    function(*args)
    return time.process_time() - start


@pytest.mark.parametrize("text", JUDGED)
def test_a_judges_reply_is_read_in_linear_time(text: str) -> None:
    assert seconds(parse_score, text) < 2


def test_every_reader_of_text_is_linear() -> None:
    readers = [stage.rule.signature if stage.compares else stage.rule for stage in load_chain("heuristic").stages]
    for unit in UNITS:
        text = "Score " + unit * (30_000 // len(unit)) + "end"
        talk = (Message("user", (Text("?"),)), Message("assistant", (Text(text),)))
        record = Record(id="r", conversations=(talk,), source="rows.jsonl:1")
        for reader in readers:
            assert seconds(reader, record) < 2, (reader, unit)
        for read in (prose, looks_like_code, parse_score):
            assert seconds(read, unit * (SIZE // len(unit)) + "end") < 2, (read, unit)
