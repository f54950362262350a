"""One reply -> the answer it gives, and whether it is right."""

from __future__ import annotations
