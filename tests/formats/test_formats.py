import gc
import json
import os
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import datasets
import numpy as np
import pytest

from ivl.data.config import DataConfig
from ivl.data.loader import Loader
from ivl.data.mixture import Mixture, load_mixture
from ivl.data.records import read_record
from ivl.errors import InputError
from ivl.formats import offsets
from ivl.formats import text as text_module
from ivl.formats.rows import open_rows, write_jsonl
from tests.helpers.mixtures import processor, same, turns
from tests.helpers.row_files import contents, parquet_file, png, saved_dataset, tar_file

ROOT = Path("/media")
PNG, PNG2 = png(1), png(2)
STRUCTS = [{"bytes": PNG, "path": "a.png"}, {"bytes": PNG2, "path": None}]
ASKED = [("user", [PNG, "\n", PNG2, "\nsame?"]), ("assistant", ["no"])]


def messages(question: str, answer: str) -> list[dict]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


TABLE_ROWS = {
    "FineVision": {"images": STRUCTS, "texts": [{"user": "same?", "assistant": "no"}], "source": "x"},
    "ShareGPT": {"images": STRUCTS, "messages": messages("<image>\n<image>\nsame?", "no")},
    "LLaVA": {"image": STRUCTS, "conversations": turns("<image>\n<image>\nsame?", "no")},
    "OpenAI messages": {
        "image": STRUCTS,
        "messages": [
            {"role": "user", "content": [
                {"type": "image", "text": None, "index": 0}, {"type": "text", "text": "\n", "index": None},
                {"type": "image", "text": None, "index": 1}, {"type": "text", "text": "\nsame?", "index": None}]},
            {"role": "assistant", "content": [{"type": "text", "text": "no", "index": None}]},
        ],
    },
}  # fmt: skip


@pytest.mark.parametrize("words", TABLE_ROWS)
@pytest.mark.parametrize("container", ["parquet", "arrow"])
def test_tables_hold_images_as_bytes(tmp_path, words, container):
    rows = [TABLE_ROWS[words] | {"id": n} for n in range(5)]
    path = parquet_file(tmp_path / "a.parquet", rows) if container == "parquet" else saved_dataset(tmp_path / "saved", rows)
    opened = open_rows(path)
    assert opened.format == f"{words} {container}"
    records = [read_record(opened, n, root=ROOT) for n in range(len(opened))]
    assert [record.id for record in records] == ["0", "1", "2", "3", "4"]
    assert all(contents(record) == [ASKED] for record in records)
    last = "a.parquet:row 5" if container == "parquet" else "saved/data-00001-of-00002.arrow:row 2"
    assert opened.source(4).endswith(last)
    assert pickle.loads(pickle.dumps(opened))[3]["id"] == 3


def test_a_folder_of_files_is_one_data_set(tmp_path):
    rows = [{"id": n, "messages": messages("q", f"a{n}")} for n in range(6)]
    for n in range(3):
        parquet_file(tmp_path / f"train-{n}.parquet", rows[2 * n : 2 * n + 2])
    (spec,) = load_mixture(tmp_path)
    mixture = Mixture((spec,), seed=0)
    assert sorted(mixture.record(0, draw.row).id for draw in mixture.draws(range(6))) == list("012345")
    assert mixture.files[0].num_bytes == sum(path.stat().st_size for path in tmp_path.iterdir())
    write_jsonl(rows, tmp_path / "more.jsonl")
    with pytest.raises(InputError, match="jsonl and parquet rows; name"):
        open_rows(tmp_path)


def num_open() -> int:
    gc.collect()  # what earlier tests left
    return len(list(Path("/proc/self/fd").iterdir()))


def test_more_shards_than_may_stay_open(tmp_path):
    for n in range(70):
        write_jsonl([{"n": n}], tmp_path / f"{n:02d}.jsonl")
    rows = open_rows(tmp_path)
    before = num_open()
    assert [rows[n] for n in range(70)] == [{"n": n} for n in range(70)]
    assert num_open() - before <= 64
    assert rows[0] == {"n": 0}
    rows.close()
    assert num_open() == before


def test_images_without_bytes_are_paths(tmp_path):
    row = {"image": {"bytes": None, "path": "x/a.png"}, "conversations": turns("<image>", "a")}
    record = read_record(open_rows(parquet_file(tmp_path / "a.parquet", [row])), 0, root=ROOT)
    assert record.conversations[0][0].content[0].source == "/media/x/a.png"


def test_a_saved_data_set_is_refused_where_its_files_are_not_there(tmp_path):
    folder = saved_dataset(tmp_path / "set" / "train", [{"messages": messages("q", "a")}], files=1)
    (tmp_path / "set" / "dataset_dict.json").write_text("{}")
    with pytest.raises(InputError, match="holds the splits train; name one"):
        open_rows(tmp_path / "set")
    next(folder.glob("*.arrow")).unlink()
    with pytest.raises(InputError, match=r"\.arrow: cannot be read"):
        open_rows(folder)


