"""Pairs from graded replies: every rule of which may meet which, counted, seeded, written whole or not at all."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from ivl.data.mixture import Mixture, load_mixture
from ivl.errors import InputError
from ivl.evaluation.scoring import formulas
from ivl.preference.pairs import PairsConfig, Tally, build_pairs, correctness_pairs
from ivl.preference.questions import QuestionSource
from ivl.preference.report import write_report
from ivl.utils.jsonl import Journal
from ivl.utils.killable import CallStopped


def reply(answer: str, *, reason: str = "one\ntwo", finish: str = "stop") -> dict:
    return {"text": f"{reason}\nFinal answer: {answer}", "finish_reason": finish}


def row(number: int, replies: list[dict], answers: list[str], image: str) -> dict:
    return {
        "id": f"s/{number}", "source": "s", "images": [image], "question": f"question {number}?", "answers": answers,
        "max_tiles": None, "replies": replies,
    }  # fmt: skip


@pytest.fixture
def image(tmp_path: Path) -> str:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    return str(tmp_path / "a.png")


def journal(path: Path, rows: list[dict], kind: str = "replies") -> Path:
    sources = [{"name": "s", "questions": "q.jsonl"}]
    with Journal(path, {"kind": kind, "sources": sources}) as file:
        file.add(rows)
    return path


def pairs(out: Path, name: str = "pairs.jsonl") -> list[dict]:
    return [json.loads(line) for line in (out / name).read_text().splitlines()]


def test_correct_meets_wrong_and_malformed(tmp_path: Path, image: str) -> None:
    replies = [
        reply("4"),
        reply("5"),
        reply("6", reason="three\nfour"),
        {"text": "4", "finish_reason": "stop"},
        reply("4", reason="long\nlonger", finish="length"),
    ]
    tally = build_pairs(journal(tmp_path / "r.jsonl", [row(0, replies, ["4"], image)]), tmp_path / "out")["s"]
    made = pairs(tmp_path / "out")
    assert [(p["chosen"][-1], p["rejected"][-1]) for p in made] == [("4", "5"), ("4", "6")]
    assert len(pairs(tmp_path / "out", "format_pairs.jsonl")) == 2
    assert (tally.correct, tally.wrong, dict(tally.malformed)) == (1, 2, {"no answer": 1, "cut off at the limit": 1})
    assert tally.pairs == {"correctness": 2, "format": 2} and made[0]["answer_gt"] == ["4"]


def test_a_right_answer_within_the_wrong_one_makes_no_pair(tmp_path: Path, image: str) -> None:
    rows = [row(0, [reply("4"), reply("4 or 5")], ["4"], image)]
    tally = build_pairs(journal(tmp_path / "r.jsonl", rows), tmp_path / "out")["s"]
    assert tally.left_out == {"right answer within the wrong one": 1} and not (tmp_path / "out" / "pairs.jsonl").exists()


def test_at_most_so_many_pairs_of_a_question_by_its_own_seed(tmp_path: Path, image: str) -> None:
    right = [reply("4", reason=f"r{n}\nx") for n in range(6)]
    wrong = [reply("7", reason=f"w{n}\nx") for n in range(6)]
    rows = [row(n, right + wrong, ["4"], image) for n in range(2)]
    path = journal(tmp_path / "r.jsonl", rows)
    build_pairs(path, tmp_path / "a")
    build_pairs(path, tmp_path / "b")
    build_pairs(path, tmp_path / "c", PairsConfig(seed=1))
    build_pairs(path, tmp_path / "d", PairsConfig(limit=3))
    a, b, c, d = (pairs(tmp_path / name) for name in "abcd")
    assert a == b != c and len(a) == len(c) == 30 and len(d) == 6
    texts = [[(p["chosen"], p["rejected"]) for p in a if p["id"].startswith(f"s/{n}/")] for n in range(2)]
    assert texts[0] != texts[1], "another question, another draw"


def test_repeated_replies_make_one_pair() -> None:
    from ivl.preference.pairs import Grade

    grades = [Grade("good", "4", True)] * 3 + [Grade("bad", "5", False)] * 2
    tally = Tally()
    made = correctness_pairs({"id": "x", "source": "s", "images": [], "question": "q", "answers": ["4"]}, grades, tally)
    assert len(made) == 1 and tally.left_out == {"repeated": 5}


def test_dropout_pairs(tmp_path: Path, image: str) -> None:
    base = row(0, [], [], image) | {"chosen": "a b c d", "prefix": "a b", "index": 0}
    rows = [
        base | {"continuation": " x y", "finish_reason": "stop"},
        base | {"continuation": " c d", "finish_reason": "stop"},
        base | {"continuation": " z", "finish_reason": "length"},
    ]
    tally = build_pairs(journal(tmp_path / "d.jsonl", rows, "dropout"), tmp_path / "out")["s"]
    assert [(p["chosen"], p["rejected"]) for p in pairs(tmp_path / "out")] == [("a b c d", "a b x y")]
    assert tally.left_out == {"the same without the image": 1, "continuation cut off": 1}


def test_what_is_written_trains_and_is_reported(tmp_path: Path, image: str) -> None:
    rows = [row(n, [reply("4"), reply(str(5 + n))], ["4"], image) for n in range(3)]
    out = tmp_path / "out"
    tallies = build_pairs(journal(tmp_path / "r.jsonl", rows), out)
    report = write_report(out, tallies)
    assert report["lengths"]["correctness"]["pairs"] == 3 and report["sources"]["s"]["accuracy"] == 0.5
    assert "data:image/" in (out / "report.html").read_text()
    mixture = Mixture(load_mixture(out / "meta.json"), seed=0)
    record = mixture.record(0, 0)
    assert len(record.conversations) == 2 and record.conversations[0][1].text.endswith("Final answer: 4")


def test_a_kill_leaves_no_half_file(tmp_path: Path, image: str) -> None:
    rows = [row(0, [reply("4"), reply("5")], ["4"], image), row(1, [reply("4")], [], image)]
    path = journal(tmp_path / "r.jsonl", rows)
    with pytest.raises(InputError, match=r"r\.jsonl:3: question 's/1' has no answer"):
        build_pairs(path, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["progress.jsonl"]


def test_sources_keep_their_fields() -> None:
    assert QuestionSource(name="s", questions="q", mode="choice").mode == "choice"


def test_comparisons_that_were_given_up_are_reported(tmp_path: Path, image: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [row(0, [reply("4"), reply("5")], ["4"], image), row(1, [reply("x^2+1"), reply("x^2+y")], ["x^2+z"], image)]
    path = journal(tmp_path / "r.jsonl", rows)

    def stopped(truth: str, prediction: str) -> bool:
        raise CallStopped("too long")

    monkeypatch.setattr(formulas, "verified", stopped)
    tallies = build_pairs(path, tmp_path / "out")
    assert (tallies["s"].given_up, tallies["s"].wrong) == (2, 3)
    grades = [grade for row in pairs(tmp_path / "out", "grades.jsonl") for grade in row["grades"]]
    assert [grade["problem"] for grade in grades if grade["problem"]] == [
        f"the comparison of 'x^2+z' and '{answer}' took too long" for answer in ("x^2+1", "x^2+y")
    ]
    assert write_report(tmp_path / "out", tallies)["sources"]["s"]["given_up"] == 2
    again = build_pairs(journal(tmp_path / "q.jsonl", rows[:1]), tmp_path / "again")
    assert again["s"].given_up == 0 and write_report(tmp_path / "again", again)["sources"]["s"]["given_up"] == 0


@pytest.mark.parametrize("name", ["pairs.jsonl", "format_pairs.jsonl", "grades.jsonl", "meta.json", "report.json"])
def test_the_journal_is_never_replaced_by_its_pairs(tmp_path: Path, image: str, name: str) -> None:
    out = tmp_path / "out"
    build_pairs(journal(tmp_path / "r.jsonl", [row(0, [reply("4"), reply("5")], ["4"], image)]), out)
    (out / name).unlink(missing_ok=True)
    replies = journal(out / name, [row(0, [reply("4"), reply("5")], ["4"], image)])
    (tmp_path / "link").symlink_to(replies)
    before = {path: path.read_bytes() for path in out.iterdir()}
    for given in (replies, tmp_path / "link"):
        with pytest.raises(InputError, match="would replace the journal"):
            build_pairs(given, out)
    assert {path: path.read_bytes() for path in out.iterdir()} == before


def test_rows_of_a_cut_chunk_are_left_out_and_counted(tmp_path: Path, image: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = journal(tmp_path / "r.jsonl", [row(n, [reply("4"), reply("5")], ["4"], image) for n in range(2)])
    whole = path.read_bytes()
    second = b"".join(whole.splitlines(keepends=True)[1:2])
    path.write_bytes(whole + second * 3)
    assert build_pairs(path, tmp_path / "out")["s"].questions == 2
    assert capsys.readouterr().err.count("the last 3 rows are of a chunk that was cut off; they are left out") == 1
