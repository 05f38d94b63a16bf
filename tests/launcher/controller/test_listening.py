"""A job that begins listens where its file says or not at all; one that runs goes on with any port that agents reach."""

import socket

import pytest

from evermesh.launcher.config import ApiConfig
from evermesh.launcher.controller.listening import listen, places
from evermesh.launcher.errors import ListenInvalid

GIVEN = ApiConfig(host="127.0.0.3", port=8470)


def test_a_controller_asks_for_what_the_file_says_then_for_what_it_had_then_for_any() -> None:
    assert places(ApiConfig(), "10.0.0.1", None, again=False) == [("10.0.0.1", 0)]
    assert places(ApiConfig(), "10.0.0.1", 4321, again=False) == [("10.0.0.1", 4321), ("10.0.0.1", 0)]
    assert places(GIVEN, "10.0.0.1", 4321, again=False) == [("127.0.0.3", 8470)]
    wanted = [("127.0.0.3", 8470), ("127.0.0.3", 4321), ("127.0.0.3", 0), ("10.0.0.1", 0)]
    assert places(GIVEN, "10.0.0.1", 4321, again=True) == wanted


def test_a_port_that_somebody_has_is_refused_to_a_job_that_begins_and_replaced_for_one_that_runs() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        config = ApiConfig(port=port)
        with pytest.raises(ListenInvalid, match=f"127.0.0.1:{port}: .*in use.* api.port"):
            listen(places(config, "127.0.0.1", None, again=False))
        with listen(places(config, "127.0.0.1", port, again=True)) as found:
            assert found.getsockname()[1] != port


def test_a_controller_that_was_elected_elsewhere_listens_where_it_is() -> None:
    config = ApiConfig(host="203.0.113.7", port=8470)  # an address of another machine
    with listen(places(config, "127.0.0.1", 8470, again=True)) as found:
        assert found.getsockname()[0] == "127.0.0.1"
