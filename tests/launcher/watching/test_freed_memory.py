"""What is free between pieces that stay goes back to the machine."""

import psutil

from evermesh.launcher.controller.watching.freed_memory import give_back


def test_memory_that_is_free_between_what_stays_goes_back() -> None:
    me = psutil.Process()
    pieces = [bytes(2000 + number % 100) for number in range(100_000)]
    stays = pieces[::50]
    del pieces
    before_bytes = me.memory_info().rss
    give_back()
    assert me.memory_info().rss < before_bytes - (50 << 20)
    assert all(len(piece) >= 2000 for piece in stays)
