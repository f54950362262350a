"""The real Qwen2.5 vocabulary, taken from the ranks inside the `dashscope` package if it is installed."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from ivl.checkpoint import load_tokenizer, save_processor
from ivl.checkpoint.releases import MODELS
from ivl.config import SPECIAL_TOKENS, published_config
from ivl.processing.chat import INTERNVL2_5_SYSTEM, user
from ivl.processing.processor import Processor
from ivl.processing.tokenizer import Tokenizer
from ivl.types import ImageRef, Message, Text

TEXTS = [
    "Hello world", "  leading and trailing  ", "1234567890 3.14", "don't, WE'LL", "line\r\n\n\tindent",
    "你好，世界！图片里有什么？", "こんにちは、世界", "안녕하세요", "Привет, мир", "مرحبا بالعالم", "שלום", "สวัสดี", "नमस्ते",
    "naïve café Ünïcödé", "🦜👩‍👩‍👧🇩🇪", "def f(x):\n    return x ** 2  # ∑∞", "<ref>猫</ref><box>[[1, 2, 3, 4]]</box>",
]  # fmt: skip


def vocabulary() -> Tokenizer:
    found = importlib.util.find_spec("dashscope")
    if found is None or found.origin is None:
        pytest.skip("the real vocabulary needs: pip install --no-deps dashscope")
    return load_tokenizer(Path(found.origin).parent / "resources")


@pytest.fixture(scope="module")
def qwen() -> Tokenizer:
    tokenizer = vocabulary()
    assert len(tokenizer) == 151665 and tokenizer.bos is None
    assert tokenizer.add_special() == 9
    return tokenizer


def test_ids(qwen):
    assert len(qwen) == 151674
    assert [qwen.id(t) for t in ("<|endoftext|>", "<|im_start|>", "<|im_end|>")] == [151643, 151644, 151645]
    assert [qwen.id(t) for t in SPECIAL_TOKENS] == list(range(151665, 151674))
    # Published ids of common words, which any error in the merges would change.
    assert qwen.encode("Hello world") == [9707, 1879]
    assert qwen.encode("\n") == [198] and qwen.encode("system") == [8948] and qwen.encode("assistant\n") == [77091, 198]


def test_round_trips(qwen):
    for text in TEXTS:
        ids = qwen.encode(text)
        assert qwen.decode(ids) == text
        stream = qwen.stream()
        pieces = [stream.push(i) for i in ids]
        assert "".join(pieces) + stream.flush() == text and "\ufffd" not in "".join(pieces)


def test_prompt_and_files(qwen, tmp_path):
    """The released models' first prompt, token by token, before and after a trip through tokenizer.json."""
    config = published_config("1B")
    prompt = Processor(config, qwen).prompt((user("Hi"),)).tokens_T.tolist()
    assert prompt[:3] == [151644, 8948, 198] and prompt[-3:] == [151644, 77091, 198]
    assert qwen.decode(prompt[3:], skip_special=False).startswith(INTERNVL2_5_SYSTEM + "<|im_end|>\n<|im_start|>user\nHi")
    save_processor(Processor(replace(config, template="plain-chatml"), qwen), tmp_path)
    again = load_tokenizer(tmp_path)
    assert len(again) == 151674 and all(again.encode(text) == qwen.encode(text) for text in TEXTS)


def test_first_prompts_of_later_releases(qwen):
    """Token by token: InternVL3 takes that of 2.5, InternVL3.5 the same without a system message."""
    with_system = [151644, 8948, 198, *qwen.encode(INTERNVL2_5_SYSTEM), 151645, 198]
    question = [151644, 872, 198, 13048, 151645, 198, 151644, 77091, 198]
    assert Processor(MODELS["3-8B"].config, qwen).prompt((user("Hi"),)).tokens_T.tolist() == with_system + question
    # Qwen3 has four tokens more than Qwen2.5, and InternVL's own come after them.
    qwen3 = vocabulary()
    qwen3.add_special(["<tool_response>", "</tool_response>", "<think>", "</think>"])
    qwen3.add_special()
    config = MODELS["3.5-8B"].config
    assert [qwen3.id(token) for token in SPECIAL_TOKENS[:3]] == [151669, 151670, 151671] and config.image_token_id == 151671
    processor = Processor(config, qwen3)
    assert processor.prompt((user("Hi"),)).tokens_T.tolist() == question
    picture = Image.new("RGB", (448, 448))
    shown = processor.prompt((user("<image>\nHi", ImageRef(picture)),)).tokens_T.tolist()
    assert shown == [*question[:3], 151669, *[151671] * 256, 151670, 198, 13048, *question[4:]]
    assert len(qwen3.unused(config.decoder.vocab_size)) == 151936 - 151678  # rows without a token are never generated
    system = processor.prompt((Message("system", (Text("Be brief."),)), user("Hi"))).tokens_T.tolist()
    assert system == [151644, 8948, 198, *qwen.encode("Be brief."), 151645, 198, *question]
