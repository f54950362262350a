"""Models by hub id, against a stub hub on loopback."""

from __future__ import annotations

import hashlib
import json
import sys
import threading
import types
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from ivl.checkpoint import load_model, model_name, resolve, save_model
from ivl.errors import InputError
from tests.helpers.checkpoints import random_model, same_weights, tiny_like

SHA = "0123456789abcdef0123456789abcdef01234567"
REPO, PRIVATE, GATED = "lab/tiny", "lab/private", "lab/gated"
TOKEN = "hf_of_the_test"


class Hub(ThreadingHTTPServer):
    """The few routes of a hub that a download takes, for one repository."""

    def __init__(self, files: dict[str, bytes]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files = files
        self.asked: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        self.server.asked.append(path)
        words = path.strip("/").split("/")
        repo = "/".join(words[2:4] if words[0] == "api" else words[:2])
        if repo == GATED:
            return self.refuse(403, "GatedRepo")
        if repo == PRIVATE and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.refuse(401, "RepoNotFound")
        if repo not in (REPO, PRIVATE):
            return self.refuse(404, "RepoNotFound")
        if words[0] != "api":
            return self.send_file("/".join(words[4:]))
        if words[4] == "revision":
            if words[5] not in ("main", SHA):
                return self.refuse(404, "RevisionNotFound")
            names = [{"rfilename": name} for name in self.server.files]
            return self.answer({"id": repo, "sha": SHA, "private": False, "tags": [], "downloads": 0, "siblings": names})
        rows = [{"type": "file", "path": n, "size": len(d), "oid": etag(d)} for n, d in self.server.files.items()]
        return self.answer(rows)

    def send_file(self, name: str) -> None:
        data = self.server.files[name]
        self.answer(data, {"ETag": f'"{etag(data)}"', "X-Repo-Commit": SHA, "Accept-Ranges": "bytes"})

    def refuse(self, status: int, code: str) -> None:
        self.answer({"error": code}, {"X-Error-Code": code, "X-Error-Message": code}, status)

    def answer(self, body: Any, headers: dict[str, str] | None = None, status: int = 200) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for key, value in {**(headers or {}), "Content-Length": str(len(data))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)


def etag(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("source")
    save_model(random_model(tiny_like("2B")), directory, max_shard_bytes=80_000)
    return directory


@pytest.fixture
def hub(model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    files = {file.name: file.read_bytes() for file in model_dir.iterdir()}
    extra = ("modeling_evil.py", "pytorch_model.bin", "onnx/model.safetensors", "tokenizer.model", "README.md")
    server = Hub(files | dict.fromkeys(extra, b"x"))
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    # The library reads the variable once, when it is imported, and tests of transformers set it.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    for name in ("HF_TOKEN", "HF_HUB_OFFLINE", "IVL_MODELSCOPE"):
        monkeypatch.delenv(name, raising=False)
    yield server
    server.shutdown()
    server.server_close()


def test_a_hub_id_gives_the_model_and_neither_code_nor_pickles(hub: Hub, model_dir: Path) -> None:
    assert same_weights(load_model(REPO), load_model(model_dir))
    expected = {file.name for file in model_dir.iterdir()} | {"tokenizer.model"}
    assert {file.name for file in resolve(REPO).rglob("*")} == expected
    assert not [path for path in hub.asked if "evil" in path or "bin" in path or "onnx" in path]


def test_offline_uses_the_cache_and_asks_nothing(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    fetched = resolve(REPO)
    hub.asked.clear()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert resolve(REPO) == fetched and resolve(f"{REPO}@{SHA}") == fetched
    with pytest.raises(InputError, match=r"lab/other: .* not in the local cache, and HF_HUB_OFFLINE is set"):
        resolve("lab/other")
    assert not hub.asked


def test_a_token_opens_a_private_model(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=f"{PRIVATE}: .*private; check the spelling or set HF_TOKEN"):
        resolve(PRIVATE)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert (resolve(PRIVATE) / "config.json").is_file()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("lab/none", "lab/none: no such directory, and no such model on the hub"),
        (GATED, "access is gated; accept its terms on the hub and set HF_TOKEN"),
        (f"{REPO}@v9", "the hub has no revision 'v9'"),
        ("runs/some/model", "neither a model directory nor a hub id"),
        ("nothing", "neither a model directory nor a hub id"),
        ("n" * 260, "neither a model directory nor a hub id"),
        ("~nobody-of-that-name/x", "neither a model directory nor a hub id"),
        ("../up", "neither a model directory nor a hub id"),
    ],
)
def test_what_cannot_be_found_says_what_to_do(hub: Hub, name: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        resolve(name)


def test_an_unreachable_hub_says_so(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(InputError, match=r"the hub cannot be reached: check the connection and HF_ENDPOINT"):
        resolve(REPO)


def test_a_directory_comes_before_a_hub_id(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / REPO).mkdir(parents=True)
    assert resolve(REPO) == Path(REPO) and not hub.asked


def test_modelscope_ids(hub: Hub, model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "modelscope", None)
    with pytest.raises(InputError, match=r"pip install \"ivl\[modelscope\]\""):
        resolve("modelscope:lab/tiny")
    asked = []

    def snapshot_download(model_id: str, *, revision: str | None, allow_patterns: list[str], ignore_patterns: list[str]) -> str:
        asked.append((model_id, revision))
        assert not {"*.py", "*.bin"} & set(allow_patterns)
        if model_id == "lab/none":
            raise ValueError("not there")
        return str(model_dir)

    monkeypatch.setitem(sys.modules, "modelscope", types.SimpleNamespace(snapshot_download=snapshot_download))
    assert resolve("modelscope:lab/tiny@v1") == model_dir
    monkeypatch.setenv("IVL_MODELSCOPE", "1")
    assert resolve("lab/tiny") == model_dir
    with pytest.raises(InputError, match=r"modelscope:lab/none: cannot be fetched: not there"):
        resolve("lab/none")
    assert asked == [("lab/tiny", "v1"), ("lab/tiny", None), ("lab/none", None)] and not hub.asked


def test_a_model_is_named_after_its_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for path, name in (
        ("runs/mine/model", "mine"), ("runs/mine/model/", "mine"), ("/srv/nano", "nano"), ("/model", "model"),
        ("OpenGVLab/InternVL2_5-1B", "InternVL2_5-1B"), ("~/mine/model", "mine"), ("/", "model"),
    ):  # fmt: skip
        assert model_name(path) == model_name(Path(path)) == name
    (tmp_path / "mine" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "mine")
    assert model_name("model") == model_name("./model") == "mine"
    monkeypatch.chdir(tmp_path / "mine" / "model")
    assert model_name(".") == "mine"
