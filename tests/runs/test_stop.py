"""Signals and errors save a checkpoint first, in one process and in several, and the run goes on exactly."""

import json
import os
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest

from ivl.errors import InputError
from ivl.runs import run as runs
from ivl.runs.run import run
from ivl.train.loop import Evaluator
from tests.helpers.pairs import make_pairs
from tests.helpers.ranks import on_ranks
from tests.helpers.training import changed
from tests.runs.helpers import redirect_errors, rows, same_weights, start, steps


@pytest.fixture
def whole(config, tmp_path) -> Path:
    return run(changed(config, out_dir=str(tmp_path / "whole"), save_every=0))


def stop_by(number: int, step: int, *, rank: int = 0):
    """An evaluator that sends this process a signal after a step."""

    def send(model):
        if os.environ.get("RANK", "0") == str(rank):
            os.kill(os.getpid(), number)
        return {}

    calls = []

    def once(model):
        calls.append(0)
        return send(model) if len(calls) == step else {}

    return lambda processor: (Evaluator("signal", 1, once),)


def stopped_run(config, number: int, step: int) -> None:
    run(config, evaluators=stop_by(number, step))


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_first_and_the_run_goes_on_exactly(config, whole, tmp_path, capfd, number, code):
    config = changed(config, save_every=0)
    log = tmp_path / "log"
    process = start(stopped_run, config, number, 5, log=log)
    process.join(60)
    text = log.read_text()
    assert process.exitcode == code and "Traceback" not in text
    assert f"stopped at step 6; go on with: ivl train --resume {config.run_dir}" in text
    assert not Path(config.run_dir, "model").exists()
    final = run(config, resume=True)
    assert "goes on from step 6" in capfd.readouterr().err
    assert same_weights(final, whole) and [s for s, *_ in steps(config)] == list(range(1, 13))


def test_a_signal_does_not_keep_the_final_model_from_being_written(config, monkeypatch):
    write = runs.write_final_model
    monkeypatch.setattr(runs, "write_final_model", lambda *args: (os.kill(os.getpid(), signal.SIGTERM), write(*args)))
    assert (run(changed(config, num_steps=1, save_every=0)) / "config.json").is_file()


def test_a_second_signal_ends_at_once(config, tmp_path):
    process = start(waits, config, log=tmp_path / "log")
    while "stops after this step" not in ((tmp_path / "log").read_text() if (tmp_path / "log").exists() else ""):
        assert process.is_alive()
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGTERM)
    process.join(20)
    assert process.exitcode == -signal.SIGTERM


def waits(config) -> None:
    def send_and_sleep(model):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)
        return {}

    run(config, evaluators=lambda _: (Evaluator("wait", 2, send_and_sleep),))


def test_a_bad_row_saves_first_and_is_left_out_on_demand(config, capfd):
    mixture = Path(config.data.mixture)
    good = mixture.read_text().splitlines()
    mixture.write_text("\n".join([*good, "{not json"]) + "\n")
    config = changed(
        config, num_steps=None, save_every=0, data=replace(config.data, epochs=1, shuffle=False, max_samples=2, max_buffer=1)
    )
    with pytest.raises(InputError, match=f"{mixture.name}:25: not valid JSON"):
        run(config)
    step = len(steps(config))
    words = capfd.readouterr().err
    assert step and f"stopped at step {step}; go on with: ivl train --resume {config.run_dir} --data.on-error skip" in words
    run(changed(config, data=replace(config.data, on_error="skip")), resume=True)
    assert f"goes on from step {step}" in capfd.readouterr().err
    assert sum(r["samples"] for r in rows(config)) == len(good)
    report = json.loads(Path(config.run_dir, "data_report.json").read_text())
    assert report["rows"] == {"broken_json": 1} and report["draws"] == len(good) + 1


def test_rows_of_another_kind_are_not_to_be_left_out(config, tmp_path, capfd):
    pairs = make_pairs(tmp_path / "pairs", 3)
    with pytest.raises(InputError, match="a preference pair, whose rejected reply would be trained on"):
        run(changed(config, data=replace(config.data, mixture=str(pairs))))
    words = capfd.readouterr().err
    assert "stopped before the first checkpoint" in words and "--data.on-error" not in words


