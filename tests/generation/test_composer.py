"""Sequences made span by span: guidance by the other modality, absent spans, and written ids that are read again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sequences import ROWS, TEXT_FIRST, UNIDIFFUSER, batch, built

from mmjax.core.errors import UserError
from mmjax.generation import composer
from mmjax.generation.composer import Composer
from mmjax.generation.spans import Span
from mmjax.objectives.transfusion import Draws, Transfusion

KEYS = [11, 12, 13, 14]


pytestmark = pytest.mark.usefixtures("x64")


@pytest.fixture(scope="module")
def mutual() -> Any:
    with jax.enable_x64(True):
        declaration, p = built(UNIDIFFUSER)
        return declaration.merge(p)


def keys() -> jax.Array:
    return jnp.stack([jax.random.key(n) for n in KEYS])


def spans(image: str, sound: str, mel: float = 0.0) -> list[Span]:
    """Return a picture and a sound, each `given`, `made` or `absent`."""
    inputs = batch().inputs
    heard = {"mel": inputs["sound"]["mel"] + mel, "valid": jnp.ones((ROWS, 2), bool)}
    arrays = {"image": inputs["image"], "sound": heard}
    how = {"image": image, "sound": sound}
    return [
        Span(m, arrays[m], generated=how[m] == "made", absent=how[m] == "absent")
        for m in ("image", "sound")
    ]


def drawn(model: Any, objective: Transfusion, plan: Sequence[Span]) -> list[np.ndarray]:
    made = jax.jit(lambda: Composer(objective, model, plan).compose(keys()))()
    return [np.asarray(x) for x in made]


def test_both_are_guided_by_the_other_at_pure_noise(mutual: Any) -> None:
    """UniDiffuser's joint sampler as a loop over steps, each prediction a pass of whole sequences as in training."""
    objective = replace(UNIDIFFUSER, sampling_steps=3, guidance=2.5, prediction="flow")
    inputs = batch().inputs
    inputs["sound"]["valid"] = jnp.ones((ROWS, 2), bool)  # of what is made, all tokens exist
    own = [jax.random.fold_in(key, 0) for key in keys()]
    shapes = {"image": (4, 12), "sound": (4, 4)}
    x = {
        m: jnp.stack([jax.random.normal(jax.random.fold_in(key, i), shape) for key in own])
        for i, (m, shape) in enumerate(shapes.items())
    }
    first, seen = x, []

    def predicted(x: Any, image: float, sound: float) -> Any:
        times = {"image": jnp.full(ROWS, image), "sound": jnp.full(ROWS, sound)}
        draws = Draws(times, {}, jnp.ones(ROWS, bool), jnp.zeros(ROWS, bool))
        return objective.run(mutual, inputs, x, draws, jax.random.key(0)).values

    for step in range(3):
        t = 1 - step / 3
        pure = composer._fresh(jnp.stack(own), composer._ABSENT, jnp.int32(step), first)
        seen.append(pure)
        found = predicted(x, t, t)
        without = {
            "image": predicted({**pure, "image": x["image"]}, t, 1.0)["image"],
            "sound": predicted({**pure, "sound": x["sound"]}, 1.0, t)["sound"],
        }
        x = {m: x[m] - (without[m] + 2.5 * (found[m] - without[m])) / 3 for m in x}
    image, sound = drawn(mutual, objective, spans("made", "made"))
    np.testing.assert_allclose(image, x["image"], rtol=1e-7, atol=1e-9)
    np.testing.assert_allclose(sound, x["sound"], rtol=1e-7, atol=1e-9)
    # Fresh noise: no two numbers of it, nor of where the drawing began, are alike.
    numbers = np.concatenate([np.ravel(v) for each in [first, *seen] for v in each.values()])
    assert len(np.unique(numbers)) == len(numbers) and abs(numbers.std() - 1) < 0.1


