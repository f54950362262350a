"""Text to token ids and back, over the `tokenizers` library.

Text is untrusted: a control token that somebody typed (`<|im_start|>`, `<IMG_CONTEXT>`, ...) is encoded as its characters.
Only the renderer (chat.py) places control tokens, by id. The grounding markers are the exception: models write them and users
ask with them, in training data and in prompts alike.
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
from ivl.errors import InputError, short

IMAGE_START, IMAGE_END, PLACEHOLDER = SPECIAL_TOKENS[:3]
GROUNDING = SPECIAL_TOKENS[3:]
"""Markers that text may contain as tokens of their own: `<quad>`, `<ref>`, `<box>` and their ends."""
CHATML_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
QWEN_PATTERN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
"""Qwen2.5 cuts text by this pattern before merging."""
Spelling = Literal["bytes", "pieces"]
"""bytes: byte-level BPE, a printable letter for each byte. pieces: SentencePiece, `▁` for a space and `<0x0A>` for a byte."""


class Tokenizer:
    """A vocabulary with its added tokens. Nothing is added to a text by itself, neither BOS nor prefix."""

    def __init__(self, backend: tokenizers.Tokenizer, *, config: dict[str, Any] | None = None) -> None:
        """config holds the keys of tokenizer_config.json to keep (bos_token, add_bos_token, eos_token, pad_token)."""
        self.backend = _with_all_special(backend)
        self.backend.encode_special_tokens = True
        self.backend.no_truncation()
        self.backend.no_padding()
        self.config = dict(config or {})
        self.bos = self._find_bos()
        """Id of the token that starts every sequence, None if the model has none (Qwen)."""
        self.sentencepiece: bytes | None = None
        """The tokenizer.model beside it, which the classes of other libraries read."""
        self.spelling: Spelling
        self.spelling, self.strips_space = spelling_of(backend)
        self._bytes: dict[int, bytes] = {}
        set_bos(self.backend, self.bos)
        self._refresh()

    def _refresh(self) -> None:
        added = self.backend.get_added_tokens_decoder()
        self._added = frozenset(added)
        self._special = {i for i, token in added.items() if token.special}
        self._markers = {token: i for token in GROUNDING if (i := self.backend.token_to_id(token)) is not None}
        self._split = re.compile(f"({'|'.join(map(re.escape, self._markers))})") if self._markers else None

    def _find_bos(self) -> int | None:
        if self.config.get("add_bos_token") is False:
            return None
        if self.config.get("add_bos_token"):
            return self.id(token_text(self.config.get("bos_token")) or "<s>")
        start = self.backend.encode("").ids  # the tokens that the post-processor adds, if there is one
        return start[0] if start else None

    def __len__(self) -> int:
        return self.backend.get_vocab_size(with_added_tokens=True)

    def __contains__(self, token: str) -> bool:
        return self.backend.token_to_id(token) is not None

    def id(self, token: str) -> int:
        """The id of one token; raises InputError if the vocabulary does not have it."""
        token_id = self.backend.token_to_id(token)
        if token_id is None:
            raise InputError(f"the tokenizer of {len(self)} tokens has no {token!r}")
        return token_id

    def add_special(self, tokens: Iterable[str] = SPECIAL_TOKENS) -> int:
        """Append the tokens that are missing, in order, and return their number."""
        missing = [token for token in tokens if token not in self]
        self.backend.add_special_tokens([tokenizers.AddedToken(t, special=True, normalized=False) for t in missing])
        self._refresh()
        return len(missing)

    def encode(self, text: str) -> list[int]:
        """Ids of a text. Grounding markers become their tokens, every other special token stays plain text.

        Raises:
            InputError: for what is no text or has half a surrogate pair, and where the library itself fails.
        """
        ids: list[int] = []
        try:
            for piece in self._split.split(text) if self._split else [text]:
                if piece in self._markers:
                    ids.append(self._markers[piece])
                elif piece:
                    ids += self.backend.encode_batch_fast([piece], add_special_tokens=False)[0].ids  # lets other threads run
        except (TypeError, UnicodeError):
            raise InputError(f"not a text that can be encoded: {short(text)}") from None
        except BaseException as error:  # the library's panics are no Exception
            if type(error).__name__ != "PanicException":
                raise
            raise InputError(f"the tokenizer fails at a text of {len(text):,} characters: {short(text)}") from None
        return ids

    def unused(self, vocab_size: int) -> list[int]:
        """The ids below vocab_size that have no token: padding of the model's rows, and gaps."""
        return [i for i in range(vocab_size) if self.backend.id_to_token(i) is None]

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of a token; one character may need the bytes of several."""
        if token_id not in self._bytes:
            token = self.backend.id_to_token(token_id)
            if token is None:
                raise InputError(f"token id {token_id} is outside the vocabulary of {len(self)}")
            self._bytes[token_id] = token.encode() if token_id in self._added else _piece_bytes(token, self.spelling)
        return self._bytes[token_id]

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """Text of ids; incomplete UTF-8 becomes U+FFFD. skip_special drops control tokens, never grounding markers."""
        stream = self.stream(skip_special)
        return "".join([*(stream.push(int(i)) for i in ids), stream.flush()])

    def stream(self, skip_special: bool = True) -> TokenDecoder:
        """A decoder that takes one token at a time."""
        return TokenDecoder(self, skip_special)

    def is_control(self, token_id: int) -> bool:
        """Whether the token is special and not a grounding marker."""
        return token_id in self._special and token_id not in self._markers.values()


class TokenDecoder:
    """Takes tokens and gives whole characters. The texts of one decoder joined are `Tokenizer.decode` of its tokens."""

    def __init__(self, tokenizer: Tokenizer, skip_special: bool) -> None:
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._strip = tokenizer.strips_space

    def push(self, token_id: int) -> str:
        """Text that this token completes; empty while a character is unfinished."""
        if self._skip_special and self._tokenizer.is_control(token_id):
            return ""
        text = self._utf8.decode(self._tokenizer.token_bytes(token_id))
        if self._strip and text:  # SentencePiece put a space before the first word
            text, self._strip = text.removeprefix(" "), False
        return text

    def flush(self) -> str:
        """The end of the text: U+FFFD for a character that was not completed."""
        return self._utf8.decode(b"", final=True)


def token_text(token: dict[str, Any] | str | None) -> str | None:
    """A token of tokenizer_config.json, which is written as a string or as an object with its content."""
    return token.get("content") if isinstance(token, dict) else token


def _with_all_special(backend: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """Make ChatML's and InternVL's tokens special whatever the vocabulary's file says, so that no text can spell them."""
    plain = [token.content for token in backend.get_added_tokens_decoder().values() if not token.special]
    if not {*CHATML_TOKENS, *SPECIAL_TOKENS}.intersection(plain):
        return backend
    data = json.loads(backend.to_str())
    for token in data["added_tokens"]:
        if token["content"] in (*CHATML_TOKENS, *SPECIAL_TOKENS):
            token["special"] = True
    return tokenizers.Tokenizer.from_str(json.dumps(data))


