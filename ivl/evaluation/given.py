"""Replies that another tool has written: VLMEvalKit's predictions and lmms-eval's samples, scored like those of a model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from ivl.errors import InputError
from ivl.evaluation.benchmark import Benchmark
from ivl.evaluation.config import EvalConfig
from ivl.evaluation.data import md5
from ivl.evaluation.tasks import TASKS, task_of
from ivl.types import Conversation, SamplingParams, TextDelta


def given_task(path: Path, config: EvalConfig) -> Benchmark:
    """Return the benchmark that takes questions and replies from a file.

    It is the one that the configuration names, or else the one whose file's name ends the name of this file, `MODEL_NAME.tsv`
    or `..._samples_TASK.jsonl`.

    Raises:
        InputError: if no task fits.
    """
    if config.data or config.metric:
        raise InputError("--score takes questions and replies from its own file; leave out --data and --metric")
    if not path.is_file():
        raise InputError(f"{path}: no such file of predictions")
    benchmarks = {name: task for name, task in TASKS.items() if isinstance(task, Benchmark)}
    if config.task not in benchmarks:
        endings = {
            name: (f"_{task.file}", f"_samples_{name}", f"_samples_{task.file.lower()}") for name, task in benchmarks.items()
        }
        fits = [name for name, ends in endings.items() if path.stem.endswith(ends)]
        if not fits:
            raise InputError(f"{path}: its name tells no benchmark of `ivl eval --list`; name it with --task")
        config = replace(config, task=max(fits, key=lambda name: len(benchmarks[name].file)))
    task = task_of(replace(config, data=path))
    assert isinstance(task, Benchmark), "it is one of the benchmarks"
    return replace(task, given=True)


def model_of(path: Path, task: Benchmark) -> str:
    """Return the model's name: what stands before the benchmark in a name of VLMEvalKit, and the folder of samples."""
    if "_samples_" in path.stem:
        return path.absolute().parent.name.rpartition("__")[2]
    return path.stem.removesuffix(f"_{task.file}")


class Given:
    """Gives the reply that comes as the last message."""

    def __init__(self, path: Path) -> None:
        self.fingerprint = f"replies of {md5(path)}"

    def stream(self, prompt: Conversation, params: SamplingParams) -> Iterator[TextDelta]:
        """Yield the last message."""
        del params
        yield TextDelta(prompt[-1].text, finish_reason="stop")
