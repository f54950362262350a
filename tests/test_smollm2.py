"""A real language model through the whole way: SmolLM2-135M from its GGUF file, alone and beside a ViT."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ivl.checkpoint import load_model, load_processor, save_model
from ivl.checkpoint.compose import compose
from ivl.checkpoint.gguf.reader import GgufModel
from ivl.checkpoint.gguf.tokenizer import tokenizer_from_gguf
from ivl.checkpoint.model_dir import fill
from ivl.config import SPECIAL_TOKENS
from ivl.model.decoder import Decoder
from ivl.model.vlm import VLM
from ivl.processing.processor import Processor
from ivl.processing.tokenizer import Tokenizer
from ivl.types import ImageRef, Layout, Message, Text
from tests.helpers.checkpoints import random_model, tiny_like
from tests.helpers.packages import smollm2_gguf

IDS = {
    "Hello, we can use": [19556, 28, 392, 416, 722],
    "The capital of France is": [504, 3575, 282, 4649, 314],
    "\n": [198],
    "Hello world! 123": [19556, 905, 17, 216, 33, 34, 35],
    "Café déjà vu.": [51, 1939, 2756, 32564, 90, 16739, 386, 101, 30],
    "  multiple   spaces": [216, 2701, 256, 5600],
}
"""As the model's own tokenizer has them."""
NEXT = [29, 970, 16438, 351, 690, 253, 4411, 2767, 198, 198, 260, 99, 30, 253, 33, 32, 2737, 30, 198, 198]
LARGEST = [
    27.3534, 26.1422, 11.1534, 18.1553, 23.0743, 20.372, 9.3128, 14.68, 26.3829, 17.9975, 16.1715, 31.259, 24.3505, 16.0849,
    38.7913, 31.632, 29.8721, 25.6066, 15.8958, 30.713,
]  # fmt: skip
LOG_SUM = [
    28.2188, 28.2907, 12.5693, 18.8748, 23.0793, 20.484, 10.99, 14.7917, 27.714, 20.1465, 18.3434, 31.3795, 25.923, 16.9909,
    39.1531, 33.2223, 30.3867, 27.015, 17.9364, 31.3027,
]  # fmt: skip
PROMPT = "The capital of France is"


@pytest.fixture(scope="module")
def gguf_file() -> Path:
    return smollm2_gguf()


@pytest.fixture(scope="module")
def alone(gguf_file: Path) -> tuple[Decoder, Tokenizer]:
    file = GgufModel(gguf_file)
    with torch.device("meta"):
        decoder = Decoder(file.config)
    decoder = decoder.to_empty(device="cpu").eval()
    fill(dict(decoder.named_parameters("decoder")), file.key_map(decoder), file)
    return decoder, tokenizer_from_gguf(file.vocabulary())


@pytest.fixture(scope="module")
def composed(gguf_file: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[VLM, Processor, VLM]:
    """The composed model, its processor, and the model whose ViT it has."""
    folder = tmp_path_factory.mktemp("smollm2")
    small = random_model(tiny_like("1B"))
    save_model(small, folder / "small")
    compose(folder / "small", gguf_file, None, folder / "out")
    return load_model(folder / "out"), load_processor(folder / "out"), small


@torch.no_grad()
def logits(decoder: Decoder, ids: list[int]) -> torch.Tensor:
    return decoder.head(decoder(decoder.embeddings(torch.tensor(ids)), Layout.packed((len(ids),))))


def test_tokens_are_those_of_the_original(alone: tuple[Decoder, Tokenizer]) -> None:
    words = alone[1]
    assert len(words) == 49152
    for text, ids in IDS.items():
        assert words.encode(text) == ids
        assert words.decode(ids) == text


def test_it_knows_the_capital_of_france(alone: tuple[Decoder, Tokenizer]) -> None:
    decoder, words = alone
    ids = words.encode(PROMPT)
    for _ in range(2):
        ids.append(int(logits(decoder, ids)[-1].argmax()))
    assert words.decode(ids) == f"{PROMPT} Paris."


def test_logits_equal_those_of_transformers(alone: tuple[Decoder, Tokenizer]) -> None:
    """Golden figures: what transformers 5.23 computes from the same file (`from_pretrained(..., gguf_file=...)`, float32)."""
    decoder, words = alone
    ids = words.encode("The quick brown fox jumps over the lazy dog, then sleeps for 12 hours.\n")
    logits_TV = logits(decoder, ids)
    assert logits_TV.argmax(-1).tolist() == NEXT
    torch.testing.assert_close(logits_TV.amax(-1), torch.tensor(LARGEST), atol=5e-4, rtol=0)
    torch.testing.assert_close(logits_TV.logsumexp(-1), torch.tensor(LOG_SUM), atol=5e-4, rtol=0)


def test_composing_leaves_text_and_vit_unchanged(composed, alone: tuple[Decoder, Tokenizer]) -> None:
    model, processor, small = composed
    decoder, words = alone
    assert processor.tokenizer.encode(PROMPT) == words.encode(PROMPT)
    assert [processor.tokenizer.id(token) for token in SPECIAL_TOKENS] == list(range(49152, 49161))
    assert model.config.eos_token_ids == (2,)  # <|im_end|>
    ids = words.encode(PROMPT)
    old, new = decoder.state_dict(), model.decoder.state_dict()
    assert old.keys() == new.keys()
    # Weights are the same bits; sums of a wider product may round otherwise.
    assert all(torch.equal(new[name][: len(tensor)], tensor) for name, tensor in old.items())
    assert (logits(model.decoder, ids)[:, :49152] - logits(decoder, ids)).abs().max() <= 1e-4
    assert all(torch.equal(a, b) for a, b in zip(model.vision.parameters(), small.vision.parameters(), strict=True))


def test_an_image_prompt_runs(composed) -> None:
    from PIL import Image

    model, processor, _ = composed
    question = (ImageRef(Image.new("RGB", (60, 30), "red")), Text("What is the capital of France?"))
    prompt = processor.prompt((Message("system", (Text("You answer."),)), Message("user", question)))
    ids = prompt.tokens_T.tolist()
    with torch.no_grad():
        vision_RUD = model.encode_tiles(prompt.tiles_GSSC)[prompt.tile_ids_R]
        hidden_TD = model(prompt.tokens_T, Layout.packed((len(ids),)), vision_RUD)
        assert model.head(hidden_TD[-1:]).isfinite().all()
