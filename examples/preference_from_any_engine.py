"""Preference pairs from any engine: whatever has `generate(conversations, params)` can answer; here a made-up one does.

python examples/preference_from_any_engine.py
"""

import json
import random
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from ivl.preference.pairs import PairsConfig, build_pairs
from ivl.preference.questions import load_sources
from ivl.preference.report import write_report
from ivl.preference.sampling import SamplingConfig, sample
from ivl.types import SamplingParams

OUT = Path("runs/preference-example")


@dataclass
class Reply:
    text: str
    finish_reason: str = "stop"


class Guesser:
    """Counts to three, and is often wrong."""

    def generate(self, conversations, params):
        guesses = [random.Random(each.seed).randint(1, 4) for each in params]
        return [Reply(f"I see shapes.\nI count them.\nFinal answer: {guess}") for guess in guesses]


def main() -> None:
    OUT.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (64, 64), "teal").save(OUT / "picture.png")
    rows = [{"id": n, "image": "picture.png", "question": "how many shapes are there?", "answer": "3"} for n in range(4)]
    (OUT / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sources = load_sources(OUT / "questions.jsonl", style="final_answer")
    config = SamplingConfig(num_replies=8, params=SamplingParams(temperature=1.0, max_new_tokens=64))
    replies = sample(Guesser(), sources, OUT / "replies.jsonl", model="guesser", config=config)
    tallies = build_pairs(replies, OUT / "pairs", PairsConfig(limit=5))
    write_report(OUT / "pairs", tallies)
    [tally] = tallies.values()
    print(f"{tally.accuracy:.0%} of {tally.replies} replies are right; {tally.pairs['correctness']} pairs; see {OUT}/pairs")
    pair = json.loads((OUT / "pairs" / "pairs.jsonl").read_text().splitlines()[0])
    print(pair["chosen"][-15:], "is chosen over", pair["rejected"][-15:])


if __name__ == "__main__":
    main()
