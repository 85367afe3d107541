"""Experts: soft ones, noise, causal routers and generation, upcycling, and the metrics of each layer."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import layers
import numpy as np
import pytest
import toyrun
from experted import HIDDEN, LAYOUT, LENGTH, ROWS, TOKENS, VALID, block, mlp, random
from flax import nnx

from mmjax.core.errors import UserError
from mmjax.core.parameters import Declaration
from mmjax.nn.masks import Causal
from mmjax.nn.routers.token_choice import TokenChoice
from mmjax.nn.stream import Stream
from mmjax.nn.trunk import GroupConfig, Trunk

WIDTH = 8
X = np.random.default_rng(4).normal(size=(ROWS, LENGTH, WIDTH))
CAUSALLY = {
    "count": 3,
    "router": {"name": "expert_choice", "score": "sigmoid", "capacity": 1.5},
    "causal": {"mlp_dim": 5, "weight": 0.7},
}


pytestmark = pytest.mark.usefixtures("x64")


def experts(config: Any) -> tuple[Declaration, dict[str, np.ndarray]]:
    declaration = Declaration(layers.experts(WIDTH, HIDDEN, config))
    return declaration, random(declaration)


def stream(**more: Any) -> Stream:
    return Stream(jnp.asarray(X), jnp.asarray(VALID), layout=LAYOUT, **more)


def softmax(x: np.ndarray, axis: int) -> np.ndarray:
    e = np.exp(x - x.max(axis=axis, keepdims=True))
    return e / e.sum(axis=axis, keepdims=True)


@pytest.mark.parametrize("normalise", [True, False])
def test_soft_experts_by_their_formula(normalise: bool) -> None:
    router = {"name": "soft", "slots_per_expert": 2, "normalise": normalise}
    declaration, p = experts({"count": 3, "router": router, "group_size": LENGTH})
    y, aux = declaration.merge(p)(stream(), None)
    for row in range(ROWS):
        x, phi = X[row][VALID[row]], p["router"]
        if normalise:
            x_unit = x / np.linalg.norm(x, axis=1, keepdims=True)
            logits = p["scale"] * x_unit @ (phi / np.linalg.norm(phi, axis=0))
        else:
            logits = x @ phi
        slots = softmax(logits, 0).T @ x
        made = np.concatenate([mlp(p, e, slots[2 * e : 2 * e + 2]) for e in range(3)])
        np.testing.assert_allclose(y[row][VALID[row]], softmax(logits, 1) @ made, rtol=1e-6)
        assert not np.asarray(y[row][~VALID[row]]).any()
    assert all(float(left) == 0 for left, _ in aux.statistics.values())
    assert float(aux.usage["image"].sum()) == pytest.approx(VALID[:, 2:].sum())


def test_noise_is_drawn_in_training_and_not_without_a_key() -> None:
    config = {**TOKENS, "router": {**TOKENS["router"], "noise": 1.0}, "losses": {"load": 1.0}}  # type: ignore[dict-item]
    declaration, p = experts(config)
    model = declaration.merge(p)
    plain = Declaration(layers.experts(WIDTH, HIDDEN, TOKENS)).merge(p)(
        stream(), jax.random.key(3)
    )[0]
    np.testing.assert_array_equal(model(stream(), None)[0], plain)
    noisy = [model(stream(), jax.random.key(seed)) for seed in (0, 1)]
    assert (noisy[0][0] != noisy[1][0]).any() and (noisy[0][0] != plain).any()
    assert float(noisy[0][1].loss) > 0


def test_the_noise_is_one_part_in_as_many_as_there_are_experts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of what the router is given, 400 times: mean and standard deviation of what was added."""
    given: list[jax.Array] = []
    route = TokenChoice.route

    def noted(self: Any, logits: jax.Array, valid: jax.Array) -> Any:
        given.append(logits)
        return route(self, logits, valid)

    monkeypatch.setattr(TokenChoice, "route", noted)
    config = {**TOKENS, "router": {**TOKENS["router"], "noise": 1.5}}  # type: ignore[dict-item]
    declaration, p = experts(config)
    model = declaration.merge(p)

    @jax.jit
    def logits(key: jax.Array | None) -> jax.Array:
        model(stream(), key)
        return given[-1]

    noised = [np.asarray(logits(key)) for key in jax.random.split(jax.random.key(0), 400)]
    added = np.stack(noised) - np.asarray(logits(None))
    assert added.std() == pytest.approx(1.5 / 3, rel=0.02)
    assert abs(added.mean()) < 0.02


# --- causal routers ----------------------------------------------------------------------------


