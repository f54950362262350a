"""What a card does here: `make gpu-check`, or `python -m benchmarks.gpu`. At most ten minutes, one report as text and JSON.

Each section says what it compared and found, or why it was left out: without a card there is nothing to compare, and a
pretended one (tests/helpers/pretend.py) has values but neither kernels nor speed. Rates stand beside the rates that this card
reaches in a plain product and a plain copy, measured in the same minute.

The last section starts itself once more on every card, by torchrun.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch

from benchmarks.tasks import CONTEXT, SIZE, decode_bytes, tile_flops, tokens_flops
from benchmarks.wordless import TokenIds
from ivl import gpu
from ivl.config import ModelConfig, published_config
from ivl.inference.engine import Engine
from ivl.model.vlm import VLM
from ivl.types import IGNORE, Batch, Layout, Prompt, SamplingParams

Needs = Literal["a card", "a real card", "several cards"]
CARD = torch.device("cuda", 0)


class LeftOut(Exception):
    """Raised by a section that this machine cannot answer; the message says why."""


@dataclass
class Check:
    """The machine, the model's size, and what was found. good: whether a row is as it should be, None where nothing decides."""

    size: str
    deadline: float
    rows: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    limits: dict[str, float] = field(default_factory=dict[str, float])
    section: str = ""

    def add(self, name: str, value: object, good: bool | None = None) -> None:
        self.rows.append({"section": self.section, "name": name, "value": value, "good": good})
        mark = {True: "ok  ", False: "BAD ", None: "    "}[good]
        shown = f"{value:,.4g}" if isinstance(value, float) else str(value)
        print(f"{mark}{self.section:16}{name:52}{shown}", flush=True)

    @property
    def config(self) -> ModelConfig:
        return small() if self.size == "tiny" else published_config(self.size)


def small() -> ModelConfig:
    """A model of two layers with heads of 64, which every kernel takes."""
    whole = published_config("1B")
    vision = replace(whole.vision, width=128, num_layers=2, mlp_width=256, num_heads=2, image_size=56, patch_size=14)
    decoder = replace(
        whole.decoder, vocab_size=512, width=256, num_layers=2, mlp_width=512, num_heads=4, num_kv_heads=2, head_dim=64,
        max_positions=4096,
    )  # fmt: skip
    tiling = replace(whole.tiling, tile_size=56)
    tokens = {"image_token_id": 500, "eos_token_ids": (511,), "pad_token_id": 510}
    return replace(whole, vision=vision, decoder=decoder, tiling=tiling, **tokens)


def model_of(config: ModelConfig, device: torch.device | str, dtype: torch.dtype) -> VLM:
    """Random weights, the same on every device for a small model, and large enough that its replies vary."""
    torch.manual_seed(0)
    model = VLM(config).to(dtype) if config.decoder.num_layers == 2 else _built_on(config, device, dtype)
    model.init_weights()
    if config.decoder.num_layers == 2:
        with torch.no_grad():
            for parameter in (*model.projector.parameters(), *model.decoder.parameters()):
                if parameter.ndim == 2:
                    parameter.mul_(4)
    return model.to(device).eval()


def _built_on(config: ModelConfig, device: torch.device | str, dtype: torch.dtype) -> VLM:
    with torch.device("meta"):
        model = VLM(config).to(dtype)
    return model.to_empty(device=device)


class WithoutWords:
    """A processor for prompts that are made beforehand."""

    tokenizer = TokenIds()


def engine_of(model: VLM, **options: int) -> Engine:
    engine = Engine(model, WithoutWords(), **options)  # type: ignore[arg-type]
    return gpu.accelerate(engine) if model.device.type == "cuda" else engine


def prompt(config: ModelConfig, length: int, seed: int, tiles: int = 0) -> Prompt:
    generator, side = torch.Generator().manual_seed(seed), config.tiling.tile_size
    tokens_T = torch.randint(0, config.decoder.vocab_size - 20, (length,), generator=generator)
    tokens_T[tokens_T == config.image_token_id] = 0
    tokens_T[1 : 1 + tiles * config.tokens_per_tile] = config.image_token_id
    pixels = torch.randint(0, 256, (tiles, side, side, 3), dtype=torch.uint8, generator=generator)
    return Prompt(tokens_T, pixels, torch.arange(tiles))


