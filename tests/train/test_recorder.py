"""What a person sees, and what TensorBoard gets."""

import io
import sys

import pytest

from ivl.utils.metrics import ConsoleLogger, TensorBoardLogger, console_line

ROW = {
    "step": 10, "loss": 1.2345, "lr": 2e-5, "grad_norm": 0.7, "tokens_per_second": 12345.0, "samples_per_second": 6.7,
    "fill": 0.98, "memory_gb": 1.5,
}  # fmt: skip


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_plain_lines_where_there_is_no_terminal(capsys):
    screen = ConsoleLogger("run", 40, 0, every=10)
    for step in range(1, 41):
        screen.show(ROW | {"step": step}, step / 40)
    screen.close()
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 4
    wanted = (
        "run step 10/40",
        "loss 1.2345",
        "lr 2.00e-05",
        "grad 0.70",
        "12,345 tok/s",
        "6.7 samples/s",
        "fill 98%",
        "1.5 GB",
        "left",
    )
    assert all(figure in lines[0] for figure in wanted)
    assert "fill" not in console_line(ROW | {"samples": 8, "packs": 8}, 0), "a row a pack: nothing is packed"


def test_a_live_line_on_a_terminal(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    screen = ConsoleLogger("run", 40, 0)
    screen.show(ROW, 0.25)
    screen.say("validation: loss 1.0")
    screen.close()
    shown = terminal.getvalue()
    assert "loss 1.2345" in shown and "10/40" in shown and "validation: loss 1.0" in shown


def test_lines_stay_on_a_terminal_every_so_many_steps(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    screen = ConsoleLogger("run", 40, 0, every=10)
    kept: list[str] = []
    monkeypatch.setattr(screen.progress.console, "print", lambda text="", **_: kept.extend([text] * isinstance(text, str)))
    for step in range(1, 41):
        screen.show(ROW | {"step": step}, step / 40)
    screen.close()
    assert [line.split()[2] for line in kept] == ["10/40", "20/40", "30/40", "40/40"]


@pytest.mark.parametrize(("share", "steps"), [(0.01, 1000), (10 / 15, 15), (0.999, 11), (1.0, 10)])
def test_without_a_number_of_steps_the_line_says_how_many_it_will_be(capsys, share, steps):
    ConsoleLogger("run", None, 0).show(ROW, share)
    assert f"run step 10/~{steps} " in capsys.readouterr().err


def test_the_line_tells_epoch_data_sets_and_rewards():
    sets = {f"loss/{name}": 0.5 for name in "abcdef"}
    line = console_line(ROW | sets | {"epoch": 0.25, "accuracy": 0.5}, 3661)
    assert line.startswith("epoch 0.25  loss 1.2345 (a 0.500, b 0.500, c 0.500, d 0.500 and 2 more)  1:01:01 left")
    assert "accuracy 50.0%" in line
    rewards = {"rewards/margin": 0.125, "rewards/accuracy": 0.75, "loss/sigmoid": 0.6}
    assert "loss 1.2345  0:00:00 left  margin 0.125  pairs right 75%" in console_line(ROW | rewards, 0)


def test_other_ranks_are_silent(capsys):
    screen = ConsoleLogger("run", 40, 0, on=False)
    screen.show(ROW, 0.25)
    screen.say("hello")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("resumed_at,share,left", [(0, 0.25, 30), (20, 0.75, 10)])
def test_time_left_counts_from_where_this_process_began(monkeypatch, resumed_at, share, left):
    now = iter([0.0, 10.0])
    monkeypatch.setattr("time.monotonic", lambda: next(now))
    screen = ConsoleLogger("run", 40, resumed_at)
    assert screen._left(int(share * 40), share) == pytest.approx(left)


def test_tensorboard(tmp_path):
    pytest.importorskip("tensorboard")
    board = TensorBoardLogger(tmp_path)
    board.write({"step": 1, "loss": 2.0, "ids": ["a"]})
    board.close()
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path)).Reload()
    assert events.Tags()["scalars"] == ["train/loss"] and events.Scalars("train/loss")[0].value == 2.0
