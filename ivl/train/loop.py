"""The training loop; the only one. It trains every parameter that requires a gradient, with any objective, on any batches."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from ivl.errors import InputError
from ivl.model.devices import send
from ivl.model.vlm import VLM
from ivl.train.config import TrainConfig
from ivl.train.objectives import Objective, StatefulObjective, next_token
from ivl.train.optim import Optimizer, lr_factor
from ivl.train.precision import computing
from ivl.train.recorder import Recorder, StepResult
from ivl.train.stage import set_modes, trainable
from ivl.train.state import CheckpointWriter, Counters, SavedTrainer
from ivl.train.world import RankFailedError, RankLostError, World, cuts_of, in_step, is_sharded, reshard
from ivl.types import Batch, Loss
from ivl.utils.machine import peak_memory_gb

TOTAL_LOSS = "total loss"
"""Name under which the ranks sum up their losses, beside the objective's figures."""


class BatchSource(Protocol):
    """Batches of this rank, with a position that can be saved; it is restored from those of all ranks that saved one."""

    def __iter__(self) -> Iterator[Batch]: ...
    def state(self) -> dict[str, Any]: ...  # noqa: D102
    def restore(self, state: list[dict[str, Any]]) -> None: ...  # noqa: D102


class StoppedError(Exception):
    """Training was told to stop, and did so after a checkpoint."""


@dataclass(frozen=True)
class Evaluator:
    """A small evaluation during training: run(model) -> figures, every so many steps (0: after the last step only)."""

    name: str
    every: int
    run: Callable[[VLM], Mapping[str, float]]
    after: Callable[[int], object] | None = None
    """Called with the step after it ran, on the parameters as they train; what is true ends training as its last step does."""


def train(
    model: VLM,
    data: BatchSource,
    config: TrainConfig,
    *,
    objective: Objective = next_token,
    evaluators: Sequence[Evaluator] = (),
    recorder: Recorder | None = None,
    checkpoints: CheckpointWriter | None = None,
    resume: SavedTrainer | None = None,
    num_samples: int | None = None,
    world: World | None = None,
    stop: Callable[[], bool] = bool,
    watch: AbstractContextManager[object] = nullcontext(),  # noqa: B008 (it has no state)
) -> list[dict[str, Any]]:
    """Train until config.num_steps, or until the data end, and return the metrics of the steps done here.

    Args:
        model: a model whose parameters are marked by a stage, and sharded already where they shall be.
        data: the batches of this rank.
        config: steps, optimizer, precision and how often to save.
        objective: the loss.
        evaluators: small evaluations during training.
        recorder: where the figures go; by default the console. It is closed at the end.
        checkpoints: writes checkpoints every config.save_every steps, at the end, and before an error or `stop` ends the
            run; None writes none.
        resume: what a checkpoint of any number of ranks holds, whose weights the model has already.
        num_samples: samples that data will give on all ranks; the measure of progress when config.num_steps is None.
        world: the ranks; by default this process alone.
        stop: asked in every step on every rank; where one says yes, all save and stop. The default, bool(), says no.
        watch: entered around every step, such as to end one in which a rank has stopped.

    Raises:
        InputError: within the step and naming the samples, if a batch does not fit or the figures are not finite.
        StoppedError: if `stop` said so.
    """
    world = world or World()
    records = recorder or Recorder("train", config, step=resume.step if resume else 0, on=world.is_main)
    trainer = Trainer(model, objective, config, world, num_samples, data, checkpoints, records)
    if resume is not None:
        trainer.restore(resume)
    batches = in_step(data, world if is_sharded(model) else World())
    history: list[dict[str, Any]] = []
    with closing(records), trainer.saving_on_errors():
        while not trainer.is_done and (result := trainer.step(batches, stop=stop, watch=watch)):
            history.append(records.write(result))
            if trainer.stopped:
                trainer.save()
                raise StoppedError(f"stopped after step {result.step}")
            if not trainer.is_done:  # the end is evaluated and saved below
                trainer.evaluate([e for e in evaluators if e.every and result.step % e.every == 0])
                if config.save_every and result.step % config.save_every == 0:
                    trainer.save()
        if trainer.counters.step == 0:
            raise InputError("the data gave no batch at all")
        if history:
            trainer.evaluate(evaluators)
            if config.save_every:
                trainer.save()
    return history


