"""`ivl prefer sample`, `pairs` and `dropout`: from questions to preference pairs."""

from __future__ import annotations

import shlex
from dataclasses import asdict, dataclass, field
from pathlib import Path

import tyro

from ivl.cli.options import run_subcommand
from ivl.cli.options_file import as_arguments
from ivl.errors import InputError
from ivl.evaluation.scoring import AnswerMode, AnswerStyle
from ivl.generators import GeneratorConfig, connect
from ivl.preference.pairs import PairsConfig, build_pairs, why_none
from ivl.preference.questions import QuestionSource, load_sources, read_questions
from ivl.preference.report import write_report
from ivl.preference.sampling import SAMPLED, DropoutConfig, SamplingConfig, continue_without_images, sample
from ivl.utils.jsonl import read_journal
from ivl.utils.progress import reporting
from ivl.utils.terminal import printable

Input = tyro.conf.Positional[Path]


@dataclass(frozen=True, kw_only=True)
class PreferSampleOptions:
    """Ask every question many times. The same command goes on where an interrupted one stopped."""

    questions: Input
    """A .jsonl file of questions, or a JSON object of sources (docs/preference.md)."""
    out: Input
    """Journal of replies to write, a .jsonl file."""
    style: AnswerStyle | None = None
    """How replies are asked to show their answer, where the sources do not say it: final_answer, boxed, think, or direct."""
    mode: AnswerMode | None = None
    """How answers are compared, where the sources do not say it (docs/preference.md)."""
    generator: GeneratorConfig = field(default_factory=GeneratorConfig)
    config: SamplingConfig = field(default_factory=SamplingConfig)

    def run(self) -> None:
        """Run `ivl prefer sample`."""
        given = {"style": self.style, "mode": self.mode}
        sources = load_sources(self.questions, **{key: value for key, value in given.items() if value})
        total = sum(1 for _ in read_questions(sources))
        generator, name = connect(self.generator)
        with reporting("sampling", "questions") as show:
            sample(generator, sources, self.out, model=name, config=self.config,
                   on_progress=lambda done, resumed: show(done, total, resumed=resumed))  # fmt: skip
        print(f"{total:,} questions x {self.config.num_replies} replies: {self.out}\n{_next_pairs(self.out)}")


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
            continue_without_images(generator, self.replies, self.out, model=name, config=self.config,
                                    on_progress=lambda done, resumed: show(done, total, resumed=resumed))  # fmt: skip
        print(f"continuations: {self.out}\n{_next_pairs(self.out)}")


@dataclass(frozen=True, kw_only=True)
class PairsOptions:
    """Check the replies of a journal and write preference pairs, a report page and a mixture for `ivl train`."""

    replies: Input
    """Journal of `ivl prefer sample` or `ivl prefer dropout`."""
    out: Input
    """Directory for pairs.jsonl, format_pairs.jsonl, grades.jsonl, meta.json, report.json and report.html."""
    config: PairsConfig = field(default_factory=PairsConfig)

    def run(self) -> None:
        """Run `ivl prefer pairs`."""
        with reporting("pairs", "questions") as show:
            tallies = build_pairs(self.replies, self.out, self.config, on_progress=show)
        write_report(self.out, tallies, seed=self.config.seed)
        for name, tally in tallies.items():
            pairs = ", ".join(f"{count:,} {kind} pairs" for kind, count in sorted(tally.pairs.items()))
            pairs = pairs or f"no pairs: {why_none(tally)}"
            print(f"{printable(name)}: {tally.questions:,} questions, {tally.accuracy:.1%} of replies correct, {pairs}")
            for reason, count in (tally.malformed + tally.left_out).most_common() if tally.pairs else ():
                print(f"  not used: {count:,} {reason}")
        print(f"report: {self.out / 'report.html'}")
        if not any(tally.pairs for tally in tallies.values()):
            if any(0 < tally.replies == tally.malformed.total() for tally in tallies.values()):
                print(f"next: {_sample_directly(self.replies)}")
            raise InputError(f"{self.replies}: no pairs; the lines above say why")
        asked = str(read_journal(self.replies)[0].get("model", "")).rpartition(" ")[0]  # behind it is a fingerprint
        model = shlex.quote(asked) if Path(asked).is_dir() else "MODEL"
        print(f"next: ivl train mpo --model {model} --data {shlex.quote(str(self.out / 'meta.json'))}")


def _next_pairs(journal: Path) -> str:
    return f"next: ivl prefer pairs {shlex.quote(str(journal))} {shlex.quote(str(journal.with_suffix('')) + '-pairs')}"


def _sample_directly(replies: Path) -> str:
    """Return the command that asks the questions of a journal again, for the answer alone."""
    about = {"model": "MODEL ", "params": {}, **read_journal(replies)[0]}
    first, *others = (QuestionSource(**entry) for entry in about["sources"])
    alone = QuestionSource(name=Path(first.questions).stem, questions=first.questions, style=first.style, mode=first.mode)
    questions, mode = (first.questions, first.mode) if [first, *others] == [alone] else ("SOURCES.json", "auto")
    model, _, name = about["model"].rpartition(" ")  # the name at an endpoint, or a fingerprint
    options = {"style": "direct", **({"url": model, "url_model": name} if "://" in model else {"model": model})}
    usual = {**asdict(SAMPLED), **asdict(SamplingConfig()), "seed": 0, "mode": "auto"}
    given = {**about["params"], **{key: about.get(key) for key in ("num_replies", "seed")}, "mode": mode}
    options |= {key: value for key, value in given.items() if value not in (None, [], usual.get(key))}
    command = ["ivl", "prefer", "sample", questions, f"{replies.with_suffix('')}-direct.jsonl"]
    return shlex.join([*command, *as_arguments(options, ())])


COMMANDS = {"sample": PreferSampleOptions, "pairs": PairsOptions, "dropout": DropoutOptions}


def main(args: list[str]) -> None:
    """Run the command."""
    run_subcommand(COMMANDS, "prefer", args, config=(tyro.conf.OmitArgPrefixes, tyro.conf.AvoidSubcommands)).run()
