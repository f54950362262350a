import base64
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ivl.data.records import to_record
from ivl.errors import DataError
from ivl.formats.base import parse_row
from ivl.types import ImageRef, Message, Text, VideoRef
from tests.helpers.mixtures import turns

ROOT = Path("/media")


def read(row: dict | bytes):
    text = row if isinstance(row, bytes) else json.dumps(row).encode()
    return to_record(parse_row(text, source="a.jsonl:7"), source="a.jsonl:7", root=ROOT, dataset="d")


def test_reference_row_with_two_images():
    row = {"id": 3, "image": ["a.png", "/abs/b.png"], "conversations": turns("A <image> and <image>?", "same")}
    record = read(row)
    (conversation,) = record.conversations
    assert (record.id, record.source, record.dataset) == ("3", "a.jsonl:7", "d")
    assert conversation == (
        Message("user", (Text("A "), ImageRef("/media/a.png"), Text(" and "), ImageRef("/abs/b.png"), Text("?"))),
        Message("assistant", (Text("same"),)),
    )


def test_marks_are_taken_in_order_over_all_human_turns():
    row = {"image": ["a.png", "b.png"], "conversations": turns("<image>", "one") + turns("<image>", "two")}
    shown = [part for message in read(row).conversations[0] for part in message.content if isinstance(part, ImageRef)]
    assert shown == [ImageRef("/media/a.png"), ImageRef("/media/b.png")]


def test_lone_image_and_video_without_mark_come_first():
    record = read({"image": "a.png", "video": "v.mp4", "clip": [1, 2.5], "conversations": turns("what?", "that")})
    assert record.conversations[0][0].content == (
        ImageRef("/media/a.png"), Text("\n"), VideoRef("/media/v.mp4", clip=(1.0, 2.5)), Text("\nwhat?"),
    )  # fmt: skip


def test_frame_folder_keeps_its_slash():
    assert read({"video": "clip/", "conversations": turns("<video>", "x")}).conversations[0][0].content == (
        VideoRef("/media/clip/"),
    )


def test_several_conversations_about_the_same_image():
    record = read({"image": "a.png", "conversations": [turns("<image>\nq1", "a1"), turns("q2", "a2")]})
    first, second = record.conversations
    assert first[0].content == (ImageRef("/media/a.png"), Text("\nq1"))
    assert second[0].content == (ImageRef("/media/a.png"), Text("\nq2"))


