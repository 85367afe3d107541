"""GPUs described for their compiler."""

from __future__ import annotations

import pytest

from mmjax.plan.gpus import target
from mmjax.plan.topology import GPUS


@pytest.mark.parametrize("kind", GPUS)
def test_a_card_is_described(kind: str) -> None:
    text = target(kind)
    assert kind.upper() in text and text.count("{") == text.count("}") == 4
