"""Signals that ask a computation to end."""

from __future__ import annotations

import os
import signal

import pytest

from ivl.utils.signals import Interruption


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_is_noted_and_then_means_what_it_did(number: signal.Signals, capfd: pytest.CaptureFixture[str]) -> None:
    """SIGHUP comes where the connection to the machine ends."""
    found = signal.getsignal(number)
    before = signal.SIG_DFL if found is signal.SIG_IGN else found  # as where the tests run under nohup
    signal.signal(number, before)
    try:
        with Interruption("stops soon") as stop:
            assert not stop()
            os.kill(os.getpid(), number)
            assert stop() and stop.signal == number and signal.getsignal(number) == before
    finally:
        signal.signal(number, found)
    assert capfd.readouterr().err == "stops soon\n"
