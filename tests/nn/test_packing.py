"""Spans that share slots: where each token lies, against plain loops."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmjax.core.errors import UserError
from mmjax.core.sharding import joined_rows, split_rows
from mmjax.nn.packing import lay, lift, share
from mmjax.nn.stream import Stream

BEGIN = -1


def laid(texts: list[list[int]], capacity: int) -> tuple[list[int], list[int], int]:
    """Return the tokens of one sequence in order, their items, and how many were cut."""
    limit, room = max(map(len, texts)), capacity - len(texts)
    while sum(min(len(text), limit) for text in texts) > room:
        limit -= 1
    tokens, items, cut = list[int](), list[int](), 0
    for item, text in enumerate(texts):
        # A text that is cut keeps its first tokens, and its end.
        kept = text if len(text) <= limit else [*text[: limit - 1], *text[-1:]] if limit else []
        tokens += [BEGIN, *kept]
        items += [item] * (len(kept) + 1)
        cut += len(text) - len(kept)
    return tokens, items, cut


@settings(max_examples=60)
@given(st.data(), st.sampled_from([1, 2, 3]), st.integers(2, 20))
def test_tokens_lie_without_gaps_and_the_longest_texts_are_cut(
    data: st.DataObject, count: int, capacity: int
) -> None:
    length, rows = 6, 2 * count
    capacity = max(capacity, 2 * count)
    lengths = data.draw(st.lists(st.integers(0, length), min_size=rows, max_size=rows))
    texts = [[10 * row + i for i in range(n)] for row, n in enumerate(lengths)]
    valid = np.arange(length) < np.array(lengths)[:, None]
    ids = 10 * np.arange(rows)[:, None] + np.arange(length)
    region = share(jnp.asarray(valid), count, capacity)
    begins = np.asarray(region.index_RT) == 0
    found = np.where(begins, BEGIN, np.asarray(region.pick(jnp.asarray(ids))))
    assert found.shape[1] == min(capacity, count * (length + 1))
    for row in range(2):
        tokens, items, cut = laid(texts[row * count : (row + 1) * count], capacity)
        there = np.asarray(region.valid_RT[row])
        assert there.tolist() == [True] * len(tokens) + [False] * (len(there) - len(tokens))
        assert found[row, there].tolist() == tokens
        assert np.asarray(region.item_RT[row])[there].tolist() == items
        assert int(region.cut_RN[row].sum()) == cut
        told = np.asarray(region.scored_RT()[row])
        assert told.tolist() == [there[i] and not begins[row, i] for i in range(1, len(there))]
        sums = np.asarray(region.following(jnp.asarray(np.where(told, 1.0, 0.0))))
        kept = [items.count(item) - 1 for item in range(count)]
        assert sums[row * count : (row + 1) * count].tolist() == kept


def test_rows_that_do_not_exist_get_no_slot() -> None:
    valid = jnp.arange(3) < jnp.array([2, 3, 1, 1])[:, None]
    region = share(valid, 2, 5, jnp.array([False, True, True, True]))
    assert region.counts_RN.tolist() == [[0, 4], [2, 2]] and not region.cut_RN.any()
    assert region.item_RT.tolist() == [[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]]
    assert region.valid_RT.tolist() == [[1, 1, 1, 1, 0], [1, 1, 1, 1, 0]]


def test_positions_are_those_of_reading_item_by_item() -> None:
    """Two items: text of 2, picture of 2; and picture of 2 first, then a text of 1."""
    region = share(jnp.arange(3) < jnp.array([2, 1])[:, None], 2, 6)
    streams = {
        "text": Stream(jnp.arange(6.0).reshape(1, 6, 1), region.valid_RT, layout=(("text", 6),)),
        "image": Stream(10 + jnp.arange(4.0).reshape(2, 2, 1), layout=(("image", 2),)),
    }
    stream = lay(streams, {"text": region}, 2, jnp.array([False, True]))
    assert stream.layout == (("text", 6), ("image", 2), ("image", 2))
    assert stream.attributes["item"].tolist() == [[0, 0, 0, 1, 1, 1, 0, 0, 1, 1]]
    place = np.asarray(stream.attributes["position"][0])
    assert place[:3].tolist() == [0, 1, 2] and place[6:8].tolist() == [3, 4]  # text, then picture
    assert place[8:].tolist() == [5, 6] and place[3:5].tolist() == [7, 8]  # picture, then text
    out = lift(stream.x_BSD, streams, {"text": region}, 2)
    np.testing.assert_array_equal(out["text"], streams["text"].x_BSD)
    np.testing.assert_array_equal(out["image"], streams["image"].x_BSD)


def test_rows_that_make_no_whole_sequences() -> None:
    with pytest.raises(UserError, match="3 rows do not make sequences of 2 items"):
        share(jnp.ones((3, 2), bool), 2, 6)


def test_micro_batches_take_whole_runs_of_rows() -> None:
    rows = jnp.arange(12)
    parts = split_rows(rows, 2, together=3)
    assert parts.tolist() == [[0, 1, 2, 6, 7, 8], [3, 4, 5, 9, 10, 11]]
    assert joined_rows(parts, together=3).tolist() == rows.tolist()
    assert split_rows(rows, 3).tolist() == [[0, 3, 6, 9], [1, 4, 7, 10], [2, 5, 8, 11]]
    assert jax.jit(split_rows, static_argnums=1)(rows, 3).shape == (3, 4)
