"""The loop of an agent: times, descriptors, and calls from other threads."""

import os
import signal
import threading
import time
from collections.abc import Iterator

import pytest

from evermesh.launcher.agent.loop import Loop

WAIT_S = 10.0


@pytest.fixture
def loop() -> Iterator[Loop]:
    loop = Loop()
    yield loop
    loop.close()


def test_timers_are_called_once_in_the_order_of_their_times(loop: Loop) -> None:
    called: list[str] = []
    for delay_s, name in ((0.06, "third"), (0.02, "first"), (0.04, "second"), (0.06, "fourth")):
        loop.after(delay_s, lambda name=name: called.append(name))  # type: ignore[misc]
    began_s = time.monotonic()
    assert loop.run_until(lambda: len(called) == 4, WAIT_S)
    assert called == ["first", "second", "third", "fourth"]
    assert time.monotonic() - began_s >= 0.06
    assert not loop.run_until(lambda: len(called) > 4, 0.1)


def test_a_timer_may_set_the_next_one(loop: Loop) -> None:
    called: list[float] = []

    def again() -> None:
        called.append(time.monotonic())
        loop.after(0.01, again)

    again()
    assert loop.run_until(lambda: len(called) == 5, WAIT_S)


def test_run_until_answers_in_time_though_nothing_happens(loop: Loop) -> None:
    began_s = time.monotonic()
    assert not loop.run_until(lambda: False, 0.05)
    assert 0.05 <= time.monotonic() - began_s < 5


def test_calls_from_many_threads_all_come_in_the_order_of_each(loop: Loop) -> None:
    calls: list[tuple[int, int]] = []

    def post(thread: int) -> None:
        for number in range(2000):
            loop.post(lambda thread=thread, number=number: calls.append((thread, number)))  # type: ignore[misc]

    threads = [threading.Thread(target=post, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    assert loop.run_until(lambda: len(calls) == 8000, WAIT_S)
    for thread in threads:
        thread.join()
    for number in range(4):
        assert [n for t, n in calls if t == number] == list(range(2000))


def test_a_post_ends_the_sleep(loop: Loop) -> None:
    came: list[float] = []
    threading.Timer(0.1, lambda: loop.post(lambda: came.append(time.monotonic()))).start()
    began_s = time.monotonic()
    assert loop.run_until(lambda: bool(came), WAIT_S)
    assert came[0] - began_s < 1.0


def test_a_signal_handler_may_post(loop: Loop) -> None:
    came: list[int] = []
    before = signal.signal(signal.SIGUSR2, lambda number, _: loop.post(lambda: came.append(number)))
    try:
        threading.Timer(0.05, lambda: os.kill(os.getpid(), signal.SIGUSR2)).start()
        assert loop.run_until(lambda: bool(came), WAIT_S)
    finally:
        signal.signal(signal.SIGUSR2, before)


def test_what_one_call_of_a_round_forgets_is_not_called_in_it(loop: Loop) -> None:
    pipes = [os.pipe() for _ in range(2)]
    called: list[int] = []

    def forget_all(mine: int) -> None:
        called.append(mine)
        for reader, _ in pipes:
            loop.forget(reader)

    for reader, writer in pipes:
        loop.on_readable(reader, lambda reader=reader: forget_all(reader))  # type: ignore[misc]
        os.write(writer, b"x")
    assert loop.run_until(lambda: bool(called), WAIT_S)
    assert not loop.run_until(lambda: len(called) > 1, 0.05)
    loop.forget(pipes[0][0])  # once more: nothing happens
    for reader, writer in pipes:
        os.close(reader)
        os.close(writer)


def test_a_full_pipe_of_wakeups_blocks_nobody(loop: Loop) -> None:
    called: list[int] = []
    for _ in range(100_000):
        loop.wake()
    loop.post(lambda: called.append(1))
    assert loop.run_until(lambda: bool(called), WAIT_S)
