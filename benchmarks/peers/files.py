"""Random weights of the InternVL2.5-1B shape in the format of every peer: `python -m benchmarks.peers.files KIND`.

qwen2 (transformers, bfloat16)   ivl (ours, with ivl-int8, ivl-int4 and ivl-w8a8 made of it)
ivl-nano, gguf-nano, ivl-hf, ivl-hf-nano (transformers' dialect) for throughput
ov-bf16, ov-int8, ov-int4 (OpenVINO IR by optimum-intel; int4 in groups of 128, symmetric)   ov-vision, ov-vision-w8a8
gguf-bf16 (`ivl convert`), gguf-int8 (Q8_0), gguf-int4 (Q4_0)
Speed does not depend on the values, so each side draws its own.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.peers.install import FILES, PYTHON, ROOT
from ivl.checkpoint import load_tokenizer, save_processor
from ivl.config import ModelConfig, published_config

SIZE = "1B"


def main(kind: str) -> None:
    """Make one kind; a half-made one is never taken for whole."""
    out = FILES / kind
    if out.exists():
        return
    part = FILES / f"{kind}.part"
    family, _, width = kind.partition("-")
    MAKERS[family](part, width)
    part.rename(out)


def qwen2(out: Path, _: str) -> None:
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    d = published_config(SIZE).decoder
    config = Qwen2Config(
        vocab_size=d.vocab_size, hidden_size=d.width, intermediate_size=d.mlp_width, num_hidden_layers=d.num_layers,
        num_attention_heads=d.num_heads, num_key_value_heads=d.num_kv_heads, max_position_embeddings=d.max_positions,
        rope_parameters={"rope_type": "default", "rope_theta": d.rope_theta}, rms_norm_eps=d.norm_eps,
        tie_word_embeddings=False,
    )  # fmt: skip
    torch.set_default_dtype(torch.bfloat16)
    Qwen2ForCausalLM(config).save_pretrained(out)


def ours(out: Path, width: str) -> None:
    """With the real vocabulary where the `dashscope` wheel is installed, for the time to the first token."""
    if width in ("hf", "hf-nano"):
        source = FILES / ("ivl-nano" if width == "hf-nano" else "ivl")
        subprocess.run([sys.executable, "-m", "ivl", "convert", source, out, "--to", "transformers"], check=True)
        return
    if width not in ("", "nano"):
        option = "--quantize-vision" if width == "w8a8" else "--quantize"
        subprocess.run([sys.executable, "-m", "ivl", "convert", FILES / "ivl", out, option, width], check=True)
        return
    import importlib.util

    import torch

    from ivl.checkpoint import save_model
    from ivl.model.vlm import VLM
    from ivl.processing.processor import Processor
    from ivl.processing.tokenizer import train_tokenizer

    torch.set_default_dtype(torch.bfloat16)
    config = published_config(SIZE) if not width else nano_config()
    model = VLM(config).eval()
    model.init_weights()
    save_model(model, out)
    if width:
        tokenizer = train_tokenizer((ROOT / "README.md").read_text().splitlines(), config.decoder.vocab_size)
        save_processor(Processor(config, tokenizer), out)
        return
    found = importlib.util.find_spec("dashscope")
    if found is not None and found.origin is not None:
        tokenizer = load_tokenizer(Path(found.origin).parent / "resources")
        tokenizer.add_special()
        save_processor(Processor(config, tokenizer), out)


def nano_config() -> ModelConfig:
    from ivl.recipes.nano import architecture

    return architecture()


def openvino(out: Path, kind: str) -> None:
    if kind.startswith("vision"):
        openvino_vision(out, quantized=kind.endswith("w8a8"))
        return
    width = {"bf16": ["fp16"], "int8": ["int8", "--sym"], "int4": ["int4", "--sym", "--group-size", "128"]}[kind]
    subprocess.run(
        [PYTHON.with_name("optimum-cli"), "export", "openvino", "-m", FILES / "qwen2",
         "--task", "text-generation-with-past", "--weight-format", *width, out],
        check=True,
    )  # fmt: skip


def openvino_vision(out: Path, *, quantized: bool) -> None:
    """InternViT and projector traced from transformers' modules; any number of tiles."""
    import numpy as np
    import openvino as ov
    import torch

    from benchmarks.tasks import their_model

    model = their_model(torch.float32).model

    class Vision(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, pixels: torch.Tensor) -> torch.Tensor:
            features = self.model.get_image_features(pixels)
            return getattr(features, "pooler_output", features)

    with torch.inference_mode():
        traced = ov.convert_model(Vision().eval(), example_input=torch.rand(2, 3, 448, 448), input=[-1, 3, 448, 448])
    if quantized:  # calibrated on noise: for timing only
        import nncf

        noise = [np.random.default_rng(i).random((1, 3, 448, 448), np.float32) for i in range(2)]
        traced = nncf.quantize(traced, nncf.Dataset(noise), model_type=nncf.ModelType.TRANSFORMER, subset_size=2)
    out.mkdir(parents=True, exist_ok=True)
    ov.save_model(traced, out / "vision.xml", compress_to_fp16=True)


def gguf(out: Path, width: str) -> None:
    if width in ("bf16", "nano"):
        source = FILES / ("ivl" if width == "bf16" else "ivl-nano")
        subprocess.run([sys.executable, "-m", "ivl", "convert", source, out, "--to", "gguf"], check=True)
        return
    out.mkdir(parents=True, exist_ok=True)
    import llama_cpp

    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = {"int8": llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0, "int4": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0}[width]
    params.nthread = 2
    source, target = str(FILES / "gguf-bf16" / "model.gguf").encode(), str(out / "model.gguf").encode()
    if llama_cpp.llama_model_quantize(source, target, params):
        raise RuntimeError("llama.cpp could not quantize the model")


MAKERS: dict[str, Callable[[Path, str], Any]] = {"qwen2": qwen2, "ivl": ours, "ov": openvino, "gguf": gguf}

if __name__ == "__main__":
    main(sys.argv[1])
