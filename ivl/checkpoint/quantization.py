"""Quantized weights in a model directory: the compressed-tensors layout, which vLLM and transformers read.

The tensors of a layer say how it is stored: `weight_packed` (words of 4 or 8 bit integers) with `weight_scale` and perhaps
`weight_zero_point`, or `weight` in int8 with `weight_scale`. `quantization_config` says the same and whether activations
are rounded, too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ivl.checkpoint.keymaps import TensorEntry
from ivl.checkpoint.sections import Section, Values
from ivl.checkpoint.weights import StoredWeights
from ivl.errors import InputError
from ivl.quant.layers import QuantConfig, QuantLinear, QuantPlan, quantize_layers, quantized_layers

METHOD = "compressed-tensors"
PACKED, INTS, MIXED = "pack-quantized", "int-quantized", "mixed-precision"
_HEAD = ["re:.*lm_head$", "re:.*language_model.output$"]
_PARTS = {
    "head": (_HEAD, _HEAD),
    "vision": (["re:.*(vision_model|vision_tower).*"], ["re:.*vision_model.*", "re:.*vision_tower.*"]),
    "language": (["Linear"], ["re:.*language_model.*layers.*"]),
}
"""Patterns of a part that is quantized, and of one that is not. The first that fits counts; the general one is last."""
_PROJECTOR = ["re:.*mlp1.*", "re:.*multi_modal_projector.*"]
_COMMON = {"num_bits": 8, "type": "int", "symmetric": True, "actorder": None, "block_structure": None}
_INTEGERS = {"words": torch.int32, "zeros": torch.int32, "signed": torch.int8}
_FORMATS = Values(str, choices=(PACKED, INTS))
_TOKEN_INPUTS = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
"""How activations are rounded, if they are."""


def quantization_json(schemes: QuantPlan) -> dict[str, Any]:
    """Return `quantization_config` of config.json."""
    groups, ignored = {}, list(_PROJECTOR)
    for part, (targets, patterns) in _PARTS.items():
        scheme = getattr(schemes, part)
        if scheme:
            groups[f"group_{len(groups)}"] = _group_json(scheme, targets)
        else:
            ignored += patterns
    formats = {group["format"] for group in groups.values()}
    return {
        "quant_method": METHOD,
        "format": formats.pop() if len(formats) == 1 else MIXED,
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": ignored,
        "kv_cache_scheme": None,
    }


def _group_json(scheme: QuantConfig, targets: list[str]) -> dict[str, Any]:
    weights = {
        **_COMMON,
        "num_bits": scheme.bits,
        "symmetric": scheme.symmetric,
        "strategy": "channel" if scheme.group is None else "group",
        "group_size": scheme.group,
        "dynamic": False,
        "observer": "minmax",
    }
    return {
        "format": INTS if scheme.activations else PACKED,
        "targets": targets,
        "weights": weights,
        "input_activations": {**_COMMON, **_TOKEN_INPUTS, "group_size": None, "observer": None} if scheme.activations else None,
        "output_activations": None,
    }


def rounds_activations(config: Section) -> bool:
    """Return whether layers stored in plain int8 round their input per token, by a `quantization_config`.

    Raises:
        InputError: if it asks for a computation that is not supported.
    """
    if (method := config.values.get("quant_method")) != METHOD:
        raise config.refusal("quant_method", method, f"{METHOD!r}; convert the original model with --quantize")
    if (scheme := config.values.get("kv_cache_scheme")) is not None:
        raise config.refusal("kv_cache_scheme", scheme, "null")
    rounding: dict[bool, str] = {}
    groups = config.section("config_groups")
    for name in groups.values:
        group = groups.section(name)
        kind = Section({"format": config.values.get("format")} | dict(group.values), group.place).read("format", _FORMATS)
        weights = group.section("weights")
        weights.read("type", Values(str, choices=("int",)))
        if (bits := weights.values.get("num_bits")) not in (4, 8):
            raise weights.refusal("num_bits", bits, "4 or 8 bits")
        if (outputs := group.values.get("output_activations")) is not None:
            raise group.refusal("output_activations", outputs, "null")
        inputs = group.values.get("input_activations")
        fits = isinstance(inputs, dict) and kind == INTS and _TOKEN_INPUTS.items() <= inputs.items()
        if inputs is not None and not fits:
            raise group.refusal("input_activations", inputs, f"null, or {_TOKEN_INPUTS} in format {INTS}")
        if kind == INTS:
            rounding[fits] = name
    if not groups.values or len(rounding) > 1:
        expected = "groups that agree in input_activations" if rounding else "at least one group"
        raise config.refusal("config_groups", list(groups.values), expected)
    return True in rounding


def adopt(model: nn.Module, entries: Sequence[TensorEntry], weights: StoredWeights, activations: bool) -> list[TensorEntry]:
    """Give an empty model the quantized layers that a checkpoint has, and return its entries for them.

    activations: whether layers stored in plain int8 round their input.

    Raises:
        InputError: if a layer's tensors do not make up a known scheme.
    """
    stored = {entry.ours: entry.theirs for entry in entries}

    def scheme_of(path: str, layer: nn.Linear) -> QuantConfig | None:
        schemes = {_stored_scheme(name, layer.in_features, weights, activations) for name in stored[f"{path}.weight"]}
        if len(schemes) > 1:
            names = ", ".join(stored[f"{path}.weight"])
            raise InputError(f"{weights.directory}: {names} are computed together but are quantized in different ways")
        return schemes.pop()

    quantize_layers(model, scheme_of)
    entries = quantized_entries(model, entries)
    for entry in entries:
        for name in entry.theirs:
            dtype, expected = weights.dtypes.get(name), _INTEGERS.get(entry.form)
            if dtype and (dtype is not expected if expected else not dtype.is_floating_point):
                kind = expected or "floating-point numbers"
                raise InputError(f"{weights.directory}: tensor {name!r} is {dtype}, expected {kind}; fetch the model again")
    return entries


def _stored_scheme(name: str, width: int, weights: StoredWeights, activations: bool) -> QuantConfig | None:
    """The scheme of a checkpoint's layer, from the names and shapes of its tensors."""
    packed, scale, zero = f"{name}_packed", f"{name}_scale", f"{name}_zero_point"
    in_words = packed in weights.shapes
    if not in_words and weights.dtypes.get(name) is not torch.int8:
        return None
    if len(weights.shapes.get(scale, ())) != 2:
        raise InputError(f"{weights.directory}: {scale} is {weights.shapes.get(scale)}, expected a matrix of scales")
    groups = weights.shapes[scale][1]
    shape = weights.shapes[packed if in_words else name]
    bits = shape[-1] * 32 / width if in_words else 8
    if bits not in (4, 8) or groups < 1 or width % groups:
        raise InputError(
            f"{weights.directory}: {name}: {list(shape)} integers and {groups} scales a row for {width} inputs; expected "
            "words of 4 or 8 bits and a whole number of inputs for each scale"
        )
    group = None if groups == 1 and (bits == 8 or activations) else width // groups
    try:
        return QuantConfig(bits=4 if bits == 4 else 8, group=group, symmetric=zero not in weights.shapes,
                      activations=activations and not in_words)  # fmt: skip
    except ValueError as error:
        raise InputError(f"{weights.directory}: {name}: {error}") from None