def replies(engine: Engine, prompts: list[Prompt], params: SamplingParams) -> list[list[int]]:
    requests = [engine.prepare_all(each, [replace(params, seed=n)])[0] for n, each in enumerate(prompts)]
    for request in requests:
        engine.add(request)
    while any(request.finish_reason is None and request.failure is None for request in requests):
        engine.step()
    for request in requests:
        if request.failure is not None:
            raise request.failure
    return [request.tokens for request in requests]


# Sections


def machine(check: Check) -> None:
    check.add("torch", torch.__version__)
    check.add("card", torch.cuda.get_device_name(CARD))
    free, total = torch.cuda.mem_get_info(CARD)
    check.add("memory GiB, free of", f"{free / 2**30:.1f} of {total / 2**30:.1f}")


def correctness(check: Check) -> None:
    """A small model on the card beside the same on the CPU."""
    config = small()
    shapes = ((40, 2), (300, 0), (9, 1), (700, 3))
    prompts = [prompt(config, length, seed, tiles) for seed, (length, tiles) in enumerate(shapes)]
    params = SamplingParams(max_new_tokens=12, ignore_eos=True)
    sampling = replace(params, temperature=0.8, top_p=0.9, top_k=50, repetition_penalty=1.1)
    on_cpu = engine_of(model_of(config, "cpu", torch.float32), block_size=256, max_cache_tokens=8192)
    on_card = engine_of(model_of(config, CARD, torch.float32), max_cache_tokens=8192)
    for name, asked in (("greedy", params), ("sampled", sampling)):
        ours, theirs = replies(on_card, prompts, asked), replies(on_cpu, prompts, asked)
        same = sum(a == b for one, other in zip(ours, theirs, strict=True) for a, b in zip(one, other, strict=True))
        check.add(f"{name} tokens equal in float32, of {12 * len(prompts)}", same, same >= 10 * len(prompts))
    half = model_of(config, CARD, torch.bfloat16)
    exact, tokens = on_cpu.model, prompts[1].tokens_T
    with torch.inference_mode():
        layout = Layout.packed((len(tokens),))
        wanted = exact.head(exact(tokens, layout))
        found = half.head(half(tokens.to(CARD), layout)).float().cpu()
    off = float((found - wanted).norm() / wanted.norm())
    check.add("relative error of logits in bfloat16", off, off < 0.05)
    losses = [train_losses(model_of(config, device, torch.float32), config, device, "fp32", 3)[0] for device in (CARD, "cpu")]
    off = max(abs(a - b) for a, b in zip(*losses, strict=True))
    check.add("largest difference of the loss in 3 steps, float32", off, off < 2e-3)


def attention(check: Check) -> None:
    """Flash attention over pages beside scaled_dot_product_attention, and their times."""
    from ivl.model.attention import SDPA, VARLEN, attend
    from ivl.model.cache import CachedSequence, PagedCache

    config = check.config.decoder
    dtype = torch.bfloat16
    for name, past, new in (("decoding", (900, 20, 300, 511), (1,) * 4), ("mixed", (900, 0, 300, 511), (1, 200, 30, 1))):
        outs, calls = [], []
        for backend in (VARLEN, SDPA):
            generator = torch.Generator().manual_seed(0)
            cache = PagedCache(replace(config, num_layers=1), num_tokens=4096, block_size=256, dtype=dtype, device=CARD)
            sequences = [CachedSequence() for _ in past]
            for lens in (past, new):
                some = [(sequence, n) for sequence, n in zip(sequences, lens, strict=True) if n]
                step = cache.step([sequence for sequence, _ in some], tuple(n for _, n in some))
                shape = (sum(lens), config.num_heads + 2 * config.num_kv_heads, config.head_dim)
                heads = (config.num_heads, config.num_kv_heads, config.num_kv_heads)
                q, k, v = torch.randn(shape, generator=generator).to(CARD, dtype).split(heads, dim=1)
                with torch.inference_mode():
                    out = attend(q, k, v, step.layout, step, 0, backend)
            outs.append(out.float().cpu())
            calls.append(lambda q=q, k=k, v=v, step=step, backend=backend: attend(q, k, v, step.layout, step, 0, backend))
        off = float((outs[0] - outs[1]).abs().max())
        check.add(f"{name}: largest difference", off, off < 0.02)
        if is_real():
            times = [milliseconds(call) for call in calls]
            check.add(f"{name}: ms by pages, by kind", f"{times[0]:.3f}, {times[1]:.3f}", times[0] < times[1])


