"""The public functions of attention: what they check, and what they compute beside the contract of implementations."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqattn.attention import IMPLEMENTATIONS, attend, attend_scores, attention_weights, dot_product_attention
from seqattn.coordinates import Coordinates
from seqattn.dropout import Dropout
from seqattn.masks import Causal, NotPadding, Prefix, SlidingWindow
from tests import oracle
from tests.contract import SHAPES, Shape, arrays, close, cotangents, visible

SHAPE = SHAPES["grouped"]
B, T, S, N, K, H, V = *SHAPE.batch, SHAPE.T, SHAPE.S, SHAPE.N, SHAPE.K, SHAPE.H, SHAPE.V


def _ones(shape=SHAPE, dtype=jnp.float32):
    return {name: jnp.ones(x.shape, dtype) for name, x in arrays(shape).items()}


# What is refused. The message states the rule and the values.


@pytest.mark.parametrize("function", [attend, dot_product_attention])
def test_a6_a_mask_of_numbers_to_add_is_refused(function):
    """Cast to boolean, -inf would become True."""
    numbers = jnp.where(jnp.tri(T, S) > 0, 0.0, -jnp.inf)
    with pytest.raises(TypeError, match="mask must be boolean, True where a query may attend, got float32; .* a bias"):
        function(**_ones(), mask=numbers)


@pytest.mark.parametrize("function", [attend, dot_product_attention])
@pytest.mark.parametrize("dtype", [jnp.int32, jnp.uint8])
def test_a7_a_mask_of_integers_is_refused_and_the_convention_stated(function, dtype):
    with pytest.raises(TypeError, match="mask must be boolean, True where a query may attend, got u?int"):
        function(**_ones(), mask=jnp.ones((T, S), dtype))


@pytest.mark.parametrize("function", [attend, dot_product_attention])
def test_a8_a_mask_of_three_dims_beside_a_batch_is_refused(function):
    """[B, T, S] would be read as [N, T, S] where B equals N."""
    inputs = _ones(Shape(batch=(3,), T=5, S=7, N=3, K=1))
    for name, x in (("mask", jnp.ones((3, 5, 7), bool)), ("bias", jnp.ones((3, 5, 7)))):
        with pytest.raises(ValueError, match=rf"{name} \(3, 5, 7\) must be \[T, S\] \(5, 7\) or \[\*batch, N, T, S\]"):
            function(**inputs, **{name: x})


@pytest.mark.parametrize("shape", [(T, S + 1), (B, N, S, T), (B, K, T, S), (S,), (1, B, N, T, S)], ids=str)
@pytest.mark.parametrize("name", ["mask", "bias"])
def test_a_mask_or_bias_that_does_not_fit_is_refused(name, shape):
    with pytest.raises(ValueError, match=rf"{name} .* must be \[T, S\]"):
        attend(**_ones(), **{name: jnp.ones(shape, bool if name == "mask" else jnp.float32)})


def test_a_boolean_bias_is_refused():
    with pytest.raises(TypeError, match="bias must be floating .* got bool"):
        attend(**_ones(), bias=jnp.ones((T, S), bool))


def test_a26_integer_inputs_are_refused():
    for function in (attend, dot_product_attention):
        with pytest.raises(TypeError, match="query must be floating, got int32"):
            function(**_ones(dtype=jnp.int32))
    with pytest.raises(TypeError, match="dtypes must agree, got query float32, key bfloat16, value float32"):
        attend(**_ones() | {"key": jnp.ones((B, S, K, H), jnp.bfloat16)})


@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(6, 4), (2, 3), (1, 2), (0, 1)])
def test_a28_heads_that_do_not_divide_are_refused(num_heads, num_kv_heads):
    inputs = _ones(Shape(N=num_heads, K=num_kv_heads))
    with pytest.raises(ValueError, match=rf"num_heads \({num_heads}\) must be a multiple of .* \({num_kv_heads}\)"):
        attend(**inputs)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"query": (T, H)}, r"query must be \[\*batch, length, heads, dim\], got \(7, 5\)"),
        ({"query": (3, T, N, H)}, r"batch dims must agree, got query \(3, 7, 6, 5\)"),
        ({"query": (1, T, N, H)}, "batch dims must agree"),
        ({"value": (B, S + 1, K, V)}, "must agree but for the last dim"),
        ({"value": (B, S, N, V)}, "must agree but for the last dim"),
        ({"key": (B, S, K, H + 1)}, r"head_dim of query \(5\) and key \(6\) must be equal"),
    ],
    ids=str,
)
def test_shapes_that_do_not_fit_are_refused(changed, message):
    inputs = _ones() | {name: jnp.ones(shape) for name, shape in changed.items()}
    with pytest.raises(ValueError, match=message):
        attend(**inputs)


def test_the_alignment_of_two_lengths_is_never_guessed():
    for located in ({}, {"q_at": Coordinates.range(T)}, {"kv_at": Coordinates.range(S)}):
        with pytest.raises(ValueError, match="7 queries and 11 keys: say how they align with q_at and kv_at"):
            attend(**_ones(), mask=Causal(), **located)


def test_coordinates_that_would_be_ignored_are_refused():
    for mask in (None, jnp.ones((T, S), bool)):
        with pytest.raises(ValueError, match="q_at and kv_at only matter to a Mask"):
            attend(**_ones(), mask=mask, q_at=Coordinates.range(T), kv_at=Coordinates.range(S))


@pytest.mark.parametrize(
    ("q_at", "error", "message"),
    [
        (Coordinates.range(T + 1), ValueError, r"q_at \(8,\) must be \(7,\) or \(2, 7\)"),
        (Coordinates.from_lengths([1, 2, 3], T), ValueError, r"q_at \(3, 7\) must be"),
        (Coordinates(jnp.ones(T), jnp.ones(T)), TypeError, "q_at must hold signed integers .*, got float32"),
        (Coordinates(jnp.ones(T, jnp.uint32), jnp.ones(T, jnp.uint32)), TypeError, "q_at must hold signed integers .*, got uint32"),
    ],
    ids=["length", "batch", "floating", "unsigned"],
)
def test_coordinates_that_do_not_fit_are_refused(q_at, error, message):
    with pytest.raises(error, match=message):
        attend(**_ones(), mask=Causal(), q_at=q_at, kv_at=Coordinates.range(S))


@pytest.mark.parametrize("implementation", ["nothing", ["reference", "nothing"]])
def test_an_unknown_implementation_is_refused_with_the_known_ones(implementation):
    with pytest.raises(ValueError, match="'nothing' is not one of .*reference"):
        attend(**_ones(), implementation=implementation)


def test_a_list_of_implementations_is_taken_in_its_order():
    output = jax.jit(functools.partial(attend, implementation=list(IMPLEMENTATIONS)))(**arrays(SHAPE))
    np.testing.assert_array_equal(output, jax.jit(attend)(**arrays(SHAPE)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"local_window_size": -1}, r"local_window_size \(-1, -1\) must not be negative"),
        ({"local_window_size": (2, -1)}, r"local_window_size \(2, -1\)"),
        ({"local_window_size": (-3, 1)}, r"local_window_size \(-3, 1\)"),
        ({"key_value_seq_lengths": jnp.array([S + 1, 1])}, r"a length \(12\) exceeds max_length \(11\)"),
        ({"query_seq_lengths": jnp.array([T + 1, 1])}, r"a length \(8\) exceeds max_length \(7\)"),
        ({"query_seq_lengths": jnp.array([-1, 1])}, "lengths must not be negative, got -1"),
        ({"query_seq_lengths": jnp.array([1])}, r"query_seq_lengths \(1,\) must have one length for each row"),
    ],
    ids=str,
)
def test_a25_windows_and_lengths_that_mean_nothing_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        dot_product_attention(**_ones(), **options)
    for size in (0, -1):
        with pytest.raises(ValueError, match=rf"sliding window \({size}\) must be an integer of at least 1"):
            SlidingWindow(size)


def test_lengths_that_are_no_integers_are_refused():
    with pytest.raises(TypeError, match="key_value_seq_lengths must be integers, got float32"):
        dot_product_attention(**_ones(), key_value_seq_lengths=jnp.ones(B))


# Causal alignment is an argument.


def test_a10_causal_is_aligned_by_coordinates_first_with_first_or_last_with_last():
    inputs = arrays(SHAPE)

    @jax.jit
    def call(inputs, start):
        return attend(**inputs, mask=Causal(), q_at=Coordinates.range(T, start=start), kv_at=Coordinates.range(S))

    for start in (0, S - T):
        expected = oracle.attention(**inputs, visible=np.tril(np.ones((T, S), bool), start))
        close(call(inputs, start), expected.output, what=f"start {start}")
    top_left = jax.jit(functools.partial(dot_product_attention, is_causal=True))(**inputs)
    np.testing.assert_array_equal(top_left, call(inputs, 0))


# The weights, and scores of any origin.


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_attention_weights_are_the_oracles(dtype):
    inputs, pairs = arrays(SHAPE, dtype), visible(SHAPE)
    bias = np.random.default_rng(7).normal(size=(T, S)).astype(np.float32)
    options = {"mask": pairs, "bias": bias, "scale": np.float32(0.3)}
    weights = jax.jit(attention_weights)(inputs["query"], inputs["key"], **options)
    assert weights.dtype == jnp.float32
    close(weights, oracle.attention(**inputs, visible=pairs, bias=bias, scale=np.float32(0.3)).weights)
    np.testing.assert_allclose(weights.sum(axis=-1), pairs.any(axis=-1), rtol=1e-5)


def test_attention_weights_of_masked_keys_are_zero_whatever_they_hold():
    at = Coordinates.from_present(jnp.arange(S + 2) < S)
    inputs = arrays(Shape(batch=(), T=S + 2, S=S + 2))
    inputs["key"][S:] = np.nan
    located = {"mask": NotPadding(), "q_at": at, "kv_at": at}
    weights = jax.jit(attention_weights)(inputs["query"], inputs["key"], **located)
    np.testing.assert_allclose(weights.sum(axis=-1)[:, :S], 1, rtol=1e-5)
    assert not weights[..., S:].any()
    assert not weights[:, S:].any()


def _scores_case(shape):
    scores = np.random.default_rng(8).normal(size=shape.pairs).astype(np.float32)
    flat = {"query": np.zeros((*shape.batch, shape.T, shape.N, 1)), "key": np.zeros((*shape.batch, shape.S, shape.K, 1))}
    return scores, arrays(shape)["value"], flat


@pytest.mark.parametrize("name", ["grouped", "one_kv_head_and_two_batch_dims", "as_many_kv_heads_and_no_batch"])
def test_attend_scores_is_attention_with_these_logits(name):
    shape = SHAPES[name]
    (scores, value, zeros), pairs, (d_output, _) = _scores_case(shape), visible(shape), cotangents(shape)
    scores = np.where(pairs, scores, np.float32(np.nan))

    @jax.jit
    def call(scores, value, pairs):
        output, pull_back, weights = jax.vjp(lambda *x: attend_scores(*x, mask=pairs), scores, value, has_aux=True)
        return output, weights, pull_back(d_output)

    output, weights, (d_scores, d_value) = call(scores, value, pairs)
    hidden = np.where(pairs, scores, 0)
    expected = oracle.attention(**zeros, value=value, bias=hidden, visible=pairs)
    gradients = oracle.attention_gradients(
        **zeros, value=value, bias=hidden, visible=pairs, d_output=d_output, d_lse=np.zeros(d_output.shape[:-1])
    )
    close(output, expected.output)
    close(weights, expected.weights)
    close(d_scores, gradients["bias"])
    close(d_value, gradients["value"])


def test_attend_scores_drops_weights_and_hides_masked_values():
    scores, value, zeros = _scores_case(SHAPE)
    at = Coordinates.from_lengths([S, 4], S)
    located = {"mask": NotPadding(), "q_at": Coordinates.range(T), "kv_at": at}
    pairs = np.asarray(at.segment)[:, None, None] != 0
    spoilt = value.copy()
    spoilt[1, 4:] = np.nan
    dropout = Dropout(0.4, jax.random.key(0))

    @jax.jit
    def call(scores, value, dropout):
        return *attend_scores(scores, value, dropout=dropout, **located), dropout(jnp.ones(SHAPE.pairs))

    output, weights, kept = call(scores, spoilt, dropout)
    expected = oracle.attention(**zeros, value=value, bias=scores, visible=pairs, kept=kept)
    close(output, expected.output)
    close(weights, expected.weights, what="weights are those before dropout")


@pytest.mark.parametrize(
    ("scores", "value", "error", "message"),
    [
        ((B, N, T, S), (B, S + 1, K, V), ValueError, r"scores \(2, 6, 7, 11\) must be \[\*batch, N, T, S\] for value"),
        ((N, T, S), (B, S, K, V), ValueError, "must be"),
        ((3, N, T, S), (B, S, K, V), ValueError, "must be"),
        ((B, 5, T, S), (B, S, K, V), ValueError, r"num_heads \(5\) must be a multiple of num_kv_heads \(3\)"),
    ],
    ids=str,
)
def test_scores_that_do_not_fit_are_refused(scores, value, error, message):
    with pytest.raises(error, match=message):
        attend_scores(jnp.ones(scores), jnp.ones(value))


def test_integer_scores_are_refused():
    with pytest.raises(TypeError, match="scores must be floating, got int32"):
        attend_scores(jnp.ones((B, N, T, S), jnp.int32), jnp.ones((B, S, K, V)))


# The drop-in for jax.nn, wherever jax.nn is right: rows that see something, finite inputs.

EVEN = Shape(batch=(3,), T=7, S=11, N=6, K=2, H=5, V=5)
LENGTHS = {"query_seq_lengths": np.array([7, 3, 5], np.int32), "key_value_seq_lengths": np.array([2, 11, 5], np.int32)}
BIAS = np.random.default_rng(9).normal(size=(3, 6, 7, 11)).astype(np.float32)
MASK = np.random.default_rng(9).random((3, 1, 7, 11)) < 0.7


def _lengths(b, t, s):
    return t < LENGTHS["query_seq_lengths"][b] and s < LENGTHS["key_value_seq_lengths"][b]


DROP_IN = {
    "plain": ({}, lambda b, t, s: True),
    "scale": ({"scale": 0.1}, lambda b, t, s: True),
    "causal": ({"is_causal": True}, lambda b, t, s: s <= t),
    "window": ({"local_window_size": 2}, lambda b, t, s: abs(t - s) <= 2),
    "sides": ({"local_window_size": (3, 1)}, lambda b, t, s: t - 3 <= s <= t + 1),
    "key lengths": (
        {"key_value_seq_lengths": LENGTHS["key_value_seq_lengths"]},
        lambda b, t, s: s < LENGTHS["key_value_seq_lengths"][b],
    ),
    "lengths": (LENGTHS, _lengths),
    "mask": ({"mask": MASK}, lambda b, t, s: MASK[b, 0, t, s]),
    "bias": ({"bias": BIAS}, lambda b, t, s: True),
    "plane": ({"mask": MASK[1, 0], "bias": BIAS[1, 2], "is_causal": True}, lambda b, t, s: MASK[1, 0, t, s] and s <= t),
    "plane and lengths": ({"mask": MASK[1, 0]} | LENGTHS, lambda b, t, s: MASK[1, 0, t, s] and _lengths(b, t, s)),
    "all": (
        {"bias": BIAS[:1], "mask": MASK, "is_causal": True, "local_window_size": (4, 9), "scale": 0.5} | LENGTHS,
        lambda b, t, s: MASK[b, 0, t, s] and s <= t and t - s <= 4 and _lengths(b, t, s),
    ),
}


@pytest.mark.parametrize("name", DROP_IN)
def test_dot_product_attention_is_that_of_jax(name):
    options, predicate = DROP_IN[name]
    inputs, traced = arrays(EVEN), {key: x for key, x in options.items() if isinstance(x, np.ndarray)}
    static = {key: x for key, x in options.items() if key not in traced} | {"return_residual": True}
    ours = jax.jit(functools.partial(dot_product_attention, **static))(**inputs, **traced)
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        theirs = jax.jit(functools.partial(jax.nn.dot_product_attention, **static))(**inputs, **traced)
    pairs = np.array([[[[predicate(b, t, s) for s in range(11)] for t in range(7)]] for b in range(3)])
    expected = oracle.attention(
        **inputs, visible=pairs, bias=options.get("bias", 0.0), scale=options.get("scale", EVEN.H**-0.5)
    )
    sees = np.broadcast_to(pairs.any(axis=-1).swapaxes(1, 2), ours[1].shape)
    close(ours[0], expected.output)
    close(ours[1], expected.lse)
    close(np.asarray(theirs[0])[sees], np.asarray(ours[0])[sees], what="output of jax")
    close(np.asarray(theirs[1])[sees], np.asarray(ours[1])[sees], what="residual of jax")


def test_dot_product_attention_without_a_batch_is_that_of_jax():
    inputs = arrays(Shape(batch=(), T=7, S=11, N=6, K=2, H=5, V=5))
    options = {"bias": BIAS[0], "mask": MASK[0], "key_value_seq_lengths": np.array([9], np.int32)}
    ours = jax.jit(functools.partial(dot_product_attention, is_causal=True))(**inputs, **options)
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        theirs = jax.jit(functools.partial(jax.nn.dot_product_attention, is_causal=True))(**inputs, **options)
    pairs = MASK[0] & np.tri(7, 11, dtype=bool) & (np.arange(11) < 9)
    sees = pairs.any(axis=-1)[0]
    close(np.asarray(ours)[sees], np.asarray(theirs)[sees])
    close(ours, oracle.attention(**inputs, bias=BIAS[0], visible=pairs).output)


def test_dot_product_attention_takes_the_arguments_of_jax():
    ours, theirs = (inspect.signature(f).parameters for f in (dot_product_attention, jax.nn.dot_product_attention))
    assert [(p.name, p.kind, p.default) for p in ours.values()] == [
        (p.name, p.kind, p.default) for p in theirs.values()
    ]


@pytest.mark.usefixtures("as_users_call_it")
@pytest.mark.parametrize("function", [attend, dot_product_attention])
def test_numpy_arrays_and_lists_are_taken_as_by_jax(function):
    inputs = arrays(SHAPE)
    pairs, bias = visible(SHAPE), np.ones((T, S))
    expected = oracle.attention(**inputs, visible=pairs, bias=bias).output
    close(function(**inputs, mask=pairs.tolist(), bias=bias.tolist()), expected)
    close(function(**inputs, mask=pairs, bias=bias), expected)


def test_a_prefix_of_each_row_is_a_vmap_over_the_mask():
    inputs, lengths = arrays(Shape(T=S)), np.array([2, 5])
    output = jax.jit(jax.vmap(lambda inputs, length: attend(**inputs, mask=Causal() | Prefix(length))))(inputs, lengths)
    index = np.arange(S)
    pairs = (index <= index[:, None]) | (index < lengths[:, None, None])
    close(output, oracle.attention(**inputs, visible=pairs[:, None]).output)
