import pytest
import torch
from safetensors.torch import save_file

from ivl.checkpoint.tensor_file import TensorFile
from ivl.config import LoraConfig
from ivl.errors import InputError
from ivl.model.vlm import VLM
from ivl.runs.build import check_start
from ivl.runs.plan import count_by_part
from ivl.train.config import OptimConfig, Stage
from ivl.train.optim import Muon, Optimizer, decays, is_hidden_matrix, lr_factor
from ivl.train.stage import trainable
from ivl.train.world import World
from tests.conftest import tiny_config
from tests.helpers.training import staged


def test_freezing_is_the_complement():
    for parts in ((), ("projector",), ("vision", "projector"), ("vision", "projector", "decoder")):
        model = staged(Stage(trainable=parts), lora=None if parts else LoraConfig(rank=2))
        for name, parameter in model.named_parameters():
            assert parameter.requires_grad == (name.split(".")[0] in parts or ".lora_" in name)
        for part in ("vision", "projector"):
            assert model.get_submodule(part).training == (part in parts)
        assert sum(t + f for t, f in count_by_part(model).values()) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("first", [1, -1])
def test_vision_from_a_layer_on(first):
    model = staged(stage=Stage(trainable=("vision",), vision_from_layer=first, drop_path=0.4))
    assert {n.split(".")[2] for n in trainable(model)} == {"1"}
    assert [layer.training for layer in model.vision.layers] == [False, True]
    assert [layer.drop_path for layer in model.vision.layers] == [0, 0.4]
    with pytest.raises(InputError, match="vision_from_layer 2 does not name one of the ViT's 2 layers"):
        staged(stage=Stage(trainable=("vision",), vision_from_layer=2))


def test_groups():
    parameters = dict(VLM(tiny_config()).named_parameters())
    kept = {n for n, p in parameters.items() if not decays(n, p)}
    assert "vision.embeddings.positions" in kept and "decoder.norm.weight" in kept and "vision.layers.0.scale1" in kept
    assert not any(n.endswith((".qkv.weight", ".fc1.weight", "head.weight", "decoder.embeddings.weight")) for n in kept)
    hidden = {n for n, p in parameters.items() if is_hidden_matrix(n, p)}
    assert {"vision.layers.0.fc1.weight", "projector.fc2.weight", "decoder.layers.1.qkv.weight"} <= hidden
    assert not {"decoder.head.weight", "decoder.embeddings.weight", "vision.embeddings.patch.weight"} & hidden


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_state_goes_in_and_out_exactly(name, tmp_path):
    config = OptimConfig(name=name, lr=1e-2, lr_vision=1e-3, weight_decay=0.1)

    def steps(model: VLM, optimizer: Optimizer, count: int, seed: int) -> None:
        torch.manual_seed(seed)
        for _ in range(count):
            for p in model.parameters():
                p.grad = torch.randn_like(p)
            optimizer.step(0.5)

    torch.manual_seed(0)
    model, other = staged(), staged()
    optimizer = Optimizer(trainable(model), config)
    steps(model, optimizer, 3, 1)
    other.load_state_dict(model.state_dict())
    resumed = Optimizer(trainable(other), config)
    save_file(optimizer.state(), tmp_path / "state")
    resumed.restore(TensorFile(tmp_path / "state"))
    steps(model, optimizer, 2, 2)
    steps(other, resumed, 2, 2)
    assert all(p.equal(q) for p, q in zip(model.parameters(), other.parameters(), strict=True))
    with pytest.raises(ValueError, match="differ in"):
        save_file(dict(list(optimizer.state().items())[3:]), tmp_path / "state")
        resumed.restore(TensorFile(tmp_path / "state"))


@pytest.mark.parametrize("shape", [(24, 40), (40, 24)])
@pytest.mark.parametrize("scale", ["adamw", "original"])
def test_muon_is_torchs(shape, scale):
    torch.manual_seed(0)
    start, grads = torch.randn(shape), torch.randn(4, *shape)
    config = OptimConfig(name="muon", muon_scale=scale)
    ours, theirs, exact = (torch.nn.Parameter(start.clone()) for _ in range(3))
    group = {"lr": 0.1, "weight_decay": 0.01}
    optimizers = [
        Muon([{"params": [ours], **group}], config, torch.bfloat16),
        torch.optim.Muon([theirs], adjust_lr_fn={"adamw": "match_rms_adamw"}.get(scale, scale), **group),
        Muon([{"params": [exact], **group}], config, torch.float32),
    ]
    for grad in grads:
        for optimizer, p in zip(optimizers, (ours, theirs, exact), strict=True):
            p.grad = grad.clone()
            optimizer.step()
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
    assert (exact - theirs).norm() < 0.02 * (theirs - start).norm()


def test_adapters_are_no_hidden_matrices():
    model = staged(Stage(trainable=()), lora=LoraConfig(rank=2, targets=("decoder.layers", "vision.layers", "projector")))
    assert trainable(model) and not [name for name, p in trainable(model).items() if is_hidden_matrix(name, p)]


def test_rates_of_parts():
    model = staged()
    optimizer = Optimizer(trainable(model), OptimConfig(lr=1e-2, lr_vision=1e-3, weight_decay=0.1))
    rates = {id(p): g["peak"] for part in optimizer.parts for g in part.param_groups for p in g["params"]}
    assert all(rates[id(p)] == (1e-3 if n.startswith("vision.") else 1e-2) for n, p in model.named_parameters())


def test_schedule():
    cosine = OptimConfig(warmup_steps=10, min_lr_ratio=0.1)
    factors = [lr_factor(cosine, (s + 0.5) / 100, 100) for s in range(100)]
    assert factors[0] == pytest.approx(0.05) and max(factors) > 0.99 and factors[-1] == pytest.approx(0.1, abs=1e-3)
    assert factors[:10] == sorted(factors[:10]) and factors[10:] == sorted(factors[10:], reverse=True)
    linear = OptimConfig(schedule="linear", warmup_ratio=0.5)
    assert lr_factor(linear, 0.25, None) == 0.5 and lr_factor(linear, 0.75, None) == 0.5
    assert lr_factor(OptimConfig(schedule="constant"), 0.9, 10) == 1
    assert lr_factor(cosine, 3.0, 100) == pytest.approx(0.1)


@pytest.mark.parametrize("part", ["vision", "projector", "decoder"])
def test_zero_and_unset_weights_are_refused(part):
    model = staged()
    check_start(model, World())
    with torch.no_grad():
        for parameter in model.get_submodule(part).parameters():
            parameter.zero_()
    with pytest.raises(InputError, match=f"every trainable matrix of the {part} is zero"):
        check_start(model, World())
    with torch.no_grad():
        next(model.get_submodule(part).parameters()).fill_(float("inf"))
    with pytest.raises(InputError, match=f"not finite at the start, first '{part}"):
        check_start(model, World())
