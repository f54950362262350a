"""`ivl convert --to gguf`: what is written is what was stored, and llama.cpp computes from it what we compute."""

from __future__ import annotations

import ctypes
import importlib.util
import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from ivl.checkpoint import load_tokenizer, save_model, save_processor
from ivl.checkpoint.convert import convert
from ivl.checkpoint.gguf.reader import GgufModel
from ivl.checkpoint.gguf.tokenizer import gguf_vocabulary, tokenizer_from_gguf
from ivl.checkpoint.gguf.writer import write_language, write_vision
from ivl.checkpoint.model_dir import fill
from ivl.cli.convert import convert as command
from ivl.config import ModelConfig, TilingConfig
from ivl.errors import InputError
from ivl.model.decoder import Decoder
from ivl.model.vlm import VLM
from ivl.processing.processor import Processor
from ivl.processing.tokenizer import Tokenizer, train_tokenizer
from ivl.types import ImageRef, Layout, Message, Text
from tests.checkpoint.test_gguf import interleave
from tests.helpers.checkpoints import random_model, tiny_like

TEXTS = [
    "What shape is it? It's 12345 or 6,789.", "don'T I'LL we'Re", "你好，世界！这是 一个 test。", "naïve café, ŝ, ①²½ ٣٤ 𝟘",
    "한국어 テキスト ไทย العربية עברית", "🙂👩\u200d👩\u200d👧 emoji 🇩🇪", "  two  spaces\n\n\ttabs \r\n\r\n x  ",
    "\x07 \ufeff \u200b ﬁ　ｆｕｌｌ \u00a0x", "<|im_start|>user <|im_end|> <img><IMG_CONTEXT></img> <|endoftext|>",
    "<ref>a</ref><box>[[1, 2]]</box> <quad>", "a" * 50, "\n", "",
]  # fmt: skip
"""In NFC: llama.cpp does not normalize."""


def tiny(size: str, tokenizer: Tokenizer) -> ModelConfig:
    """Of a published size's structure; widths that Q8_0 can hold, but for the ViT's MLP."""
    config = tiny_like(size)
    return replace(
        config,
        vision=replace(config.vision, width=64, mlp_width=96, num_heads=4, patch_size=14, image_size=112),
        decoder=replace(config.decoder, vocab_size=len(tokenizer) + 5, mlp_width=96, max_positions=2048),
        tiling=TilingConfig(tile_size=112, max_tiles=6),
        image_token_id=tokenizer.id("<IMG_CONTEXT>"),
        eos_token_ids=(tokenizer.id("<|im_end|>"),),
        bos_token_id=None,
        pad_token_id=tokenizer.id("<|endoftext|>"),
    )


def written(directory: Path, size: str, **decoder: int) -> tuple[VLM, Processor]:
    """A complete model directory."""
    tokenizer = train_tokenizer([*TEXTS, "what shape is this", "a red circle"] * 5, 420)
    config = tiny(size, tokenizer)
    config = replace(config, decoder=replace(config.decoder, **decoder))
    model, processor = random_model(config), Processor(config, tokenizer)
    save_model(model, directory)
    save_processor(processor, directory)
    return model, processor


def fields(path: Path) -> dict[str, Any]:
    return {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}


def tensors(path: Path) -> dict[str, np.ndarray]:
    reader = gguf.GGUFReader(path)
    return {t.name: gguf.dequantize(t.data, t.tensor_type) for t in reader.tensors}


