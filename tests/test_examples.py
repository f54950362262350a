"""Every example runs on a CPU, alone, and leaves what it says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Generator
from pathlib import Path

import pytest
from PIL import Image

import ivl
from tests.helpers.servers import KEY, running

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("examples")


def run(place: Path, name: str, *arguments: str) -> str:
    command = ["sh" if name.endswith(".sh") else sys.executable, str(EXAMPLES / name), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "IVL_API_KEY": KEY}
    done = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_own_model_and_chat(place: Path) -> None:
    assert "model.safetensors" in run(place, "own_model_from_config.py", "own")
    lines = run(place, "chat_with_a_picture.py", "own").split("batch:")
    assert len(lines) == 4 and all("5 tiles" in line for line in lines[1:])


def test_own_recipe_learns(place: Path) -> None:
    """100 steps from nothing: it names colours and shapes of pictures."""
    out = run(place, "own_training_recipe.py")
    assert out.splitlines() == ["red circle: red circle", "blue square: blue square", "green circle: green circle"]


def test_parts_move(place: Path) -> None:
    out = run(place, "move_vit_to_another_llm.py")
    assert "32 of 32 vision tensors moved bit for bit; decoder kept: True" in out


def test_lora_learns_and_merges(place: Path) -> None:
    loss, adapter, ours, merged = run(place, "lora_finetune.py").splitlines()
    first, last = (float(x) for x in loss.removeprefix("loss ").split(" -> "))
    assert last < first - 0.5 and "adapter_model.safetensors" in adapter
    assert ours.partition("says")[2].strip() == merged.partition("says")[2].strip() != ""


def test_own_task(place: Path) -> None:
    assert "95% interval" in run(place, "own_task.py") and (place / "runs/examples/own-task/report.json").exists()


def test_filter_and_pack(place: Path) -> None:
    out = run(place, "filter_and_pack.py")
    assert "validate: 2 bad rows, missing_media, empty_answer; the first at" in out and "kept 52 of 57 rows" in out
    assert "  10: repetition, loop of words\n" in out and "  again: duplicates, near-duplicate\n" in out
    assert "packs an epoch" in out and (place / "runs/examples/filter-and-pack/run/model").exists()


def test_preference_from_any_engine(place: Path) -> None:
    out = run(place, "preference_from_any_engine.py")
    assert "of 32 replies are right; 10 pairs" in out and "Final answer: 3 is chosen over Final answer:" in out
    assert (place / "runs/preference-example/pairs/report.html").exists()


@pytest.fixture(scope="module")
def server(place: Path) -> Generator[str]:
    """The address of a live server of a model that own_model_from_config.py builds; a picture lies in the place."""
    run(place, "own_model_from_config.py", "served")
    Image.new("RGB", (56, 28), "red").save(place / "red.png")
    with running(ivl.load(place / "served").engine) as live:
        yield live.url


def test_openai_client(place: Path, server: str) -> None:
    lines = run(place, "serve_openai_client.py", f"{server}/v1", "red.png").splitlines()
    assert lines[0].split() == ["model:", "tiny"] and any(line.startswith("stream: ") for line in lines)
    assert "prompt tokens)" in "".join(lines) and lines[-1].startswith("refused: 403 ") and "data: URLs" in lines[-1]


def test_curl(place: Path, server: str) -> None:
    out = run(place, "serve_curl.sh", "red.png", server)
    assert out.startswith("model: tiny\n") and '"chat.completion"' in out and out.rstrip().endswith("data: [DONE]")


def test_langchain(place: Path, server: str) -> None:
    out = run(place, "serve_langchain.py", "red.png", f"{server}/v1")
    replies = [line.partition(":")[2].strip() for line in out.splitlines() if line.startswith(("one:", "batch:"))]
    assert len(replies) == 4 and replies[0] == replies[1] != ""


def test_notebook(place: Path) -> None:
    """Its code cells run one after another, without Jupyter; one epoch of a hundred rows instead of eight of all."""
    cells = json.loads((EXAMPLES / "first_steps.ipynb").read_text())["cells"]
    code = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    assert "EPOCHS = 8" in code and not any(cell.get("outputs") for cell in cells)
    run(place, "own_model_from_config.py", "runs/quickstart/model")
    (place / "notebook.py").write_text(code.replace("EPOCHS = 8", "EPOCHS = 1").replace("data/train.jsonl", "data/val.jsonl"))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg"}
    done = subprocess.run([sys.executable, "notebook.py"], cwd=place, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "published settings of" in done.stdout and done.stdout.splitlines()[-1].endswith("%")


def test_all_are_tested() -> None:
    tested = Path(__file__).read_text()
    assert all(f'"{path.name}"' in tested for path in EXAMPLES.iterdir() if path.suffix in (".py", ".sh", ".ipynb"))
