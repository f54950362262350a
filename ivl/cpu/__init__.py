"""Speed on a CPU, put into a model or a processor from outside by `accelerate`."""

from ivl.cpu.accelerate import accelerate, answers_in_bfloat16, has_bfloat16

__all__ = ["accelerate", "answers_in_bfloat16", "has_bfloat16"]