@dataclass
class StepSums:
    """Sums over this rank's packs of a step. What the model computed stays on its device until `read`."""

    counts: torch.Tensor = field(default_factory=lambda: torch.zeros(5, dtype=torch.float64))
    """Loss weight, tokens, samples, tiles and packs."""
    packs: list[tuple[str, float, torch.Tensor]] = field(default_factory=list[tuple[str, float, torch.Tensor]])
    """Place, weight and loss of each pack."""
    figures: dict[str, torch.Tensor] = field(default_factory=dict[str, torch.Tensor])
    """The objective's sums and counts."""
    ids: list[str] = field(default_factory=list[str])

    def add(self, batch: Batch, loss: Loss, place: str, weight: float) -> None:
        """Add the figures of one pack."""
        self.ids.extend(batch.ids)
        counts = [weight, len(batch.tokens_T), len(batch.ids), len(batch.tiles_GSSC), 1]
        self.counts += torch.tensor(counts, dtype=torch.float64)
        self.packs.append((place, weight, loss.total.detach()))
        for name, value in loss.metrics.items():
            value = value.detach().double()
            self.figures[name] = self.figures[name] + value if name in self.figures else value

    def read(self, norm: torch.Tensor) -> tuple[float, list[float], dict[str, torch.Tensor]]:
        """Return norm, the losses of the packs and the figures: the one time in a step that a card is waited for."""
        parts = [norm, *(loss for _, _, loss in self.packs), *self.figures.values()]
        flat = torch.cat([send(part.double().flatten(), norm.device) for part in parts]).cpu()
        values = list(flat.split([part.numel() for part in parts]))
        losses = [float(value) for value in values[1 : 1 + len(self.packs)]]
        return float(values[0]), losses, dict(zip(self.figures, values[1 + len(self.packs) :], strict=True))


