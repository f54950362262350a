"""Laws of the GGUF reader: files written by the gguf package's own writer come back as the decoder they describe."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from ivl.checkpoint.gguf.reader import GgufModel
from ivl.checkpoint.model_dir import fill
from ivl.config import DecoderConfig
from ivl.errors import InputError
from ivl.model.decoder import Decoder
from ivl.types import Layout

CONFIG = DecoderConfig(
    vocab_size=96,
    width=64,
    num_layers=2,
    mlp_width=96,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    max_positions=512,
    rope_theta=5e5,
)
TOKENS_T = torch.tensor([3, 17, 95, 0, 41])


def random_decoder(config: DecoderConfig) -> Decoder:
    generator = torch.Generator().manual_seed(0)
    decoder = Decoder(config).eval()
    for parameter in decoder.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1 + (1.0 if parameter.ndim == 1 else 0.0)
    return decoder


def interleave(rows: np.ndarray, num_heads: int) -> np.ndarray:
    """How files of llama and internlm2 order query and key rows: row i of a head's first half, row i of its second half."""
    return rows.reshape(num_heads, 2, -1, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def write_gguf(path: Path, decoder: Decoder, kind: str = "F32", *, tied: bool = False, **fields: object) -> None:
    config = decoder.config
    writer = gguf.GGUFWriter(path, config.family)
    writer.add_block_count(config.num_layers)
    writer.add_context_length(config.max_positions)
    writer.add_embedding_length(config.width)
    writer.add_feed_forward_length(config.mlp_width)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list([f"t{i}" for i in range(config.vocab_size)])
    for key, value in fields.items():
        getattr(writer, key)(value)
    quantization = gguf.GGMLQuantizationType[kind]

    def add(name: str, tensor: torch.Tensor) -> None:
        rows = tensor.detach().numpy()
        if not config.family.startswith("qwen") and ("attn_q" in name or "attn_k" in name):
            rows = interleave(rows, config.num_heads if "attn_q" in name else config.num_kv_heads)
        own = quantization if rows.ndim > 1 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(name, gguf.quantize(np.ascontiguousarray(rows), own), raw_dtype=own)

    add("token_embd.weight", decoder.embeddings.weight)
    add("output_norm.weight", decoder.norm.weight)
    if not tied:
        add("output.weight", decoder.head.weight)
    for n, layer in enumerate(decoder.layers):
        for leaf, qkv in layer.qkv.named_parameters():
            for letter, rows in zip("qkv", qkv.split([count for _, count in layer.qkv.parts]), strict=True):
                add(f"blk.{n}.attn_{letter}.{leaf}", rows)
        gate, up = layer.gate_up.weight.chunk(2)
        names = {"ffn_gate": gate, "ffn_up": up, "ffn_down": layer.down.weight, "attn_output": layer.out.weight}
        if layer.q_norm is not None:
            names |= {"attn_q_norm": layer.q_norm.weight, "attn_k_norm": layer.k_norm.weight}
        for name, tensor in {**names, "attn_norm": layer.norm1.weight, "ffn_norm": layer.norm2.weight}.items():
            add(f"blk.{n}.{name}.weight", tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def read_decoder(path: Path) -> Decoder:
    file = GgufModel(path)
    decoder = Decoder(file.config).eval()
    fill(dict(decoder.named_parameters("decoder")), file.key_map(decoder), file)
    return decoder


@pytest.mark.parametrize("family", ["llama", "qwen2", "internlm2", "qwen3"])
def test_a_written_decoder_comes_back(tmp_path: Path, family) -> None:
    config = replace(CONFIG, family=family, qkv_bias=family == "qwen2", qk_norm=family == "qwen3")
    if family == "qwen3":  # heads need not fill the width
        config = replace(config, head_dim=2 * CONFIG.head_dim)
    decoder = random_decoder(config)
    write_gguf(tmp_path / "a.gguf", decoder)
    back = read_decoder(tmp_path / "a.gguf")
    assert back.config == config
    for (name, ours), theirs in zip(decoder.named_parameters(), back.parameters(), strict=True):
        assert torch.equal(ours, theirs), name


@pytest.mark.parametrize(
    ("kind", "dtype", "error"),
    [("F16", torch.float16, 1e-3), ("BF16", torch.bfloat16, 4e-3), ("Q8_0", torch.float32, 2e-2), ("Q4_0", torch.float32, 0.3)],
)
def test_dtypes_and_quantizations(tmp_path: Path, kind: str, dtype: torch.dtype, error: float) -> None:
    decoder = random_decoder(replace(CONFIG, family="llama"))
    write_gguf(tmp_path / "a.gguf", decoder, kind)
    file = GgufModel(tmp_path / "a.gguf")
    assert file.main_dtype == dtype
    assert file.get("blk.0.ffn_down.weight").dtype == dtype
    back = read_decoder(tmp_path / "a.gguf")
    for (name, ours), theirs in zip(decoder.named_parameters(), back.parameters(), strict=True):
        assert (ours - theirs).norm() <= error * ours.norm(), name


@pytest.mark.parametrize("kind", ["Q4_K", "Q6_K"])
def test_k_quants_are_undone_by_the_gguf_package(tmp_path: Path, kind: str) -> None:
    """The package only reads them, so the bytes are made up; the scales are kept finite."""
    quantization = gguf.GGMLQuantizationType[kind]
    config = replace(CONFIG, family="qwen2", width=256, num_layers=0)
    path = tmp_path / "a.gguf"
    bytes_per_row = gguf.quants.quant_shape_to_byte_shape((256,), quantization)[0]
    stored = np.random.default_rng(0).integers(0, 60, (96, bytes_per_row), dtype=np.uint8)
    writer = gguf.GGUFWriter(path, "qwen2")
    for add, value in (
        (writer.add_block_count, 1), (writer.add_context_length, 8), (writer.add_embedding_length, 256),
        (writer.add_feed_forward_length, 8), (writer.add_head_count, 4), (writer.add_layer_norm_rms_eps, 1e-6),
    ):  # fmt: skip
        add(value)
    writer.add_tensor("token_embd.weight", stored, raw_dtype=quantization)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    got = GgufModel(path).get("token_embd.weight")
    assert got.shape == (96, config.width) and got.isfinite().all() and got.std() > 0
    assert torch.equal(got, torch.from_numpy(gguf.dequantize(stored, quantization)))


def test_a_tied_file_gives_its_embeddings_as_head(tmp_path: Path) -> None:
    decoder = random_decoder(replace(CONFIG, family="llama"))
    decoder.head.weight = decoder.embeddings.weight
    write_gguf(tmp_path / "a.gguf", decoder, tied=True)
    back = read_decoder(tmp_path / "a.gguf")
    layout = Layout.packed((5,))
    with torch.no_grad():
        expected, got = (d.head(d(d.embeddings(TOKENS_T), layout)) for d in (decoder, back))
    assert torch.equal(got, expected)


def test_what_the_decoder_does_not_compute_is_refused(tmp_path: Path) -> None:
    decoder = random_decoder(replace(CONFIG, family="llama"))
    path = tmp_path / "a.gguf"
    for field, value, message in (
        ("add_rope_scaling_type", gguf.RopeScalingType.YARN, "yarn"),
        ("add_expert_count", 4, "mixture of experts"),
        ("add_rope_dimension_count", 8, "rotates 8 of 16"),
    ):
        write_gguf(path, decoder, **{field: value})
        with pytest.raises(InputError, match=message):
            GgufModel(path)
    stranger = gguf.GGUFWriter(path, "mamba")
    stranger.write_header_to_file()
    stranger.write_kv_data_to_file()
    stranger.close()
    with pytest.raises(InputError, match="'mamba', expected 'qwen2' or 'internlm2' or 'llama'"):
        GgufModel(path)
    write_gguf(path, decoder)
    whole = path.read_bytes()
    for damage in (b"", b"GGUF", b"not a model at all, just some text", whole[:300], whole[:-500], whole[: len(whole) // 2]):
        path.write_bytes(damage)
        with pytest.raises(InputError, match=r"not a readable GGUF file|fetch it again"):
            GgufModel(path)


def test_a_length_beyond_the_file_is_refused_at_once(tmp_path: Path) -> None:
    """A list of numbers that claims to be endless: the gguf package alone would read on without an end."""
    path = tmp_path / "a.gguf"
    write_gguf(path, random_decoder(replace(CONFIG, family="llama")), add_token_types=[1] * 96)
    data = path.read_bytes()
    at = data.index(b"tokenizer.ggml.token_type") + len(b"tokenizer.ggml.token_type") + 8
    assert int.from_bytes(data[at : at + 8], "little") == 96
    path.write_bytes(data[:at] + (1 << 62).to_bytes(8, "little") + data[at + 8 :])
    with pytest.raises(InputError, match=r"a\.gguf: not a readable GGUF file: it ends at byte \d+"):
        GgufModel(path)
