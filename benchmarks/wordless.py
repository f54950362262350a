"""A tokenizer without words, for engines whose texts are not measured."""

from __future__ import annotations


class TokenIds:
    """A reply is the ids of its tokens, with a space behind each. Every id has a token."""

    def stream(self) -> TokenIds:
        return self

    def push(self, token: int) -> str:
        return f"{token} "

    def flush(self) -> str:
        return ""

    def encode(self, text: str) -> list[int]:
        return [int(number) for number in text.split()]

    def token_bytes(self, token_id: int) -> bytes:
        return f"{token_id} ".encode()

    def is_control(self, token_id: int) -> bool:
        return False

    def unused(self, vocab_size: int) -> list[int]:
        return []
