import dataclasses
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from itertools import islice
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ivl.data.config import DataConfig
from ivl.data.encode import Encoder
from ivl.data.loader import Loader
from ivl.data.mixture import Draw
from ivl.errors import DataError, InputError
from ivl.formats.rows import write_jsonl
from ivl.types import Sample
from tests.data.test_records import json_values
from tests.helpers.mixtures import make_file, make_rows, picture, processor, same, turns

NUM_ROWS = 60


@pytest.fixture(scope="module")
def meta(tmp_path_factory) -> Path:
    """Two sets: one twice per epoch and with degraded images, one as it is."""
    folder = tmp_path_factory.mktemp("data")
    make_file(folder / "a", NUM_ROWS // 2)
    make_file(folder / "b", NUM_ROWS // 2, seed=1)
    entries = {
        "a": {"annotation": "a/rows.jsonl", "root": "a", "data_augment": True, "repeat_time": 2},
        "b": {"annotation": "b/rows.jsonl", "root": "b"},
    }
    path = folder / "meta.json"
    path.write_text(json.dumps(entries))
    return path


def loader(path: Path, *, seed: int = 3, rank: int = 0, world_size: int = 1, **changes) -> Loader:
    defaults = {"max_tokens": 300, "max_tiles": 30, "max_buffer": 3, "epochs": 2, "num_workers": 0, "prefetch": 16}
    config = DataConfig(mixture=str(path), **{**defaults, **changes})
    return Loader(config, processor(), seed=seed, rank=rank, world_size=world_size)


@pytest.fixture(scope="module")
def whole(meta):
    return list(loader(meta))


def test_every_draw_is_trained_on_once(meta, whole):
    counts = Counter(zip([d for b in whole for d in b.datasets], [i for b in whole for i in b.ids], strict=True))
    expected = {("a", f"r{n}"): 4 for n in range(30)} | {("b", f"r{n}"): 2 for n in range(30)}
    assert counts == expected
    for batch in whole:
        assert batch.layout.num_tokens == len(batch.tokens_T) <= 300 and len(batch.tiles_GSSC) <= 30
        assert batch.tiles_GSSC.dtype == torch.uint8 and batch.weights_T.dtype == torch.float32


@pytest.mark.parametrize(
    "changes", [{"num_workers": 1}, {"num_workers": 3, "prefetch": 1}, {"num_workers": 1, "start_method": "spawn"}]
)
def test_batches_do_not_depend_on_workers(meta, whole, changes):
    assert all(map(same, list(loader(meta, **changes)), whole))


def test_randomness_follows_the_seed_and_the_draw_alone(meta):
    def tiles(seed, **changes):
        one = loader(meta, seed=seed)
        draw = Draw(position=0, epoch=0, dataset=0, row=0, copy=0)._replace(**changes)
        result, fixed = one._encoder(draw)
        assert isinstance(result, Sample) and fixed == (draw.dataset == 1)
        return result.tiles_GSSC

    first = tiles(1)
    assert tiles(1, position=99).equal(first)
    for other in (tiles(2), tiles(1, epoch=1), tiles(1, copy=1)):
        assert other.shape == first.shape and not other.equal(first)
    assert tiles(1, dataset=1).equal(tiles(2, dataset=1, epoch=5)), "set b is not degraded"


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cut=st.integers(0, 40), workers=st.sampled_from([(0, 0), (0, 1), (3, 0), (1, 3)]), cached=st.sampled_from([0, 10]))
def test_resume_at_any_point_equals_an_uninterrupted_run(meta, whole, cut, workers, cached):
    before, after = workers
    first = loader(meta, num_workers=before)
    stream = iter(first)
    head = list(islice(stream, cut))
    state = json.loads(json.dumps(first.state()))
    stream.close()
    resumed = loader(meta, num_workers=after, cache_samples=cached)
    resumed.restore(state)
    assert resumed.state() == state, "restoring and saving at once changes nothing"
    tail = list(resumed)
    assert len(head) + len(tail) == len(whole)
    assert all(map(same, head + tail, whole))
    assert resumed.report.draws == 180 and resumed.report.packs == len(whole)


def test_iterating_again_goes_on(meta, whole):
    one = loader(meta)
    head = list(islice(one, 4))
    assert all(map(same, head + list(one), whole))
    assert list(one) == []
    assert one.epoch == 2


def test_restore_encodes_open_packs_only(meta, monkeypatch):
    one = loader(meta)
    list(islice(one, 8))
    state = one.state()
    encoded = []
    original = Encoder.__call__
    monkeypatch.setattr(Encoder, "__call__", lambda self, draw: encoded.append(draw.position) or original(self, draw))
    resumed = loader(meta)
    resumed.restore(state)
    next(iter(resumed))
    held = [position for positions in state["open"] for position in positions]
    assert encoded[: len(held)] == held
    assert encoded[len(held) :] == list(range(state["next"], resumed.state()["next"]))


def test_state_of_something_else_is_refused(meta, tmp_path):
    state = loader(meta).state()
    for other, words in (
        (loader(meta, seed=4), "seed 3, this run has 4"),
        (loader(make_file(tmp_path, 6)), "the data have changed"),
        (loader(meta, max_tokens=400), r"budgets \[300, 30, None\], this run has \[400, 30, None\]"),
    ):
        with pytest.raises(InputError, match=words):
            other.restore(state)
    half = loader(meta, rank=1, world_size=2).state()
    with pytest.raises(InputError, match=r"is of 2 ranks and only together .* got those of ranks \[1\]"):
        loader(meta).restore(half)
    for ranks in ({"world_size": 10**12}, {"world_size": "a" * 9999}, {"rank": "a" * 9999}):
        with pytest.raises(InputError, match="only together they say what is left") as refused:
            loader(meta).restore(half | ranks)
        assert len(str(refused.value)) < 300


def test_rows_that_are_edited_or_reordered_in_place_are_noticed(tmp_path):
    path = make_file(tmp_path, 6)
    state = json.loads(json.dumps(loader(path).state()))
    loader(path).restore(state)
    text = path.read_bytes()
    first, rest = text.split(b"\n", 1)
    for other in (text.replace(b"red", b"RED", 1), rest + first + b"\n"):
        path.write_bytes(other)
        assert len(other) == len(text)
        with pytest.raises(InputError, match="the data have changed"):
            loader(path).restore(state)
    for entry in state["mixture"]:
        entry.pop()  # older versions have no hash
    loader(path).restore(state)


def test_a_folder_of_tables_is_hashed_by_all_its_files(tmp_path):
    rows = [{"conversations": turns("what is this", f"a red circle {n}")} for n in range(4)]
    pq = pytest.importorskip("pyarrow.parquet")
    pa = pytest.importorskip("pyarrow")
    (tmp_path / "rows").mkdir()
    for n in range(2):
        pq.write_table(pa.Table.from_pylist(rows[2 * n : 2 * n + 2]), tmp_path / "rows" / f"{n}.parquet")
    before = loader(tmp_path / "rows").mixture.fingerprint()
    pq.write_table(pa.Table.from_pylist(rows[3:1:-1]), tmp_path / "rows" / "1.parquet")
    assert loader(tmp_path / "rows").mixture.fingerprint()[0][:2] == before[0][:2] and not loader(
        tmp_path / "rows"
    ).mixture.matches(before)


def test_ranks_share_an_epoch_without_overlap(meta, whole):
    parts = [loader(meta, rank=rank, world_size=3) for rank in range(3)]
    drawn = [[draw.position for draw in part.mixture.draws(part._positions(part.rank))] for part in parts]
    assert sorted(position for part in drawn for position in part) == list(range(180))
    ids = Counter(key for part in parts for batch in part for key in zip(batch.datasets, batch.ids, strict=True))
    assert ids == Counter(key for batch in whole for key in zip(batch.datasets, batch.ids, strict=True))


def test_endless_epochs_differ_in_order_only(meta):
    endless = loader(meta, epochs=None)
    stream = iter(endless)
    ids: list[str] = []
    while endless.epoch < 3:
        ids.extend(next(stream).ids)
    assert endless.num_samples is None and loader(meta).num_samples == 180


def test_averaging_and_tile_budgets_reach_the_processor(tmp_path):
    make_file(tmp_path, 6)
    token = next(iter(loader(tmp_path / "rows.jsonl", averaging="token")))
    assert set(token.weights_T.tolist()) == {0.0, 1.0}
    single = list(loader(tmp_path / "rows.jsonl", max_tiles_per_image=1, epochs=1))
    assert sum(len(batch.tiles_GSSC) for batch in single) == 4  # rows with an image


def test_one_sample_a_pack_turns_packing_off(tmp_path):
    one = loader(make_file(tmp_path, 7), max_samples=1, shuffle=False, epochs=1)
    assert [batch.ids for batch in one] == [(f"r{n}",) for n in range(7)]


def test_videos_are_drawn_from_the_seed_and_broken_ones_named(tmp_path):
    for n in range(12):
        picture(tmp_path / "clip" / f"{n}.png", 28, 28, seed=n)
    (tmp_path / "bad.mp4").write_bytes(b"no video")
    rows = [{"id": n, "video": "clip/", "conversations": turns("<video>\nwhat", "that")} for n in range(3)]
    path = write_jsonl([*rows, {"video": "bad.mp4", "conversations": turns("<video>\nwhat", "that")}], tmp_path / "a.jsonl")
    one = loader(path, on_error="skip", max_skip_share=0.5, min_frames=2, max_frames=6, cache_samples=9, epochs=1)
    batches = list(one)
    assert one.report.rows == {"undecodable_media": 1} and "a.jsonl:4: " in one.report.examples["undecodable_media"][0]
    assert 6 <= sum(len(batch.tiles_GSSC) for batch in batches) <= 18 and not one._cache._kept
    again = loader(path, on_error="skip", max_skip_share=0.5, min_frames=2, max_frames=6, num_workers=2, epochs=1)
    assert all(map(same, batches, list(again)))


def test_cache_gives_the_same_batches_and_encodes_once(tmp_path, monkeypatch):
    path = make_file(tmp_path, 12)
    expected = list(loader(path, epochs=3))
    calls = []
    original = Encoder.__call__
    monkeypatch.setattr(Encoder, "__call__", lambda self, draw: calls.append(draw.row) or original(self, draw))
    assert all(map(same, list(loader(path, epochs=3, cache_samples=12)), expected))
    assert len(calls) == 12
    assert all(map(same, list(loader(path, epochs=3, cache_samples=7, num_workers=2, prefetch=1)), expected))


def test_random_samples_are_never_cached(meta):
    one = loader(meta, cache_samples=1000)
    list(one)
    assert {dataset for dataset, _ in one._cache._kept} == {1}


# -- dirty data


DIRT = ("undecodable_media", "missing_media", "broken_json", "placeholder_mismatch", "empty_answer")


def soil(folder: Path, *, rows: int = 400, each: int = 4) -> tuple[Path, set[str]]:
    """A file with `each` bad rows of every kind, 5% in all; returns it and the ids of the good rows."""
    clean = make_rows(folder, rows)
    lines = []
    for n, row in enumerate(clean):
        kind = DIRT[n // 20 % len(DIRT)] if n % 20 == 7 else None
        if kind == "undecodable_media":
            whole = picture(folder / "whole.jpg", 60, 60).read_bytes()
            (folder / f"cut{n}.jpg").write_bytes(whole[: len(whole) // 2])
            row = {**row, "image": f"cut{n}.jpg", "conversations": turns("<image>", "x")}
        elif kind == "missing_media":
            row = {**row, "image": "nowhere.png", "conversations": turns("<image>", "x")}
        elif kind == "placeholder_mismatch":
            row = {**row, "image": "0.png", "conversations": turns("<image><image>", "x")}
        elif kind == "empty_answer":
            row = {**row, "conversations": turns("what", " ")}
        lines.append(json.dumps(row)[:20] if kind == "broken_json" else json.dumps(row))
    path = folder / "dirty.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path, {row["id"] for n, row in enumerate(clean) if n % 20 != 7}


@pytest.fixture(scope="module")
def dirty(tmp_path_factory):
    return soil(tmp_path_factory.mktemp("dirty"))


def test_dirty_data_is_refused_at_the_first_bad_row(dirty):
    path, _ = dirty
    with pytest.raises(DataError, match=r"dirty\.jsonl:8: .*cut7\.jpg"):
        list(loader(path, shuffle=False))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_skipped_rows_are_counted_by_kind_and_nothing_takes_their_place(dirty, num_workers):
    path, good = dirty
    one = loader(path, on_error="skip", epochs=2, num_workers=num_workers)
    ids = Counter(each for batch in one for each in batch.ids)
    assert ids == dict.fromkeys(good, 2)
    assert one.report.rows == dict.fromkeys(DIRT, 4)
    assert (one.report.draws, one.report.dropped) == (800, 40)
    assert all(
        len(examples) == 4 and all("dirty.jsonl:" in each for each in examples) for examples in one.report.examples.values()
    )
    assert one.report.summary().startswith("left out 20 rows: 4 broken_json, 4 empty_answer")


def test_the_report_is_part_of_the_state(dirty):
    path, _ = dirty
    one = loader(path, on_error="skip")
    list(islice(one, 10))
    state = json.loads(json.dumps(one.state()))
    resumed = loader(path, on_error="skip")
    resumed.restore(state)
    list(resumed)
    list(one)
    assert resumed.report == one.report and state["report"]["draws"] < one.report.draws


def test_too_many_bad_rows_stop_the_run(dirty, tmp_path):
    path, _ = dirty
    with pytest.raises(InputError, match=r"rows are bad and data\.max_skip_share is 0\.01; left out"):
        list(loader(path, on_error="skip", max_skip_share=0.01))
    bad = write_jsonl([{"conversations": turns("q", "")}] * 5, tmp_path / "bad.jsonl")
    with pytest.raises(InputError, match="5 of 5 rows are bad"):
        list(loader(bad, on_error="skip", max_skip_share=1.0, epochs=None))


def test_oversized_samples_follow_their_policy(tmp_path):
    rows = [
        {"id": "long", "conversations": turns("q", "a red circle " * 300)},
        {"id": "short", "conversations": turns("q", "a")},
    ]
    path = write_jsonl(rows * 10, tmp_path / "a.jsonl")
    with pytest.raises(DataError, match=r"a\.jsonl:1: .* tokens and 0 tiles, the limits are 300 and 30") as caught:
        list(loader(path, shuffle=False))
    assert caught.value.kind == "too_long"
    one = loader(path, over_budget="skip", max_skip_share=0.6, epochs=1)
    assert Counter(each for batch in one for each in batch.ids) == {"short": 10}
    assert one.report.rows == {"too_long": 10}


@pytest.mark.parametrize("num_workers", [0, 2])
def test_oversized_samples_are_cut_at_a_turn_and_counted(tmp_path, num_workers):
    picture(tmp_path / "p.png", 84, 84)
    turn, image = turns("q", "a red circle " * 20), turns("<image>q", "a red circle " * 20)
    rows = [
        {"id": "long", "image": ["p.png"] * 9, "conversations": image * 9},
        {"id": "two", "conversations": [turn * 2, turn * 4, turn]},
        {"id": "short", "conversations": turn},
    ]
    path = write_jsonl(rows, tmp_path / "a.jsonl")
    given = {"shuffle": False, "over_budget": "truncate", "num_workers": num_workers, "max_tiles": 4, "max_tiles_per_image": 9}
    first = loader(path, max_buffer=1, **given)
    batches = list(first)
    assert Counter(each for batch in batches for each in batch.ids) == {"long": 2, "two": 2, "short": 2}
    assert first.report.truncated == 2 and first.report.dropped == 0 and first.report.rows == {}
    said = first.report.examples["truncated"]
    assert len(said) == 2 and all("the limits are 300 and 4; cut to" in each and str(path) in each for each in said)
    assert first.report.summary() == "cut 2 rows to fit a pack"
    for batch in batches:
        for ids, tokens in zip(batch.ids, batch.tokens_T.split(list(batch.sample_lens)), strict=True):
            replies = processor().tokenizer.decode(tokens.tolist()).count("a red circle") / 20
            assert replies == int(replies) >= 1 and len(tokens) <= 300, f"{ids}: no reply is cut in half"
    assert first.state()["report"]["truncated"] == 2
    alone = write_jsonl([{"conversations": turns("q", "a red circle " * 200)}], tmp_path / "b.jsonl")
    with pytest.raises(
        DataError, match=r"b\.jsonl:1: .* the limits are 300 and 30, and no reply fits; raise the limits \(max_tokens"
    ):
        list(loader(alone, over_budget="truncate"))


def test_a_long_reply_is_cut_and_counted(tmp_path):
    path = write_jsonl([{"conversations": turns("q", "a red circle " * 200)}], tmp_path / "a.jsonl")
    cut = loader(path, over_budget="cut", epochs=1)
    [batch] = list(cut)
    assert batch.layout.new_lens == (300,) and batch.weights_T.count_nonzero() > 250 and cut.report.truncated == 1


@pytest.mark.parametrize("policy", ["skip", "truncate", "cut"])
def test_rows_of_which_nothing_can_be_trained_never_reach_the_loss(tmp_path, policy):
    """Three images fill the pack before the reply begins: the row is counted, and no batch trains nothing."""
    picture(tmp_path / "p.png", 84, 84)
    big = {"image": ["p.png"] * 30, "conversations": turns("<image>" * 30 + "which of these many pictures " * 30, "red")}
    path = write_jsonl([big, *({"conversations": turns("q", "red")},) * 5], tmp_path / "a.jsonl")
    one = loader(path, over_budget=policy, on_error="skip", max_tiles=400, epochs=1)
    batches = list(one)
    assert one.report.rows == {"too_long": 1} and sum(len(batch.ids) for batch in batches) == 5
    assert all(weights.count_nonzero() for batch in batches for weights in batch.weights_T.split(list(batch.layout.new_lens)))


def test_errors_in_workers_arrive_whole(dirty):
    path, _ = dirty
    with pytest.raises(DataError, match=r"dirty\.jsonl:8: "):
        list(loader(path, shuffle=False, num_workers=2))


def test_unexpected_errors_name_the_row(tmp_path, monkeypatch):
    path = make_file(tmp_path, 3)
    monkeypatch.setattr(type(processor()), "sample", lambda self, record, options: 1 / 0)
    with pytest.raises(ZeroDivisionError) as caught:
        list(loader(path, shuffle=False))
    assert caught.value.__notes__ == [f"while encoding {path}:1"]


# -- processes


def test_workers_end_with_the_iteration(meta):
    stream = iter(loader(meta, num_workers=2, epochs=None))
    next(stream)
    assert len(multiprocessing.active_children()) == 2
    stream.close()
    assert not multiprocessing.active_children()


def test_workers_do_not_outlive_a_killed_parent(meta):
    code = (
        "import sys, multiprocessing\nfrom tests.data.test_loader import loader\n"
        "stream = iter(loader(sys.argv[1], num_workers=2, epochs=None)); next(stream)\n"
        "print(*(child.pid for child in multiprocessing.active_children()), flush=True)\nsys.stdin.read()"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", code, str(meta)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert parent.stdout is not None
    workers = [int(pid) for pid in parent.stdout.readline().split()]
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    assert len(workers) == 2
    deadline = time.monotonic() + 10
    while any(map(_runs, workers)):
        assert time.monotonic() < deadline, "a worker outlived its parent"
        time.sleep(0.1)


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")")[1].split()[0] != "Z"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_tokens", 0),
        ("num_workers", -1),
        ("num_workers", 1_000_000),
        ("epochs", 0),
        ("max_skip_share", 1.5),
        ("on_error", "ignore"),
        ("max_frames", 1),
    ],
)
def test_config_refuses_with_the_value(field, value):
    with pytest.raises(ValueError, match=rf"data\.{field}.*{value}"):
        dataclasses.replace(DataConfig(mixture="x"), **{field: value})


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    values=st.lists(json_values.map(lambda value: json.dumps(value).encode()), max_size=3),
    at=st.integers(0, 400),
    new=st.binary(max_size=3),
    length=st.integers(0, 3),
)
def test_damaged_rows_are_counted_whatever_the_damage(tmp_path, values, at, new, length):
    good = json.dumps(make_rows(tmp_path, 1)[0]).encode()
    at = min(at, len(good))
    damaged = good[:at] + new + good[at + length :]
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n".join([good, damaged, *values]) + b"\n")
    one = loader(path, on_error="skip", max_skip_share=1.0, epochs=1)
    trained = sum(len(batch.ids) for batch in one)
    assert trained + sum(one.report.rows.values()) == one.report.draws == len(one.mixture)
    assert trained >= 1