def test_a_saved_selection_has_the_rows_that_were_selected(tmp_path):
    """Images stay encoded, whatever `datasets` would make of them."""
    rows = [{"id": n, "image": STRUCTS[0], "messages": messages("<image>q", "a")} for n in range(5)]
    whole = datasets.Dataset.from_list(rows).cast_column("image", datasets.Image())
    whole.select([3, 1]).save_to_disk(str(tmp_path / "some"))
    opened = open_rows(tmp_path / "some")
    assert [opened[n]["id"] for n in range(len(opened))] == [3, 1] and opened[0]["image"]["bytes"] == PNG


def test_webdataset(tmp_path):
    row = {"conversations": turns("<image>\n<image>\nsame?", "no")}
    path = tar_file(
        tmp_path / "a.tar",
        [
            ("train/one.0.png", PNG), ("train/one.1.PNG", PNG2), ("train/one.json", json.dumps(row).encode()),
            ("train/two.txt", b"a caption"), ("train/two.png", PNG), ("train/two.cls", b"7"),
            ("train/three.json", json.dumps({"image": "its/name.png", "id": 3, "messages": messages("<image>", "x")}).encode()),
            ("train/three.png", PNG),
            ("train/four.json", json.dumps({"messages": messages("q", "a")}).encode()),
        ],
    )  # fmt: skip
    rows = open_rows(path)
    assert rows.format == "ShareGPT webdataset"
    records = [read_record(rows, n, root=ROOT) for n in range(len(rows))]
    assert [contents(record) for record in records] == [
        [ASKED],
        [[("user", [PNG]), ("assistant", ["a caption"])]],
        [[("user", [PNG]), ("assistant", ["x"])]],
        [[("user", ["q"]), ("assistant", ["a"])]],
    ]
    assert [record.id for record in records] == ["train/one", "train/two", "3", "train/four"]
    assert records[1].source == f"{path}:train/two"
    assert read_record(pickle.loads(pickle.dumps(rows)), 1, root=ROOT) == records[1]


ROW = json.dumps({"messages": messages("<image>q", "a")}).encode()


@pytest.mark.parametrize(
    ("members", "problem"),
    [
        ([("a.jpg", PNG)], "a.tar:a: neither a .json with turns nor a .txt"),
        ([("a.txt", b"alone")], "a.tar:a: a caption without its image"),
        ([("a.json", json.dumps({"image": "a.jpg", "messages": []}).encode())], "names 1 images, the tar holds 0"),
        ([("a.0.jpg", PNG), ("a.2.jpg", PNG), ("a.txt", b"x")], "numbered 0, 2: some are missing"),
        ([("a.left.jpg", PNG), ("a.txt", b"x")], "got 'a.left.jpg'"),
        ([("a.jpg", PNG), ("a.png", PNG), ("a.txt", b"x")], "numbered 0, 0: some are missing or doubled"),
        ([("a.jpg", PNG), ("a.jpg", PNG), ("a.txt", b"x")], "two members end in .jpg"),
        ([("a.jpg", PNG), ("a.txt", b"x"), ("a.json", ROW)], "both a .txt and a .json"),
        ([("a.mp4", PNG), ("a.txt", b"x")], "cannot be played"),
        ([("a.jpg", PNG), ("a.txt", b"\xff")], "not UTF-8"),
        ([("a.txt", b"x"), ("b.txt", b"x"), ("a.jpg", PNG)], "members of a key must stand together"),
        ([("../a.txt", b"x")], "'../a.txt' has a name that leads out"),
        ([("/a.txt", b"x")], "'/a.txt' has a name that leads out"),
        ([("a/../../a.txt", b"x")], "leads out"),
    ],
)
def test_tars_that_are_refused(tmp_path, members, problem):
    with pytest.raises(InputError) as caught:
        read_record(open_rows(tar_file(tmp_path / "a.tar", members)), 0, root=ROOT)
    assert str(caught.value).startswith(f"{tmp_path}/a.tar:")
    assert problem in str(caught.value)


def test_no_part_of_a_tar_is_lost_in_silence(tmp_path):
    whole = tar_file(tmp_path / "a.tar", [(f"{n}.{kind}", PNG) for n in range(4) for kind in ("jpg", "txt")]).read_bytes()
    # a header and its block of data are 1024 bytes; 8 members, then the end
    for cut in (700, 1024, 5000, 5 * 1024, 8 * 1024):
        (tmp_path / "b.tar").write_bytes(whole[:cut])
        with pytest.raises(InputError, match=r"b\.tar: (truncated|is no whole tar)"):
            open_rows(tmp_path / "b.tar")
    damaged = bytearray(whole)
    damaged[3 * 1024 + 10] ^= 255
    (tmp_path / "b.tar").write_bytes(damaged)
    with pytest.raises(InputError, match="damaged header near byte 3072"):
        open_rows(tmp_path / "b.tar")
    (tmp_path / "b.tar").write_bytes(whole + whole)
    with pytest.raises(InputError, match="several archives in one file"):
        open_rows(tmp_path / "b.tar")


