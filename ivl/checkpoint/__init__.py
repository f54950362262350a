"""Model directories: both dialects' configuration, weights, tokenizers and processors, in and out, by directory or hub id."""

from ivl.checkpoint.config_json import load_config
from ivl.checkpoint.hub import resolve
from ivl.checkpoint.model_dir import load_model, save_model
from ivl.checkpoint.processor_files import load_processor, save_processor
from ivl.checkpoint.vocabulary import load_tokenizer, save_tokenizer

__all__ = [
    "load_config", "load_model", "load_processor", "load_tokenizer", "resolve",
    "save_model", "save_processor", "save_tokenizer",
]  # fmt: skip
