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
PACKAGES = (
    "torch", "transformers==5.5.4", "openvino>=2026.4", "openvino-genai", "nncf", "gguf", "safetensors", "numpy<2.5",
    "diskcache", "jinja2",
)  # fmt: skip
WITHOUT_DEPENDENCIES = ("optimum", "optimum-intel")
"""Its torchvision would not fit a torch built for CPUs, and exporting a language model does not need it."""
LLAMA = "llama-cpp-python"
LEVELS: dict[str, dict[str, str]] = {
    "amx": {},
    "avx512": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16"},
    "avx2": {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"},
}
"""What holds oneDNN (in torch and OpenVINO), torch's own kernels and MKL to a level."""
LLAMA_FLAGS = {
    "amx": "-DGGML_NATIVE=ON",
    "avx512": "-DGGML_NATIVE=OFF -DGGML_AVX512=ON -DGGML_AVX512_VBMI=ON -DGGML_AVX512_VNNI=ON -DGGML_AVX512_BF16=ON",
    "avx2": "-DGGML_NATIVE=OFF -DGGML_AVX=ON -DGGML_AVX2=ON -DGGML_FMA=ON -DGGML_F16C=ON -DGGML_BMI2=ON",
}
"""What a build of llama.cpp is told for a level."""


def install(level: str) -> None:
    """Set up `.venv-peers`, and hold this process's children to a level. llama.cpp is compiled for it, which takes minutes."""
    mark = HOME / ".installed"
    if not mark.exists():
        subprocess.run([sys.executable, "-m", "venv", HOME], check=True)
        pip = [PYTHON, "-m", "pip", "install", "--quiet", "--constraint", ROOT / "constraints.txt"]
        subprocess.run([*pip, *PACKAGES], check=True)
        subprocess.run([*pip, "--no-deps", *WITHOUT_DEPENDENCIES], check=True)
        mark.touch()
    folder = HOME / f"llama-{level}"
    if not (folder / "llama_cpp").exists():
        header = Path(__file__).with_name("tile_config.h")
        flags = f"{LLAMA_FLAGS[level]} -DLLAMA_BUILD_TESTS=OFF -DCMAKE_CXX_FLAGS=-include{header}"
        command = [PYTHON, "-m", "pip", "install", "--quiet", "--no-deps", "--no-cache-dir", "--target", folder]
        subprocess.run([*command, "--no-binary", LLAMA, LLAMA], check=True, env={**os.environ, "CMAKE_ARGS": flags})
    os.environ.update(LEVELS[level] | {"IVL_CPU": level, "PYTHONPATH": str(folder)})
