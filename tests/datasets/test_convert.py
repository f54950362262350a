import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ivl.data.records import read_record, to_record
from ivl.datasets import convert as convert_module
from ivl.datasets.convert import ConvertConfig, ConvertReport
from ivl.datasets.rows import from_record
from ivl.errors import DataError, InputError
from ivl.formats.rows import open_rows, write_jsonl
from ivl.types import ImageRef, Message, Record, Text, VideoRef
from tests.helpers.mixtures import turns
from tests.helpers.row_files import contents, png

NAMES = {
    "reference": "a.jsonl",
    "openai": "b.jsonl",
    "sharegpt": "c.json",
    "swift": "d.jsonl",
    "parquet": "e.parquet",
    "webdataset": "f.tar",
}


def convert(source: Path, target: Path, *, on_bad=lambda error: None, **options) -> ConvertReport:
    return convert_module.convert(ConvertConfig(source=source, target=target, **options), on_bad=on_bad)


def read(path: Path, format: str | None = None) -> list[Record]:
    rows = open_rows(path, format=format)
    return [read_record(rows, n, root=path.parent) for n in range(len(rows))]


@pytest.fixture
def rows(tmp_path) -> Path:
    for n in range(3):
        (tmp_path / "pictures").mkdir(exist_ok=True)
        (tmp_path / "pictures" / f"{n}.png").write_bytes(png(n))
    system = {"from": "system", "value": "Be brief."}
    return write_jsonl(
        [
            {"id": "one", "image": "pictures/0.png", "conversations": [system, *turns("<image>\nwhat?", "that")]},
            {
                "image": ["pictures/1.png", "pictures/2.png", "pictures/1.png"],
                "conversations": turns("A <image> é", "x") + turns("<image><image>", "y"),
            },
            {"id": 3, "conversations": turns("only text \u0000 \n", "  answer \u2028 <image>")},
            {"image": str(tmp_path / "pictures" / "0.png"), "conversations": turns("no mark", "z")},
        ],
        tmp_path / "rows.jsonl",
    )  # fmt: skip


@pytest.mark.parametrize("second", NAMES)
@pytest.mark.parametrize("first", NAMES)
def test_a_round_trip_loses_nothing(rows, tmp_path, first, second):
    there, back = tmp_path / "there" / NAMES[first], tmp_path / "back" / NAMES[second]
    for source, target, to in ((rows, there, first), (there, back, second)):
        done = convert(source, target, to=to)
        assert (done.rows, done.bad, done.dropped) == (4, {}, {})
    assert [contents(record) for record in read(back)] == [contents(record) for record in read(rows)]
    ids = [record.id for record in read(back)]
    assert (ids[0], ids[2]) == ("one", "3")
    assert list(there.parent.glob(".*")) == []


def test_several_conversations_and_videos_where_they_fit(tmp_path):
    (tmp_path / "a.png").write_bytes(png())
    talks = [turns("<image>\nq", "a"), turns("r <image>", "b")]
    path = write_jsonl([{"image": "a.png", "conversations": talks}], tmp_path / "two.jsonl")
    for to, name in NAMES.items():
        if to == "parquet":
            with pytest.raises(DataError, match=r"two\.jsonl:1: a row of parquet layout cannot hold several conversations"):
                convert(path, tmp_path / name, to=to)
        else:
            convert(path, tmp_path / name, to=to)
            assert [contents(record) for record in read(tmp_path / name)] == [contents(record) for record in read(path)]
    row = {"video": ["v.mp4", "frames/"], "clip": [1, 2.5], "conversations": turns("<video> <video>", "x")}
    path = write_jsonl([row], tmp_path / "videos.jsonl")
    for to, name in NAMES.items():
        target = tmp_path / "v" / name
        if to in ("parquet", "webdataset"):
            with pytest.raises(DataError, match="cannot hold a video"):
                convert(path, target, to=to)
            assert not target.exists()
        else:
            convert(path, target, to=to)
            assert [contents(record) for record in read(target)] == [contents(record) for record in read(path)]


def record(*content, answer: str = "a", id: str = "i") -> Record:
    return Record(id=id, conversations=((Message("user", content), Message("assistant", (Text(answer),))),), source="f:1")


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (record(Text("C:\\"), ImageRef("a.png")), "a backslash right before an image"),
        (record(ImageRef("a.png", max_tiles=3)), "an image with a tile budget"),
        (record(VideoRef("v", num_frames=3)), "a video with a number or choice of frames"),
        (record(VideoRef("v", clip=(0, 1)), VideoRef("w")), "videos of different clips"),
        (
            Record("i", record(ImageRef("a")).conversations + record(Text("q")).conversations, "f:1"),
            "conversations that show different media",
        ),
    ],
)
def test_what_no_row_holds_is_named(given, words):
    with pytest.raises(DataError, match=f"^f:1: a row.* cannot hold {words}"):
        from_record(given)


def test_openai_rows_hold_marks_in_texts_and_different_media():
    for each in (
        record(Text("say <image> now"), ImageRef(png())),
        Record("i", record(ImageRef("/a")).conversations + record(Text("q")).conversations, "f:1"),
    ):
        row = json.loads(json.dumps(from_record(each, layout="openai")))
        assert to_record(row, source="f:1", root=Path()) == each


