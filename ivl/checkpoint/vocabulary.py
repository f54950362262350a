"""Tokenizer files in and out: tokenizer.json, vocab.json with merges.txt, `.tiktoken` ranks, and SentencePiece models."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers

from ivl.checkpoint.sections import FLAG, TEXT, TOKEN_ID, Section, added_tokens, open_section
from ivl.checkpoint.tokenizer_json import check_added, check_charsmap, check_tokenizer, check_vocabulary
from ivl.errors import InputError, short
from ivl.processing.tokenizer import CHATML_TOKENS, Tokenizer, byte_letters, byte_level, set_bos, token_text
from ivl.utils.files import regular, write_json

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
CONFIG_FILE, SENTENCEPIECE_FILE = "tokenizer_config.json", "tokenizer.model"
SPECIAL_KEYS = ("bos_token", "eos_token", "pad_token", "unk_token")
ADDED_TOKEN_FLAGS = ("lstrip", "normalized", "rstrip", "single_word", "special")


MAX_FILE_BYTES = 64 << 20
MAX_PIECE = 1024


def load_tokenizer(directory: str | Path) -> Tokenizer:
    """Read tokenizer.json, else vocab.json and merges.txt, else `.tiktoken` ranks (Qwen), else tokenizer.model (InternLM2.5).

    Raises:
        InputError: naming the file, if the directory has none of them, one is damaged or may harm this process, or they
            contradict each other.
    """
    directory = Path(directory)
    tokenizer = _load(directory)
    if (file := directory / SENTENCEPIECE_FILE).exists():
        tokenizer.sentencepiece = _read(file)
    return tokenizer


def _load(directory: Path) -> Tokenizer:
    config = open_section(directory / CONFIG_FILE, optional=True)
    for key in SPECIAL_KEYS:
        if not isinstance(config.values.get(key), str | None):
            config.section(key).read("content", TEXT)
    config.read("add_bos_token", FLAG, None)
    values = dict(config.values)
    if (file := directory / "tokenizer.json").exists():
        with refusing_damage(file):
            described = open_section(file)
            check_tokenizer(described)
            backend = tokenizers.Tokenizer.from_file(str(file))
            check_ids(backend, {token.read("id", TOKEN_ID): as_added(token) for token in described.sections("added_tokens")})
            return check_spelling(Tokenizer(backend, config=values), described.values["model"]["vocab"])
    added = added_tokens(directory, "added_tokens.json", CONFIG_FILE)
    check_added(list(added.values()), directory)
    tokens = {i: as_added(token) for i, token in added.items()}
    if (file := directory / "vocab.json").exists() and (directory / "merges.txt").exists():
        with refusing_damage(f"{directory}: vocab.json and merges.txt are no BPE vocabulary"):
            backend = byte_level(models.BPE(vocab=_vocabulary(file), merges=_merges(directory / "merges.txt")))
    elif ranks := sorted(directory.glob("*.tiktoken")):
        with refusing_damage(ranks[0]):
            backend = from_ranks(ranks[0])
        values = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "add_bos_token": False} | values
    elif (file := directory / SENTENCEPIECE_FILE).exists():
        with refusing_damage(file):
            backend = from_sentencepiece(file, tokens)
            return check_spelling(Tokenizer(backend, config={"bos_token": "<s>", "add_bos_token": True} | values))
    else:
        raise InputError(
            f"{directory}: no tokenizer here; expected tokenizer.json, vocab.json with merges.txt, "
            "a .tiktoken file or tokenizer.model"
        )
    with refusing_damage(directory):
        append_tokens(backend, tokens, directory)
        return check_spelling(Tokenizer(backend, config=values))


@contextmanager
def refusing_damage(place: object) -> Iterator[None]:
    """Turn what a library raises for damaged data into an InputError of one line that starts with the place.

    A panic of the tokenizers library is no Exception.
    """
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        known = isinstance(error, InputError)
        if known and str(place).partition(": ")[0] in str(error):
            raise
        problem = str(error) if known else f"not a tokenizer of this kind ({' '.join(str(error).split())[:300]})"
        raise InputError(f"{place}: {problem}") from None


def check_spelling(tokenizer: Tokenizer, vocab: Iterable[str] | None = None) -> Tokenizer:
    """The tokenizer, after a check that it can spell every text and that each entry stands for bytes."""
    pieces = tokenizer.spelling == "pieces"
    letters = {byte: f"<0x{byte:02X}>" if pieces else letter for letter, byte in byte_letters().items()}
    # Those of UTF-8 but for rare control characters and unassigned planes, which SmolLM2's vocabulary lacks.
    in_text = (0x09, 0x0A, 0x0D, *range(0x20, 0x7F), *range(0x80, 0xC0), *range(0xC2, 0xF1))
    model = tokenizer.backend.model
    missing = [byte for byte in in_text if letters[byte] not in tokenizer]
    if missing and getattr(model, "unk_token", None) is None:
        raise InputError(f"has no token for {len(missing)} bytes, first 0x{missing[0]:02X}: text with them would be lost")
    entries = tokenizer.backend.get_vocab(with_added_tokens=False) if vocab is None else vocab
    wrong: Iterable[str] = []
    if pieces:
        wrong = (entry for entry in entries if re.fullmatch("<0x..>", entry) and entry not in letters.values())
    elif strange := set("".join(entries)) - byte_letters().keys():
        wrong = (entry for entry in entries if strange.intersection(entry))
    added = {token.content for token in tokenizer.backend.get_added_tokens_decoder().values()}
    if wrong := sorted(set(wrong) - added):
        raise InputError(f"token {short(wrong[0])} stands for no bytes")
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, directory: str | Path, **config: Any) -> None:
    """Write tokenizer.json, tokenizer_config.json (with the given keys added) and special_tokens_map.json.

    tokenizer.model is written as well if the tokenizer came with one.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    backend = tokenizer.backend
    backend.encode_special_tokens = False  # ours at run time only; other libraries decide for themselves
    described = json.loads(backend.to_str())
    backend.encode_special_tokens = True
    model = described["model"]
    if not any(" " in token for token in model["vocab"]):  # tokenizers before 0.20 read merges in this form alone
        model["merges"] = [" ".join(pair) for pair in model["merges"]]
    write_json(directory / "tokenizer.json", described)
    if tokenizer.sentencepiece is not None:
        (directory / SENTENCEPIECE_FILE).write_bytes(tokenizer.sentencepiece)
    special = {key: text for key in SPECIAL_KEYS if (text := token_text(tokenizer.config.get(key)))}
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


