from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.packing import BUDGETS, STREAMS, measure
from ivl.data.packing import OpenPack, Packer, _Shelf, collate
from ivl.types import Sample


@dataclass(frozen=True)
class Item:
    num_tokens: int
    num_tiles: int = 0


items = st.lists(st.builds(Item, st.integers(1, 40), st.integers(0, 6)), max_size=60)


def packer(max_tokens=40, max_tiles=6, max_buffer=3) -> Packer[Item]:
    return Packer(max_tokens=max_tokens, max_tiles=max_tiles, max_buffer=max_buffer)


def pack_all(stream, into):
    packs = [buffer for position, item in stream if (buffer := into.add(position, item))]
    while buffer := into.flush():
        packs.append(buffer)
    return packs


@given(items)
def test_every_sample_is_in_one_pack_within_the_budgets(stream):
    packs = pack_all(enumerate(stream), packer())
    assert sorted(n for pack in packs for n in pack.positions) == list(range(len(stream)))
    for pack in packs:
        assert pack.items == [stream[n] for n in pack.positions]
        assert pack.num_tokens == sum(item.num_tokens for item in pack.items) <= 40
        assert pack.num_tiles == sum(item.num_tiles for item in pack.items) <= 6


@given(items, st.integers(0, 60))
def test_open_packs_are_the_whole_state(stream, cut):
    whole = packer()
    first = [buffer.positions for n, item in enumerate(stream[:cut]) if (buffer := whole.add(n, item))]
    resumed = packer()
    for positions in whole.positions():
        resumed.reopen(positions, [stream[n] for n in positions])
    assert resumed.positions() == whole.positions()
    rest = [buffer.positions for buffer in pack_all(list(enumerate(stream))[cut:], resumed)]
    assert first + rest == [buffer.positions for buffer in pack_all(enumerate(stream), packer())]


@given(items)
def test_no_more_packs_stay_open_than_allowed(stream):
    keeper = packer(max_buffer=2)
    for n, item in enumerate(stream):
        keeper.add(n, item)
        assert len(keeper) == len(keeper.positions()) <= 2


@given(items, st.integers(1, 8))
def test_search_and_release_find_what_looking_at_every_open_pack_would(stream, max_buffer):
    keeper = packer(max_buffer=max_buffer)
    for n, item in enumerate(stream):
        before = keeper.positions()
        packs = [([stream[i].num_tokens for i in at], [stream[i].num_tiles for i in at]) for at in before]
        fits = [fullness(t, g) for t, g in packs if sum(t) + item.num_tokens <= 40 and sum(g) + item.num_tiles <= 6]
        released = keeper.add(n, item)
        after = keeper.positions() + ([released.positions] if released else [])
        (taken,) = [at for at in after if n in at]
        if fits:
            rest = taken[:-1]
            assert fullness([stream[i].num_tokens for i in rest], [stream[i].num_tiles for i in rest]) == max(fits)
        else:
            assert taken == [n]
        if released and len(after) > max_buffer and fullness([released.num_tokens], [released.num_tiles]) < 1:
            left = [fullness([stream[i].num_tokens for i in at], [stream[i].num_tiles for i in at]) for at in after]
            assert fullness([released.num_tokens], [released.num_tiles]) == max(left)


def fullness(tokens, tiles):
    return max(sum(tokens) / 40, sum(tiles) / 6)


@pytest.mark.parametrize("steps", [10, 1000])
def test_search_takes_logarithmic_time_however_many_packs_are_open(steps, monkeypatch):
    """Counts the nodes that a search looks at, in the worst case: every pack has the tokens but none the tiles."""
    shelf = _Shelf(0, 8192)
    for n in range(steps):
        buffer = OpenPack()
        buffer.put(n, Item(n % 4000, 40))
        shelf.put(buffer)
    looks = []

    class Watched(list):
        def __getitem__(self, at):
            looks.append(at)
            return super().__getitem__(at)

    shelf._least = Watched(shelf._least)
    assert shelf.find((8000, 39)) is None and len(looks) <= 14
    looks.clear()
    assert shelf.find((5000, 48)) is not None and len(looks) <= 30


def test_the_fullest_open_pack_with_room_is_taken():
    keeper = packer(max_tokens=10, max_tiles=4)
    for n, (tokens, tiles) in enumerate([(6, 3), (7, 4), (5, 0)]):
        keeper.add(n, Item(tokens, tiles))
    # A pack without a tile left is full and gone; of the others the one with 3 of 4 tiles is nearest its end.
    assert keeper.positions() == [[2], [0]]
    assert keeper.add(3, Item(2, 1)).positions == [0, 3]


def test_a_full_pack_leaves_at_once_and_an_overfull_sample_is_refused():
    keeper = packer(max_tokens=10)
    assert keeper.add(0, Item(10)).positions == [0]
    with pytest.raises(ValueError, match="11 tokens and 2 tiles exceeds a pack of 10 and 6"):
        keeper.add(1, Item(11, 2))


@pytest.mark.parametrize("name", STREAMS)
@pytest.mark.parametrize("budget", BUDGETS)
def test_fill_is_high_and_at_least_that_of_the_published_rule(name, budget):
    row = measure(name, 10_000, *budget, 20)
    assert row["token_fill"] >= row["reference_token_fill"] and row["tile_fill"] >= row["reference_tile_fill"]
    if row["binding"] == "tokens" and row["offline"] > 0.97:
        assert row["token_fill"] > 0.97


def sample(seq_lens, tile_ids, num_tiles, start):
    n = sum(seq_lens)
    return Sample(
        tokens_T=torch.arange(start, start + n),
        labels_T=torch.arange(start, start + n),
        weights_T=torch.ones(n),
        seq_lens=seq_lens,
        tiles_GSSC=torch.full((num_tiles, 2, 2, 3), start, dtype=torch.uint8) if num_tiles else torch.empty(0, 0, 0, 3),
        tile_ids_R=torch.tensor(tile_ids, dtype=torch.int64),
        id=f"s{start}",
        source=f"f:{start}",
    )


def test_collate_lays_sequences_side_by_side_and_moves_tile_ids():
    batch = collate((sample((3,), [], 0, 0), sample((2, 4), [0, 1, 0, 1], 2, 10), sample((1,), [0], 1, 20)))
    assert batch.tokens_T.tolist() == [0, 1, 2, 10, 11, 12, 13, 14, 15, 20]
    assert batch.layout.new_lens == (3, 2, 4, 1) and batch.layout.past_lens == (0, 0, 0, 0)
    assert batch.tile_ids_R.tolist() == [0, 1, 0, 1, 2]
    assert batch.tiles_GSSC[:, 0, 0, 0].tolist() == [10, 10, 20] and batch.tiles_GSSC.dtype == torch.uint8
    assert batch.ids == ("s0", "s10", "s20") and batch.sources == ("f:0", "f:10", "f:20")


def test_collate_refuses_what_does_not_add_up():
    with pytest.raises(ValueError, match="empty pack"):
        collate(())
    bad = sample((3,), [], 0, 0)
    object.__setattr__(bad, "seq_lens", (2,))
    with pytest.raises(ValueError, match=r"f:0: sequences of \(2,\) tokens but 3"):
        collate((bad,))
