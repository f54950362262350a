import io
import json
import tarfile

import pytest

from ivl.cli import data as cli
from ivl.data.config import DataConfig
from ivl.datasets.inspect import DatasetStats, inspect
from ivl.formats.rows import write_jsonl
from tests.data.test_loader import DIRT, soil
from tests.helpers.mixtures import make_file, picture, processor, turns


@pytest.fixture(scope="module")
def dirty(tmp_path_factory):
    return soil(tmp_path_factory.mktemp("dirty"))[0]


def test_validate_prints_every_problem_with_its_line(dirty, capsys):
    with pytest.raises(SystemExit) as exit:
        cli.main(["validate", str(dirty)])
    lines = capsys.readouterr().out.splitlines()
    assert exit.value.code == 1
    assert [line.split(": ")[0] for line in lines[:20]] == [f"{dirty}:{n}" for n in range(8, 401, 20)]
    assert lines[0].endswith("[undecodable_media]")
    assert lines[20].startswith("dirty: 400 rows (reference jsonl), 20 bad: 4 broken_json, ") and lines[21].startswith(
        "20 problems in 400 rows: 4 broken_json, "
    )


def test_validate_is_silent_about_good_data(tmp_path, capsys):
    cli.main(["validate", str(make_file(tmp_path, 5))])
    assert capsys.readouterr().out == "rows: 5 rows (reference jsonl), no problems\n"
    more = make_file(tmp_path / "more", 2)
    cli.main(["validate", str(tmp_path / "rows.jsonl"), str(more)])
    assert "5 rows" in (said := capsys.readouterr().out) and "2 rows" in said


def test_a_file_that_cannot_be_opened_does_not_hide_the_next(tmp_path):
    make_file(tmp_path, 3)
    meta = tmp_path / "meta.json"
    meta.write_text(json.dumps({"gone": {"annotation": "gone.jsonl"}, "here": {"annotation": "rows.jsonl"}}))
    problem, gone, here = inspect(DataConfig(mixture=str(meta)))
    assert "gone.jsonl: cannot be read" in str(problem)
    assert isinstance(gone, DatasetStats) and isinstance(here, DatasetStats)
    assert (gone.bad, here.bad, here.rows) == (1, 0, 3)


def test_with_a_processor_tokens_are_counted_and_long_rows_found(tmp_path):
    path = make_file(tmp_path, 9)
    *problems, stats = inspect(DataConfig(mixture=str(path), max_tokens=60), processor())
    assert isinstance(stats, DatasetStats) and stats.kinds == {"too_long": len(problems)} and len(problems) > 0
    (stats,) = inspect(DataConfig(mixture=str(path)), processor())
    assert isinstance(stats, DatasetStats) and stats.tokens > 0 and stats.tiles > 0 and stats.conversations > stats.rows


def test_same_problems_as_the_loader(dirty):
    *problems, stats = inspect(DataConfig(mixture=str(dirty)), processor())
    assert stats.kinds == dict.fromkeys(DIRT, 4)
    assert len(problems) == 20


def test_workers_find_the_same(dirty):
    here, apart = (list(inspect(DataConfig(mixture=str(dirty), num_workers=n), processor())) for n in (0, 2))
    assert [str(each) for each in here[:-1]] == [str(each) for each in apart[:-1]] and len(here) == 21
    assert here[-1] == apart[-1]


def test_progress_covers_every_row(dirty):
    seen = []
    list(inspect(DataConfig(mixture=str(dirty)), watch=lambda *each: seen.append(each)))
    assert seen[-1] == ("dirty", 400, 400) and [done for _, done, _ in seen] == sorted(done for _, done, _ in seen)


def test_validate_for_machines(dirty, capsys):
    with pytest.raises(SystemExit) as exit:
        cli.main(["validate", str(dirty), "--json"])
    *problems, summary = map(json.loads, capsys.readouterr().out.splitlines())
    assert exit.value.code == 1 and len(problems) == 20
    assert (problems[0]["source"], problems[0]["kind"]) == (f"{dirty}:8", "undecodable_media")
    assert summary["rows"] == 400 and summary["kinds"] == dict.fromkeys(DIRT, 4)


def test_stats_prints_a_table(tmp_path, capsys):
    cli.main(["stats", str(make_file(tmp_path, 9))])
    table, _, lengths = capsys.readouterr().out.partition("characters per sample")
    # Ten columns are too wide for a terminal, so that data sets stand beside one another.
    facts = dict(line.rsplit(maxsplit=1) for line in table.splitlines() if line.strip())
    facts = {name.split("  ")[0].strip(): value for name, value in facts.items()}
    assert facts.items() >= {"dataset": "rows", "format": "jsonl", "rows": "9", "bad": "0", "of characters": "100.0%"}.items()
    assert {"conversations", "turns", "images", "videos"} <= facts.keys() and "characters per answer" in lengths


