"""`--adapter`: replies of adapters that are not merged, alone and several by name in a server."""

from __future__ import annotations

import json
import re
from pathlib import Path

import httpx
import pytest
import torch

import ivl
from ivl.checkpoint import load_model
from ivl.checkpoint.adapter import merge, save_adapter
from ivl.cli.chat import chat
from ivl.cli.eval import evaluate
from ivl.cli.serve import serve
from ivl.config import LoraConfig
from ivl.errors import InputError
from ivl.generators import LoadConfig
from ivl.generators.local import load_engine
from ivl.lora.layers import add_lora
from ivl.types import SamplingParams
from tests.helpers.adapters import stir
from tests.helpers.engines import ask, tiny_directory
from tests.helpers.mixtures import make_rows
from tests.helpers.servers import CONFIG, KEY, running, says

PARAMS = SamplingParams(max_new_tokens=20)
QUESTIONS = [ask(text) for text in ("what colour is the shape?", "is it red?", "a circle or no circle")]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, and two adapters that were trained from it: one of the decoder, one of everything with a whole projector."""
    place = tmp_path_factory.mktemp("adapters")
    tiny_directory(place / "base")
    for seed, (name, targets) in enumerate((("one", ("decoder.layers",)), ("two", ("decoder", "vision.layers"))), 1):
        model = load_model(place / "base")
        add_lora(model, LoraConfig(rank=4, targets=targets))
        stir(model, seed)
        trained = []
        if name == "two":
            with torch.no_grad():
                model.projector.fc2.weight.mul_(1.5)
            trained = ["projector.fc2.weight"]
        save_adapter(model, place / name / "adapter", base=str(place / "base"), trained=trained)
        merge(place / "base", place / name / "adapter", place / f"{name}-merged")
    return place


def texts(engine) -> list[str]:
    return [reply.text for reply in engine.generate(QUESTIONS, PARAMS)]


@pytest.mark.parametrize("name", ["one", "two"])
def test_unmerged_says_what_merged_says(place: Path, name: str) -> None:
    adapted = ivl.load(place / "base", adapter=place / name / "adapter", max_cache_tokens=4096)
    merged = ivl.load(place / f"{name}-merged", max_cache_tokens=4096)
    base = ivl.load(place / "base", max_cache_tokens=4096)
    assert texts(adapted.engine) == texts(merged.engine) != texts(base.engine)


def test_variants_share_what_the_adapter_left(place: Path) -> None:
    named = LoadConfig(adapter=tuple(f"{name}={place / name / 'adapter'}" for name in ("one", "two")))
    engine = load_engine(place / "base", named, max_cache_tokens=4096)
    base, two = engine.model, engine.models["two"]
    own = {id(p) for p in base.parameters()}
    alone = [name for name, p in two.named_parameters() if id(p) not in own and ".lora_" not in name]
    assert alone == ["projector.fc2.weight"]
    assert torch.equal(base.projector.fc2.weight * 1.5, two.projector.fc2.weight)


def test_a_server_has_each_by_its_name(place: Path) -> None:
    named = LoadConfig(adapter=tuple(f"{name}={place / name / 'adapter'}" for name in ("one", "two")))
    engine = load_engine(place / "base", named, max_cache_tokens=4096)
    alone = {"tiny": place / "base", "one": place / "one-merged", "two": place / "two-merged"}
    said = {name: ivl.load(path, max_cache_tokens=4096).chat("is it red?", max_new_tokens=12) for name, path in alone.items()}
    with running(engine) as server, httpx.Client(base_url=server.url, headers={"Authorization": f"Bearer {KEY}"}) as client:
        cards = client.get("/v1/models").json()["data"]
        assert [card["id"] for card in cards] == [*CONFIG.names, "one", "two"]
        assert [card.get("parent") for card in cards] == [None, None, "tiny", "tiny"]
        for name, text in said.items():
            reply = client.post("/v1/chat/completions", json=says("is it red?", model=name)).json()
            assert reply["model"] == name and reply["choices"][0]["message"]["content"].strip() == text
        assert client.post("/v1/completions", json={"model": "two", "prompt": "red", "max_tokens": 3}).json()["model"] == "two"
        refused = client.post("/v1/chat/completions", json=says("is it red?", model="three"))
        assert refused.status_code == 404 and "known: tiny, alias, one, two" in refused.text


def test_chat_and_eval_take_an_adapter(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = make_rows(tmp_path, 1)[0]["image"]

    def said(*options: str) -> str:
        chat([str(place / "base"), *options, str(tmp_path / shown), "-p", "is it red?", "--max-new-tokens", "12"])
        return capsys.readouterr().out

    adapter = str(place / "one" / "adapter")
    assert said("--adapter", adapter) == said("--adapter", f"any={adapter}") != said()
    monkeypatch.chdir(tmp_path)
    turns = [{"from": "human", "value": "is it red?"}, {"from": "gpt", "value": "red"}]
    (tmp_path / "rows.jsonl").write_text(json.dumps({"conversations": turns}) + "\n")
    for options in ((), ("--adapter", adapter)):
        evaluate([*options, str(place / "base"), "--data", "rows.jsonl", "--metric", "exact", "--max-new-tokens", "12"])
    assert sorted(path.name for path in (tmp_path / "runs" / "eval").glob("*rows.jsonl")) == [
        "base+one-rows.jsonl",
        "base-rows.jsonl",
    ]


@pytest.mark.parametrize(
    ("adapters", "message"),
    [
        (("DIR", "DIR"), "give each adapter a name of its own"),
        (("a=DIR", "a=DIR"), "give each adapter a name of its own"),
        (("a=DIR", "b=DIR"), "one adapter at a time"),
        (("nowhere",), r"nowhere: no adapter_config\.json"),
        (("RUN",), r"one: no adapter_config\.json.*; .*one/adapter has one"),
    ],
)
def test_mistakes_are_named(place: Path, adapters: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    real = {"DIR": str(place / "one" / "adapter"), "RUN": str(place / "one")}
    given = ["=".join(real.get(part, part) for part in each.split("=")) for each in adapters]
    with pytest.raises((InputError, SystemExit)) as caught:  # values that the dataclass refuses are tyro's to report
        chat([str(place / "base"), "-p", "?", *(part for each in given for part in ("--adapter", each))])
    assert re.search(message, " ".join(f"{caught.value} {capsys.readouterr().err}".replace("│", " ").split()))


def test_an_adapter_of_another_model_and_a_name_given_twice_are_refused(place: Path) -> None:
    adapter = str(place / "one" / "adapter")
    with pytest.raises(InputError, match=r"was trained from .*base', not from this model"):
        chat([str(place / "two-merged"), "-p", "?", "--adapter", adapter])
    with pytest.raises(InputError, match="base names the model and an adapter"):
        serve([str(place / "base"), "--port", "0", "--adapter", f"base={adapter}"])
