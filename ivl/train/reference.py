"""Log-probabilities of the reference model without a second model: from a file made before training, or with adapters off."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ivl.data.encode import media
from ivl.data.loader import Loader
from ivl.data.records import DataError
from ivl.errors import InputError
from ivl.journal import Journal, read_journal
from ivl.model.lora import adapters_disabled
from ivl.model.vlm import VLM
from ivl.train.config import TrainConfig
from ivl.train.distributed import World
from ivl.train.loop import to_device
from ivl.train.pairs import check_pairs, reply_log_probs
from ivl.train.stage import set_modes
from ivl.types import Batch, VideoRef

NOT_DATA = frozenset(("num_workers", "prefetch", "start_method", "cache_samples", "epochs", "shuffle", "mixture", "root"))
"""Fields of DataConfig on which a pair's log-probability does not depend, or that the rows' own fingerprint covers."""


def adapters_off(model: VLM, batch: Batch) -> torch.Tensor:
    """The model without its LoRA adapters, in eval mode."""
    model.eval()
    try:
        with adapters_disabled(model):
            return reply_log_probs(model, batch).log_probs_S
    finally:
        set_modes(model)


class FileReference:
    """Log-probabilities by the `file:line` of their pair."""

    def __init__(self, pairs: dict[str, tuple[float, float]]) -> None:
        self.pairs = pairs

    @classmethod
    def read(cls, directory: Path) -> FileReference:
        """Raises InputError if the directory holds no finished reference."""
        files = sorted(directory.glob("rank-*.jsonl"))
        rows = [row for file in files for _, row in read_journal(file)[1]]
        if not files or sum(bool(row.get("done")) for row in rows) != len(files):
            raise InputError(f"{directory}: no finished log-probabilities of the reference model; start the run afresh")
        return cls({row["source"]: (row["chosen"], row["rejected"]) for row in rows if "source" in row})

    def __call__(self, model: VLM, batch: Batch) -> torch.Tensor:
        missing = [source for source in batch.sources if source not in self.pairs]
        if missing:
            raise ValueError(f"{missing[0]}: the reference model was not asked about this pair; did the data change?")
        return torch.tensor([x for source in batch.sources for x in self.pairs[source]], device=batch.tokens_T.device)


def precompute(
    model: VLM, config: TrainConfig, directory: Path, make_loader: Callable[..., Loader], world: World
) -> FileReference:
    """Go through the data once and write directory/rank-R.jsonl, a pack at a time; goes on where an interrupted pass ended.

    The files belong to these weights, data and precision, and are refused by others. make_loader(data) gives this rank's
    Loader of a DataConfig.

    Raises:
        InputError: for data whose samples have random parts (JPEG degradation, video), which have no fixed log-probability.
    """
    data = make_loader(replace(config.data, epochs=1, shuffle=False))
    _check_fixed(data)
    about = {
        "kind": "reference", "weights": weights_hash(model), "data": data.mixture.fingerprint(), "precision": config.precision,
        "options": {k: v for k, v in asdict(config.data).items() if k not in NOT_DATA}, "ranks": world.size,
    }  # fmt: skip
    path = directory / f"rank-{world.rank}.jsonl"
    model.eval()
    with Journal(path, about) as journal, torch.no_grad():
        rows = [row for _, row in read_journal(path)[1]]
        if not (rows and rows[-1].get("done")):
            if rows:
                data.restore(rows[-1]["position"])
            done = sum("source" in row for row in rows)
            with _progress(world) as bar:
                task = bar.add_task("reference log-probabilities", total=len(data.mixture) // world.size, completed=done)
                for batch in data:
                    check_pairs(batch)
                    with torch.autocast(world.device.type, torch.bfloat16, enabled=config.precision == "bf16"):
                        sums_S = reply_log_probs(model, to_device(batch, world.device)).log_probs_S
                    pairs = zip(batch.sources, batch.ids, sums_S.view(-1, 2).tolist(), strict=True)
                    found = [{"source": s, "id": i, "chosen": c, "rejected": r} for s, i, (c, r) in pairs]
                    journal.add([*found, {"position": data.state()}])
                    done += len(found)
                    bar.update(task, completed=done)
            journal.add([{"done": True, "pairs": done}])
    set_modes(model)
    world.barrier()
    return FileReference.read(directory)


def weights_hash(model: VLM) -> str:
    """Of every parameter, by name and content."""
    digest = hashlib.blake2b(digest_size=16)
    for name, parameter in model.named_parameters():
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        digest.update(parameter.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _progress(world: World) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=Console(stderr=True, quiet=not world.is_main))


def _check_fixed(data: Loader) -> None:
    remedy = "set preference.reference to model, or turn it off"
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
            if any(isinstance(ref, VideoRef) for ref in media(record)):
                raise InputError(f"{record.source}: frames of a video are drawn at random; {remedy}")
