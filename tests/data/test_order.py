"""Order: a pure function of the row number, and shares that never drift."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isofusion.data.order import Quota, permutation
from isofusion.errors import InputError


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(0.02, 1.0), min_size=1, max_size=7))
def test_every_prefix_is_within_one_row_of_its_share(weights):
    quota = Quota(weights)
    source, j = quota.locate(np.arange(2500))
    for i in range(len(weights)):
        given_rows = np.cumsum(source == i)
        assert np.abs(given_rows - quota.shares[i] * np.arange(1, 2501)).max() < 1
        assert np.array_equal(j[source == i], np.arange((source == i).sum()))
    assert np.abs(quota.shares - np.array(weights) / sum(weights)).max() <= 0.001


def test_plain_weights_are_exact():
    assert np.array_equal(Quota([0.45, 0.45, 0.10]).per_cycle, [9, 9, 2])
    assert np.array_equal(Quota([1, 1, 1]).per_cycle, [1, 1, 1])
    assert np.array_equal(Quota([0.3, 0.15, 0.45, 0.1]).per_cycle, [6, 3, 9, 2])


def test_before_counts_what_locate_gives():
    quota = Quota([0.31, 0.52, 0.17])
    source, _ = quota.locate(np.arange(777))
    for t in (0, 1, 100, 333, 777):
        assert np.array_equal(quota.before(t), np.bincount(source[:t], minlength=3))


def test_far_rows_cost_nothing_and_agree():
    quota = Quota([0.31, 0.52, 0.17])
    t = 10**12 + 7
    source, j = quota.locate(np.array([t]))
    assert j[0] == quota.before(t)[source[0]]


def test_vanishing_weights_are_refused():
    with pytest.raises(InputError, match=r"least is 0\.1 %"):
        Quota([1.0, 1e-5])


def test_permutations_are_permutations_and_depend_on_each_argument():
    base = permutation(1000, 3, "a", 0)
    assert np.array_equal(np.sort(base), np.arange(1000))
    assert np.array_equal(base, permutation(1000, 3, "a", 0))
    for other in (permutation(1000, 4, "a", 0), permutation(1000, 3, "b", 0), permutation(1000, 3, "a", 1)):
        assert (base != other).mean() > 0.9


def test_permutation_is_pinned():
    assert permutation(8, 0, "text", 0).tolist() == PINNED


PINNED = [2, 7, 5, 1, 0, 4, 3, 6]
