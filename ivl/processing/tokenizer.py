"""Text to token ids and back, over the `tokenizers` library (spec 2.5).

Text is untrusted: a control token typed by somebody (`<|im_start|>`, `<IMG_CONTEXT>`, ...) is encoded as the characters it
is made of. Only the renderer (chat.py) places control tokens, by id. The grounding markers are the exception: they are part
of what a model says and of what users ask, in training data and in prompts alike.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from ivl.checkpoint import vocabulary
from ivl.config import SPECIAL_TOKENS
from ivl.errors import InputError

IMAGE_START, IMAGE_END, PLACEHOLDER = SPECIAL_TOKENS[:3]
GROUNDING = SPECIAL_TOKENS[3:]
"""Markers that text may contain as tokens of their own: `<quad>`, `<ref>`, `<box>` and their ends."""
CONFIG_FILE = "tokenizer_config.json"


class Tokenizer:
    """A vocabulary with its added tokens. Nothing is added to a text on its own, no BOS, no prefix."""

    def __init__(self, backend: tokenizers.Tokenizer, *, config: dict[str, Any] | None = None) -> None:
        """config holds the keys of tokenizer_config.json to keep (bos_token, add_bos_token, eos_token, pad_token)."""
        self.backend = vocabulary.with_all_special(backend)
        self.backend.encode_special_tokens = True
        self.backend.no_truncation()
        self.backend.no_padding()
        self.config = dict(config or {})
        self.bos = self._find_bos()
        """Id of the token that starts every sequence, None if the model has none (Qwen)."""
        self._bytes: dict[int, bytes] = {}
        self._style: vocabulary.Style
        self._style, self._strip = vocabulary.decoding_style(backend)
        vocabulary.set_bos(self.backend, self.bos)
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

    # -- files

    @classmethod
    def load(cls, directory: str | Path) -> Tokenizer:
        """Reads tokenizer.json, else vocab.json + merges.txt, else *.tiktoken ranks (Qwen), else tokenizer.model (InternLM2.5).

        Raises:
            InputError: if the directory has none of them, or they contradict each other.
        """
        backend, config = vocabulary.load(Path(directory))
        return cls(backend, config=config)

    def save(self, directory: str | Path, **config: Any) -> None:
        """Writes tokenizer.json, tokenizer_config.json (with the given keys added) and special_tokens_map.json."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        self.backend.encode_special_tokens = False  # ours at run time only; other libraries decide for themselves
        self.backend.save(str(directory / "tokenizer.json"))
        self.backend.encode_special_tokens = True
        keys = ("bos_token", "eos_token", "pad_token", "unk_token")
        special = {key: text for key in keys if (text := token_text(self.config.get(key)))}
        added = {
            str(i): {
                "content": token.content, "lstrip": token.lstrip, "normalized": token.normalized,
                "rstrip": token.rstrip, "single_word": token.single_word, "special": token.special,
            }
            for i, token in sorted(self.backend.get_added_tokens_decoder().items())
        }  # fmt: skip
        written = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "add_bos_token": self.bos is not None,
            "clean_up_tokenization_spaces": False,
            "bos_token": None,
            **special,
            "added_tokens_decoder": added,
            **config,
        }
        vocabulary.write_json(directory / CONFIG_FILE, written)
        vocabulary.write_json(directory / "special_tokens_map.json", special)

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
            self._bytes[token_id] = token.encode() if token_id in self._added else vocabulary.piece_bytes(token, self._style)
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


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE vocabulary from a corpus, with the ChatML and InternVL special tokens at its end.

    vocab_size counts everything; ends earlier if the corpus has no more pairs to merge.

    Raises:
        ValueError: if vocab_size leaves no room for the 256 bytes.
    """
    chatml = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    backend = vocabulary.train_bpe(texts, vocab_size - len(chatml) - len(SPECIAL_TOKENS))
    tokenizer = Tokenizer(backend, config={"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "add_bos_token": False})
    tokenizer.add_special((*chatml, *SPECIAL_TOKENS))
    return tokenizer
