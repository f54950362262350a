"""Tokenizer files in and out: tokenizer.json, vocab.json with merges.txt, `.tiktoken` ranks, and SentencePiece models."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers

from ivl.errors import InputError
from ivl.processing.tokenizer import CHATML_TOKENS, Tokenizer, byte_letters, byte_level, set_bos, token_text
from ivl.utils.files import write_json
from ivl.utils.strict_json import read_json

QWEN_ADDED = (
    *CHATML_TOKENS, "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>", "<|box_end|>",
    "<|quad_start|>", "<|quad_end|>", "<|vision_start|>",
    "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>", "<tool_call>", "</tool_call>",
    "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>",
)  # fmt: skip
"""Ids 151643 to 151664 of Qwen2.5."""
QWEN_PLAIN = QWEN_ADDED[14:]
"""The added tokens of Qwen2.5 that its own files do not call special."""
INTERNLM2_PIECES = 92544
INTERNLM2_ADDED = {92542: "<|im_end|>", 92543: "<|im_start|>"}
"""tokenizer.model of InternLM2.5 has these two under reserved names; its configuration renames them."""
CONFIG_FILE = "tokenizer_config.json"
ADDED_TOKEN_FLAGS = ("lstrip", "normalized", "rstrip", "single_word", "special")


def load_tokenizer(directory: str | Path) -> Tokenizer:
    """Read tokenizer.json, else vocab.json and merges.txt, else `.tiktoken` ranks (Qwen), else tokenizer.model (InternLM2.5).

    Raises:
        InputError: if the directory has none of them, or they contradict each other.
    """
    directory = Path(directory)
    config_file = directory / CONFIG_FILE
    config = read_json(config_file) if config_file.exists() else {}
    ranks = sorted(directory.glob("*.tiktoken"))
    if (file := directory / "tokenizer.json").exists():
        try:
            return Tokenizer(tokenizers.Tokenizer.from_file(str(file)), config=config)
        except Exception as error:  # the library raises no narrower type
            raise InputError(f"{file}: not a tokenizer of the tokenizers library ({error})") from error
    if (directory / "vocab.json").exists() and (directory / "merges.txt").exists():
        try:
            model = models.BPE.from_file(str(directory / "vocab.json"), str(directory / "merges.txt"))
        except Exception as error:  # the library raises no narrower type
            raise InputError(f"{directory}: vocab.json and merges.txt are no BPE vocabulary: {error}") from error
        backend = byte_level(model)
    elif ranks:
        backend = from_ranks(ranks[0])
        config = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "add_bos_token": False} | config
    elif (file := directory / "tokenizer.model").exists():
        backend = from_sentencepiece(file, _added(directory, config))
        return Tokenizer(backend, config={"bos_token": "<s>", "add_bos_token": True} | config)
    else:
        raise InputError(
            f"{directory}: no tokenizer here; expected tokenizer.json, vocab.json with merges.txt, "
            "a .tiktoken file or tokenizer.model"
        )
    append_tokens(backend, _added(directory, config), directory)
    return Tokenizer(backend, config=config)


def save_tokenizer(tokenizer: Tokenizer, directory: str | Path, **config: Any) -> None:
    """Write tokenizer.json, tokenizer_config.json (with the given keys added) and special_tokens_map.json."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    backend = tokenizer.backend
    backend.encode_special_tokens = False  # ours at run time only; other libraries decide for themselves
    backend.save(str(directory / "tokenizer.json"))
    backend.encode_special_tokens = True
    keys = ("bos_token", "eos_token", "pad_token", "unk_token")
    special = {key: text for key in keys if (text := token_text(tokenizer.config.get(key)))}
    flags = ("content", *ADDED_TOKEN_FLAGS)
    added = sorted(backend.get_added_tokens_decoder().items())
    written = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": tokenizer.bos is not None,
        "clean_up_tokenization_spaces": False,
        "bos_token": None,
        **special,
        "added_tokens_decoder": {str(i): {flag: getattr(token, flag) for flag in flags} for i, token in added},
        **config,
    }
    write_json(directory / CONFIG_FILE, written)
    write_json(directory / "special_tokens_map.json", special)


def _added(directory: Path, config: dict[str, Any]) -> dict[int, AddedToken]:
    """Added tokens by id, from tokenizer_config.json and added_tokens.json."""
    found: dict[int, AddedToken] = {}
    if (file := directory / "added_tokens.json").exists():
        found = {i: AddedToken(text, special=True, normalized=False) for text, i in read_json(file).items()}
    for key, token in config.get("added_tokens_decoder", {}).items():
        flags = {name: bool(token.get(name, False)) for name in ADDED_TOKEN_FLAGS}
        found[int(key)] = AddedToken(token["content"], **flags)
    return dict(sorted(found.items()))


