"""Budgets of what comes from a user: whatever is larger is refused by its name before memory or time is spent on it.

Each is far above what honest data hold. docs/data.md lists them with the remedy for each.
"""

from __future__ import annotations

MAX_ROW_BYTES = 1 << 26
"""A row of JSON, and the .json or .txt of a tar's row, in bytes."""
MAX_ROW_ITEMS = 1_000_000
"""Values in a row of JSON or of a table. One of two bytes takes up to 70 in memory."""
MAX_ROW_CHARS = 1_000_000
"""Characters of all texts of a row or of a prompt. A tokenizer takes about 300 bytes for each."""
MAX_ROW_MEDIA_BYTES = 100_000_000
"""A row of a table, and the images of a tar's row, in bytes."""
MAX_GROUP_BYTES = 1 << 28
"""A row group of parquet, unpacked; less where it has fewer than three rows."""
MAX_ROWS = 1 << 26
"""Rows of one file, members of a tar; each takes 8 to 32 bytes of an index."""
MAX_ROWS_A_BYTE = 100
"""Rows of a table for each byte of its file."""
MAX_FILE_BYTES = 1 << 30
"""An encoded image, or a video in memory."""
MAX_PIXELS = 178_956_970
"""An image or a frame, in pixels: 512 MiB of RGB."""
MAX_PIXELS_PER_REQUEST = 20_000_000_000
"""Pixels that are decoded for one sample or prompt, frames between the wanted ones included: about a minute of one core."""
MAX_FRAME_PIXELS = 1 << 24
"""A frame of a video is halved until it has no more pixels, which is 85 times what its tile shows."""
MIN_FRAME_PIXELS = 50_000
"""What a frame of a GIF counts at least: a file of 20 MB may hold a million, each of which takes time."""
MAX_METADATA_BYTES = 1 << 16
"""EXIF of an image; more of it is not read, and the image counts as upright."""
MAX_PARTS = 100_000
"""Segments, chunks or tags of an image file."""
MAX_HEADER_PARTS = 1_000
"""Segments of a JPEG and chunks of a PNG that a reader looks into, beside those of pixels."""
MAX_TILES = 1_000
"""Tiles that one image may be cut into."""
MAX_PROCESSES = 1_000
"""Worker processes of one command; a configuration that names a million would stop the machine."""
MAX_REPLIES = 10_000
"""Replies to one question."""
