"""Forwards to ivl.generators until the last command has moved."""

from __future__ import annotations

from ivl.generators import Generator, GeneratorConfig
from ivl.generators import connect as connect_to


def connect(
    model: str | None, url: str | None, url_model: str | None, *, key_variable: str = "OPENAI_API_KEY", concurrency: int = 8
) -> tuple[Generator, str]:
    return connect_to(
        GeneratorConfig(model=model, url=url, url_model=url_model, key_variable=key_variable, concurrency=concurrency)
    )