def products(check: Check) -> None:
    """Quantized layers beside the matrices that they stand for, and beside bfloat16 in time."""
    from ivl.gpu.quantized import prepare_layer
    from ivl.quant.layers import QuantConfig, QuantLinear, quantize

    config = check.config.decoder
    width, rows = config.width, config.mlp_width
    schemes = (QuantConfig(bits=8), QuantConfig(bits=8, activations=True), QuantConfig(bits=4, group=32))
    for scheme in schemes:
        matrix = torch.randn(rows, width, generator=torch.Generator().manual_seed(0)) / 30
        layer = QuantLinear(width, rows, scheme, bias=False)
        layer.weight, layer.scale, layer.zero = quantize(matrix, scheme)
        stands_for = layer.matrix().float()
        product = layer.to(CARD)
        prepare_layer(product)
        for tokens in (1, 256):
            x = torch.randn(tokens, width, generator=torch.Generator().manual_seed(1)).bfloat16()
            wanted = x.float() @ stands_for.t()
            with torch.inference_mode():
                off = float((product(x.to(CARD)).float().cpu() - wanted).norm() / wanted.norm())
            check.add(f"{scheme.name}, {tokens} tokens, {type(product).__name__}: error", off, off < 0.02)
            if is_real():
                y, weight = x.to(CARD), stands_for.to(CARD, torch.bfloat16)
                ours, plain = milliseconds(partial(product, y)), milliseconds(partial(torch.nn.functional.linear, y, weight))
                check.add(f"{scheme.name}, {tokens} tokens: ms, bfloat16", f"{ours:.4f}, {plain:.4f}")


def graphs(check: Check) -> None:
    """Captured decoding steps beside the decoder's own way."""
    from ivl.gpu import graphs as captured

    config, tokens, rates = small(), {}, {}
    params = SamplingParams(max_new_tokens=24, ignore_eos=True)
    prompts = [prompt(config, length, length) for length in (30, 31, 90)]
    before = captured.PATIENCE
    try:
        for name, patience in (("captured", 1), ("not captured", 10**9)):
            captured.PATIENCE = patience
            engine = engine_of(model_of(config, CARD, torch.bfloat16), max_cache_tokens=8192)
            tokens[name] = replies(engine, prompts, params)
            rates[name] = decode_rate(engine, config, 3, 40, 16) if is_real() else 0.0
    finally:
        captured.PATIENCE = before
    same = tokens["captured"] == tokens["not captured"]
    check.add("captured steps give the same tokens", same, same)
    if is_real():
        shown = f"{rates['captured']:,.0f}, {rates['not captured']:,.0f}"
        check.add("tokens/s of 3 small replies: captured, not", shown, rates["captured"] > rates["not captured"])


def compiled(check: Check) -> None:
    config = check.config
    seconds: dict[bool, float] = {}
    for on in (False, True):
        losses, times = train_losses(model_of(config, CARD, torch.float32), config, CARD, "bf16", 6, compiled=on)
        seconds[on] = median(times[3:])
        check.add(f"loss after 6 steps{', compiled' if on else ''}", losses[-1])
    check.add("training step compiled: times as fast", seconds[False] / seconds[True], seconds[True] < seconds[False])


def limits(check: Check) -> None:
    """The card's rates in a plain product and a plain copy, as the measure of what follows."""
    side = 128 if check.size == "tiny" else 8192
    a = torch.randn(side, side, device=CARD, dtype=torch.bfloat16)
    check.limits["flops"] = 2 * side**3 / milliseconds(lambda: a @ a) * 1e3
    block = torch.empty(16 * side**2, device=CARD, dtype=torch.uint8)
    check.limits["bytes"] = 2 * block.nbytes / milliseconds(block.clone) * 1e3
    check.add("bfloat16 TFLOP/s", check.limits["flops"] / 1e12)
    check.add("GB/s", check.limits["bytes"] / 1e9)


