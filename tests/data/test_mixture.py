import dataclasses
import json
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ivl.data import mixture as mixture_module
from ivl.data.mixture import DatasetSpec, Mixture, load_mixture, weighted
from ivl.errors import InputError
from ivl.formats.rows import open_rows, write_jsonl
from ivl.utils.shuffles import Permutation
from tests.helpers.mixtures import turns


def rows_file(path, count):
    return str(write_jsonl(({"id": n, "conversations": turns("q", "a")} for n in range(count)), path))


@given(st.integers(1, 700), st.integers(0, 9))
def test_permutation_is_one(size, seed):
    values = Permutation(size, seed)(np.arange(size))
    assert sorted(values.tolist()) == list(range(size))


def test_permutation_shuffles_well():
    size = 1000
    values = np.stack([Permutation(size, seed)(np.arange(size)) for seed in range(200)])
    # Each row of the file is as likely to come early as late, and neighbors do not stay together.
    assert abs(values.mean(axis=0) - size / 2).max() < 5 * size / np.sqrt(12 * 200)
    assert abs(np.corrcoef(values[:, :-1].ravel(), values[:, 1:].ravel())[0, 1]) < 0.01


@pytest.mark.parametrize("shuffle", [True, False])
def test_repeat_time_counts_rows_exactly(tmp_path, shuffle):
    counts = {"a": (10, 1.0), "b": (20, 0.25), "c": (8, 2.5), "d": (5, 4)}
    specs = tuple(
        DatasetSpec(name=name, annotation=rows_file(tmp_path / f"{name}.jsonl", rows), repeat_time=repeat)
        for name, (rows, repeat) in counts.items()
    )
    mixture = Mixture(specs, seed=1, shuffle=shuffle)
    assert len(mixture) == 10 + 5 + 20 + 20
    epochs = [list(mixture.draws(range(len(mixture) * e, len(mixture) * (e + 1)))) for e in range(2)]
    drawn = [Counter((draw.dataset, draw.row) for draw in draws) for draws in epochs]
    assert drawn[0] == drawn[1]  # the subsets are the same in every epoch
    assert (epochs[0] != epochs[1]) and ([d[2:] for d in epochs[0]] != [d[2:] for d in epochs[1]]) == shuffle
    by_set = [sorted(count for (dataset, _), count in drawn[0].items() if dataset == i) for i in range(4)]
    assert by_set == [[1] * 10, [1] * 5, [2] * 4 + [3] * 4, [4] * 5]
    subset = {row for (dataset, row) in drawn[0] if dataset == 1}
    assert subset != set(range(5)), "a random subset, not the first rows"
    # copy 0 is drawn exactly once for every row that is drawn at all
    firsts = Counter((draw.dataset, draw.row) for draw in epochs[0] if draw.copy == 0)
    assert set(firsts) == set(drawn[0]) and set(firsts.values()) == {1}


def test_draws_do_not_depend_on_how_they_are_asked_for(tmp_path):
    mixture = Mixture((DatasetSpec(name="a", annotation=rows_file(tmp_path / "a.jsonl", 30), repeat_time=1.5),), seed=4)
    whole = list(mixture.draws(range(100)))
    assert [next(mixture.draws([n])) for n in range(100)] == whole
    assert list(mixture.draws(range(1, 100, 3))) == whole[1::3]


def test_order_follows_the_seed(tmp_path):
    spec = DatasetSpec(name="a", annotation=rows_file(tmp_path / "a.jsonl", 50))
    first, again, other = ([d.row for d in Mixture((spec,), seed=seed).draws(range(50))] for seed in (1, 1, 2))
    assert first == again != other


def test_meta_json(tmp_path):
    rows_file(tmp_path / "a.jsonl", 3)
    meta = tmp_path / "meta.json"
    entry = {
        "root": "images/",
        "annotation": "a.jsonl",
        "data_augment": True,
        "max_dynamic_patch": 6,
        "repeat_time": 2,
        "length": 3,
    }
    (tmp_path / "images").mkdir()
    meta.write_text(json.dumps({"a": entry, "b": {"annotation": str(tmp_path / "a.jsonl")}}))
    a, b = load_mixture(meta)
    assert a == DatasetSpec(
        name="a", root=str(tmp_path / "images"), annotation=str(tmp_path / "a.jsonl"), data_augment=True,
        max_dynamic_patch=6, repeat_time=2, length=3,
    )  # fmt: skip
    assert (b.root, b.repeat_time, b.data_augment) == (str(tmp_path), 1.0, False)


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"annotation": "a.jsonl", "repeat_times": 2}, "unknown key 'repeat_times'; did you mean 'repeat_time'?"),
        ({"annotation": "a.jsonl", "zzz": 2}, "unknown key 'zzz'; keys are name, annotation"),
        ({"root": "x"}, "annotation is missing"),
        ({"annotation": "a.jsonl", "repeat_time": 0}, r"repeat_time must be in \(0, 1e9\], got 0"),
        ({"annotation": "a.jsonl", "repeat_time": -1}, r"repeat_time must be in \(0, 1e9\], got -1"),
        ({"annotation": "a.jsonl", "data_augment": "yes"}, "data_augment must be true or false, got 'yes'"),
        ({"annotation": "a.jsonl", "max_dynamic_patch": 0}, "max_dynamic_patch must be >= 1, got 0"),
        (["a.jsonl"], "must be an object"),
    ],
)
def test_bad_meta_is_refused(tmp_path, entry, words):
    rows_file(tmp_path / "a.jsonl", 3)
    meta = tmp_path / "meta.json"
    meta.write_text(json.dumps({"a": entry}))
    with pytest.raises(InputError, match=words):
        load_mixture(meta)


