"""Model directories: both dialects' configuration and weights, in and out, by directory or hub id."""

from ivl.model.checkpoint.config_json import load_config
from ivl.model.checkpoint.hub import resolve
from ivl.model.checkpoint.model_dir import load_model, save_model

__all__ = ["load_config", "load_model", "resolve", "save_model"]
