"""`ivl plan --serve`: weights and cache by arithmetic, and the fewest cards that a model fits on."""

from __future__ import annotations

import json

import pytest
import torch

from ivl.checkpoint.model_dir import empty_model
from ivl.cli.plan import plan as cli
from ivl.config import published_config
from ivl.errors import InputError
from ivl.parallel.cards import GIB
from ivl.quant.layers import QuantConfig, QuantPlan, quantize_layers
from ivl.serve.plan import WIDTHS, ServingPlan, plan_serving


def plans(size: str, card: str = "h100-80gb", *, batch: int = 16, parallel: int | None = None) -> dict[str, ServingPlan]:
    found = plan_serving(published_config(size), card, context=8192, batch=batch, parallel=parallel)
    return {plan.width: plan for plan in found}


@pytest.mark.parametrize("width", WIDTHS)
def test_weights_are_those_of_the_quantized_model(width: str) -> None:
    model = empty_model(published_config("8B")).to(torch.bfloat16)
    int8, int4 = QuantConfig(bits=8), QuantConfig(bits=4, group=128)
    scheme = QuantPlan(language={"bf16": None, "int8": int8, "int4": int4}[width], head=None if width == "bf16" else int8)
    quantize_layers(model, lambda path, _: scheme.for_layer(path))
    stored = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    assert plans("8B", parallel=1)[width].weights == pytest.approx(stored, rel=1e-6)


def test_the_fewest_cards_that_fit_are_found() -> None:
    large = plans("78B")
    assert [large[width].tensor_parallel for width in WIDTHS] == [4, 2, 2]
    assert all(plan.fits for plan in large.values())
    assert plans("8B", "rtx4090-24gb", batch=4)["bf16"].tensor_parallel == 1
    assert not plans("38B", "rtx4090-24gb", batch=4, parallel=2)["bf16"].fits


def test_cache_and_rates_follow_batch_and_cards() -> None:
    few, many = (plans("8B", batch=batch)["bf16"] for batch in (1, 32))
    assert many.cache == 32 * few.cache == 32 * 8192 * 2 * 2 * 32 * 8 * 128
    assert few.tokens_per_second == few.tokens_per_second_alone < many.tokens_per_second < 32 * few.tokens_per_second
    one, two = (plans("8B", parallel=n)["bf16"] for n in (1, 2))
    assert two.cache == one.cache / 2 and two.weights > one.weights / 2 and two.prompt_seconds == one.prompt_seconds / 2


def test_command_prints_a_table_or_json_and_refuses(capsys: pytest.CaptureFixture[str]) -> None:
    cli(["--serve", "8B", "--card", "l40s-48gb"])
    page = capsys.readouterr().out
    assert "8B on l40s-48gb" in page and max(map(len, page.splitlines())) <= 100
    cli(["--serve", "OpenGVLab/InternVL2_5-8B", "--json"])
    rows = json.loads(capsys.readouterr().out)
    assert [row["width"] for row in rows] == list(WIDTHS) and rows[0]["weights"] > 15 * GIB
    with pytest.raises(InputError, match="does not fit on rtx4090-24gb, not even in int4"):
        cli(["--serve", "78B", "--card", "rtx4090-24gb", "--tensor-parallel", "1"])
    with pytest.raises(InputError, match="did you mean 'h200-141gb'"):
        cli(["--serve", "8B", "--card", "h200"])