def test_links_in_tars_are_refused(tmp_path):
    import tarfile

    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        info = tarfile.TarInfo("a.jpg")
        info.type, info.linkname = tarfile.SYMTYPE, "/etc/hostname"
        tar.addfile(info)
    with pytest.raises(InputError, match=r"'a\.jpg' is no plain file"):
        open_rows(tmp_path / "a.tar")


def test_a_format_can_be_forced(tmp_path):
    both = {"conversations": turns("q", "left"), "messages": messages("q", "right")}
    path = write_jsonl([both], tmp_path / "a.jsonl")
    with pytest.raises(InputError, match="both `conversations` and `messages`; name the format"):
        read_record(open_rows(path), 0, root=ROOT)
    for name, answer in (("reference", "left"), ("openai", "right"), ("sharegpt", "left"), ("swift", "right")):
        rows = open_rows(path, format=name)
        assert read_record(rows, 0, root=ROOT).conversations[0][1].text == answer
        assert rows.format.endswith(" jsonl, as told")
    with pytest.raises(InputError, match=r"a\.jsonl:1: no `texts` among the keys"):
        read_record(open_rows(path, format="finevision"), 0, root=ROOT)
    with pytest.raises(InputError, match="no whole parquet"):
        open_rows(path, format="parquet")
    with pytest.raises(InputError, match=r"format must be one of jsonl, .*, got 'csv'"):
        open_rows(path, format="csv")
    path.rename(tmp_path / "odd.name")
    assert open_rows(tmp_path / "odd.name").container == "jsonl"


def test_the_format_of_a_meta_entry_is_forced(tmp_path):
    write_jsonl([{"conversations": turns("q", "left"), "messages": messages("q", "right")}], tmp_path / "a.jsonl")
    (tmp_path / "meta.json").write_text(json.dumps({"d": {"annotation": "a.jsonl", "format": "openai"}}))
    mixture = Mixture(load_mixture(tmp_path / "meta.json"), seed=0)
    assert mixture.record(0, 0).conversations[0][1].text == "right"
    (tmp_path / "meta.json").write_text(json.dumps({"d": {"annotation": "a.jsonl", "format": "csv"}}))
    with pytest.raises(InputError, match="dataset 'd': format must be one of"):
        load_mixture(tmp_path / "meta.json")


def test_compressed_files_are_refused(tmp_path):
    (tmp_path / "a.jsonl.gz").write_bytes(b"\x1f\x8b\x08....")
    with pytest.raises(InputError, match="unpack it first"):
        open_rows(tmp_path / "a.jsonl.gz")


@pytest.fixture
def indexed(monkeypatch, tmp_path):
    """Every file is large enough for an index on disk."""
    monkeypatch.setattr(offsets, "MIN_BYTES", 0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path


def texts(rows):
    return [rows[n] for n in range(len(rows))], [rows.source(n) for n in range(len(rows))]


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_the_index_is_built_once_and_gives_the_same_rows(indexed, name, monkeypatch):
    path = indexed / name
    values = [{"n": n, "text": "é\n" * n} for n in range(20)]
    lines = [json.dumps(value, ensure_ascii=False) for value in values]
    path.write_text(
        "[" + ",\n\n".join(lines) + "]" if name == "a.json" else "\n".join(lines[:5]) + "\n\n\r\n" + "\n".join(lines[5:])
    )
    first = open_rows(path)
    found = texts(first)
    assert found[0] == values
    assert (indexed / f".{name}.ivl-rows").exists()
    monkeypatch.setattr(text_module, "_index_lines", None)  # not called again
    monkeypatch.setattr(text_module, "_index_array", None)
    assert texts(open_rows(path)) == found
    sent = pickle.dumps(first)
    assert texts(pickle.loads(sent)) == found
    assert len(sent) < 2000  # the arrays do not travel


def test_the_index_of_another_file_is_not_used(indexed):
    path = write_jsonl([{"a": 1}, {"a": 2}], indexed / "a.jsonl")
    assert len(open_rows(path)) == 2
    write_jsonl([{"a": 1}, {"b": 2}, {"c": 3}], path)
    assert texts(open_rows(path))[0] == [{"a": 1}, {"b": 2}, {"c": 3}]
    os.utime(path, ns=(5, 5))
    place = indexed / ".a.jsonl.ivl-rows"
    whole = place.read_bytes()
    for broken in (b"", whole[:40], whole[:-1], bytes(len(whole)), whole[:-16] + b"\xff" * 8 + whole[-8:]):
        place.write_bytes(broken)
        assert len(open_rows(path)) == 3
        place.unlink()


def test_the_index_goes_to_the_cache_where_the_folder_is_read_only(indexed, monkeypatch):
    path = write_jsonl([{"a": 1}], indexed / "a.jsonl")
    cached = offsets._places(path)[1]
    monkeypatch.setattr(offsets, "_places", lambda path: (Path("/proc/no/such"), cached))
    assert texts(open_rows(path)) == ([{"a": 1}], [f"{path}:1"])
    assert cached.is_file()
    monkeypatch.setattr(offsets, "_places", lambda path: (Path("/proc/no/such"),))
    assert texts(open_rows(path)) == ([{"a": 1}], [f"{path}:1"])


def test_an_index_that_vanishes_is_built_again(indexed):
    path = write_jsonl([{"a": n} for n in range(9)], indexed / "a.jsonl")
    sent = pickle.dumps(open_rows(path))
    (indexed / ".a.jsonl.ivl-rows").unlink()
    assert texts(pickle.loads(sent))[0] == [{"a": n} for n in range(9)]


def test_ranks_may_race_for_the_index(indexed):
    path = write_jsonl([{"a": n} for n in range(2000)], indexed / "a.jsonl")
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: texts(open_rows(path)), range(16)))
    assert all(each == found[0] for each in found)
    assert sorted(file.name for file in indexed.iterdir()) == [".a.jsonl.ivl-rows", "a.jsonl"]


