"""Multi-head attention against NumPy float64 with its own weights, and how its ways of being called are related."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

from seqattn.coordinates import Coordinates
from seqattn.mask import MaskMod
from seqattn.masks import Causal, NotPadding, Prefix, SameSegment
from seqattn.nn import MemoryCompressedAttention, MultiHeadAttention, Rotary, StaticCache, with_implementation
from tests import oracle
from tests.parameters import drawn

B, T, S, D, N, K, H = 3, 5, 7, 11, 6, 2, 4
RANDOM = np.random.default_rng(0)
X, MEMORY = (RANDOM.normal(size=(B, length, D)).astype(np.float32) for length in (T, S))
X_AT, MEMORY_AT = Coordinates.from_lengths([5, 2, 0], T), Coordinates.from_lengths([7, 0, 3], S)
CAUSAL = Causal() & SameSegment()
KINDS = {
    "plain": {"num_heads": 1},
    "grouped": {"num_kv_heads": K},
    "grouped_rotary_norm_bias": {"num_kv_heads": K, "rotary": Rotary(50.0), "qk_norm": True, "use_bias": True},
}


def _attention(**options) -> MultiHeadAttention:
    options = {"num_heads": N, "head_dim": H, "mask": CAUSAL} | options
    return drawn(lambda: MultiHeadAttention(D, **options, rngs=nnx.Rngs(0)))


@jax.jit
def _attend(attention, x, at, other, other_at):
    return attention(x, at, attention.project(other, other_at))


@jax.jit
def _self_attend(attention, x, at):
    return attention(x, at, attention.project(x, at))


@jax.jit
def _with_weights(attention, x, at, other, other_at):
    kv = attention.project(other, other_at)
    return attention(x, at, kv), attention.weights(x, at, kv)


class _Numpy:
    """The module in NumPy float64; the softmax is the oracle's."""

    def __init__(self, attention: MultiHeadAttention) -> None:
        self.attention = attention

    def linear(self, name: str, x: np.ndarray) -> np.ndarray:
        layer = getattr(self.attention, name)
        bias = 0.0 if layer.bias is None else np.asarray(layer.bias[...]).astype(np.float64)
        return x.astype(np.float64) @ np.asarray(layer.kernel[...]).astype(np.float64) + bias

    def heads(self, name: str, x: np.ndarray, at: Coordinates) -> np.ndarray:
        heads = self.linear(name, x)
        heads = heads.reshape(*heads.shape[:-1], -1, self.attention.head_dim)
        norm = getattr(self.attention, f"{name}_norm", None)
        if norm is not None:
            scale = np.asarray(norm.scale[...]).astype(np.float64)
            heads = heads / np.sqrt((heads**2).mean(axis=-1, keepdims=True) + norm.epsilon) * scale
        return heads if self.attention.rotary is None or name == "value" else self.rotated(heads, at)

    def rotated(self, heads: np.ndarray, at: Coordinates) -> np.ndarray:
        half = heads.shape[-1] // 2
        angle = np.asarray(at.position)[..., None, None] * self.attention.rotary.base ** (-np.arange(half) / half)
        as_complex = (heads[..., :half] + 1j * heads[..., half:]) * np.exp(1j * angle)
        return np.concatenate([as_complex.real, as_complex.imag], axis=-1)

    def attended(self, x, at, other, other_at, predicate=None) -> tuple[np.ndarray, np.ndarray]:
        """Output and weights."""
        visible = True if predicate is None else np.expand_dims(oracle.pairs(predicate, at, other_at), -3)
        query = self.heads("query", x, at)
        key, value = (self.heads(name, other, other_at) for name in ("key", "value"))
        found = oracle.attention(query, key, value, visible=visible)
        return self.linear("output", found.output.reshape(*x.shape[:-1], -1)), found.weights


def _causal(query_position: int, query_segment: int, key_position: int, key_segment: int) -> bool:
    return key_position <= query_position and query_segment == key_segment != 0


@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)
def test_values_and_weights_are_those_of_numpy(options):
    attention = _attention(**options)
    output, weights = _Numpy(attention).attended(X, X_AT, MEMORY, MEMORY_AT, _causal)
    given = jnp.asarray(X), X_AT, jnp.asarray(MEMORY), MEMORY_AT
    found = _with_weights(attention, *given)
    np.testing.assert_allclose(found[0], output, atol=1e-5)
    np.testing.assert_allclose(found[1], weights, atol=1e-6)


