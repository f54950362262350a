"""`ivl data pack --dry-run` says what a loader then does."""

import json

import pytest

from ivl.checkpoint import save_model, save_processor
from ivl.cli.data_pack import pack
from ivl.datasets.estimate import PackEstimate
from ivl.errors import InputError
from ivl.model.vlm import VLM
from tests.data.test_loader import loader
from tests.helpers.mixtures import make_file, processor


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pack")
    model = VLM(processor().config)
    model.init_weights()
    save_model(model, folder / "model")
    save_processor(processor(), folder / "model")
    make_file(folder / "a", 60)
    make_file(folder / "b", 20, seed=1)
    entries = {
        "a": {"annotation": "a/rows.jsonl", "root": "a", "repeat_time": 2},
        "b": {"annotation": "b/rows.jsonl", "root": "b"},
    }
    (folder / "meta.json").write_text(json.dumps(entries))
    return folder


def test_the_estimate_is_near_what_training_then_does(world, capsys):
    changes = {"max_tokens": 150, "max_tiles": 30, "over_budget": "skip", "max_buffer": 20, "epochs": 1}
    ranks = [loader(world / "meta.json", rank=rank, world_size=2, max_skip_share=0.9, **changes) for rank in range(2)]
    found = ranks[0].estimate_packs(1000)
    packs = [len(list(each)) for each in ranks]
    assert isinstance(found, PackEstimate) and abs(found.packs - max(packs)) <= 3 * found.error * found.packs + 2
    assert found.num_steps(4) == -(-found.packs // 4)
    assert found.sampled == 140 and found.over_budget == sum(each.report.dropped for each in ranks) > 0
    assert [each.draws for each in found.datasets] == [120, 20] and sum(each.sampled for each in found.datasets) == 140
    pack(
        str(world / "meta.json"), model=str(world / "model"), dry_run=True, max_tokens=150, max_tiles=30, over_budget="skip",
        ranks=2, accumulation=4, weighting="root",
    )  # fmt: skip
    said = capsys.readouterr().out
    for words in ("token fill ", "tile fill ", "samples a pack", "on 2 rank(s), 4 pack(s) each: 8 packs a step", "left out"):
        assert words in said
    assert "x 1.65" in said and "x 2.05" in said  # 140 draws shared as the roots of 120 and 20 are


def test_bad_requests_are_refused_with_a_remedy(world):
    path, model = str(world / "meta.json"), str(world / "model")
    with pytest.raises(InputError, match="--dry-run shows what they will be"):
        pack(path, model=model)
    with pytest.raises(InputError, match="--ranks must be >= 1, got 0"):
        pack(path, model=model, dry_run=True, ranks=0)
    with pytest.raises(InputError, match=r"data\.max_tokens must be >= 1, got 0"):
        pack(path, model=model, dry_run=True, max_tokens=0)
