"""Text to token ids and back, over the `tokenizers` library (spec 2.5).

Text is untrusted: a control token typed by somebody (`<|im_start|>`, `<IMG_CONTEXT>`, ...) is encoded as the characters it
is made of. Only the renderer (chat.py) places control tokens, by id. The grounding markers are the exception: they are part
of what a model says and of what users ask, in training data and in prompts alike.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any, Literal

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from ivl.config import SPECIAL_TOKENS
from ivl.errors import InputError

IMAGE_START, IMAGE_END, PLACEHOLDER = SPECIAL_TOKENS[:3]
GROUNDING = SPECIAL_TOKENS[3:]
"""Markers that text may contain as tokens of their own: `<quad>`, `<ref>`, `<box>` and their ends."""
CHATML_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
QWEN_PATTERN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
"""How Qwen2.5 cuts text before merging."""
Style = Literal["bytes", "pieces"]


class Tokenizer:
    """A vocabulary with its added tokens. Nothing is added to a text on its own, no BOS, no prefix."""

    def __init__(self, backend: tokenizers.Tokenizer, *, config: dict[str, Any] | None = None) -> None:
        """config holds the keys of tokenizer_config.json to keep (bos_token, add_bos_token, eos_token, pad_token)."""
        self.backend = with_all_special(backend)
        self.backend.encode_special_tokens = True
        self.backend.no_truncation()
        self.backend.no_padding()
        self.config = dict(config or {})
        self.bos = self._find_bos()
        """Id of the token that starts every sequence, None if the model has none (Qwen)."""
        self._bytes: dict[int, bytes] = {}
        self._style: Style
        self._style, self._strip = decoding_style(backend)
        set_bos(self.backend, self.bos)
        self._refresh()

    def _refresh(self) -> None:
        added = self.backend.get_added_tokens_decoder()
        self._added = frozenset(added)
        self._special = {i for i, token in added.items() if token.special}
        self._markers = {token: found for token in GROUNDING if (found := self.backend.token_to_id(token)) is not None}
        self._split = re.compile(f"({'|'.join(map(re.escape, self._markers))})") if self._markers else None

    def _find_bos(self) -> int | None:
        if self.config.get("add_bos_token") is False:
            return None
        if self.config.get("add_bos_token"):
            return self.id(token_text(self.config.get("bos_token")) or "<s>")
        start = self.backend.encode("").ids  # what the post-processor adds, if there is one
        return start[0] if start else None

    # -- vocabulary

    def __len__(self) -> int:
        return self.backend.get_vocab_size(with_added_tokens=True)

    def id(self, token: str) -> int:
        """The id of one token.

        Raises:
            InputError: if the vocabulary does not have it.
        """
        found = self.backend.token_to_id(token)
        if found is None:
            raise InputError(f"the tokenizer of {len(self)} tokens has no {token!r}")
        return found

    def __contains__(self, token: str) -> bool:
        return self.backend.token_to_id(token) is not None

    def add_special(self, tokens: Iterable[str] = SPECIAL_TOKENS) -> int:
        """Appends the tokens that are missing, in order; returns how many were."""
        missing = [token for token in tokens if token not in self]
        self.backend.add_special_tokens([tokenizers.AddedToken(t, special=True, normalized=False) for t in missing])
        self._refresh()
        return len(missing)

    # -- text to ids

    def encode(self, text: str) -> list[int]:
        """Ids of a text. Grounding markers become their tokens, every other special token stays plain text."""
        ids: list[int] = []
        for piece in self._split.split(text) if self._split else [text]:
            if piece in self._markers:
                ids.append(self._markers[piece])
            elif piece:
                ids += self.backend.encode(piece, add_special_tokens=False).ids
        return ids

    # -- ids to text

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes a token stands for; bytes of several tokens may be needed for one character."""
        if token_id not in self._bytes:
            token = self.backend.id_to_token(token_id)
            if token is None:
                raise InputError(f"token id {token_id} is outside the vocabulary of {len(self)}")
            self._bytes[token_id] = token.encode() if token_id in self._added else piece_bytes(token, self._style)
        return self._bytes[token_id]

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """Text of ids; incomplete UTF-8 becomes U+FFFD. skip_special drops control tokens, never grounding markers."""
        stream = self.stream(skip_special)
        return "".join([*(stream.push(int(i)) for i in ids), stream.flush()])

    def stream(self, skip_special: bool = True) -> TextStream:
        """A decoder that takes one token at a time."""
        return TextStream(self, skip_special)

    def is_control(self, token_id: int) -> bool:
        """Whether the token is special and not a grounding marker."""
        return token_id in self._special and token_id not in self._markers.values()


