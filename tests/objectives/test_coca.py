"""CoCa against NumPy: its loss and gradients, who sees whom, each loss alone, parts and meshes, and its captions."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmjax.core.batch import Batch
from mmjax.core.errors import UserError
from mmjax.core.parameters import Declaration
from mmjax.core.sharding import MeshConfig, batch_sharding, make_mesh, named
from mmjax.data.tokenizer import BOS_ID, EOS_ID, PAD_ID, TokenIds
from mmjax.engine.gradient import loss_and_gradient
from mmjax.generation.decoding import Sampling
from mmjax.modalities.base import Input
from mmjax.modalities.image import Image, ImageInput
from mmjax.modalities.text import Text, TextInput
from mmjax.model import ModelConfig, declare_model
from mmjax.nn.stream import Stream
from mmjax.nn.towers import Widths
from mmjax.nn.trunk import GroupConfig
from mmjax.objectives.base import Loss
from mmjax.objectives.coca import Coca
from mmjax.optim.reach import reach
from mmjax.task import Task, TaskConfig

WIDTH, HEADS, HIDDEN, LENGTH, VOCABULARY, ROWS = 8, 2, 6, 5, 16, 8
Parameters = dict[str, np.ndarray]


pytestmark = pytest.mark.usefixtures("x64")


def group(name: str, repeat: int = 2, kernel: str = "auto") -> tuple[GroupConfig, ...]:
    block = {"name": name, "num_heads": HEADS, "mlp_dim": HIDDEN, "attention_impl": kernel}
    return (GroupConfig(repeat, (block,)),)


def objective(**settings: Any) -> Coca:
    return Coca(
        **{
            "head": "coca", "embed_dim": 3, "positive_key": "concept", "queries": 3, "pooler_heads": HEADS,
            "unimodal": group("transformer"), "multimodal": group("cross_transformer"), **settings,
        }
    )  # fmt: skip


INPUTS = {
    "image": Input("image", Image(patch=2, max_positions=4), ImageInput(size=4)),
    "text": Input("text", Text(vocabulary=VOCABULARY, max_positions=8), TextInput(length=LENGTH)),
}


@cache
def declared(kernel: str = "auto") -> Declaration:
    config = ModelConfig(WIDTH, group("transformer", 1))
    modalities = {name: each.modality for name, each in INPUTS.items()}
    made = objective(
        unimodal=group("transformer", 2, kernel), multimodal=group("cross_transformer", 2, kernel)
    )
    return declare_model(config, modalities, [("coca", made.heads(Widths.same(WIDTH), INPUTS))])


def parameters(seed: int = 0) -> Parameters:
    rng = np.random.default_rng(seed)
    drawn = {n: 0.6 * rng.normal(size=s.shape) for n, s in declared().specs.items()}
    return {**drawn, "heads/coca/scale/log": np.array(1.0)}


def batch(rows: int = ROWS) -> dict[str, Any]:
    rng = np.random.default_rng(1)
    lengths = rng.integers(1, LENGTH + 1, rows)
    valid = np.arange(LENGTH) < lengths[:, None]
    ids = np.where(valid, rng.integers(4, VOCABULARY, (rows, LENGTH)), PAD_ID)
    ids[np.arange(rows), lengths - 1] = EOS_ID
    return Batch(
        inputs={
            "image": {"pixels": rng.integers(0, 256, (rows, 4, 4, 3)).astype(np.uint8)},
            "text": {"ids": ids.astype(np.int32), "valid": valid},
        },
        fields={"concept": np.array([0, 1, 0, 2, 3, 4, 4, 5][:rows], np.int32)},
        valid=np.arange(rows) != 2,
    )


# --- the statement in NumPy --------------------------------------------------------------------


def norm(x: np.ndarray, scale: np.ndarray, bias: Any = 0.0) -> np.ndarray:
    spread = np.sqrt(x.var(axis=-1, keepdims=True) + 1e-6)
    return (x - x.mean(axis=-1, keepdims=True)) / spread * scale + bias


def read(p: Parameters, at: str, x: np.ndarray, source: np.ndarray, sees: np.ndarray) -> np.ndarray:
    """Return attention of one example: queries of `x`, keys and values of `source`, where `sees[s, t]`."""
    out = np.zeros_like(x)
    for h in range(HEADS):
        q, k, v = (
            s @ p[f"{at}/{n}"][:, h] for s, n in ((x, "query"), (source, "key"), (source, "value"))
        )
        for s in range(len(x)):
            weight = np.exp(k @ q[s] / np.sqrt(WIDTH / HEADS)) * sees[s]
            out[s] += (weight / weight.sum()) @ v @ p[f"{at}/out"][h]
    return out


def layers(
    p: Parameters, at: str, x: np.ndarray, sees: np.ndarray, context: np.ndarray | None = None
) -> np.ndarray:
    """Return the blocks of a trunk, without its last norm."""
    inner = f"{at}/groups/0/blocks/0/"
    stacked = {n.removeprefix(inner): v for n, v in p.items() if n.startswith(inner)}
    for layer in range(len(stacked["mlp/up/kernel"])):
        own = {n: v[layer] for n, v in stacked.items()}
        normed = norm(x, own["attention_norm/scale"])
        x = x + read(own, "attention", normed, normed, sees)
        if context is not None:
            all_of_it = np.ones((len(x), len(context)))
            x = x + read(own, "cross", norm(x, own["cross_norm/scale"]), context, all_of_it)
        up = norm(x, own["mlp_norm/scale"]) @ own["mlp/up/kernel"]
        gelu = 0.5 * up * (1 + np.tanh(np.sqrt(2 / np.pi) * (up + 0.044715 * up**3)))
        x = x + gelu @ own["mlp/down/kernel"]
    return x


def final(p: Parameters, at: str, x: np.ndarray) -> np.ndarray:
    return norm(x, p[f"{at}/norm/scale"], p[f"{at}/norm/bias"])


def pooled(p: Parameters, at: str, x: np.ndarray) -> np.ndarray:
    queries = p[f"{at}/queries"]
    return final(p, at, read(p, f"{at}/attention", queries, x, np.ones((len(queries), len(x)))))


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.sqrt(x @ x + 1e-12)


@jax.jit
def stems(p: Any, inputs: Any) -> Any:
    """Return tokens of the pictures, and of the texts begun: their stems have tests of their own."""
    model = declared().merge(p)
    ids = inputs["text"]["ids"]
    before = jnp.concatenate([jnp.full((len(ids), 1), BOS_ID), ids[:, :-1]], axis=1)
    text = model.tokens("text", {**inputs["text"], "ids": before})
    return model.tokens("image", inputs["image"]).x_BSD, text.x_BSD


def of_rows(p: Parameters, given: Any, pooling: str) -> Iterator[tuple[Any, Any, np.ndarray]]:
    """Return of each row the vectors of image and text, and the cross-entropy of the text's tokens."""
    h, d = "heads/coca", "heads/coca/decoder"
    patches, tokens = (np.asarray(x) for x in stems(p, given.inputs))
    text = given.inputs["text"]
    for x, t, ids, valid in zip(patches, tokens, text["ids"], text["valid"], strict=True):
        encoded = final(p, "trunk", layers(p, "trunk", x, np.ones((len(x), len(x)))))
        context = pooled(p, f"{h}/generative", encoded)
        source = context if pooling == "cascade" else encoded
        image = pooled(p, f"{h}/contrastive", source)[0] @ p[f"{h}/image/kernel"]
        # The text alone, closed; then without what closes it, and with the picture.
        there = np.append(valid, True)
        sees = np.tril(np.ones((LENGTH + 1, LENGTH + 1))) * there
        first = layers(p, f"{d}/unimodal", np.vstack([t, p[f"{d}/close"]]), sees)
        whole = final(p, f"{d}/unimodal", first[-1]) @ p[f"{h}/text/kernel"]
        second = layers(p, f"{d}/multimodal", first[:-1], sees[:-1, :-1], context)
        logits = final(p, f"{d}/multimodal", second) @ p[f"{d}/logits/kernel"]
        costs = np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(LENGTH), ids]
        yield unit(image), unit(whole), costs[valid]


