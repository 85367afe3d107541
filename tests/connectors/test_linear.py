"""The linear connector against NumPy."""

from __future__ import annotations

import connecting
import numpy as np
import pytest

from mmjax.connectors.linear import Linear

pytestmark = pytest.mark.usefixtures("x64")


@pytest.mark.parametrize("bias", [True, False])
def test_against_numpy(bias: bool) -> None:
    call, p = connecting.built(Linear(bias=bias), 3, 5)
    given = connecting.stream(("image", (2, 2)), width=3, coordinates={"y": np.zeros((1, 4))})
    out = call(p, given)
    expected = np.einsum("bsd,de->bse", given.x_BSD, p["out/kernel"])
    assert ("out/bias" in p) == bias
    np.testing.assert_allclose(out.x_BSD, expected + p.get("out/bias", 0), rtol=1e-12)
    np.testing.assert_array_equal(out.coordinates["y"], 0)
