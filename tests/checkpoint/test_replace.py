"""A target is replaced whole or not at all, and nothing is lost that ivl did not write."""

from __future__ import annotations

import json
import multiprocessing
import os
import time
from multiprocessing.connection import Connection
from multiprocessing.context import ForkProcess
from pathlib import Path

import pytest
import torch

from ivl.checkpoint import load_config, load_model, save_model, weights
from ivl.checkpoint.convert import convert
from ivl.checkpoint.files import new_directory
from ivl.errors import InputError
from tests.helpers.checkpoints import random_model, same_weights, tiny_like


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("source") / "model"
    save_model(random_model(tiny_like("1B")), directory)
    return directory


def rewrite(source: Path, target: Path | str, force: bool = False) -> None:
    convert(source, target, to="transformers", weights_only=True, force=force)


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def web(folder: Path) -> None:
    (folder / "src").mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "src" / "a").write_text("c")


def web_with_weights(folder: Path) -> None:
    web(folder)
    (folder / "model.safetensors").write_bytes(b"x")


def model_with(name: str, folder: Path) -> None:
    save_model(random_model(tiny_like("1B"), seed=3), folder)
    if name.endswith("/"):
        (folder / name).mkdir()
        (folder / name / "thesis").touch()
    elif name == "link":
        (folder / "tokenizer.json").symlink_to(folder / "config.json")
    else:
        (folder / name).write_text("mine")


@pytest.mark.parametrize("what", ["web", "web-weights", "notes.md", "examples/", "model-backup.safetensors", ".git/", "link"])
def test_force_takes_nothing_that_ivl_did_not_write(source: Path, tmp_path: Path, what: str) -> None:
    target = tmp_path / "target"
    if what.startswith("web"):
        (web if what == "web" else web_with_weights)(target)
    else:
        model_with(what, target)
    before = tree(tmp_path)
    with pytest.raises(InputError, match=r"target.*(no model directory|internvl_chat|which ivl did not write)"):
        rewrite(source, target, force=True)
    assert tree(tmp_path) == before


def test_a_file_added_meanwhile_stays(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"
    rewrite(source, target)
    with pytest.raises(InputError, match=r"holds notes, which ivl did not write"), new_directory(target, force=True):
        (target / "notes").write_text("mine")
    assert (target / "notes").read_text() == "mine" and load_config(target)
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


def test_weights_of_other_names_stay_when_a_model_is_saved_over_another(source: Path, tmp_path: Path) -> None:
    model = load_model(source)
    save_model(model, tmp_path, max_shard_bytes=50_000)
    (tmp_path / "model-before.safetensors").write_bytes(b"mine")
    save_model(model, tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"config.json", "generation_config.json", "model.safetensors", "model-before.safetensors"}


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize(
    "kind", ["link", "dangling", "loop", "long", "bytes", "file", "inside", "under-file", "null", "new-parents"]
)
def test_strange_targets_are_one_line_and_leave_nothing(source: Path, tmp_path: Path, kind: str, force: bool) -> None:
    (tmp_path / "file").write_text("mine")
    save_model(load_model(source), tmp_path / "other")
    (tmp_path / "link").symlink_to("other")
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "loop").symlink_to("loop")
    copy = tmp_path / "copy"
    save_model(load_model(source), copy)
    targets = {
        "long": "n" * 260, "bytes": os.fsdecode(b"caf\xe9"), "inside": "copy/deeper/model", "under-file": "file/model",
        "null": "a\0b", "new-parents": "x/y/" + "n" * 260,
    }  # fmt: skip
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(InputError) as caught:
        rewrite(copy, tmp_path / targets.get(kind, kind), force=force)
    assert "\n" not in str(caught.value)
    assert sorted(tmp_path.rglob("*")) == before and (tmp_path / "file").read_text() == "mine"


def test_a_failure_leaves_no_parents_behind(source: Path, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), new_directory(tmp_path / "x" / "y" / "z"):
        raise RuntimeError
    assert not list(tmp_path.iterdir())


def test_a_model_replaces_itself_on_request_only(source: Path, tmp_path: Path) -> None:
    rewrite(source, tmp_path / "m")
    with pytest.raises(InputError, match="--force"):
        rewrite(tmp_path / "m", tmp_path / "m")
    convert(tmp_path / "m", tmp_path / "m", to="internvl_chat", weights_only=True, force=True)
    assert same_weights(load_model(tmp_path / "m"), load_model(source))
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def convert_slowly(says: Connection, source: Path, target: Path, force: bool, seconds: float) -> None:
    """Convert, and tell when the weights are begun and when all is done."""
    torch.set_num_threads(1)
    write = weights.write_tensors

    def write_slowly(path: Path, tensors: dict[str, torch.Tensor]) -> None:
        says.send("begun")
        time.sleep(seconds)
        write(path, tensors)

    weights.write_tensors = write_slowly
    convert(source, target, to="transformers", weights_only=True, force=force)
    says.send("done")


def child(source: Path, target: Path, force: bool, seconds: float) -> tuple[ForkProcess, Connection]:
    """Start `convert_slowly` in another process; returns when it has begun."""
    said, says = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=convert_slowly, args=(says, source, target, force, seconds))
    process.start()
    assert said.recv() == "begun"
    return process, said


@pytest.mark.parametrize("force", [False, True])
def test_of_two_converts_into_one_place_one_wins(source: Path, tmp_path: Path, force: bool) -> None:
    target = tmp_path / "target"
    if force:
        save_model(random_model(tiny_like("1B"), seed=3), target)
    first, said = child(source, target, force, 2)
    with pytest.raises(InputError, match=r"target: another process is writing this directory"):
        rewrite(source, target, force=force)
    assert said.recv() == "done"
    first.join()
    assert same_weights(load_model(target), load_model(source))
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


@pytest.mark.parametrize("force", [False, True])
def test_a_kill_leaves_the_old_model_or_the_new_one(source: Path, tmp_path: Path, force: bool) -> None:
    """And no lock: the next convert clears what is left."""
    target = tmp_path / "target"
    if force:
        save_model(random_model(tiny_like("1B"), seed=3), target)
    before = tree(target)
    run, _ = child(source, target, force, 60)
    run.kill()
    run.join()
    assert tree(target) == before and (tmp_path / ".target.ivl-part").exists()
    rewrite(source, target, force=force)
    assert json.loads((target / "config.json").read_text())["model_type"] == "internvl"
    assert same_weights(load_model(target), load_model(source))
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


@pytest.mark.slow
def test_kills_at_many_moments(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"
    models = [random_model(tiny_like("1B"), seed=3), load_model(source)]
    for step in range(8):
        save_model(models[0], target)
        run, _ = child(source, target, True, 0)
        time.sleep(step * 0.01)
        run.kill()
        run.join()
        assert any(same_weights(load_model(target), model) for model in models)


def test_a_hidden_part_of_somebody_else_stays(source: Path, tmp_path: Path) -> None:
    (tmp_path / ".target.ivl-part").mkdir()
    (tmp_path / ".target.ivl-part" / "thesis").write_text("mine")
    with pytest.raises(InputError, match=r"holds thesis, which ivl did not write"):
        rewrite(source, tmp_path / "target")
    assert tree(tmp_path) == {".target.ivl-part/thesis": b"mine"}