def as_added(token: Section) -> AddedToken:
    """An added token of a tokenizer file."""
    return AddedToken(token.read("content", TEXT), **{flag: token.read(flag, FLAG, False) for flag in ADDED_TOKEN_FLAGS})


def append_tokens(backend: tokenizers.Tokenizer, added: dict[int, AddedToken], place: object) -> None:
    """Added tokens in the order of their ids, each of which must come out as announced."""
    for token in added.values():
        (backend.add_special_tokens if token.special else backend.add_tokens)([token])
    with refusing_damage(place):
        check_ids(backend, added)


def check_ids(backend: tokenizers.Tokenizer, added: dict[int, AddedToken]) -> None:
    """Refuse added tokens that have not the ids that a file gives them."""
    for i, token in added.items():
        if (got := backend.token_to_id(token.content)) != i:
            raise InputError(f"added token {token.content!r} should have id {i} but the vocabulary gives {got}")


def _read(file: Path) -> bytes:
    """The bytes of a file that is not too large to parse."""
    if regular(file).st_size > MAX_FILE_BYTES:
        raise InputError(f"{file}: more than {MAX_FILE_BYTES:,} bytes, which are not read")
    return file.read_bytes()


def possible_merges(ranks: Mapping[str, Any], ids: Mapping[str, int]) -> list[tuple[str, str]]:
    """Any two pieces whose join is a piece may merge, and the join of the lowest rank goes first."""
    merges: list[tuple[str, str]] = []
    for piece in sorted(ranks, key=ranks.__getitem__):
        if len(piece) > MAX_PIECE:
            raise InputError(f"token {short(piece)} is longer than {MAX_PIECE}")
        cuts = ((piece[:i], piece[i:]) for i in range(1, len(piece)))
        pairs = [pair for pair in cuts if pair[0] in ranks and pair[1] in ranks]
        merges += sorted(pairs, key=lambda pair: (ids[pair[0]], ids[pair[1]]))
    return merges


