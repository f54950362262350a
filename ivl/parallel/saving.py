"""Checkpoints of sharded runs, written while training goes on.

`torch.distributed.checkpoint` copies the shards of a rank to its memory, which training waits for, and calls ShardWriter in a
thread: every rank writes one safetensors file, and when the last one is on disk, the first rank seals the checkpoint. Nothing
is pickled. A kill at any moment leaves the checkpoint before it.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from concurrent.futures import Future as SavedFuture
from concurrent.futures import TimeoutError as LateError
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.state_dict_saver import async_save
from torch.distributed.checkpoint.storage import StorageWriter, WriteResult

from ivl.checkpoint.shards import FOLDER
from ivl.errors import InputError
from ivl.parallel import launch
from ivl.train.loop import StoppedError
from ivl.train.state import CheckpointWriter
from ivl.train.world import GRACE, NO_CUTS, ModelCuts, RankLostError, World
from ivl.utils.files import sync
from ivl.utils.sealed import size_and_hash

Parameters = Callable[[], dict[str, torch.Tensor]]


class ShardedCheckpoints(CheckpointWriter):
    """Writes checkpoints of a sharded run. `save` returns when the shards are copied; one save is under way at a time.

    Args:
        run_dir: the run's directory.
        write_model: as of CheckpointWriter; it writes no weights.
        world: the ranks.
        keep_last: newest checkpoints kept; 0 keeps all.
        parameters: returns the parameters that a checkpoint holds, by name.
        cuts: how tensor ranks share them; each writes its shares under names of its own.
    """

    def __init__(
        self, run_dir: Path, write_model: Callable[[Path], None], world: World, keep_last: int, *,
        parameters: Parameters, cuts: ModelCuts = NO_CUTS,
    ) -> None:  # fmt: skip
        super().__init__(run_dir, write_model, world, keep_last)
        self.parameters, self.cuts = parameters, cuts
        self.group = cast(dist.ProcessGroup, dist.new_group(backend="gloo", timeout=launch.STEP_TIMEOUT))
        """The thread's own: its messages must not mix with those of training. A rank is waited for as long as in a step."""
        self.pending: tuple[int, SavedFuture[Any]] | None = None

    def save(self, step: int, *, optimizer: dict[str, torch.Tensor], state: dict[str, Any], data: dict[str, Any]) -> None:
        """Wait for the checkpoint before, copy the shards and begin to write; arguments as CheckpointWriter's."""
        self.wait()
        part = self.part(step)
        try:
            self.begin(step, state, data)
            (part / FOLDER).mkdir(exist_ok=True)
            self.world.barrier()
        except BaseException:
            shutil.rmtree(part, ignore_errors=True)  # the disk may be full
            raise
        held = (self.parameters() | optimizer).items()
        tensors = {self._stored_name(name) if tensor.ndim else name: tensor.detach() for name, tensor in held}
        writer = ShardWriter(part / FOLDER, self.world.rank, lambda hashed: self.finish(step, hashed), self.cuts)
        future = async_save(tensors, storage_writer=writer, process_group=self.group)
        assert isinstance(future, SavedFuture)
        self.pending = step, future

    def _stored_name(self, name: str) -> str:
        """Return the name of this rank's share of a parameter, or of a moment `PARAMETER|NAME`."""
        parameter, bar, moment = name.partition("|")
        cuts = self.cuts
        return f"{parameter}@{cuts.rank}/{cuts.count}{bar}{moment}" if parameter in cuts.cuts else name

    def wait(self, timeout: float | None = None) -> None:
        """Wait until the checkpoint under way is complete.

        Raises:
            InputError: if a rank could not write its file; RankLostError if a rank has ended.
        """
        if self.pending is None:
            return
        (step, future), self.pending = self.pending, None
        place = self.run_dir / f"checkpoint-{step}"
        try:
            future.result(timeout)
        except CheckpointException as error:
            shutil.rmtree(self.part(step), ignore_errors=True)
            rank, (cause, _) = next(iter(error.failures.items()))
            raise InputError(f"{place}: rank {rank} could not write its part: {cause}") from None
        except LateError:
            raise InputError(f"{place}: another rank did not finish its part") from None
        except RuntimeError as error:  # of the process group
            raise self.world.lost(error) from None

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None or issubclass(kind, StoppedError):
            self.wait()
            return
        try:  # the error that ends the run counts more; a rank that has ended will never finish
            self.wait(GRACE if issubclass(kind, RankLostError | RuntimeError) else None)
        except InputError as error:
            if self.world.is_main:
                print(error, file=sys.stderr)


class ShardWriter(StorageWriter):
    """Writes what a rank holds into FOLDER/rank-RANK.safetensors.

    The first rank gets size and hash of every file in `finish`, which torch.distributed.checkpoint calls when all ranks have
    written. Headers are as those of torch's HuggingFaceStorageWriter, so HuggingFaceStorageReader reads the folder, too.
    """

    def __init__(
        self, folder: Path, rank: int, seal: Callable[[dict[str, list[Any]]], None], cuts: ModelCuts = NO_CUTS
    ) -> None:
        self.path, self.seal, self.cuts = folder / f"rank-{rank:05d}.safetensors", seal, cuts

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> torch.futures.Future[list[WriteResult]]:
        """Write the tensors of the plan and flush them to disk."""
        tensors = {item.index.fqn: cast(torch.Tensor, planner.resolve_data(item)).contiguous() for item in plan.items}
        offsets = {item.index.fqn: {"saved_offsets": list(item.index.offset or ())} for item in plan.items}
        about = {"format": "pt", "DCP_VERSION": "1.0", "DCP_SHARDING_INFO": json.dumps(offsets)}
        if self.cuts.cuts:
            about["ivl.cuts"] = json.dumps({name: [cut.dim, cut.parts] for name, cut in self.cuts.cuts.items()})
        save_file(tensors, self.path, metadata=about)
        sync(self.path)
        hashed = f"{FOLDER}/{self.path.name}", size_and_hash(self.path)
        done: torch.futures.Future[list[WriteResult]] = torch.futures.Future()
        done.set_result([WriteResult(item.index, 0, hashed) for item in plan.items[:1]])
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:  # noqa: ARG002
        """Seal the checkpoint; called on the first rank."""
        self.seal(dict(result.storage_data for of_rank in results for result in of_rank))

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None: ...
    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None: ...
    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        return plans

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:  # noqa: ARG003
        return True
