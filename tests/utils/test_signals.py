"""Signals that ask a computation to end."""

from __future__ import annotations

import os
import signal

import pytest

from ivl.utils.signals import Interruption


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_is_noted_and_then_means_what_it_did(number: signal.Signals, capfd: pytest.CaptureFixture[str]) -> None:
    """SIGHUP comes where the connection to the machine ends."""
    before = signal.getsignal(number)
    with Interruption("stops soon") as stop:
        assert not stop()
        os.kill(os.getpid(), number)
        assert stop() and stop.signal == number and signal.getsignal(number) == before
    assert capfd.readouterr().err == "stops soon\n"
