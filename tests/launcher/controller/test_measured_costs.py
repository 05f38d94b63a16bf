"""What a job measures of itself for decisions about nodes."""

import statistics

from hypothesis import given
from hypothesis import strategies as st

from evermesh.launcher.controller.measured_costs import _medians_of_others


@given(st.lists(st.floats(0, 1e6), max_size=9))
def test_the_median_of_the_others_is_that_of_the_list_without_oneself(seconds: list[float]) -> None:
    found = _medians_of_others({str(number): value for number, value in enumerate(seconds)})
    others = [[*seconds[:number], *seconds[number + 1 :]] for number in range(len(seconds))]
    assert found == {str(number): statistics.median(rest) for number, rest in enumerate(others) if rest}
