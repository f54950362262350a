"""The configuration of a whole run. No torch here, so that `ivl train --help` is quick."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from ivl.config import LoraConfig, ModelConfig
from ivl.data.config import DataConfig
from ivl.errors import InputError, short
from ivl.train.config import ObjectiveConfig, Stage, TrainConfig
from ivl.utils.checks import check_choices, check_ranges
from ivl.utils.imports import import_object
from ivl.utils.strict_json import from_json


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One complete training run. A recipe is a function that returns one; later stages derive with dataclasses.replace."""

    name: str
    """Name of the run and, unless out_dir is given, of its directory runs/NAME."""
    out_dir: str = ""
    """Directory of checkpoints, metrics and the final model; empty is runs/NAME."""
    model: str = ""
    """Model to start from: a directory or a hub id. Empty starts from random weights of `architecture`."""
    architecture: ModelConfig | None = None
    """Needed for a random start and for planning without the weights; a loaded model must agree with it."""
    tokenizer: str = ""
    """Directory of the tokenizer; empty takes the model's own."""
    stage: Stage
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    """The loss, named by its import path, and its settings."""
    lora: LoraConfig | None = None
    """Train low-rank adapters on frozen layers, in addition to the stage's trainable parts."""
    data: DataConfig
    train: Annotated[TrainConfig, tyro.conf.arg(name="")] = field(default_factory=TrainConfig)
    """Steps, optimizer, precision, checkpoints and logs."""
    val_data: DataConfig | None = None
    """Data set of the validation loss; None takes the rows that data.val_share keeps, if it does."""
    val_every: int = 0
    """Steps between validation losses; 0 computes one at the end."""
    val_packs: int = 0
    """Packs of each validation loss; 0 takes all."""
    keep_best: bool = False
    """Keep the model of the lowest validation loss as best/ (with LoRA its adapter), beside the last one."""
    patience: int = 0
    """End when the validation loss has not fallen so many times in a row; 0 never does."""
    eval_tasks: tuple[str, ...] = ()
    """Tasks of `ivl eval` that are asked during training: names, or FILE.py:Class."""
    eval_every: int = 0
    """Steps between these evaluations; 0 evaluates at the end."""
    eval_limit: int = 200
    """Questions of each task, the first ones."""
    shard: bool = False
    """Shard parameters, gradients and optimizer state over ranks (FSDP2) instead of keeping a copy on each."""
    replicate: int = 1
    """Copies of a sharded model, each over ranks of its own (HSDP): shards are gathered within a copy, gradients summed over
    all. One node may hold a copy."""
    tensor_parallel: int = 1
    """Neighboring ranks that share the heads, MLPs and vocabulary of one decoder, and the tiles of a pack."""
    device: str = "auto"
    """Where the run computes: cpu, cuda, or auto, a GPU when there is one. Several GPUs take a process each, by torchrun."""
    save_dtype: Literal["float32", "bfloat16"] | None = None
    """Type of the final model's weights; None keeps that of the parameters."""

    def __post_init__(self) -> None:
        check_choices(self)
        if self.device not in ("auto", "cpu", "cuda"):
            remedy = "torchrun --nproc-per-node N trains on N cards, CUDA_VISIBLE_DEVICES says on which"
            raise InputError(f"device must be auto, cpu or cuda, got {self.device!r}; {remedy}")
        if self.val_data is None and self.data.val_share:
            kept = dataclasses.replace(self.data, validation=True, epochs=1)
            object.__setattr__(self, "val_data", kept)
        if not self.model and self.architecture is None:
            raise InputError("give `model` (a directory or hub id) or `architecture` (to start from random weights)")
        if self.lora is None and not self.stage.trainable:
            raise InputError("nothing would train: name trainable parts in `stage`, or give `lora`")
        if self.lora is not None:
            both = [target for target in self.lora.targets if target.split(".")[0] in self.stage.trainable]
            if both:
                raise InputError(f"LoRA targets {both} lie in parts that the stage trains whole; choose one of the two")
        if self.shard and self.train.optim.name == "muon":
            raise InputError("muon needs whole matrices: use adamw, or shard = False")
        if self.train.num_steps is None and self.data.epochs is None:
            raise InputError("the run has no end: give num_steps or data.epochs")
        check_ranges(
            self, val_every="[0, inf)", val_packs="[0, inf)", patience="[0, inf)", eval_every="[0, inf)", eval_limit="[1, inf)",
            replicate="[1, inf)", tensor_parallel="[1, inf)",
        )  # fmt: skip
        if self.replicate > 1 and not self.shard:
            raise InputError(f"replicate {self.replicate} makes copies of a sharded model: give shard = True, too")
        whole = {
            "LoRA": (self.lora is not None, "tensor_parallel = 1, with shard = True"),
            "muon": (self.train.optim.name == "muon", "adamw, or tensor_parallel = 1 without shard"),
            "compile": (self.train.compile, "compile = False, or tensor_parallel = 1 with shard = True"),
        }
        if self.tensor_parallel > 1 and (names := [name for name, (used, _) in whole.items() if used]):
            raise InputError(f"{names[0]} needs whole layers on each rank: take {whole[names[0]][1]}")
        self.objective.check(self.data, self.stage, self.lora)

    @property
    def run_dir(self) -> str:
        """The directory of the run."""
        return self.out_dir or f"runs/{self.name}"