def test_openai_messages():
    png = b"\x89PNG"
    content = [
        {"type": "image_url", "image_url": {"url": "a.png"}},
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{base64.b64encode(png).decode()}"}},
        {"type": "text", "text": "what?"},
    ]
    reply = {"role": "assistant", "content": [{"type": "text", "text": "that"}]}
    row = {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": content}, reply]}
    assert read(row).conversations[0] == (
        Message("system", (Text("Be brief."),)),
        Message("user", (ImageRef("/media/a.png"), Text("\n"), ImageRef(png), Text("\nwhat?"))),
        Message("assistant", (Text("that"),)),
    )


PATHS = ["a.png", "b.png"]
ASKED = (ImageRef("/media/a.png"), Text("\n"), ImageRef("/media/b.png"), Text("\nsame?"))
SLOT = {"type": "image"}


@pytest.mark.parametrize(
    "row",
    [
        {"images": PATHS, "conversations": turns("<image>\n<image>\nsame?", "no")},
        {"images": PATHS, "messages": turns("<image>\n<image>\nsame?", "no"), "objects": {"ref": [], "bbox": []}, "tools": ""},
        {"images": [{"path": "a.png", "bytes": None}, {"path": "b.png"}], "texts": [{"user": "same?", "assistant": "no"}]},
        {"images": PATHS, "texts": [{"user": "<image>\n<image>\nsame?", "assistant": "no"}], "ratings": 3},
        {"images": PATHS, "conversations": {"from": ["human", "gpt"], "value": ["<image>\n<image>\nsame?", "no"]}},
        {
            "images": PATHS[::-1],
            "messages": [
                {"role": "user", "content": [
                    SLOT | {"index": 1}, {"type": "text", "text": "\n"}, SLOT | {"index": 0}, {"type": "text", "text": "\nsa"},
                    {"type": "text", "text": "me?"}]},
                {"role": "assistant", "content": "no"},
            ],
        },
        {
            "images": PATHS,
            "messages": [
                {"role": "user", "content": [SLOT, {"type": "text", "text": "\n"}, SLOT, {"type": "text", "text": "\nsame?"}]},
                {"role": "assistant", "content": "no"},
            ],
        },
    ],
)  # fmt: skip
def test_layouts_that_say_the_same(row):
    expected = (Message("user", ASKED), Message("assistant", (Text("no"),)))
    assert read(row).conversations == (expected,)
    system = Message("system", (Text("Be brief."),))
    assert read(row | {"system": "Be brief."}).conversations == ((system, *expected),)


def test_images_by_number_must_all_be_shown():
    user = {"role": "user", "content": [SLOT | {"index": 0}, SLOT | {"index": 0}]}
    with pytest.raises(DataError, match=r"image indexes \[0, 0\] of 2 images"):
        read({"images": PATHS, "messages": [user, {"role": "assistant", "content": "x"}]})


def test_the_clip_of_a_row_is_that_of_its_openai_videos():
    user = {"role": "user", "content": [{"type": "video_url", "video_url": {"url": "v.mp4"}}]}
    record = read({"clip": [1, 2], "messages": [user, {"role": "assistant", "content": "x"}]})
    assert record.conversations[0][0].content == (VideoRef("/media/v.mp4", clip=(1.0, 2.0)),)


@pytest.mark.parametrize(
    ("row", "kind", "words"),
    [
        (b'{"id": 1, "conv', "broken_json", "not valid JSON"),
        (b"\xff\xfe", "broken_json", "not valid JSON"),
        (b"[1]", "bad_row", "expected an object, got list"),
        ({"text": "x"}, "bad_row", "no `conversations` or `messages`"),
        ({"conversations": []}, "bad_row", "must be a list of turns"),
        ({"image": 3, "conversations": turns("q", "a")}, "bad_row", "`image` must be a path"),
        ({"video": "v", "clip": [1], "conversations": turns("q", "a")}, "bad_row", "`clip` must be"),
        ({"messages": [turns("q", "a")[0], turns("q", "a")[1] | {"reasoning_content": "hm"}]}, "bad_row", "write <think>"),
        ({"messages": [turns("q", "a")[0], turns("q", "a")[1] | {"tool_calls": [{}]}]}, "bad_row", "tool calls are not"),
        ({"conversations": turns("q", "a")[::-1]}, "bad_roles", "got assistant, user"),
        ({"conversations": turns("q", "a")[:1]}, "bad_roles", "got user"),
        ({"conversations": [{"from": "robot", "value": "x"}]}, "bad_roles", "unknown role 'robot'"),
        ({"conversations": [{"from": "human", "value": None}, turns("q", "a")[1]]}, "bad_row", "must be a string, got None"),
        ({"conversations": turns("q", " \n")}, "empty_answer", "answer 1 is empty"),
        ({"image": "a", "conversations": turns("<image><image>", "x")}, "placeholder_mismatch", "2 <image> marks but 1 images"),
        ({"image": ["a", "b"], "conversations": turns("q", "x")}, "placeholder_mismatch", "0 <image> marks but 2 images"),
        ({"images": ["a"], "messages": turns("<image><image>", "x")}, "placeholder_mismatch", r"\<image> is the letters"),
        ({"conversations": turns("q", "a"), "messages": turns("q", "b")}, "bad_row", "both `conversations` and `messages`"),
        ({"image": "a", "images": ["b"], "messages": turns("q", "a")}, "bad_row", "both `image` and `images`"),
        ({"images": [{"path": None}], "messages": turns("q", "a")}, "bad_row", "an image must be a path"),
        ({"system": ["x"], "messages": turns("q", "a")}, "bad_row", "`system` must be a string"),
        ({"prompt": "q", "completion": "a", "label": False}, "bad_row", "`label` is false: the reply is one not to learn from"),
        ({"kto_tag": False, "messages": turns("q", "a")}, "bad_row", "`kto_tag` is false: the reply is one not to learn from"),
        (
            {"system": "x", "messages": [{"role": "system", "content": "y"}, *turns("q", "a")]},
            "bad_roles",
            "got system, system",
        ),
        ({"tools": "[{}]", "messages": turns("q", "a")}, "bad_row", "tool calls are not supported"),
        ({"audios": ["a.wav"], "messages": turns("q", "a")}, "bad_row", "audio is not supported"),
        (
            {"objects": {"ref": ["cat"], "bbox": [[1, 2, 3, 4]]}, "messages": turns("q", "a")},
            "bad_row",
            "write <ref>name</ref>",
        ),
        ({"messages": [turns("q", "a")[0], turns("q", "a")[1] | {"loss": False}]}, "bad_row", "a turn has loss False"),
        ({"texts": [{"user": "q"}]}, "bad_row", "must have user and assistant"),
        (
            {"texts": [{"user": "<image>", "assistant": "a"}], "images": ["a", "b"]},
            "placeholder_mismatch",
            "1 <image> marks but 2",
        ),
        ({"video": "v", "clip": [3, 1], "messages": turns("q", "a")}, "bad_row", "0 <= start < end"),
        ({"video": "v", "clip": [0, 10**400], "messages": turns("q", "a")}, "bad_row", "`clip` must be"),
        ({"id": [1], "messages": turns("q", "a")}, "bad_row", "`id` must be a string or a number"),
        (b"[" * 100_000, "broken_json", "not valid JSON"),
        ({"conversations": turns("half \ud800", "a")}, "broken_json", "surrogates not allowed"),
        ({"image": "a\0b", "conversations": turns("q", "x")}, "missing_media", "not a path"),
        (
            {"image": "iVBORw0KGgo" + "A" * 90, "messages": turns("q", "x")},
            "missing_media",
            "base64 without a prefix",
        ),
        ({"image": "http://x/a.png", "conversations": turns("q", "x")}, "missing_media", "not fetched"),
        ({"image": "data:image/png;base64,###", "conversations": turns("q", "x")}, "undecodable_media", "not base64"),
    ],
)
def test_bad_rows_name_the_line_and_the_kind(row, kind, words):
    with pytest.raises(DataError) as caught:
        read(row)
    assert caught.value.kind == kind
    assert str(caught.value).startswith("a.jsonl:7: ")
    assert words in str(caught.value)


SAID = (Message("user", (Text("what is <image> or <video>?"),)), Message("assistant", (Text("x"),)))


@pytest.mark.parametrize(
    "row",
    [
        {},
        {"image": "", "video": "", "images": [], "videos": None, "clip": "", "system": "", "id": "", "messages": []},
        {"image": {"bytes": None, "path": ""}, "clip": []},
    ],
)
def test_marks_without_media_are_letters_and_empty_values_are_none(row):
    record = read({"conversations": turns("what is <image> or <video>?", "x")} | row)
    assert record.conversations == (SAID,) and record.id == "a.jsonl:7"


def test_a_system_turn_of_null_is_as_one_of_no_text():
    rows = [{"messages": [{"role": "system", "content": said}, *turns("q", "a")]} for said in (None, "")]
    assert read(rows[0]) == read(rows[1])


def test_one_medium_under_both_keys_is_one():
    row = {"image": "a.png", "images": ["a.png"], "kto_tag": True, "conversations": turns("<image>\nq", "x")}
    assert read(row).conversations[0][0].content == (ImageRef("/media/a.png"), Text("\nq"))


def test_marks_count_for_the_kinds_that_a_row_has():
    image = read({"image": "a.png", "conversations": turns("<image>\nis it \\<image> or <video>, \\<video>?", "x")})
    assert image.conversations[0][0].content == (
        ImageRef("/media/a.png"), Text("\nis it <image> or <video>, \\<video>?"),
    )  # fmt: skip
    lone = read({"video": "v.mp4", "conversations": turns("what is <image>?", "an <image>")})
    assert lone.conversations[0][0].content == (VideoRef("/media/v.mp4"), Text("\nwhat is <image>?"))


def test_media_marked_in_the_text_stay_where_they_stand():
    row = {"image": ["a.png", "b.png"], "conversations": turns("<image><image>same?", "no")}
    assert read(row).conversations[0][0].content == (ImageRef("/media/a.png"), ImageRef("/media/b.png"), Text("same?"))


@pytest.mark.parametrize(
    ("row", "layout"),
    [
        ({"instruction": "what?", "input": "", "output": "that"}, "alpaca"),
        ({"instruction": "what?", "input": None, "output": "that", "history": [], "chosen": None, "rejected": None}, "alpaca"),
        ({"query": "what?", "response": "that", "history": None, "rejected_response": ""}, "swift"),
    ],
)
def test_rows_of_one_question(row, layout):
    asked = (Message("user", (Text("what?"),)), Message("assistant", (Text("that"),)))
    assert read(row).conversations == (asked,)
    assert to_record(row, source="f:1", root=ROOT, layout=layout).conversations == (asked,)
    shown = (Message("user", (ImageRef("/media/a.png"), Text("\nwhat?"))), asked[1])
    assert read(row | {"images": ["a.png"]}).conversations == (shown,)
    earlier = (Message("user", (Text("q"),)), Message("assistant", (Text("a"),)))
    system = Message("system", (Text("Be brief."),))
    long = read(row | {"history": [["q", "a"]], "system": "Be brief."})
    assert long.conversations == ((system, *earlier, *asked),)
    with pytest.raises(DataError, match=r"no `messages` or `query` with `response` among the keys|no `instruction` with"):
        to_record({"text": "x"}, source="f:1", root=ROOT, layout=layout)


def test_pictures_in_the_text_of_older_ms_swift():
    row = {"query": "Picture 1: <img>a.png</img>\nwhat?", "response": "<img>x</img>", "history": [["<img>b.png</img>q", "a"]]}
    talk = read(row).conversations[0]
    assert talk[0].content == (ImageRef("/media/b.png"), Text("q"))
    assert talk[2].content == (Text("Picture 1: "), ImageRef("/media/a.png"), Text("\nwhat?"))
    assert talk[3].text == "<img>x</img>"
    named = read({"query": "<image>is <img>x</img> HTML?", "response": "no", "images": ["a.png"]}).conversations[0]
    assert named[0].content == (ImageRef("/media/a.png"), Text("is <img>x</img> HTML?"))


@pytest.mark.parametrize(
    ("row", "asked"),
    [
        ({"instruction": "what?", "context": "a story", "response": "that", "category": "qa"}, "what?\na story"),
        ({"instruction": "what?", "input": "A", "response": "that"}, "what?\nA"),
        ({"prompt": "what?", "completion": "that", "label": True}, "what?"),
        ({"prompt": "what?", "response": "that"}, "what?"),
        ({"prompt": turns("what?", "")[:1], "completion": turns("", "that")[1:]}, "what?"),
        ({"prompt": turns("what?", "")[:1], "completion": "that", "messages": None}, "what?"),
    ],
)
def test_variants_of_rows_of_one_question(row, asked):
    assert [message.text for message in read(row).conversations[0]] == [asked, "that"]


def test_alpaca_input_follows_the_instruction_and_pairs_are_pairs():
    row = {"instruction": "<image>which?", "input": "A or B", "images": ["a.png"], "output": "A"}
    assert read(row).conversations[0][0].content == (ImageRef("/media/a.png"), Text("which?\nA or B"))
    swift = read({"query": "q", "response": "good", "rejected_response": "bad"})
    alpaca = read({"instruction": "q", "input": "", "chosen": "good", "rejected": "bad"})
    assert swift.is_pair and swift.conversations == alpaca.conversations
    assert [talk[-1].text for talk in swift.conversations] == ["good", "bad"]
    newer = {"messages": turns("q", "good")}
    assert read(newer | {"rejected_response": "bad"}).conversations == swift.conversations
    assert read(newer | {"rejected_messages": turns("q", "bad")}).conversations == swift.conversations
    assert not read(newer | {"rejected_response": None}).is_pair
    with pytest.raises(DataError, match="chosen and rejected differ before their last turn"):
        read(newer | {"rejected_messages": turns("another", "bad")})


@pytest.mark.parametrize("history", ["q", [["q"]], [{"q": "a"}]])
def test_a_history_is_pairs(history):
    with pytest.raises(DataError, match="`history` a list of"):
        read({"query": "q", "response": "a", "history": history})


@pytest.mark.parametrize("key", ["image", "path", "url"])
def test_parts_that_name_their_picture(key):
    content = [{"type": "image", key: "a.png"}, {"type": "text", "text": "what?"}]
    record = read({"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": "that"}]})
    assert record.conversations[0][0].content == (ImageRef("/media/a.png"), Text("\nwhat?"))