@pytest.mark.parametrize("dtypes", [("float32", "bfloat16"), ("bfloat16", "float32")], ids=str)
def test_weights_over_a_cache_of_another_dtype_are_those_of_the_call(dtypes):
    """The cached keys, rounded to their dtype, in the arithmetic of float32."""
    own, cached = map(jnp.dtype, dtypes)
    attention = _attention(param_dtype=own, **KINDS["grouped"])
    x = jnp.asarray(X, own)
    _, kv = attention.extend(StaticCache.empty(B, S, K, H, dtype=cached), x, X_AT)
    weights = attention.weights(x, X_AT, kv)
    assert weights.dtype == np.float32
    same = attention.weights(x, X_AT, attention.project(x, X_AT))
    np.testing.assert_allclose(weights[..., :T], same, atol=0.02)
    assert attention(x, X_AT, kv).dtype == own


def test_eager_is_jitted():
    attention, x = _attention(), jnp.asarray(X)
    eager = attention(x, X_AT, attention.project(x, X_AT))
    np.testing.assert_allclose(eager, _self_attend(attention, x, X_AT), atol=1e-6)


def test_in_float64_to_the_last_digits():
    with jax.enable_x64(True):
        attention = _attention(param_dtype=jnp.float64, **KINDS["grouped"])
        output = _attend(attention, jnp.asarray(X, jnp.float64), X_AT, jnp.asarray(MEMORY, jnp.float64), MEMORY_AT)
    assert output.dtype == np.float64
    np.testing.assert_allclose(output, _Numpy(attention).attended(X, X_AT, MEMORY, MEMORY_AT, _causal)[0], rtol=1e-12)


def test_in_bfloat16():
    with jax.numpy_dtype_promotion("standard"):  # inside flax's norm
        attention = _attention(param_dtype=jnp.bfloat16, **KINDS["grouped_rotary_norm_bias"])
        x, memory = jnp.asarray(X, jnp.bfloat16), jnp.asarray(MEMORY, jnp.bfloat16)
        output = _attend(attention, x, X_AT, memory, MEMORY_AT)
    assert output.dtype == jnp.bfloat16
    expected, _ = _Numpy(attention).attended(np.asarray(x), X_AT, np.asarray(memory), MEMORY_AT, _causal)
    np.testing.assert_allclose(output.astype(jnp.float32), expected, atol=0.02 * np.abs(expected).max())


def test_without_a_mask_every_query_sees_every_key():
    attention = _attention(mask=None)
    output = _attend(attention, jnp.asarray(X), X_AT, jnp.asarray(MEMORY), MEMORY_AT)
    np.testing.assert_allclose(output, _Numpy(attention).attended(X, X_AT, MEMORY, MEMORY_AT)[0], atol=1e-5)


def test_a_query_that_sees_nothing_gives_zeros():
    output = np.asarray(_attend(_attention(), jnp.asarray(X), X_AT, jnp.asarray(MEMORY), MEMORY_AT))
    assert not output[1].any()  # no keys
    assert not output[2].any()  # no queries
    assert output[0].any(axis=-1).all()


@pytest.mark.parametrize("batch", [(), (1, 3, 1)], ids=str)
def test_any_number_of_leading_dims(batch):
    attention = _attention(**KINDS["grouped_rotary_norm_bias"])
    rows = jnp.asarray(X), X_AT, jnp.asarray(MEMORY), MEMORY_AT
    expected = _attend(attention, *rows)
    shaped = jax.tree.map(lambda x: x.reshape(*batch, *x.shape[1:]) if batch else x[0], rows)
    np.testing.assert_allclose(
        _attend(attention, *shaped), expected.reshape(*batch, T, D) if batch else expected[0], atol=1e-6
    )


def test_coordinates_of_one_row_serve_a_batch():
    attention = _attention(rotary=Rotary(50.0))
    rows = Coordinates(*(jnp.broadcast_to(jnp.arange(T), (B, T)) + start for start in (0, 1)))
    expected = _self_attend(attention, jnp.asarray(X), rows)
    one = jax.tree.map(lambda x: x[0], rows)
    np.testing.assert_allclose(_self_attend(attention, jnp.asarray(X), one), expected, atol=1e-6)


def test_a29_vmap_over_a_batch_axis_is_the_batch():
    attention = _attention(**KINDS["grouped_rotary_norm_bias"])
    expected = _self_attend(attention, jnp.asarray(X), X_AT)
    by_row = jax.jit(jax.vmap(lambda x, at: attention(x, at, attention.project(x, at))))(jnp.asarray(X), X_AT)
    np.testing.assert_allclose(by_row, expected, atol=1e-6)


