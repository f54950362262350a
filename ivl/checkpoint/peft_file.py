"""The files of an adapter that PEFT wrote around any class of these models: ranks and scales, and tensors by our layers.

People wrap the original class, transformers' class before and after 4.52, or the language model or ViT alone; each names the
same weights differently, and the original names fuse what transformers' keep apart.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ivl.checkpoint.config_table import MODEL_TYPE
from ivl.checkpoint.files import listing
from ivl.checkpoint.keymaps import IGNORED, TensorEntry, key_map, known_name
from ivl.checkpoint.model_dir import empty_model
from ivl.checkpoint.sections import FLAG, TEXT, Section, Values
from ivl.checkpoint.weights import ADAPTER, StoredWeights, check_finite
from ivl.config import LoraConfig
from ivl.errors import InputError, short
from ivl.lora.layers import LoraLinear
from ivl.model.linear import Linear
from ivl.model.vlm import VLM

CONFIG_FILE = "adapter_config.json"
_VIT = "vit.safetensors"
"""ViT and projector that ms-swift trained whole beside adapters of the language model."""
PEFT_PREFIX = "base_model.model."
_PLAIN: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",), "bias": ("none", "all", "lora_only"), "use_dora": (False,), "fan_in_fan_out": (False,),
    # Those whose names say how a layer begins change the base as well, but for these.
    "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal"), "lora_bias": (False,), "use_qalora": (False,),
    "ensure_weight_tying": (False,),
    **dict.fromkeys(
        ("layer_replication", "target_parameters", "trainable_token_indices", "alora_invocation_tokens", "use_bdlora",
         "arrow_config", "kasa_config", "monteclora_config"), (None, [])
    ),
}  # fmt: skip
"""Keys of adapter_config.json with the only values that the layers compute; null is always one."""
_RANK, _ALPHA = Values(int, 1, 1 << 12), Values(float, 1e-6, 1e6)
_MAX_EXPRESSIONS = 16


class AdapterRanks:
    """Rank, scale and dropout by adapter_config.json: `common`, and those of modules that its patterns name."""

    def __init__(self, described: Section) -> None:
        """Check the configuration.

        Raises:
            InputError: if it describes more than LoRA, or a value is out of bounds.
        """
        for key, values in _PLAIN.items():
            value = described.values.get(key, values[0])
            if value is not None and not any(value is known or value == known for known in values):
                known = " or ".join(map(repr, values))
                raise described.refusal(key, value, f"{known}; only plain LoRA is supported, so let PEFT merge this one")
        for key, value in described.values.items():
            if key.startswith("use_") and key not in (*_PLAIN, "use_rslora") and value not in (False, None):
                raise described.refusal(key, value, "false: it is not known here, so let PEFT merge this one")
        described.items("modules_to_save", TEXT, [])
        self._stabilized = described.read("use_rslora", FLAG, False)
        self._dropout = described.read("lora_dropout", Values(float, 0, 0.9999), 0.0)
        self._rank, self._alpha = described.read("r", _RANK), described.read("lora_alpha", _ALPHA)
        self._ranks = _patterns(described.section("rank_pattern", {}), _RANK)
        self._alphas = _patterns(described.section("alpha_pattern", {}), _ALPHA)
        self.common = self._config(self._rank, self._alpha)

    def of(self, stored: str) -> LoraConfig:
        """Return the configuration of a module by the stored name of one of its tensors."""
        path = stored.partition(".lora_")[0].rpartition(PEFT_PREFIX)[2]
        rank = next((rank for names, rank in self._ranks if names(path)), self._rank)
        return self._config(rank, next((alpha for names, alpha in self._alphas if names(path)), self._alpha))

    def _config(self, rank: int, alpha: float) -> LoraConfig:
        scaled = alpha * rank**0.5 if self._stabilized else alpha  # arXiv:2312.03732 divides by the root of the rank
        return LoraConfig(rank=rank, alpha=scaled, dropout=self._dropout)


def _patterns(section: Section, kind: Values) -> list[tuple[Callable[[str], bool], Any]]:
    """The values of a pattern, each with a test of the paths of modules that it is for; the first that fits counts."""
    if sum(not re.fullmatch(r"[\w.]+", key) for key in section.values) > _MAX_EXPRESSIONS:
        raise InputError(f"{section.place}: has more than {_MAX_EXPRESSIONS} regular expressions")
    return [(_path_test(key, section), section.read(key, kind)) for key in section.values]


def _path_test(key: str, section: Section) -> Callable[[str], bool]:
    """Whether a path ends in what a key names: a path, or a regular expression that ends soon on any path."""
    if re.fullmatch(r"[\w.]+", key):
        return lambda path: f".{path}".endswith(f".{key}")
    if len(key) > 256 or len(re.findall(r"(?<!\()[*+?{]", key)) > 4 or re.search(r"\)[*+{]", key):
        raise InputError(f"{section.place}: {short(key)} repeats too much for a regular expression of a stranger; write paths")
    try:
        expression = re.compile(rf"(.*\.)?({key})$")
    except (re.error, OverflowError, RecursionError) as error:
        raise InputError(f"{section.place}: {short(key)} is no regular expression ({error})") from None
    return lambda path: expression.match(path) is not None


@dataclass(frozen=True)
class LowRank:
    """The low-rank matrices of one module of the file's class."""

    entry: TensorEntry
    """Of the module's weight."""
    index: int
    """Of the module's weight among the entry's tensors."""
    A: str
    B: str
    config: LoraConfig

    @property
    def path(self) -> str:
        """Of our layer."""
        return self.entry.ours.rpartition(".")[0]

    def projections(self, model: VLM) -> list[str]:
        """Return our projections that get an adapter: one, all of a layer that the file's class fuses, too, or none."""
        layer = model.get_submodule(self.path)
        if not isinstance(layer, Linear):
            return []
        return [f"{self.path}.{name}" if layer.parts else self.path for name in self._names(layer)]

    def _names(self, layer: Linear) -> list[str]:
        names = [name for name, _ in layer.parts] or ["weight"]
        return names[self.index : self.index + 1] if self.entry.rows else names

    def shapes(self, model: VLM) -> dict[str, tuple[int, ...]]:
        """Return the shapes that the two matrices must have."""
        rows, *width = self.entry.shapes(model.get_parameter(self.entry.ours).shape)[self.index]
        if isinstance(model.get_submodule(self.path), nn.Embedding):  # the matrices of a table are those of its transpose
            rows, width = width[0], [rows]
        return {self.A: (self.config.rank, *width), self.B: (rows, self.config.rank, *[1] * (len(width) - 1))}

    @torch.no_grad()
    def put(self, model: VLM, weights: StoredWeights) -> None:
        """Copy the matrices into the adapters of our layer; where that can have none, add their product to its weight."""
        layer = model.get_submodule(self.path)
        A, B = weights.get(self.A), weights.get(self.B)
        if isinstance(layer, LoraLinear):
            if not self.entry.rows:  # the rows of B are those of the weight, and each part of it has the whole A
                B = self.entry.join([B])
            counts = [rows for _, rows in layer.parts] if not self.entry.rows and layer.parts else [len(B)]
            for name, rows in zip(self._names(layer), B.split(counts), strict=True):
                layer.lora_A[name].copy_(A)
                layer.lora_B[name].copy_(rows)
            return
        weight = model.get_parameter(self.entry.ours)
        product = B.float().flatten(1) @ A.float().flatten(1) * self.config.scale
        product = product.T if isinstance(layer, nn.Embedding) else product.reshape(weight.shape)
        replace_parameter(model, self.entry.ours, weight.float() + product.to(weight.device))


