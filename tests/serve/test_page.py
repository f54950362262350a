"""The page: what it serves to whom."""

from __future__ import annotations

import http.client
from collections.abc import Generator
from pathlib import Path

import httpx
import pytest

from ivl.cli.serve import serve
from ivl.errors import InputError
from ivl.inference.engine import Engine
from ivl.serve.config import ServeConfig
from ivl.serve.page import EXAMPLES, FILES, POLICY, PageExample, read_examples, write_examples
from tests.helpers.engines import picture
from tests.helpers.servers import KEY, Running, engine, running

BASIC = ("anybody", KEY)


@pytest.fixture(scope="module")
def tiny_engine(directory: Path) -> Engine:
    made = engine(directory)
    picture(9).save(directory.parent / "example.png")
    write_examples(directory, [("what colour is the circle?", [directory.parent / "example.png"])])
    return made


@pytest.fixture(scope="module")
def server(tiny_engine: Engine, directory: Path) -> Generator[Running]:
    with running(tiny_engine, page_of=directory) as server:
        yield server


def test_files_are_open_and_the_model_is_not(server: Running, directory: Path) -> None:
    for path in FILES:
        for method in ("GET", "HEAD"):
            response = httpx.request(method, server.url + path)
            assert response.status_code == 200 and response.headers["content-security-policy"] == POLICY
            assert response.headers["x-content-type-options"] == "nosniff"
            assert response.headers["referrer-policy"] == "no-referrer"
            assert int(response.headers["content-length"]) > 0 and bool(response.content) == (method == "GET")
    for path in ("/page/model", "/page/images/0", "/v1/models", "/none", "/page.py", "/static/page.js"):
        assert httpx.get(server.url + path).status_code == 401, path
    with httpx.Client(base_url=server.url, auth=BASIC) as client:
        model = client.get("/page/model").json()
        assert model["name"] == "tiny" and model["parameters"] > 1000 and model["tiling"]["max_tiles"] >= 1
        assert model["examples"] == [{"text": "what colour is the circle?", "images": ["page/images/0"]}]
        image = client.get("/page/images/0")
        assert image.content == (directory / "examples" / "0-0.png").read_bytes()
        assert image.headers["content-type"] == "image/png" and image.headers["x-content-type-options"] == "nosniff"


def test_nothing_else_answers(server: Running) -> None:
    paths = (
        "/page", "/page/", "/page/images/1", "/page/images/00", "/page/images/../model", "/page/images/%2e%2e/x", "/index.html",
        "/page/images/0/../../../etc/passwd", "/page.css/../config.json", "/static/index.html", "//page.js", "/rules.js%00",
        "/page/images/examples/0-0.png", "/gradio_api/info", "/config",
    )  # fmt: skip
    connection = http.client.HTTPConnection(*server.address)  # which sends a path as it is
    for method, all_of_them, status in (("GET", paths, 404), ("POST", FILES, 405)):
        for path in all_of_them:
            connection.request(method, path, headers={"Authorization": f"Bearer {KEY}"})
            response = connection.getresponse()
            assert (response.status, bool(response.read())) == (status, True), path


def test_without_the_page_its_paths_need_a_key(tiny_engine: Engine) -> None:
    with running(tiny_engine) as server:
        for path in FILES:
            assert httpx.get(server.url + path).status_code == 401
            assert httpx.get(server.url + path, auth=BASIC).status_code == 404


def test_examples_are_read_as_they_were_written(tmp_path: Path) -> None:
    picture(1).save(tmp_path / "a.png")
    model = tmp_path / "model"
    model.mkdir()
    assert read_examples(model) == []
    write_examples(model, [("what?", [tmp_path / "a.png"]), ("hello", [])])
    assert read_examples(model) == [PageExample("what?", ("examples/0-0.png",)), PageExample("hello")]
    assert (model / "examples/0-0.png").read_bytes() == (tmp_path / "a.png").read_bytes()
    (model / "link.png").symlink_to(tmp_path / "a.png")
    names = ("../a.png", "link.png", "gone.png", "examples", str(tmp_path / "a.png"), "\\u0000", "\\ud800", "a" * 300, "")
    rows = [f'[{{"text": "x", "images": ["{name}"]}}]' for name in names]
    for wrong in (*rows, '{"text": 1}', "[1]", "3", "no json", '[{"images": []}]', '[{"text": "x", "more": 1}]'):
        (model / EXAMPLES).write_text(wrong)
        with pytest.raises(InputError, match=r"examples\.json"):
            read_examples(model)


def test_serve_names_a_model_after_its_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def open_socket(config: ServeConfig, _: object) -> None:
        raise InputError(config.names[0])

    monkeypatch.setattr("ivl.serve.run.open_socket", open_socket)
    for args, name in ((["runs/mine/model"], "mine"), (["runs/mine/model", "--names", "a", "b"], "a"), (["me/nano"], "nano")):
        with pytest.raises(InputError, match=f"^{name}$"):
            serve(args)