# -- byte-level BPE: Qwen2.5 and our own


def _vocabulary(file: Path) -> dict[str, int]:
    vocab = open_section(file)
    check_vocabulary(vocab)
    return dict(vocab.values)


def _merges(file: Path) -> list[tuple[str, str]]:
    merges = []
    for number, line in enumerate(_read(file).decode().replace("\r\n", "\n").split("\n"), 1):
        if line and not line.startswith("#version"):
            left, _, right = line.partition(" ")
            if not left or not right or " " in right:
                raise InputError(f"line {number} is {short(line)}, expected two tokens")
            merges.append((left, right))
    return merges


def from_ranks(file: Path) -> tokenizers.Tokenizer:
    """A `.tiktoken` file (base64 bytes and a rank a line) with Qwen2.5's added tokens after it."""
    letters = {byte: letter for letter, byte in byte_letters().items()}
    ranks: dict[str, int] = {}
    for number, line in enumerate(_read(file).decode("ascii").splitlines(), 1):
        token, _, rank = line.partition(" ")
        try:
            ranks["".join(letters[byte] for byte in base64.b64decode(token, validate=True))] = int(rank)
        except ValueError:
            raise InputError(f"{file}:{number}: expected base64 bytes and a rank, got {short(line)}") from None
        if len(ranks) != number:
            raise InputError(f"{file}:{number}: token {token} has a rank already")
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise InputError(f"{file}: the ranks of {len(ranks)} tokens are not 0 to {len(ranks) - 1}, each once")
    if missing := [byte for byte in range(256) if letters[byte] not in ranks]:
        raise InputError(f"{file}: has no token for {len(missing)} bytes, first 0x{missing[0]:02X}")
    merges = possible_merges(ranks, ranks)
    joins = {left + right for left, right in merges}
    if lost := [token for token in ranks if len(token) > 1 and token not in joins]:
        raise InputError(f"{file}: {len(lost)} tokens cannot be made from shorter ones, first {short(lost[0])}")
    backend = byte_level(models.BPE(vocab=ranks, merges=merges))
    added = {len(ranks) + n: AddedToken(t, special=t not in QWEN_PLAIN, normalized=False) for n, t in enumerate(QWEN_ADDED)}
    append_tokens(backend, added, file.parent)
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
    proto = schema.ModelProto.FromString(_read(file))
    kinds = schema.ModelProto.SentencePiece
    if not proto.pieces or proto.trainer_spec.model_type != proto.trainer_spec.BPE:
        raise InputError(f"{file}: only SentencePiece models of type BPE are supported")
    names: dict[int, str] = {i: str(token.content) for i, token in added.items()}
    if not added and len(proto.pieces) == INTERNLM2_PIECES:
        names = INTERNLM2_ADDED
    vocab: dict[str, int] = {names.get(i) or str(piece.piece): i for i, piece in enumerate(proto.pieces)}
    scores = {p.piece: p.score for i, p in enumerate(proto.pieces) if p.type == kinds.NORMAL and i not in names}
    unknown = next(piece.piece for piece in proto.pieces if piece.type == kinds.UNKNOWN)
    steps: list[normalizers.Normalizer] = []
    if charsmap := proto.normalizer_spec.precompiled_charsmap:
        check_charsmap(Section({}, str(file)), base64.b64encode(charsmap).decode())
        steps.append(normalizers.Precompiled(charsmap))
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

    SentencePiece keeps no merges: the join of the best score goes first.

    Args:
        scores: of the pieces that text is made of.
        prefix: whether text starts with a space.
        steps: what is done to text before that.
    """
    merges = possible_merges({piece: (-score, vocab[piece]) for piece, score in scores.items()}, vocab)
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    start = [normalizers.Prepend("▁")] if prefix else []
    backend.normalizer = normalizers.Sequence([*steps, *start, normalizers.Replace(" ", "▁")])
    undo: list[decoders.Decoder] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*undo, decoders.Strip(" ", 1, 0)] if prefix else undo)
    return backend