def contrastive(a: np.ndarray, b: np.ndarray, scale: float, concept: np.ndarray) -> float:
    total = 0.0
    for one, two in ((a, b), (b, a)):
        logs = scale * one @ two.T
        logs = logs - np.log(np.exp(logs).sum(axis=1, keepdims=True))
        total -= np.mean([logs[i][concept == concept[i]].mean() for i in range(len(a))])
    return total / 2


def reference(p: Parameters, given: Any, weights: tuple[float, float], pooling: str) -> float:
    rows = list(of_rows(p, given, pooling))
    kept = [row for row, valid in zip(rows, given.valid, strict=True) if valid]
    a, b = (np.stack([row[i] for row in kept]) for i in (0, 1))
    concept = given.fields["concept"][given.valid]
    scale = np.exp(float(p["heads/coca/scale/log"]))
    pair, caption = (
        contrastive(a, b, scale, concept),
        np.concatenate([row[2] for row in kept]).mean(),
    )
    return weights[0] * pair + weights[1] * caption


# --- the loss ----------------------------------------------------------------------------------


def loss_of(chosen: Coca, p: Any, given: Any) -> Loss:
    return chosen(declared().merge(p), given, jax.random.key(0))


@cache
def compiled() -> Any:
    """Return `(parameters, batch) -> ((value, loss), gradient)`."""

    def value(p: Any, given: Any) -> Any:
        loss = loss_of(objective(), p, given)
        return loss.value, loss

    return jax.jit(jax.value_and_grad(value, has_aux=True))


