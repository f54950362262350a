"""First fit by tiles, the packing rule of internvl_chat's PackedDataset, as an oracle to compare with."""

from __future__ import annotations

from collections.abc import Iterable


def reference_packs(
    sizes: Iterable[tuple[int, int]], *, max_tokens: int, max_tiles: int, max_buffer: int
) -> list[tuple[int, int]]:
    """(tokens, tiles) of every sample -> (tokens, tiles) of every pack.

    Open packs stand in descending order of tiles, a newcomer behind its equals. A sample goes into the first that has
    room. A pack leaves when its tiles or tokens are exactly full, and the first when more are open than may be.
    """
    done: list[tuple[int, int]] = []
    shelf: list[tuple[int, int]] = []
    for tokens, tiles in sizes:
        fits = (i for i, (t, g) in enumerate(shelf) if t + tokens <= max_tokens and g + tiles <= max_tiles)
        if (at := next(fits, None)) is not None:
            old_tokens, old_tiles = shelf.pop(at)
            tokens, tiles = tokens + old_tokens, tiles + old_tiles
        if tokens == max_tokens or tiles == max_tiles:
            done.append((tokens, tiles))
            continue
        behind = (i for i, (_, g) in enumerate(shelf) if g < tiles)
        shelf.insert(next(behind, len(shelf)), (tokens, tiles))
        if len(shelf) > max_buffer:
            done.append(shelf.pop(0))
    return done + shelf
