"""A missing extra is one line that names it, wherever its package is first needed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from ivl.datasets.demo import write_demo

ROOT = Path(__file__).parent.parent
MISSING = (
    "aiohttp", "av", "datasketch", "easy_vqa", "fastapi", "gguf", "imagehash", "llguidance", "math_verify", "matplotlib",
    "modelscope", "openai", "pyarrow", "rapidfuzz", "ray", "sentencepiece", "uvicorn",
)  # fmt: skip
COMMANDS = {
    "train finetune --model model --data data/table.parquet --dry-run": "pip install 'ivl[data]'",
    "data convert data/val.jsonl out.parquet": "pip install 'ivl[data]'",
    "data filter heuristic data/val.jsonl filtered": "pip install 'ivl[data]'",
    "data filter short.json data/val.jsonl on-ray --ray local": "pip install 'ivl[ray]'",
    "data stats data/val.jsonl --out stats": "pip install 'ivl[eval]'",
    "eval model --task easy-vqa --limit 1 --out easy.json": "pip install easy-vqa",
    "eval model --data data/val.jsonl --metric anls --limit 1 --max-new-tokens 2 --out anls.json": 'pip install "ivl[eval]"',
    "prefer sample data/questions.jsonl out.jsonl --url http://127.0.0.1:9 --url-model m": 'pip install "ivl[eval]"',
    "serve model": 'pip install "ivl[serve]"',
    "chat model clip.mp4 -p what?": "pip install 'ivl[video]'",
    "chat model picture.png -p what? --choice red blue": 'pip install "ivl[guide]"',
    "chat modelscope:org/name -p what?": 'pip install "ivl[modelscope]"',
    "convert model gguf --to gguf": "pip install 'ivl[gguf]'",
    "compose parts --vit model --llm language.gguf": "pip install 'ivl[gguf]'",
}
"""What is called, and the remedy that its message ends with."""
RUN = f"""
import contextlib, io, json, runpy, sys
for name in {MISSING!r}:
    sys.modules[name] = None  # importing it fails, as if it were not there
runpy.run_path({str(ROOT / "examples/own_model_from_config.py")!r})["build"]("model")
from ivl.cli import main
said = {{}}
for command in json.load(sys.stdin):
    errors, sys.argv = io.StringIO(), ["ivl", *command.split()]
    with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
        try:
            main()
            code = 0
        except SystemExit as end:
            code = end.code
        except BaseException as error:
            code = repr(error)
    said[command] = [code, errors.getvalue()]
print(json.dumps(said))
"""


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, str]]:
    """What each command exits with and says where no optional package is installed."""
    place = tmp_path_factory.mktemp("bare")
    write_demo(place)
    (place / "data/val.parquet").rename(place / "data/table.parquet")
    (place / "clip.mp4").write_bytes(b"\0\0\0\x18ftypmp42" + bytes(64))
    (place / "language.gguf").write_bytes(b"GGUF" + bytes(64))
    (place / "short.json").write_text(json.dumps({"stages": [{"use": "length"}]}))
    done = subprocess.run(
        [sys.executable, "-c", RUN], input=json.dumps([*COMMANDS]), cwd=place, capture_output=True, text=True, check=True,
        env={"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PATH": "/usr/bin:/bin"},
    )  # fmt: skip
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("command", COMMANDS)
def test_missing_extra_is_one_line(said: dict[str, tuple[int, str]], command: str) -> None:
    code, errors = said[command]
    assert code == 1, errors
    assert errors.strip().startswith("ivl ") and len(errors.strip().splitlines()) == 1
    assert COMMANDS[command] in errors


def test_demo_data_without_pyarrow_says_what_it_left_out(tmp_path: Path) -> None:
    code = "import sys; sys.modules['pyarrow'] = None; from ivl.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, "demo-data", str(tmp_path)], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert "val.parquet was left out: tables need pip install 'ivl[data]'" in done.stdout
    assert (tmp_path / "data/val.jsonl").exists() and not (tmp_path / "data/val.parquet").exists()
