"""Times of one model at one level of the processor: `IVL_CPU=avx2 python -m benchmarks.cpu_steps MODEL --dtype bfloat16`.

Prints the seconds of a tile and of a prompt of 300 tokens, of a decoding step for 1 and 8 replies, and the peak memory; the
better of two runs each. `--rows` times products of few rows instead, with one and with four weight rows read together.
`python -m benchmarks.against_commit --layers 6` makes models of InternVL2.5-1B's shape in runs/against_commit/6-layers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
import tyro

import ivl
from benchmarks.against_commit import best
from benchmarks.machine import processor_name
from ivl.cpu.kernels import dense, features, ops
from ivl.cpu.kernels.launch import address_of
from ivl.generators import Dtype
from ivl.model.cache import CachedSequence, PagedCache
from ivl.quant.layers import QuantConfig, quantize
from ivl.utils.machine import peak_memory_gb

PROMPT, STEPS = 300, 8
OUT, WIDTH = 40_000, 896


@dataclass(kw_only=True)
class Options:
    model: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="MODEL")] = ""
    """Directory of a model."""
    dtype: Dtype = "auto"
    threads: int = 2
    rows: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Time products of few rows, without a model."""


@torch.inference_mode()
def steps(options: Options) -> None:
    model = ivl.load(options.model, dtype=options.dtype, device="cpu").engine.model
    size = model.config.tiling.tile_size
    tile = torch.randint(0, 256, (1, size, size, 3), dtype=torch.uint8)
    prompt = torch.randint(0, min(1000, model.config.decoder.vocab_size), (PROMPT,))  # ids of texts
    cache = PagedCache(model.config.decoder, num_tokens=4096, block_size=64, dtype=model.dtype)

    def read() -> torch.Tensor:
        step = PagedCache(model.config.decoder, num_tokens=512, block_size=64, dtype=model.dtype).step(
            [CachedSequence()], (PROMPT,)
        )
        return model.head(model(prompt, step.layout, cache=step)[-1:])

    sequences = [CachedSequence() for _ in range(8)]
    for sequence in sequences:
        step = cache.step([sequence], (PROMPT,))
        model(prompt, step.layout, cache=step)

    def decode(count: int) -> None:
        for _ in range(STEPS):
            step = cache.step(sequences[:count], (1,) * count)
            model.head(model(prompt[:count], step.layout, cache=step))

    one, eight = (1e3 * best(lambda n=n: decode(n), 2) / STEPS for n in (1, 8))
    print(
        f"vision {best(lambda: model.encode_tiles(tile), 2):.2f} s, prefill {PROMPT} {best(read, 2):.2f} s, "
        f"decode 1 {one:.0f} ms, decode 8 {eight:.0f} ms, peak {peak_memory_gb('cpu'):.2f} GB"
    )


@torch.inference_mode()
def products() -> None:
    weight = torch.randn(OUT, WIDTH)
    plain = weight.bfloat16()
    stored = {
        f"int{bits}": ops.QuantizedWeight(*quantize(weight, QuantConfig(bits=bits, group=64 if bits == 4 else None)), None)
        for bits in (8, 4)
    }
    for inputs in (1, 8):
        x = torch.randn(inputs, WIDTH).bfloat16()
        for together in (4, 1):
            dense.rows_at_once = features.rows_at_once = lambda together=together: together  # both kernels ask it
            address_of.cache_clear()
            rates = {"bfloat16": plain.nbytes / best(lambda x=x: ops.linear(x, plain, None), 7)}
            rates |= {name: q.weight.nbytes / best(lambda x=x, q=q: ops.quant_gemv(x, q), 7) for name, q in stored.items()}
            shown = ", ".join(f"{name} {rate / 1e9:.1f}" for name, rate in rates.items())
            print(f"{inputs} input rows, {together} weight rows together: {shown} GB/s")


def main(options: Options) -> None:
    torch.set_num_threads(options.threads)
    print(f"{processor_name()}, level {features.level()}, {options.threads} threads")
    if options.rows:
        products()
    else:
        steps(options)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
