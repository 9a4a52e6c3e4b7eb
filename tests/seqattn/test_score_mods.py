"""Each score modification against its formula in NumPy float64, and its gradients against those made by hand."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqattn.attention import attend, attention_weights
from seqattn.coordinates import Coordinates
from seqattn.masks import Causal
from seqattn.score_mod import ScoreFunction, compose
from seqattn.score_mods import Alibi, RelativeBuckets, RelativePositions, SoftCap
from tests import oracle
from tests.contract import GROUPED, arrays, close, cotangents

N, H, T, S = GROUPED.N, GROUPED.H, GROUPED.T, GROUPED.S
RANDOM = np.random.default_rng(11)
Q_AT = Coordinates(RANDOM.integers(0, 9, (2, T)).astype(np.int32), np.ones((2, T), np.int32))
KV_AT = Coordinates(RANDOM.integers(0, 9, (2, S)).astype(np.int32), np.ones((2, S), np.int32))
DISTANCE = KV_AT.position[:, None, :].astype(int) - Q_AT.position[:, :, None]  # [B, T, S]


def _normal(*shape):
    return RANDOM.normal(size=shape).astype(np.float32)


def _inputs():
    return {name: jnp.asarray(x) for name, x in arrays(GROUPED).items()}


def _t5_bucket(distance, num_buckets, max_distance, bidirectional):
    """As in the code of T5, one distance at a time, in float64."""
    bucket, n = 0, -distance
    if bidirectional:
        num_buckets //= 2
        bucket += num_buckets if n < 0 else 0
        n = abs(n)
    else:
        n = max(n, 0)
    exact = num_buckets // 2
    if n < exact:
        return bucket + n
    # Above all rounding, but below the next whole number: the powers that fall on a border are exact.
    part = math.log(n / exact) / math.log(max_distance / exact) * (num_buckets - exact) + 1e-9
    return bucket + min(exact + int(part), num_buckets - 1)


def _shaw(table):
    """The key of each pair's distance, `[B, T, S, N, H]`: the array that the library never builds."""
    farthest = table.shape[0] // 2
    by_head = np.broadcast_to(table[:, None] if table.ndim == 2 else table, (len(table), N, H))
    return by_head[np.clip(DISTANCE, -farthest, farthest) + farthest].astype(np.float64)


