"""Which rows the sheet of a reward-training run shows."""

from __future__ import annotations

import math

from comfyui_diptych.training.reinforce.before_after import most_changed
from hypothesis import given
from hypothesis import strategies as st

gains = st.lists(st.floats(-1, 1), min_size=1, max_size=40)


def test_the_largest_gains_come_first_and_the_largest_loss_last():
    assert most_changed([0.0, 0.5, -0.5, 0.25, 1.0, math.nan], 4) == [4, 1, 3, 2]


def test_few_rows_are_all_shown_in_their_order():
    assert most_changed([0.0, 1.0, -1.0], 4) == [0, 1, 2]


@given(gains, st.integers(2, 6))
def test_no_row_that_is_left_out_changed_more(values, count):
    places = most_changed(values, count)
    assert len(set(places)) == len(places) == min(count, len(values))
    left = [value for place, value in enumerate(values) if place not in places]
    if left:
        assert min(values[place] for place in places[:-1]) >= max(left)
        assert values[places[-1]] <= min(left)