@pytest.mark.parametrize("pooling", ["cascade", "parallel"])
def test_the_loss_against_numpy(pooling: str) -> None:
    p, given = parameters(), batch()
    loss = jax.jit(lambda p, x: loss_of(objective(pooling=pooling), p, x))(p, given)
    assert loss.value.dtype == jnp.float64
    np.testing.assert_allclose(loss.value, reference(p, given, (1, 2), pooling), rtol=1e-10)
    np.testing.assert_allclose(
        loss.metrics["contrastive"] + 2 * loss.metrics["caption"], loss.value
    )
    expected = np.log(ROWS - 1) + 2 * np.log(VOCABULARY)
    np.testing.assert_allclose(loss.metrics["baseline"], expected, rtol=1e-6)


def test_each_mean_says_what_it_is_of() -> None:
    """The contrastive one of the valid rows, compared with each other; the captions' of their tokens."""
    p, given = parameters(), batch()
    (_, loss), _ = compiled()(p, given)
    count = {name: int(part.count) for name, part in loss.parts.items()}
    tokens = given.inputs["text"]["valid"][given.valid].sum()
    assert count == {"contrastive": ROWS - 1, "caption": tokens}
    assert {n: part.compares for n, part in loss.parts.items()} == {
        "contrastive": True, "caption": False,
    }  # fmt: skip
    for terms in ("", "baseline "):
        whole = loss.value if not terms else loss.metrics["baseline"]
        parts = sum(part.weight * loss.metrics[terms + n] for n, part in loss.parts.items())
        np.testing.assert_allclose(parts, whole, rtol=1e-6)


def test_contrastive_some_rows_at_a_time() -> None:
    p, given = parameters(), batch()
    loss = jax.jit(lambda p, x: loss_of(objective(chunk=4), p, x))(p, given)
    np.testing.assert_allclose(loss.value, reference(p, given, (1, 2), "cascade"), rtol=1e-10)


def test_the_gradient_along_directions() -> None:
    p, given = parameters(), batch()
    _, gradient = compiled()(p, given)
    for seed in range(3):
        rng = np.random.default_rng(seed)
        step = {n: 1e-6 * rng.normal(size=np.shape(v)) for n, v in p.items()}
        ends = [
            reference({n: v + sign * step[n] for n, v in p.items()}, given, (1, 2), "cascade")
            for sign in (1, -1)
        ]
        along = sum((np.asarray(g) * step[n]).sum() for n, g in gradient.items())
        np.testing.assert_allclose(along, (ends[0] - ends[1]) / 2, rtol=1e-5)
    assert all(np.any(np.asarray(g)) for n, g in gradient.items() if "positions" not in n)


def test_what_is_not_there_costs_nothing() -> None:
    """Padding and invalid rows: other contents, the same loss."""
    p, given = parameters(), batch()
    other = jax.tree.map(np.copy, given)
    text = other.inputs["text"]
    text["ids"] = np.where(text["valid"], text["ids"], 9).astype(np.int32)
    text["ids"][2], other.inputs["image"]["pixels"][2] = 7, 1
    values = [compiled()(p, x)[0][0] for x in (given, other)]
    assert values[0] == values[1]