@pytest.mark.parametrize("size", ["1B", "8B", "3.5-8B", "3-9B"])
def test_the_language_file_is_the_decoder_and_its_tokenizer(tmp_path: Path, size: str) -> None:
    model, processor = written(tmp_path / "m", size)
    command([str(tmp_path / "m"), str(tmp_path / "g"), "--to", "gguf"])
    file = GgufModel(tmp_path / "g" / "model.gguf")
    family = "llama" if size == "3-9B" else model.config.decoder.family  # llama.cpp has no InternLM3
    assert file.config == replace(model.config.decoder, rope_dynamic_factor=None, family=family)
    back = Decoder(file.config).eval()
    fill(dict(back.named_parameters("decoder")), file.key_map(back), file)
    for (name, ours), theirs in zip(model.decoder.named_parameters(), back.parameters(), strict=True):
        assert torch.equal(ours, theirs), name
    words = tokenizer_from_gguf(file.vocabulary())
    assert all(words.encode(text) == processor.tokenizer.encode(text) for text in TEXTS)
    found = fields(tmp_path / "g" / "model.gguf")
    assert found["tokenizer.ggml.pre"] == "qwen2" and found["tokenizer.ggml.add_bos_token"] is False
    assert found["tokenizer.ggml.eos_token_id"] == processor.tokenizer.id("<|im_end|>")
    assert "<|im_start|>" in found["tokenizer.chat_template"]


@pytest.mark.parametrize(
    ("size", "architecture"), [("1B", "qwen2"), ("8B", "internlm2"), ("3.5-8B", "qwen3"), ("3-9B", "llama")]
)
def test_the_language_file_has_the_names_that_llama_cpp_knows(tmp_path: Path, size: str, architecture: str) -> None:
    written(tmp_path / "m", size)
    convert(tmp_path / "m", tmp_path / "g", to="gguf")
    path = tmp_path / "g" / "model.gguf"
    found = fields(path)
    assert found["general.architecture"] == architecture
    key = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    known = {gguf.TENSOR_NAMES[kind] for kind in gguf.MODEL_TENSORS[key]}
    names = {re.sub(r"^blk\.\d+\.", "blk.{bid}.", name).rpartition(".")[0] for name in tensors(path)}
    assert names <= known
    assert ({"blk.{bid}.attn_q_norm", "blk.{bid}.attn_k_norm"} <= names) == (architecture == "qwen3")
    if architecture == "qwen3":
        assert (found["qwen3.attention.key_length"], found["qwen3.attention.head_count"]) == (16, 8)


def test_the_mmproj_file_says_what_clip_reads(tmp_path: Path) -> None:
    model, _ = written(tmp_path / "m", "1B")
    assert convert(tmp_path / "m", tmp_path / "g", to="gguf").wider == 0
    path = tmp_path / "g" / "mmproj.gguf"
    found = fields(path)
    expected = {
        "general.architecture": "clip", "general.type": "mmproj", "clip.projector_type": "internvl",
        "clip.has_vision_encoder": True, "clip.use_gelu": True, "clip.vision.image_size": 112, "clip.vision.patch_size": 14,
        "clip.vision.block_count": 2, "clip.vision.embedding_length": 64, "clip.vision.feed_forward_length": 96,
        "clip.vision.attention.head_count": 4, "clip.vision.projection_dim": 64, "clip.vision.projector.scale_factor": 2,
        "clip.vision.preproc_min_tiles": 1, "clip.vision.preproc_max_tiles": 6,
    }  # fmt: skip
    assert {key: found.get(key) for key in expected} == expected
    assert np.allclose(found["clip.vision.image_mean"], (0.485, 0.456, 0.406))
    assert np.allclose(found["clip.vision.image_std"], (0.229, 0.224, 0.225))
    block = [f"attn_{x}.{leaf}" for x in ("q", "k", "v", "out") for leaf in ("weight", "bias")]
    block += [f"{x}.{leaf}" for x in ("ln1", "ln2", "ffn_up", "ffn_down") for leaf in ("weight", "bias")]
    names = [f"v.blk.{n}.{name}" for n in range(2) for name in [*block, "ls1.weight", "ls2.weight"]]
    names += ["v.class_embd", "v.patch_embd.weight", "v.patch_embd.bias", "v.position_embd.weight"]
    names += [f"mm.model.mlp.{n}.{leaf}" for n in (0, 1, 3) for leaf in ("weight", "bias")]
    stored = tensors(path)
    assert sorted(stored) == sorted(names)
    table = model.vision.embeddings.positions.detach().numpy()
    assert np.array_equal(stored["v.position_embd.weight"], np.concatenate([table[1:], table[:1]]))  # class token last
    assert np.array_equal(stored["v.blk.1.attn_k.weight"], model.vision.layers[1].attention.qkv.weight[64:128].detach())


