"""accelerate(): speed for a card, put into an engine after loading."""

from __future__ import annotations

import logging

import torch

from ivl.gpu.graphs import CardDecoder
from ivl.gpu.quantized import prepare_layer
from ivl.gpu.sampling import sample_on_card
from ivl.inference.engine import Engine
from ivl.model.attention import VARLEN, Sdpa, Varlen, backend_for
from ivl.model.cache import PAGE_ON_CARDS, CacheStep, PagedCache
from ivl.model.decoder import Decoder, DecoderLayer
from ivl.quant.layers import QuantLinear
from ivl.types import Layout

log = logging.getLogger(__name__)


class VarlenByKind(Varlen):
    """Flash attention for fresh sequences alone: for a torch whose kernel reads no pages."""

    def cached(
        self, q_TNH: torch.Tensor, k_TKH: torch.Tensor, v_TKH: torch.Tensor, cache: CacheStep, layer: int
    ) -> torch.Tensor:
        return Sdpa.cached(self, q_TNH, k_TKH, v_TKH, cache, layer)


def accelerate(engine: Engine) -> Engine:
    """Make an engine whose models lie on a card faster, in place, and return it.

    The card samples, so that a step is read once; decoding steps are replayed as CUDA graphs; quantized layers get torch's
    products. Parameters stay the same objects under the same names, quantized weights apart.
    """
    engine.runner.sample = sample_on_card
    takes_pages = _takes_pages(engine)
    for module in (module for model in engine.models.values() for module in model.modules()):
        if type(module) is Decoder:
            module.__class__ = CardDecoder
        elif type(module) is QuantLinear:
            prepare_layer(module)
        elif isinstance(module, DecoderLayer) and not takes_pages:
            module.backend = VarlenByKind()
    return engine


@torch.inference_mode()
def _takes_pages(engine: Engine) -> bool:
    """Whether flash attention of this card and torch reads the cache's pages, as one call shows."""
    config, model = engine.model.config.decoder, engine.model
    q_TNH = torch.zeros(1, config.num_heads, config.head_dim, dtype=model.dtype, device=model.device)
    if backend_for(q_TNH) is not VARLEN:
        return True
    page = PagedCache(config, num_tokens=1, block_size=PAGE_ON_CARDS, dtype=model.dtype, device=model.device)
    try:
        VARLEN.cached(q_TNH, q_TNH, q_TNH, CacheStep(page, Layout((1,), (0,)), [(0,)]), 0)
    except (RuntimeError, TypeError) as error:  # TypeError: a torch whose call has no tables yet
        log.warning("flash attention reads no pages here, decoding will be slow: %s", str(error).splitlines()[0])
        return False
    return True
