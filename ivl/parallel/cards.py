"""GPUs by name: the figures that their maker publishes, and how much of them a run is taken to reach. No torch here."""

from __future__ import annotations

from dataclasses import dataclass

from ivl.errors import InputError, nearest
from ivl.utils.checks import check_ranges

GIB = 2**30
BUFFERS = 8 * GIB
"""Memory of a card that a plan leaves for the CUDA context, the buffers of NCCL and cuBLAS, and fragmentation."""
PEAK_SHARE = 0.5
"""Share of the bf16 peak that a training step is taken to reach in all of its operations, recomputed ones included."""
LINK_SHARE = 0.8
"""Share of a link's rate that large collectives are taken to reach."""
READ_SHARE = 0.7
"""Share of the memory's bandwidth that a decoding step is taken to reach."""
NODE_WRITES = 2e9
"""Bytes a second that a node is taken to write to a shared file system."""


@dataclass(frozen=True)
class Card:
    """One GPU. Rates are those of one direction."""

    memory: float
    """In GB of 1e9 bytes. Some cards have a few percent more, which a plan leaves to the driver."""
    tflops: float
    """Dense bf16 products with float32 sums, in TFLOP/s."""
    bandwidth: float
    """Of the memory, in GB/s."""
    link: float
    """To the other cards of a node (NVLink, PCIe without it), in GB/s."""
    network: float
    """To other nodes, a card's share of what a node of eight usually has, in GB/s."""

    @property
    def size(self) -> float:
        """Memory in bytes."""
        return self.memory * 1e9


CARDS = {
    "a100-40gb": Card(40, 312, 1555, 300, 25),
    "a100-80gb": Card(80, 312, 2039, 300, 25),
    "h100-80gb": Card(80, 989, 3350, 450, 50),
    "h200-141gb": Card(141, 989, 4800, 450, 50),
    "b200-192gb": Card(180, 2250, 8000, 900, 50),
    "l40s-48gb": Card(48, 362, 864, 32, 12.5),
    "rtx4090-24gb": Card(24, 165, 1008, 32, 3),
}


def find_card(name: str) -> Card:
    """Return a card by its name.

    Raises:
        InputError: for an unknown name, with the nearest known ones.
    """
    if name not in CARDS:
        begins = [repr(known) for known in CARDS if known.startswith(name.lower())]
        hint = f"did you mean {' or '.join(begins)}?" if name and begins else nearest(name.lower(), CARDS, "cards")
        raise InputError(f"--card {name!r} is not known; {hint}")
    return CARDS[name]


@dataclass(frozen=True, kw_only=True)
class Machines:
    """The cards of a run; a rank has one."""

    nodes: int = 1
    """Machines."""
    gpus: int = 8
    """Cards of each machine."""
    card: str = "h100-80gb"
    """The card: a100-40gb, a100-80gb, h100-80gb, h200-141gb, b200-192gb, l40s-48gb or rtx4090-24gb."""

    def __post_init__(self) -> None:
        check_ranges(self, nodes="[1, inf)", gpus="[1, inf)")
        find_card(self.card)

    @property
    def ranks(self) -> int:
        """All of them."""
        return self.nodes * self.gpus

    def __str__(self) -> str:
        nodes = f"{self.nodes} x " if self.nodes > 1 else ""
        return f"{nodes}{self.gpus} x {self.card}"
