"""Configuration of every model: InternViT, decoder, tiling, adapters, and the published sizes (arXiv:2412.05271, table 2).

The values are those of the published checkpoints' config.json.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

Family = Literal["qwen2", "internlm2", "llama", "qwen3", "internlm3"]

SPECIAL_TOKENS = (
    "<img>", "</img>", "<IMG_CONTEXT>", "<quad>", "</quad>", "<ref>", "</ref>", "<box>", "</box>",
)  # fmt: skip
"""Added to the language model's vocabulary, in this order (added_tokens.json of the published models)."""


@dataclass(frozen=True, kw_only=True)
class VisionConfig:
    """InternViT."""

    width: int = 1024
    num_layers: int = 24
    mlp_width: int = 4096
    num_heads: int = 16
    norm: Literal["layer_norm", "rms_norm"] = "layer_norm"
    """layer_norm has weight and bias (300M), rms_norm weight only (6B)."""
    qkv_bias: bool = True
    qk_norm: bool = False
    """RMSNorm of queries and keys over the whole width, heads together (6B)."""
    patch_size: int = 14
    image_size: int = 448
    """Tile side in pixels; the position table covers (image_size / patch_size)^2 patches."""
    norm_eps: float = 1e-6
    layer_scale_init: float = 0.1
    drop_path: float = 0.0
    """Stochastic depth rate of the last layer; grows linearly from 0 at the first."""

    def __post_init__(self) -> None:
        if self.width % self.num_heads:
            raise ValueError(f"vision width {self.width} is not a multiple of its {self.num_heads} heads")
        if self.image_size % (2 * self.patch_size):
            raise ValueError(f"image_size {self.image_size} must be a multiple of twice the patch size {self.patch_size}")
        if not 0 <= self.drop_path < 1:
            raise ValueError(f"drop_path must be in [0, 1), got {self.drop_path}")

    @property
    def head_dim(self) -> int:
        """Size of an attention head."""
        return self.width // self.num_heads

    @property
    def grid(self) -> int:
        """Patches along one side of a tile."""
        return self.image_size // self.patch_size


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """A causal decoder with rotary positions, grouped-query attention and SwiGLU."""

    family: Family = "qwen2"
    """Which naming a written checkpoint uses; the computation depends on the other fields only."""
    vocab_size: int
    width: int
    num_layers: int
    mlp_width: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope_theta: float = 1e6
    rope_dynamic_factor: float | None = None
    """Dynamic NTK: beyond max_positions the rotary base grows with the sequence length (InternLM2.5)."""
    norm_eps: float = 1e-6
    qkv_bias: bool = False
    qk_norm: bool = False
    """RMSNorm of each query head and each key head before the rotation (Qwen3)."""
    max_positions: int = 32768

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"{self.num_heads} query heads cannot share {self.num_kv_heads} key/value heads")
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even for rotary positions, got {self.head_dim}")


