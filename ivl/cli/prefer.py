"""`ivl prefer sample`, `pairs` and `dropout`: from questions to preference pairs."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import tyro

from ivl.errors import InputError
from ivl.generators import GeneratorConfig, connect
from ivl.preference.questions import load_sources, read_questions
from ivl.preference.sampling import DropoutConfig, SamplingConfig, continue_without_images, sample
from ivl.utils.jsonl import read_journal
from ivl.utils.progress import reporting

Input = tyro.conf.Positional[Path]


@dataclass(frozen=True, kw_only=True)
class PreferSampleOptions:
    """Ask every question many times. The same command goes on where an interrupted one stopped."""

    questions: Input
    """A .jsonl file of questions, or a JSON object of sources (docs/preference.md)."""
    out: Input
    """Journal of replies to write, a .jsonl file."""
    generator: GeneratorConfig = field(default_factory=GeneratorConfig)
    config: SamplingConfig = field(default_factory=SamplingConfig)

    def run(self) -> None:
        """Run `ivl prefer sample`."""
        sources = load_sources(self.questions)
        total = sum(1 for _ in read_questions(sources))
        generator, name = connect(self.generator)
        with reporting("sampling", "questions") as show:
            sample(
                generator, sources, self.out, model=name, config=self.config,
                on_progress=lambda done, resumed: show(done, total, resumed=resumed),
            )  # fmt: skip
        print(f"{total:,} questions x {self.config.num_replies} replies: {self.out}")


@dataclass(frozen=True, kw_only=True)
class DropoutOptions:
    """Dropout-NTP: continue the first part of each reply without the image.

    An endpoint must continue an unfinished reply of the assistant; most do not, so a local model is the safe choice.
    """

    replies: Input
    """Journal of `ivl prefer sample`."""
    out: Input
    """Journal of continuations to write."""
    generator: GeneratorConfig = field(default_factory=GeneratorConfig)
    config: DropoutConfig = field(default_factory=DropoutConfig)

    def run(self) -> None:
        """Run `ivl prefer dropout`."""
        total = self.config.per_question * sum(1 for _ in read_journal(self.replies)[1])
        generator, name = connect(self.generator)
        with reporting("continuing", "replies") as show:
            continue_without_images(
                generator, self.replies, self.out, model=name, config=self.config,
                on_progress=lambda done, resumed: show(done, total, resumed=resumed),
            )  # fmt: skip
        print(f"continuations: {self.out}")


@dataclass(frozen=True, kw_only=True)
class PairsOptions:
    """Check the replies of a journal and write preference pairs, a report page and a mixture for `ivl train`."""

    replies: Input
    """Journal of `ivl prefer sample` or `ivl prefer dropout`."""
    out: Input
    """Directory for pairs.jsonl, format_pairs.jsonl, grades.jsonl, meta.json, report.json and report.html."""
    limit: int | None = None
    """Most pairs of a question and kind; by default 15, or 3 where there are more than 500,000 questions."""
    seed: int = 0
    """Chooses among possible pairs."""

    def run(self) -> None:
        """Run `ivl prefer pairs`."""
        from ivl.preference.pairs import build_pairs
        from ivl.preference.report import write_report

        with reporting("pairs", "questions") as show:
            tallies = build_pairs(self.replies, self.out, limit=self.limit, seed=self.seed, on_progress=show)
        write_report(self.out, tallies, seed=self.seed)
        for name, tally in tallies.items():
            pairs = ", ".join(f"{count:,} {kind} pairs" for kind, count in sorted(tally.pairs.items())) or "no pairs"
            print(f"{name}: {tally.questions:,} questions, {tally.accuracy:.1%} of replies correct, {pairs}")
        mixture = self.out / "meta.json"
        print(f"report: {self.out / 'report.html'}\ntrain:  ivl train 1B-mpo --model MODEL --data.mixture {mixture}")


def main(args: list[str]) -> None:
    """Run the command."""
    commands = {"sample": PreferSampleOptions, "pairs": PairsOptions, "dropout": DropoutOptions}
    config = (tyro.conf.OmitArgPrefixes, tyro.conf.AvoidSubcommands)
    try:
        options = tyro.extras.subcommand_cli_from_dict(commands, prog="ivl prefer", args=args, config=config)
    except ValueError as error:  # sampling parameters that make no sense
        raise error if isinstance(error, InputError) else InputError(str(error)) from error
    options.run()
