"""The demonstration on real parts: DINOv2 is an InternViT, pictures are split, captions are chosen by likelihood."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from examples.own_model_from_config import build
from examples.real_parts import demonstration, parts, pictures
from ivl.checkpoint import load_config
from ivl.config import VisionConfig
from ivl.errors import InputError
from ivl.formats.rows import write_jsonl
from ivl.model.vit import VisionTransformer
from studies.claims import small


def test_dinov2_is_an_internvit() -> None:
    """A DINOv2 of two layers, as an ONNX graph stores it, gives the features that transformers computes."""
    from transformers import Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    config = Dinov2Config(
        hidden_size=parts.WIDTH,
        num_hidden_layers=2,
        num_attention_heads=6,
        image_size=518,
        patch_size=14,
        attn_implementation="eager",
    )
    theirs = Dinov2Model(config).eval()
    state = {f"backbone.{renamed(name)}": tensor for name, tensor in theirs.state_dict().items()}
    for name, tensor in state.items():
        if "lambda" in name or "norm" in name or name.endswith("bias"):
            torch.nn.init.normal_(tensor, std=0.5)
    table = state.pop("backbone.embeddings.position_embeddings")
    stored, factors = {"onnx::class": table[:, :1], "onnx::patches": table[:, 1:]}, {}
    for name, tensor in state.items():
        if name.endswith(".weight") and tensor.ndim == 2:
            node = f"/{name.removesuffix('.weight').replace('.', '/').replace('layer/', 'layer.')}/MatMul"
            factors[node], stored[f"onnx::{node}"] = f"onnx::{node}", tensor.T
        else:
            stored[name] = tensor
    tensors = parts.internvit(stored, factors, 224, num_layers=2)
    vision = VisionConfig(width=384, num_layers=2, mlp_width=1536, num_heads=6, image_size=224, layer_scale_init=1.0)
    ours = VisionTransformer(vision).eval()
    load(ours, tensors)
    pixels = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        hidden = theirs.embeddings(pixels)
        for number, layer in enumerate(theirs.encoder.layer):
            torch.testing.assert_close(ours(pixels, number), hidden, atol=2e-4, rtol=1e-4)
            hidden = layer(hidden)
        torch.testing.assert_close(ours(pixels, 2), hidden, atol=2e-4, rtol=1e-4)


def renamed(name: str) -> str:
    """DINOv2's published name of a tensor, which the graph has kept."""
    for new, old in (("q_proj", "attention.query"), ("k_proj", "attention.key"), ("v_proj", "attention.value")):
        name = name.replace(new, old)
    return name.replace("o_proj", "output.dense")


def load(vit: VisionTransformer, tensors: dict[str, torch.Tensor]) -> None:
    """Load tensors under InternViT's published names by the key map of checkpoints."""
    from ivl.checkpoint.keymaps import vision_map

    own = dict(vit.named_parameters())
    entries = vision_map(vit, "internvl_chat")
    assert {theirs for entry in entries for theirs in entry.theirs} == tensors.keys()
    with torch.no_grad():
        for entry in entries:
            own[entry.ours.removeprefix("vision.")].copy_(entry.join([tensors[entry.theirs[0]]]))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    place = tmp_path / "pictures"
    place.mkdir()
    for number in range(120):
        Image.new("RGBA", (500, 20), (0, 0, 0, 0 if number else 255)).save(place / f"{number:03}.png")
        (place / f"{number:03}.txt").write_text(f"Picture {number // 2}.\nde.utf8=Bild {number // 2}.\n")
    return place


def test_pictures_of_a_caption_are_on_one_side(folder: Path, tmp_path: Path) -> None:
    pictures.write_rows(tmp_path, folder)
    train, test = (demonstration.rows(tmp_path / f"{side}.jsonl") for side in ("train", "test"))
    captions = [{row["conversations"][1]["value"] for row in rows} for rows in (train, test)]
    assert len(train) + len(test) == 120 and len(captions[1]) == 12 and not captions[0] & captions[1]
    opaque, clear = (Image.open(tmp_path / f"pictures/{number}.png") for number in (0, 1))
    assert opaque.size == (336, 13) and opaque.getpixel((0, 0)) == (0, 0, 0)
    assert clear.getpixel((0, 0)) == (255, 255, 255)  # what was transparent is white


def test_too_few_pictures_name_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pictures, "STAMPS", tmp_path)
    with pytest.raises(InputError, match=r"0 pictures with a caption .* apt-get install tuxpaint-stamps-default"):
        pictures.captioned(None)


def test_a_composed_model_loses_its_system_message(tmp_path: Path) -> None:
    model = build(tmp_path / "model")
    parts.settle(model, select_layer=-2)
    config = load_config(model)
    assert (config.system_message, config.select_layer) == ("", -2)


def test_the_likeliest_of_the_captions_counts() -> None:
    assert demonstration.retrieval([[-1.0, -2.0], [-2.0, -1.0], [-1.0, -3.0]])["accuracy"] == pytest.approx(2 / 3)


def test_likelihoods_are_those_of_the_loss(tmp_path: Path) -> None:
    model = build(tmp_path / "model")
    image = tmp_path / "red.png"
    Image.new("RGB", (28, 28), "red").save(image)
    talks = [[{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": text}] for text in ("red", "blue circle")]
    row = {"id": "a", "image": str(image)}
    both = write_jsonl([row | {"conversations": talks}], tmp_path / "both.jsonl")
    (found,) = demonstration.log_likelihoods(model, both)
    whole = small.exact(model, both)
    assert len(found) == 2 and sum(found) < found[0] < 0
    for talk, likelihood in zip(talks, found, strict=True):
        alone = write_jsonl([row | {"conversations": [talk]}], tmp_path / "alone.jsonl")
        assert demonstration.log_likelihoods(model, alone) == [[pytest.approx(likelihood, abs=1e-3)]]
    assert -sum(found) / whole["loss"] == pytest.approx(
        round(-sum(found) / whole["loss"]), abs=1e-3
    )  # a whole number of tokens
