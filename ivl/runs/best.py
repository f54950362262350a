"""The model of the lowest validation loss, and the end of a run whose validation loss no longer falls."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace

from ivl.errors import InputError
from ivl.model.vlm import VLM
from ivl.runs.config import RunConfig
from ivl.train.loop import Evaluator


class BestModel:
    """Follows the validation loss; the lowest one so far is that of `loss` after `step`.

    All ranks follow the same losses, so that they write and end together.
    """

    def __init__(self, config: RunConfig, write: Callable[[], None], earlier: list[tuple[int, float]]) -> None:
        """Take up the losses of a resumed run.

        Args:
            config: says whether the best model is kept, and when to end.
            write: writes the model as it is now as the best one; all ranks call it together.
            earlier: steps and validation losses before the checkpoint that the run goes on from.

        Raises:
            InputError: for a patience without validation losses to wait for.
        """
        if config.patience and not (config.val_data and config.val_every):
            missing = "--val-every" if config.val_data else "--val-share or --val-mixture"
            raise InputError(f"patience {config.patience} waits for validation losses: give {missing}")
        self.patience, self.write = config.patience, write if config.keep_best else None
        self.step, self.loss, self.since, self._last = 0, math.inf, 0, math.inf
        for step, loss in earlier:
            self._note(step, loss)

    @property
    def is_over(self) -> bool:
        """Whether the validation loss has not fallen for as long as the patience says."""
        return bool(self.patience) and self.since >= self.patience

    def watch(self, validation: Evaluator) -> Evaluator:
        """Return the evaluator, followed from now on."""

        def run(model: VLM) -> Mapping[str, float]:
            figures = validation.run(model)
            self._last = figures["loss"]
            return figures

        return replace(validation, run=run, after=self._after)

    def _after(self, step: int) -> bool:
        self._note(step, self._last)
        if self.step == step and self.write is not None:
            self.write()
        return self.is_over

    def _note(self, step: int, loss: float) -> None:
        if loss < self.loss:
            self.step, self.loss, self.since = step, loss, 0
        else:
            self.since += 1