class TextStream:
    """Tokens in, whole characters out. The pieces of one stream joined are `Tokenizer.decode` of its tokens."""

    def __init__(self, tokenizer: Tokenizer, skip_special: bool) -> None:
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._strip = tokenizer._strip

    def push(self, token_id: int) -> str:
        """Text that became complete with this token; empty while a character is unfinished."""
        if self._skip_special and self._tokenizer.is_control(token_id):
            return ""
        text = self._utf8.decode(self._tokenizer.token_bytes(token_id))
        if self._strip and text:  # SentencePiece put a space before the first word
            text, self._strip = text.removeprefix(" "), False
        return text

    def flush(self) -> str:
        """The end: U+FFFD for a character that never became complete."""
        return self._utf8.decode(b"", final=True)


def token_text(token: Any) -> str | None:
    """tokenizer_config.json writes a token as a string or as an object with its content."""
    return token.get("content") if isinstance(token, dict) else token


def with_all_special(backend: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """The vocabulary with ChatML and InternVL tokens special whatever its file says, so that no text can spell them."""
    plain = [t.content for t in backend.get_added_tokens_decoder().values() if not t.special]
    if not {*CHATML_TOKENS, *SPECIAL_TOKENS}.intersection(plain):
        return backend
    data = json.loads(backend.to_str())
    for token in data["added_tokens"]:
        if token["content"] in (*CHATML_TOKENS, *SPECIAL_TOKENS):
            token["special"] = True
    return tokenizers.Tokenizer.from_str(json.dumps(data))


def set_bos(backend: tokenizers.Tokenizer, bos: int | None) -> None:
    """Makes libraries that call the post-processor start each text with this token, or with none."""
    if bos is not None:
        token = str(backend.id_to_token(bos))
        backend.post_processor = processors.TemplateProcessing(
            single=f"{token} $A", pair=f"{token} $A {token} $B", special_tokens=[(token, bos)]
        )
    elif backend.encode("").ids:
        backend.post_processor = processors.ByteLevel(trim_offsets=False)  # changes no id


def byte_level(model: models.BPE) -> tokenizers.Tokenizer:
    """Build a byte-level BPE tokenizer that cuts text as Qwen2.5 does."""
    backend = tokenizers.Tokenizer(model)
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(QWEN_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    return backend


def train_bpe(texts: Iterable[str], vocab_size: int) -> tokenizers.Tokenizer:
    """Byte-level BPE of at most vocab_size tokens, the 256 bytes among them."""
    if vocab_size < 256:
        raise ValueError(f"a byte-level vocabulary needs 256 tokens besides the special ones, got room for {vocab_size}")
    backend = byte_level(models.BPE())
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(texts, trainer)
    return backend


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE vocabulary from a corpus, with the ChatML and InternVL special tokens at its end.

    vocab_size counts everything; ends earlier if the corpus has no more pairs to merge.

    Raises:
        ValueError: if vocab_size leaves no room for the 256 bytes.
    """
    backend = train_bpe(texts, vocab_size - len(CHATML_TOKENS) - len(SPECIAL_TOKENS))
    tokenizer = Tokenizer(backend, config={"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "add_bos_token": False})
    tokenizer.add_special((*CHATML_TOKENS, *SPECIAL_TOKENS))
    return tokenizer


@cache
def _byte_letters() -> dict[str, int]:
    """The printable letter that byte-level BPE writes for each byte."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + n): b for n, b in enumerate(others)}


@cache
def _letters_of_bytes() -> dict[int, str]:
    return {byte: letter for letter, byte in _byte_letters().items()}


def spell(token: bytes) -> str:
    """Write bytes as a byte-level vocabulary does."""
    letters = _letters_of_bytes()
    return "".join(letters[byte] for byte in token)


def piece_bytes(token: str, style: Style) -> bytes:
    """The bytes of a vocabulary entry (not an added token)."""
    if style == "bytes":
        letters = _byte_letters()
        return bytes(letters[letter] for letter in token)
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        return bytes([int(token[3:5], 16)])
    return token.replace("▁", " ").encode()


def decoding_style(backend: tokenizers.Tokenizer) -> tuple[Style, bool]:
    """How entries spell bytes, and whether a space was put before the first word.

    Raises:
        InputError: for a vocabulary that is neither byte-level nor SentencePiece with byte fallback.
    """
    decode = backend.decoder.decode if backend.decoder else "".join  # asked rather than read: there are many ways to write it
    if decode(["Ġa"]) == " a":
        return "bytes", False
    if decode(["a", "<0x41>"]) == "aA":
        return "pieces", decode(["▁a"]) == "a"
    raise InputError(f"unsupported tokenizer: its decoder {backend.decoder} is neither byte-level nor has byte fallback")
