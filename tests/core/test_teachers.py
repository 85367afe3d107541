"""The schedule of a teacher's decay."""

from __future__ import annotations

import math

import numpy as np

from mmjax.core.teachers import TeacherConfig


def test_the_decay_goes_from_the_first_update_to_the_last() -> None:
    config = TeacherConfig(of=("a",), decay=0.996)
    found = [config.decay_at(update, 5) for update in (0, 1, 2, 3, 4, 9)]
    quarter, three = (0.996 + 0.002 * (1 + sign * math.sqrt(0.5)) for sign in (-1, 1))
    wanted = [0.996, quarter, 0.998, three, 1, 1]
    np.testing.assert_allclose(found, wanted, rtol=1e-12)
    constant = TeacherConfig(of=("a",), decay=0.9, schedule="constant")
    assert [constant.decay_at(update, 5) for update in (0, 4)] == [0.9, 0.9]