class Trainer:
    """Does one optimizer step after another.

    Gradients of Loss.total add up over packs and ranks and are divided once, by the weight of all of them.
    """

    def __init__(
        self, model: VLM, objective: Objective, config: TrainConfig, world: World, num_samples: int | None,
        data: BatchSource, checkpoints: CheckpointWriter | None, recorder: Recorder,
    ) -> None:  # fmt: skip
        if config.packs_per_step % world.data_size:
            raise InputError(f"packs_per_step {config.packs_per_step} is not a multiple of the {world.data_size} data ranks")
        if config.num_steps is None and num_samples is None:
            raise ValueError("without config.num_steps, num_samples must say how long the data are")
        self.model, self.objective, self.config, self.world, self.num_samples = model, objective, config, world, num_samples
        self.computing = computing(model, config.precision)
        self.stateful = objective if isinstance(objective, StatefulObjective) else StatefulObjective()
        self.optimizer = Optimizer(
            trainable(model), config.optim, torch.bfloat16 if "bf16" in config.precision else torch.float32
        )
        self.counters = Counters()
        self.data, self.checkpoints, self.recorder = data, checkpoints, recorder
        self.position = data.state()
        """Data position after the last finished step."""
        self.saved_step = 0
        self.started = time.monotonic()
        self.stopped = False
        """Whether a rank was told to stop."""
        self.ended = False  # by an evaluator
        self.evaluated: dict[Evaluator, int] = {}  # the last step of each
        self.is_between_steps = True
        """False while an update is under way, which no checkpoint could hold."""
        self.shares_model = is_sharded(model) or world.tensor > 1
        self.is_in_model = False
        """Whether ranks that share the model may wait for this one inside the model, where nobody can tell them of an error."""
        set_modes(model)

    @property
    def is_done(self) -> bool:
        """Whether config.num_steps are done, or an evaluator ended training; False where the data's end decides."""
        return self.ended or (self.config.num_steps is not None and self.counters.step >= self.config.num_steps)

    def evaluate(self, evaluators: Sequence[Evaluator]) -> None:
        """Run evaluators in eval mode, without gradients, in the precision of training, and record their figures."""
        step = self.counters.step
        for evaluator in [each for each in evaluators if self.evaluated.get(each) != step]:
            self.evaluated[evaluator] = step
            self.model.eval()
            self.is_in_model = self.shares_model
            with torch.no_grad(), self.computing:
                figures = dict(evaluator.run(self.model))
            self.is_in_model = False
            reshard(self.model)
            set_modes(self.model)
            self.recorder.write_evaluation(step, evaluator.name, figures)
            self.ended |= evaluator.after is not None and bool(evaluator.after(step))

    def save(self, *, sync: bool = True) -> None:
        """Write a checkpoint, unless this step has one; all ranks call this together."""
        if self.checkpoints is None or self.saved_step == self.counters.step:
            return
        self.saved_step = self.counters.step  # a save that fails is not tried again
        if sync:
            self.recorder.sync()
        optimizer = self.optimizer.state()
        state = {"counters": vars(self.counters), "objective": self.stateful.state()}
        self.checkpoints.save(self.counters.step, optimizer=optimizer, state=state, data=self.position)

    @contextmanager
    def saving_on_errors(self) -> Generator[None]:
        """Write a checkpoint of the steps done before an error goes on, if the parameters are whole and all ranks can do so."""
        try:
            yield
        except (StoppedError, RankLostError):
            raise
        except Exception as error:
            told = isinstance(error, RankFailedError)
            if self.is_between_steps and (told or not self.is_in_model):
                try:
                    if not told:
                        self.world.fail(str(error))
                    self.save(sync=False)
                except Exception as again:
                    if self.world.is_main:
                        print(f"no checkpoint of step {self.counters.step} could be written: {again}", file=sys.stderr)
            raise

    def restore(self, saved: SavedTrainer) -> None:
        """Go on from a checkpoint; raises InputError if it does not fit the run."""
        try:
            self.optimizer.restore(saved.optimizer, cuts_of(self.model))
            self.counters, self.saved_step = saved.counters, saved.step
            self.started = time.monotonic() - self.counters.seconds
            if saved.objective:
                self.stateful.restore(saved.objective)
            self.data.restore(saved.positions)
            self.position = self.data.state()
        except InputError:
            raise
        except Exception as error:  # files that a marker without hashes does not vouch for
            raise InputError(f"{saved.checkpoint}: does not fit the run ({type(error).__name__}: {error})") from error

    def step(
        self, batches: Iterator[tuple[Batch, bool]], *, stop: Callable[[], bool] = bool,
        watch: AbstractContextManager[object] = nullcontext(),  # noqa: B008 (it has no state)
    ) -> StepResult | None:  # fmt: skip
        """Do one optimizer step over the next packs of `in_step`; None when every rank is out of data. Others as `train`."""
        began = time.monotonic()
        with watch:
            with self.computing:
                sums = self.forward_backward(batches)
            told = {"stop": torch.ones(1, dtype=torch.float64)} if stop() else {}
            total = self.world.all_reduce({"counts": sums.counts} | told)
            self.stopped = "stop" in total
            counts = total["counts"].tolist()
            return self.apply(counts, sums, began) if counts[-1] else None

    def forward_backward(self, batches: Iterator[tuple[Batch, bool]]) -> StepSums:
        """Add the gradients of this rank's packs to the parameters, without waiting for them; returns their sums."""
        sums, world = StepSums(), self.world
        for micro in range(self.config.packs_per_step // world.data_size):
            batch, counts = next(batches, (None, False))
            if batch is None:
                self.stateful.idle()
                continue
            torch.manual_seed(_seed_of_pack(self.config.seed, self.counters.step, micro * world.data_size + world.data_rank))
            place = f"step {self.counters.step + 1}, {name_samples(batch)}"
            self.is_in_model = self.shares_model
            if counts:
                loss, weight = self._loss(batch, place)
                loss.total.backward()
                sums.add(batch, loss, place, weight)
            else:
                self._take_part(batch)
            self.is_in_model = False
        return sums

    def _take_part(self, batch: Batch) -> None:
        """Run the model, as ranks that share shards must together, on a pack that counts on another rank."""
        self.model.eval()  # a stateful objective learns nothing then
        loss = self.objective(self.model, batch)
        self.stateful.idle()
        (0 * loss.total).backward()
        set_modes(self.model)

    def apply(self, counts: list[float], sums: StepSums, began: float) -> StepResult:
        """Divide the gradients by the global weight, clip them and update the parameters.

        Args:
            counts: those of `StepSums`, over all packs of all ranks.
            sums: those of this rank.
            began: when the step began.
        """
        weight, (tokens, samples, tiles, packs) = counts[0], map(int, counts[1:])
        norm, figures = self._read_step(sums, weight)
        factor, share = self._schedule(samples)
        limit = self.config.optim.clip
        clip = min(1.0, limit / norm) if limit and norm else 1.0
        self.is_between_steps = False
        for parameter in self.optimizer.parameters.values():
            if parameter.grad is not None:
                parameter.grad.mul_(clip / weight)
        self.optimizer.step(factor)
        counters, now = self.counters, time.monotonic()
        counters.step += 1
        counters.tokens += tokens
        counters.samples += samples
        counters.seconds = now - self.started
        self.position = self.data.state()
        self.is_between_steps = True
        took = now - began
        total_loss = float(figures.pop(TOTAL_LOSS))
        shown = {"loss": total_loss / weight, "lr": self.config.optim.lr * factor, "grad_norm": norm}
        shown |= {name: float(value[0] / value[1]) for name, value in figures.items() if value[1]}
        shown |= {
            "tokens": tokens, "samples": samples, "tiles": tiles, "packs": packs, "total_tokens": counters.tokens,
            "total_samples": counters.samples, "tokens_per_second": tokens / took, "samples_per_second": samples / took,
            "seconds": counters.seconds, "memory_gb": peak_memory_gb(self.world.device.type),
        }  # fmt: skip
        return StepResult(counters.step, shown, sums.ids, share)

    def _loss(self, batch: Batch, place: str) -> tuple[Loss, float]:
        """Compute the loss of one pack and its weight, and refuse one that trains nothing."""
        try:
            loss = self.objective(self.model, batch)
        except ValueError as error:
            raise InputError(f"{place}: {error}") from error
        weight = float(loss.weight)
        if weight <= 0:
            raise InputError(f"{place}: no trained token; is the chat template the model's own?")
        return loss, weight

    def _read_step(self, sums: StepSums, weight: float) -> tuple[float, dict[str, torch.Tensor]]:
        """Sum gradients and figures over ranks; returns the norm of the gradients divided by the weight, and the figures.

        Raises:
            InputError: if a loss or the norm is not finite; no parameter has changed then.
        """
        parameters = self.optimizer.parameters
        self.is_between_steps = False  # a rank that fails while gradients are exchanged cannot tell the others
        cuts = cuts_of(self.model)
        self.world.all_reduce_gradients(parameters, cuts)
        norm, losses, figures = sums.read(self.world.gradient_norm(parameters, cuts))
        self.is_between_steps = True
        for (place, own, _), loss in zip(sums.packs, losses, strict=True):
            if not math.isfinite(loss / own):
                raise InputError(f"{place}: loss is {loss / own} (sum {loss}, weight {own})")
        figures = self.world.all_reduce(figures | {TOTAL_LOSS: torch.tensor([sum(losses)], dtype=torch.float64)})
        norm /= weight
        if not math.isfinite(norm):
            bad = [name for name, p in parameters.items() if p.grad is not None and not torch.isfinite(p.grad).all()]
            step = self.counters.step + 1
            raise InputError(f"step {step}: gradient norm is {norm}, first in {bad[:1]}; samples {_shorten(sums.ids)}")
        return norm, figures

    def _schedule(self, samples: int) -> tuple[float, float]:
        """Return the share of the peak rate for this step, and the share of the run that is done after it."""
        optim, num_steps, counters = self.config.optim, self.config.num_steps, self.counters
        if num_steps is not None:
            length = optim.schedule_steps or num_steps
            return lr_factor(optim, (counters.step + 0.5) / length, length), (counters.step + 1) / num_steps
        assert self.num_samples is not None
        middle, end = counters.samples + 0.5 * samples, counters.samples + samples
        return lr_factor(optim, middle / self.num_samples, None), end / self.num_samples


def name_samples(batch: Batch) -> str:
    """Name the samples of a batch for an error: id and file:line."""
    names = [f"{i} ({s})" if s else i for i, s in zip(batch.ids, batch.sources or ("",) * len(batch.ids), strict=True)]
    return f"samples {_shorten(names)}"


def _shorten(names: list[str], limit: int = 8) -> str:
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def _seed_of_pack(seed: int, step: int, pack: int) -> int:
    """A seed for one pack of one step, the same however packs are spread over ranks."""
    return ((seed * 1_000_003 + step) * 1_000_003 + pack) % 2**63
