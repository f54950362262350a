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
        Message("user", (ImageRef("/media/a.png"), ImageRef(png), Text("what?"))),
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
        ({"conversations": turns("q", "a")[::-1]}, "bad_roles", "got assistant, user"),
        ({"conversations": turns("q", "a")[:1]}, "bad_roles", "got user"),
        ({"conversations": [{"from": "robot", "value": "x"}]}, "bad_roles", "unknown role 'robot'"),
        ({"conversations": [{"from": "human", "value": None}, turns("q", "a")[1]]}, "bad_row", "must be a string, got None"),
        ({"conversations": turns("q", " \n")}, "empty_answer", "answer 1 is empty"),
        ({"image": "a", "conversations": turns("<image><image>", "x")}, "placeholder_mismatch", "2 <image> marks but 1 images"),
        ({"image": ["a", "b"], "conversations": turns("q", "x")}, "placeholder_mismatch", "0 <image> marks but 2 images"),
        ({"conversations": turns("<image>", "x")}, "placeholder_mismatch", "1 <image> marks but 0 images"),
        ({"conversations": turns("q", "a"), "messages": turns("q", "b")}, "bad_row", "both `conversations` and `messages`"),
        ({"image": "a", "images": ["b"], "messages": turns("q", "a")}, "bad_row", "both `image` and `images`"),
        ({"images": [{"path": None}], "messages": turns("q", "a")}, "bad_row", "an image must be a path"),
        ({"system": ["x"], "messages": turns("q", "a")}, "bad_row", "`system` must be a string"),
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