@pytest.mark.parametrize("kind", ["parquet", "webdataset"])
def test_containers_with_media_inside(tmp_path, kind, capsys):
    """Problems are named by row or key; what the picture's decoder says has no address of an object in it."""
    good, bad = picture(tmp_path / "a.png", 30, 20).read_bytes(), b"no picture"
    if kind == "parquet":
        pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        rows = [{"images": [{"bytes": image}], "texts": [{"user": "what is it?", "assistant": "red"}]} for image in (good, bad)]
        pq.write_table(pa.Table.from_pylist(rows), path := tmp_path / "rows.parquet")
    else:
        with tarfile.open(path := tmp_path / "rows.tar", "w") as tar:
            for key, image in (("a", good), ("b", bad)):
                for suffix, data in (
                    ("png", image),
                    ("json", json.dumps({"conversations": turns("what is it?", "red")}).encode()),
                ):
                    info = tarfile.TarInfo(f"{key}.{suffix}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    with pytest.raises(SystemExit):
        cli.main(["validate", str(path)])
    first, *_, last = capsys.readouterr().out.splitlines()
    assert first.startswith(f"{path}:{'row 2' if kind == 'parquet' else 'b'}: ") and "0x" not in first
    assert last == "1 problem in 2 rows: 1 undecodable_media"


def test_ten_problems_of_a_kind_are_printed_or_all(tmp_path, capsys):
    rows = [{"conversations": turns("q", " ")}] * 25 + [{"x": 1}] * 3
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    for flags, printed in (([], 13), (["--all"], 28)):
        with pytest.raises(SystemExit):
            cli.main(["validate", str(tmp_path / "rows.json"), *flags])
        lines = capsys.readouterr().out.splitlines()
        assert sum(line.endswith("]") for line in lines) == printed
        assert lines[0].startswith(f"{tmp_path}/rows.json: row 1: ")
        assert ("15 more problems are not printed; --all prints them" in lines) == (not flags)
    with pytest.raises(SystemExit):
        cli.main(["validate", str(tmp_path / "rows.json"), "--json"])
    assert len(capsys.readouterr().out.splitlines()) == 29
    assert any("row 17" in line for line in lines)


@pytest.mark.parametrize("chars", [1_000_001, 5_000_000])
def test_a_huge_answer_is_found_without_a_model(tmp_path, capsys, chars):
    write_jsonl([{"conversations": turns("hi", "a" * chars)}, {"conversations": turns("hi", "yes")}], tmp_path / "a.jsonl")
    with pytest.raises(SystemExit):
        cli.main(["validate", str(tmp_path / "a.jsonl")])
    out = capsys.readouterr().out
    assert (
        f"a.jsonl:1: {chars + 2:,} characters, the limit of a row is 1,000,000 [too_long]" in out
        and "1 problem in 2 rows" in out
    )


@pytest.mark.parametrize("num_workers", [0, 2])
def test_repeated_ids_and_letters_are_noted(tmp_path, capsys, num_workers):
    ids = [1, "a", "b", None, None, "1", "a", "a", "c"]
    rows = [{"id": each, "conversations": turns("what?", "that")} for each in ids]
    rows += [{"image": "", "conversations": turns("<image>\nwhat?", "that")}] * 2
    path = write_jsonl(rows, tmp_path / "rows.jsonl")
    cli.main(["validate", str(path), "--workers", str(num_workers)])
    assert capsys.readouterr().out.splitlines() == [
        "rows: 11 rows (reference jsonl), no problems",
        f"rows: note: repeated ids: 3, first {path}:6 has that of {path}:1",
        "rows: note: questions that say <image> or <video> without such a medium, so in letters: 2",
    ]
    cli.main(["validate", str(path), "--json"])
    found = json.loads(capsys.readouterr().out)["datasets"]["rows"]
    assert (found["repeated_ids"], found["letters"]) == (3, 2)


def test_convert_prints_ten_problems_of_a_kind_or_all(tmp_path, capsys):
    rows = [{"conversations": turns("q", " ")}] * 30 + [{"conversations": turns("q", "a")}]
    path, target = write_jsonl(rows, tmp_path / "rows.jsonl"), tmp_path / "out.jsonl"
    for options, printed in (([], 10), (["--all", "--overwrite"], 30)):
        cli.main(["convert", str(path), str(target), "--on-error", "skip", *options])
        assert capsys.readouterr().err.count("[empty_answer]") == printed
