"""A model by name: a directory, a hub id (`org/name`, `org/name@revision`) or a ModelScope id (`modelscope:org/name`)."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from ivl.errors import InputError, short

FILES: dict[str, Any] = {
    "allow_patterns": ["*.json", "*.safetensors", "tokenizer.model", "*.tiktoken", "*.txt", "*.jinja"],
    "ignore_patterns": ["*/*"],
}
"""Configuration, weights, tokenizer. Neither code nor pickles nor subdirectories (exports for engines) are ever fetched."""
MODELSCOPE = "modelscope:"
_HUB_ID = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]*/[\w.-]+)(@(?P<revision>[\w./-]+))?")


def resolve(name_or_dir: str | Path) -> Path:
    """Return the local directory of a model, fetched from a hub if need be.

    Honors HF_ENDPOINT, HF_TOKEN, HF_HUB_CACHE, HF_HOME and HF_HUB_OFFLINE. With IVL_MODELSCOPE=1, plain ids too are taken
    from ModelScope, which needs `pip install "ivl[modelscope]"`.

    Raises:
        InputError: with the remedy, if there is no such directory, the id is unknown, private or gated, or the hub cannot be
            reached.
    """
    if not isinstance(name_or_dir, str | os.PathLike):
        raise InputError(f"a model is named by its directory or hub id, got {short(name_or_dir)}")
    path = Path(os.path.expanduser(name_or_dir))  # noqa: PTH111 (pathlib raises for users that are not there)
    if os.path.isdir(path):  # noqa: PTH112 (and for long names)
        return path
    name = str(name_or_dir)
    modelscope = name.startswith(MODELSCOPE) or _flag("IVL_MODELSCOPE")
    match = _HUB_ID.fullmatch(name.removeprefix(MODELSCOPE))
    if match is None or os.path.lexists(path):
        raise InputError(f"{short(name, 300)}: neither a model directory nor a hub id such as OpenGVLab/InternVL2_5-1B")
    return (_from_modelscope if modelscope else _from_hub)(match["repo"], match["revision"])


def is_remote(name: str) -> bool:
    """Whether a name is a hub id that would have to be fetched: no directory, and not in the hub's cache."""
    match = _HUB_ID.fullmatch(name)
    if match is None or Path(name).is_dir():
        return False
    from huggingface_hub import try_to_load_from_cache

    place = os.environ.get("HF_HUB_CACHE")
    return not isinstance(try_to_load_from_cache(match["repo"], "config.json", place, match["revision"]), str)


def model_name(name_or_dir: str | Path) -> str:
    """Return the short name of a model or adapter: its directory, the run that it is `model`, `adapter` or `best` of, or its
    repository."""
    path = Path(name_or_dir).expanduser()
    path = path.resolve() if path.name in ("", "..") else path.absolute()
    return (path.parent.name if path.name in ("model", "adapter", "best") else "") or path.name or "model"


def _from_hub(repo: str, revision: str | None) -> Path:
    from huggingface_hub import errors, snapshot_download

    offline = _flag("HF_HUB_OFFLINE")
    places: dict[str, Any] = {"cache_dir": os.environ.get("HF_HUB_CACHE"), "endpoint": os.environ.get("HF_ENDPOINT")}
    try:
        return Path(snapshot_download(repo, revision=revision, local_files_only=offline, **places, **FILES))
    except errors.GatedRepoError:
        raise InputError(f"{repo}: access is gated; accept its terms on the hub and set HF_TOKEN") from None
    except errors.RepositoryNotFoundError:
        raise InputError(
            f"{repo}: no such directory, and no such model on the hub, or it is private; check the spelling or set HF_TOKEN"
        ) from None
    except errors.RevisionNotFoundError:
        raise InputError(f"{repo}: the hub has no revision {revision!r} of it") from None
    except errors.LocalEntryNotFoundError:
        why = "and HF_HUB_OFFLINE is set" if offline else "and the hub cannot be reached: check the connection and HF_ENDPOINT"
        raise InputError(f"{repo}: no such directory, not in the local cache, {why}") from None
    except errors.HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else "no"
        remedy = "set a valid HF_TOKEN" if status in (401, 403) else "try again later"
        raise InputError(f"{repo}: the hub answered with status {status}; {remedy}") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{repo}: cannot be fetched from the hub: {error}") from None


def _from_modelscope(repo: str, revision: str | None) -> Path:
    try:
        from modelscope import snapshot_download  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise InputError(f'{MODELSCOPE}{repo}: needs the modelscope package; pip install "ivl[modelscope]"') from None
    try:
        # It refuses with exceptions of many unrelated kinds, down to plain Exception.
        return Path(snapshot_download(repo, revision=revision, **FILES))
    except Exception as error:
        raise InputError(f"{MODELSCOPE}{repo}: cannot be fetched: {error}; check the id and the connection") from None


def _flag(name: str) -> bool:
    return os.environ.get(name, "").lower() in ("1", "on", "yes", "true")
