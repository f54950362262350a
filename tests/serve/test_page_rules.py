"""What the page computes in JavaScript is what Python computes: tiles, boxes, messages; and what it reads."""

from __future__ import annotations

import json
import random
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import httpx
import pytest

import ivl
from ivl.boxes import parse_boxes
from ivl.config import TilingConfig
from ivl.processing import chat
from ivl.processing.image import grid_for
from ivl.serve.page import FILES
from ivl.types import ImageRef, Message, Text
from tests.helpers.engines import picture
from tests.helpers.servers import data_url, engine, running

STATIC = Path(ivl.__file__).parent / "serve" / "static"


def node() -> str | None:
    """Node of this machine, or the one that playwright brings."""
    if found := shutil.which("node"):
        return found
    try:
        from playwright._impl._driver import compute_driver_executable
    except ImportError:
        return None
    return str(compute_driver_executable()[0])


NODE = node()
pytestmark = pytest.mark.skipif(NODE is None, reason="no node here, nor playwright, which brings one")


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("rules")
    shutil.copy(STATIC / "rules.js", directory / "rules.mjs")
    (directory / "main.mjs").write_text(
        'import * as rules from "./rules.mjs";\nimport { readFileSync } from "node:fs";\n'
        'const [body, cases] = JSON.parse(readFileSync(0, "utf8"));\n'
        'const run = new Function("rules", "x", body);\n'
        "console.log(JSON.stringify(cases.map((x) => run(rules, x))));\n"
    )
    return directory / "main.mjs"


def evaluate(script: Path, body: str, cases: list[Any]) -> list[Any]:
    """The value of a function's body for each case, which it knows as x."""
    assert NODE is not None
    asked = json.dumps([body, cases])
    return json.loads(subprocess.run([NODE, str(script)], input=asked, capture_output=True, text=True, check=True).stdout)


def test_pages_files_are_small_and_fetch_nothing_elsewhere() -> None:
    files = [STATIC / name for name, _ in FILES.values()]
    assert {path.name for path in STATIC.iterdir()} == {path.name for path in files}
    assert sum(path.stat().st_size for path in files) <= 150_000
    assert sum(len(path.read_text().splitlines()) for path in files) <= 700
    for path in files:
        text = path.read_text().replace("http://www.w3.org/2000/svg", "")
        assert "://" not in text, path
        for word in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "localStorage", "style="):
            assert word not in text, (path, word)


def test_tiles_are_those_of_the_processor(script: Path) -> None:
    rng = random.Random(5)
    sizes = [(1, 1), (1, 5000), (448, 448), (896, 448), (1344, 896), (800, 1333), (1920, 1080), (3, 2), (9999, 1)]
    sizes += [(rng.randint(1, 3000), rng.randint(1, 3000)) for _ in range(500)]
    sizes += [(448 * rng.randint(1, 8), 448 * rng.randint(1, 8)) for _ in range(100)]
    cases: list[Any] = []
    for width, height in sizes:
        tiling = TilingConfig(min_tiles=rng.choice((1, 1, 2, 6)), max_tiles=rng.choice((6, 12, 40)), dynamic=rng.random() < 0.9)
        cases.append((width, height, vars(tiling), rng.choice((tiling.max_tiles, 1, 3, 24))))
    grids = evaluate(script, "return rules.gridFor(...x)", cases)
    for grid, (width, height, tiling, most) in zip(grids, cases, strict=True):
        assert tuple(grid) == grid_for(width, height, TilingConfig(**tiling), most), (width, height, tiling, most)


def test_boxes_are_those_of_the_processor(script: Path) -> None:
    rng = random.Random(7)
    texts = [
        "", "<box>[[1,2,3,4]]</box>", "<ref>a</ref><box>[[1, 2, 3, 4],[0,0,9,1000]]</box> <ref>b</ref>\n<box>[[5,6,7,8]]</box>",
        "<ref>a</ref><box>[[9,2,3,4]]</box>", "<ref>a</ref><box>[[1,2,3]]</box>", "<ref>a</ref><box>[[1,2,3,1001]]</box>",
        "<ref>a<ref>b</ref><box>[ [1,2,3,4] ]</box>", "<box><box>[[1,2,3,4]]</box></box>", "<ref>a</ref><box>[1,2,3,4]</box>",
        "<ref>x</ref> y <box>[[1,2,3,4]]</box>", "<box>[[1.5,2,3,4]]</box>", "<box>[[-1,2,3,4]]</box>",
        "<ref>猫 🐈</ref><box>[[01,2,3,4]]</box>", "<box>[[]]</box>", "<box>[[,,,]]</box>", "<box>[[1234567890,2,3,4]]</box>",
    ]  # fmt: skip
    pieces = re.findall(r"</?ref>|</?box>|\S+|\s", "<ref></ref><box></box>[[1,2,3,4]] [1,2,3,4] [10,20,30 7 , ] [ cat\n")
    texts += ["".join(rng.choices(pieces, k=rng.randint(1, 14))) for _ in range(3000)]
    texts += [f"{text}<box>{text}[[1,2,3,4]]</box>" for text in texts]
    found = 0
    for text, groundings in zip(texts, evaluate(script, "return rules.parseBoxes(x)", texts), strict=True):
        expected = [(g.phrase, [list(box) for box in g.boxes]) for g in parse_boxes(text).groundings]
        assert [(g["phrase"], g["boxes"]) for g in groundings] == expected, text
        found += len(expected)
    assert found > 20