def append_tokens(backend: tokenizers.Tokenizer, added: dict[int, AddedToken], place: object) -> None:
    """Added tokens in the order of their ids, each of which must come out as announced."""
    for i, token in added.items():
        (backend.add_special_tokens if token.special else backend.add_tokens)([token])
        got = backend.token_to_id(token.content)
        if got != i:
            raise InputError(f"{place}: added token {token.content!r} should have id {i} but the vocabulary gives {got}")


# -- byte-level BPE: Qwen2.5 and our own


def from_ranks(file: Path) -> tokenizers.Tokenizer:
    """A `.tiktoken` file (base64 bytes and a rank a line) with Qwen2.5's added tokens after it.

    The merge that makes a token is the last one its own bytes need when all lower ranks are applied.
    """
    letters = {byte: letter for letter, byte in byte_letters().items()}
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(file.read_text(encoding="ascii").splitlines(), 1):
        token, _, rank = line.partition(" ")
        if not rank.isdigit():
            raise InputError(f"{file}:{number}: expected base64 bytes and a rank, got {line[:80]!r}")
        ranks[base64.b64decode(token)] = int(rank)
    pairs = [_last_merge(token, rank, ranks) for token, rank in ranks.items() if len(token) > 1]
    pairs.sort(key=lambda pair: ranks[pair[0] + pair[1]])
    vocab = {"".join(letters[byte] for byte in token): rank for token, rank in ranks.items()}
    spelled = dict(zip(ranks, vocab, strict=True))
    backend = byte_level(models.BPE(vocab=vocab, merges=[(spelled[left], spelled[right]) for left, right in pairs]))
    added = {len(ranks) + n: AddedToken(t, special=t not in QWEN_PLAIN, normalized=False) for n, t in enumerate(QWEN_ADDED)}
    append_tokens(backend, added, file.parent)
    return backend


def _last_merge(token: bytes, rank: int, ranks: dict[bytes, int]) -> tuple[bytes, bytes]:
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        best, at = min((ranks.get(parts[i] + parts[i + 1], rank), i) for i in range(len(parts) - 1))
        if best >= rank:
            raise InputError(f"rank {rank} ({token!r}) cannot be made from lower ranks")
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts[0], parts[1]


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
    steps: list[normalizers.Normalizer] = []
    if proto.normalizer_spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(proto.normalizer_spec.precompiled_charsmap))
    if proto.normalizer_spec.remove_extra_whitespaces:
        steps += [normalizers.Strip(), normalizers.Replace(tokenizers.Regex(" {2,}"), " ")]
    backend = sentencepiece_bpe(vocab, scores, unknown, prefix=proto.normalizer_spec.add_dummy_prefix, steps=steps)
    own = {  # user-defined pieces are matched in any text, before everything else
        i: AddedToken(names.get(i) or p.piece, special=i in names or p.type != kinds.USER_DEFINED, normalized=False)
        for i, p in enumerate(proto.pieces)
        if i in names or p.type in (kinds.CONTROL, kinds.UNKNOWN, kinds.USER_DEFINED)
    }
    append_tokens(backend, own | {i: token for i, token in added.items() if i >= len(proto.pieces)}, file.parent)
    set_bos(backend, vocab.get("<s>"))
    return backend


def sentencepiece_bpe(
    vocab: dict[str, int],
    scores: dict[str, float],
    unknown: str | None,
    *,
    prefix: bool,
    steps: Sequence[normalizers.Normalizer] = (),
) -> tokenizers.Tokenizer:
    """Build BPE over SentencePiece's pieces, with byte fallback.

    SentencePiece keeps no merges: any two pieces whose join is a piece may merge, best score first.

    Args:
        scores: of the pieces that text is made of.
        prefix: whether text starts with a space.
        steps: what is done to text before that.
    """
    ranked = []
    for piece, score in scores.items():
        cuts = [(piece[:i], piece[i:]) for i in range(1, len(piece))]
        pairs = [(left, right) for left, right in cuts if left in scores and right in scores]
        pairs.sort(key=lambda pair: (vocab[pair[0]], vocab[pair[1]]))
        ranked += [(-score, vocab.get(piece, 0), n, pair) for n, pair in enumerate(pairs)]
    merges = [pair for *_, pair in sorted(ranked)]
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    start = [normalizers.Prepend("▁")] if prefix else []
    backend.normalizer = normalizers.Sequence([*steps, *start, normalizers.Replace(" ", "▁")])
    undo: list[decoders.Decoder] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*undo, decoders.Strip(" ", 1, 0)] if prefix else undo)
    return backend
