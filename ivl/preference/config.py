"""Settings of preference training. No torch here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from ivl.config import LoraConfig
from ivl.data.config import DataConfig
from ivl.train.config import ObjectiveConfig, Stage
from ivl.utils.checks import check_choices

TERMS_WITH_REFERENCE = ("sigmoid", "bco", "ipo", "hinge", "robust", "kto")
TERMS = (*TERMS_WITH_REFERENCE, "generation", "orpo", "simpo")


@dataclass(frozen=True, kw_only=True)
class PreferenceConfig(ObjectiveConfig):
    """Weights of the loss terms of preference training, and the source of the reference model's log-probabilities.

    The defaults are Mixed Preference Optimization (arXiv:2411.10442, section 3.2): preference, quality and generation.
    """

    path: str = "ivl.preference.objective:PreferenceObjective"
    """Import path of the objective."""
    sigmoid: float = 0.8
    """Weight of DPO's loss, the preference term."""
    bco: float = 0.2
    """Weight of BCO's loss, a classifier of single replies: the quality term."""
    generation: float = 1.0
    """Weight of the chosen reply's cross-entropy: its mean over the reply's tokens, then over pairs."""
    ipo: float = 0.0
    """Weight of IPO's loss."""
    hinge: float = 0.0
    """Weight of SLiC's loss."""
    robust: float = 0.0
    """Weight of DPO for labels that are wrong with probability label_smoothing."""
    kto: float = 0.0
    """Weight of KTO's loss over pairs."""
    orpo: float = 0.0
    """Weight of ORPO's loss. It needs no reference and goes with the generation term."""
    simpo: float = 0.0
    """Weight of SimPO's loss. It needs no reference."""
    beta: float = 0.1
    """Reward of a reply: beta times its log-ratio to the reference."""
    label_smoothing: float = 0.0
    """Share of pairs taken to be the wrong way round, for sigmoid and robust."""
    simpo_gamma: float = 0.5
    """Margin of SimPO's loss."""
    reference: Literal["file", "model", "adapters"] = "file"
    """file: log-probabilities are computed once, before training. model: a frozen copy of the start runs along.
    adapters: the start is the model with its LoRA adapters off."""
    reference_dir: str = ""
    """Directory of the file; empty is `reference` in the run's directory. Runs of the same model, data and precision may share
    one."""
    check_start: bool = True
    """Stop if the policy differs from the reference at the first step."""

    pairs: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for name in TERMS:
            if getattr(self, name) < 0:
                raise ValueError(f"objective.{name} must be >= 0, got {getattr(self, name)}")
        if not any(getattr(self, name) for name in TERMS):
            raise ValueError(f"every weight of the preference loss is zero: set one of {', '.join(TERMS)}")
        if self.beta <= 0:
            raise ValueError(f"objective.beta must be > 0, got {self.beta}")
        if not 0 <= self.label_smoothing < 0.5:
            raise ValueError(f"objective.label_smoothing must be in [0, 0.5), got {self.label_smoothing}")
        check_choices(self, "objective.")

    @property
    def needs_reference(self) -> bool:
        """Whether a term with a weight compares the policy with the reference model."""
        return any(getattr(self, name) for name in TERMS_WITH_REFERENCE)

    @property
    def has_reference_copy(self) -> bool:
        """Whether a frozen copy of the start runs beside the policy."""
        return self.needs_reference and self.reference == "model"

    def check(self, data: DataConfig, stage: Stage, lora: LoraConfig | None) -> None:
        """Refuse data that would cut a reply, and `adapters` as the reference where something else trains.

        Raises:
            ValueError: naming the option.
        """
        if data.over_budget in ("truncate", "cut"):
            raise ValueError(
                f"data.over_budget {data.over_budget} would cut one reply of a preference pair; use refuse or skip"
            )
        if self.needs_reference and self.reference == "adapters" and (lora is None or stage.trainable):
            raise ValueError("objective.reference adapters needs `lora`, and a stage that trains nothing else")
