"""A model from the command line: a directory or hub id run here, or an OpenAI-compatible endpoint."""

from __future__ import annotations

import os

from ivl.errors import InputError
from ivl.generators import Generator


def connect(
    model: str | None, url: str | None, url_model: str | None, *, key_variable: str = "OPENAI_API_KEY", concurrency: int = 8
) -> tuple[Generator, str]:
    """A generator, and a name that changes when its answers may: a local model's has a fingerprint of its weights.

    Raises:
        InputError: unless either `model`, or `url` and `url_model`, are given.
    """
    if (model is None) == (url is None):
        raise InputError("give either --model DIR, or --url ENDPOINT with --url-model NAME")
    if model is not None:
        from ivl.api import load
        from ivl.checkpoint import resolve
        from ivl.checkpoint.files import fingerprint

        return load(model).engine, f"{model} {fingerprint(resolve(model))}"
    if url is None or not url_model:
        raise InputError("--url needs --url-model, the name that the endpoint knows the model by")
    from ivl.generators.remote import RemoteGenerator

    key = os.environ.get(key_variable)
    return RemoteGenerator(url, model=url_model, api_key=key, concurrency=concurrency), f"{url} {url_model}"