def test_the_causal_router_learns_alone_what_experts_took() -> None:
    declaration, p = experts(CAUSALLY)
    values = {n: jnp.asarray(v) for n, v in p.items()}

    def loss(p: Any) -> jax.Array:
        return declaration.merge(p)(stream(), None)[1].loss

    model = declaration.merge(values)
    _, aux = model(stream(), None)
    x = X.reshape(1, -1, WIDTH)
    took = np.asarray(
        model.routing.route(jnp.asarray(x @ p["router"]), jnp.asarray(VALID.reshape(1, -1))).parts(
            ROWS * LENGTH
        )
    )[0]
    up = x[0] @ p["causal/up/kernel"] + p["causal/up/bias"]
    logits = (up / (1 + np.exp(-up))) @ p["causal/out/kernel"] + p["causal/out/bias"]
    chance = 1 / (1 + np.exp(-logits))
    entropy = -(took * np.log(chance) + (1 - took) * np.log(1 - chance))[VALID.reshape(-1)]
    assert float(aux.loss) == pytest.approx(0.7 * entropy.mean(), rel=1e-6)
    right, count = aux.statistics["causal agreement"]
    assert float(right) == ((chance > 0.5) == took)[VALID.reshape(-1)].sum()
    assert float(count) == 3 * VALID.sum()
    reached = {n for n, g in jax.grad(loss)(values).items() if np.asarray(g).any()}
    assert reached == {n for n in p if n.startswith("causal/")}
    # Nor do the layers before, of which the tokens come: the trunk does not learn by it.
    to_tokens = jax.grad(lambda x: model(replace(stream(), x_BSD=x), None)[1].loss)(jnp.asarray(X))
    assert not np.asarray(to_tokens).any()


def trunk(config: Any, **more: Any) -> Declaration:
    group = GroupConfig(2, (block(**more), block(experts=config, **more)))
    return Declaration(nnx.Dict(trunk=Trunk([group], WIDTH)))


@pytest.mark.parametrize(
    "more", [{}, {"per_modality": {"parts": ["mlp"], "modalities": ["text", "image"]}}]
)
def test_token_by_token_each_goes_where_its_causal_router_says(more: dict[str, Any]) -> None:
    declaration = trunk(CAUSALLY, **more)
    model = declaration.merge({n: jnp.asarray(v) for n, v in random(declaration).items()})["trunk"]
    own = [(name,) * size for name, size in LAYOUT]
    names = [name for each in own for name in each]

    def parts(x: np.ndarray) -> np.ndarray:
        whole = Stream(jnp.asarray(x[:, :1]), layout=((names[0], 1),), mask=Causal())
        held, out = model.init_cache(whole, LENGTH), []
        for at in range(LENGTH):
            one = Stream(jnp.asarray(x[:, at : at + 1]), layout=((names[at], 1),), mask=Causal())
            made, held = model.decode(one, held, at)
            out.append(np.asarray(made.x_BSD))
        return np.concatenate(out, axis=1)

    y, changed = parts(X), X.copy()
    changed[:, 4:] += 1
    np.testing.assert_array_equal(parts(changed)[:, :4], y[:, :4])
    # By hand: the first token alone, through all layers.
    graph, state = nnx.split(model.groups[0].blocks)
    one = Stream(jnp.asarray(X[:, :1]), layout=((names[0], 1),), mask=Causal())
    for repeat in range(2):
        dense, sparse = nnx.merge(graph, jax.tree.map(lambda a, r=repeat: a[r], state))
        one, _ = dense(one, None)
        after = one.x_BSD + sparse.attention(
            sparse.attention_norm(one.x_BSD), one.pairs(), token_modalities=None
        )
        part = getattr(sparse.mlp, names[0]) if more else sparse.mlp
        one = replace(one, x_BSD=after + part.causal_call(sparse.mlp_norm(after)))
    np.testing.assert_allclose(y[:, :1], one.x_BSD, rtol=1e-9)
    # And the experts, of each token.
    layer = nnx.merge(*_first(model))
    x = jnp.asarray(X)
    for at, name in enumerate(names):
        part = getattr(layer[1].mlp, name) if more else layer[1].mlp
        token = np.asarray(x[:, at : at + 1])
        found = np.asarray(part.causal_call(jnp.asarray(token)))
        gates = np.asarray(part.routing.scores(part.logits(jnp.asarray(token))))
        takes = np.asarray(part.causal(jnp.asarray(token))) > 0
        p = {
            f"mlps/{w}/kernel": np.asarray(getattr(part.mlps, w).kernel[...])
            for w in ("up", "down")
        }
        wanted = sum(
            gates[..., e : e + 1] * takes[..., e : e + 1] * mlp(p, e, token) for e in range(3)
        )
        np.testing.assert_allclose(found, wanted, rtol=1e-9, atol=1e-12)