TRANSFORMERS_NAMES = {
    "model.language_model.": "model.", "model.multi_modal_projector.layer_norm": "mlp1.0",
    "model.multi_modal_projector.linear_1": "mlp1.1", "model.multi_modal_projector.linear_2": "mlp1.3",
}  # fmt: skip
"""What the names of transformers' class begin with, and the beginnings that the gguf package knows."""


@pytest.mark.parametrize(
    ("size", "storage", "error"),
    [("1B", "float16", 2**-11), ("8B", "bfloat16", 2**-8), ("3.5-8B", "q8_0", 0.0045), ("3-9B", "float32", 0)],
)
def test_the_gguf_package_reads_what_was_stored(tmp_path: Path, size: str, storage: str, error: float) -> None:
    """Every tensor of both files, by the package's names and dequantization. error is a share of a row's largest number."""
    model, _ = written(tmp_path / "m", size)
    save_model(model, tmp_path / "hf", dialect="transformers")
    convert(tmp_path / "m", tmp_path / "g", to="gguf", dtype=storage)
    architecture, heads = fields(tmp_path / "g" / "model.gguf")["general.architecture"], model.config.decoder
    arch = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    tables = [gguf.get_tensor_name_map(each, 8) for each in (arch, gguf.MODEL_ARCH.MMPROJ)]
    found = tensors(tmp_path / "g" / "model.gguf") | tensors(tmp_path / "g" / "mmproj.gguf")
    for name, tensor in load_file(tmp_path / "hf" / "model.safetensors").items():
        lead = next((lead for lead in TRANSFORMERS_NAMES if name.startswith(lead)), "")
        known = TRANSFORMERS_NAMES.get(lead, "") + name.removeprefix(lead)
        place = next(place for table in tables if (place := table.get_name(known, (".weight", ".bias"))))
        got, want = found.pop(place if place in found else f"{place}.weight"), tensor.numpy()
        if architecture in ("llama", "internlm2") and re.search(r"language_model.*[qk]_proj", name):
            want = interleave(want, heads.num_heads if "q_proj" in name else heads.num_kv_heads)
        if name.endswith("position_embeddings"):
            want = np.roll(want, -1, axis=1)  # clip.cpp's class token is the last
        want = want.reshape(got.shape)
        assert np.all(np.abs(got - want) <= (got.ndim > 1) * error * np.abs(want).max(-1, keepdims=True)), name
    assert not found


@pytest.mark.parametrize("size", ["1B", "3.5-8B", "3-9B"])
def test_transformers_reads_the_language_file(tmp_path: Path, size: str) -> None:
    """Its own names, rotary order and tokenizer. It has no InternLM2, and takes 128 for the size of Qwen3's heads."""
    transformers = pytest.importorskip("transformers")
    model, processor = written(tmp_path / "m", size, **({"head_dim": 128} if size == "3.5-8B" else {}))
    convert(tmp_path / "m", tmp_path / "g", to="gguf")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "g", gguf_file="model.gguf", dtype=torch.float32)
    words = transformers.AutoTokenizer.from_pretrained(tmp_path / "g", gguf_file="model.gguf")
    for text in (text for text in TEXTS if "<|" not in text):  # control tokens that somebody types are tokens there
        assert words(text, add_special_tokens=False).input_ids == processor.tokenizer.encode(text), text
    ids = torch.tensor(processor.tokenizer.encode("".join(TEXTS)))
    with torch.no_grad():
        want = model.head(model(ids, Layout.packed((len(ids),))))
        got = theirs.eval()(input_ids=ids[None]).logits[0]
    assert want.std() > 0.3 and (got - want).abs().max() <= 1e-4