@dataclass(frozen=True, kw_only=True)
class TilingConfig:
    """Dynamic tiling: how an image becomes tiles (arXiv:2404.16821, section 3.3)."""

    tile_size: int = 448
    min_tiles: int = 1
    max_tiles: int = 12
    thumbnail: bool = True
    """Append the whole image as one more tile when there is more than one."""
    dynamic: bool = True
    """False: every image is one tile."""

    def __post_init__(self) -> None:
        if not 1 <= self.min_tiles <= self.max_tiles:
            raise ValueError(f"need 1 <= min_tiles <= max_tiles, got {self.min_tiles} and {self.max_tiles}")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A complete InternVL2.5."""

    vision: VisionConfig
    decoder: DecoderConfig
    tiling: TilingConfig = field(default_factory=TilingConfig)
    image_token_id: int
    """Id of `<IMG_CONTEXT>`, the placeholder that vision tokens replace."""
    eos_token_ids: tuple[int, ...]
    """Generation ends at any of these."""
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    select_layer: int = -1
    """Which ViT hidden state is projected: -1 is the last layer's output, 0 the embeddings."""
    pixel_shuffle: Literal["v1", "v2"] = "v2"
    """v1 transposes the grid of vision tokens; all 2.5 models are v2."""
    template: str = "internvl2_5"
    system_message: str | None = None
    """Overrides the template's default system message."""

    def __post_init__(self) -> None:
        if self.tiling.tile_size != self.vision.image_size:
            raise ValueError(f"tile size {self.tiling.tile_size} differs from the ViT's image size {self.vision.image_size}")
        if not 0 <= self.image_token_id < self.decoder.vocab_size:
            raise ValueError(f"image_token_id {self.image_token_id} is outside the vocabulary of {self.decoder.vocab_size}")
        if not -self.vision.num_layers - 1 <= self.select_layer <= self.vision.num_layers:
            raise ValueError(f"select_layer {self.select_layer} does not name one of {self.vision.num_layers} ViT layers")

    @property
    def tokens_per_tile(self) -> int:
        """Vision tokens of one tile after pixel unshuffle (256 for 448 px tiles of 14 px patches)."""
        return (self.vision.grid // 2) ** 2


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Low-rank adapters on linear layers (arXiv:2106.09685).

    The defaults are those of InternVL's fine-tuning scripts: rank 16, alpha twice the rank, dropout 0.05, every decoder layer.
    """

    rank: int = 16
    alpha: float | None = None
    """The adapter's output is multiplied by alpha / rank; None is twice the rank."""
    dropout: float = 0.05
    """Dropout of the adapter's input while training."""
    targets: tuple[str, ...] = ("decoder.layers",)
    """Layers by dotted prefix (`decoder.layers`, `vision.layers.3`, `projector`, `decoder.head`) or glob (`*.q_proj`)."""

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"LoRA rank must be >= 1, got {self.rank}")
        if self.alpha is not None and self.alpha <= 0:
            raise ValueError(f"LoRA alpha must be > 0, got {self.alpha}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"LoRA dropout must be in [0, 1), got {self.dropout}")
        if not self.targets:
            raise ValueError("LoRA needs at least one target, such as 'decoder.layers'")

    @property
    def scale(self) -> float:
        """Factor of the adapter's output."""
        return 2.0 if self.alpha is None else self.alpha / self.rank


INTERNVIT_300M = VisionConfig()
INTERNVIT_6B = VisionConfig(
    width=3200, num_layers=45, mlp_width=12800, num_heads=25, norm="rms_norm", qkv_bias=False, qk_norm=True
)


def _qwen2(width: int, num_layers: int, mlp_width: int, num_heads: int, num_kv_heads: int, head_dim: int) -> DecoderConfig:
    return DecoderConfig(
        family="qwen2", vocab_size=151674, width=width, num_layers=num_layers, mlp_width=mlp_width, num_heads=num_heads,
        num_kv_heads=num_kv_heads, head_dim=head_dim, qkv_bias=True,
    )  # fmt: skip


def _internlm2(
    width: int, num_layers: int, mlp_width: int, num_heads: int, rope_theta: float, rope_dynamic_factor: float
) -> DecoderConfig:
    return DecoderConfig(
        family="internlm2", vocab_size=92553, width=width, num_layers=num_layers, mlp_width=mlp_width,
        num_heads=num_heads, num_kv_heads=8, head_dim=128, rope_theta=rope_theta,
        rope_dynamic_factor=rope_dynamic_factor, norm_eps=1e-5,
    )  # fmt: skip


_PARTS: dict[str, tuple[VisionConfig, DecoderConfig]] = {
    "1B": (INTERNVIT_300M, _qwen2(896, 24, 4864, 14, 2, 64)),
    "2B": (INTERNVIT_300M, _internlm2(2048, 24, 8192, 16, 1e6, 2.0)),
    "4B": (INTERNVIT_300M, _qwen2(2048, 36, 11008, 16, 2, 128)),
    "8B": (INTERNVIT_300M, _internlm2(4096, 32, 14336, 32, 1e6, 2.0)),
    "26B": (INTERNVIT_6B, _internlm2(6144, 48, 16384, 48, 5e7, 2.5)),
    "38B": (INTERNVIT_6B, _qwen2(5120, 64, 27648, 40, 8, 128)),
    "78B": (INTERNVIT_6B, _qwen2(8192, 80, 29568, 64, 8, 128)),
}
SIZES = tuple(_PARTS)


def published_config(size: str) -> ModelConfig:
    """The published configuration of one size, `1B` to `78B`; raises ValueError for any other."""
    if size not in _PARTS:
        raise ValueError(f"unknown size {size!r}; published sizes are {', '.join(SIZES)}")
    vision, decoder = _PARTS[size]
    if decoder.family == "internlm2":
        return ModelConfig(
            vision=vision, decoder=decoder, image_token_id=92546, eos_token_ids=(92542,), pad_token_id=2, bos_token_id=1
        )
    eos = (151644, 151645) if size == "78B" else (151645,)
    return ModelConfig(vision=vision, decoder=decoder, image_token_id=151667, eos_token_ids=eos, pad_token_id=151643)