def inference(check: Check) -> None:
    config = check.config
    engine = engine_of(model_of(config, CARD, torch.bfloat16), max_batch_tokens=8192, max_cache_tokens=64 * 1024)
    length = 300 if check.size == "tiny" else 6000
    replies(engine, [prompt(config, length, 1)], SamplingParams(max_new_tokens=1))
    seconds = timed(lambda: replies(engine, [prompt(config, length, 2)], SamplingParams(max_new_tokens=1)))
    share = tokens_flops(config, length, 1) / seconds / check.limits["flops"]
    check.add(f"prompt of {length}: tokens/s, share of the product's rate", f"{length / seconds:,.0f}, {share:.0%}")
    tiles = prompt(config, 13 * config.tokens_per_tile + 2, 3, 13).tiles_GSSC
    engine.model.encode_tiles(tiles)
    with torch.inference_mode():
        seconds = timed(lambda: engine.model.encode_tiles(tiles))
    share = 13 * tile_flops(config) / seconds / check.limits["flops"]
    check.add("tiles/s, share of the product's rate", f"{13 / seconds:,.0f}, {share:.0%}")
    for batch in (1, 4) if check.size == "tiny" else (1, 8, 64):
        rate = decode_rate(engine, config, batch, CONTEXT, 48)
        share = decode_bytes(config, batch) * rate / batch / check.limits["bytes"]
        check.add(f"{batch} replies: tokens/s, share of the copy's rate", f"{rate:,.0f}, {share:.0%}")


def serving_plan(check: Check) -> None:
    """What `ivl plan --serve` says of this card, beside an engine that holds the model."""
    from ivl.parallel.cards import CARDS
    from ivl.serve.plan import plan_serving

    config, batch, context = check.config, 4 if check.size == "tiny" else 8, 512
    called, total = torch.cuda.get_device_name(CARD).lower().replace(" ", ""), torch.cuda.mem_get_info(CARD)[1]
    alike = [name for name in CARDS if name.partition("-")[0] in called] or list(CARDS)
    card = min(alike, key=lambda name: abs(CARDS[name].size - total))
    plan = plan_serving(config, card, context=context, batch=batch, parallel=1)[0]
    engine = engine_of(model_of(config, CARD, torch.bfloat16), max_cache_tokens=batch * context)
    weights, cache = sum(p.nbytes for p in engine.model.parameters()), 2 * engine.cache.keys.nbytes
    for name, held, planned in (("weights", weights, plan.weights), ("cache", cache, plan.cache)):
        shown = f"{held / 2**30:.4f}, {planned / 2**30:.4f}"
        check.add(f"GiB of {name}, planned for {card}", shown, 0.99 < held / planned < 1.02)
    if is_real():
        rate = decode_rate(engine, config, batch, context - 64, 48)
        check.add(f"{batch} replies: tokens/s, planned", f"{rate:,.0f}, {plan.tokens_per_second:,.0f}")


def beside_transformers(check: Check) -> None:
    """Decoding and training of transformers' InternVL with the same shapes."""
    if check.size != SIZE:
        raise LeftOut(f"it is compared at --size {SIZE}")
    try:
        from benchmarks.tasks import their_model

        with CARD:
            model = their_model(torch.bfloat16)
    except ImportError as error:
        raise LeftOut(f"transformers is not installed ({error})") from error
    finally:
        torch.set_default_dtype(torch.float32)
    config = check.config
    for batch in (1, 8, 64):
        ids = torch.stack([prompt(config, CONTEXT, n).tokens_T for n in range(batch)]).to(CARD)
        with torch.inference_mode():
            cache = model(input_ids=ids, use_cache=True, logits_to_keep=1).past_key_values

            def decode(tokens: torch.Tensor = ids[:, :1], cache: Any = cache) -> None:
                for _ in range(48):
                    tokens = model(input_ids=tokens, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)

            decode()
            check.add(f"{batch} replies: tokens/s", f"{48 * batch / timed(decode):,.0f}")
    batch = batch_of(config, (1024,) * 4, 0)
    ids, labels = (x.view(4, -1).to(CARD) for x in (batch.tokens_T, batch.labels_T))
    model.train()

    def train() -> None:
        model(input_ids=ids, labels=labels, use_cache=False).loss.backward()
        model.zero_grad(set_to_none=True)

    train()
    check.add("training: text tokens/s, forward and backward only", f"{4096 / median(timed(train) for _ in range(5)):,.0f}")


