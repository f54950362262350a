"""Speed on a CPU, put into a model or a processor from outside by `accelerate`."""

from ivl.cpu.accelerate import accelerate

__all__ = ["accelerate"]
