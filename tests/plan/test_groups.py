"""Groups of a collective, and the mesh axes along which they lie."""

from __future__ import annotations

import numpy as np

from mmjax.plan.groups import groups_of


def test_a_part_of_an_axis() -> None:
    """`(2)2`: behind 2 groups of the axis, 2 of its members."""
    found = groups_of("replica_groups=mesh['a'=2,'b'=4] {'b':(2)2}", 8)
    np.testing.assert_array_equal(found, [[0, 1], [2, 3], [4, 5], [6, 7]])
    found = groups_of("replica_groups=mesh['a'=2,'b'=4] {'b':(1)2}", 8)
    np.testing.assert_array_equal(found, [[0, 2], [1, 3], [4, 6], [5, 7]])


def test_two_axes_of_a_mesh() -> None:
    found = groups_of("replica_groups=mesh['a'=2,'b'=2,'c'=2] {'a','c'}", 8)
    np.testing.assert_array_equal(found, [[0, 1, 4, 5], [2, 3, 6, 7]])