def test_a_picture_is_guided_by_the_sound_that_is_given(mutual: Any) -> None:
    objective = replace(UNIDIFFUSER, sampling_steps=2, guidance=0.0)
    [none] = drawn(mutual, objective, spans("made", "given"))
    [other] = drawn(mutual, objective, spans("made", "given", mel=1.0))
    np.testing.assert_array_equal(none, other)  # weight 0: the sound is not heard
    # That is the distribution of pictures alone: the sound is pure noise, not missing.
    alone = replace(objective, guidance=1.0)
    [marginal] = drawn(mutual, alone, spans("made", "absent"))
    np.testing.assert_allclose(none, marginal, rtol=1e-9, atol=1e-9)
    one, eight = (
        drawn(mutual, replace(objective, guidance=g), spans("made", "given"))[0] for g in (1.0, 8.0)
    )
    assert np.abs(one - none).max() > 1e-3 and np.abs(eight - one).max() > 1e-3


def test_a_guidance_without_an_effect_is_an_error(mutual: Any) -> None:
    objective = replace(UNIDIFFUSER, sampling_steps=1, guidance=8.0)
    for plan in (spans("made", "absent"), spans("absent", "made")):
        with pytest.raises(UserError, match="guidance is 8, and nothing guides the generation of"):
            Composer(objective, mutual, plan).compose(keys())
    declaration, p = built(TEXT_FIRST)
    picture = [Span("image", batch().inputs["image"], generated=True)]
    with pytest.raises(UserError, match="does not begin with a discrete span.*Set guidance to 1"):
        Composer(replace(TEXT_FIRST, guidance=8.0), declaration.merge(p), picture).compose(keys())
    # Where no number is set, what can be guided is, and nothing else.
    model = declaration.merge(p)
    free, one = (
        drawn(model, replace(TEXT_FIRST, sampling_steps=2, guidance=g), picture)
        for g in (None, 1.0)
    )
    np.testing.assert_array_equal(free[0], one[0])


def test_spans_that_see_each_other_are_all_in_a_sequence(mutual: Any) -> None:
    with pytest.raises(UserError, match=r"missing: \['sound'\]. Add them as absent spans"):
        Composer(UNIDIFFUSER, mutual, spans("made", "made")[:1]).compose(keys())
    assert UNIDIFFUSER.beside(["image"]) == ("sound",)
    assert UNIDIFFUSER.beside(["image", "sound"]) == TEXT_FIRST.beside(["text"]) == ()


def test_arrays_of_what_is_made_are_not_read(mutual: Any) -> None:
    """Blank ones mean that no token exists, and a sound whose tokens do not exist would not hear itself."""
    objective = replace(UNIDIFFUSER, sampling_steps=2, guidance=1.0)
    made = []
    for valid in (True, False):
        image, sound = spans("made", "made")
        arrays = {**sound.arrays, "valid": jnp.full((ROWS, 2), valid)}
        made.append(drawn(mutual, objective, [image, replace(sound, arrays=arrays)]))
    jax.tree.map(np.testing.assert_array_equal, *made)


def test_an_ancestral_sampler_adds_noise_of_its_own(mutual: Any) -> None:
    objective = replace(UNIDIFFUSER, sampling_steps=3, guidance=1.0)
    one, other = (
        drawn(mutual, replace(objective, sampler=sampler), spans("made", "made"))
        for sampler in ("ddim", "ddpm")
    )
    assert all(np.abs(a - b).max() > 1e-3 for a, b in zip(one, other, strict=True))
    with pytest.raises(UserError, match="Unknown diffusion sampler 'ddmp'. Did you mean 'ddpm'"):
        replace(objective, sampler="ddmp")


def test_a_padding_id_in_the_middle_of_a_written_text_is_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A picture after it is that after the same text when it is given."""
    ids = jnp.tile(jnp.array([[5, 0, 7, 3, 0]], jnp.int32), (ROWS, 1))
    text = {"ids": ids, "valid": jnp.arange(5)[None] < jnp.full((ROWS, 1), 4)}
    declaration, p = built(TEXT_FIRST)
    objective, model = replace(TEXT_FIRST, sampling_steps=2), declaration.merge(p)
    picture = Span("image", batch().inputs["image"], generated=True)
    monkeypatch.setattr(Composer, "write", lambda self, past, span, keys: ids)

    def after(made: bool) -> np.ndarray:
        # The keys of a span go by its place, not by what stands before.
        return drawn(model, objective, [Span("text", text, generated=made), picture])[-1]

    np.testing.assert_allclose(after(True), after(False), rtol=1e-9, atol=1e-9)