def test_what_float16_cannot_express_is_refused(tmp_path: Path) -> None:
    model, _ = written(tmp_path / "m", "1B")
    model.decoder.layers[0].out.weight.data[0, 0] = 1e6
    save_model(model, tmp_path / "m")
    with pytest.raises(InputError, match=r"blk\.0\.attn_output\.weight holds 1e\+06, which float16 cannot express"):
        convert(tmp_path / "m", tmp_path / "next", to="gguf", dtype="float16")
    assert not (tmp_path / "next").exists()


def test_rows_that_q8_0_does_not_fit_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = train_tokenizer(TEXTS, 420)
    config = tiny("1B", tokenizer)
    config = replace(config, decoder=replace(config.decoder, mlp_width=80))
    save_model(random_model(config), tmp_path / "m")
    save_processor(Processor(config, tokenizer), tmp_path / "m")
    command([str(tmp_path / "m"), str(tmp_path / "g"), "--to", "gguf", "--dtype", "q8_0"])
    assert "2 matrices do not fit q8_0" in capsys.readouterr().out  # ffn_down of two layers has rows of 80


def test_what_llama_cpp_does_not_compute_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="RMSNorm for a ViT of width 3200"):
        write_vision(tmp_path / "a", VLM(tiny_like("26B")), lambda name: torch.empty(0), storage="F32")
    v1 = replace(tiny_like("1B"), pixel_shuffle="v1")
    with pytest.raises(InputError, match="pixel shuffle v2 only"):
        write_vision(tmp_path / "a", VLM(v1), lambda name: torch.empty(0), storage="F32")
    written(tmp_path / "m", "1B")
    out = tmp_path / "g"
    for flags, message in (
        (["--to", "gguf", "--weights-only"], "needs the tokenizer"),
        (["--to", "internvl_chat", "--dtype", "q8_0"], "is for --to gguf"),
    ):
        with pytest.raises(InputError, match=message):
            command([str(tmp_path / "m"), str(out), *flags])
    convert(tmp_path / "m", out, to="gguf")
    with pytest.raises(InputError, match="--force"):
        convert(tmp_path / "m", out, to="gguf")
    convert(tmp_path / "m", out, to="gguf", force=True)


# -- beside llama.cpp

SILENT = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(lambda level, text, data: None)


@pytest.fixture(scope="module")
def peer() -> Any:
    return pytest.importorskip(
        "llama_cpp", reason="llama-cpp-python comes as source only: pip install llama-cpp-python compiles for about ten minutes"
    )


@contextmanager
def llama(peer: Any, directory: Path) -> Iterator[tuple[Any, Any]]:
    """The model and a context whose cache is float32. Weights stay as stored: ggml's AMX layout crashes if gcc 12 built it."""
    peer.llama_log_set(SILENT, None)
    params = peer.llama_model_default_params()
    params.use_extra_bufts = False
    model = peer.llama_model_load_from_file(str(directory / "model.gguf").encode(), params)
    context_params = peer.llama_context_default_params()
    context_params.n_ctx, context_params.n_threads, context_params.n_threads_batch = 512, 1, 1
    context_params.type_k = context_params.type_v = peer.GGML_TYPE_F32
    context_params.flash_attn_type = peer.LLAMA_FLASH_ATTN_TYPE_DISABLED
    context = peer.llama_init_from_model(model, context_params)
    try:
        yield model, context
    finally:
        peer.llama_free(context)
        peer.llama_model_free(model)


