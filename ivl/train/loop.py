"""The training loop; the only one. It trains whatever requires a gradient, with any objective, on any source of batches."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from torch import nn

from ivl.errors import InputError
from ivl.train.config import TrainConfig
from ivl.train.metrics import Board, MetricsLog, Screen, peak_memory_gb
from ivl.train.objectives import Objective, flip_tiles, sft_objective
from ivl.train.optim import Optimizer, lr_factor
from ivl.train.stage import set_modes, trainable
from ivl.train.state import load_trainer, save_checkpoint
from ivl.train.world import World, in_step, is_sharded, whole
from ivl.types import Batch


class Source(Protocol):
    """Batches of this rank, with a position that can be saved; it is restored from those of all ranks that saved one."""

    def __iter__(self) -> Iterator[Batch]: ...
    def state(self) -> dict: ...
    def restore(self, state: list[dict]) -> None: ...


@runtime_checkable
class Stateful(Protocol):
    """An objective that remembers something from step to step, saved with every checkpoint and the same on all ranks: each
    rank calls it equally often, or has it idle once its data are at their end."""

    def idle(self) -> None: ...
    def state(self) -> dict: ...
    def restore(self, state: dict) -> None: ...


@dataclass
class BatchList:
    """Batches in memory as a Source; `epochs` None repeats them without end."""

    batches: list[Batch]
    epochs: int | None = None
    rank: int = 0
    world_size: int = 1
    next: int = 0

    def __iter__(self) -> Iterator[Batch]:
        while self.epochs is None or self.next * self.world_size + self.rank < self.epochs * len(self.batches):
            at = (self.next * self.world_size + self.rank) % len(self.batches)
            self.next += 1
            yield self.batches[at]

    def state(self) -> dict:
        return {"next": self.next}

    def restore(self, state: list[dict]) -> None:
        # Ranks take turns, so together they have taken the first so many; the next turn may begin with any of the new ranks.
        self.next, more = divmod(sum(each["next"] for each in state), self.world_size)
        self.next += self.rank < more


@dataclass(frozen=True)
class Evaluator:
    """A small evaluation during training: run(model) -> figures, every so many steps (0: after the last step only)."""

    name: str
    every: int
    run: Callable[[nn.Module], Mapping[str, float]]


@dataclass
class Counters:
    """What a run has done so far, over all ranks; saved with every checkpoint."""

    step: int = 0
    tokens: int = 0
    samples: int = 0
    seconds: float = 0.0


@dataclass
class Sums:
    """Float64 sums over the micro-batches of a step."""

    values: dict[str, torch.Tensor] = field(default_factory=dict)
    ids: list[str] = field(default_factory=list)

    def add(self, batch: Batch, loss: torch.Tensor, weight: torch.Tensor, metrics: Mapping[str, torch.Tensor]) -> None:
        self.ids.extend(batch.ids)
        counts = [len(batch.tokens_T), len(batch.ids), len(batch.tiles_GSSC), 1]
        new = {"loss": torch.stack([loss.detach().double(), weight.double().to(loss.device)]), "counts": torch.tensor(counts)}
        for name, value in (new | {f"metric/{k}": v for k, v in metrics.items()}).items():
            value = value.detach().double().cpu()
            self.values[name] = self.values[name] + value if name in self.values else value


def train(
    model: nn.Module,
    data: Source,
    config: TrainConfig,
    *,
    objective: Objective = sft_objective,
    evaluators: tuple[Evaluator, ...] = (),
    world: World | None = None,
    out_dir: Path | None = None,
    write_model: Callable[[Path], None] | None = None,
    resume: Path | None = None,
    num_samples: int | None = None,
) -> list[dict]:
    """Train until config.num_steps, or until the data end, and return the metrics of the steps done here.

    Gradients of Loss.total add up over micro-batches and ranks and are divided once, by the weight of all of them.
    out_dir: metrics.jsonl, TensorBoard events and checkpoints go there; None writes nothing.
    write_model(dir): writes model files into a checkpoint; without it none are saved. Every rank calls it, for it may
        have to gather shards; only the first should write.
    resume: a complete checkpoint whose weights the model already holds, written by any number of ranks.
    num_samples: samples that data will give on all ranks; the measure of progress when config.num_steps is None.

    Raises:
        InputError: within the step and naming the samples, if a batch has nothing to train, does not fit the model, or
            if loss or gradients are not finite.
    """
    world = world or World()
    device = world.device
    if config.packs_per_step % world.size:
        raise InputError(f"packs_per_step {config.packs_per_step} is not a multiple of the {world.size} ranks")
    num_micro = config.packs_per_step // world.size
    parameters = trainable(model)
    optimizer = Optimizer(parameters, config.optim)
    memory = _memory(objective)
    counters = Counters()
    if resume is not None:
        tensors, state, positions = load_trainer(resume)
        optimizer.restore(tensors)
        counters = Counters(**state["counters"])
        data.restore(positions)
        if memory:
            memory.restore(state["objective"])
    if config.num_steps is None and num_samples is None:
        raise ValueError("without config.num_steps, num_samples must say how long the data are")
    log = MetricsLog(out_dir / "metrics.jsonl", counters.step) if out_dir and world.is_main else None
    board = Board(out_dir / "tensorboard", counters.step) if out_dir and world.is_main and config.tensorboard else None
    screen = Screen(config.name, config.num_steps, counters.step, every=config.log_every, on=world.is_main)
    history: list[dict] = []
    batches = in_step(iter(data), world) if is_sharded(model) else iter(data)
    set_modes(model)
    started, seconds_before = time.monotonic(), counters.seconds
    saved_at = counters.step

    def write(row: dict, prefix: str) -> None:
        if log:
            log.write(row)
        if board:
            board.write(row, prefix)

    def evaluate(at_end: bool) -> None:
        for evaluator in evaluators:
            if at_end or (evaluator.every and counters.step % evaluator.every == 0):
                model.eval()
                with torch.no_grad():
                    figures = dict(evaluator.run(model))
                set_modes(model)
                write({"step": counters.step, "evaluation": evaluator.name, **figures}, evaluator.name)
                shown = "  ".join(f"{k} {v:.4f}" for k, v in figures.items())
                screen.say(f"{config.name} step {counters.step} {evaluator.name}: {shown}")

    def save() -> None:
        nonlocal saved_at
        if out_dir is None or write_model is None or saved_at == counters.step:
            return
        saved_at = counters.step
        if log:
            log.sync()
        save_checkpoint(
            out_dir, counters.step, write_model=write_model, optimizer=optimizer.state(keep=world.is_main),
            state={"counters": vars(counters), "objective": memory.state() if memory else None},
            data=data.state(), world=world, keep_last=config.keep_last,
        )  # fmt: skip

    try:
        while config.num_steps is None or counters.step < config.num_steps:
            began = time.monotonic()
            sums = Sums()
            for micro in range(num_micro):
                batch = next(batches, None)
                if batch is None:
                    if memory:
                        memory.idle()
                    continue
                torch.manual_seed(_mix(config.seed, counters.step, micro * world.size + world.rank))
                _backward(model, to_device(batch, device), objective, config, counters.step, sums)
            total = world.sum(sums.values)
            if not total:
                break  # every rank is out of data
            loss_sum, weight = total["loss"].tolist()
            tokens, samples, tiles, packs = (int(x) for x in total["counts"].tolist())
            world.sum_gradients(parameters.values())
            gradients = [p.grad for p in parameters.values() if p.grad is not None]
            norm = float(whole(nn.utils.get_total_norm(gradients))) / weight
            if not math.isfinite(norm):
                bad = [name for name, p in parameters.items() if p.grad is not None and not torch.isfinite(p.grad).all()]
                raise InputError(
                    f"step {counters.step + 1}: gradient norm is {norm}, first in {bad[:1]}; samples {_short(sums.ids)}"
                )
            clip = min(1.0, config.optim.clip / norm) if config.optim.clip and norm else 1.0
            for gradient in gradients:
                gradient.mul_(clip / weight)
            if config.num_steps is not None:
                length = config.optim.schedule_steps or config.num_steps
                progress, share = (counters.step + 0.5) / length, (counters.step + 1) / config.num_steps
            else:
                assert num_samples is not None
                length = None
                progress, share = (counters.samples + 0.5 * samples) / num_samples, (counters.samples + samples) / num_samples
            factor = lr_factor(config.optim, progress, length)
            optimizer.step(factor)

            counters.step += 1
            counters.tokens += tokens
            counters.samples += samples
            counters.seconds = seconds_before + time.monotonic() - started
            took = time.monotonic() - began
            row = {"step": counters.step, "loss": loss_sum / weight, "lr": config.optim.lr * factor, "grad_norm": norm}
            row |= {k.removeprefix("metric/"): float(v[0] / v[1]) for k, v in total.items() if k.startswith("metric/") and v[1]}
            row |= {
                "tokens": tokens, "samples": samples, "tiles": tiles, "packs": packs, "total_tokens": counters.tokens,
                "total_samples": counters.samples, "fill": tokens / (packs * config.data.max_tokens),
                "tile_fill": tiles / (packs * config.data.max_tiles),
                "tokens_per_second": tokens / took, "samples_per_second": samples / took, "seconds": counters.seconds,
                "memory_gb": peak_memory_gb(device),
            }  # fmt: skip
            write(row | ({"ids": sums.ids} if config.log_samples else {}), "train")
            history.append(row)
            screen.show(row, share)
            if counters.step == config.num_steps:
                continue  # the end is evaluated and saved below
            evaluate(at_end=False)
            if config.save_every and counters.step % config.save_every == 0:
                save()
        if counters.step == 0:
            raise InputError("the data gave no batch at all")
        if history:
            evaluate(at_end=True)
            if config.save_every:
                save()
    finally:
        screen.close()
        if log:
            log.close()
        if board:
            board.close()
    return history


def _backward(model: nn.Module, batch: Batch, objective: Objective, config: TrainConfig, step: int, sums: Sums) -> None:
    """One micro-batch: add its gradients to the parameters and its figures to the sums."""
    if config.flip_tiles:
        batch = flip_tiles(batch)
    with torch.autocast(batch.tokens_T.device.type, torch.bfloat16, enabled=config.precision == "bf16"):
        try:
            loss = objective(model, batch)  # type: ignore[arg-type]
        except ValueError as error:
            raise InputError(f"step {step + 1}, {name_samples(batch)}: {error}") from error
    weight, value = float(loss.weight), float(loss.total.detach())
    if weight <= 0:
        raise InputError(f"step {step + 1}, {name_samples(batch)}: no trained token; is the chat template the model's own?")
    if not (math.isfinite(weight) and math.isfinite(value)):
        raise InputError(f"step {step + 1}, {name_samples(batch)}: loss is {value / weight} (sum {value}, weight {weight})")
    loss.total.backward()
    sums.add(batch, loss.total, loss.weight, loss.metrics)


def _memory(objective: object) -> Stateful | None:
    return objective if isinstance(objective, Stateful) else None


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch on a device; tiles follow when they are encoded."""
    if batch.tokens_T.device == device:
        return batch
    names = ("tokens_T", "labels_T", "weights_T", "tiles_GSSC", "tile_ids_R")
    return replace(batch, **{name: getattr(batch, name).to(device, non_blocking=True) for name in names})


def name_samples(batch: Batch) -> str:
    """Samples of a batch for an error: id and file:line."""
    names = [f"{i} ({s})" if s else i for i, s in zip(batch.ids, batch.sources or ("",) * len(batch.ids), strict=True)]
    return f"samples {_short(names)}"


def _short(names: list[str], limit: int = 8) -> str:
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def _mix(seed: int, step: int, pack: int) -> int:
    """A seed for one pack of one step, the same however packs are spread over ranks."""
    return ((seed * 1_000_003 + step) * 1_000_003 + pack) % 2**63
