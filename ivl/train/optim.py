"""AdamW, Muon and the learning-rate schedule."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from ivl.train.config import OptimConfig
from ivl.train.shards import StoredTensors, fill
from ivl.train.world import NO_CUTS, ModelCuts


class Optimizer:
    """One or two torch optimizers over named parameters: state goes in and out by name, rates follow one schedule.

    muon_dtype: type of Muon's iteration; float32 where the device has no bfloat16 arithmetic.
    """

    def __init__(
        self, parameters: dict[str, nn.Parameter], config: OptimConfig, muon_dtype: torch.dtype = torch.bfloat16
    ) -> None:
        self.parameters = parameters
        self.config = config
        matrices = [n for n, p in parameters.items() if config.name == "muon" and is_hidden_matrix(n, p)]
        others = [n for n in parameters if n not in set(matrices)]
        self.parts: list[torch.optim.Optimizer] = []
        if others:
            groups = self._groups(others, muon=False)
            self.parts.append(torch.optim.AdamW(groups, betas=config.betas, eps=config.eps, fused=True))
        if matrices:
            self.parts.append(Muon(self._groups(matrices, muon=True), config, muon_dtype))

    def _groups(self, names: list[str], *, muon: bool) -> list[dict[str, Any]]:
        """Parameters that share rate and decay; `peak` is the rate that the schedule scales."""
        groups: dict[tuple[float, float], list[nn.Parameter]] = {}
        for name in names:
            own = getattr(self.config, f"lr_{name.split('.')[0]}")
            peak = own or (self.config.muon_lr if muon else None) or self.config.lr
            decay = self.config.weight_decay if decays(name, self.parameters[name]) else 0.0
            groups.setdefault((peak, decay), []).append(self.parameters[name])
        return [{"params": ps, "lr": peak, "peak": peak, "weight_decay": decay} for (peak, decay), ps in groups.items()]

    def step(self, factor: float) -> None:
        """Update with every rate at factor times its peak, then drop the gradients."""
        for part in self.parts:
            for group in part.param_groups:
                group["lr"] = group["peak"] * factor
            part.step()
            part.zero_grad(set_to_none=True)

    def state(self) -> dict[str, torch.Tensor]:
        """Return tensors by `parameter|name`, such as `decoder.head.weight|exp_avg`; moments of a shard are shards, too."""
        names: dict[torch.Tensor, str] = {p: name for name, p in self.parameters.items()}
        states = ((names[p], state) for part in self.parts for p, state in part.state.items())
        return {f"{name}|{key}": value for name, state in states for key, value in state.items()}

    def restore(self, stored: StoredTensors, cuts: ModelCuts = NO_CUTS) -> None:
        """Take over what state() returned, from files. A rank reads the rows of the moments that it holds.

        Args:
            stored: the whole tensors.
            cuts: how tensor ranks share the parameters.

        Raises:
            ValueError: if the tensors do not belong to exactly these parameters.
        """
        states: dict[str, dict[str, tuple[int, ...]]] = {}
        for full, shape in stored.shapes.items():
            name, _, key = full.rpartition("|")
            states.setdefault(name, {})[key] = shape
        if wrong := set(states) ^ set(self.parameters):
            raise ValueError(f"optimizer state and trainable parameters differ in {len(wrong)} names, first {min(wrong)!r}")
        names = {p: name for name, p in self.parameters.items()}
        for part in self.parts:
            keys = {"momentum_buffer"} if isinstance(part, Muon) else {"step", "exp_avg", "exp_avg_sq"}
            for group in part.param_groups:
                for p in group["params"]:
                    name, shapes = names[p], states[names[p]]
                    if set(shapes) != keys or any(shape and cuts.shape(name, shape) != p.shape for shape in shapes.values()):
                        raise ValueError(f"the optimizer's state of {name!r} has other tensors")
                    part.state[p] = {key: _read(stored, f"{name}|{key}", p, cuts) for key in shapes}


def _read(stored: StoredTensors, name: str, p: nn.Parameter, cuts: ModelCuts) -> torch.Tensor:
    """Read a count or a moment beside its parameter, where the fused kernel wants it."""
    if not stored.shapes[name]:
        return stored.get(name).to(p.device)
    value = torch.empty_like(p, requires_grad=False)
    fill(value, stored, name, cuts)
    return value


class Muon(torch.optim.Optimizer):
    """Muon (https://kellerjordan.github.io/posts/muon): the momentum of a matrix, orthogonalized, is its update.

    Equal to torch.optim.Muon, which iterates in bfloat16 always: processors that emulate it take ten times as long.
    """

    def __init__(self, groups: list[dict[str, Any]], config: OptimConfig, dtype: torch.dtype) -> None:
        super().__init__(groups, {})
        self.config, self.dtype = config, dtype

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        """Update every matrix that has a gradient."""
        momentum = self.config.muon_momentum
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                average = self.state[p].setdefault("momentum_buffer", torch.zeros_like(p.grad))
                average.lerp_(p.grad, 1 - momentum)
                update = orthogonalized(p.grad.lerp(average, momentum), self.dtype)
                rows, columns = p.shape
                like_adamw = self.config.muon_scale == "adamw"
                scale = 0.2 * math.sqrt(max(p.shape)) if like_adamw else math.sqrt(max(1, rows / columns))
                p.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-group["lr"] * scale)


def orthogonalized(matrix: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Bring all singular values near 1 by five Newton-Schulz iterations."""
    tall = matrix.shape[0] > matrix.shape[1]
    x = (matrix.T if tall else matrix).to(dtype)
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return x.T if tall else x


def is_hidden_matrix(name: str, parameter: nn.Parameter) -> bool:
    """Weights of the linear layers of ViT, projector and decoder; not embeddings, head, patch convolution or adapters."""
    pieces = name.split(".")
    outside = pieces[1] in ("embeddings", "head") or any(piece.startswith("lora_") for piece in pieces)
    return parameter.ndim == 2 and pieces[-1] == "weight" and not outside


def decays(name: str, parameter: nn.Parameter) -> bool:
    """Matrices decay; norms, biases, LayerScale, class token and positions do not."""
    return parameter.ndim >= 2 and not name.endswith((".class_token", ".positions"))


def lr_factor(config: OptimConfig, progress: float, num_steps: int | None) -> float:
    """Share of the peak rate at `progress`, the middle of a step as a share of the schedule, in (0, 1)."""
    warm = config.warmup_ratio
    if config.warmup_steps:
        if num_steps is None:
            raise ValueError("warmup_steps needs a run of known length; use warmup_ratio when training by epochs")
        warm = min(config.warmup_steps / num_steps, 1.0)
    if progress < warm:
        return progress / warm
    if config.schedule == "constant" or warm >= 1:
        return 1.0
    done = min((progress - warm) / (1 - warm), 1.0)
    left = 0.5 * (1 + math.cos(math.pi * done)) if config.schedule == "cosine" else 1 - done
    return config.min_lr_ratio + (1 - config.min_lr_ratio) * left
