"""mmjax: multimodal pretraining by alternating gradient descent in JAX.

import mmjax
model = mmjax.load("runs/quickstart")
vectors = model.embed(text=["a red apple"])
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mmjax.loading import TrainedModel

__version__ = "0.2.0"
__all__ = ["load"]


def load(
    path: str, step: int | None = None, *, allow_change: bool = False, merge: bool = False
) -> TrainedModel:
    """Load a trained run for embedding and inspection; see `mmjax.loading.load`."""
    # Imported here so that `import mmjax` stays light.
    from mmjax.loading import load as load_run

    return load_run(path, step, allow_change=allow_change, merge=merge)