def _cached(attention, x, at, sizes):
    """Self attention with the tokens written into a cache in chunks of these sizes, one call each."""
    cache, outputs, start = StaticCache.empty(B, T + 2, attention.num_kv_heads, H), [], 0
    for size in sizes:
        chunk, chunk_at = jax.tree.map(lambda a, start=start, size=size: a[:, start : start + size], (x, at))
        cache, seen = cache.append(attention.project(chunk, chunk_at))
        outputs.append(attention(chunk, chunk_at, seen))
        start += size
    return jnp.concatenate(outputs, axis=1)


@functools.cache
def _grouped() -> tuple[MultiHeadAttention, np.ndarray]:
    """Grouped heads with everything on, and what they give at once."""
    attention = _attention(**KINDS["grouped_rotary_norm_bias"])
    return attention, np.asarray(_self_attend(attention, jnp.asarray(X), X_AT))


def test_a12_decode_with_causal_mask_equals_full():
    attention, expected = _grouped()
    steps = jax.jit(functools.partial(_cached, sizes=(1,) * T))
    np.testing.assert_allclose(steps(attention, jnp.asarray(X), X_AT), expected, atol=1e-6)


def test_a13_chunked_prefill_equals_full():
    attention, expected = _grouped()
    chunks = jax.jit(functools.partial(_cached, sizes=(3, 2)))
    np.testing.assert_allclose(chunks(attention, jnp.asarray(X), X_AT), expected, atol=1e-6)


def test_a24_left_padding_is_right_padding():
    attention, expected = _grouped()
    order = np.array([[0, 1, 2, 3, 4], [3, 2, 0, 4, 1], [0, 1, 2, 3, 4]])  # row 1: its two tokens behind padding
    left, at = jax.tree.map(lambda x: jnp.stack([x[row][order[row]] for row in range(B)]), (jnp.asarray(X), X_AT))
    output = np.asarray(_self_attend(attention, left, Coordinates.from_present(at.segment != 0)))
    for row in range(B):
        real = np.asarray(at.segment[row]) != 0
        np.testing.assert_allclose(output[row, real], expected[row, order[row][real]], atol=1e-6)


def test_what_padding_holds_changes_nothing():
    attention, expected = _grouped()
    real = np.asarray(X_AT.segment)[..., None] != 0
    spoilt = jnp.where(real, X, np.float32(1e6))
    output = np.asarray(_self_attend(attention, spoilt, X_AT))
    np.testing.assert_array_equal(np.where(real, output, 0), np.where(real, expected, 0))


def test_a4_nan_in_padding_leaves_no_trace_in_what_real_tokens_see():
    attention, expected = _grouped()
    spoilt = jnp.where(X_AT.segment[..., None] != 0, X, np.float32(np.nan))
    output = np.asarray(_self_attend(attention, spoilt, X_AT))
    np.testing.assert_array_equal(output, expected)


def test_causality_by_gradients():
    attention, _ = _grouped()
    at = Coordinates.from_lengths([T], T)

    def outputs(x):
        return attention(x, at, attention.project(x, at)).sum(axis=-1)[0]

    seen = np.abs(jax.jit(jax.jacobian(outputs))(jnp.asarray(X[:1])))[:, 0].sum(axis=-1)
    np.testing.assert_array_equal(seen > 0, np.tri(T, dtype=bool))


def test_only_differences_of_positions_matter_to_a_rotation():
    attention, expected = _grouped()
    later = Coordinates(X_AT.position + 97, X_AT.segment)
    np.testing.assert_allclose(_self_attend(attention, jnp.asarray(X), later), expected, atol=1e-5)
    stretched = Coordinates(2 * X_AT.position, X_AT.segment)
    assert np.abs(_self_attend(attention, jnp.asarray(X), stretched) - expected).max() > 1e-2


@pytest.mark.parametrize("graph_mode", [True, False], ids=["graph", "tree"])
def test_a_mask_that_captures_an_array_is_data_of_the_module(graph_mode):
    table = np.random.default_rng(2).random((T, S)) < 0.5
    mask = MaskMod(lambda query, key, table: table[query.position, key.position], jnp.asarray(table)) & NotPadding()
    with nnx.set_graph_mode(graph_mode):
        attention = MultiHeadAttention(D, N, head_dim=H, mask=mask, rngs=nnx.Rngs(0))
        graph, params, rest = nnx.split(attention, nnx.Param, ...)
        merged = jax.jit(lambda params, rest: nnx.merge(graph, params, rest))(params, rest)
        given = jnp.asarray(X), X_AT, jnp.asarray(MEMORY), MEMORY_AT
        outputs = [_attend(a, *given) for a in (attention, merged)]
    predicate = lambda qp, qs, kp, ks: table[qp, kp] and qs != 0 and ks != 0  # noqa: E731
    expected, _ = _Numpy(attention).attended(X, X_AT, MEMORY, MEMORY_AT, predicate)
    for output in outputs:
        np.testing.assert_allclose(output, expected, atol=1e-5)


