"""Configuration of training. No torch here, so `ivl train --help` is quick."""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from dataclasses import dataclass, field
from typing import Any, Literal

from ivl.config import LoraConfig, ModelConfig
from ivl.data.config import DataConfig
from ivl.errors import InputError

Part = Literal["vision", "projector", "decoder"]
Precision = Literal["fp32", "bf16", "pure_bf16"]


@dataclass(frozen=True, kw_only=True)
class Stage:
    """What trains. Everything else is frozen, runs in eval mode and gets no drop path."""

    trainable: tuple[Part, ...]
    """Parts that train: vision, projector, decoder (embeddings and output head included)."""
    vision_from_layer: int = 0
    """Of a trainable ViT, train only the layers from this one on; negative counts from the end; 0 trains all of it."""
    drop_path: float = 0.0
    """Stochastic depth of the ViT's last layer, rising linearly from 0 at the first. Only acts while the ViT trains."""

    def __post_init__(self) -> None:
        unknown = set(self.trainable) - {"vision", "projector", "decoder"}
        if unknown:
            raise ValueError(f"trainable parts are vision, projector and decoder, got {sorted(unknown)}")
        if len(set(self.trainable)) < len(self.trainable):
            raise ValueError(f"trainable names a part twice: {self.trainable}")
        if not 0 <= self.drop_path < 1:
            raise ValueError(f"drop_path must be in [0, 1), got {self.drop_path}")
        if self.vision_from_layer and "vision" not in self.trainable:
            raise ValueError(f"vision_from_layer {self.vision_from_layer} needs 'vision' among the trainable parts")


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """Optimiser and learning-rate schedule."""

    name: Literal["adamw", "muon"] = "adamw"
    """muon orthogonalises the updates of hidden matrices (ViT, projector, decoder); embeddings, head, norms, biases and
    the position table keep AdamW."""
    lr: float = 4e-5
    """Peak learning rate."""
    lr_vision: float | None = None
    """Peak rate of the ViT, if it differs."""
    lr_projector: float | None = None
    """Peak rate of the projector, if it differs."""
    lr_decoder: float | None = None
    """Peak rate of the decoder, if it differs."""
    weight_decay: float = 0.01
    """Decoupled decay of matrices; norms, biases, LayerScale, class token and positions are not decayed."""
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    clip: float = 1.0
    """Largest global gradient norm; 0 turns clipping off (the norm is logged all the same)."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """How the rate falls after warm-up."""
    schedule_steps: int | None = None
    """Length the schedule is shaped for; None is the length of the run. The published stage 1 stops long before."""
    warmup_steps: int = 0
    """Steps of linear warm-up."""
    warmup_ratio: float = 0.0
    """Warm-up as a share of the schedule, when warmup_steps is 0."""
    min_lr_ratio: float = 0.0
    """Where the schedule ends, as a share of the peak."""
    muon_momentum: float = 0.95
    muon_lr: float | None = None
    """Peak rate of the matrices under muon; None takes lr."""
    muon_scale: Literal["adamw", "original"] = "adamw"
    """adamw scales updates to the size of AdamW's, so its rates carry over; original scales by sqrt(max(1, rows / columns))."""

    def __post_init__(self) -> None:
        for name in ("lr", "lr_vision", "lr_projector", "lr_decoder", "muon_lr"):
            value = getattr(self, name)
            if value is not None and not 0 < value < 1:
                raise ValueError(f"{name} must be in (0, 1), got {value}")
        if self.weight_decay < 0 or self.clip < 0:
            raise ValueError(f"weight_decay and clip must be >= 0, got {self.weight_decay} and {self.clip}")
        if not all(0 <= beta < 1 for beta in (*self.betas, self.muon_momentum)):
            raise ValueError(f"betas and muon_momentum must be in [0, 1), got {self.betas} and {self.muon_momentum}")
        if self.warmup_steps < 0 or not 0 <= self.warmup_ratio < 1:
            raise ValueError(f"need warmup_steps >= 0 and warmup_ratio in [0, 1), got {self.warmup_steps}, {self.warmup_ratio}")
        if self.warmup_steps and self.warmup_ratio:
            raise ValueError(f"give warmup_steps or warmup_ratio, not both ({self.warmup_steps}, {self.warmup_ratio})")
        if not 0 <= self.min_lr_ratio <= 1:
            raise ValueError(f"min_lr_ratio must be in [0, 1], got {self.min_lr_ratio}")
        if self.schedule_steps is not None and self.schedule_steps < 1:
            raise ValueError(f"schedule_steps must be >= 1, got {self.schedule_steps}")


