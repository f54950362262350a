"""Pack -> Batch: samples side by side on one token axis."""

from __future__ import annotations

import torch

from ivl.types import Batch, Layout, Pack


def collate(pack: Pack) -> Batch:
    """Concatenate the samples of a pack. Placeholder runs keep showing their own tiles.

    Raises:
        ValueError: if the pack is empty, or a sample's sequence lengths do not cover its tokens.
    """
    if not pack:
        raise ValueError("an empty pack makes no batch")
    seq_lens: list[int] = []
    tile_ids: list[torch.Tensor] = []
    num_tiles = 0
    for sample in pack:
        if sum(sample.seq_lens) != sample.num_tokens:
            raise ValueError(f"{sample.source}: sequences of {sample.seq_lens} tokens but {sample.num_tokens} tokens in all")
        seq_lens.extend(sample.seq_lens)
        tile_ids.append(sample.tile_ids_R + num_tiles)
        num_tiles += sample.num_tiles
    # A sample of text has no tiles, and need not know how large they are.
    tiles = [sample.tiles_GSSC for sample in pack if sample.num_tiles] or [pack[0].tiles_GSSC]
    return Batch(
        tokens_T=torch.cat([sample.tokens_T for sample in pack]),
        labels_T=torch.cat([sample.labels_T for sample in pack]),
        weights_T=torch.cat([sample.weights_T for sample in pack]),
        tiles_GSSC=torch.cat(tiles),
        tile_ids_R=torch.cat(tile_ids),
        layout=Layout.packed(tuple(seq_lens)),
        ids=tuple(sample.id for sample in pack),
        sources=tuple(sample.source for sample in pack),
        datasets=tuple(sample.dataset for sample in pack),
        sample_lens=tuple(sample.num_tokens for sample in pack),
    )
