"""One training run from a configuration: build the parts, train, write the final model."""

from __future__ import annotations

import shlex
import signal
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

from safetensors import SafetensorError

from ivl.data.encode import NO_PAIR, PAIR
from ivl.data.loader import Loader
from ivl.errors import DataError, InputError
from ivl.parallel.launch import Watchdog, start_world, stop_world
from ivl.processing.processor import Processor
from ivl.runs.best import BestModel
from ivl.runs.build import (
    build_curves,
    build_loader,
    build_model,
    build_processor,
    build_run_objective,
    build_validation,
    with_precision,
)
from ivl.runs.config import RunConfig, to_json
from ivl.runs.directory import (
    RunStart,
    begin,
    checkpoint_writer,
    open_directory,
    read_trainer,
    record_data,
    record_environment,
    write_best_model,
    write_final_model,
)
from ivl.runs.outcome import draw, read_metrics, validation_losses
from ivl.train.loop import Evaluator, StoppedError, train
from ivl.train.objectives import StatefulObjective
from ivl.train.recorder import Recorder
from ivl.train.state import SavedTrainer, checkpoints, step_of
from ivl.train.world import World, is_of_group
from ivl.utils.metrics import TensorBoardLogger, TrackerLogger, import_tracker
from ivl.utils.signals import Interruption

MakeEvaluators = Callable[[Processor], tuple[Evaluator, ...]]


def run(
    config: RunConfig, *, evaluators: MakeEvaluators | None = None, resume: bool = False, allow_changed: bool = False
) -> Path:
    """Train and return the directory of the final model, run_dir/model.

    run_dir also gets run.json (the whole configuration), environment.json, data_report.json, metrics.jsonl, checkpoints,
    loss.png where matplotlib is installed, best/ where it is kept and, with LoRA, adapter/ in PEFT's format; model/ is then the
    merged model.

    Args:
        config: the run.
        evaluators: given the processor, small evaluations to run during training.
        resume: go on from the newest complete checkpoint of run_dir, or from the start if there is none yet. As many ranks as
            wrote it go on exactly; with another number every sample of the epoch still comes exactly once, in other packs.
        allow_changed: resume although the configuration differs from the one that the run began with.

    Raises:
        InputError: for a configuration, model or data that do not fit; if run_dir holds a run and resume is off.
    """
    run_dir, world = Path(config.run_dir), start_world(config.device, Path(config.run_dir))
    config = with_precision(config, world.device)
    try:
        world = world.arranged(replicate=config.replicate, tensor=config.tensor_parallel)
        with open_directory(config, world, resume=resume, allow_changed=allow_changed) as start:
            _train_in(config, world, start, evaluators, allow_changed=allow_changed)
        return run_dir / "model"
    except (OSError, SafetensorError) as error:
        place = getattr(error, "filename", None) or run_dir
        raise InputError(f"{place}: {getattr(error, 'strerror', None) or error}") from error
    except RuntimeError as error:
        if world.size > 1 and is_of_group(error):
            raise world.lost(error) from error
        raise
    finally:
        stop_world(world)


def _train_in(
    config: RunConfig, world: World, start: RunStart, make_evaluators: MakeEvaluators | None, *, allow_changed: bool
) -> None:
    """Train from the checkpoint, or from the start, and write the final model."""
    run_dir, checkpoint = Path(config.run_dir), start.checkpoint
    for package in config.train.log_to:
        import_tracker(package)
    model = build_model(config, checkpoint, world)
    processor = build_processor(config, model)
    objective = build_run_objective(config, processor, run_dir, world, resumed=checkpoint is not None)
    loader = build_loader(config.data, processor, config, world)
    validation = build_validation(config, processor, objective, world)
    saved = read_trainer(checkpoint) if checkpoint is not None else None
    if saved is not None and allow_changed:
        accept_rows(saved, loader)
    step = saved.step if saved else 0
    earlier = world.from_first(lambda: validation_losses(read_metrics(run_dir), step))
    best = BestModel(config, lambda: write_best_model(model, processor, config, world), earlier)
    begin(config, start, world)
    world.barrier()
    if isinstance(objective, StatefulObjective):
        objective.prepare(model)
    record_environment(run_dir, loader, world, step)
    own = (*build_curves(config, processor, model, world), *(make_evaluators(processor) if make_evaluators else ()))
    if validation is not None:
        own = (best.watch(validation), *own)
    budgets = config.data.max_tokens, config.data.max_tiles
    recorder = Recorder(
        config.name, config.train, directory=run_dir, step=step, budgets=budgets, epoch_samples=len(loader.mixture),
        boards=open_boards(config, step) if world.is_main else (), on=world.is_main,
    )  # fmt: skip
    interruption = Interruption("stops after this step; a second signal ends it at once")
    with interruption:  # it does not keep the final model from being written
        try:
            with (
                closing(Watchdog(world, run_dir)) as watch, checkpoint_writer(model, processor, config, world) as writer,
            ):  # fmt: skip
                history = [] if best.is_over else train(
                    model, loader, config.train, objective=objective, evaluators=own, recorder=recorder, resume=saved,
                    num_samples=loader.num_samples, world=world, checkpoints=writer, stop=interruption, watch=watch,
                )  # fmt: skip
            if best.is_over and not history:
                recorder.close()
        except BaseException as error:
            if world.is_main:
                say_how_to_go_on(run_dir, error)
            if isinstance(error, StoppedError):
                number = interruption.signal or signal.SIGTERM  # of this rank, or of another
                raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number) from None
            raise
        record_data(run_dir, loader, world)
        if history or not start.finished:
            write_final_model(model, processor, config, world)
        if world.is_main:
            draw(run_dir, config.name)
    world.barrier()


def open_boards(config: RunConfig, step: int) -> list[TensorBoardLogger | TrackerLogger]:
    """Open TensorBoard and the trackers that a run has; `step` steps were done before."""
    run_dir, train = Path(config.run_dir), config.train
    boards = [TensorBoardLogger(run_dir / "tensorboard", step)] if train.tensorboard else []
    return [*boards, *(TrackerLogger(name, config.name, run_dir, to_json(config)) for name in train.log_to)]


def accept_rows(saved: SavedTrainer, loader: Loader) -> None:
    """Let a position count for rows whose content has changed, if they are as many as before."""
    now = loader.mixture.fingerprint()
    for position in saved.positions:
        before = position.get("mixture")
        if isinstance(before, list) and [each[:2] for each in before] == [each[:2] for each in now]:
            position["mixture"] = now


def say_how_to_go_on(run_dir: Path, error: BaseException) -> None:
    """Print the step of the newest checkpoint, and the command that goes on from it."""
    one_bad_row = isinstance(error, DataError) and error.problem not in (PAIR, NO_PAIR)  # those are about all rows
    skip = " --data.on-error skip" if one_bad_row else ""
    command = f"ivl train --resume {shlex.quote(str(run_dir))}{skip}"
    if saved := checkpoints(run_dir):
        print(f"stopped at step {step_of(saved[-1])}; go on with: {command}", file=sys.stderr)
    else:
        print(f"stopped before the first checkpoint; start again with: {command}", file=sys.stderr)
