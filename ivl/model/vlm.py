"""The vision-language model: tiles to vision tokens, checked placement among text, one forward for every purpose."""

from __future__ import annotations

from functools import cache

import torch
from torch import nn

from ivl.config import ModelConfig
from ivl.cpu import kernels
from ivl.model.cache import CacheStep
from ivl.model.decoder import Decoder
from ivl.model.linear import in_chunks
from ivl.model.projector import Projector, pixel_unshuffle
from ivl.model.vit import VisionTransformer
from ivl.types import Layout

CHUNK_TILES = 2
"""Tiles encoded together at inference on a CPU: enough rows for fast products, and few enough to stay in the caches."""
PIXEL_MEAN = (0.485, 0.456, 0.406)
PIXEL_STD = (0.229, 0.224, 0.225)


def normalise(tiles_GSSC: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """uint8 RGB tiles [G, size, size, 3] to normalised pixels [G, 3, size, size] (ImageNet mean and deviation)."""
    if tiles_GSSC.dtype is torch.uint8 and len(tiles_GSSC):  # a colour has 256 values: the kernel looks them up
        found = kernels.looked_up(tiles_GSSC, _normalised_values(dtype))
        if found is not None:
            return found
    mean, std = (torch.tensor(x, device=tiles_GSSC.device).view(3, 1, 1) for x in (PIXEL_MEAN, PIXEL_STD))
    # Channels apart first: the sums are then over long rows, and in place.
    pixels_GCYX = tiles_GSSC.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
    return pixels_GCYX.div_(255).sub_(mean).div_(std).to(dtype)


@cache
def _normalised_values(dtype: torch.dtype) -> torch.Tensor:
    """What each byte of each colour becomes, [3, 256]."""
    mean_C1, std_C1 = (torch.tensor(x).unsqueeze(1) for x in (PIXEL_MEAN, PIXEL_STD))
    return torch.arange(256, dtype=torch.float32).expand(3, 256).div(255).sub(mean_C1).div(std_C1).to(dtype)


class VLM(nn.Module):
    """InternVL2.5. `with torch.device("meta"): VLM(config)` costs nothing and has every name and shape."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.vision = VisionTransformer(config.vision)
        self.projector = Projector(config.vision.width, config.decoder.width)
        self.decoder = Decoder(config.decoder)

    @property
    def dtype(self) -> torch.dtype:
        return self.decoder.embeddings.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.decoder.embeddings.weight.device

    def init_weights(self) -> None:
        """Random initialisation for training from nothing; seed torch first to repeat it."""
        for part in (self.vision, self.projector, self.decoder):
            part.init_weights()

    def encode_tiles(self, tiles_GSSC: torch.Tensor, *, chunk: int | None = CHUNK_TILES) -> torch.Tensor:
        """uint8 tiles [G, size, size, 3] to vision tokens [G, U, D]; None encodes them in one call wherever it runs."""
        return in_chunks(self._encode_some, tiles_GSSC.to(self.device), chunk or len(tiles_GSSC))

    def _encode_some(self, tiles_GSSC: torch.Tensor) -> torch.Tensor:
        return self.encode_pixels(normalise(tiles_GSSC, self.dtype))

    def encode_pixels(self, pixels_GCYX: torch.Tensor) -> torch.Tensor:
        """Normalised pixels [G, 3, size, size] to vision tokens [G, U, D]."""
        hidden_GPD = self.vision(pixels_GCYX, self.config.select_layer)
        return self.projector(pixel_unshuffle(hidden_GPD[:, 1:], self.config.pixel_shuffle))

    def embed(self, tokens_T: torch.Tensor, vision_RUD: torch.Tensor | None = None) -> torch.Tensor:
        """Token embeddings with vision tokens in place of the image placeholders, in order. Where the tokens begin or end
        within a run, vision tokens come without runs, [X, D].

        Raises:
            ValueError: unless there is exactly one placeholder per vision token; nothing is cut to fit.
        """
        x_TD = self.decoder.embeddings(tokens_T)
        at_T = (tokens_T == self.config.image_token_id).nonzero().squeeze(1)
        num_vision = 0 if vision_RUD is None else vision_RUD.shape[:-1].numel()
        if len(at_T) != num_vision:
            raise ValueError(f"{len(at_T)} image placeholder tokens but {num_vision} vision tokens")
        if vision_RUD is None:
            return x_TD
        return x_TD.index_copy(0, at_T, vision_RUD.flatten(0, -2).to(x_TD.dtype))

    def forward(
        self,
        tokens_T: torch.Tensor,
        layout: Layout,
        vision_RUD: torch.Tensor | None = None,
        cache: CacheStep | None = None,
    ) -> torch.Tensor:
        """A training pack, a prefill or a decode step: tokens of all sequences to hidden states [T, D].

        vision_RUD holds the vision tokens of each placeholder run, in the order of the placeholders; [X, D] of any runs.
        """
        return self.decoder(self.embed(tokens_T, vision_RUD), layout, cache)

    def head(self, hidden_TD: torch.Tensor) -> torch.Tensor:
        """Logits [T, V]; ask only for the tokens that are sampled or trained."""
        return self.decoder.head(hidden_TD)