words = st.text(st.characters(exclude_categories=["Cs"]), max_size=6) | st.sampled_from(
    ["<image", ">", "<video>", "\\", "\n", " "]
)
media = st.sampled_from([ImageRef("/a.png"), ImageRef(png(3)), VideoRef("/v.mp4"), VideoRef("/frames/")])
answers = words.filter(str.strip)


@st.composite
def records(draw) -> Record:
    def joined(parts):
        out = []
        for part in parts:
            if isinstance(part, Text) and out and isinstance(out[-1], Text):
                part = Text(out.pop().text + part.text)
            out.append(part)
        return tuple(part for part in out if part != Text(""))

    talk = []
    if draw(st.booleans()):
        talk.append(Message("system", joined([Text(draw(words))])))
    for _ in range(draw(st.integers(1, 3))):
        parts = draw(st.lists(st.builds(Text, words) | media, max_size=4))
        talk += [Message("user", joined(parts)), Message("assistant", (Text(draw(answers)),))]
    return Record(id=draw(st.sampled_from(["x", "f:1"])), conversations=(tuple(talk),), source="f:1")


@given(records(), st.sampled_from(["reference", "openai", "sharegpt", "swift"]))
@settings(max_examples=150, deadline=None)
def test_a_row_of_a_record_is_read_as_the_same_record(each, layout):
    try:
        row = from_record(each, layout=layout)
    except DataError as error:
        assert "a backslash right before an image" in str(error) and layout != "openai"
        parts = [part for message in each.conversations[0] for part in message.content]
        assert any(isinstance(part, Text) and part.text.endswith("\\") for part in parts)
        return
    assert to_record(json.loads(json.dumps(row)), source="f:1", root=Path()) == each


def test_images_as_bytes_become_one_file_each(tmp_path):
    link = from_record(record(ImageRef(png(1)), ImageRef(png(2)), ImageRef(png(1))))
    path = write_jsonl([link, link], tmp_path / "a.jsonl")
    convert(path, tmp_path / "out" / "b.jsonl")
    assert len(list((tmp_path / "out" / "b_media").rglob("*.png"))) == 2
    (tmp_path / "out").rename(tmp_path / "moved")  # the paths are relative
    assert [contents(each) for each in read(tmp_path / "moved" / "b.jsonl")] == [contents(each) for each in read(path)]


def test_bad_rows_stop_or_are_counted(tmp_path):
    good = {"conversations": turns("q", "a"), "width": 3, "height": None}
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join([json.dumps(good), "{oops", json.dumps(good | {"image": "no.png"}), json.dumps({"messages": 3})]))
    with pytest.raises(DataError, match=r"a\.jsonl:2: not valid JSON"):
        convert(path, tmp_path / "b.tar")
    assert not (tmp_path / "b.tar").exists()
    seen: list[DataError] = []
    done = convert(path, tmp_path / "b.tar", on_error="skip", on_bad=seen.append)
    assert (done.rows, done.bad) == (1, {"broken_json": 1, "missing_media": 1, "bad_row": 1})
    assert [str(error).split(": ")[0] for error in seen] == [f"{path}:{line}" for line in (2, 3, 4)]
    assert done.dropped == {"width": 2}
    path.write_text("{oops")
    with pytest.raises(InputError, match="none of its 1 rows"):
        convert(path, tmp_path / "c.tar", on_error="skip")
    assert sorted(each.name for each in tmp_path.iterdir()) == ["a.jsonl", "b.tar"]


@pytest.mark.parametrize("name", ["a.parquet", "a.tar"])
def test_special_and_huge_files_are_not_taken_in(tmp_path, name):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "zero.png").symlink_to("/dev/zero")
    with (tmp_path / "huge.png").open("wb") as file:
        file.truncate(1 << 40)
    path, seen = tmp_path / "rows.jsonl", []
    media = ("pipe.png", "zero.png", "huge.png", None)
    path.write_text("\n".join(json.dumps({"image": image, "conversations": turns("q", "a")}) for image in media))
    assert convert(path, tmp_path / name, on_error="skip", on_bad=seen.append).rows == 1
    words = ("is a pipe", "is a device", "1,099,511,627,776 bytes, the limit of a row is 100,000,000")
    assert all(each in str(error) for each, error in zip(words, seen, strict=True))


def test_names_that_are_not_utf8_are_told(tmp_path):
    folder = tmp_path / "\udcff"
    folder.mkdir()
    (folder / "a.png").write_bytes(png(1))
    (folder / "rows.jsonl").write_text(json.dumps({"image": "a.png", "conversations": turns("q", "a")}))
    with pytest.raises(DataError, match=r"rows\.jsonl:1: a row of reference layout cannot hold a path that is not UTF-8"):
        convert(folder / "rows.jsonl", tmp_path / "a.jsonl")
    assert convert(folder / "rows.jsonl", tmp_path / "a.parquet").rows == 1
    with pytest.raises(InputError, match="not UTF-8"):
        convert(folder / "rows.jsonl", folder / "a.parquet")
    assert sorted(path.name for path in folder.iterdir()) == ["a.png", "rows.jsonl"]


