"""The engine on the CPU, on a pretended card and on two: `python -m tests.helpers.card_engine LIBRARY FOLDER` prints JSON.

{"replies": {case: {device: ...}}, "waits": {case: ...}, "graphs": ..., "products": ..., "spread": ..., "failed": {case: why}}
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from tests.helpers import pretend
from tests.helpers.card_cases import DEVICES, attempt

TWO_CARDS = "cuda:1,cuda:0"
"""The first of them is not the current device."""
SIZES = {"block_size": 256, "max_cache_tokens": 16384}
SAMPLED = (
    {"temperature": 1.0}, {"temperature": 0.7, "top_p": 0.9}, {"temperature": 1.3, "top_k": 7, "min_p": 0.02},
    {"temperature": 0.9, "top_k": 40, "top_p": 0.8, "repetition_penalty": 1.3},
    {"temperature": 1.1, "presence_penalty": 0.7, "frequency_penalty": 0.3}, {"repetition_penalty": 1.5},
)  # fmt: skip


def main(library: Path, folder: Path) -> None:
    pretend.start(library, cards=4)
    import torch

    torch.set_num_threads(1)
    folder.mkdir(parents=True)
    make(folder)
    result: dict[str, dict[str, Any]] = {name: {} for name in ("replies", "waits", "graphs", "products", "spread", "failed")}
    for case, (dtype, answer) in CASES.items():
        devices = (*DEVICES, TWO_CARDS) if case in SPREAD else DEVICES
        attempt(result, "replies", case, partial(on_each, folder, devices, dtype, answer))
    for case, options in {"greedy": {}, "sampled": SAMPLED[1], "penalties": SAMPLED[3], "logprobs": {"logprobs": 2}}.items():
        attempt(result, "waits", case, partial(waits, folder, "cuda", options))
    attempt(result, "waits", "two cards", partial(waits, folder, TWO_CARDS, SAMPLED[1]))
    for name, function in {"places": places, "adapter": adapters, "refused": refused, "mixed": mixed}.items():
        attempt(result, "spread", name, partial(function, folder))
    attempt(result, "graphs", "two steps of a bucket", partial(two_steps, folder))
    attempt(result, "graphs", "small blocks", partial(small_blocks, folder))
    for case in ("int8", "int4", "int4 zero point", "W8A8"):
        attempt(result, "products", case, partial(product, case))
    print(json.dumps(result))


def make(folder: Path) -> None:
    """Save a tiny model whose layers every quantized product takes, quantized copies, and a model with a third layer."""
    import torch

    from ivl.checkpoint import save_model, save_processor
    from ivl.checkpoint.convert import convert
    from ivl.model.vlm import VLM
    from ivl.processing.processor import Processor
    from ivl.processing.tokenizer import train_tokenizer
    from ivl.quant.layers import QuantConfig, QuantPlan
    from tests.conftest import tiny_config
    from tests.helpers.engines import enliven

    tokenizer = train_tokenizer(["what colour is the shape? red green blue yes no circle"] * 3, 304)
    decoder = replace(
        tiny_config().decoder, vocab_size=len(tokenizer), width=64, mlp_width=128, head_dim=16, max_positions=2048
    )
    config = replace(
        tiny_config(), decoder=decoder, image_token_id=tokenizer.id("<IMG_CONTEXT>"),
        eos_token_ids=(tokenizer.id("<|im_end|>"),), system_message="",
    )  # fmt: skip
    for name, layers in (("plain", 2), ("deep", 3)):
        config = replace(config, decoder=replace(decoder, num_layers=layers))
        torch.manual_seed(1)
        model = VLM(config).eval()
        model.init_weights()
        enliven(model)
        save_model(model, folder / name)
        save_processor(Processor(config, tokenizer), folder / name)
    int8, int4 = QuantConfig(bits=8), QuantConfig(bits=4, group=32)
    for name, scheme in {"int8": int8, "int4": int4, "W8A8": QuantConfig(bits=8, activations=True)}.items():
        convert(folder / "plain", folder / name, schemes=QuantPlan(language=scheme))


def engine_of(folder: Path, device: str, dtype: str, model: str = "plain") -> Any:
    from ivl.generators import LoadConfig
    from ivl.generators.local import load_engine

    options = LoadConfig(device=device, dtype=dtype)  # type: ignore[arg-type]
    return load_engine(folder / model, options, **SIZES)


def on_each(folder: Path, devices: tuple[str, ...], dtype: str, answer: Callable[[Any, Path], Any]) -> dict[str, Any]:
    model, _, dtype = dtype.rpartition(" ")
    return {device: answer(engine_of(folder, device, dtype, model or "plain"), folder) for device in devices}


def texts() -> list[Any]:
    from ivl import ask

    return [ask("what colour is the shape? " * n + tail) for n, tail in ((1, "red"), (3, ""), (9, "no"), (2, "yes"), (1, ""))]


def found(replies: list[Any]) -> list[Any]:
    return [[list(reply.tokens), reply.finish_reason, reply.num_cached] for reply in replies]


def greedy(engine: Any, folder: Path) -> Any:
    from ivl import SamplingParams

    return found(engine.generate(texts(), SamplingParams(max_new_tokens=12)))


def sampled(engine: Any, folder: Path) -> Any:
    from ivl import SamplingParams

    params = [SamplingParams(max_new_tokens=10, seed=n, ignore_eos=True, **options) for n, options in enumerate(SAMPLED)]
    return found(engine.generate([*texts(), texts()[0]], params))


def logprobs(engine: Any, folder: Path) -> Any:
    from ivl import SamplingParams

    params = [SamplingParams(max_new_tokens=4, logprobs=n, temperature=n / 4, seed=n) for n in range(3)]
    replies = engine.generate(texts()[:3], params)
    return [[[each.token, each.logprob, each.top] for each in reply.logprobs] for reply in replies]


def prefixes(engine: Any, folder: Path) -> Any:
    """Prompts that begin alike: in turn, at once, and the very same again."""
    from ivl import SamplingParams, ask

    long, params = "green blue circle yes no red " * 60, SamplingParams(max_new_tokens=6)
    asked = [ask(long + tail) for tail in ("red", "no", "blue? green!")]
    first = engine.generate(asked[:1], params)
    return found(first + engine.generate(asked, params) + engine.generate(asked[1:2], params))


def pictures(engine: Any, folder: Path) -> Any:
    from PIL import Image

    from ivl import SamplingParams, ask

    shown = [Image.new("RGB", size, color) for size, color in (((60, 30), "red"), ((30, 30), "blue"), ((30, 90), "green"))]
    asked = [ask("what colour?", *shown[:n]) for n in (1, 2, 3)] + [ask("red?", shown[1])]
    return found(engine.generate(asked, SamplingParams(max_new_tokens=8)))


def video(engine: Any, folder: Path) -> Any:
    from PIL import Image

    from ivl import SamplingParams, ask

    frames = folder / "frames"
    frames.mkdir(exist_ok=True)
    for n, color in enumerate(("red", "green", "blue", "white")):
        Image.new("RGB", (40, 30), color).save(frames / f"{n}.png")
    return found(engine.generate([ask("what is shown?", str(frames))], SamplingParams(max_new_tokens=8)))


def cancelled(engine: Any, folder: Path) -> Any:
    """Requests that come and go between steps."""
    from ivl import SamplingParams

    params = SamplingParams(max_new_tokens=12, ignore_eos=True)
    requests = [engine.submit(each, params) for each in texts()]
    for number in range(30):
        engine.step()
        if number in (3, 5):
            engine.cancel(requests[number - 2])
    stats = engine.stats()
    assert stats.running == stats.cache_blocks_used == 0
    return [[request.tokens, request.cancelled] for request in requests]


def guided(engine: Any, folder: Path) -> Any:
    from ivl import SamplingParams
    from ivl.types import Grammar

    guides = [Grammar("choice", '["red", "green"]'), None, Grammar("regex", "[0-9]{3}(yes|no)")]
    params = [SamplingParams(max_new_tokens=12, temperature=0.9, seed=n, guide=guide) for n, guide in enumerate(guides)]
    return found(engine.generate(texts()[:3], params))


def evaluated(engine: Any, folder: Path) -> Any:
    from ivl.evaluation.config import EvalConfig
    from ivl.evaluation.run import evaluate
    from tests.evaluation.test_run import Sums

    predictions = folder / f"{engine.model.device}.jsonl"
    report = evaluate(Sums(), engine, EvalConfig(batch_size=8, limit=12), model="m", predictions=predictions)
    rows = [json.loads(line) for line in predictions.read_text().splitlines()]
    return [report["value"], report["n"], [row.get("reply") for row in rows]]


CASES: dict[str, tuple[str, Callable[[Any, Path], Any]]] = {
    "greedy": ("float32", greedy), "greedy half": ("float16", greedy), "sampled": ("float32", sampled),
    "sampled half": ("float16", sampled), "logprobs": ("float32", logprobs), "prefixes": ("float32", prefixes),
    "prefixes half": ("float16", prefixes), "pictures": ("float32", pictures), "pictures half": ("float16", pictures),
    "video": ("float16", video), "cancelled": ("float16", cancelled), "guided": ("float32", guided),
    "evaluated": ("float16", evaluated), "int8": ("int8 float32", greedy), "int4": ("int4 float32", greedy),
    "W8A8": ("W8A8 float32", greedy), "deep": ("deep float32", prefixes),
}  # fmt: skip
"""The dtype, behind the model where it is not the plain one, and what is asked."""
SPREAD = ("greedy half", "sampled", "prefixes half", "pictures half", "cancelled", "int8", "int4", "W8A8", "deep")
"""The cases that two cards answer, too."""


def waits(folder: Path, device: str, options: dict[str, Any]) -> dict[str, int]:
    """What the host waits for in a step that decodes four replies."""
    from ivl import SamplingParams
    from tests.helpers.waits import Waits

    engine = engine_of(folder, device, "float16")
    params = [SamplingParams(max_new_tokens=20, ignore_eos=True, seed=n, **options) for n in range(4)]
    requests = [engine.submit(each, one) for each, one in zip(texts(), params, strict=False)]
    for _ in range(4):
        engine.step()
    with Waits() as seen:
        engine.step()
    assert all(len(request.tokens) == 5 for request in requests)
    return dict(seen.found)


def two_steps(folder: Path) -> dict[str, Any]:
    """A graph that served three replies of other lengths each time, and what the steps gave."""
    from ivl import SamplingParams
    from tests.helpers import card_graphs

    engine = engine_of(folder, "cuda:1", "float16")  # not the current card
    card_graphs.graphs.clear()
    requests = [engine.submit(each, SamplingParams(max_new_tokens=20, ignore_eos=True)) for each in texts()[:3]]
    traces = []
    for _ in range(8):
        engine.step()
        if card_graphs.graphs:
            traces.append(card_graphs.graphs[0].trace())
    assert all(len(request.tokens) == 8 for request in requests)
    return {
        "graphs": len(card_graphs.graphs), "replays": card_graphs.graphs[0].replays, "operations": len(traces[0]),
        "equal": all(trace == traces[0] for trace in traces), "traces": len(traces),
    }  # fmt: skip


def places(folder: Path) -> dict[str, Any]:
    """Where layers, their cache and the rest lie, and the copies between cards in a step that decodes four replies."""
    from ivl import SamplingParams
    from tests.helpers.waits import Moves

    engine = engine_of(folder, TWO_CARDS, "float16", "deep")
    layers = [{str(p.device) for p in layer.parameters()} for layer in engine.model.decoder.layers]
    others = {str(p.device) for name, p in engine.model.named_parameters() if not name.startswith("decoder.layers.")}
    for each in texts()[:4]:
        engine.submit(each, SamplingParams(max_new_tokens=20, ignore_eos=True))
    for _ in range(4):
        engine.step()
    with Moves() as moves:
        engine.step()
    return {
        "layers": [*map(list, layers)], "others": list(others), "moves": moves.found,
        "cache": [[str(store.keys.device), len(store.keys)] for store in engine.cache.stores],
    }  # fmt: skip


def adapters(folder: Path) -> list[Any]:
    """Replies with an adapter, by device."""
    import torch

    from ivl.checkpoint import load_model
    from ivl.checkpoint.adapter import save_adapter
    from ivl.config import LoraConfig
    from ivl.generators import LoadConfig
    from ivl.generators.local import load_engine
    from ivl.lora.layers import add_lora

    model = load_model(folder / "plain")
    add_lora(model, LoraConfig(rank=4, targets=("decoder.layers", "decoder.head")))
    generator = torch.Generator().manual_seed(2)
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            parameter.data.normal_(std=0.3, generator=generator)
    save_adapter(model, folder / "adapter")
    options = [LoadConfig(device=device, dtype="float32", adapter=(str(folder / "adapter"),)) for device in ("cpu", TWO_CARDS)]
    return [greedy(load_engine(folder / "plain", each, **SIZES), folder) for each in options]


def refused(folder: Path) -> dict[str, str]:
    """What is said of devices that cannot be had, by what was asked for."""
    from ivl.errors import InputError
    from ivl.generators import LoadConfig
    from ivl.generators.local import load_engine

    said = {}
    for device in ("cuda:0,cpu", "cuda,cuda:1", "cuda:1,cuda:1", "cuda:0,cuda:4", "cuda:0,", "cuda:0,cuda:1,cuda:2,cuda:3"):
        try:
            load_engine(folder / "deep", LoadConfig(device=device))
        except InputError as error:
            said[device] = str(error)
    for options in ({"tensor_parallel": 2}, {"max_cache_tokens": 1 << 28}):
        try:
            config = LoadConfig(device=TWO_CARDS, tensor_parallel=options.pop("tensor_parallel", 1))
            load_engine(folder / "deep", config, **options)
        except InputError as error:
            said["tensor ranks" if config.tensor_parallel > 1 else "cache"] = str(error)
    return said


def mixed(folder: Path) -> str:
    """What the devices say of two cards in one call, without which nothing here could fail."""
    import torch

    try:
        torch.ones(2, device="cuda:0") + torch.ones(2, device="cuda:1")
    except RuntimeError as error:
        return str(error).splitlines()[0]
    return ""


def small_blocks(folder: Path) -> str:
    """What is said of blocks that are no pages."""
    from ivl.errors import InputError
    from ivl.inference.engine import Engine

    engine = engine_of(folder, "cuda", "float16")
    try:
        Engine(engine.model, engine.processor, block_size=64)
    except InputError as error:
        return str(error)
    return ""


def product(case: str) -> dict[str, Any]:
    """The largest difference of a quantized layer on the card from the product with the matrix that it stands for."""
    import torch

    from ivl.gpu.quantized import prepare_layer
    from ivl.quant.layers import QuantConfig, QuantLinear, quantize

    configs = {
        "int8": QuantConfig(bits=8), "int4": QuantConfig(bits=4, group=64), "W8A8": QuantConfig(bits=8, activations=True),
        "int4 zero point": QuantConfig(bits=4, group=32, symmetric=False),
    }  # fmt: skip
    config, generator = configs[case], torch.Generator().manual_seed(0)
    layer = QuantLinear(256, 48, config, bias=True)
    layer.weight, layer.scale, layer.zero = quantize(torch.randn(48, 256, generator=generator), config)
    layer.bias = torch.nn.Parameter(torch.randn(48, generator=generator).bfloat16(), requires_grad=False)
    inputs = [torch.randn(rows, 256, generator=generator).bfloat16() for rows in (1, 5, 100)]
    wanted = [x.float() @ layer.matrix().float().t() + layer.bias.float() for x in inputs]
    layer = layer.to("cuda")
    prepare_layer(layer)
    off = [float((layer(x.to("cuda")).cpu().float() - y).norm() / y.norm()) for x, y in zip(inputs, wanted, strict=True)]
    return {"class": type(layer).__name__, "off": off}


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
