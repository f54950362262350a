"""Memory that the C library keeps for the next step, and returns."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

CODE = """
import threading
from concurrent.futures import ThreadPoolExecutor
from ivl.utils.machine import keep_freed_memory, return_freed_memory

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096

def take(_):
    together.wait()
    with one_by_one:
        held = [bytes([1]) * 100_000 for _ in range(500)]

keep_freed_memory()
together, one_by_one, before = threading.Barrier(4), threading.Lock(), resident()
with ThreadPoolExecutor(4) as threads:
    list(threads.map(take, range(4)))
kept = resident() - before
return_freed_memory()
print(40_000_000 < kept < 80_000_000, resident() - before < 20_000_000)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_what_one_thread_frees_is_kept_for_all_until_it_is_returned() -> None:
    assert subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True).stdout == "True True\n"
