"""Model directories: both dialects' configuration and weights, in and out, by directory or hub id."""

from ivl.checkpoint.config_json import load_config
from ivl.checkpoint.hub import resolve
from ivl.checkpoint.model_dir import load_model, save_model

__all__ = ["load_config", "load_model", "resolve", "save_model"]