def test_tar_index_is_mapped_too(indexed):
    path = tar_file(
        indexed / "a.tar", [(f"k{n}.{kind}", PNG if kind == "png" else b"x") for n in range(30) for kind in ("png", "txt")]
    )
    rows = open_rows(path)
    again = open_rows(path)
    assert isinstance(again._arrays["starts"], np.memmap)
    assert [again.source(n) for n in range(30)] == [rows.source(n) for n in range(30)] == [f"{path}:k{n}" for n in range(30)]
    assert read_record(pickle.loads(pickle.dumps(rows)), 29, root=ROOT) == read_record(again, 29, root=ROOT)


def test_a_line_of_one_letter_is_a_row(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"a": 1}\nx\n\r\n{"a": 2}\n')
    rows = open_rows(tmp_path / "a.jsonl")
    assert [rows.raw(n) for n in range(3)] == [b'{"a": 1}', b"x", b'{"a": 2}']
    assert [rows.source(n) for n in range(3)] == [f"{tmp_path}/a.jsonl:{n}" for n in (1, 2, 4)]


def test_a_byte_order_mark_is_no_part_of_the_rows(tmp_path):
    for name, text in (("a.json", '[{"a": 1}]'), ("a.jsonl", '{"a": 1}')):
        (tmp_path / name).write_text(text, encoding="utf-8-sig")
        rows = open_rows(tmp_path / name)
        assert (rows.container, rows[0]) == (name[2:], {"a": 1})


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ('[{"a": 1}] more', ": something follows"), ('[{"a": 1},\n]', ": a comma before"), ("[,]", ": a comma before"),
        ('[{"a": 1} {}]', ": row 1: not valid JSON (Extra data"), ('[{"a": 1}, {"a": "x}]', ": row 2: not valid JSON (U"),
        ("[" * 5000, ": row 1: not valid JSON (maximum recursion"), ("[" + "9" * 5000 + "]", ": row 1: not valid JSON"),
        ('[{"a": 1}, {"b": 2}', ": the array is not closed"), ('[{"a": 1}, {"b": 2}}, {"c": 3}]', "ends after row 2"),
    ],
)  # fmt: skip
def test_arrays_that_are_refused(tmp_path, text, problem):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(InputError) as caught:
        list(open_rows(tmp_path / "a.json"))
    assert problem in str(caught.value)


@pytest.mark.parametrize("container", ["parquet", "arrow"])
def test_forked_workers_read_tables_as_one_process_does(tmp_path, container):
    rows = [
        {"id": str(n), "image": {"bytes": PNG, "path": None}, "messages": messages("what?", "a red circle")} for n in range(40)
    ]
    path = (
        parquet_file(tmp_path / "a.parquet", rows, group=7)
        if container == "parquet"
        else saved_dataset(tmp_path / "saved", rows)
    )

    def batches(num_workers):
        loader = Loader(DataConfig(mixture=str(path), max_tokens=128, epochs=1, num_workers=num_workers), processor(), seed=0)
        assert loader.mixture.record(0, 0)  # a row was read before the fork
        return list(loader)

    alone, forked = batches(0), batches(2)
    assert len(alone) == len(forked) > 1
    assert all(same(a, b) for a, b in zip(alone, forked, strict=True))