def test_one_file_is_a_mixture_of_itself(tmp_path):
    path = rows_file(tmp_path / "a.jsonl", 3)
    array = tmp_path / "b.json"
    array.write_text("[{}]")
    renamed = rows_file(tmp_path / "c.json", 3)
    (spec,) = load_mixture(path)
    assert (spec.name, spec.annotation, spec.root) == ("a", path, str(tmp_path))
    assert load_mixture(path, root="/m")[0].root == "/m"
    assert [load_mixture(p)[0].name for p in (array, renamed)] == ["b", "c"]
    with pytest.raises(InputError, match="no such file"):
        load_mixture(tmp_path / "none.json")


def test_repeat_time_that_leaves_no_row_is_refused(tmp_path):
    spec = DatasetSpec(name="a", annotation=rows_file(tmp_path / "a.jsonl", 3), repeat_time=0.1)
    with pytest.raises(InputError, match="leaves none"):
        Mixture((spec,), seed=0)


@given(
    st.lists(st.tuples(st.integers(1, 2000), st.floats(0.01, 4)), min_size=1, max_size=6),
    st.sampled_from(["size", "root", 0.5, 1, 3.0, 100.0]),
)
def test_weights_keep_the_epoch_s_length_and_the_limit_of_repeats(sets, weighting):
    rows = np.array([size for size, _ in sets])
    draws = [max(1, int(size * repeat)) for size, repeat in sets]
    new = weighted(draws, rows, weighting)
    assert new.sum() == sum(draws) and (new <= 4 * rows).all() and (new >= 0).all()
    assert (new == weighted(draws, rows, weighting)).all()
    if weighting in ("size", 1):
        assert new.tolist() == draws


def test_root_and_temperature_are_their_formulas():
    rows = np.array([100, 400, 10_000])
    assert weighted([100, 400, 10_000], rows, "root").tolist() == [400, 1600, 8500]  # small sets reach 4 draws a row
    even = weighted([1000, 4000, 9000], np.array([1000, 4000, 9000]), "root")
    expected = 14_000 * np.sqrt([1000, 4000, 9000]) / np.sqrt([1000, 4000, 9000]).sum()
    assert abs(even - expected).max() < 1
    warm = weighted([1000, 4000, 9000], np.array([1000, 4000, 9000]), 3.0)
    assert abs(warm - 14_000 * np.cbrt([1000, 4000, 9000]) / np.cbrt([1000, 4000, 9000]).sum()).max() < 1


def test_weighted_epochs_draw_what_they_say(tmp_path):
    specs = tuple(DatasetSpec(name=n, annotation=rows_file(tmp_path / f"{n}.jsonl", k)) for n, k in (("a", 4), ("b", 64)))
    mixture = Mixture(specs, seed=1, weighting="root")
    drawn = Counter((draw.dataset, draw.row) for draw in mixture.draws(range(len(mixture))))
    assert len(mixture) == 68 and sum(n for (d, _), n in drawn.items() if d == 0) == mixture.num_draws(0) == 14
    assert sorted(n for (d, _), n in drawn.items() if d == 0) == [3, 3, 4, 4]


@pytest.mark.parametrize(("repeat", "rows", "draws"), [(10, 6, 60), (0.1, 48, 4), (2.7, 48, 129), (4.1, 10, 41), (0.5, 7, 3)])
def test_repeat_time_of_any_size(tmp_path, repeat, rows, draws):
    """A fraction of the rows is rounded down, as in the reference."""
    spec = DatasetSpec(name="a", annotation=rows_file(tmp_path / "a.jsonl", rows), repeat_time=repeat)
    other = DatasetSpec(name="b", annotation=rows_file(tmp_path / "b.jsonl", 30))
    mixture = Mixture((spec, other), seed=0)
    counts = Counter(draw.row for draw in mixture.draws(range(len(mixture))) if draw.dataset == 0)
    assert mixture.num_draws(0) == draws == counts.total()
    assert max(counts.values()) - min(counts.get(row, 0) for row in range(rows)) <= 1
    assert len(Mixture((spec, other), seed=0, weighting="root")) == draws + 30


