"""S5: a model directory of a stranger. No code, no network, no large memory, whatever is in it."""

from __future__ import annotations

import json
import pickle
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.engines import tiny_directory

CHILD = """
import json, os, sys, time
from pathlib import Path
import ivl, torch
from ivl.errors import InputError
good, *evil = map(Path, sys.argv[1:])
ivl.load(good).chat("Hi", ivl.ImageRef("picture.png"), max_new_tokens=2)  # what is imported once is not the evil one's
events = []
BAD = ("import", "socket.", "subprocess.", "os.system", "os.exec", "os.fork", "os.posix_spawn", "pickle.", "urllib.")
BAD += ("os.remove", "os.rename", "os.rmdir", "shutil.")

def watch(event, arguments):
    if event.startswith(BAD) or event == "open" and "w" in str(arguments[1] or ""):
        events.append(f"{event} {arguments[0]}")

def peak():
    return next(int(line.split()[1]) >> 10 for line in open("/proc/self/status") if line.startswith("VmHWM"))

sys.addaudithook(watch)
out = {}
for directory in evil:
    os.chdir(directory)
    events.clear()
    Path("/proc/self/clear_refs").open("r+").write("5")
    before, start = peak(), time.process_time()
    sys.path.insert(0, str(directory))
    try:
        text = ivl.load(directory).chat("Hi", max_new_tokens=2) and "loaded" or "loaded"
    except InputError as error:
        text = f"refused: {error}"
    except BaseException as error:
        text = f"CRASH: {error!r}"
    sys.path.pop(0)
    mine = [event for event in events if "clear_refs" not in event]
    out[directory.name] = {"outcome": text, "events": mine, "memory": peak() - before, "seconds": time.process_time() - start}
print(json.dumps(out))
"""


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("exploded"),))


def edited(name: str, change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def damage(directory: Path) -> None:
        values = json.loads((directory / name).read_text())
        change(values)
        (directory / name).write_text(json.dumps(values))

    return damage


def sized(**sizes: int) -> Callable[[Path], None]:
    return edited("config.json", lambda values: values["llm_config"].update(sizes))


def pickled(*names: str) -> Callable[[Path], None]:
    def damage(directory: Path) -> None:
        (directory / "model.safetensors").unlink()
        for name in names:
            (directory / name).write_bytes(pickle.dumps(Bomb()))

    return damage


def sharded(shard: Any) -> Callable[[Path], None]:
    def damage(directory: Path) -> None:
        (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"mlp1.0.weight": shard}}))

    return damage


def headed(header: bytes, length: int | None = None, body: bytes = b"") -> Callable[[Path], None]:
    def damage(directory: Path) -> None:
        size = struct.pack("<Q", len(header) if length is None else length)
        (directory / "model.safetensors").write_bytes(size + header + body)

    return damage


def tensor(shape: list[int], end: int) -> bytes:
    return json.dumps({"x": {"dtype": "F32", "shape": shape, "data_offsets": [0, end]}}).encode()


def coded(directory: Path) -> None:
    """Everything that makes another loader run code: here it is not looked at."""
    (directory / "evil.py").write_text("open('exploded', 'w')\nclass Evil: pass\n")
    auto = dict.fromkeys(("AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoTokenizer", "AutoProcessor"), "evil.Evil")
    extra = {"auto_map": auto, "_attn_implementation_internal": "evil/kernel", "_attn_implementation": "evil/kernel",
             "trust_remote_code": True, "custom_pipelines": {"x": {"impl": "evil.Evil"}}, "quantizer": "evil.Evil"}  # fmt: skip
    for name in directory.glob("*.json"):
        if name.name not in ("tokenizer.json", "vocab.json"):
            edited(name.name, lambda values: values.update(extra))(directory)
    edited("config.json", lambda values: [values[part].update(extra) for part in ("llm_config", "vision_config")])(directory)
    (directory / "chat_template.jinja").write_text("{{ ''.__class__.__mro__[1].__subclasses__() }}{% include '/etc/passwd' %}")
    (directory / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))
    (directory / "tokenizer.py").write_text("open('exploded', 'w')")


def text(name: str, content: bytes) -> Callable[[Path], None]:
    return lambda directory: (directory / name).write_bytes(content) and None


HARMLESS = {"code beside the weights": coded}
REFUSED = {
    "pickled weights": pickled("pytorch_model.bin"),
    "pickled shards": pickled("pytorch_model-00001-of-00002.bin", "model.pt", "x.pth", "y.ckpt"),
    "weights that are a pickle": text("model.safetensors", pickle.dumps(Bomb())),
    "shard above": sharded("../good/model.safetensors"),
    "shard at the root": sharded("/etc/passwd"),
    "shard of another kind": sharded("pytorch_model.bin"),
    "shard that is a number": sharded(3),
    "width of a billion": sized(hidden_size=10**9),
    "layers of a billion": sized(num_hidden_layers=10**9),
    "vocabulary of a billion": sized(vocab_size=10**9),
    "all as large as allowed": sized(
        hidden_size=1 << 16, intermediate_size=1 << 20, vocab_size=1 << 22, num_attention_heads=1024
    ),
    "layers as many as allowed": sized(num_hidden_layers=1024),
    "positions without end": sized(max_position_embeddings=10**12),
    "tiles without end": edited("config.json", lambda values: values.update(max_dynamic_patch=10**9)),
    "header longer than the file": headed(b"{}", 1 << 60),
    "header of 200 MB": headed(b"{}", 200_000_000, b" " * 1000),
    "header of another length": headed(tensor([4], 16), 10),
    "tensor of 4 EB": headed(tensor([10**9, 10**9], 4 * 10**18)),
    "tensor beyond the file": headed(tensor([1000], 4000), body=bytes(16)),
    "tensor of negative size": headed(tensor([-1], 4), body=bytes(4)),
    "configuration of 70 MB": text("config.json", b'{"a": "' + b"x" * (70 << 20) + b'"}'),
    "configuration without bottom": text("config.json", b"[" * 1_000_000),
    "tokenizer that is a pickle": text("tokenizer.json", pickle.dumps(Bomb())),
    "tokenizer without bottom": text("tokenizer.json", b'{"model":' * 100_000),
}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """All in one process that knows the good model, and reports what the interpreter's audit events say of the others."""
    from tests.helpers.media import encoded

    root = tmp_path_factory.mktemp("models")
    good = tiny_directory(root / "good")
    for name, damage in {**HARMLESS, **REFUSED}.items():
        shutil.copytree(good, root / name)
        damage(root / name)
    (root / "picture.png").write_bytes(encoded("PNG"))
    directories = [str(root / name) for name in ("good", *HARMLESS, *REFUSED)]
    done = subprocess.run([sys.executable, "-c", CHILD, *directories], cwd=root, capture_output=True, text=True, timeout=170)
    assert done.returncode == 0, done.stderr[-3000:]
    assert not list(root.rglob("exploded"))
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", [*HARMLESS, *REFUSED])
def test_s5_strangers_models_run_nothing_and_take_nothing(outcomes: dict[str, dict[str, Any]], name: str) -> None:
    seen = outcomes[name]
    assert seen["outcome"].startswith("loaded" if name in HARMLESS else "refused"), seen
    assert seen["events"] == [] and seen["memory"] < 50 and seen["seconds"] < 3, seen


def test_s5_what_is_refused_says_why_in_few_words(outcomes: dict[str, dict[str, Any]]) -> None:
    for name in REFUSED:
        message = outcomes[name]["outcome"]
        assert len(message) < 1500 and "object at 0x" not in message and name in message, message