@pytest.mark.parametrize(
    ("weights", "gone"), [((1.0, 0.0), "multimodal"), ((0.0, 2.0), "heads/coca/contrastive")]
)
def test_each_loss_alone(weights: tuple[float, float], gone: str) -> None:
    p, given = parameters(), batch()
    settings = {"contrastive_weight": weights[0], "caption_weight": weights[1]}
    loss = jax.jit(lambda p, x: loss_of(objective(**settings), p, x))(p, given)
    np.testing.assert_allclose(loss.value, reference(p, given, weights, "cascade"), rtol=1e-10)
    assert ("caption" in loss.metrics, "contrastive" in loss.metrics) == (
        weights[1] > 0,
        weights[0] > 0,
    )
    reached = reach(lambda p, x: loss_of(objective(**settings), p, x).value, p, given).names
    assert reached and not [n for n in reached if gone in n]


# --- who sees whom -----------------------------------------------------------------------------


@cache
def influences(kernel: str) -> Any:
    """Return gradients of everything the decoder makes by everything it is given, of one row: norms over the width."""

    def made(tokens_SD: Any, context_QD: Any, close_D: Any, valid_S: Any, p: Any) -> Any:
        p = {**p, "heads/coca/decoder/close": close_D}
        decoder = declared(kernel).merge(p).heads["coca"].decoder
        text = Stream(tokens_SD[None], valid_S[None], layout=(("text", LENGTH),))
        key = jax.random.key(0)
        found, _ = decoder.read(text, key)
        logits, _ = decoder.predict(found, Stream(context_QD[None], layout=(("image", 3),)), key)
        return found.tokens.x_BSD[0], found.whole_BD, logits[0]

    def norms(*given: Any) -> Any:
        each = jax.jacrev(made, argnums=(0, 1, 2))(*given)
        # Outputs [S or 1, width], inputs [T, width] (the closing token is one).
        return [
            [jnp.abs(j.reshape(*j.shape[:2], -1, WIDTH)).sum(axis=(1, 3)) for j in row]
            for row in each
        ]

    return jax.jit(norms)


@pytest.mark.parametrize(("length", "kernel"), [(LENGTH, "plain"), (3, "plain"), (3, "chunked")])
def test_nothing_flows_where_the_mask_forbids_it(length: int, kernel: str) -> None:
    rng = np.random.default_rng(5)
    tokens, context = rng.normal(size=(LENGTH, WIDTH)), rng.normal(size=(3, WIDTH))
    valid = np.arange(LENGTH) < length
    found = influences(kernel)(tokens, context, rng.normal(size=WIDTH), valid, parameters())
    (tokens_t, tokens_c, tokens_close), (whole_t, whole_c, whole_close), (logits_t, logits_c, logits_close) = (
        [np.asarray(x) > 0 for x in row] for row in found
    )  # fmt: skip
    rows = np.flatnonzero(valid)  # of what is not there nothing is promised
    causal = np.tril(np.ones((LENGTH, LENGTH), bool))
    # A text's tokens see those before, whether or not the picture has come in.
    for seen in (tokens_t, logits_t):
        np.testing.assert_array_equal(seen[rows], causal[rows])
    # The first half knows of no picture; the second sees all of it from every token.
    assert not tokens_c.any() and not whole_c.any() and logits_c[rows].all()
    # What closes a text sees its tokens, and none of them sees it.
    np.testing.assert_array_equal(whole_t[0], valid)
    assert whole_close.all() and not tokens_close.any() and not logits_close.any()


# --- in parts, and on meshes -------------------------------------------------------------------


def task(microbatches: int) -> Task:
    config = TaskConfig({}, {}, {}, ROWS, microbatches=microbatches)
    return Task("captions", config, INPUTS, objective(), None)  # type: ignore[arg-type]


def test_in_parts_as_at_once() -> None:
    p, given = parameters(), batch()
    (value, _), gradient = compiled()(p, given)

    @jax.jit
    def in_parts(p: Any, given: Any) -> Any:
        return loss_and_gradient(task(4), declared().merge, p, given, jax.random.key(0))

    loss, parted = in_parts(p, given)
    np.testing.assert_allclose(loss.value, value, rtol=1e-12)
    for name, expected in gradient.items():
        np.testing.assert_allclose(parted[name], expected, rtol=1e-9, atol=1e-12, err_msg=name)


