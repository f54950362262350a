"""Configuration of training: what trains, by which optimizer, for which objective, and how the loop goes. No torch here."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from ivl.config import LoraConfig
from ivl.data.config import DataConfig
from ivl.errors import InputError
from ivl.utils.checks import check_choices, check_ranges

TrainablePart = Literal["vision", "projector", "decoder"]
PARTS: tuple[TrainablePart, ...] = ("vision", "projector", "decoder")
Precision = Literal["auto", "fp32", "bf16", "pure_bf16"]
Tracker = Literal["wandb", "trackio"]


@dataclass(frozen=True, kw_only=True)
class Stage:
    """What trains. Everything else is frozen, runs in eval mode and gets no drop path."""

    trainable: tuple[TrainablePart, ...]
    """Parts that train: vision, projector, decoder (embeddings and output head included)."""
    vision_from_layer: int = 0
    """Of a trainable ViT, train only the layers from this one on; negative counts from the end; 0 trains all of it."""
    drop_path: float = 0.0
    """Stochastic depth of the ViT's last layer, rising linearly from 0 at the first. Only acts while the ViT trains."""

    def __post_init__(self) -> None:
        unknown = set(self.trainable) - set(PARTS)
        if unknown:
            raise InputError(f"trainable parts are vision, projector and decoder, got {sorted(unknown)}")
        if len(set(self.trainable)) < len(self.trainable):
            raise InputError(f"trainable names a part twice: {self.trainable}")
        check_ranges(self, drop_path="[0, 1)")
        if self.vision_from_layer and "vision" not in self.trainable:
            raise InputError(f"vision_from_layer {self.vision_from_layer} needs 'vision' among the trainable parts")


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """Optimizer and learning-rate schedule."""

    name: Literal["adamw", "muon"] = "adamw"
    """muon orthogonalizes the updates of hidden matrices (ViT, projector, decoder); embeddings, head, norms, biases and
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
    """Length the schedule is shaped for; None is the length of the run. The published stage 1 stops long before its end."""
    warmup_steps: int = 0
    """Steps of linear warm-up."""
    warmup_ratio: float = 0.0
    """Warm-up as a share of the schedule, when warmup_steps is 0."""
    min_lr_ratio: float = 0.0
    """Where the schedule ends, as a share of the peak."""
    muon_momentum: float = 0.95
    muon_lr: float | None = None
    """Peak rate of the matrices under muon, in parts without a rate of their own (lr_vision, ...); None takes lr."""
    muon_scale: Literal["adamw", "original"] = "adamw"
    """adamw scales updates to the size of AdamW's, so its rates carry over; original scales by sqrt(max(1, rows / columns))."""

    def __post_init__(self) -> None:
        check_choices(self, "optim.")
        check_ranges(
            self, lr="(0, 1)", lr_vision="(0, 1)", lr_projector="(0, 1)", lr_decoder="(0, 1)", muon_lr="(0, 1)", eps="[0, 1)",
            weight_decay="[0, inf)", clip="[0, inf)", betas="[0, 1)", muon_momentum="[0, 1)", warmup_steps="[0, inf)",
            warmup_ratio="[0, 1)", min_lr_ratio="[0, 1]", schedule_steps="[1, inf)",
        )  # fmt: skip
        if self.warmup_steps and self.warmup_ratio:
            raise InputError(f"give warmup_steps or warmup_ratio, not both ({self.warmup_steps}, {self.warmup_ratio})")


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """Which objective trains. An objective that has settings derives its own class from this one."""

    path: str = "ivl.train.objectives:next_token"
    """Import path of the objective: `package.module:name` or `path/to/file.py:name`. It is a function from a model and a batch
    to a Loss, or a subclass of StatefulObjective."""

    pairs: ClassVar[bool] = False
    """Whether every row must be a preference pair. Other objectives refuse pairs."""

    @property
    def has_reference_copy(self) -> bool:
        """Whether a frozen copy of the start runs beside the model; plans count its memory."""
        return False

    def check(self, data: DataConfig, stage: Stage, lora: LoraConfig | None) -> None:
        """Refuse a run whose data, stage or adapters the objective cannot train with.

        Raises:
            ValueError: naming the option and the remedy.
        """


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """What the training loop needs to know."""

    optim: OptimConfig = field(default_factory=OptimConfig)
    num_steps: int | None = None
    """Optimizer steps; None trains until the data end (data.epochs)."""
    packs_per_step: int = 1
    """Packs in one optimizer step over all ranks; each rank takes an equal share, one after another."""
    precision: Precision = "bf16"
    """bf16: float32 parameters, bfloat16 arithmetic. pure_bf16: bfloat16 parameters and optimizer state. auto: a run
    takes bf16 where the device computes in it, else fp32."""
    checkpointing: bool = False
    """Recompute activations in the backward pass to save memory."""
    compile: bool = False
    """Compile what layers do around attention (torch.compile). It takes minutes at the start and is meant for GPUs."""
    seed: int = 0
    """Seed of the random start, of drop path and of the data order."""
    save_every: int = 0
    """Steps between checkpoints; 0 saves the final model only."""
    keep_last: int = 3
    """Checkpoints kept; 0 keeps all."""
    log_every: int = 1
    """Steps between lines on the console that stay; metrics.jsonl has every step."""
    log_to: tuple[Tracker, ...] = ()
    """Trackers that get the figures, too; each is a package to install."""
    log_samples: bool = False
    """Write the ids of each step's samples to metrics.jsonl."""
    tensorboard: bool = True
    """Write TensorBoard events when tensorboard is installed."""

    def __post_init__(self) -> None:
        check_choices(self)
        if self.num_steps is None and (self.optim.warmup_steps or self.optim.schedule_steps):
            raise InputError("without num_steps the length is not known in steps: use optim.warmup_ratio, no schedule_steps")
        check_ranges(
            self, num_steps="[1, inf)", packs_per_step="[1, inf)", save_every="[0, inf)", keep_last="[0, inf)",
            log_every="[1, inf)", seed="[0, 9e18]",
        )  # fmt: skip