@dataclass(frozen=True, kw_only=True)
class PreferenceConfig:
    """Weights of the loss terms of preference training, and where the reference model's log-probabilities come from. The
    defaults are Mixed Preference Optimization (spec 5.1): preference, quality and generation."""

    sigmoid: float = 0.8
    """DPO's loss."""
    bco: float = 0.2
    """BCO's loss, a classifier of single replies: the quality term."""
    generation: float = 1.0
    """Cross-entropy of the chosen reply: its mean over the reply's tokens, then over pairs."""
    ipo: float = 0.0
    hinge: float = 0.0
    robust: float = 0.0
    """DPO for labels that are wrong with probability label_smoothing."""
    kto: float = 0.0
    orpo: float = 0.0
    """Without a reference; goes with the generation term."""
    simpo: float = 0.0
    """Without a reference."""
    beta: float = 0.1
    """Reward of a reply: beta times its log-ratio to the reference."""
    label_smoothing: float = 0.0
    """Share of pairs taken to be the wrong way round, for sigmoid and robust."""
    simpo_gamma: float = 0.5
    reference: Literal["file", "model", "adapters"] = "file"
    """file: log-probabilities are computed once, before training. model: a frozen copy of the start runs along.
    adapters: the start is the model with its LoRA adapters off."""
    reference_dir: str = ""
    """Where the file is kept; empty is `reference` in the run's directory. Runs of the same model, data and precision may share
    one."""
    check_start: bool = True
    """Stop if the policy differs from the reference at the first step."""

    def __post_init__(self) -> None:
        for name in TERMS:
            if getattr(self, name) < 0:
                raise ValueError(f"preference.{name} must be >= 0, got {getattr(self, name)}")
        if not any(getattr(self, name) for name in TERMS):
            raise ValueError(f"every weight of the preference loss is zero: set one of {', '.join(TERMS)}")
        if self.beta <= 0:
            raise ValueError(f"preference.beta must be > 0, got {self.beta}")
        if not 0 <= self.label_smoothing < 0.5:
            raise ValueError(f"preference.label_smoothing must be in [0, 0.5), got {self.label_smoothing}")
        if self.reference not in ("file", "model", "adapters"):
            raise ValueError(f"preference.reference must be file, model or adapters, got {self.reference!r}")

    @property
    def needs_reference(self) -> bool:
        return any(getattr(self, name) for name in WITH_REFERENCE)