def quantized_entries(model: nn.Module, entries: Sequence[TensorEntry]) -> list[TensorEntry]:
    """Entries of an ordinary model, with those of its quantized layers' weights in place of the matrices'."""
    layers = quantized_layers(model)
    with_parts: list[TensorEntry] = []
    for entry in entries:
        path, _, leaf = entry.ours.rpartition(".")
        layer = layers.get(path)
        if layer is None or leaf != "weight":
            with_parts.append(entry)
            continue
        rows, groups = entry.rows, entry.groups
        in_words = not layer.config.activations
        names = tuple(f"{name}_packed" for name in entry.theirs) if in_words else entry.theirs
        with_parts.append(TensorEntry(entry.ours, names, rows, groups, "words" if in_words else "signed"))
        with_parts.append(TensorEntry(f"{path}.scale", tuple(f"{name}_scale" for name in entry.theirs), rows, groups))
        if layer.zero is not None:
            names = tuple(f"{name}_zero_point" for name in entry.theirs)
            with_parts.append(TensorEntry(f"{path}.zero", names, rows or (layer.out_features,), groups, "zeros"))
    return with_parts


def weight_shapes(model: nn.Module, entries: Sequence[TensorEntry]) -> dict[str, torch.Tensor]:
    """Return `weight_shape` of every packed tensor: rows and columns of the matrix before it was packed."""
    layers = quantized_layers(model)
    shapes: dict[str, torch.Tensor] = {}
    for entry in entries:
        if entry.form == "words":
            layer = layers[entry.ours.rpartition(".")[0]]
            for name, (rows, _) in zip(entry.theirs, entry.shapes(layer.weight.shape), strict=True):
                shapes[f"{name.removesuffix('_packed')}_shape"] = torch.tensor([rows, layer.in_features])
    return shapes


def schemes_of(model: nn.Module) -> QuantPlan:
    """Return the schemes of a model's parts.

    Raises:
        InputError: if layers of a part differ, which no file expresses.
    """
    used: dict[str, set[QuantConfig | None]] = {"head": set(), "language": set(), "vision": set()}
    for path, layer in model.named_modules():
        part = "head" if path == "decoder.head" else {"decoder": "language", "vision": "vision"}.get(path.partition(".")[0])
        if part and isinstance(layer, nn.Linear | QuantLinear):
            used[part].add(layer.config if isinstance(layer, QuantLinear) else None)
    for part, schemes in used.items():
        if len(schemes) > 1:
            names = ", ".join(sorted("unquantized" if scheme is None else scheme.name for scheme in schemes))
            raise InputError(f"layers of the {part} part are quantized in different ways ({names}); this cannot be written")
    return QuantPlan(**{part: schemes.pop() for part, schemes in used.items()})
