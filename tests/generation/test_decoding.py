"""Check what is chosen from logits, and when texts end."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmjax.core.errors import UserError
from mmjax.data.tokenizer import BOS_ID, EOS_ID, PAD_ID, TokenIds
from mmjax.generation.decoding import Sampling, generate

LENGTH = 6


@jax.jit
def follow(script_BL: jax.Array) -> Any:
    """Return texts of a model that follows a script of tokens, whatever was before; and how often it was asked."""

    def step(ids_BS: jax.Array, at: jax.Array, asked: Any) -> Any:
        return jax.nn.one_hot(script_BL[:, at], 9), asked.at[at].set(ids_BS[:, at])

    asked = jnp.full((LENGTH, script_BL.shape[0]), -1)
    keys = jax.random.split(jax.random.key(0), script_BL.shape[0])
    return generate(step, asked, keys, LENGTH, Sampling(), TokenIds(9))


@given(
    rows=st.lists(
        st.lists(st.integers(3, 8), min_size=LENGTH, max_size=LENGTH), min_size=3, max_size=3
    )
)
@settings(max_examples=40, deadline=None)
def test_texts_end_at_their_end_token(rows: list[list[int]]) -> None:
    for found, script in zip(np.asarray(follow(jnp.array(rows))), rows, strict=True):
        length = script.index(EOS_ID) + 1 if EOS_ID in script else LENGTH
        assert found.tolist() == script[:length] + [PAD_ID] * (LENGTH - length)


@pytest.mark.parametrize(("ends", "steps"), [([1, 3], 4), ([0, 0], 1), ([9, 2], LENGTH)])
def test_it_stops_when_all_have_ended(ends: list[int], steps: int) -> None:
    asked: list[int] = []

    def step(ids_BS: jax.Array, at: jax.Array, cache: Any) -> Any:
        jax.debug.callback(lambda at: asked.append(int(at)), at)
        ended = at >= jnp.array(ends)
        return jax.nn.one_hot(jnp.where(ended, EOS_ID, 5), 9), cache

    keys = jax.random.split(jax.random.key(0), 2)
    jax.block_until_ready(
        jax.jit(lambda: generate(step, (), keys, LENGTH, Sampling(), TokenIds(20)))()
    )
    jax.effects_barrier()
    assert sorted(asked) == list(range(steps))


def test_each_step_is_told_what_was_written() -> None:
    def step(ids_BS: jax.Array, at: jax.Array, cache: Any) -> Any:
        # Counts on from the token before; the begin token counts as 3.
        before = jnp.where(at == 0, 3, ids_BS[:, at])
        begins = ids_BS[:, 0] == BOS_ID
        return jax.nn.one_hot(jnp.where(begins, before + 1, 0), 20), cache

    keys = jax.random.split(jax.random.key(0), 2)
    found = jax.jit(lambda: generate(step, (), keys, LENGTH, Sampling(), TokenIds(20)))()
    np.testing.assert_array_equal(found, np.tile(np.arange(4, 4 + LENGTH), (2, 1)))


@pytest.mark.parametrize(
    "special",
    [
        TokenIds(20, pad=0, begin=0, end=1),
        TokenIds(20, pad=2, begin=1, end=2),
        TokenIds(20, 7, 7, 7),
    ],
    ids=["T5", "Llama", "one for all"],
)
def test_a_vocabulary_has_ids_of_its_own(special: TokenIds) -> None:
    """Texts begin, end and are filled up by the vocabulary's ids, also where two of these are one."""
    script_BL = jnp.array([[4, 5, special.end, 6, 6, 6], [4, 0, 5, 3, 6, 9]])

    def step(ids_BS: jax.Array, at: jax.Array, cache: Any) -> Any:
        begins = (ids_BS[:, 0] == special.begin)[:, None]
        return jnp.where(begins, jax.nn.one_hot(script_BL[:, at], 20), 0), cache

    keys = jax.random.split(jax.random.key(0), 2)
    found = jax.jit(lambda: generate(step, (), keys, LENGTH, Sampling(), special))()
    ended = [4, 5, special.end, special.pad, special.pad, special.pad]
    whole = [4, 0, 5, 3, 6, 9]
    np.testing.assert_array_equal(found, [ended, whole])


@pytest.mark.parametrize(
    "sampling", [Sampling(), Sampling(temperature=5.0), Sampling(1.0, top_k=3)]
)
def test_ids_without_a_piece_are_never_chosen(sampling: Sampling) -> None:
    """A table of 32 rows for 20 pieces, of which two ids have none: the likeliest are such, and are not there."""
    logits_V = np.full(32, 1.0)
    logits_V[[6, 11, *range(20, 32)]] = 9.0
    special = TokenIds(20, missing=(6, 11))

    def step(ids_BS: jax.Array, at: jax.Array, cache: Any) -> Any:
        return jnp.broadcast_to(logits_V, (64, 32)), cache

    keys = jax.random.split(jax.random.key(0), 64)
    found = np.asarray(jax.jit(lambda: generate(step, (), keys, LENGTH, sampling, special))())
    assert not np.isin(found, [6, 11, *range(20, 32)]).any()
    if sampling.temperature and not sampling.top_k:
        assert set(found.ravel().tolist()) >= {1, 2, 3, 4, 5, 7, 10, 12, 19}  # and all others are


def test_greedy_is_the_likeliest() -> None:
    logits = np.random.default_rng(0).normal(size=(5, 7))
    chosen = Sampling().choose(jnp.asarray(logits), jax.random.split(jax.random.key(0), 5))
    np.testing.assert_array_equal(chosen, logits.argmax(axis=1))
    assert chosen.dtype == jnp.int32


@pytest.mark.parametrize(("temperature", "top_k"), [(1.0, 0), (0.5, 0), (2.0, 3), (1.0, 99)])
def test_frequencies_of_what_is_drawn(temperature: float, top_k: int) -> None:
    logits, draws = np.array([0.5, 2.0, -1.0, 1.5, 0.0]), 20_000
    keys = jax.random.split(jax.random.key(1), draws)
    sampling = Sampling(temperature, top_k)
    drawn = jax.jit(sampling.choose)(jnp.tile(jnp.asarray(logits), (draws, 1)), keys)
    weight = np.exp(logits / temperature)
    weight[np.argsort(-logits)[top_k or len(logits) :]] = 0
    found = np.bincount(drawn, minlength=5) / draws
    assert not found[weight == 0].any()
    # Five standard deviations of the widest share.
    np.testing.assert_allclose(found, weight / weight.sum(), atol=5 * 0.5 / draws**0.5)


def test_one_likeliest_of_one_is_greedy() -> None:
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(50, 7)))
    keys = jax.random.split(jax.random.key(0), 50)
    drawn = Sampling(temperature=5.0, top_k=1).choose(logits, keys)
    np.testing.assert_array_equal(drawn, Sampling().choose(logits, keys))


def test_mistakes() -> None:
    with pytest.raises(UserError, match="temperature -1.0 and top_k 0"):
        Sampling(temperature=-1.0)
    with pytest.raises(UserError, match="top_k -2"):
        Sampling(top_k=-2)
