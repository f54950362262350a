"""The estimate of packs, and `ivl data pack`, which prints it, agree with what a loader then does."""

import json

import pytest

from ivl.checkpoint import save_model, save_processor
from ivl.cli import data as cli
from ivl.datasets.estimate import PackEstimate, estimate_packs
from ivl.errors import InputError
from ivl.model.vlm import VLM
from tests.data.test_loader import loader
from tests.helpers.mixtures import make_file, processor, same


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
    found = estimate_packs(ranks[0], 1000)
    packs = [len(list(each)) for each in ranks]
    assert isinstance(found, PackEstimate) and abs(found.packs - max(packs)) <= 3 * found.error * found.packs + 2
    assert found.num_steps(4) == -(-found.packs // 4)
    assert found.sampled == 140 and found.over_budget == sum(each.report.dropped for each in ranks) > 0
    assert [each.draws for each in found.datasets] == [120, 20] and sum(each.sampled for each in found.datasets) == 140
    command = ["pack", str(world / "meta.json"), "--model", str(world / "model"), "--max-tokens", "150", "--max-tiles", "30"]
    cli.main([*command, "--over-budget", "skip", "--ranks", "2", "--accumulation", "4", "--weighting", "root", "--dry-run"])
    said = capsys.readouterr().out
    for words in ("token fill ", "tile fill ", "samples a pack", "packs a step: 2 ranks x 4 each = 8", "left out"):
        assert words in said
    assert "x 1.65" in said and "x 2.05" in said  # 140 draws shared as the roots of 120 and 20 are


@pytest.mark.parametrize(
    ("option", "words"), [("--ranks", "--ranks must be >= 1, got 0"), ("--max-tokens", r"data\.max_tokens must be >= 1, got 0")]
)
def test_bad_requests_are_refused_with_the_value(world, option, words):
    with pytest.raises(InputError, match=words):
        cli.main(["pack", str(world / "meta.json"), "--model", str(world / "model"), option, "0"])


def test_estimate_is_near_the_truth(tmp_path):
    path = make_file(tmp_path, 200)
    one = loader(path, epochs=1)
    guess = estimate_packs(one, 200)
    packs = len(list(one))
    assert guess.draws == 200 and guess.sampled == 200 and guess.dropped == 0
    assert abs(guess.packs - packs) <= 0.1 * packs
    assert abs(guess.token_fill - one.fill[0]) < 0.1
    assert one.report.packs == packs


def test_estimate_leaves_the_position_alone(world):
    one = loader(world / "meta.json")
    estimate_packs(one, 10)
    assert all(map(same, list(one), list(loader(world / "meta.json"))))