# -- parquet: a row costs the decoding of its row group


@pytest.fixture
def groups(tmp_path, monkeypatch):
    """Two files of parquet, 16 row groups of 25 rows each, beside a jsonl; a chapter has some 4 groups."""
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    (tmp_path / "table").mkdir()
    for part in range(2):
        rows = [{"id": str(400 * part + n), "text": "x" * 100, "conversations": turns("q", "a")} for n in range(400)]
        parquet.write_table(pa.Table.from_pylist(rows), tmp_path / f"table/{part}.parquet", row_group_size=25)
    table = DatasetSpec(name="table", annotation=str(tmp_path / "table"))
    lines = DatasetSpec(name="lines", annotation=rows_file(tmp_path / "lines.jsonl", 300))
    size = int(open_rows(tmp_path / "table").groups()[1].sum())
    monkeypatch.setattr(mixture_module, "CHAPTER_BYTES", size // 8)
    return table, lines


def decodings(monkeypatch):
    """The row groups that are decoded from now on."""
    table = pytest.importorskip("ivl.formats.table")
    decoded, real = [], table.ParquetRows._decode

    def decode(rows, number):
        decoded.append((rows.path.name, number))
        return real(rows, number)

    monkeypatch.setattr(table.ParquetRows, "_decode", decode)
    return decoded


def test_an_epoch_of_parquet_decodes_each_row_group_about_once(groups, monkeypatch):
    mixture, decoded = Mixture(groups, seed=3), decodings(monkeypatch)
    draws = list(mixture.draws(range(len(mixture))))
    assert sorted((draw.dataset, draw.row) for draw in draws) == [(0, n) for n in range(800)] + [(1, n) for n in range(300)]
    ids = [mixture.record(draw.dataset, draw.row).id for draw in draws if draw.dataset == 0]
    assert sorted(map(int, ids)) == list(range(800))
    assert len(set(decoded)) == 32 and len(decoded) <= 32 + 8  # one more where a chapter ends within a group
    # Not in the order of the file: neighbors come from many groups, and both data sets are spread over the epoch.
    firsts = [int(each) // 25 for each in ids[:100]]
    assert len(set(firsts)) >= 4 and sum(a == b for a, b in pairwise(firsts)) < 50
    assert 110 < sum(draw.dataset for draw in draws[:550]) < 190


def test_the_order_of_parquet_follows_from_seed_and_position(groups):
    whole = list(Mixture(groups, seed=3).draws(range(2500)))
    again = Mixture(groups, seed=3)
    assert [next(again.draws([n])) for n in (0, 2499, 1100, 7, 1099, 2200)] == [
        whole[n] for n in (0, 2499, 1100, 7, 1099, 2200)
    ]
    assert list(again.draws(range(5, 2500, 7))) == whole[5::7]
    assert whole[:1100] != list(Mixture(groups, seed=4).draws(range(1100)))
    assert [draw[2:] for draw in whole[:1100]] != [draw[2:] for draw in whole[1100:2200]]


def test_ranks_decode_row_groups_of_their_own(groups, monkeypatch):
    counts, decoded = [], decodings(monkeypatch)
    for rank in range(8):
        mixture = Mixture(groups, seed=3)
        decoded.clear()
        for draw in mixture.draws(range(rank, len(mixture), 8)):
            mixture.record(draw.dataset, draw.row)
        counts.append(len(decoded))
    assert max(counts) <= 24 and sum(counts) < 8 * 20  # 100 rows of parquet a rank; all of 32 groups if it were at random


@pytest.mark.parametrize("repeat", [0.3, 1.0, 2.4])
def test_repeat_time_of_parquet(groups, repeat):
    table = dataclasses.replace(groups[0], repeat_time=repeat)
    mixture = Mixture((table, groups[1]), seed=1)
    epochs = [[d for d in mixture.draws(range(len(mixture) * e, len(mixture) * (e + 1))) if d.dataset == 0] for e in range(2)]
    drawn = [Counter(draw.row for draw in draws) for draws in epochs]
    assert drawn[0] == drawn[1] and drawn[0].total() == int(800 * repeat)
    assert max(drawn[0].values()) - min(drawn[0][row] for row in range(800)) <= 1
    assert [draw.row for draw in epochs[0]] != [draw.row for draw in epochs[1]]
    assert {draw.row for draw in epochs[0] if draw.copy == 0} == set(drawn[0])
    if repeat < 1:  # whole groups, not the first ones
        assert len({row // 25 for row in drawn[0]}) == 10 and set(drawn[0]) != set(range(240))


def test_a_saved_position_of_rows_is_none_of_row_groups(groups):
    mixture = Mixture(groups, seed=1)
    assert mixture.matches(mixture.fingerprint())
    assert not mixture.matches(Mixture(groups, seed=1, shuffle=False).fingerprint())