def test_questions_are_those_of_chat(script: Path, tmp_path: Path) -> None:
    tiny, system = engine(tmp_path / "model"), "be brief"
    urls = [data_url(seed) for seed in range(3)]
    cases: list[Any] = []
    for count in range(4):
        media = [{"kind": "image", "data": url, "maxTiles": 3} for url in urls[:count]]
        cases.append({"turns": [], "question": {"text": "what?", "media": media}, "system": f" {system} "})
    replies = evaluate(script, "return rules.messagesOf(x.turns, x.question, x.system)", cases)
    with running(tiny, keys=()) as server:
        tokens = [httpx.post(f"{server.url}/tokenize", json={"messages": messages}).json()["tokens"] for messages in replies]
    for count in range(4):
        pictures = [ImageRef(picture(seed), 3) for seed in range(count)]
        expected = (Message("system", (Text(system),)), chat.user(chat.marked("what?", pictures), *pictures))
        assert tokens[count] == tiny.processor.prompt(expected).tokens_T.tolist()


def test_turns_without_a_reply_are_left_out(script: Path) -> None:
    turns = [{"text": "one", "media": [], "reply": " yes "}, {"text": "two", "media": [], "reply": " \n"}]
    case = {"turns": turns, "question": {"text": "three", "media": []}, "system": ""}
    (messages,) = evaluate(script, "return rules.messagesOf(x.turns, x.question, x.system)", [case])
    assert [(m["role"], m["content"]) for m in messages] == [("user", "one"), ("assistant", "yes"), ("user", "three")]


def test_events_come_in_pieces_of_any_size(script: Path) -> None:
    stream = ': ping\n\ndata: {"a": "é\\n"}\n\ndata: {"b": 1}\r\n\r\nevent: x\ndata: one\ndata: two\n\ndata: [DONE]\n\n'
    cases = [[stream[i : i + size] for i in range(0, len(stream), size)] for size in (1, 2, 3, 7, 1000)]
    body = "const parser = new rules.EventParser(); return x.flatMap((piece) => parser.push(piece))"
    for events in evaluate(script, body, cases):
        assert events == ['{"a": "é\\n"}', '{"b": 1}', "one\ntwo", "[DONE]"]


def test_markdown_is_read_as_far_as_replies_use_it(script: Path) -> None:
    texts = {
        "a *b* **c d** `e*f*`\ng": [("paragraph", "a |em:b| |strong:c d| |code:e*f*|\ng")],
        "# Title\ntext\n\n\nmore": [("heading", "Title"), ("paragraph", "text"), ("paragraph", "more")],
        "- one\n- **two**\n3. three": [("list", None), ("list", 3)],
        "```py\n<b>*x*</b>\n\n```\nafter": [("code", "<b>*x*</b>\n"), ("paragraph", "after")],
        "```\nstill being written": [("code", "still being written")],
        "| a | b |\n|---|:-:|\n| 1 | **2** |": [("table", 2)],
        "<b>x</b> 2*3*4 ** a **": [("paragraph", "<b>x</b> 2*3*4 ** a **")],
        "<ref>a*b*</ref><box>[[1,2,3,4]]</box> <box>[[1]]</box>": [
            ("paragraph", "|box:<ref>a*b*</ref><box>[[1,2,3,4]]</box>| <box>[[1]]</box>")
        ],
        "": [],
    }
    body = """const flat = (pieces) => pieces?.map((p) => p.kind === "text" ? p.text : `|${p.kind}:${p.text}|`).join("");
        return rules.parseMarkdown(x).map((b) => [b.kind, b.rows?.length ?? b.text ?? flat(b.content) ?? b.start ?? null])"""
    for (text, expected), blocks in zip(texts.items(), evaluate(script, body, list(texts)), strict=True):
        assert [tuple(block) for block in blocks] == expected, text


def test_hostile_replies_are_read_in_no_time(script: Path) -> None:
    pieces = ["<ref>", "<box>", "**", "*a", "`", "[[", "[1,", "| ", "- ", "```\n", "<ref>a</ref>", "</box>", " ", "\n"]
    cases = [piece * (20_000 // len(piece)) for piece in pieces] + ["<box>" + piece * 4000 + "</box>" for piece in pieces]
    body = "const start = performance.now(); rules.parseMarkdown(x); rules.parseBoxes(x); return performance.now() - start"
    assert max(evaluate(script, body, cases)) < 1500


def test_animations_are_told_from_pictures(script: Path, tmp_path: Path) -> None:
    picture(1).save(tmp_path / "still.gif")
    picture(1).save(tmp_path / "moving.gif", save_all=True, append_images=[picture(2), picture(3)], duration=100)
    cases = [list((tmp_path / name).read_bytes()) for name in ("still.gif", "moving.gif")]
    assert evaluate(script, "return rules.isAnimated(new Uint8Array(x))", cases) == [False, True]


def test_usage_is_one_line(script: Path) -> None:
    usage = {"prompt_tokens": 3412, "completion_tokens": 41, "prompt_tokens_details": {"cached_tokens": 3328}}
    times = {"start": 0, "first": 500, "last": 1500, "end": 1600}
    cases = [
        [usage, times, "length"],
        [None, {"start": 0, "end": 90}, "stopped"],
        [{**usage, "completion_tokens": 1}, times, "stop"],
    ]
    assert evaluate(script, "return rules.usageLine(...x)", cases) == [
        "3,412 tokens in (3,328 cached) · 41 out · 40 tokens/s · 1.6 s · cut at the longest reply",
        "0.1 s · stopped",
        "3,412 tokens in (3,328 cached) · 1 out · 1.6 s",
    ]
    assert evaluate(script, "return rules.short(x)", [512, 102_400, 938_000_000, 8_075_365_376]) == [
        "512",
        "102 k",
        "938 M",
        "8.1 B",
    ]
