"""Speed on a card, put into an engine from outside by `accelerate`."""

from ivl.gpu.accelerate import accelerate

__all__ = ["accelerate"]