def to_json(config: RunConfig) -> dict[str, Any]:
    """The configuration as plain JSON values."""
    return dataclasses.asdict(config)


PATHS = (
    "model", "tokenizer", "data.mixture", "data.root", "val_data.mixture", "val_data.root", "objective.path",
    "objective.reference_dir", "eval_tasks",
)  # fmt: skip
"""Options that may name files."""


def _as_reached(values: dict[str, Any], where: str) -> dict[str, Any]:
    """The values of a run.json with `folder`, that of the run's start as it is reached from the run's directory, taken out.

    Where that is another folder than the present one, relative paths that lie in it are rewritten.
    """
    rest = dict(values)
    told = rest.pop("folder", str(Path.cwd()))
    if not isinstance(told, str) or "\0" in told:
        raise InputError(f"{where}: folder must be a path, got {short(told)}")
    folder = Path(where).parent / told

    def reached(value: Any) -> Any:
        if isinstance(value, list | tuple):
            return [reached(each) for each in value]
        if not isinstance(value, str) or not value:
            return value
        path = value.rpartition(":")[0] if ".py:" in value else value  # FILE.py:NAME
        return os.path.normpath(folder / value) if os.path.exists(folder / path) else value  # noqa: PTH110, never raises

    for group, _, name in (path.rpartition(".") for path in PATHS if os.path.realpath(folder) != str(Path.cwd())):
        part = rest.get(group) if group else rest
        if isinstance(part, dict) and name in part:
            changed = {**part, name: reached(part[name])}
            rest = {**rest, group: changed} if group else changed
    return rest


def run_config(values: Any, where: str) -> RunConfig:
    """The configuration from JSON values, the inverse of to_json. The objective's import path says which settings it has.

    Args:
        values: a JSON object.
        where: its place, such as `runs/NAME/run.json`; errors start with it.

    Raises:
        InputError: for an unknown key, with the nearest known one, or a value that the configuration refuses.
    """
    if not isinstance(values, dict):
        raise InputError(f"{where}: must be an object, got {type(values).__name__}")
    rest = _as_reached(values, where)
    named = rest.pop("objective", {})
    path = named.get("path", ObjectiveConfig.path) if isinstance(named, dict) else ObjectiveConfig.path
    settings = getattr(import_object(str(path), "objective"), "Settings", ObjectiveConfig)
    try:
        objective = from_json(settings, named, f"{where}: objective")
        return dataclasses.replace(from_json(RunConfig, rest, where), objective=objective)
    except InputError:
        raise
    except (ValueError, ArithmeticError) as error:
        raise InputError(f"{where}: {error}") from error


FREE_ON_RESUME = frozenset((
    "out_dir", "val_every", "val_packs", "keep_best", "patience", "eval_tasks", "eval_every", "eval_limit", "val_data",
    "save_dtype", "device", "shard", "replicate", "tensor_parallel",
    "train.save_every", "train.keep_last", "train.log_every", "train.log_samples", "train.tensorboard", "train.log_to",
    "data.num_workers", "data.prefetch", "data.start_method", "data.cache_samples", "data.on_error", "data.max_skip_share",
))  # fmt: skip
"""Options that a resumed run may change: none of them touches an update that was done, or one of good rows."""


def differences(old: RunConfig, new: RunConfig) -> list[str]:
    """The options by which a resumed run would differ, as `optim.lr: 4e-05 -> 2e-05`."""
    before, after = _flat(to_json(old)), _flat(to_json(new))
    names = [name for name in (before | after) if before.get(name) != after.get(name)]
    fixed = [name for name in names if name not in FREE_ON_RESUME and name.split(".")[0] not in FREE_ON_RESUME]
    return [f"{name.removeprefix('train.')}: {before.get(name)} -> {after.get(name)}" for name in fixed]


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested keys joined by dots."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat
