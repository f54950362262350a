"""Configuration of reading, encoding and packing training data. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from ivl.errors import InputError
from ivl.formats.rows import RowFormat
from ivl.processing.augment import Augmentation
from ivl.types import Averaging, FramesBy
from ivl.utils.budgets import MAX_PROCESSES
from ivl.utils.checks import check_choices
from ivl.utils.workers import StartMethod

Weighting = Literal["size", "root"] | float


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """How the rows of a mixture of data sets become packs."""

    mixture: str | tuple[str, ...]
    """A meta JSON that names several data sets, or a file or folder of rows; or several of either."""
    root: str | None = None
    """Folder of relative media paths when `mixture` is a file of rows; None is the file's own folder."""
    format: RowFormat | None = None
    """How the rows are read when `mixture` is a file of rows, such as parquet or sharegpt; None looks."""
    val_share: float = 0.0
    """Share of each data set's rows that is kept for validation: those with the least hashes of their content."""
    validation: bool = False
    """Read the rows that are kept for validation in place of the others."""
    weighting: Weighting = "size"
    """Share of a data set in an epoch: by its draws (size), their square root (root) or their 1/T-th power (a number, the
    temperature T). The length of the epoch stays, and no row is drawn more than 4 times."""
    max_tokens: int = 8192
    """Tokens of a pack."""
    max_tiles: int = 48
    """Tiles of a pack."""
    max_samples: int | None = None
    """Samples of a pack; None is no limit, 1 turns packing off."""
    max_buffer: int = 20
    """Packs that stay open for the next samples."""
    max_tiles_per_image: int | None = None
    """Tile budget that a conversation's images share; a data set's max_dynamic_patch goes before it, None is the model's."""
    min_frames: int = 8
    """Fewest frames drawn from a video."""
    max_frames: int = 32
    """Most frames drawn from a video."""
    frames_by: FramesBy = "index"
    """Frames are drawn over their numbers, or over time, which differs where the frame rate varies."""
    augmentation: Augmentation = field(default_factory=Augmentation)
    """Random changes to the images of data sets with data_augment."""
    averaging: Averaging = "square"
    """Loss weight of a token whose sequence trains x tokens: 1 (token), 1/x (sample) or 1/sqrt(x) (square)."""
    shuffle: bool = True
    """False keeps the order of the mixture and its files."""
    epochs: int | None = None
    """Passes over the mixture; None never ends."""
    on_error: Literal["refuse", "skip"] = "refuse"
    """A bad row stops the run with its file and line (refuse), or is left out and counted in the report (skip)."""
    over_budget: Literal["refuse", "truncate", "cut", "skip"] = "refuse"
    """The same for a sample larger than a whole pack; on_error=skip skips it, too. truncate drops whole turns from the end,
    down to the last reply that fits; cut keeps as many tokens as fit and trains the beginning of a long reply, unless an image
    would be lost, where it does as truncate. Both count the row; a sample of which nothing fits is a bad row."""
    max_skip_share: float = 0.2
    """Where bad rows are skipped, a larger share of them than this stops the run all the same."""
    num_workers: int = 2
    """Processes that encode; 0 encodes in the main process. Batches do not depend on it."""
    prefetch: int = 16
    """Samples encoded ahead for each worker."""
    start_method: StartMethod | None = None
    """How workers start; None is fork on Linux and spawn elsewhere."""
    cache_samples: int = 0
    """Encoded samples kept in memory, for small sets seen many times. Samples with random parts are never kept."""

    def __post_init__(self) -> None:
        at_least_one = (
            "max_tokens", "max_tiles", "max_samples", "max_buffer", "max_tiles_per_image", "min_frames", "prefetch", "epochs",
        )  # fmt: skip
        for name in at_least_one:
            if (value := getattr(self, name)) is not None and value < 1:
                raise InputError(f"data.{name} must be >= 1, got {value}")
        for name, most in (("num_workers", MAX_PROCESSES), ("cache_samples", 1 << 62)):
            if not 0 <= getattr(self, name) <= most:
                raise InputError(f"data.{name} must be >= 0 and at most {most:,}, got {getattr(self, name)}")
        if self.max_frames < self.min_frames:
            raise InputError(f"data.max_frames {self.max_frames} is below data.min_frames {self.min_frames}")
        if not 0 <= self.val_share < 1 or (self.validation and not self.val_share):
            raise InputError(f"data.val_share must be in [0, 1), and above 0 with data.validation, got {self.val_share}")
        if not 0 <= self.max_skip_share <= 1:
            raise InputError(f"data.max_skip_share must be in [0, 1], got {self.max_skip_share}")
        if self.weighting not in ("size", "root") and not (
            not isinstance(self.weighting, str) and 0.1 <= self.weighting <= 100
        ):
            raise InputError(f"data.weighting must be size, root or a temperature in [0.1, 100], got {self.weighting!r}")
        check_choices(self, "data.")