def _first(model: Any) -> Any:
    graph, state = nnx.split(model.groups[0].blocks)
    return graph, jax.tree.map(lambda x: x[0], state)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"losses": {"load": 1.0}}, "losses.load needs a router with noise"),
        ({"router": {"name": "token_choice"}, "causal": {"mlp_dim": 3}}, "causal is for a router whose experts choose"),
        ({"router": {"name": "soft"}, "losses": {"z": 1.0}}, "router is Soft, which has no auxiliary losses"),
        ({"router": {"name": "soft"}, "local_entropy": {"text": 1.0}}, "router is Soft, which has no auxiliary losses"),
        ({"causal": {"mlp_dm": 3}}, "Did you mean 'mlp_dim'"),
    ],
)  # fmt: skip
def test_what_does_not_go_together_is_said(config: Any, said: str) -> None:
    with pytest.raises(UserError, match=said):
        layers.experts(WIDTH, HIDDEN, {"count": 3, **config})


# --- metrics ----------------------------------------------------------------------------------


def test_usage_is_told_of_each_layer_and_modality() -> None:
    """Layers 1 and 3 have experts, of a pattern of two blocks; passes add up."""
    config = {**TOKENS, "group_size": ROWS * LENGTH}
    declaration = trunk(config)
    p = {n: jnp.asarray(v) for n, v in random(declaration).items()}
    model = declaration.merge(p)["trunk"]
    _, aux = model(stream(), None)
    assert set(aux.usage) == {f"{layer} {name}" for layer in ("001", "003") for name in ("text", "image")}  # fmt: skip
    x = stream()
    graph, state = nnx.split(model.groups[0].blocks)
    for repeat, layer in enumerate(("001", "003")):
        first, second = nnx.merge(graph, jax.tree.map(lambda a, r=repeat: a[r], state))
        x, _ = first(x, None)
        after = x.x_BSD + second.attention(
            second.attention_norm(x.x_BSD), x.pairs(), token_modalities=None
        )
        part = second.mlp
        tokens = second.mlp_norm(after).reshape(1, -1, WIDTH)
        slots = part.routing.route(part.logits(tokens), jnp.asarray(VALID.reshape(1, -1)))
        counts = {"text": np.zeros(3), "image": np.zeros(3)}
        for e, c in np.ndindex(slots.index_GEC.shape[1:]):
            if float(slots.gate_GEC[0, e, c]) > 0:
                at = int(slots.index_GEC[0, e, c]) % LENGTH
                counts["text" if at < 2 else "image"][e] += 1
        for name, count in counts.items():
            np.testing.assert_array_equal(aux.usage[f"{layer} {name}"], count)
            share = aux.metrics()[f"usage {layer} {name}"]
            np.testing.assert_allclose(share, count / count.sum(), rtol=1e-6)
        x, _ = second(x, None)


def test_losses_name_modalities_that_there_are() -> None:
    words = (
        "model.layers=[{'repeat': 1, 'blocks': [{'name': 'transformer', 'num_heads': 2, 'mlp_dim': 8, 'experts': "
        "{'count': 2, 'router': {'name': 'token_choice'}, 'global_entropy': {'toi': 1.0}}}]}]"
    )
    from mmjax.experiment import make_experiment

    with pytest.raises(UserError, match="name 'toi', which is no modality. Did you mean 'toy'"):
        make_experiment(toyrun.block(words))


# --- upcycling ---------------------------------------------------------------------------------

LAYER = "{'name': 'transformer', 'num_heads': 2, 'mlp_dim': 8%s}"
GROUPS = "model.layers=[{'repeat': 2, 'blocks': [" + LAYER + "]}]"
SPARSE = ", 'experts': {'count': 3, 'router': {'name': 'token_choice', 'top_k': 3}}"


def test_a_dense_run_begins_every_expert(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each token at all experts, whose gates sum to one: what the dense model computes."""
    with jax.enable_x64(False):
        dense, sparse = tmp_path / "dense", tmp_path / "sparse"
        toyrun.run(dense, GROUPS % "", "steps=4")
        still = ("steps=1", "optimizer.learning_rate=0.0", "optimizer.weight_decay=0.0")
        before = toyrun.run(tmp_path / "same", GROUPS % "", *still, f"init_from.path='{dense}'")
        capsys.readouterr()
        words = (f"init_from.path='{dense}'", "init_from.skip=['.*/router.*']")
        after = toyrun.run(sparse, GROUPS % SPARSE, *still, *words)
    said = capsys.readouterr().out
    name = "trunk/layers/001/mlp/mlps/up/kernel"
    assert "trunk/layers/*/mlp/mlps/up/kernel [8, 8] -> [3, 8, 8] (2)" in said
    assert "initialised randomly (2): trunk/layers/*/mlp/router" in said
    there, here = toyrun.parameters(dense), toyrun.parameters(sparse)
    for each in here[name]:
        np.testing.assert_array_equal(each, there["trunk/layers/001/mlp/up/kernel"])
    assert before is not None and after is not None
    for one, two in zip(before, after, strict=True):
        assert one["value"] == pytest.approx(two["value"], rel=1e-5)