def test_an_edited_row_goes_on_when_it_is_accepted(config):
    with pytest.raises(RuntimeError):
        run(config, evaluators=fail_at(3))
    mixture = Path(config.data.mixture)
    mixture.write_text(mixture.read_text().replace("what is this", "what is that"))
    with pytest.raises(InputError, match="the data have changed"):
        run(config, resume=True)
    run(config, resume=True, allow_changed=True)
    assert [s for s, *_ in steps(config)] == list(range(1, 13))


def fail_at(step: int, rank: int = 0):
    def fail(model):
        if os.environ.get("RANK", "0") == str(rank):
            raise RuntimeError("an evaluator of one's own")
        return {}

    return lambda processor: (Evaluator("fails", step, fail),)


def test_a_killed_worker_saves_first(config, whole, tmp_path):
    config = changed(config, save_every=0, data=replace(config.data, num_workers=1, prefetch=1))
    log = tmp_path / "log"
    process = start(with_killed_worker, config, log=log)
    process.join(60)
    text = log.read_text()
    assert process.exitcode == 1 and "Traceback" not in text
    assert "killed, perhaps out of memory" in text.splitlines()[-1] and "stopped at step" in text
    assert same_weights(run(config, resume=True), whole)


def with_killed_worker(config) -> None:
    def kill(model):
        for child in Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split():
            os.kill(int(child), signal.SIGKILL)
        return {}

    run(config, evaluators=lambda _: (Evaluator("kill", 4, kill),))


def on_rank(rank: int, config, number: int, code: int) -> None:
    Path(f"{config.run_dir}-log-{rank}").unlink(missing_ok=True)
    redirect_errors(Path(f"{config.run_dir}-log-{rank}"))
    try:
        run(config, resume=True, evaluators=stop_by(number, 3, rank=1) if number else None)
    except KeyboardInterrupt:
        os._exit(130)
    except InputError as error:
        os.write(2, str(error).encode())
        os._exit(1)
    except RuntimeError:
        os._exit(7)


@pytest.mark.parametrize("shard", [False, True])
def test_ranks_save_together_when_one_is_told_to_stop(config, tmp_path, shard):
    config = changed(config, device="cpu", shard=shard, save_every=0, keep_last=1)
    on_ranks(2, on_rank, changed(config, out_dir=str(tmp_path / "whole")), 0, 0)
    on_ranks(2, on_rank, config, signal.SIGTERM, 0, exitcode=143)
    assert Path(config.run_dir, "checkpoint-4", "trainer", "rank-1.json").is_file()
    on_ranks(2, on_rank, config, 0, 0)
    assert "goes on from step 4" in Path(f"{config.run_dir}-log-0").read_text()
    assert same_weights(f"{config.run_dir}/model", tmp_path / "whole" / "model")


@pytest.mark.parametrize("shard", [False, True])
def test_ranks_save_together_when_one_meets_a_bad_row(config, tmp_path, shard):
    mixture = Path(config.data.mixture)
    lines = mixture.read_text().splitlines()
    mixture.write_text("\n".join([*lines[:15], "{not json", *lines[15:]]) + "\n")
    data = replace(config.data, epochs=1, shuffle=False, max_samples=2, max_buffer=1)
    config = changed(config, device="cpu", num_steps=None, save_every=0, data=data, shard=shard)
    on_ranks(2, on_rank, config, 0, 0, exitcode=1)
    words = [Path(f"{config.run_dir}-log-{rank}").read_text() for rank in range(2)]
    assert all("rows.jsonl:16: not valid JSON" in text for text in words) and "stopped at step" in words[0]
    on_ranks(2, on_rank, changed(config, data=replace(data, on_error="skip")), 0, 0)
    assert "goes on from step" in Path(f"{config.run_dir}-log-0").read_text()
    assert sum(r["samples"] for r in rows(config)) == len(lines), "no pack is lost where one rank has none left"


def test_ranks_end_when_one_is_refused_or_fails(config, tmp_path):
    config = changed(config, device="cpu")
    on_ranks(2, fails_on_one, config, exitcode=7)
    assert Path(config.run_dir, "checkpoint-3").is_dir()
    shutil.rmtree(config.run_dir)
    Path(config.run_dir).write_text("a file")
    on_ranks(2, on_rank, config, 0, 0, exitcode=1)
    assert "cannot be the directory of a run" in Path(f"{config.run_dir}-log-1").read_text()


def fails_on_one(rank: int, config) -> None:
    try:
        run(config, evaluators=fail_at(3, rank=1))
    except (RuntimeError, InputError):
        os._exit(7)