def test_replies_of_pairs_are_carried_over(tmp_path):
    rows = [{"query": "q", "response": "a", "rejected_response": "b"}, {"prompt": "q", "chosen": "a", "rejected": "b"}]
    for number, row in enumerate(rows):
        path = tmp_path / f"{number}.jsonl"
        path.write_text(json.dumps(row))
        assert convert(path, tmp_path / f"out{number}.jsonl").dropped == {}
        assert [talk[-1].text for talk in read(tmp_path / f"out{number}.jsonl")[0].conversations] == ["a", "b"]


def test_targets_that_are_refused(rows, tmp_path):
    with pytest.raises(InputError, match=r"rows\.jsonl: exists; choose another name"):
        convert(rows, rows, overwrite=True)
    with pytest.raises(InputError, match=r"a file of openai rows must end in \.jsonl or \.json"):
        convert(rows, tmp_path / "a.parquet", to="openai")
    with pytest.raises(InputError, match=r"a file of parquet rows must end in \.parquet"):
        convert(rows, tmp_path / "a.jsonl", to="parquet")
    convert(rows, tmp_path / "a.parquet")
    with pytest.raises(InputError, match=r"a\.parquet: exists"):
        convert(rows, tmp_path / "a.parquet")
    assert convert(rows, tmp_path / "a.parquet", overwrite=True).rows == 4


def test_the_command(rows, tmp_path):
    command = [sys.executable, "-m", "ivl", "data", "convert", str(rows), str(tmp_path / "a.tar")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == f"{tmp_path}/a.tar: 4 rows from reference jsonl\n"
    again = subprocess.run([*command, "--from", "parquet"], capture_output=True, text=True, check=False)
    assert again.returncode == 1
    assert "exists" in again.stderr


def test_a_file_of_the_source_is_no_target(rows, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    for name in ("a.jsonl", "b.jsonl"):
        (folder / name).write_bytes(rows.read_bytes())
    before = (folder / "a.jsonl").read_bytes()
    with pytest.raises(InputError, match="it holds rows of the source"):
        convert(folder, folder / "a.jsonl", overwrite=True, root=str(tmp_path))
    assert (folder / "a.jsonl").read_bytes() == before


@pytest.mark.parametrize("kind", ["link", "dangling", "pipe", "folder"])
def test_links_and_special_files_are_no_target(rows, tmp_path, kind):
    target, other = tmp_path / "o.jsonl", tmp_path / "other"
    other.write_text("mine")
    match kind:
        case "link":
            target.symlink_to(other)
        case "dangling":
            target.symlink_to(tmp_path / "nowhere")
        case "pipe":
            os.mkfifo(target)
        case _:
            target.mkdir()
    before = target.lstat().st_ino
    for overwrite in (False, True):
        with pytest.raises(InputError, match=r"o\.jsonl: exists and is (a|no) "):
            convert(rows, target, overwrite=overwrite)
    assert target.lstat().st_ino == before and other.read_text() == "mine"


def test_a_target_that_appears_meanwhile_is_kept(rows, tmp_path, monkeypatch):
    target = tmp_path / "o.jsonl"
    write = convert_module._convert_row
    monkeypatch.setattr(convert_module, "_convert_row", lambda *args: (target.write_text("mine"), write(*args)))
    with pytest.raises(InputError, match=r"o\.jsonl: exists"):
        convert(rows, target)
    monkeypatch.setattr(convert_module, "_check_replaceable", lambda _: None)  # later than the check
    with pytest.raises(InputError, match=r"o\.jsonl: cannot be written"):
        convert(rows, target)
    assert target.read_text() == "mine" and not list(tmp_path.glob(".o.jsonl*"))


WAIT = """
import sys, time
from ivl.cli.data import main
from ivl.datasets import convert as module

def wait(*_):
    print("begun", flush=True)
    time.sleep(60)

module._convert_row = wait
main(["convert", *sys.argv[1:]])
"""


def test_parts_of_ended_processes_do_not_stay(rows, tmp_path):
    target = tmp_path / "o.jsonl"
    mine = tmp_path / ".o.jsonl.notes"
    mine.write_text("mine")
    for number, left in ((signal.SIGTERM, 0), (signal.SIGKILL, 1)):
        process = subprocess.Popen([sys.executable, "-c", WAIT, str(rows), str(target)], stdout=subprocess.PIPE)
        assert process.stdout.readline() == b"begun\n"
        (part,) = tmp_path.glob(".o.jsonl.*.*")
        convert(rows, target, overwrite=True)
        assert part.exists()  # its process is alive
        process.send_signal(number)
        assert process.wait(20) == (143 if number == signal.SIGTERM else -9)
        process.stdout.close()
        assert len(list(tmp_path.glob(".o.jsonl.*.*"))) == left
        target.unlink()
    convert(rows, target)
    assert [path.name for path in tmp_path.glob(".o.jsonl*")] == [mine.name]
