"""`ivl models`: exact counts in 100 columns, without torch. `ivl ... | head` ends without a traceback."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from ivl.checkpoint.model_dir import empty_model
from ivl.checkpoint.releases import MODELS, count_parameters
from ivl.cli.models import models
from ivl.config import ModelConfig
from tests.conftest import tiny_config

SIZES = ("1B", "2B", "4B", "8B", "26B", "38B", "78B")
TOTALS = (938193024, 2205754368, 3712637952, 8075365376, 25514186112, 38388164992, 78408318336)
LATER = {
    "InternVL3-1B": 938193024, "InternVL3-2B": 2088957440, "InternVL3-8B": 7944373760, "InternVL3-9B": 9141824512,
    "InternVL3-14B": 15117256704, "InternVL3-38B": 38388164992, "InternVL3-78B": 78408318336,
    "InternVL3_5-1B": 1060897792, "InternVL3_5-2B": 2348347392, "InternVL3_5-4B": 4732489216,
    "InternVL3_5-8B": 8528318464, "InternVL3_5-14B": 15119523840, "InternVL3_5-38B": 38390405504,
}  # fmt: skip
"""Sums over the shapes of the parts, by hand. The 9B without the rows that its image tokens add."""


def test_the_table_and_the_json_have_every_id_and_count(
    capsys: pytest.CaptureFixture[str],
) -> None:
    models([])
    table = capsys.readouterr().out
    models(["--json"])
    rows = json.loads(capsys.readouterr().out)
    assert [row["hub_id"] for row in rows[:14]] == [f"OpenGVLab/InternVL2_5-{s}{m}" for m in ("", "-MPO") for s in SIZES]
    assert [row["parameters"] for row in rows[:14]] == [*TOTALS, *TOTALS]
    versions = {
        "InternVL3-": ("", "-Instruct", "-Pretrained", "-hf"),
        "InternVL3_5-": ("", "-MPO", "-Instruct", "-Pretrained", "-HF"),
    }
    for series, ends in versions.items():
        expected = {f"OpenGVLab/{name}{end}": count for name, count in LATER.items() if name.startswith(series) for end in ends}
        assert {row["hub_id"]: row["parameters"] for row in rows if row["name"].startswith(series)} == expected
    assert max(map(len, table.splitlines())) <= 100
    for size, total in zip(SIZES, TOTALS, strict=True):
        assert next(line for line in table.splitlines() if line.startswith(f"InternVL2_5-{size} ")).endswith(f" {total:,}")
    assert "InternVL3_5-SIZE-MPO, -Instruct" in table and "InternLM3's 128,512 rows; how many its image tokens add" in table


@pytest.mark.parametrize("config", [*(model.config for model in MODELS.values()), tiny_config(family="qwen3", qk_norm=True)])
def test_counts_are_those_of_the_model_that_is_built(config: ModelConfig) -> None:
    model = empty_model(config)
    parts = {"vision": model.vision, "projector": model.projector, "language": model.decoder, "all": model}
    assert count_parameters(config) == {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()}


def test_the_list_needs_no_torch() -> None:
    code = "import sys; from ivl.cli.models import models; models([]); sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


def test_a_reader_that_has_seen_enough_is_no_error() -> None:
    command = [sys.executable, "-m", "ivl", "train", "--help"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout and process.stderr
        process.stdout.close()
        assert process.stderr.read() == "" and process.wait() == 1
