"""What stands beside a figure: the processor that it was measured on."""

from __future__ import annotations

import platform
from contextlib import suppress
from pathlib import Path


def processor_name() -> str:
    """Return the number of processors and their name, as the system tells them."""
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        if names := [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]:
            return f"{len(names)} x {names[0]}"
    return platform.processor() or platform.machine()
