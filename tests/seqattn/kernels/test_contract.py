"""The contract of `attend`, held by every implementation: the oracle's numbers, and relations between calls."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqattn.attention import attend
from seqattn.coordinates import Coordinates
from seqattn.dropout import Dropout
from seqattn.masks import Causal, NotPadding, Prefix, SameSegment, SlidingWindow
from seqattn.score_mod import ScoreFunction, compose
from seqattn.score_mods import RelativeBuckets, RelativePositions, SoftCap
from tests import oracle
from tests.contract import (
    GROUPED,
    NUMPY_DTYPES,
    SHAPES,
    SQUARE,
    Shape,
    agrees_with_oracle,
    arrays,
    close,
    cotangents,
    every_implementation,
    forward,
    kept,
    random_pairs,
    spoil,
    with_gradients,
)

eager = functools.partial(every_implementation, slow=["ring", "reference", "xla"])
"""As `every_implementation`, where op by op: the tiled kernel alone is not one expression."""
but_ring = functools.partial(every_implementation, slow=["ring"])
"""As `every_implementation`, for what needs many programs; test_ring.py has its own."""


def _normal(*shape, seed=5, dtype="float32"):
    return np.random.default_rng(seed).normal(size=shape).astype(NUMPY_DTYPES[dtype])


@every_implementation
@pytest.mark.parametrize("name", SHAPES)
def test_values_and_gradients_are_the_oracles(implementation, name):
    pairs = random_pairs(SHAPES[name])
    agrees_with_oracle(implementation, SHAPES[name], pairs=pairs, mask=pairs, bias=_normal(*SHAPES[name].pairs))


@every_implementation
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_values_and_gradients_of_each_dtype(implementation, dtype):
    with jax.enable_x64(dtype == "float64"):
        pairs, bias = random_pairs(GROUPED), _normal(*GROUPED.pairs, dtype=dtype)
        agrees_with_oracle(implementation, GROUPED, dtype, pairs=pairs, mask=pairs, bias=bias)


@every_implementation
def test_without_a_mask_every_key_is_seen(implementation):
    agrees_with_oracle(implementation, GROUPED, scale=np.float32(-0.7))


@every_implementation
def test_a_mask_over_coordinates_of_each_row(implementation):
    random = np.random.default_rng(3)
    q_at, kv_at = (
        Coordinates(*(random.integers(0, 4, (2, length)).astype(np.int32) for _ in range(2)))
        for length in (GROUPED.T, GROUPED.S)
    )
    pairs = oracle.pairs(lambda qp, qs, kp, ks: (kp <= qp and qs == ks != 0) or kp < 1, q_at, kv_at)
    mask = Causal() & SameSegment() | Prefix(1)
    assert not pairs.all(axis=-1).any()
    agrees_with_oracle(implementation, GROUPED, pairs=pairs[:, None], mask=mask, q_at=q_at, kv_at=kv_at)


@but_ring
@pytest.mark.parametrize(
    ("mask_shape", "bias_shape"),
    [
        ((7, 11), (1, 11)),
        ((7, 1), (2, 6, 1, 1)),
        ((2, 1, 1, 11), (1, 6, 7, 1)),
        ((1, 6, 7, 11), (7, 11)),
        ((1, 1, 1, 1), (2, 1, 7, 11)),
    ],
)
def test_mask_and_bias_broadcast(implementation, mask_shape, bias_shape):
    """A mask of size 1 along the keys hides whole rows."""
    mask = np.random.default_rng(0).random(mask_shape) < 0.8
    agrees_with_oracle(implementation, GROUPED, pairs=mask, mask=mask, bias=_normal(*bias_shape))


@every_implementation
def test_mask_and_bias_broadcast_over_two_batch_dims(implementation):
    shape = SHAPES["one_kv_head_and_two_batch_dims"]
    mask = np.random.default_rng(0).random((1, 2, 1, 5, 7)) < 0.8
    agrees_with_oracle(implementation, shape, pairs=mask, mask=mask, bias=_normal(3, 1, 2, 1, 7))


@every_implementation
def test_one_batch_row_of_coordinates_serves_all(implementation):
    q_at, kv_at = Coordinates.range(7, start=4), Coordinates.from_lengths([9], 11)
    kv_at = jax.tree.map(lambda x: x[0], kv_at)
    pairs = oracle.pairs(lambda qp, qs, kp, ks: kp <= qp and ks != 0, q_at, kv_at)
    agrees_with_oracle(implementation, GROUPED, pairs=pairs, mask=Causal() & NotPadding(), q_at=q_at, kv_at=kv_at)


@eager
def test_eager_is_jitted(implementation):
    inputs, (d_output, d_lse), mask = arrays(SQUARE), cotangents(SQUARE), Causal() & SlidingWindow(3)

    def loss(inputs):
        output, lse = attend(**inputs, mask=mask, implementation=implementation, return_lse=True)
        return jnp.sum(output * d_output) + jnp.sum(lse * d_lse), (output, lse)

    eager, (output, lse) = jax.grad(loss, has_aux=True)({name: jnp.asarray(x) for name, x in inputs.items()})
    results, gradients = with_gradients(implementation, inputs, (d_output, d_lse), mask=mask)
    for actual, expected in zip((output, lse), results, strict=True):
        close(actual, expected)
    for name in inputs:
        close(eager[name], gradients[name], what=name)


@but_ring
@pytest.mark.parametrize("axis", range(5))
def test_vmap_over_any_axis_is_a_loop(implementation, axis):
    """Values and gradients; the loop is the oracle with one more batch dim."""
    shape, count = Shape(batch=(3, 2), T=5, S=7, N=4, K=2, H=3, V=5), 3
    inputs, directions, pairs = arrays(shape), cotangents(shape), random_pairs(shape)
    expected = oracle.attention(**inputs, visible=pairs)
    gradients = oracle.attention_gradients(**inputs, d_output=directions[0], d_lse=directions[1], visible=pairs)
    lse_axis = min(axis, 3)

    def moved(tree, to=axis):
        return jax.tree.map(lambda x: np.moveaxis(x, 0, to), tree)

    @jax.jit
    def mapped(inputs, pairs, d_output, d_lse):
        def one(inputs, pairs, d_output, d_lse):
            def call(inputs):
                return attend(**inputs, mask=pairs, implementation=implementation, return_lse=True)

            results, pull_back = jax.vjp(call, inputs)
            return *results, pull_back((d_output, d_lse))[0]

        axes = (axis, lse_axis, axis)
        return jax.vmap(one, in_axes=(axis, axis, axis, lse_axis), out_axes=axes)(inputs, pairs, d_output, d_lse)

    output, lse, actual = mapped(moved(inputs), moved(pairs), moved(directions[0]), moved(directions[1], lse_axis))
    assert output.shape[axis] == count
    close(output, moved(expected.output))
    close(lse, moved(expected.lse, lse_axis))
    for name in inputs:
        close(actual[name], moved(gradients[name]), what=name)


@but_ring
def test_vmap_over_some_arguments_shares_the_others(implementation):
    """Three queries over one memory, with a prefix of their own: a leaf of the mask."""
    inputs, queries, prefixes = arrays(SQUARE), _normal(3, 2, 7, 4, 3), np.array([1, 4, 7])

    @jax.jit
    def mapped(queries, prefixes, key, value):
        def one(query, prefix):
            return attend(query, key, value, mask=Prefix(prefix), implementation=implementation)

        return jax.vmap(one)(queries, prefixes)

    output = mapped(queries, prefixes, inputs["key"], inputs["value"])
    for i, prefix in enumerate(prefixes):
        expected = oracle.attention(**inputs | {"query": queries[i]}, visible=np.arange(7) < prefix)
        close(output[i], expected.output)


@but_ring
def test_permuting_keys_with_their_coordinates_changes_nothing(implementation):
    inputs, directions, order = arrays(GROUPED), cotangents(GROUPED), np.random.default_rng(4).permutation(11)
    segment = np.array([[1] * 4 + [2] * 7, [1] * 6 + [0] * 5], np.int32)
    kv_at = Coordinates.from_segments(jnp.asarray(segment))
    located = {"mask": Causal() & SameSegment(), "q_at": jax.tree.map(lambda x: x[:, 2:9], kv_at)}
    bias = _normal(2, 6, 7, 11)
    moved = {"query": inputs["query"], "key": inputs["key"][:, order], "value": inputs["value"][:, order]}
    results, gradients = with_gradients(implementation, inputs | {"bias": bias}, directions, kv_at=kv_at, **located)
    moved_results, moved_gradients = with_gradients(
        implementation,
        moved | {"bias": bias[..., order]},
        directions,
        kv_at=jax.tree.map(lambda x: x[:, order], kv_at),
        **located,
    )
    for actual, expected in zip(moved_results, results, strict=True):
        close(actual, expected)
    close(moved_gradients["query"], gradients["query"])
    for name in ("key", "value"):
        close(moved_gradients[name], gradients[name][:, order], what=name)
    close(moved_gradients["bias"], gradients["bias"][..., order])


@every_implementation
def test_causality_by_gradients(implementation):
    """No output depends on a later key or value, and each depends on all earlier values."""
    inputs, direction = {name: x[0] for name, x in arrays(SQUARE).items()}, _normal(7, 4, 5)

    def each_row(inputs):
        output = attend(**inputs, mask=Causal(), implementation=implementation)
        return jnp.sum(output * direction, axis=(1, 2))

    gradients = jax.jit(jax.jacrev(each_row))(inputs)
    by_key, by_value = (np.any(np.asarray(gradients[name]) != 0, axis=(2, 3)) for name in ("key", "value"))
    lower = np.tril(np.ones((7, 7), bool))
    np.testing.assert_array_equal(by_value, lower)
    assert not by_key[~lower].any()
    assert by_key[1:][lower[1:]].all(), "only the first row, whose one weight is 1, may not depend on its key"


@every_implementation
def test_a_bias_of_minus_infinity_masks(implementation):
    inputs, directions, pairs = arrays(GROUPED), cotangents(GROUPED), random_pairs(GROUPED)
    pairs[0, :, :, 3] = False
    inputs = spoil(spoil(inputs, (0, 3), np.nan, "key"), (0, 3), np.inf, "value")
    expected = with_gradients(implementation, inputs, directions, mask=pairs)
    bias = np.where(pairs, np.float32(0), np.float32(-np.inf))
    results, gradients = with_gradients(implementation, inputs | {"bias": bias}, directions)
    assert not gradients.pop("bias")[~pairs].any()
    for actual, wanted in zip((*results, *gradients.values()), (*expected[0], *expected[1].values()), strict=True):
        close(actual, wanted)
    assert all(np.isfinite(gradient).all() for gradient in gradients.values())
    assert np.isfinite(results[0]).all()


@every_implementation
@pytest.mark.parametrize(("name", "heads"), [("query", slice(1, 2)), ("key", slice(2, 4)), ("value", slice(2, 4))])
def test_a_visible_nan_is_not_hidden(implementation, name, heads):
    """In head 1 of a query, or of a key that serves heads 2 and 3: the rows that see it are NaN, and they alone."""
    spoilt = spoil(arrays(SQUARE), (1, 4, 1), np.nan, name)
    output, lse = forward(implementation, spoilt, mask=Causal())
    clean, _ = forward(implementation, arrays(SQUARE), mask=Causal())
    seen = np.zeros((2, 7, 4), bool)
    seen[1, 4 : 5 if name == "query" else 7, heads] = True
    assert np.isnan(output[seen]).all()
    assert np.isnan(lse[seen]).all()
    np.testing.assert_array_equal(output[~seen], clean[~seen])


@every_implementation
def test_a_visible_nan_is_not_hidden_by_dropout(implementation):
    """Not even from the rows that see it and of which every weight is dropped."""
    spoilt = spoil(arrays(SQUARE), (1, 4, 1), np.nan, "value")
    dropout = Dropout(0.9, jax.random.key(0))
    seen = np.zeros((2, 4, 7), bool)
    seen[1, 2:4, 4:] = True
    assert (kept(dropout, SQUARE)[seen] == 0).all(axis=-1).any()
    output, _ = forward(implementation, spoilt, mask=Causal(), dropout=dropout)
    np.testing.assert_array_equal(np.isnan(output), np.broadcast_to(seen.swapaxes(1, 2)[..., None], output.shape))


@every_implementation
def test_huge_logits_do_not_overflow(implementation):
    agrees_with_oracle(implementation, SQUARE, scale=np.float32(1e3))


@but_ring
def test_score_mods_in_order_and_their_gradients(implementation):
    """Bias, cap, a function that closes over traced arrays, a table of distances, keys of distances, mask; by hand."""
    T, S, N, K, H = GROUPED.T, GROUPED.S, GROUPED.N, GROUPED.K, GROUPED.H
    inputs, directions, scale = arrays(GROUPED) | {"bias": _normal(2, 6, 7, 11)}, cotangents(GROUPED), 0.4
    learned = {"factor": _normal(N), "table": _normal(4, N, seed=6), "positions": _normal(5, H, seed=7)}
    random = np.random.default_rng(3)
    q_at, kv_at = (Coordinates(*random.integers(0, 6, (2, 2, n)).astype(np.int32)) for n in (T, S))

    @jax.jit
    def call(inputs, learned, directions, special, q_at, kv_at):
        def results(inputs, learned):
            def fn(score, query, key, head):
                return score * jnp.where(key.position == special, learned["factor"][head], 1)

            table, positions = RelativeBuckets(learned["table"], False, 3), RelativePositions(learned["positions"])
            options = {"mask": Causal() | Prefix(1), "q_at": q_at, "kv_at": kv_at, "scale": scale}
            mod = compose(SoftCap(0.8), fn, table, positions)
            return attend(**inputs, **options, score_mod=mod, implementation=implementation, return_lse=True)

        values, pull_back = jax.vjp(results, inputs, learned)
        return values, pull_back(directions)

    (output, lse), (by_inputs, by_learned) = call(inputs, learned, directions, 2, q_at, kv_at)
    query, key, bias = (inputs[name].astype(np.float64) for name in ("query", "key", "bias"))
    key = np.repeat(key, N // K, axis=2)
    distance = kv_at.position[:, None, :] - q_at.position[:, :, None]
    visible = np.broadcast_to(((distance <= 0) | (kv_at.position < 1)[:, None, :])[:, None], bias.shape)
    capped = np.tanh((scale * np.einsum("btnh,bsnh->bnts", query, key) + bias) / 0.8)
    special = (kv_at.position == 2)[:, None, None, :]
    factor = np.where(special, learned["factor"][:, None, None], 1)
    # Four buckets on one side: of 0, of 1, and two up to distance 3, whose border is 2 * (3 / 2) ** (1 / 2) = 2.45.
    bucket, nearest = np.clip(-distance, 0, 3), np.clip(distance, -2, 2) + 2
    by_distance = learned["positions"].astype(np.float64)[nearest]
    scores = 0.8 * capped * factor + np.moveaxis(learned["table"].astype(np.float64)[bucket], 3, 1)
    scores += scale * np.einsum("btnh,btsh->bnts", query, by_distance)
    nothing = {"query": 0 * query, "key": 0 * key[:, :, :K], "value": inputs["value"], "visible": visible}
    expected = oracle.attention(**nothing, bias=scores)
    close(output, expected.output)
    close(lse, expected.lse)
    gradients = oracle.attention_gradients(**nothing, bias=scores, d_output=directions[0], d_lse=directions[1])
    d_scores = gradients["bias"]
    d_raw = d_scores * factor * (1 - capped**2)
    d_query = scale * (np.einsum("bnts,bsnh->btnh", d_raw, key) + np.einsum("bnts,btsh->btnh", d_scores, by_distance))
    d_key = scale * np.einsum("bnts,btnh->bsnh", d_raw, query)
    one_hot = np.eye(5)[nearest]
    close(by_inputs["query"], d_query, what="query")
    close(by_inputs["key"], d_key.reshape(2, S, K, N // K, H).sum(axis=3), what="key")
    close(by_inputs["value"], gradients["value"], what="value")
    close(by_inputs["bias"], d_raw, what="bias")
    close(by_learned["factor"], np.sum(d_scores * 0.8 * capped * special, axis=(0, 2, 3)), what="factor")
    close(by_learned["table"], np.einsum("bnts,btsr->rn", d_scores, np.eye(4)[bucket]), what="table")
    close(by_learned["positions"], scale * np.einsum("bnts,btsr,btnh->rh", d_scores, one_hot, query), what="positions")


@eager
def test_the_gradient_reaches_a_closure_outside_of_jit(implementation):
    inputs = {name: jnp.asarray(x[0]) for name, x in arrays(SQUARE).items()}
    factor = jnp.asarray(_normal(4))

    def loss(factor, wrapped):
        def fn(score, query, key, head, factor=factor):
            return score * factor[head]

        mod = ScoreFunction(fn, factor) if wrapped else lambda *pair: fn(*pair)
        return jnp.sum(attend(**inputs, mask=Causal(), score_mod=mod, implementation=implementation) ** 2)

    leaf = jax.jit(jax.grad(loss), static_argnums=1)(factor, True)
    assert np.abs(leaf).min() > 0
    close(jax.grad(loss)(factor, False), leaf)


@every_implementation
def test_a_score_mod_of_minus_infinity_masks(implementation):
    """Row 1 sees nothing in any head, and no row sees key 3, which holds NaN and Inf."""
    inputs, directions, pairs = arrays(GROUPED), cotangents(GROUPED), random_pairs(Shape(batch=()))
    pairs[..., 3] = False
    inputs = spoil(spoil(spoil(inputs, (0, 3), np.nan, "key"), (0, 3), np.inf, "value"), (0, 1), np.nan, "query")
    expected = with_gradients(implementation, inputs, directions, mask=pairs[None])

    def hidden(score, query, key, head, pairs, shift):
        return jnp.where(pairs[head, query.position, key.position], score, -jnp.inf) + shift

    mod = ScoreFunction(hidden, pairs, np.float32(0))
    located = {"q_at": Coordinates.range(GROUPED.T), "kv_at": Coordinates.range(GROUPED.S)}
    results, gradients = with_gradients(implementation, inputs, directions, score_mod=mod, **located)
    assert not results[0][:, 1].any()
    assert np.all(results[1][:, 1] == -np.inf)
    for actual, wanted in zip((*results, *gradients.values()), (*expected[0], *expected[1].values()), strict=True):
        close(actual, wanted)
    assert all(np.isfinite(gradient).all() for gradient in gradients.values())