def replace_parameter(model: VLM, name: str, value: torch.Tensor) -> None:
    """Put a new parameter in the place of one, which another model may share."""
    before, (path, _, leaf) = model.get_parameter(name), name.rpartition(".")
    setattr(model.get_submodule(path), leaf, nn.Parameter(value.to(before, copy=True), requires_grad=before.requires_grad))


class AdapterFile:
    """The tensors of an adapter by a model's layers: low-rank matrices, and tensors that replace those of the model.

    Args:
        directory: has adapter_model.safetensors.

    Raises:
        InputError: if the file cannot be read, has no low-rank matrices, or holds what does not fit the model or is not finite.
    """

    def __init__(self, directory: Path, model: VLM, ranks: AdapterRanks) -> None:
        empty = empty_model(model.config)
        self._places = {
            name: (entry, index)
            for dialect in MODEL_TYPE
            for entry in key_map(empty, dialect)
            for index, name in enumerate(entry.theirs)
        }
        modules = {name.rpartition(".")[0] for name in self._places}
        self._stored: dict[str, str] = {}

        def rename(stored: str) -> str:
            name = known_name(stored, modules, alone=True)
            if name in self._stored and "modules_to_save." in stored + self._stored[name]:
                return stored  # biases of modules to save are written once more if all biases train
            self._stored[name] = stored
            return name

        found = {path.name for path in directory.glob("*.safetensors")} | {ADAPTER}
        if others := sorted(found - {ADAPTER, _VIT}):
            raise InputError(f"{directory}: holds {listing(others, 3)} beside {ADAPTER}, which is not read; move it away")
        self.weights = StoredWeights(directory, rename, files=sorted(found))
        self.low_rank = list(self._low_rank(empty, ranks))
        if not self.low_rank:
            raise InputError(f"{directory / ADAPTER}: has no LoRA tensor; expected names such as {PEFT_PREFIX}*.lora_A.weight")
        self.whole = {name: self._places[name] for name in self.weights.shapes if name in self._places}
        shapes = {name: shape for matrices in self.low_rank for name, shape in matrices.shapes(model).items()}
        for name, (entry, index) in self.whole.items():
            shapes[name] = entry.shapes(model.get_parameter(entry.ours).shape)[index]
        for name, shape in shapes.items():
            if (stored := self.weights.shapes.get(name, "nothing")) != shape:
                raise InputError(f"{directory}: {self._stored.get(name, name)} should be {shape} but the file has {stored}")
        if extra := sorted(name for name in self.weights.shapes if name not in shapes and not IGNORED.fullmatch(name)):
            raise InputError(f"{directory}: {listing(extra)} belong to no adapter")
        check_finite(self.weights, shapes)

    def _low_rank(self, empty: VLM, ranks: AdapterRanks) -> Iterator[LowRank]:
        strangers: list[str] = []
        names: dict[str, str] = {}
        for name in self.weights.shapes:
            path, mark, _ = name.partition(".lora_")
            entry, _ = self._places.get(f"{path}.weight", (None, 0))
            if mark and entry and empty.get_parameter(entry.ours).ndim > 1:
                names.setdefault(path, name)
            elif name not in self._places and not IGNORED.fullmatch(name):
                strangers.append(self._stored[name])
        if strangers:
            first = short(strangers[0], 200)
            raise InputError(
                f"{self.weights.directory}: {len(strangers)} tensors name no linear layer of this model, first {first}"
            )
        for path, name in names.items():
            entry, index = self._places[f"{path}.weight"]
            table = isinstance(empty.get_submodule(entry.ours.rpartition(".")[0]), nn.Embedding)
            A, B = (f"{path}.lora_{f'embedding_{letter}' if table else f'{letter}.weight'}" for letter in "AB")
            yield LowRank(entry, index, A, B, ranks.of(self._stored[name]))

    @torch.no_grad()
    def replace_whole(self, model: VLM) -> None:
        """Put the tensors that are not low-rank in the place of the model's parameters, of which they may be parts."""
        for entry in dict.fromkeys(entry for entry, _ in self.whole.values()):
            ours = model.get_parameter(entry.ours)
            parts = zip(entry.theirs, entry.split(ours), strict=True)
            joined = [self.weights.get(name).to(ours) if name in self.whole else part for name, part in parts]
            replace_parameter(model, entry.ours, entry.join(joined))