def training(check: Check) -> None:
    """Steps of one pack, with the optimizer; its memory beside the plan's."""
    config = check.config
    torch.cuda.reset_peak_memory_stats(CARD)
    _, times = train_losses(model_of(config, CARD, torch.float32), config, CARD, "bf16", 8)
    lens, tiles = pack_of(config)
    seconds, tokens = median(times[3:]), sum(lens)
    flops = 3 * (sum(tokens_flops(config, n, n) for n in lens) + tiles * tile_flops(config))
    share = flops / seconds / check.limits["flops"]
    check.add("tokens/s, share of the product's rate", f"{tokens / seconds:,.0f}, {share:.0%}")
    peak = torch.cuda.max_memory_allocated(CARD)
    check.add("peak memory GiB", peak / 2**30)
    try:
        planned = planned_bytes(config, tokens, tiles)
    except Exception as error:  # the planner's faults are no faults of the card
        check.add("planned GiB", f"no plan: {str(error)[:200]}")
        return
    check.add("planned GiB", planned / 2**30, 0.6 < peak / planned < 1.15)


def several(check: Check) -> None:
    """FSDP2 and tensor parallelism on all cards beside replicas, and a run that is stopped, cut back and resumed."""
    count = torch.cuda.device_count() or 2
    with TemporaryDirectory() as name:
        folder = Path(name)
        write_run(folder)
        for part in ("losses", "run", "resume"):
            command = ["torchrun", "--standalone", "--nproc-per-node", str(count), "-m", "benchmarks.gpu", "--ranks", part]
            left, environment = max(check.deadline - time.monotonic(), 1), os.environ | {"OMP_NUM_THREADS": "1"}
            done = subprocess.run([*command, "--out", name], timeout=left, env=environment, capture_output=True, text=True)
            if done.returncode:
                causes = [line for line in done.stderr.splitlines() if "Error: " in line and "ChildFailed" not in line]
                raise RuntimeError(f"{part}: {causes[0] if causes else done.stderr.strip()[-300:]}")
        losses = json.loads((folder / "losses.json").read_text())
        for kind, found in losses.items():
            off = max(abs(a - b) for a, b in zip(found, losses["replicas"], strict=True))
            check.add(f"{count} cards, {kind}: largest difference of the loss", off, off < 2e-3)
        first, again = ([json.loads(row)["loss"] for row in (folder / each).read_text().splitlines()] for each in METRICS)
        off = max(abs(a - b) for a, b in zip(first, again, strict=True))
        check.add(f"{count} cards, resumed from a checkpoint: difference", off, off < 1e-4)


METRICS = ("first.jsonl", "run/metrics.jsonl")


