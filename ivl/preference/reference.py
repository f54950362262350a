"""Log-probabilities of the reference model: from a file written before training, from a frozen copy, or with adapters off."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from ivl.data.loader import Loader
from ivl.data.records import media_of
from ivl.errors import DataError, InputError
from ivl.lora.layers import adapters_disabled, lora_parameters
from ivl.model.vlm import VLM
from ivl.preference.config import PreferenceConfig
from ivl.preference.replies import check_pairs, reply_log_probs
from ivl.train.config import Precision
from ivl.train.objectives import ObjectiveContext
from ivl.train.precision import computing
from ivl.train.shards import own_part, own_rows
from ivl.train.stage import set_modes
from ivl.train.world import World, cuts_of, in_step, is_sharded, reshard
from ivl.types import Batch, VideoRef
from ivl.utils.jsonl import Journal, read_journal, reading_line
from ivl.utils.progress import reporting

NOT_DATA = frozenset(("num_workers", "prefetch", "start_method", "cache_samples", "epochs", "shuffle", "mixture", "root"))
"""Fields of DataConfig that do not change a pair's log-probability, or that the fingerprint of the rows covers."""
PAIRS_A_CHUNK = 64
"""Pairs written at a time."""


Reference = Callable[[VLM, Batch], torch.Tensor]
"""Summed log-probability of every sequence of a batch under the reference model, [S], on the CPU or the model's device."""


def find_reference(config: PreferenceConfig, model: VLM, context: ObjectiveContext) -> Reference:
    """Return the reference that the configuration asks for.

    Args:
        config: says which one.
        model: the policy as it is now; of a run that starts it is the reference model.
        context: the run.

    Raises:
        InputError: if a resumed run finds no finished log-probabilities.
    """
    if config.reference == "adapters":
        return adapters_off
    if config.reference == "model":
        return frozen(context.start_model())
    folder = Path(config.reference_dir) if config.reference_dir else context.directory / "reference"
    folders = {name: folder if name == "train" else folder / name for name in context.loaders}
    if not context.resumed:
        weights = weights_hash(model, context.world)
        for name, make_loader in context.loaders.items():
            precompute(
                model, make_loader(), folders[name], precision=context.precision, weights=weights, world=context.world,
                shared=bool(config.reference_dir),
            )  # fmt: skip
    return FileReference.read(*folders.values())


def frozen(model: VLM) -> Reference:
    """Make a frozen model the reference; it runs beside the policy."""
    model.eval().requires_grad_(False)
    return lambda _, batch: reply_log_probs(model, batch).log_probs_S


def adapters_off(model: VLM, batch: Batch) -> torch.Tensor:
    """Ask the model without its LoRA adapters, in eval mode."""
    training = model.training
    model.eval()
    try:
        with adapters_disabled(model):
            return reply_log_probs(model, batch).log_probs_S
    finally:
        if training:
            set_modes(model)


class FileReference:
    """Log-probabilities from a file, by data set and `file:line` of their pair."""

    def __init__(self, pairs: dict[tuple[str, str], tuple[float, float]]) -> None:
        self.pairs = pairs

    @classmethod
    def read(cls, *directories: Path) -> FileReference:
        """Read one or several directories.

        Raises:
            InputError: if one of them holds no finished log-probabilities.
        """
        pairs: dict[tuple[str, str], tuple[float, float]] = {}
        for directory in directories:
            files, done, ranks = sorted(directory.glob("rank-*.jsonl")), 0, 0
            for file in files:
                about, rows = read_journal(file)
                ranks = about["ranks"]
                for number, row in rows:
                    with reading_line(file, number):
                        if "source" in row:
                            pairs[row["dataset"], row["source"]] = row["chosen"] + 0.0, row["rejected"] + 0.0
                    done += bool(row.get("done"))
            if not files or not len(files) == done == ranks:
                raise InputError(f"{directory}: no finished log-probabilities of the reference model; start the run afresh")
        return cls(pairs)

    def __call__(self, model: VLM, batch: Batch) -> torch.Tensor:  # noqa: ARG002, others ask the model
        keys = list(zip(batch.datasets, batch.sources, strict=True))
        for dataset, source in keys:
            if (dataset, source) not in self.pairs:
                raise ValueError(f"{source}: the reference model was not asked about this pair; did the data change?")
        return torch.tensor([x for key in keys for x in self.pairs[key]])


