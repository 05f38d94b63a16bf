"""Signals to ``evermesh launch``: each is taken once, in order, and nohup is respected."""

import os
import signal

from evermesh.launcher.interrupts import Interrupts


def test_signals_are_taken_in_the_order_in_which_they_came() -> None:
    came = [signal.SIGUSR1, signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
    with Interrupts() as interrupts:
        assert interrupts.next() is None
        for number in came:
            os.kill(os.getpid(), number)
        assert [interrupts.next() for _ in came] == came
        assert interrupts.next() is None


def test_a_lost_terminal_stays_ignored_under_nohup_and_handlers_are_put_back() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Interrupts() as interrupts:
            os.kill(os.getpid(), signal.SIGHUP)
            assert interrupts.next() is None
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGHUP, before)