def test_file_urls(tmp_path):
    (tmp_path / "b%20c.png").touch()
    for ref, path in (
        (f"file://{tmp_path}/b%20c.png", f"{tmp_path}/b%20c.png"),  # a name that is there
        (f"file://{tmp_path}/d%20e.png", f"{tmp_path}/d e.png"),
        (f"file://localhost{tmp_path}/a.png", f"{tmp_path}/a.png"),
    ):
        assert read({"image": ref, "conversations": turns("q", "a")}).conversations[0][0].content[0] == ImageRef(path)


def test_windows_paths(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "b.png").touch()
    (tmp_path / "odd\\name.png").touch()

    def path(ref: str) -> str:
        record = to_record({"image": ref, "conversations": turns("q", "a")}, source="f:1", root=tmp_path)
        return record.conversations[0][0].content[0].source

    assert path("sub\\b.png") == str(tmp_path / "sub" / "b.png")
    assert path("odd\\name.png") == str(tmp_path / "odd\\name.png"), "a name that is there"
    for ref in ("C:\\data\\b.png", "d:/b.png", "file:///C:/b.png", "\\\\server\\b.png"):
        with pytest.raises(DataError, match="is on a drive of Windows; write paths below the root"):
            path(ref)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5) | st.sampled_from(["<image>", "human", "gpt", "user"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["conversations", "messages", "from", "value", "role", "content", "image", "type", "text", "clip", "id"]
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)


@given(json_values | st.binary(max_size=30))
def test_any_row_is_a_record_or_a_data_error(value):
    try:
        record = read(value)
    except DataError as error:
        assert str(error).startswith("a.jsonl:7: ")
    else:
        assert all(message.text.strip() for talk in record.conversations for message in talk if message.role == "assistant")