def peer_ids(peer: Any, model: Any, text: str) -> list[int]:
    """With what the file asks for in front, and control tokens in the text as text."""
    vocab, data = peer.llama_model_get_vocab(model), text.encode()
    room = (peer.llama_token * 512)()
    count = peer.llama_tokenize(vocab, data, len(data), room, len(room), True, False)
    assert count >= 0
    return list(room[:count])


def peer_logits(peer: Any, context: Any, ids: list[int], vocab_size: int) -> torch.Tensor:
    batch = peer.llama_batch_init(len(ids), 0, 1)
    batch.n_tokens = len(ids)
    for i, token in enumerate(ids):
        batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = token, i, 1, 0, True
    assert peer.llama_decode(context, batch) == 0
    rows = np.ctypeslib.as_array(peer.llama_get_logits(context), shape=(len(ids), vocab_size)).copy()
    peer.llama_batch_free(batch)
    return torch.from_numpy(rows)


@pytest.mark.parametrize(
    ("size", "storage", "error"),
    [
        ("1B", "float32", 1e-4),
        ("8B", "float32", 1e-4),
        ("3.5-8B", "float32", 1e-4),
        ("3-9B", "float32", 1e-4),
        ("1B", "float16", 5e-3),
        ("1B", "bfloat16", 3e-2),
        ("1B", "q8_0", 5e-2),
    ],
)
def test_llama_cpp_computes_our_logits(peer, tmp_path: Path, size: str, storage: str, error: float) -> None:
    model, processor = written(tmp_path / "m", size)
    convert(tmp_path / "m", tmp_path / "g", to="gguf", dtype=storage)
    words = processor.tokenizer
    ids = [words.id("<|im_start|>"), *words.encode(TEXTS[0] + TEXTS[2]), words.id("<|im_end|>")]
    with llama(peer, tmp_path / "g") as (peer_model, context), torch.no_grad():
        for text in TEXTS:
            assert peer_ids(peer, peer_model, text) == words.encode(text), text
        got = peer_logits(peer, context, ids, model.config.decoder.vocab_size)
        want = model.head(model(torch.tensor(ids), Layout.packed((len(ids),))))
    assert (got - want).norm() <= error * want.norm()


def encodes_the_same(peer: Any, path: Path, words: Tokenizer, texts: list[str]) -> None:
    """Whether llama.cpp's ids from a file with this tokenizer are ours."""
    config = tiny("8B", words)
    model = VLM(config)
    zeros = {name: torch.zeros(parameter.shape) for name, parameter in model.named_parameters()}
    vocabulary = gguf_vocabulary(words, eos=words.id("<|im_end|>"))
    write_language(path / "model.gguf", model, zeros.__getitem__, vocabulary, chat_template="", storage="Q8_0")
    with llama(peer, path) as (peer_model, _):
        for text in texts:
            bos = [] if words.bos is None else [words.bos]
            assert peer_ids(peer, peer_model, text) == bos + words.encode(text), text


def test_llama_cpp_reads_the_tokenizer_of_qwen(peer, tmp_path: Path) -> None:
    found = importlib.util.find_spec("dashscope")
    if found is None or found.origin is None:
        pytest.skip("the real vocabulary needs: pip install --no-deps dashscope")
    words = load_tokenizer(Path(found.origin).parent / "resources")
    words.add_special()
    encodes_the_same(peer, tmp_path, words, TEXTS)


@pytest.mark.parametrize("prefix", [True, False])
def test_llama_cpp_reads_a_tokenizer_like_that_of_internlm(peer, tmp_path: Path, prefix: bool) -> None:
    sentencepiece = pytest.importorskip("sentencepiece")
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["what shape is this", "a red circle", *TEXTS[:6]] * 20), model_writer=model, model_type="bpe",
        vocab_size=420, byte_fallback=True, add_dummy_prefix=prefix, remove_extra_whitespaces=False, minloglevel=2,
        normalization_rule_name="identity", hard_vocab_limit=False,
    )  # fmt: skip
    (tmp_path / "tokenizer.model").write_bytes(model.getvalue())
    words = load_tokenizer(tmp_path)
    words.add_special(["<|im_start|>", "<|im_end|>", "<|endoftext|>"])
    words.add_special()
    encodes_the_same(peer, tmp_path, words, TEXTS)