def _scores(inputs, scale):
    key = np.repeat(np.asarray(inputs["key"], np.float64), N // GROUPED.K, axis=2)
    return scale * np.einsum("btnh,bsnh->bnts", np.asarray(inputs["query"], np.float64), key)


def _attended(scores, value, visible):
    """Output and log-sum-exp for given scores, and what gradients arrive at the scores."""
    zeros = {"query": np.zeros((2, T, N, 1)), "key": np.zeros((2, S, GROUPED.K, 1)), "value": value}
    bias = {"bias": np.where(visible, scores, 0), "visible": visible}
    d_output, d_lse = cotangents(GROUPED)
    gradients = oracle.attention_gradients(**zeros, **bias, d_output=d_output, d_lse=d_lse)
    return oracle.attention(**zeros, **bias), gradients["bias"]


def _scatter(index, d_scores, size):
    """The sum of `d_scores` `[B, N, T, S]` over the pairs of each index `[B, T, S]`: `[size, N]`."""
    return np.stack([np.einsum("bnts,bts->n", d_scores, index == i) for i in range(size)])


def _alibi(inputs, slopes):
    distance = np.abs(DISTANCE)[:, None]
    return _scores(inputs, 0.3) - slopes[:, None, None] * distance, lambda d: -np.sum(d * distance, axis=(0, 2, 3))


def _buckets(bidirectional):
    def expected(inputs, table):
        index = np.vectorize(lambda n: _t5_bucket(n, len(table), 5, bidirectional))(DISTANCE)
        return _scores(inputs, 0.3) + np.moveaxis(table[index], 3, 1), lambda d: _scatter(index, d, len(table))

    return expected


def _positions(inputs, table):
    query = np.asarray(inputs["query"], np.float64)
    scores = _scores(inputs, 0.3) + 0.3 * np.einsum("btnh,btsnh->bnts", query, _shaw(table))

    def by_table(d):
        index = np.clip(DISTANCE, -2, 2) + 2
        each = [0.3 * np.einsum("bnts,bts,btnh->nh", d, index == i, query) for i in range(5)]
        return np.stack(each) if table.ndim == 3 else np.stack(each).sum(axis=1)

    return scores, by_table


def _function(inputs, factor):
    scores, ahead = _scores(inputs, 0.3), DISTANCE[:, None] > 0
    times = np.where(ahead, factor[:, None, None], 1)
    return scores * times, lambda d: np.sum(d * scores * ahead, axis=(0, 2, 3))


def _with_factor(factor):
    def fn(score, query, key, head, factor):
        return jnp.where(key.position > query.position, score * factor[head], score)

    return ScoreFunction(fn, factor)


# The score modification made from its array, the array, and what both are in NumPy.
KINDS = {
    "alibi": (Alibi, _normal(N), _alibi),
    "buckets": (lambda x: RelativeBuckets(x, max_distance=5), _normal(8, N), _buckets(True)),
    "buckets of a decoder": (
        lambda x: RelativeBuckets(x, bidirectional=False, max_distance=5),
        _normal(7, N),
        _buckets(False),
    ),
    "positions": (RelativePositions, _normal(5, H), _positions),
    "positions of each head": (RelativePositions, _normal(5, N, H), _positions),
    "function": (_with_factor, _normal(N), _function),
}


@pytest.mark.parametrize("name", KINDS)
def test_values_and_the_gradient_of_the_array_are_those_of_the_formula(name):
    make, array, expected = KINDS[name]
    inputs, directions = _inputs(), cotangents(GROUPED)
    visible = (DISTANCE <= 3)[:, None] & np.ones((1, N, 1, 1), bool)

    @jax.jit
    def call(array, inputs, mask, q_at, kv_at):
        def results(array):
            located = {"mask": mask, "q_at": q_at, "kv_at": kv_at, "scale": 0.3}
            return attend(**inputs, score_mod=make(array), **located, implementation="reference", return_lse=True)

        values, pull_back = jax.vjp(results, array)
        return values, pull_back(directions)[0]

    (output, lse), gradient = call(array, inputs, visible, Q_AT, KV_AT)
    scores, by_array = expected(inputs, array.astype(np.float64))
    attended, d_scores = _attended(scores, inputs["value"], visible)
    close(output, attended.output)
    close(lse, attended.lse)
    close(gradient, by_array(d_scores))


def test_the_gradient_of_the_query_passes_through_the_rows_too():
    inputs, table = _inputs(), _normal(5, N, H)
    d_output, _ = cotangents(GROUPED)

    @jax.jit
    @jax.grad
    def gradient(query):
        mod = RelativePositions(table)
        output = attend(query, inputs["key"], inputs["value"], score_mod=mod, q_at=Q_AT, kv_at=KV_AT, scale=0.3)
        return jnp.sum(output * d_output)

    scores, _ = _positions(inputs, table)
    zeros = {"query": np.zeros((2, T, N, 1)), "key": np.zeros((2, S, GROUPED.K, 1)), "value": inputs["value"]}
    d_scores = oracle.attention_gradients(**zeros, bias=scores, d_output=d_output, d_lse=np.zeros((2, T, N)))["bias"]
    key = np.repeat(np.asarray(inputs["key"], np.float64), N // GROUPED.K, axis=2)[:, None] + _shaw(table)
    close(gradient(inputs["query"]), 0.3 * np.einsum("bnts,btsnh->btnh", d_scores, key))


def test_softcap_caps_and_hands_gradients_through():
    inputs, directions = _inputs(), cotangents(GROUPED)

    @jax.jit
    def call(bias):
        def results(bias):
            return attend(**inputs, bias=bias, score_mod=SoftCap(0.7), return_lse=True)

        values, pull_back = jax.vjp(results, bias)
        return values, pull_back(directions)[0]

    bias = _normal(2, N, T, S)
    (output, lse), gradient = call(bias)
    raw = _scores(inputs, H**-0.5) + bias
    attended, d_scores = _attended(0.7 * np.tanh(raw / 0.7), inputs["value"], np.ones(raw.shape, bool))
    close(output, attended.output)
    close(lse, attended.lse)
    close(gradient, d_scores / np.cosh(raw / 0.7) ** 2)


@pytest.mark.parametrize(
    ("num_heads", "expected"),
    [
        (1, [2**-8]),
        (2, [2**-4, 2**-8]),
        (3, [2**-4, 2**-8, 2**-2]),
        (8, [1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32, 1 / 64, 1 / 128, 1 / 256]),
        (12, [*(2.0**-n for n in range(1, 9)), 2**-0.5, 2**-1.5, 2**-2.5, 2**-3.5]),
    ],
)
def test_the_slopes_of_alibi_are_those_of_the_paper(num_heads, expected):
    np.testing.assert_allclose(Alibi.geometric(num_heads), expected, rtol=1e-6)


def test_alibi_takes_its_slopes_from_the_heads_of_the_call():
    inputs, located = _inputs(), {"q_at": Q_AT, "kv_at": KV_AT}
    call = jax.jit(lambda mod: attend(**inputs, score_mod=mod, **located))
    np.testing.assert_array_equal(call(Alibi()), call(Alibi(Alibi.geometric(N))))


@pytest.mark.parametrize("num_buckets", [8, 32])
@pytest.mark.parametrize("max_distance", [20, 128])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_buckets_are_those_of_t5(num_buckets, max_distance, bidirectional):
    distance = np.arange(-max_distance - 7, max_distance + 8)
    mod = RelativeBuckets(np.zeros((num_buckets, 1)), bidirectional, max_distance)
    expected = [_t5_bucket(int(n), num_buckets, max_distance, bidirectional) for n in distance]
    np.testing.assert_array_equal(mod.buckets(jnp.asarray(distance), num_buckets), expected)
    if num_buckets == 8:  # none of these is too narrow for a whole number; the one of distance 0 ahead stays empty
        assert set(expected) == set(range(8)) - ({4} if bidirectional else set())


def test_positions_need_no_array_of_all_pairs_and_dims():
    """T x S x H elements are in no intermediate value."""
    inputs, table = _inputs(), jnp.ones((5, H))
    call = functools.partial(attend, implementation="reference", q_at=Q_AT, kv_at=KV_AT)
    jaxpr = jax.make_jaxpr(lambda table: call(**inputs, score_mod=RelativePositions(table)))(table)
    shapes = [var.aval.shape for equation in jaxpr.eqns for var in equation.outvars]
    assert (2, N, T, S) in shapes
    assert not [shape for shape in shapes if {T, S, H} <= set(shape)]


def test_what_is_composed_is_applied_in_order():
    inputs, located = _inputs(), {"q_at": Q_AT, "kv_at": KV_AT, "scale": 0.3}
    first, second, slopes = _normal(5, H), _normal(3, N, H), _normal(N)
    cap, alibi = SoftCap(0.9), Alibi(slopes)
    mods = [
        RelativePositions(first).then(cap).then(RelativePositions(second)).then(alibi),
        compose(RelativePositions(first), compose(cap, RelativePositions(second)), alibi),
    ]
    query = np.asarray(inputs["query"], np.float64)
    two, four = (0.3 * np.einsum("btnh,btsnh->bnts", query, _shaw(table)) for table in (first, second))
    scores = 0.9 * np.tanh((_scores(inputs, 0.3) + two) / 0.9) + four
    scores = scores - slopes[:, None, None] * np.abs(DISTANCE)[:, None]
    expected, _ = _attended(scores, inputs["value"], np.ones(scores.shape, bool))
    for mod in mods:
        close(jax.jit(functools.partial(attend, **inputs, **located))(score_mod=mod), expected.output)


def test_gradients_reach_what_a_plain_function_closes_over():
    """Traced by `grad` alone, by `jit`, and by `vmap`; an integer among them."""
    inputs, (d_output, _) = _inputs(), cotangents(GROUPED)
    factor, unit = _normal(N), np.int32(1)

    def loss(factor, unit):
        def modified(score, query, key, head):
            return jnp.where((key.position - query.position) * unit > 0, score * factor[head], score)

        output = attend(**inputs, score_mod=modified, q_at=Q_AT, kv_at=KV_AT, scale=0.3)
        return jnp.sum(output * d_output)

    scores, by_factor = _function(inputs, factor.astype(np.float64))
    zeros = {"query": np.zeros((2, T, N, 1)), "key": np.zeros((2, S, GROUPED.K, 1)), "value": inputs["value"]}
    d_scores = oracle.attention_gradients(**zeros, bias=scores, d_output=d_output, d_lse=np.zeros((2, T, N)))["bias"]
    expected = by_factor(d_scores)
    close(jax.grad(loss)(jnp.asarray(factor), jnp.asarray(unit)), expected)
    close(jax.jit(jax.grad(loss))(factor, unit), expected)
    units = jnp.asarray([1, 0], jnp.int32)
    mapped = jax.jit(jax.vmap(jax.grad(loss), in_axes=(None, 0)))
    close(mapped(factor, units), [expected, 0 * expected])


def test_a_table_for_each_row_is_a_vmap():
    inputs, tables = {name: x[0] for name, x in _inputs().items()}, _normal(3, 7, N)
    at = {"q_at": Coordinates.range(T), "kv_at": Coordinates.range(S)}

    def call(table):
        return attend(**inputs, score_mod=RelativeBuckets(table, False, 5), **at)

    mapped = jax.jit(jax.vmap(call))(tables)
    one = jax.jit(call)
    for i, table in enumerate(tables):
        close(mapped[i], one(table))


def test_a_score_modification_is_a_tree_of_its_arrays():
    mod = compose(Alibi(_normal(N)), SoftCap(2.0), RelativeBuckets(_normal(8, N)), _with_factor(_normal(N)))
    assert [x.shape for x in jax.tree.leaves(mod)] == [(N,), (8, N), (N,)]
    again = jax.tree.map(lambda x: x, mod)
    assert jax.tree.structure(again) == jax.tree.structure(mod)


def test_weights_are_those_after_the_modification():
    inputs, slopes = _inputs(), _normal(N)
    options = {"mask": Causal(), "q_at": Q_AT, "kv_at": KV_AT, "scale": 0.3}
    weights = jax.jit(attention_weights)(inputs["query"], inputs["key"], score_mod=Alibi(slopes), **options)
    visible = np.broadcast_to((DISTANCE <= 0)[:, None], weights.shape)
    close(weights, _attended(_alibi(inputs, slopes)[0], inputs["value"], visible)[0].weights)


REFUSED = {
    "slopes": (Alibi(_normal(5)), ValueError, r"slopes \(5,\) of Alibi must be \[N\], one for each head 6"),
    "heads": (RelativeBuckets(_normal(8, 5)), ValueError, r"table \(8, 5\) must be \[num_buckets, N\]"),
    "odd buckets": (RelativeBuckets(_normal(7, N)), ValueError, r"num_buckets \(7\) must be even and at least 4"),
    "one bucket": (RelativeBuckets(_normal(1, N), False), ValueError, r"num_buckets \(1\) must be at least 2"),
    "near": (RelativeBuckets(_normal(32, N), True, 8), ValueError, r"max_distance \(8\) must exceed the 8 distances"),
    "an even table": (RelativePositions(_normal(4, H)), ValueError, r"\[2 \* max_distance \+ 1, H\]"),
    "dims": (RelativePositions(_normal(5, H + 1)), ValueError, r"table \(5, 6\) must be .* N 6 and H 5"),
}


@pytest.mark.usefixtures("as_users_call_it")
@pytest.mark.parametrize(("mod", "error", "message"), REFUSED.values(), ids=REFUSED)
def test_what_does_not_fit_is_refused(mod, error, message):
    inputs = _inputs()
    with pytest.raises(error, match=message):
        attend(**inputs, score_mod=mod, q_at=Q_AT, kv_at=KV_AT)


@pytest.mark.parametrize("cap", [0.0, -1.0, math.inf, math.nan])
def test_a_cap_that_caps_nothing_is_refused(cap):
    with pytest.raises(ValueError, match=r"the cap \(.*\) must be positive and finite"):
        SoftCap(cap)


@pytest.mark.usefixtures("as_users_call_it")
def test_a_cap_that_is_an_array_is_refused():
    with pytest.raises(TypeError, match=r"the cap \(.*2.*\) must be a number"):
        SoftCap(jnp.array(2.0))


def test_sizes_without_a_meaning_are_refused():
    with pytest.raises(ValueError, match=r"max_distance \(0\) must be an integer of at least 1"):
        RelativeBuckets(_normal(8, N), max_distance=0)
    with pytest.raises(ValueError, match=r"num_heads \(0\) must be an integer of at least 1"):
        Alibi.geometric(0)
    pair = Coordinates(jnp.int32(0), jnp.int32(1))
    with pytest.raises(ValueError, match="by itself it needs them"):
        Alibi()(jnp.float32(0), pair, pair, 0)
    with pytest.raises(ValueError, match="RelativePositions needs the row"):
        RelativePositions(_normal(5, H))(jnp.float32(0), pair, pair, 0)
