"""Model directories: both dialects' configuration, weights, tokenizers and processors, in and out, by directory or hub id.

Names are imported when they are used, so that reading a configuration imports no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ivl.checkpoint.config_json import load_config
    from ivl.checkpoint.hub import model_name, resolve
    from ivl.checkpoint.model_dir import load_model, save_model
    from ivl.checkpoint.processor_files import load_processor, save_processor
    from ivl.checkpoint.vocabulary import load_tokenizer, save_tokenizer

__all__ = [
    "load_config", "load_model", "load_processor", "load_tokenizer", "model_name", "resolve",
    "save_model", "save_processor", "save_tokenizer",
]  # fmt: skip
_MODULES = {
    "load_config": "config_json", "load_model": "model_dir", "load_processor": "processor_files",
    "load_tokenizer": "vocabulary", "model_name": "hub", "resolve": "hub", "save_model": "model_dir",
    "save_processor": "processor_files", "save_tokenizer": "vocabulary",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