def test_another_array_in_the_mask_is_not_another_program():
    traced = []

    @jax.jit
    def attend(attention, x, at):
        traced.append(1)
        return attention(x, at, attention.project(x, at))

    outputs = [
        np.asarray(attend(MultiHeadAttention(D, N, head_dim=H, mask=mask, rngs=nnx.Rngs(0)), jnp.asarray(X), X_AT))
        for mask in (Causal() & Prefix(jnp.array(length)) for length in (1, 3))
    ]
    assert len(traced) == 1
    np.testing.assert_array_equal(outputs[0][:, 0], outputs[1][:, 0])
    assert np.all(outputs[0][:, 2] != outputs[1][:, 2])


def test_a_mask_of_static_sizes_is_no_leaf():
    assert len(jax.tree.leaves(_attention())) == 4
    assert len(jax.tree.leaves(_attention(mask=None, use_bias=True, qk_norm=True))) == 10


def test_dropout_of_weights_is_decided_by_the_key_and_keeps_the_mean():
    attention, x = _attention(dropout_rate=0.3), jnp.asarray(X)
    kv, keys = attention.project(x, X_AT), jax.random.split(jax.random.key(0), 1024)
    samples = jax.jit(jax.vmap(lambda key: attention(x, X_AT, kv, dropout_key=key)))(keys.at[1].set(keys[0]))
    np.testing.assert_array_equal(samples[0], samples[1])
    assert np.abs(samples[0] - samples[2]).max() > 1e-2
    error = np.abs(samples.mean(axis=0) - _self_attend(attention, x, X_AT))
    assert np.all(error <= 5 * samples.std(axis=0) / 32 + 1e-5)


def test_model_dim_is_divided_among_the_heads_unless_head_dim_is_given():
    attention = nnx.eval_shape(lambda: MultiHeadAttention(12, 3, rngs=nnx.Rngs(0)))
    assert (attention.head_dim, attention.num_kv_heads) == (4, 3)
    assert attention.query.kernel.shape == (12, 12)
    attention = nnx.eval_shape(lambda: MultiHeadAttention(11, 6, num_kv_heads=2, head_dim=5, rngs=nnx.Rngs(0)))
    shapes = [getattr(attention, name).kernel.shape for name in ("query", "key", "value", "output")]
    assert shapes == [(11, 30), (11, 10), (11, 10), (30, 11)]


@pytest.mark.usefixtures("as_users_call_it")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_heads": 5, "head_dim": None}, r"model_dim \(11\) must be a multiple of num_heads \(5\)"),
        ({"num_kv_heads": 4}, r"num_heads \(6\) must be a multiple of num_kv_heads \(4\)"),
        ({"num_heads": 0}, r"num_heads \(0\) must be an integer of at least 1"),
        ({"num_kv_heads": 0}, r"num_kv_heads \(0\) must be an integer of at least 1"),
        ({"num_heads": -2, "num_kv_heads": -2}, r"num_heads \(-2\) must be"),
        ({"head_dim": 0}, r"head_dim \(0\) must be an integer of at least 1"),
        ({"head_dim": -3}, r"head_dim \(-3\) must be"),
    ],
    ids=str,
)
def test_a28_heads_that_do_not_divide_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        _attention(**options)


def test_a21_an_odd_head_dim_cannot_be_rotated():
    with pytest.raises(ValueError, match=r"head_dim \(3\) must be even"):
        _attention(head_dim=3, rotary=Rotary())
    _attention(head_dim=3)


@pytest.mark.parametrize("rate", [1.5, -0.1, float("nan")])
def test_a27_a_rate_that_is_no_probability_is_refused(rate):
    with pytest.raises(ValueError, match=rf"dropout rate \({rate}\) must be in \[0, 1\)"):
        _attention(dropout_rate=rate)


def test_an_unknown_implementation_is_refused():
    attention = _attention(implementation="fastest")
    with pytest.raises(ValueError, match="implementation 'fastest' is not one of"):
        attention(jnp.asarray(X), X_AT, attention.project(jnp.asarray(X), X_AT))