def set_bos(backend: tokenizers.Tokenizer, bos: int | None) -> None:
    """Make libraries that call the post-processor start each text with this token, or with none."""
    if bos is not None:
        token = str(backend.id_to_token(bos))
        backend.post_processor = processors.TemplateProcessing(
            single=f"{token} $A", pair=f"{token} $A {token} $B", special_tokens=[(token, bos)]
        )
    elif backend.encode("").ids:
        backend.post_processor = processors.ByteLevel(trim_offsets=False)  # changes no id


def byte_level(model: models.BPE) -> tokenizers.Tokenizer:
    """Build a byte-level BPE vocabulary that cuts text as Qwen2.5 does."""
    backend = tokenizers.Tokenizer(model)
    backend.normalizer = normalizers.NFC()
    cut = pre_tokenizers.Split(tokenizers.Regex(QWEN_PATTERN), "isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence([cut, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    backend.decoder = decoders.ByteLevel()
    return backend


def train_tokenizer(
    texts: Iterable[str], vocab_size: int, special: Sequence[str] = (*CHATML_TOKENS, *SPECIAL_TOKENS)
) -> Tokenizer:
    """Train a byte-level BPE vocabulary, with the special tokens at its end.

    vocab_size counts all tokens; the vocabulary is smaller if the texts have no more pairs to merge.

    Raises:
        ValueError: if vocab_size leaves no room for the 256 bytes.
    """
    room = vocab_size - len(special)
    if room < 256:
        raise ValueError(f"a byte-level vocabulary needs 256 tokens besides the special ones, got room for {room}")
    backend = byte_level(models.BPE())
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=room, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(texts, trainer)
    tokenizer = Tokenizer(backend, config={"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "add_bos_token": False})
    tokenizer.add_special(special)
    return tokenizer


@cache
def byte_letters() -> dict[str, int]:
    """The printable letter that byte-level BPE writes for each byte."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + n): b for n, b in enumerate(others)}


def _piece_bytes(token: str, spelling: Spelling) -> bytes:
    """The bytes of a vocabulary entry that is no added token."""
    if spelling == "bytes":
        letters = byte_letters()
        return bytes(letters[letter] for letter in token)
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        return bytes([int(token[3:5], 16)])
    return token.replace("▁", " ").encode()


def spelling_of(backend: tokenizers.Tokenizer) -> tuple[Spelling, bool]:
    """How the entries of a vocabulary spell bytes, and whether encoding put a space before the first word.

    Raises:
        InputError: for a vocabulary that is neither byte-level nor SentencePiece with byte fallback.
    """
    # Trying the decoder is safer than reading its description, which can be written in many ways.
    decode = backend.decoder.decode if backend.decoder else "".join
    if decode(["Ġa"]) == " a":
        return "bytes", False
    if decode(["a", "<0x41>"]) == "aA":
        return "pieces", decode(["▁a"]) == "a"
    raise InputError(f"unsupported tokenizer: its decoder {backend.decoder} is neither byte-level nor has byte fallback")