@pytest.mark.parametrize(
    "sizes", [{"data": 2, "fsdp": 2, "tensor": 2}, {"data": 4, "sequence": 2}], ids=str
)
def test_on_a_mesh_as_on_one_device(sizes: dict[str, int]) -> None:
    p, given = parameters(), batch()
    (value, _), gradient = compiled()(p, given)
    mesh = make_mesh(MeshConfig(**sizes))
    specs = declared().specs
    placed = {n: jax.device_put(v, named(specs[n].axes, v.shape, mesh)) for n, v in p.items()}
    query = placed["heads/coca/decoder/multimodal/groups/0/blocks/0/cross/query"]
    parts = sizes.get("fsdp", 1), sizes.get("tensor", 1)
    part = (2, WIDTH // parts[0], HEADS // parts[1], WIDTH // HEADS)
    assert query.addressable_shards[0].data.shape == part
    rows = batch_sharding(mesh, ROWS, "test")
    with jax.set_mesh(mesh):
        (found, _), parted = compiled()(
            placed, jax.tree.map(lambda x: jax.device_put(x, rows), given)
        )
    np.testing.assert_allclose(found, value, rtol=1e-11)
    for name, expected in gradient.items():
        np.testing.assert_allclose(parted[name], expected, rtol=1e-9, atol=1e-11, err_msg=name)


# --- captions ----------------------------------------------------------------------------------


@jax.jit
def logits_of(p: Any, pixels: Any, ids: Any) -> Any:
    """Return logits of the token after each of `ids`, which begin with the begin token: the whole text every time."""
    model, chosen, key = declared().merge(p), objective(), jax.random.key(0)
    seen, _ = chosen.see(model, {"pixels": pixels}, key)
    text = model.tokens("text", {"ids": ids, "valid": jnp.ones_like(ids, bool)})
    decoder = model.heads["coca"].decoder
    found, _ = decoder.read(text, key)
    return decoder.predict(found, seen.context, key)[0]


@jax.jit
def cached_logits(p: Any, pixels: Any, ids: Any) -> Any:
    """Return the same as `logits_of`, token by token from what is held."""
    model, chosen = declared().merge(p), objective()
    seen, _ = chosen.see(model, {"pixels": pixels}, jax.random.key(0))
    decoder = model.heads["coca"].decoder
    held = decoder.init_cache(chosen._token(model, ids, 0), seen.context, LENGTH)

    def step(held: Any, at: Any) -> Any:
        logits, held = decoder.decode(chosen._token(model, ids, at), held, at)
        return held, logits

    return jax.lax.scan(step, held, jnp.arange(LENGTH))[1].swapaxes(0, 1)


def test_cached_decoding_is_the_whole_text_anew() -> None:
    p, pixels = parameters(), batch().inputs["image"]["pixels"]
    ids = np.random.default_rng(3).integers(2, VOCABULARY, (ROWS, LENGTH + 1))
    whole, cached = logits_of(p, pixels, ids[:, :-1]), cached_logits(p, pixels, ids)
    np.testing.assert_allclose(cached, whole, rtol=1e-10, atol=1e-12)


def telling_apart() -> Parameters:
    """Return parameters under which pictures matter: some texts end before their length is full, and some do not."""
    p, layers = parameters(5), "heads/coca/decoder/multimodal"
    value = f"{layers}/groups/0/blocks/0/cross/value"
    p[value] = 5 * p[value]
    for norm in (layers, "heads/coca/generative"):
        p[f"{norm}/norm/bias"] = 0 * p[f"{norm}/norm/bias"]
    return p


def test_greedy_captions_token_by_token() -> None:
    p, pixels = telling_apart(), batch().inputs["image"]["pixels"]
    keys = jax.random.split(jax.random.key(0), ROWS)
    found = jax.jit(
        lambda p, pixels: objective().captions(
            declared().merge(p), {"pixels": pixels}, LENGTH, keys
        )
    )(p, pixels)
    ids, ended = np.full((ROWS, LENGTH + 1), BOS_ID), np.zeros(ROWS, bool)
    for at in range(LENGTH):
        best = np.asarray(logits_of(p, pixels, ids[:, :-1]))[:, at].argmax(axis=1)
        ids[:, at + 1] = np.where(ended, PAD_ID, best)
        ended |= ids[:, at + 1] == EOS_ID
    np.testing.assert_array_equal(found, ids[:, 1:])
    lengths = (ids[:, 1:] != PAD_ID).sum(axis=1)
    assert ended.any() and not ended.all() and len(set(lengths)) > 2, (
        "the test sees both ways to end"
    )


def test_the_numbers_of_special_tokens_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Padding 9, begin 7 and end 5 in place of 0, 2 and 3: the same texts, renumbered, at the same cost."""
    number = np.arange(VOCABULARY)
    number[[0, 9, 2, 7, 3, 5]] = [9, 0, 7, 2, 5, 3]
    p, given = telling_apart(), batch()
    expected = written(declared(), p, given)
    p["stems/text/embedding"] = p["stems/text/embedding"][number]
    p["heads/coca/decoder/logits/kernel"] = p["heads/coca/decoder/logits/kernel"][:, number]
    given.inputs["text"]["ids"] = number[given.inputs["text"]["ids"]].astype(np.int32)
    monkeypatch.setattr(Text, "token_ids", lambda text: TokenIds(VOCABULARY, 9, 7, 5))
    found = written(declared.__wrapped__(), p, given)
    for name in ("written", "wanted"):
        np.testing.assert_array_equal(found[name], number[expected[name]])
    np.testing.assert_allclose(found["cost"], expected["cost"], rtol=1e-12)
    assert (expected["written"] == EOS_ID).any(), "the test sees an end"


def written(declaration: Declaration, p: Parameters, given: Any) -> Any:
    key = jax.random.key(0)
    call = jax.jit(lambda p, given: objective().write(declaration.merge(p), given, key))
    return jax.device_get(call(p, given))


def test_a_drawn_caption_does_not_depend_on_the_rows_beside_it() -> None:
    p, pixels = telling_apart(), batch().inputs["image"]["pixels"]
    drawn = objective(sampling=Sampling(temperature=1.0, top_k=4))
    keys = jax.random.split(jax.random.key(7), ROWS)
    call = jax.jit(
        lambda p, x, keys: drawn.captions(declared().merge(p), {"pixels": x}, LENGTH, keys)
    )
    whole = call(p, pixels, keys)
    order = np.array([5, 1, 4, 0, 0, 0, 2, 7])
    np.testing.assert_array_equal(call(p, pixels[order], keys[order]), whole[order])
    other = call(p, pixels, jax.random.split(jax.random.key(8), ROWS))
    assert np.any(np.asarray(other) != whole)


def test_what_it_writes_beside_what_is_given() -> None:
    p, given = parameters(), batch()
    made = jax.jit(lambda p, x: objective().write(declared().merge(p), x, jax.random.key(0)))(
        p, given
    )
    text = given.inputs["text"]
    np.testing.assert_array_equal(made["wanted"], text["ids"])
    np.testing.assert_array_equal(made["tokens"], text["valid"].sum(axis=1))
    costs = [row[2].sum() for row in of_rows(p, given, "cascade")]
    np.testing.assert_allclose(made["cost"], costs, rtol=1e-10)
    assert made["written"].shape == text["ids"].shape

    def show(p: Any, given: Any) -> Any:
        return objective().show(declared().merge(p), given, jax.random.key(0))

    shown = jax.eval_shape(show, p, given)
    assert tuple(shown) == objective().shows() and objective().writes() == ("image", "text")


def test_in_bfloat16_but_for_rounding() -> None:
    p, given = parameters(), batch()

    @jax.jit
    def call(p: Any, given: Any) -> Any:
        model, key = declared().merge(p, jnp.bfloat16), jax.random.key(0)
        return objective()(model, given, key), objective().write(model, given, key)

    with jax.enable_x64(False):
        loss, made = call({n: jnp.asarray(v, jnp.float32) for n, v in p.items()}, given)
    assert loss.value.dtype == made["cost"].dtype == jnp.float32
    expected = reference(p, given, (1, 2), "cascade")
    np.testing.assert_allclose(loss.value, expected, rtol=0.1)
    assert abs(loss.value - expected) > 1e-5 and made["written"].shape == (ROWS, LENGTH)


def test_mistakes() -> None:
    with pytest.raises(UserError, match="pooling is 'casade'.*'cascade'"):
        objective(pooling="casade")
    with pytest.raises(UserError, match="are both 0"):
        objective(contrastive_weight=0.0, caption_weight=0.0)
    with pytest.raises(UserError, match="queries is 0; it must be at least 1"):
        objective(queries=0)
    with pytest.raises(UserError, match="two modalities"):
        replace(objective(), modalities=("image",))