def write_run(folder: Path) -> None:
    """Write what the run of `ranks` reads: a model to start from, and rows of text."""
    from ivl.checkpoint import save_model, save_processor
    from ivl.processing.processor import Processor
    from ivl.processing.tokenizer import train_tokenizer

    words = ["what", "colour", "is", "the", "shape?", "red", "green", "blue", "yes", "no", "circle"]
    tokenizer = train_tokenizer([" ".join(words)] * 3, 300)
    config = replace(small(), image_token_id=tokenizer.id("<IMG_CONTEXT>"), eos_token_ids=(tokenizer.id("<|im_end|>"),))
    save_model(model_of(config, "cpu", torch.float32), folder / "start")
    save_processor(Processor(config, tokenizer), folder / "start")
    turns = [{"from": "human", "value": " ".join(words[: n % 7 + 2])} for n in range(64)]
    rows = [{"id": n, "conversations": [turn, {"from": "gpt", "value": words[n % 11]}]} for n, turn in enumerate(turns)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def ranks(part: str, folder: Path) -> None:
    """What torchrun runs on each card."""
    from ivl.parallel.launch import start_world, stop_world
    from ivl.parallel.shard import shard
    from ivl.parallel.tensor import split

    if part != "losses":
        _run(folder, resume=part == "resume")
        return
    world, losses = start_world("auto", folder), {}
    for kind in ("replicas", "FSDP2", *(["tensor parallel"] if world.size % 2 == 0 else [])):
        model, ours = model_of(small(), world.device, torch.float32), world
        if kind == "FSDP2":
            shard(model, ours)
        elif kind == "tensor parallel":
            ours = world.arranged(tensor=2)
            split(model, ours)
        losses[kind] = train_losses(model, small(), world.device, "fp32", 4, world=ours)[0]
    if world.is_main:
        (folder / "losses.json").write_text(json.dumps(losses))
    stop_world(world)


def _run(folder: Path, *, resume: bool) -> None:
    """Train a sharded model with checkpoints; once more from the checkpoint in the middle."""
    from ivl.data.config import DataConfig
    from ivl.runs.config import RunConfig
    from ivl.runs.run import run
    from ivl.train.config import Stage, TrainConfig

    size, first = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"]) == 0
    data = DataConfig(mixture=str(folder / "rows.jsonl"), max_tokens=256, num_workers=0)
    train = TrainConfig(num_steps=4, save_every=2, packs_per_step=size, precision="fp32", tensorboard=False, log_every=10**6)
    config = RunConfig(
        name="gpu", out_dir=str(folder / "run"), model=str(folder / "start"), stage=Stage(trainable=("decoder",)),
        data=data, train=train, shard=True,
    )  # fmt: skip
    run(config, resume=resume)
    if first and not resume:
        shutil.copy(folder / "run" / "metrics.jsonl", folder / "first.jsonl")
        shutil.rmtree(folder / "run" / "checkpoint-4")


# Means


def is_real() -> bool:
    return torch.version.cuda is not None or torch.version.hip is not None


def timed(function: Callable[[], object]) -> float:
    torch.cuda.synchronize(CARD)
    started = time.perf_counter()
    function()
    torch.cuda.synchronize(CARD)
    return time.perf_counter() - started


def milliseconds(function: Callable[[], object], repeats: int = 20) -> float:
    with torch.inference_mode():
        function()
        return timed(lambda: [function() for _ in range(repeats)]) / repeats * 1e3


def decode_rate(engine: Engine, config: ModelConfig, batch: int, length: int, steps: int) -> float:
    """Tokens a second of so many replies at once, prompts read already."""
    params = SamplingParams(max_new_tokens=steps + 8, ignore_eos=True)
    requests = [engine.prepare_all(prompt(config, length, 100 + n), [params])[0] for n in range(batch)]
    for request in requests:
        engine.add(request)
    while any(len(request.tokens) < 3 for request in requests):
        engine.step()
    seconds = timed(lambda: [engine.step() for _ in range(steps)])
    for request in requests:
        engine.cancel(request)
    return batch * steps / seconds


def pack_of(config: ModelConfig) -> tuple[tuple[int, ...], int]:
    """Lengths and tiles of a pack."""
    return ((60, 30, 20), 2) if config.decoder.num_layers == 2 else ((4096, 2048, 1500, 548), 12)


def batch_of(config: ModelConfig, lens: tuple[int, ...], tiles: int, seed: int = 0) -> Batch:
    """A pack of random samples whose second halves are trained; the first sample has the tiles."""
    parts = [prompt(config, n, 7 * seed + k, tiles if k == 0 else 0) for k, n in enumerate(lens)]
    tokens_T = torch.cat([each.tokens_T for each in parts])
    labels = [torch.cat([each.tokens_T[1:], torch.tensor([IGNORE])]) for each in parts]
    for each, length in zip(labels, lens, strict=True):
        each[: length // 2] = IGNORE
    labels_T = torch.cat(labels)
    labels_T[labels_T == config.image_token_id] = IGNORE
    return Batch(
        tokens_T, labels_T, (labels_T != IGNORE).float(), parts[0].tiles_GSSC, torch.arange(tiles), Layout.packed(lens),
        ids=tuple(f"{seed}-{k}" for k in range(len(lens))), datasets=("a",) * len(lens), sample_lens=lens,
    )  # fmt: skip


@dataclass
class Packs:
    """Batches in memory without end."""

    config: ModelConfig

    def __iter__(self) -> Iterator[Batch]:
        lens, tiles = pack_of(self.config)
        batches = [batch_of(self.config, lens, tiles, seed) for seed in range(2)]
        while True:
            yield from batches

    def state(self) -> dict[str, Any]:
        return {}

    def restore(self, state: list[dict[str, Any]]) -> None:
        pass


def train_losses(
    model: VLM, config: ModelConfig, device: torch.device | str, precision: Any, steps: int, *, compiled: bool = False,
    world: Any = None,
) -> tuple[list[float], list[float]]:  # fmt: skip
    """Train, and return the loss and the seconds of each step."""
    from ivl.parallel.compile import compile_layers
    from ivl.train.config import OptimConfig, Stage, TrainConfig
    from ivl.train.loop import train
    from ivl.train.recorder import Recorder
    from ivl.train.stage import apply_stage
    from ivl.train.world import World

    world = world or World(device=torch.device(device))
    apply_stage(model, Stage(trainable=("vision", "projector", "decoder")))
    if compiled:
        compile_layers(model)
    train_config = TrainConfig(
        optim=OptimConfig(lr=1e-4), num_steps=steps, precision=precision, tensorboard=False, log_every=10**6,
        packs_per_step=world.data_size,
    )  # fmt: skip
    marks: list[float] = []

    def stop() -> bool:
        marks.append(time.perf_counter())
        return False

    quiet = Recorder("gpu", train_config, on=False)
    history = train(model, Packs(config), train_config, world=world, recorder=quiet, stop=stop)
    marks.append(time.perf_counter())
    return [row["loss"] for row in history], [b - a for a, b in pairwise(marks)]


def planned_bytes(config: ModelConfig, tokens: int, tiles: int) -> float:
    from ivl.data.config import DataConfig
    from ivl.runs.config import RunConfig
    from ivl.runs.plan import Machines, plan_ranks
    from ivl.train.config import Stage, TrainConfig

    data = DataConfig(mixture="none.jsonl", max_tokens=tokens, max_tiles=tiles)
    stage, train = Stage(trainable=("vision", "projector", "decoder")), TrainConfig(num_steps=8, precision="bf16")
    run = RunConfig(name="gpu", architecture=config, tokenizer="none", stage=stage, data=data, train=train)
    return plan_ranks(run, Machines(gpus=1)).peak


SECTIONS: tuple[tuple[str, Needs, Callable[[Check], None]], ...] = (
    ("machine", "a card", machine),
    ("correctness", "a card", correctness),
    ("attention", "a card", attention),
    ("products", "a card", products),
    ("graphs", "a card", graphs),
    ("serving plan", "a card", serving_plan),
    ("limits", "a real card", limits),
    ("inference", "a real card", inference),
    ("training", "a real card", training),
    ("transformers", "a real card", beside_transformers),
    ("compile", "a real card", compiled),
    ("cards", "several cards", several),
)


def missing(needs: Needs) -> str:
    """Why this machine cannot run a section; empty if it can."""
    if not torch.cuda.is_available():
        return "this machine has no card"
    if needs != "a card" and not is_real():
        return "it needs a real card, and this one is pretended"
    if needs == "several cards" and torch.cuda.device_count() < 2:
        return "it needs several cards, and this machine has one"
    return ""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--size", default=SIZE, help=f"a published size, by default {SIZE}; tiny for a test")
    parser.add_argument("--minutes", type=float, default=10.0, help="sections that would begin later are left out")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu.json"), help="the report; its text goes beside it")
    parser.add_argument("--ranks", help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.ranks:
        ranks(args.ranks, args.out)
        return 0
    args.out.parent.mkdir(parents=True, exist_ok=True)
    check = Check(args.size, time.monotonic() + args.minutes * 60)
    for check.section, needs, function in SECTIONS:
        reason = missing(needs) or ("the time is up" if time.monotonic() > check.deadline else "")
        try:
            if reason:
                raise LeftOut(reason)
            function(check)
        except LeftOut as left_out:
            check.add("left out", str(left_out))
        except Exception as error:  # a section that fails must not hide the others
            place = traceback.extract_tb(error.__traceback__)[-1]
            name = f"{Path(place.filename).name}:{place.lineno}"
            check.add("failed", f"{type(error).__name__} at {name}: {str(error).strip()[:300]}", good=False)
        finally:
            if is_real() and torch.cuda.is_available():
                torch.cuda.empty_cache()
    bad = [row for row in check.rows if row["good"] is False]
    report = {"torch": torch.__version__, "size": args.size, "limits": check.limits, "rows": check.rows}
    args.out.write_text(json.dumps(report, indent=2, default=str) + "\n")
    text = [f"{row['section']:16}{row['name']:52}{row['value']}{'  BAD' if row['good'] is False else ''}" for row in check.rows]
    args.out.with_suffix(".txt").write_text("\n".join(text) + "\n")
    print(f"{len(check.rows)} rows, {len(bad)} of them bad; written to {args.out} and {args.out.with_suffix('.txt')}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