@pytest.mark.filterwarnings("ignore:Sharding", "ignore:.*deprecated")
def test_it_is_a_layer_of_a_linen_model():
    """`init` and `apply` of Linen are the same module with the same parameters."""
    options = {"num_heads": N, "num_kv_heads": K, "head_dim": H, "mask": CAUSAL}

    class Layer(linen.Module):
        @linen.compact
        def __call__(self, x, at):
            attention = nnx.bridge.to_linen(MultiHeadAttention, D, **options, name="attention")
            return attention(x, at, attention.project(x, at))

    x = jnp.asarray(X)
    variables = jax.jit(Layer().init)(jax.random.key(0), x, X_AT)
    attention = _attention(num_kv_heads=K)
    assert jax.tree.map(jnp.shape, variables["params"]["attention"]) == jax.tree.map(
        jnp.shape, nnx.to_pure_dict(nnx.state(attention, nnx.Param))
    )
    nnx.update(attention, variables["params"]["attention"])
    output = jax.jit(Layer().apply)(variables, x, X_AT)
    np.testing.assert_allclose(output, _self_attend(attention, x, X_AT), atol=1e-6)


def test_another_implementation_makes_another_model():
    """The model that was given stays as it is, and shares its parameters; of a kind of attention where one is named."""
    plain = MultiHeadAttention(D, N, head_dim=H, rngs=nnx.Rngs(0))
    given = nnx.List([plain, MemoryCompressedAttention(D, N, head_dim=H, stride=3, rngs=nnx.Rngs(1))])
    changed = with_implementation(with_implementation(given, "chunked"), "xla", of=MemoryCompressedAttention)
    assert [layer.implementation for layer in given] == [None, None]
    assert [layer.implementation for layer in changed] == ["chunked", "xla"]
    for a, b in zip(jax.tree.leaves(nnx.state(given)), jax.tree.leaves(nnx.state(changed)), strict=True):
        assert a is b


def test_a_module_explains_which_kernel_reads_memory_and_which_a_cache():
    attention = _attention(dropout_rate=0.5)
    x = jnp.asarray(X)
    memory = attention.project(jnp.asarray(MEMORY), MEMORY_AT)
    assert attention.explain(x, X_AT, memory).chosen == "xla"
    assert attention.explain(x, X_AT, memory).refusals["cached"] == (
        "the keys are not in the layout of a cache (Columns)"
    )
    _, kv = attention.extend(StaticCache.empty(B, S, N, H), x, X_AT)
    assert attention.explain(x, X_AT, kv).chosen == "cached"
    told = attention.explain(x, X_AT, kv, dropout_key=jax.random.key(0))
    assert "has no dropout" in told.refusals["cached"]
    assert told.chosen == "reference"
    with_name = with_implementation(attention, "chunked")
    assert with_name.explain(x, X_AT, kv).chosen == "chunked"
    assert attention.explain(x, X_AT, kv, platform="tpu").chosen == "tpu_cached"


def test_a_block_mask_takes_the_place_of_mask_and_coordinates(monkeypatch):
    monkeypatch.setattr("seqattn.kernels.dispatch.TINY_PAIRS", 0)
    monkeypatch.setattr("seqattn.kernels.dispatch.FEW_QUERIES", 0)
    attention, x = _attention(mask=SameSegment()), jnp.asarray(X)
    kv = attention.project(jnp.asarray(MEMORY), MEMORY_AT)
    shared = attention.block_mask(x, X_AT, MEMORY_AT)
    assert shared.visits.by_name.keys() == {"chunked"}
    expected = attention(x, X_AT, kv)
    np.testing.assert_allclose(attention(x, X_AT, kv, block_mask=shared), expected, atol=1e-6)
    # The coordinates of masks are those of the block mask.
    elsewhere = jax.tree.map(jnp.zeros_like, X_AT)
    np.testing.assert_allclose(attention(x, elsewhere, kv, block_mask=shared), expected, atol=1e-6)
    assert _attention(mask=None).block_mask(x, X_AT) is None


def test_a_block_mask_beside_a_cache_is_refused():
    """Which slots are written changes from step to step, and no block mask knows it."""
    attention, x = _attention(), jnp.asarray(X)
    cache = StaticCache.empty(B, T + 2, num_kv_heads=N, head_dim=H)
    _, columns = cache.append(attention.project(x, X_AT))
    shared = attention.block_mask(x, X_AT)
    for kv in (columns, columns.rows()):
        with pytest.raises(ValueError, match="a block_mask is for the keys of `project`, not for the slots of a cache"):
            attention(x, X_AT, kv, block_mask=shared)
