"""The fixtures `tokenizer` and `processor` of this folder."""

from tests.helpers.processors import processor, tokenizer

__all__ = ["processor", "tokenizer"]
