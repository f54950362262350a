"""`ivl prefer sample`, `pairs` and `dropout`: from questions to preference pairs."""

from __future__ import annotations

import shlex
from dataclasses import asdict, dataclass, field
from pathlib import Path

import tyro

from ivl.cli.options import run_subcommand
from ivl.errors import InputError
from ivl.evaluation.scoring import AnswerMode, AnswerStyle, mode_for
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
            sample(
                generator, sources, self.out, model=name, config=self.config,
                on_progress=lambda done, resumed: show(done, total, resumed=resumed),
            )  # fmt: skip
        print(f"{total:,} questions x {self.config.num_replies} replies: {self.out}")
        print(_next_pairs(self.out))


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
        print(_next_pairs(self.out))


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
            if any(tally.wants_direct for tally in tallies.values()):
                print(f"next: {_sample_directly(self.replies)}")
            raise InputError(f"{self.replies}: no pairs; the lines above say why")
        asked = str(read_journal(self.replies)[0].get("model", "")).rpartition(" ")[0]  # behind it is a fingerprint
        model = shlex.quote(asked) if Path(asked).is_dir() else "MODEL"
        print(f"next: ivl train mpo --model {model} --data {shlex.quote(str(self.out / 'meta.json'))}")


def _next_pairs(journal: Path) -> str:
    return f"next: ivl prefer pairs {shlex.quote(str(journal))} {shlex.quote(str(journal.with_suffix('')) + '-pairs')}"


def _sample_directly(replies: Path) -> str:
    """Return the command that asks the questions of a journal again, for the answer alone."""
    about = read_journal(replies)[0]
    first, *others = (QuestionSource(**entry) for entry in about["sources"])
    name, questions, note = Path(first.questions).stem, first.questions, ""
    if others or first != QuestionSource(name=name, questions=questions, style=first.style, mode=first.mode):
        questions, note = "SOURCES.json", '     (leave "style" out of SOURCES.json)'
    words = ["ivl", "prefer", "sample", questions, str(replies.with_name(f"{replies.stem}-direct.jsonl")), "--style", "direct"]
    model, _, end = str(about.get("model", "MODEL ")).rpartition(" ")  # the name at an endpoint, or a fingerprint
    words += ["--url", model, "--url-model", end] if "://" in model else ["--model", model]
    words += ["--mode", first.mode] if not note and first.mode != mode_for(name) else []
    usual = {**asdict(SamplingConfig()), **asdict(SAMPLED), "seed": 0}
    given = {**about.get("params", {}), **{key: about[key] for key in ("seed", "num_replies") if key in about}}
    for key, value in given.items():
        if value not in (None, [], usual[key]):
            words += [f"--{key.replace('_', '-')}", *map(str, value if isinstance(value, list) else [value])]
    return shlex.join(words) + note


COMMANDS = {"sample": PreferSampleOptions, "pairs": PairsOptions, "dropout": DropoutOptions}


def main(args: list[str]) -> None:
    """Run the command."""
    try:
        options = run_subcommand(COMMANDS, "prefer", args, config=(tyro.conf.OmitArgPrefixes, tyro.conf.AvoidSubcommands))
    except ValueError as error:  # sampling parameters that make no sense
        raise error if isinstance(error, InputError) else InputError(str(error)) from error
    options.run()
