"""Vocabulary files of Qwen2.5 and InternLM2.5 as a `tokenizers.Tokenizer`, so that all of them end as tokenizer.json."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any, Literal

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers

from ivl.config import SPECIAL_TOKENS
from ivl.errors import InputError

CONTROL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
QWEN_PATTERN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
"""How Qwen2.5 cuts text before merging."""
QWEN_ADDED = (
    *CONTROL, "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>",
    "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>", "<tool_call>", "</tool_call>",
    "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>",
)  # fmt: skip
"""Ids 151643 to 151664 of Qwen2.5."""
QWEN_PLAIN = QWEN_ADDED[14:]
"""The added tokens of Qwen2.5 that its own files do not call special."""
QWEN_RANKS = 151643
INTERNLM2_PIECES = 92544
INTERNLM2_ADDED = {92542: "<|im_end|>", 92543: "<|im_start|>"}
"""tokenizer.model of InternLM2.5 has these two under reserved names; its configuration renames them."""
Style = Literal["bytes", "pieces"]


def load(directory: Path) -> tuple[tokenizers.Tokenizer, dict[str, Any]]:
    """The vocabulary of a model directory and its tokenizer_config.json ({} without one)."""
    config_file = directory / "tokenizer_config.json"
    config = read_json(config_file) if config_file.exists() else {}
    ranks = sorted(directory.glob("*.tiktoken"))
    if (file := directory / "tokenizer.json").exists():
        try:
            return tokenizers.Tokenizer.from_file(str(file)), config
        except Exception as error:  # the library raises no narrower type
            raise InputError(f"{file}: not a tokenizer of the tokenizers library ({error})") from error
    if (directory / "vocab.json").exists() and (directory / "merges.txt").exists():
        backend = from_merges(read_json(directory / "vocab.json"), read_merges(directory / "merges.txt"))
    elif ranks:
        backend = from_ranks(ranks[0])
        config = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "add_bos_token": False} | config
    elif (file := directory / "tokenizer.model").exists():
        return from_sentencepiece(file, _added(directory, config)), {"bos_token": "<s>", "add_bos_token": True} | config
    else:
        raise InputError(
            f"{directory}: no tokenizer here; expected tokenizer.json, vocab.json with merges.txt, "
            "a .tiktoken file or tokenizer.model"
        )
    _append(backend, _added(directory, config), directory)
    return backend, config


def read_json(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(f"{file}: not readable as JSON ({error})") from error


def write_json(file: Path, value: Any) -> None:
    file.write_text(json.dumps(value, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def _added(directory: Path, config: dict[str, Any]) -> dict[int, AddedToken]:
    """Added tokens by id, from tokenizer_config.json and added_tokens.json."""
    found: dict[int, AddedToken] = {}
    if (file := directory / "added_tokens.json").exists():
        found = {i: AddedToken(text, special=True, normalized=False) for text, i in read_json(file).items()}
    for key, token in config.get("added_tokens_decoder", {}).items():
        flags = {name: bool(token.get(name, False)) for name in ("lstrip", "rstrip", "normalized", "single_word", "special")}
        found[int(key)] = AddedToken(token["content"], **flags)
    return dict(sorted(found.items()))


def _append(backend: tokenizers.Tokenizer, added: dict[int, AddedToken], directory: Path) -> None:
    """Added tokens in the order of their ids, each of which must come out as announced."""
    for i, token in added.items():
        (backend.add_special_tokens if token.special else backend.add_tokens)([token])
        got = backend.token_to_id(token.content)
        if got != i:
            raise InputError(f"{directory}: added token {token.content!r} should have id {i} but the vocabulary gives {got}")


def with_all_special(backend: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """The vocabulary with ChatML and InternVL tokens special whatever its file says, so that no text can spell them."""
    plain = [t.content for t in backend.get_added_tokens_decoder().values() if not t.special]
    if not {*CONTROL, *SPECIAL_TOKENS}.intersection(plain):
        return backend
    data = json.loads(backend.to_str())
    for token in data["added_tokens"]:
        if token["content"] in (*CONTROL, *SPECIAL_TOKENS):
            token["special"] = True
    return tokenizers.Tokenizer.from_str(json.dumps(data))


# -- byte-level BPE: Qwen2.5 and our own


def _byte_level(model: models.BPE) -> tokenizers.Tokenizer:
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


def read_merges(file: Path) -> list[tuple[str, str]]:
    merges = []
    for number, line in enumerate(file.read_text(encoding="utf-8").split("\n"), 1):
        if not line or line.startswith("#version"):
            continue
        left, _, right = line.partition(" ")
        if not left or not right or " " in right:
            raise InputError(f"{file}:{number}: expected two tokens and a space, got {line!r}")
        merges.append((left, right))
    return merges


def from_merges(vocab: dict[str, int], merges: list[tuple[str, str]]) -> tokenizers.Tokenizer:
    """vocab.json and merges.txt of Qwen2.5."""
    return _byte_level(models.BPE(vocab=vocab, merges=merges))


def from_ranks(file: Path) -> tokenizers.Tokenizer:
    """A `.tiktoken` file (base64 bytes and a rank a line) with Qwen2.5's added tokens after it.

    The merge that makes a token is the last one its own bytes need when all lower ranks are applied.
    """
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(file.read_text(encoding="ascii").splitlines(), 1):
        token, _, rank = line.partition(" ")
        if not rank.isdigit():
            raise InputError(f"{file}:{number}: expected base64 bytes and a rank, got {line[:80]!r}")
        ranks[base64.b64decode(token)] = int(rank)
    merges = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        if len(token) > 1:
            left, right = _last_merge(token, rank, ranks)
            merges.append((_spell(left), _spell(right)))
    backend = from_merges({_spell(token): rank for token, rank in ranks.items()}, merges)
    backend.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in QWEN_ADDED if t not in QWEN_PLAIN])
    backend.add_tokens([AddedToken(t, special=False, normalized=False) for t in QWEN_PLAIN])
    return backend


def _last_merge(token: bytes, rank: int, ranks: dict[bytes, int]) -> tuple[bytes, bytes]:
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        best, at = min((ranks.get(parts[i] + parts[i + 1], rank), i) for i in range(len(parts) - 1))
        if best >= rank:
            raise InputError(f"rank {rank} ({token!r}) cannot be made from lower ranks")
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts[0], parts[1]


def train_bpe(texts: Iterable[str], vocab_size: int) -> tokenizers.Tokenizer:
    """Byte-level BPE of at most vocab_size tokens, the 256 bytes among them."""
    if vocab_size < 256:
        raise ValueError(f"a byte-level vocabulary needs 256 tokens besides the special ones, got room for {vocab_size}")
    backend = _byte_level(models.BPE())
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(texts, trainer)
    return backend


# -- SentencePiece: InternLM2.5


def from_sentencepiece(file: Path, added: dict[int, AddedToken]) -> tokenizers.Tokenizer:
    """A SentencePiece BPE model with byte fallback. added renames pieces by id or appends tokens after the last.

    Needs the `sentencepiece` extra.
    """
    try:
        from sentencepiece import sentencepiece_model_pb2
    except ImportError as error:
        raise InputError(f"{file}: reading it needs sentencepiece and protobuf: pip install 'ivl[sentencepiece]'") from error
    schema: Any = sentencepiece_model_pb2
    proto = schema.ModelProto.FromString(file.read_bytes())
    kinds = schema.ModelProto.SentencePiece
    if proto.trainer_spec.model_type != proto.trainer_spec.BPE:
        raise InputError(f"{file}: only SentencePiece models of type BPE are supported")
    names: dict[int, str] = {i: str(token.content) for i, token in added.items()}
    if not added and len(proto.pieces) == INTERNLM2_PIECES:
        names = INTERNLM2_ADDED
    vocab: dict[str, int] = {names.get(i) or str(piece.piece): i for i, piece in enumerate(proto.pieces)}
    scores = {p.piece: p.score for i, p in enumerate(proto.pieces) if p.type == kinds.NORMAL and i not in names}
    unknown = next(piece.piece for piece in proto.pieces if piece.type == kinds.UNKNOWN)
    backend = tokenizers.Tokenizer(
        models.BPE(vocab=vocab, merges=merges_from_scores(scores, vocab), unk_token=unknown, fuse_unk=True, byte_fallback=True)
    )
    for i, piece in enumerate(proto.pieces):
        if i in names or piece.type in (kinds.CONTROL, kinds.UNKNOWN):
            backend.add_special_tokens([AddedToken(names.get(i) or piece.piece, special=True, normalized=False)])
        elif piece.type == kinds.USER_DEFINED:  # matched in any text, before everything else
            backend.add_tokens([AddedToken(piece.piece, special=False, normalized=False)])
    _append(backend, {i: token for i, token in added.items() if i >= len(proto.pieces)}, file.parent)
    prefix = proto.normalizer_spec.add_dummy_prefix
    steps: list[normalizers.Normalizer] = []
    if proto.normalizer_spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(proto.normalizer_spec.precompiled_charsmap))
    if proto.normalizer_spec.remove_extra_whitespaces:
        steps += [normalizers.Strip(), normalizers.Replace(tokenizers.Regex(" {2,}"), " ")]
    if prefix:
        steps.append(normalizers.Prepend("▁"))
    backend.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    undo: list[decoders.Decoder] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*undo, decoders.Strip(" ", 1, 0)] if prefix else undo)
    bos = next((i for i, piece in enumerate(proto.pieces) if piece.piece == "<s>"), None)
    set_bos(backend, bos)
    return backend


def set_bos(backend: tokenizers.Tokenizer, bos: int | None) -> None:
    """Makes libraries that call the post-processor start each text with this token, or with none."""
    if bos is not None:
        token = str(backend.id_to_token(bos))
        backend.post_processor = processors.TemplateProcessing(
            single=f"{token} $A", pair=f"{token} $A {token} $B", special_tokens=[(token, bos)]
        )
    elif backend.encode("").ids:
        backend.post_processor = processors.ByteLevel(trim_offsets=False)  # changes no id


def merges_from_scores(scores: dict[str, float], vocab: dict[str, int]) -> list[tuple[str, str]]:
    """SentencePiece keeps no merges: any two pieces whose join is a piece may merge, best score first."""
    found = []
    for piece, score in scores.items():
        cuts = [(piece[:i], piece[i:]) for i in range(1, len(piece))]
        pairs = [(left, right) for left, right in cuts if left in scores and right in scores]
        pairs.sort(key=lambda pair: (vocab[pair[0]], vocab[pair[1]]))
        found += [(-score, vocab.get(piece, 0), n, pair) for n, pair in enumerate(pairs)]
    return [pair for *_, pair in sorted(found)]


# -- what a token stands for


@cache
def _byte_letters() -> dict[str, int]:
    """The printable letter that byte-level BPE writes for each byte."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + n): b for n, b in enumerate(others)}


@cache
def _letters_of_bytes() -> dict[int, str]:
    return {byte: letter for letter, byte in _byte_letters().items()}


def _spell(token: bytes) -> str:
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
