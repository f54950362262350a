"""What quantised weights lose: likelihood of real text, and answers of a model.

    python -m studies.quantization_loss --out results/quantisation.json
    python -m studies.quantization_loss --model runs/quickstart/model --limit 1000 --out results/quantisation.json

Text: the long descriptions (READMEs, in English) of installed packages, read by SmolLM2-135M-Instruct. Its GGUF file has
some matrices in few bits already, so losses are relative to it, as it is, in bfloat16. A `kl` is the mean over tokens of the
divergence from that model's next-token distribution, `same` how often both think the same token likeliest.
"""

from __future__ import annotations

import json
import math
import tempfile
from email.message import Message as Mail
from importlib.metadata import metadata
from pathlib import Path
from typing import Annotated, cast

import torch
import tyro
from torch import nn

import ivl
from examples.real_parts.parts import smollm2
from ivl.checkpoint.convert import convert
from ivl.checkpoint.gguf.reader import GgufModel
from ivl.checkpoint.gguf.tokenizer import tokenizer_from_gguf
from ivl.checkpoint.model_dir import fill
from ivl.evaluation.config import EvalConfig
from ivl.evaluation.run import evaluate
from ivl.evaluation.tasks import TASKS
from ivl.model.decoder import Decoder
from ivl.quant.layers import QuantConfig, QuantPlan, quantize, quantize_layers, quantized_layers
from ivl.types import Layout

PACKAGES = ("tyro", "huggingface_hub", "safetensors", "transformers", "pydantic", "rich", "pytest", "numba", "pillow", "torch")
WINDOW = 512
INT8 = QuantConfig(bits=8)
SCHEMES = {"bf16": QuantPlan(), "int8": QuantPlan(language=INT8, head=INT8)}
for group in (128, 64, 32):
    for symmetric in (True, False):
        int4 = QuantConfig(bits=4, group=group, symmetric=symmetric)
        SCHEMES[f"{int4.name}"] = QuantPlan(language=int4, head=INT8)
SCHEMES["int4 g32, head too"] = QuantPlan(language=QuantConfig(bits=4, group=32), head=QuantConfig(bits=4, group=32))


def language_model() -> tuple[Decoder, GgufModel]:
    file = GgufModel(smollm2())
    with torch.device("meta"):
        decoder = Decoder(file.config)
    decoder = decoder.to(torch.bfloat16).to_empty(device="cpu").eval()
    fill(dict(decoder.named_parameters("decoder")), file.key_map(decoder), file)
    return decoder, file


def quantize_in_place(model: nn.Module, schemes: QuantPlan) -> None:
    matrices = {path: m.weight.detach() for path, m in model.named_modules() if isinstance(m, nn.Linear)}
    quantize_layers(model, lambda path, layer: schemes.for_layer(f"decoder.{path}"))
    for path, layer in quantized_layers(model).items():
        layer.weight, layer.scale, layer.zero = quantize(matrices[path], layer.config)


@torch.inference_mode()
def log_probs(model: Decoder, windows: list[torch.Tensor]) -> list[torch.Tensor]:
    layout = Layout(new_lens=(WINDOW,), past_lens=(0,))
    return [model.head(model(model.embeddings(tokens), layout)).float().log_softmax(-1).half() for tokens in windows]


def on_text(num_windows: int) -> list[dict]:
    _, file = language_model()
    tokenizer = tokenizer_from_gguf(file.vocabulary())
    texts = [str(cast(Mail, metadata(name)).get_payload() or metadata(name)["Description"]) for name in PACKAGES]
    tokens = torch.tensor([token for text in texts for token in tokenizer.encode(text)])
    windows = list(tokens[: len(tokens) // WINDOW * WINDOW].split(WINDOW))
    windows = windows[:: max(len(windows) // num_windows, 1)][:num_windows]
    rows, base = [], []
    for name, schemes in SCHEMES.items():
        model, _ = language_model()
        try:
            quantize_in_place(model, schemes)
        except ValueError as error:  # the group does not divide its width
            rows.append({"name": name, "note": str(error)})
            continue
        found = log_probs(model, windows)
        base = base or found
        nll = kl = same = 0.0
        for tokens, p, q in zip(windows, base, found, strict=True):
            p, q = p.float(), q.float()
            nll -= float(q[:-1].gather(1, tokens[1:, None]).mean())
            kl += float((p.exp() * (p - q)).sum(-1).mean())
            same += float((p.argmax(-1) == q.argmax(-1)).float().mean())
        n = len(windows)
        rows.append({"name": name, "perplexity": math.exp(nll / n), "kl": kl / n, "same": same / n, "tokens": n * WINDOW})
        print(f"{name:20} perplexity {math.exp(nll / n):7.3f}  kl {kl / n:.4f}  same {same / n:.2%}", flush=True)
    return rows


def on_task(source: str, task: str, limit: int | None) -> list[dict]:
    rows = []
    for name, schemes in {**SCHEMES, "W8A8 ViT": QuantPlan(vision=QuantConfig(bits=8, activations=True))}.items():
        with tempfile.TemporaryDirectory() as directory:
            target = Path(directory) / "model"
            try:
                convert(source, target, dtype="bfloat16", schemes=schemes)
            except ivl.InputError as error:
                rows.append({"name": name, "note": str(error)})
                continue
            model = ivl.load(str(target))
            report = evaluate(
                TASKS[task], model.engine, EvalConfig(limit=limit), model=name,
                predictions=Path(directory) / "answers.jsonl",
            )  # fmt: skip
        rows.append({"name": name, "task": task, "value": report["value"], "ci95": report["ci95"], "n": report["n"]})
        print(f"{name:20} {task} {report['value']:.2%} of {report['n']}", flush=True)
    return rows


def main(
    out: Path,
    *,
    model: str | None = None,
    task: str = "easy-vqa",
    limit: int | None = None,
    windows: Annotated[int, tyro.conf.arg(help="of 512 tokens; 0 leaves text out")] = 24,
) -> None:
    """What quantised weights lose.

    Args:
        out: JSON file to write.
        model: Directory of a model whose answers are scored, too.
        task: What it is asked.
        limit: Questions; all without it.
    """
    report = {
        "text": on_text(windows) if windows else [],
        "packages": PACKAGES,
        "task": on_task(model, task, limit) if model else [],
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(report, indent=2))


if __name__ == "__main__":
    tyro.cli(main)
