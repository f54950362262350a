"""One training run from a configuration: build the parts, train, write the final model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ivl.processing.processor import Processor
from ivl.runs.build import (
    adapt,
    build_loader,
    build_model,
    build_processor,
    build_run_objective,
    build_validation,
    place,
)
from ivl.runs.config import RunConfig
from ivl.runs.directory import (
    open_directory,
    record_data,
    record_environment,
    restore_trainable,
    write_checkpoint_model,
    write_final_model,
)
from ivl.train.loop import Evaluator, train
from ivl.train.objectives import StatefulObjective
from ivl.train.recorder import Recorder
from ivl.train.stage import check_start
from ivl.train.state import CheckpointWriter, load_trainer
from ivl.train.world import World, start_world, stop_world

MakeEvaluators = Callable[[Processor], tuple[Evaluator, ...]]


def run(
    config: RunConfig,
    *,
    evaluators: MakeEvaluators | None = None,
    resume: bool = False,
    allow_changed: bool = False,
) -> Path:
    """Train and return the directory of the final model, run_dir/model.

    run_dir also gets run.json (the whole configuration), environment.json, data_report.json, metrics.jsonl, checkpoints
    and, with LoRA, adapter/ in PEFT's format; model/ is then the merged model.

    Args:
        config: the run.
        evaluators: given the processor, small evaluations to run during training.
        resume: go on from the newest complete checkpoint of run_dir, or from the start if there is none yet. As many ranks as
            wrote it go on exactly; with another number every sample of the epoch still comes exactly once, in other packs.
        allow_changed: resume although the configuration differs from the one that the run began with.

    Raises:
        InputError: for a configuration, model or data that do not fit; if run_dir holds a run and resume is off.
    """
    world = start_world(config.device)
    try:
        checkpoint = open_directory(config, world, resume=resume, allow_changed=allow_changed)
        _train_in(config, world, checkpoint, evaluators)
        return Path(config.run_dir) / "model"
    finally:
        stop_world(world)


def _train_in(config: RunConfig, world: World, checkpoint: Path | None, make_evaluators: MakeEvaluators | None) -> None:
    """Train from the checkpoint, or from the start, and write the final model."""
    run_dir = Path(config.run_dir)
    model = build_model(config, checkpoint)
    processor = build_processor(config, model)
    adapt(model, config)
    if checkpoint is not None and config.lora is not None:
        restore_trainable(model, checkpoint)
    check_start(model)
    place(model, config, world)
    objective = build_run_objective(config, processor, run_dir, world, resumed=checkpoint is not None)
    if isinstance(objective, StatefulObjective):
        objective.prepare(model)
    loader = build_loader(config.data, processor, config, world)
    record_environment(run_dir, loader, world)
    validation = build_validation(config, processor, objective, world)
    own = make_evaluators(processor) if make_evaluators else ()
    saved = load_trainer(checkpoint) if checkpoint is not None else None
    recorder = Recorder(
        config.name, config.train, directory=run_dir, step=saved.step if saved else 0,
        budgets=(config.data.max_tokens, config.data.max_tiles), on=world.is_main,
    )  # fmt: skip
    train(
        model, loader, config.train, objective=objective, evaluators=(validation, *own) if validation else own,
        recorder=recorder, resume=saved, num_samples=loader.num_samples, world=world,
        checkpoints=CheckpointWriter(
            run_dir, lambda directory: write_checkpoint_model(model, processor, config, directory, world), world,
            config.train.keep_last,
        ),
    )  # fmt: skip
    record_data(run_dir, loader, world)
    write_final_model(model, processor, config, world)
    world.barrier()
