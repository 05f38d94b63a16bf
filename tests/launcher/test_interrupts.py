"""Signals that end a run: the first is remembered, the second raises, and nohup is respected."""

import os
import signal

import pytest

from evermesh.launcher.interrupts import SIGNALS, Interrupts


@pytest.mark.parametrize("number", SIGNALS)
def test_the_first_signal_is_remembered_and_the_second_raises_with_its_number(number: signal.Signals) -> None:
    with Interrupts() as interrupts:
        assert interrupts.exit_code == 0
        os.kill(os.getpid(), number)
        assert (interrupts.received, interrupts.exit_code) == (number, 128 + number)
        with pytest.raises(KeyboardInterrupt) as caught:
            os.kill(os.getpid(), signal.SIGTERM)
        assert caught.value.args == (signal.SIGTERM,)


def test_a_lost_terminal_stays_ignored_under_nohup_and_handlers_are_put_back() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Interrupts() as interrupts:
            os.kill(os.getpid(), signal.SIGHUP)
            assert interrupts.received is None
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGHUP, before)