def test_llama_cpp_sees_what_we_see(peer, tmp_path: Path) -> None:
    """The vision tokens of one tile, and the tokens around them; those of six tiles and a thumbnail, too.

    Which grid a picture gets is llama.cpp's own choice, and so is the resampling (docs/hand_over.md): 300 x 200 agrees.
    """
    mtmd = pytest.importorskip("llama_cpp.mtmd_cpp")
    model, processor = written(tmp_path / "m", "1B")
    convert(tmp_path / "m", tmp_path / "g", to="gguf", dtype="float32")
    words, width = processor.tokenizer, model.config.decoder.width
    noise = torch.randint(0, 256, (112, 112, 3), generator=torch.Generator().manual_seed(1), dtype=torch.uint8).numpy()
    with llama(peer, tmp_path / "g") as (peer_model, _):
        params = mtmd.mtmd_context_params_default()
        params.use_gpu, params.n_threads, params.warmup, params.print_timings = False, 1, False, False
        mtmd.mtmd_log_set(SILENT, None)
        mtmd.mtmd_helper_log_set(SILENT, None)
        context = mtmd.mtmd_init_from_file(str(tmp_path / "g" / "mmproj.gguf").encode(), peer_model, params)
        for size in ((112, 112), (300, 200)):
            picture = Image.fromarray(noise).resize(size, Image.Resampling.NEAREST)
            data = picture.tobytes()
            bitmap = mtmd.mtmd_bitmap_init(*size, (ctypes.c_uint8 * len(data)).from_buffer_copy(data))
            text = mtmd.mtmd_input_text()
            text.text = mtmd.mtmd_default_marker() + b"\nWhat?"
            text.text_len, text.add_special, text.parse_special = len(text.text), True, True
            chunks = mtmd.mtmd_input_chunks_init()
            assert mtmd.mtmd_tokenize(context, chunks, ctypes.byref(text), (mtmd.mtmd_bitmap_p_ctypes * 1)(bitmap), 1) == 0
            ids: list[int] = []
            for n in range(mtmd.mtmd_input_chunks_size(chunks)):
                chunk = mtmd.mtmd_input_chunks_get(chunks, n)
                if mtmd.mtmd_input_chunk_get_type(chunk) == mtmd.MTMD_INPUT_CHUNK_TYPE_TEXT:
                    count = ctypes.c_size_t()
                    found = mtmd.mtmd_input_chunk_get_tokens_text(chunk, ctypes.byref(count))
                    ids += found[: count.value]
                    continue
                count = mtmd.mtmd_input_chunk_get_n_tokens(chunk)
                ids += [model.config.image_token_id] * count
                if size == (112, 112):
                    assert mtmd.mtmd_encode_chunk(context, chunk) == 0
                    got = np.ctypeslib.as_array(mtmd.mtmd_get_output_embd(context), shape=(count * width,)).copy()
                    with torch.no_grad():
                        want = model.encode_tiles(torch.from_numpy(noise)[None])[0]
                    got = torch.from_numpy(got).view_as(want)
                    assert torch.cosine_similarity(got, want, dim=-1).min() >= 0.9999
                    assert (got - want).abs().max() <= 0.01 * want.std()  # ggml's GELU is a table of float16
            mtmd.mtmd_input_chunks_free(chunks)
            mtmd.mtmd_bitmap_free(bitmap)
            prompt = processor.prompt((Message("user", (ImageRef(picture), Text("What?"))),)).tokens_T.tolist()
            start = prompt.index(words.id("<img>"))
            assert ids == prompt[start : start + len(ids)]
        mtmd.mtmd_free(context)
