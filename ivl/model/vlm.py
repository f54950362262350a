"""The vision-language model: it encodes tiles, places their tokens among the text, and has one forward for every use."""

from __future__ import annotations

import torch
from torch import nn

from ivl.config import ModelConfig
from ivl.model.cache import CacheStep
from ivl.model.decoder import Decoder
from ivl.model.projector import Projector, pixel_unshuffle
from ivl.model.vit import VisionTransformer
from ivl.types import Layout

PIXEL_MEAN = (0.485, 0.456, 0.406)
PIXEL_STD = (0.229, 0.224, 0.225)


def normalize(tiles_GSSC: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Turn uint8 RGB tiles [G, size, size, 3] into pixels [G, 3, size, size] with ImageNet's mean and deviation removed."""
    # Channels are moved first: the arithmetic then runs in place over long rows.
    pixels_GCYX = tiles_GSSC.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format).div_(255)
    for pixels_GYX, mean, std in zip(pixels_GCYX.unbind(1), PIXEL_MEAN, PIXEL_STD, strict=True):
        pixels_GYX.sub_(mean).div_(std)
    return pixels_GCYX.to(dtype)


class VLM(nn.Module):
    """InternVL2.5. `with torch.device("meta"): VLM(config)` costs nothing and has every name and shape."""

    compute_dtype: torch.dtype | None = None
    """What a model computes in whose parameters have another type until they are used; `ivl.parallel.shard` sets it."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.vision = VisionTransformer(config.vision)
        self.projector = Projector(config.vision.width, config.decoder.width)
        self.decoder = Decoder(config.decoder)

    @property
    def dtype(self) -> torch.dtype:
        """Type of the stream between the layers, and of the keys and values."""
        return self.compute_dtype or self.decoder.norm.weight.dtype

    @property
    def device(self) -> torch.device:
        """Where the model lies."""
        return self.decoder.embeddings.weight.device

    def init_weights(self) -> None:
        """Initialize randomly, for training from nothing; seed torch first to repeat it."""
        for name, parameter in self.named_parameters():
            self.init_weight(name, parameter)

    def init_weight(self, name: str, tensor: torch.Tensor) -> None:
        """Initialize a tensor as the parameter of this name; in the order of parameters it gets the values of init_weights."""
        part, _, rest = name.partition(".")
        {"vision": self.vision, "projector": self.projector, "decoder": self.decoder}[part].init_weight(rest, tensor)

    def encode_tiles(self, tiles_GSSC: torch.Tensor) -> torch.Tensor:
        """Turn uint8 tiles [G, size, size, 3] into vision tokens [G, U, D]."""
        return self.encode_pixels(normalize(tiles_GSSC.to(self.device), self.dtype))

    def encode_pixels(self, pixels_GCYX: torch.Tensor) -> torch.Tensor:
        """Turn normalized pixels [G, 3, size, size] into vision tokens [G, U, D]."""
        hidden_GPD = self.vision(pixels_GCYX, self.config.select_layer)
        return self.projector(pixel_unshuffle(hidden_GPD[:, 1:], self.config.pixel_shuffle))

    def embed(
        self, tokens_T: torch.Tensor, vision_RUD: torch.Tensor | None = None, at_X: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Embed tokens, with vision tokens in place of the image placeholders, in order. Returns [T, D].

        Args:
            tokens_T: Token ids.
            vision_RUD: Vision tokens of each placeholder run, or [X, D] if the tokens begin or end within a run.
            at_X: What `placeholders` returns, on the model's device; None looks there, for which a card must be waited for.

        Raises:
            ValueError: unless there is exactly one placeholder per vision token; nothing is cut to fit.
        """
        x_TD = self.decoder.embeddings(tokens_T).to(self.dtype)
        at_X = self.placeholders(tokens_T) if at_X is None else at_X
        num_vision = 0 if vision_RUD is None else vision_RUD.shape[:-1].numel()
        if len(at_X) != num_vision:
            raise ValueError(f"{len(at_X)} image placeholder tokens but {num_vision} vision tokens")
        if vision_RUD is None:
            return x_TD
        return x_TD.index_copy(0, at_X, vision_RUD.flatten(0, -2).to(x_TD.dtype))

    def placeholders(self, tokens_T: torch.Tensor) -> torch.Tensor:
        """Return where the image placeholders are among the tokens."""
        return (tokens_T == self.config.image_token_id).nonzero().squeeze(1)

    def forward(
        self, tokens_T: torch.Tensor, layout: Layout, vision_RUD: torch.Tensor | None = None, cache: CacheStep | None = None,
        at_X: torch.Tensor | None = None,
    ) -> torch.Tensor:  # fmt: skip
        """Turn the tokens of all sequences into hidden states [T, D]: a training pack, a prefill or a decode step.

        Args:
            tokens_T: Token ids of the sequences, one after another.
            layout: The new and past lengths of the sequences.
            vision_RUD: As in `embed`.
            cache: Keys and values of the past; the new ones are written there.
            at_X: As in `embed`.
        """
        return self.decoder(self.embed(tokens_T, vision_RUD, at_X), layout, cache)

    def head(self, hidden_TD: torch.Tensor) -> torch.Tensor:
        """Return logits [T, V]; pass only the tokens that are sampled or trained."""
        return self.decoder.head(hidden_TD)