def precompute(
    model: VLM, data: Loader, directory: Path, *, precision: Precision, weights: str, world: World, shared: bool = True
) -> None:
    """Go through an epoch of the data and write directory/rank-R.jsonl; go on where an interrupted pass ended.

    The file belongs to these weights, data and precision. A finished file is kept, whatever the number of ranks. A kill costs
    at most PAIRS_A_CHUNK pairs; of tensor ranks, which must ask together, the whole pass.

    Args:
        model: the reference model.
        data: this rank's pairs.
        directory: where the file goes.
        precision: of the forward pass, as in training.
        weights: hash of the model's weights.
        world: the ranks.
        shared: whether other runs use the directory, so that a file of other weights, data or precision is refused. In a
            run's own directory it is what an attempt left that came to no checkpoint, and is written anew.

    Raises:
        InputError: for data whose samples have random parts (JPEG degradation, video), which have no fixed log-probability;
            for a directory that belongs to something else.
    """
    world.from_first(lambda: _check_fixed(data))
    about = {
        "kind": "reference", "weights": weights, "data": data.mixture.fingerprint(), "precision": precision,
        "options": {k: v for k, v in asdict(data.config).items() if k not in NOT_DATA},
    }  # fmt: skip
    if _is_finished(directory, about):
        return
    path, together = directory / f"rank-{world.data_rank}.jsonl", world.tensor > 1
    if not shared:
        _forget_others(directory, about | {"ranks": world.data_size}, world)
    model.eval()
    with ExitStack() as stack:
        journal = None
        if not world.tensor_rank:
            journal = stack.enter_context(Journal(path, about | {"ranks": world.data_size}, fresh=together))
        stack.enter_context(torch.no_grad())
        stack.enter_context(computing(model, precision))
        done, last = 0, {}
        for _, last in () if together else read_journal(path)[1]:
            done += "source" in last
        if not last.get("done"):
            if last:
                data.restore(last["position"])
            _ask(model, data, journal, done, world)
    reshard(model)
    set_modes(model)
    world.barrier()


def _ask(model: VLM, data: Loader, journal: Journal | None, done: int, world: World) -> None:
    """Write the log-probabilities of the pairs that are left; `done` of them are written. A tensor rank has no journal."""
    rows: list[dict[str, Any]] = []
    total, resumed = -(-len(data.mixture) // world.data_size), done
    with reporting("reference log-probabilities", "pairs") if world.is_main else nullcontext(lambda *_, **__: None) as show:
        for batch, counts in in_step(data, world if is_sharded(model) else World()):
            check_pairs(batch)
            sums_S = reply_log_probs(model, batch).log_probs_S
            if not counts:
                continue
            names = zip(batch.datasets, batch.sources, batch.ids, sums_S.view(-1, 2).tolist(), strict=True)
            rows += [{"dataset": d, "source": s, "id": i, "chosen": c, "rejected": r} for d, s, i, (c, r) in names]
            if journal is not None and len(rows) >= PAIRS_A_CHUNK:
                journal.add([*rows, {"position": data.state()}])
                done, rows = done + len(rows), []
            show(done + len(rows), total, resumed=resumed)
    if journal is not None:
        journal.add([*rows, {"done": True, "pairs": done + len(rows)}])


def _forget_others(directory: Path, about: dict[str, Any], world: World) -> None:
    """Remove log-probabilities that are not about this."""
    for path in directory.glob("rank-*.jsonl") if world.is_main else ():
        found = read_journal(path)[0]
        if found.get("kind") == about["kind"] and found != json.loads(json.dumps(about)):
            path.unlink()
    world.barrier()


def _is_finished(directory: Path, about: dict[str, Any]) -> bool:
    """Whether any number of ranks has finished this very file."""
    try:
        FileReference.read(directory)
    except InputError:
        return False
    written = read_journal(directory / "rank-0.jsonl")[0]
    return {**written, "ranks": None} == {**json.loads(json.dumps(about)), "ranks": None}


def weights_hash(model: VLM, world: World) -> str:
    """Hash every parameter but LoRA adapters. Ranks that share the model hash what they hold of it, and call this together.

    The hashes of all rows, each with its name and number, are added up: whoever holds a row, the sum is the same.
    """
    total, adapters, cuts = 0, lora_parameters(model), cuts_of(model)
    is_copy = world.rank >= world.size // world.replicate if is_sharded(model) else world.data_rank > 0
    for name, parameter in () if is_copy else model.named_parameters():
        cut, (first, last) = cuts.cuts.get(name), own_rows(parameter)
        if name in adapters:
            continue
        own, shape, numbers = own_part(parameter.detach()), list(parameter.shape), torch.arange(1, len(parameter) + 1)
        if cut is not None:
            shape[cut.dim] = sum(cut.parts)
            if cut.dim:  # tensor ranks have columns of the same rows
                own = world.whole(own, cut)
            else:
                numbers = cut.share(torch.arange(1, shape[0] + 1), cuts.rank, cuts.count)
        if first == last or (world.tensor_rank and (cut is None or cut.dim)):
            continue
        head = hashlib.blake2b(f"{name} {shape} {own.dtype}".encode(), digest_size=16)
        rows = own.reshape(last - first, -1).cpu().contiguous().view(torch.uint8).numpy()
        for number, row in zip(numbers[first:last].tolist(), rows, strict=True):
            if number:  # others fill up a share
                digest = head.copy()
                digest.update(number.to_bytes(8, "little"))
                digest.update(row.data)
                total += int.from_bytes(digest.digest(), "little")
    return f"{sum(world.gather(total)) % 2**128:032x}"


def _check_fixed(data: Loader) -> None:
    remedy = "set objective.reference to model, or turn it off"
    for number, spec in enumerate(data.mixture.specs):
        if spec.data_augment:
            raise InputError(
                f"dataset {spec.name!r}: data_augment changes images at random, which a file cannot follow; {remedy}"
            )
        for row in range(len(data.mixture.files[number])):
            try:
                record = data.mixture.record(number, row)
            except DataError:
                continue  # the loader deals with it, by its own policy
            if any(isinstance(ref, VideoRef) for ref in media_of(record)):
                raise InputError(f"{record.source}: frames of a video are drawn at random; {remedy}")