WITH_REFERENCE = ("sigmoid", "bco", "ipo", "hinge", "robust", "kto")
TERMS = (*WITH_REFERENCE, "generation", "orpo", "simpo")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One complete training run. A recipe is a function that returns one; later stages derive with dataclasses.replace."""

    name: str
    """Names the run and, unless out_dir is given, its directory runs/NAME."""
    out_dir: str = ""
    """Where checkpoints, metrics and the final model go; empty is runs/NAME."""
    model: str = ""
    """Model to start from: a directory or a hub id. Empty starts from random weights of `architecture`."""
    architecture: ModelConfig | None = None
    """Needed for a random start and for planning without the weights; a loaded model must agree with it."""
    tokenizer: str = ""
    """Directory of the tokenizer; empty takes the model's own."""
    stage: Stage
    objective: Literal["next_token", "caption_words", "preference"] = "next_token"
    """next_token: cross-entropy of the trained tokens. caption_words: each tile alone predicts which words its caption
    holds, to warm up a ViT from nothing. preference: pairs of a chosen and a rejected reply, see `preference`."""
    preference: PreferenceConfig = field(default_factory=PreferenceConfig)
    """Terms of the preference objective."""
    flip_tiles: bool = False
    """Mirror and transpose whole tiles at random; for data whose labels do not depend on direction."""
    lora: LoraConfig | None = None
    """Train low-rank adapters on frozen layers, in addition to the stage's trainable parts."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    data: DataConfig
    val_data: DataConfig | None = None
    """Data set of the validation loss."""
    num_steps: int | None = None
    """Optimiser steps; None trains until the data end (data.epochs)."""
    packs_per_step: int = 1
    """Packs in one optimiser step over all ranks; each rank takes an equal share, one after another."""
    precision: Precision = "bf16"
    """bf16: float32 parameters, bfloat16 arithmetic (autocast). pure_bf16: bfloat16 parameters and optimiser state."""
    checkpointing: bool = False
    """Recompute activations in the backward pass to save memory."""
    shard: bool = False
    """Shard parameters, gradients and optimiser state over ranks (FSDP2) instead of keeping a copy on each."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    seed: int = 0
    """Of the random start, of drop path and of the data order."""
    save_every: int = 0
    """Steps between checkpoints; 0 saves the final model only."""
    keep_last: int = 3
    """Checkpoints kept; 0 keeps all."""
    val_every: int = 0
    """Steps between validation losses; 0 computes one at the end."""
    val_packs: int = 0
    """Packs of each validation loss; 0 takes all."""
    log_every: int = 1
    """Steps between plain log lines; metrics.jsonl has every step."""
    log_samples: bool = False
    """Write the ids of each step's samples to metrics.jsonl."""
    tensorboard: bool = True
    """Write TensorBoard events when tensorboard is installed."""
    save_dtype: Literal["float32", "bfloat16"] | None = None
    """Type of the final model's weights; None keeps that of the parameters."""

    def __post_init__(self) -> None:
        if not self.model and self.architecture is None:
            raise ValueError("give `model` (a directory or hub id) or `architecture` (to start from random weights)")
        if self.lora is None and not self.stage.trainable:
            raise ValueError("nothing would train: name trainable parts in `stage`, or give `lora`")
        if self.lora is not None:
            both = [t for t in self.lora.targets if t.split(".")[0] in self.stage.trainable]
            if both:
                raise ValueError(f"LoRA targets {both} lie in parts that the stage trains whole; choose one of the two")
        if self.shard and self.optim.name == "muon":
            raise ValueError("muon needs whole matrices: use adamw, or shard = False")
        if self.num_steps is None and self.data.epochs is None:
            raise ValueError("the run has no end: give num_steps or data.epochs")
        if self.num_steps is None and (self.optim.warmup_steps or self.optim.schedule_steps):
            raise ValueError("without num_steps the length is not known in steps: use optim.warmup_ratio, no schedule_steps")
        if self.objective == "preference":
            self._check_preference()
        for name, least in (
            ("num_steps", 1), ("packs_per_step", 1), ("save_every", 0), ("keep_last", 0), ("val_every", 0),
            ("val_packs", 0), ("log_every", 1),
        ):  # fmt: skip
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} must be >= {least}, got {value}")

    def _check_preference(self) -> None:
        if self.data.over_budget == "truncate":
            raise ValueError("data.over_budget truncate would cut one reply of a preference pair; use refuse or skip")
        if not self.preference.needs_reference:
            return
        if self.preference.reference == "adapters" and (self.lora is None or self.stage.trainable):
            raise ValueError("preference.reference adapters needs `lora`, and a stage that trains nothing else")
        if self.preference.reference == "file" and self.flip_tiles:
            raise ValueError("flip_tiles is random, which a file cannot follow; set preference.reference to model")

    @property
    def keeps_start(self) -> bool:
        """Whether a frozen copy of the start runs along."""
        asks = self.objective == "preference" and self.preference.needs_reference
        return asks and self.preference.reference == "model"

    @property
    def run_dir(self) -> str:
        return self.out_dir or f"runs/{self.name}"


def to_json(config: Any) -> dict[str, Any]:
    """A configuration as plain JSON values."""
    return dataclasses.asdict(config)


def from_json(kind: type, values: dict[str, Any], where: str = "") -> Any:
    """The inverse of to_json, checked.

    Raises:
        InputError: for an unknown key, with the nearest known one, or a value that the configuration refuses.
    """
    hints = typing.get_type_hints(kind)
    known = {f.name for f in dataclasses.fields(kind)}
    for name in values:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            raise InputError(f"{where}{name}: no such option" + (f"; did you mean {near[0]!r}?" if near else ""))
    try:
        return kind(**{name: _typed(hints[name], value, f"{where}{name}.") for name, value in values.items()})
    except (TypeError, ValueError) as error:
        raise InputError(f"{where.rstrip('.') or kind.__name__}: {error}") from error


def _typed(hint: Any, value: Any, where: str) -> Any:
    choices = typing.get_args(hint) if typing.get_origin(hint) in (types.UnionType, typing.Union) else (hint,)
    if isinstance(value, list):
        return tuple(value)
    if isinstance(value, dict):
        return from_json(next(c for c in choices if dataclasses.is_dataclass(c)), value, where)  # type: ignore[arg-type]
    return value


FREE_ON_RESUME = frozenset(
    ("out_dir", "save_every", "keep_last", "val_every", "val_packs", "val_data", "log_every", "log_samples", "tensorboard",
     "save_dtype", "device", "data.num_workers", "data.prefetch", "data.start_method", "data.cache_samples")
)  # fmt: skip
"""Options that a resumed run may change: none of them touches an update."""


def differences(old: TrainConfig, new: TrainConfig) -> list[str]:
    """What a resumed run would do otherwise, as `optim.lr: 4e-05 -> 2e-05`."""
    before, after = _flat(to_json(old)), _flat(to_json(new))
    names = [n for n in (before | after) if before.get(n) != after.get(n)]
    free = [n for n in names if n in FREE_ON_RESUME or n.split(".")[0] in FREE_ON_RESUME]
    return [f"{n}: {before.get(n)} -> {after.get(n)}" for n in names if n not in free]


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat
