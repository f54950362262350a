"""An epoch begun on some ranks goes on with another number of ranks and workers: nothing is missing and nothing comes twice."""

import json
import random
from collections import Counter
from itertools import islice

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ivl.data.config import DataConfig
from ivl.data.elastic import deal
from ivl.data.loader import Loader
from ivl.formats.rows import write_jsonl
from tests.data.test_loader import loader
from tests.helpers.mixtures import make_rows, processor, same, turns

EPOCHS = 3


@pytest.fixture(scope="module")
def meta(tmp_path_factory):
    """Pictures drawn 1.5 times with degraded tiles, half of a set of text, and rows of which some exceed a pack."""
    folder = tmp_path_factory.mktemp("elastic")
    write_jsonl(make_rows(folder / "a", 24), folder / "a" / "rows.jsonl")
    write_jsonl([{"id": f"t{n}", "conversations": turns("q", "red " * (1 + n % 9))} for n in range(40)], folder / "b.jsonl")
    long = [{"id": f"long{n}", "conversations": turns("q", "a red circle " * 300)} for n in range(3)]
    fine = [{"id": f"c{n}", "conversations": turns("q", "a red circle " * (1 + n))} for n in range(9)]
    write_jsonl([*long, *fine], folder / "c.jsonl")
    entries = {
        "a": {"annotation": "a/rows.jsonl", "root": "a", "repeat_time": 1.5, "data_augment": True},
        "b": {"annotation": "b.jsonl", "repeat_time": 0.5},
        "c": {"annotation": "c.jsonl", "repeat_time": 2},
    }
    (folder / "meta.json").write_text(json.dumps(entries))
    return folder / "meta.json"


def ranks(meta, world_size, *, states=None, **changes) -> list[Loader]:
    loaders = [
        loader(meta, rank=rank, world_size=world_size, over_budget="skip", epochs=EPOCHS, **changes)
        for rank in range(world_size)
    ]
    for each in loaders if states else ():
        each.restore(states)
    return loaders


def states_of(loaders) -> list[dict]:
    return json.loads(json.dumps([each.state() for each in loaders]))


def keys(batch) -> list[tuple[str, str]]:
    return list(zip(batch.datasets, batch.ids, strict=True))


@pytest.fixture(scope="module")
def expected(meta) -> Counter:
    (one,) = ranks(meta, 1)
    counts = Counter(key for batch in one for key in keys(batch))
    assert len(one.mixture) == 36 + 20 + 24 and counts.total() == EPOCHS * (80 - 6)
    assert one.report.rows == {"too_long": 3} and one.report.dropped == EPOCHS * 6
    return counts


@pytest.mark.parametrize("seed", range(6))
def test_4_to_2_to_8_ranks_gives_every_sample_exactly_once(meta, expected, seed):
    draw, seen, states = random.Random(seed), Counter(), None
    # The last phase runs to the end. Ranks stop after unequal numbers of packs, which a real run's never do by more than one.
    for world_size, last in ((4, False), (2, False), (8, True)):
        loaders = ranks(meta, world_size, states=states)
        for each in loaders:
            stop = None if last else draw.randint(0, 9)
            for batch in islice(each, stop):
                seen.update(keys(batch))
        states = states_of(loaders)
    assert seen == expected
    assert sum(state["report"]["draws"] for state in states) == EPOCHS * 80
    assert sum(state["report"]["rows"].get("too_long", 0) for state in states) == 3


def test_4_ranks_of_8_workers_to_2_ranks_of_3(meta, expected):
    seen, states = Counter(), None
    for world_size, num_workers, stop in ((4, 8, 5), (2, 3, None)):
        loaders = ranks(meta, world_size, states=states, num_workers=num_workers, prefetch=1)
        for each in loaders:
            stream = iter(each)
            for batch in islice(stream, stop):
                seen.update(keys(batch))
            stream.close()
        states = states_of(loaders)
    assert seen == expected


def test_batches_after_a_change_of_ranks_do_not_depend_on_workers_and_resume_exactly(meta):
    begun = ranks(meta, 3)
    for each in begun:
        list(islice(each, 4))
    states = states_of(begun)
    whole, apart = (list(ranks(meta, 2, states=states, num_workers=n)[1]) for n in (0, 2))
    assert len(whole) == len(apart) and all(map(same, whole, apart))
    first = ranks(meta, 2, states=states)[1]
    head = list(islice(first, 1))
    assert first.state()["backlog"], "stopped within the backlog"
    second = ranks(meta, 2)[1]
    second.restore(json.loads(json.dumps(first.state())))
    assert all(map(same, head + list(second), whole))


def test_each_epoch_is_complete(meta):
    """Positions, not only counts: what is released, dropped or left over is the stream itself."""
    loaders = ranks(meta, 4)
    for n, each in enumerate(loaders):
        list(islice(each, 3 + n))
    stop = EPOCHS * 80
    dealt = deal(states_of(loaders), 3, stop)
    left = [p for rank, (at, backlog) in enumerate(dealt) for p in [*backlog, *range(at, stop, 3)]]
    taken = {p for each in loaders for p in range(each.rank, each._next, 4)}
    held = {p for each in loaders for positions in each.state()["open"] for p in positions}
    assert sorted(left) == sorted(set(range(stop)) - taken | held)
    assert all(at % 3 == rank for rank, (at, _) in enumerate(dealt))


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_dealing_any_state_any_number_of_times_keeps_every_position(data):
    """The law by itself: ranks take positions in any amount, keep some open, and change their number again and again."""
    stop = data.draw(st.integers(1, 120))
    done: list[int] = []
    states = [{"rank": 0, "world_size": 1, "next": 0, "open": [], "backlog": []}]
    for world_size in data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=5)):
        states = [
            {"rank": rank, "world_size": world_size, "next": at, "open": [], "backlog": backlog}
            for rank, (at, backlog) in enumerate(deal(states, world_size, stop))
        ]
        for state in states:
            for _ in range(data.draw(st.integers(0, 12))):
                if state["backlog"]:
                    position = state["backlog"].pop(0)
                elif state["next"] < stop:
                    position, state["next"] = state["next"], state["next"] + world_size
                else:
                    break
                (state["open"].append([position]) if data.draw(st.booleans()) else done.append(position))
    for at, backlog in deal(states, 2, stop):
        done += [*backlog, *range(at, stop, 2)]
    assert sorted(done) == list(range(stop))


def test_the_state_of_a_long_run_is_small(tmp_path):
    """Ranks drift apart in the stream, so the backlog grows; what matters is by how much."""
    rows = ({"id": n, "conversations": turns("q", "a " * (1 + n * 7919 % 40))} for n in range(4000))
    path = write_jsonl(rows, tmp_path / "rows.jsonl")
    config = DataConfig(mixture=str(path), max_tokens=400, num_workers=0, epochs=1)
    loaders = [Loader(config, processor(), seed=0, rank=rank, world_size=4) for rank in range(4)]
    for each in loaders:
        list(islice(each, 50))
    states = states_of(loaders)
    assert max(len(json.dumps(state)) for state in states) < 20_000
    assert sum(len(backlog) for _, backlog in deal(states, 2, 4000)) < 1000
