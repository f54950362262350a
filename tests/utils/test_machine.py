"""Memory that the C library keeps and returns."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

CODE = """
from ivl.utils.machine import keep_freed_memory, return_freed_memory

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096

keep_freed_memory()
held = [bytes([1]) * 100_000 for _ in range(2_000)]
full = resident()
del held
kept = resident()
return_freed_memory()
print(full - kept < 20_000_000, kept - resident() > 180_000_000)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_freed_memory_is_kept_until_it_is_returned() -> None:
    assert subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True).stdout == "True True\n"
