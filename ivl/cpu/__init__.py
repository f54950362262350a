"""Speed on a CPU, put into a model or a processor from outside by `accelerate`."""

from ivl.cpu.accelerate import accelerate, has_bfloat16

__all__ = ["accelerate", "has_bfloat16"]
