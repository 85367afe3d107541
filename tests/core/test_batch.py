"""`mmjax.core.batch`: a batch is a tree of arrays, whose missing keys are no leaf."""

from __future__ import annotations

import jax
import numpy as np

from mmjax.core.batch import Batch


def rows(keys: object = None) -> Batch:
    ids = np.arange(6).reshape(3, 2)
    return Batch({"text": {"ids": ids}}, {"label": np.arange(3)}, np.ones(3, bool), keys)


def test_its_leaves_are_named_as_its_attributes_are() -> None:
    leaves = jax.tree_util.tree_leaves_with_path(rows(np.zeros(3)))
    names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves]
    assert names == ["fields/label", "inputs/text/ids", "keys", "valid"]


def test_without_keys_there_is_no_leaf_of_them() -> None:
    assert len(jax.tree.leaves(rows())) == 3 and rows().keys is None


def test_a_transformation_hands_out_batches_of_the_same_kind() -> None:
    first = jax.jit(lambda batch: jax.tree.map(lambda x: x[0], batch))(rows())
    assert isinstance(first, Batch) and first.inputs["text"]["ids"].tolist() == [0, 1]
    assert not first.fields["label"] and first.valid
