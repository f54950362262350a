"""The peers' environment, `.venv-peers`, and the files they read, `runs/peers`. Both are made once and then kept.

OpenVINO's exporter needs an older transformers than the one measured, and llama.cpp must be built with a repaired AMX header,
so they live apart from `.venv`.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
HOME = ROOT / ".venv-peers"
PYTHON = HOME / "bin" / "python"
FILES = ROOT / "runs" / "peers"
PACKAGES = ("torch", "transformers==5.5.4", "openvino>=2026.4", "openvino-genai", "nncf", "gguf", "safetensors", "numpy<2.5")
WITHOUT_DEPENDENCIES = ("optimum", "optimum-intel")
"""Its torchvision would not fit a torch built for CPUs, and exporting a language model does not need it."""
LLAMA = "llama-cpp-python"


def install() -> None:
    """Set up `.venv-peers`; llama.cpp is compiled here for this processor, which takes minutes."""
    mark = HOME / ".installed"
    if not mark.exists():
        subprocess.run([sys.executable, "-m", "venv", HOME], check=True)
        pip = [PYTHON, "-m", "pip", "install", "--quiet", "--constraint", ROOT / "constraints.txt"]
        subprocess.run([*pip, *PACKAGES], check=True)
        subprocess.run([*pip, "--no-deps", *WITHOUT_DEPENDENCIES], check=True)
        mark.touch()
    if subprocess.run([PYTHON, "-c", "import llama_cpp"], capture_output=True, check=False).returncode:
        header = Path(__file__).with_name("tile_config.h")
        flags = f"-DGGML_NATIVE=ON -DLLAMA_BUILD_TESTS=OFF -DCMAKE_CXX_FLAGS=-include{header}"
        command = [PYTHON, "-m", "pip", "install", "--quiet", "--no-binary", LLAMA, "--no-cache-dir", LLAMA]
        subprocess.run(command, check=True, env={**os.environ, "CMAKE_ARGS": flags})
