"""The settings of an evaluation; `ivl eval` takes its options from here."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import tyro

from ivl.errors import InputError
from ivl.evaluation.prompts import PromptName
from ivl.evaluation.scoring import AnswerStyle
from ivl.evaluation.scoring.options import Profile
from ivl.evaluation.voting import Select
from ivl.generators import GeneratorConfig
from ivl.types import SamplingParams
from ivl.utils.budgets import MAX_REPLIES
from ivl.utils.checks import check_choices

Export = Literal["tsv", "xlsx", "lmms-eval"]
Metric = Literal["exact", "relaxed", "anls", "vqa", "choice", "iou", "math", "judge"]
SAMPLED_TEMPERATURE, REASONED_TOKENS = 0.7, 1024
"""Temperature of several replies, and longest reply that reasons, where the user sets none."""
_Flag = tyro.conf.FlagCreatePairsOff


@dataclass(frozen=True, kw_only=True)
class Method:
    """How often a question is asked, and which of its replies counts. The default is one reply, scored as it is."""

    style: AnswerStyle = "direct"
    """How replies show their answer, which alone is scored: direct (the whole reply), final_answer (a last line "Final
    answer: ..."), boxed, think (tags)."""
    instruct: Annotated[bool, tyro.conf.arg(name="cot"), _Flag] = False
    """Ask the model to reason first and to close with its answer in the style, by default final_answer. A model that was
    trained to reason in this style needs no asking."""
    samples: int = 1
    """Replies to each question, of which one counts; all are saved."""
    select: Select | None = None
    """Which of several replies counts: vote (the answer that most replies give, the default), likelihood (the highest mean
    log-probability of a token) or judge (the highest rating by another model)."""
    likelihood: Annotated[bool, _Flag] = False
    """Save the log-probability of every reply, whatever selects."""

    def __post_init__(self) -> None:
        if not 1 <= self.samples <= MAX_REPLIES:
            raise InputError(f"need 1 to {MAX_REPLIES:,} replies to each question, got --samples {self.samples}")
        if self.select and self.samples == 1:
            raise InputError(f"--select {self.select} chooses among several replies: give --samples 2 or more")
        if self.samples > 1 and self.select is None:
            object.__setattr__(self, "select", "vote")
        if self.instruct and self.style == "direct":
            object.__setattr__(self, "style", "final_answer")


@dataclass(frozen=True, kw_only=True)
class JudgeConfig(GeneratorConfig):
    """The model that rates replies with --select judge, and decides about replies that the task's own rule cannot decide."""

    by: Literal["rating", "likelihood"] = "rating"
    """Ask the judge for a rating, or take the likelihood of the reply under a reward model, such as a model trained on
    preferences."""


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """What is evaluated, how, and where the results go."""

    task: str = "easy-vqa"
    """The benchmark, of which --list shows all; or FILE.py:Class, a task of your own."""
    data: Annotated[tuple[str, ...], tyro.conf.arg(metavar="PATH ...")] = ()
    """File or folder of a benchmark's rows: VLMEvalKit's TSV, tables of the hub, jsonl. By default the TSV in LMUData. With
    --metric, rows of your own as training reads them: meta JSONs, and files or folders of rows; one or several."""
    root: str | None = None
    """Folder of relative media paths in files of rows; by default the file's own, and a meta JSON has its own."""
    val_share: float = 0.0
    """Ask only the rows of --data that training with this --val-share kept for validation."""
    metric: Metric | None = None
    """Score the last turn of every row of --data against the row's own, by this metric."""
    prompt: PromptName = "published"
    """How a benchmark asks: as the published scores were measured, as the authors' own code does (reference), without a request
    (plain), with the request to reason (cot), or as models trained by MPO are asked (mpo)."""
    extraction: Profile = "2024-12"
    """The rules that read a reply: those of the published scores, or the later ones of the same tool."""
    defects: Annotated[bool, _Flag] = False
    """Repeat known defects of a benchmark's official tool, which its file in ivl/evaluation/tasks names."""
    frames: int | None = None
    """Frames of each video that are shown, where a benchmark has videos; None takes the benchmark's."""
    limit: int | None = None
    """Ask only this many examples, the first ones; those that depend on one another stay together."""
    out: Path | None = None
    """The report (task, metric, value, ci95, n, by_type, model, versions) as a JSON file."""
    predictions: Path | None = None
    """The file of predictions; by default beside --out, or under runs/eval."""
    export: Export | None = None
    """Write the files of another tool too: VLMEvalKit's predictions as tsv or xlsx, or lmms-eval's results and samples."""
    export_to: Path = Path("outputs")
    """The folder of these files."""
    fresh: Annotated[bool, _Flag] = False
    """Forget the predictions of an earlier run."""
    batch_size: int = 512
    """Most questions that are answered and saved at a time; fewer while the model is slow."""
    method: Annotated[Method, tyro.conf.arg(name="")] = Method()
    sampling: Annotated[SamplingParams | None, tyro.conf.arg(name="")] = None
    """None takes the task's, with temperature 0.7 for several replies and 1,024 tokens for replies that reason."""
    judge: JudgeConfig = JudgeConfig()
    undecided: Literal["range", "wrong"] = "range"
    """What replies count that neither the task's rule nor a judge decides: the score as a range, from all of them wrong to all
    of them right, or wrong."""

    def __post_init__(self) -> None:
        if (self.limit is not None and self.limit < 1) or self.batch_size < 1:
            raise InputError(f"--limit and --batch-size must be at least 1, got {self.limit} and {self.batch_size}")
        check_choices(self)
        if not 0 <= self.val_share < 1 or (not self.metric and (self.val_share or self.root is not None or self.data[1:])):
            raise InputError(f"--val-share in [0, 1), --root and several names of --data need --metric; got {self.val_share}")
        if self.metric and not self.data:
            raise InputError("--metric scores rows of your own: name their file with --data")
        if self.judge.url and not self.judge.url_model:
            raise InputError("--judge.url needs --judge.url-model, the name of the judge at the endpoint")
        if self.judge.by == "likelihood" and self.method.select != "judge":
            raise InputError("--judge.by likelihood is for --select judge")
        if self.judge.by == "likelihood" and not self.judge.model:
            raise InputError("--judge.by likelihood needs --judge.model: an endpoint gives no likelihood of a given reply")
        if self.sampling is not None and self.method.samples > 1 and self.sampling.temperature == 0:
            raise InputError(f"at temperature 0 all {self.method.samples} replies are the same: raise --temperature")

    def sampling_for(self, params: SamplingParams) -> SamplingParams:
        """Return the sampling parameters of the run, where the task's are `params`."""
        if self.sampling is not None:
            return self.sampling
        if self.method.samples > 1 and params.temperature == 0:
            params = replace(params, temperature=SAMPLED_TEMPERATURE, seed=0)
        return params if self.method.style == "direct" else replace(params, max_new_tokens=REASONED_TOKENS)

    @property
    def task_name(self) -> str:
        """The task's name as a part of file names: that of rows of one's own is their file's, or a meta.json's folder's."""
        paths = [Path(name).absolute() for name in self.data]
        own = "+".join(path.parent.name if path.name == "meta.json" else path.stem for path in paths)[:100]
        return own if self.metric else self.task.rpartition(":")[2]

    def predictions_of(self, model: str) -> Path:
        """Return the file of the predictions of a model of this name."""
        if self.predictions:
            return self.predictions
        return self.out.with_suffix(".predictions.jsonl") if self.out else Path("runs/eval") / f"{model}-{self.task_name}.jsonl"
