"""The contract of `attend`, held by every implementation: the oracle's numbers, and relations between calls."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqattn.attention import attend
from seqattn.coordinates import Coordinates
from seqattn.dropout import Dropout
from seqattn.masks import Causal, NotPadding, Prefix, SameSegment, SlidingWindow
from tests import oracle
from tests.contract import (
    NUMPY_DTYPES,
    SHAPES,
    Shape,
    agrees_with_oracle,
    arrays,
    close,
    cotangents,
    every_implementation,
    forward,
    with_gradients,
)
from tests.contract import visible as random_pairs

GROUPED = SHAPES["grouped"]
SQUARE = Shape(T=7, S=7, N=4, K=2, H=3, V=5)
GARBAGE = {"nan": np.nan, "inf": np.inf, "minus_inf": -np.inf}


def _normal(*shape, seed=5, dtype="float32"):
    return np.random.default_rng(seed).normal(size=shape).astype(NUMPY_DTYPES[dtype])


def _equal(actual, expected):
    """Bitwise, but for the sign of zeros."""
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(a, b)


def _spoil(inputs, index, garbage, *names):
    """Copies with `garbage` at an index `[batch, token]`."""
    spoilt = {name: inputs[name].copy() for name in names}
    for x in spoilt.values():
        x[index] = garbage
    return inputs | spoilt


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


@every_implementation
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


@every_implementation
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


@every_implementation
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


@every_implementation
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


@every_implementation
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
    np.testing.assert_array_equal(by_key[1:], lower[1:])
    assert not by_key[0].any(), "the only weight of the first row is 1 whatever its key"


@every_implementation
def test_a_bias_of_minus_infinity_masks(implementation):
    inputs, directions, pairs = arrays(GROUPED), cotangents(GROUPED), random_pairs(GROUPED)
    pairs[0, :, :, 3] = False
    inputs = _spoil(_spoil(inputs, (0, 3), np.nan, "key"), (0, 3), np.inf, "value")
    expected = with_gradients(implementation, inputs, directions, mask=pairs)
    bias = np.where(pairs, np.float32(0), np.float32(-np.inf))
    results, gradients = with_gradients(implementation, inputs | {"bias": bias}, directions)
    assert not gradients.pop("bias")[~pairs].any()
    _equal((results, gradients), expected)
    assert np.isfinite(results[0]).all()


@every_implementation
@pytest.mark.parametrize("name", ["query", "key", "value"])
def test_a_visible_nan_is_not_hidden(implementation, name):
    """The rows that see it are NaN, and they alone."""
    spoilt = _spoil(arrays(SQUARE), (1, 4), np.nan, name)
    output, lse = forward(implementation, spoilt, mask=Causal())
    clean, _ = forward(implementation, arrays(SQUARE), mask=Causal())
    seen = np.zeros((2, 7), bool)
    seen[1, 4 : 5 if name == "query" else 7] = True
    assert np.isnan(output[seen]).all()
    assert np.isnan(lse[seen]).all()
    np.testing.assert_array_equal(output[~seen], clean[~seen])


@every_implementation
def test_huge_logits_do_not_overflow(implementation):
    agrees_with_oracle(implementation, SQUARE, scale=np.float32(1e3))


def _without_a_row(pairs):
    """The random pairs in which the second query of every row sees nothing."""
    assert not pairs[..., 1, :].any()
    return np.delete(np.arange(GROUPED.T), 1)


@every_implementation
def test_a1_a_row_that_sees_nothing_is_zero_and_finite(implementation):
    (output, lse), gradients = with_gradients(
        implementation, arrays(GROUPED), cotangents(GROUPED), mask=random_pairs(GROUPED)
    )
    assert not output[:, 1].any()
    assert np.all(lse[:, 1] == -np.inf)
    assert not gradients["query"][:, 1].any()
    assert all(np.isfinite(gradient).all() for gradient in (output, *gradients.values()))


@every_implementation
@pytest.mark.parametrize("garbage", GARBAGE.values(), ids=GARBAGE)
def test_a2_gradients_are_those_of_a_run_without_the_empty_row(implementation, garbage):
    pairs = random_pairs(GROUPED)
    rest = _without_a_row(pairs)
    inputs, (d_output, d_lse) = arrays(GROUPED), cotangents(GROUPED)
    spoilt = _spoil(inputs, (slice(None), 1), garbage, "query")
    _, gradients = with_gradients(implementation, spoilt, (d_output, d_lse), mask=pairs)
    without = inputs | {"query": inputs["query"][:, rest]}
    directions = d_output[:, rest], d_lse[:, rest]
    _, expected = with_gradients(implementation, without, directions, mask=pairs[:, :, rest])
    assert not gradients["query"][:, 1].any()
    close(gradients["query"][:, rest], expected["query"])
    close(gradients["key"], expected["key"])
    close(gradients["value"], expected["value"])


@every_implementation
def test_a3_an_empty_row_is_not_the_mean_of_the_padding(implementation):
    inputs = arrays(SQUARE)
    at = Coordinates.from_lengths(jnp.array([7, 0]), 7)
    output, lse = forward(implementation, inputs, mask=NotPadding(), q_at=at, kv_at=at)
    assert np.abs(inputs["value"][1].mean(axis=0)).max() > 0.1
    assert not output[1].any()
    assert np.all(lse[1] == -np.inf)
    close(output[0], oracle.attention(**{name: x[0] for name, x in inputs.items()}).output)


@every_implementation
@pytest.mark.parametrize("garbage", GARBAGE.values(), ids=GARBAGE)
def test_a4_nan_in_masked_value_leaves_no_trace(implementation, garbage):
    pairs = random_pairs(GROUPED)
    pairs[1, :, :, 4] = False
    clean = arrays(GROUPED)
    spoilt = _spoil(clean, (1, 4), garbage, "value")
    runs = [with_gradients(implementation, x, cotangents(GROUPED), mask=pairs) for x in (clean, spoilt)]
    _equal(runs[1], runs[0])
    assert not runs[1][1]["value"][1, 4].any()


@every_implementation
@pytest.mark.parametrize("garbage", GARBAGE.values(), ids=GARBAGE)
def test_a5_inf_in_masked_key_leaves_no_trace(implementation, garbage):
    at = Coordinates.from_lengths(jnp.array([7, 4]), 7)
    located = {"mask": Causal() & NotPadding(), "q_at": at, "kv_at": at}
    clean = arrays(SQUARE)
    spoilt = _spoil(clean, (1, slice(4, None)), garbage, "query", "key", "value")
    runs = [with_gradients(implementation, x, cotangents(SQUARE), **located) for x in (clean, spoilt)]
    _equal(runs[1], runs[0])
    assert all(np.isfinite(gradient).all() for gradient in runs[1][1].values())


@every_implementation
def test_a9_padding_and_causal_with_dropout(implementation):
    """One-hot values show what was dropped; the oracle with the same weights dropped gives values and gradients."""
    shape = Shape(T=7, S=7, N=4, K=2, H=3, V=7)
    at = Coordinates.from_lengths(jnp.array([7, 3]), 7)
    located = {"mask": Causal() & NotPadding(), "q_at": at, "kv_at": at}
    one_hot = np.broadcast_to(np.eye(7, dtype=np.float32)[:, None], (2, 7, 2, 7))

    def weights(dropout):
        inputs = arrays(shape) | {"value": one_hot}
        (output, _), _ = with_gradients(implementation, inputs, cotangents(shape), dropout=dropout, **located)
        return output.swapaxes(1, 2)

    dropout = Dropout(0.4, jax.random.key(0))
    pairs = oracle.pairs(lambda qp, qs, kp, ks: kp <= qp and qs and ks, at, at)[:, None]
    whole, dropped = oracle.attention(**arrays(shape), visible=pairs).weights, weights(dropout)
    kept = np.divide(dropped, whole, out=np.zeros_like(whole), where=whole != 0)
    np.testing.assert_allclose(kept[kept != 0], 1 / 0.6, rtol=1e-5)
    assert 0.25 < np.mean(kept[whole != 0] == 0) < 0.55
    assert not dropped[whole == 0].any()
    agrees_with_oracle(implementation, shape, pairs=pairs, kept=np.where(kept, 1 / 0.6, 0), dropout=dropout, **located)
    np.testing.assert_array_equal(dropped, weights(Dropout(0.4, jax.random.key(0))))
    assert np.any(dropped != weights(Dropout(0.4, jax.random.key(1))))


@every_implementation
def test_a11_more_queries_than_keys_aligned_at_the_end_leave_the_top_rows_empty(implementation):
    shape = Shape(T=11, S=7, N=4, K=2, H=3, V=5)
    located = {"mask": Causal(), "q_at": Coordinates.range(11, start=-4), "kv_at": Coordinates.range(7)}
    output, lse = forward(implementation, arrays(shape), **located)
    assert not output[:, :4].any()
    assert np.all(lse[:, :4] == -np.inf)
    agrees_with_oracle(implementation, shape, pairs=np.tril(np.ones((11, 7), bool), -4), **located)


@every_implementation
@pytest.mark.parametrize("dims", [{"S": 0}, {"T": 0}, {"batch": (0,)}, {"batch": (2, 0)}], ids=str)
def test_a15_no_keys_no_queries_no_rows(implementation, dims):
    shape = Shape(**{"T": 5, "S": 7, "N": 4, "K": 2, "H": 3, "V": 5} | dims)
    inputs, mask = arrays(shape), np.ones((shape.T, shape.S), bool)
    (output, lse), gradients = with_gradients(implementation, inputs, cotangents(shape), mask=mask)
    assert output.shape == (*shape.batch, shape.T, 4, 5)
    assert lse.shape == (*shape.batch, shape.T, 4)
    assert not output.any()
    assert np.all(lse == -np.inf)
    for name, gradient in gradients.items():
        assert gradient.shape == inputs[name].shape
        assert not gradient.any()
    located = {"q_at": Coordinates.range(shape.T), "kv_at": Coordinates.range(shape.S)}
    assert not forward(implementation, inputs, mask=Causal(), **located)[0].any()
    assert not forward(implementation, inputs)[0].any()


@every_implementation
def test_a15_one_token_sees_itself(implementation):
    inputs = arrays(Shape(T=1, S=1))
    output, _ = forward(implementation, inputs, mask=Causal() & SameSegment())
    close(output, np.repeat(inputs["value"], 2, axis=2))


@every_implementation
def test_a16_masked_logits_in_float16_are_no_number_to_add(implementation):
    """-1e9 is -inf in float16, and logits of 60,000 leave no room below them."""
    inputs = {name: x * np.float16(1 if name == "value" else 200) for name, x in arrays(GROUPED, "float16").items()}
    pairs, directions = random_pairs(GROUPED), cotangents(GROUPED, "float16")
    results, gradients = with_gradients(implementation, inputs, directions, mask=pairs)
    assert all(np.isfinite(x).all() for x in (results[0], *gradients.values()))
    expected = oracle.attention(**inputs, visible=pairs)
    assert np.abs(expected.lse[expected.lse > -np.inf]).max() > np.finfo(np.float16).max
    close(results[0], expected.output, "float16")


@every_implementation
def test_a17_masks_that_overlap_do_not_add_up(implementation):
    """Two additive masks of the lowest number would make -inf; and a bias of it beside a mask stays finite."""
    at = Coordinates.from_lengths(jnp.array([7, 2]), 7)
    located = {"mask": Causal() & NotPadding() & SlidingWindow(3) & SameSegment(), "q_at": at, "kv_at": at}
    pairs = oracle.pairs(lambda qp, qs, kp, ks: qs and ks and 0 <= qp - kp < 3, at, at)[:, None]
    lowest = np.where(np.triu(np.ones((7, 7), bool), 1), np.finfo(np.float32).min, np.float32(0))
    agrees_with_oracle(implementation, SQUARE, pairs=pairs, bias=lowest, **located)


@every_implementation
def test_a23_packed_texts_do_not_see_each_other(implementation):
    """Packed is separate, and a change of the first text leaves the second bitwise the same, forward and backward."""
    shape, first = Shape(batch=(1,), T=11, S=11, N=4, K=2, H=3, V=5), 4
    inputs, directions = arrays(shape), cotangents(shape)
    at = Coordinates.from_segments(jnp.array([[1] * first + [2] * first + [0] * 3]))
    located = {"mask": Causal() & SameSegment(), "q_at": at, "kv_at": at}
    results, gradients = with_gradients(implementation, inputs, directions, **located)
    for text in (slice(0, first), slice(first, 2 * first)):
        alone = {name: x[:, text] for name, x in inputs.items()}
        part = tuple(x[:, text] for x in directions)
        separate, separate_gradients = with_gradients(implementation, alone, part, mask=Causal())
        for actual, expected in zip(results, separate, strict=True):
            close(actual[:, text], expected)
        for name in inputs:
            close(gradients[name][:, text], separate_gradients[name], what=name)
    changed = {name: np.concatenate([x[:, :first] + 7, x[:, first:]], axis=1) for name, x in inputs.items()}
    again, again_gradients = with_gradients(implementation, changed, directions, **located)
    assert np.any(again[0][:, :first] != results[0][:, :first])
    for after, before in zip((*again, *again_gradients.values()), (*results, *gradients.values()), strict=True):
        np.testing.assert_array_equal(after[:, first:], before[:, first:])


@every_implementation
def test_a24_padding_on_the_left_on_the_right_and_none_are_the_same(implementation):
    single = arrays(Shape(batch=(1,), T=5, S=5, N=4, K=2, H=3, V=5))
    directions = cotangents(Shape(batch=(1,), T=5, S=5, N=4, K=2, H=3, V=5))
    mask = Causal() & SlidingWindow(3) & SameSegment()
    results, gradients = with_gradients(implementation, single, directions, mask=mask)
    for padding in (((0, 0), (2, 0)), ((0, 0), (0, 2))):
        text = slice(padding[1][0], padding[1][0] + 5)

        def pad(x, padding=padding):
            return np.pad(x, [*padding, *[(0, 0)] * (x.ndim - 2)], constant_values=9)

        at = Coordinates.from_present(jnp.asarray(np.pad(np.ones((1, 5), bool), padding)))
        located = {"mask": mask, "q_at": at, "kv_at": at}
        padded, padded_gradients = with_gradients(
            implementation, {name: pad(x) for name, x in single.items()}, tuple(map(pad, directions)), **located
        )
        for actual, expected in zip(padded, results, strict=True):
            close(actual[:, text], expected)
        for name in single:
            close(padded_gradients[name], np.pad(gradients[name], [*padding, (0, 0), (0, 0)]), what=name)
