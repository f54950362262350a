"""What is put into an engine on a card, and what is refused or left as it was; on the CPU, where all of it can be asked."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import varlen

from ivl.config import LoraConfig
from ivl.gpu import accelerate
from ivl.gpu.accelerate import VarlenByKind
from ivl.gpu.graphs import CardDecoder
from ivl.gpu.sampling import sample_on_card
from ivl.lora.layers import add_lora
from ivl.model import attention
from ivl.types import SamplingParams
from tests.helpers.engines import ask, lively_model, tiny_engine


def test_an_engine_that_samples_as_a_card_does_gives_the_same_replies() -> None:
    asked = [ask("what is this"), ask("red or blue?"), ask("a")]
    params = [SamplingParams(max_new_tokens=12, temperature=t, top_p=0.9, seed=3) for t in (0.0, 0.8, 1.5)]
    wanted = tiny_engine(lively_model()).generate(asked, params)
    engine = accelerate(tiny_engine(lively_model()))
    assert type(engine.model.decoder) is CardDecoder and engine.runner.sample is sample_on_card
    assert [reply.tokens for reply in engine.generate(asked, params)] == [reply.tokens for reply in wanted]


def test_a_kernel_that_reads_no_pages_is_asked_for_fresh_sequences_only(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_pages(*args: object, **options: object) -> torch.Tensor:
        raise RuntimeError("block_table is not supported\nand more")

    monkeypatch.setattr(varlen, "varlen_attn", no_pages)
    monkeypatch.setitem(attention.BACKENDS, ("cpu", torch.float32), attention.VARLEN)
    engine = accelerate(tiny_engine(lively_model()))
    layers = engine.model.decoder.layers
    assert all(isinstance(layer.backend, VarlenByKind) for layer in layers)


def test_layers_with_adapters_are_not_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(attention.BACKENDS, ("cpu", torch.float32), attention.VARLEN)
    decoder = lively_model().decoder
    decoder.__class__ = CardDecoder
    x_TD = torch.zeros(1, decoder.config.width)
    assert not decoder._capturable(x_TD), "nothing on a CPU is"

    class OnCard(torch.Tensor):
        is_cuda = True  # type: ignore[assignment]

    with torch.inference_mode():
        assert decoder._capturable(x_TD.as_subclass(OnCard))
        model = lively_model()
        add_lora(model, LoraConfig(rank=2, targets=("decoder.layers",)))
        model.decoder.__class__ = CardDecoder
        assert not model.decoder._capturable(x_TD.as_subclass(OnCard))
