"""What JAX's own implementations are asked for, and what they refuse; the contract itself is held by test_contract.py.

No GPU and no TPU is needed: cuDNN is played by XLA on the same arguments, and splash attention is interpreted.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from seqattn.attention import attend
from seqattn.choice import explain
from seqattn.coordinates import Coordinates
from seqattn.dropout import Dropout
from seqattn.kernels import vendor
from seqattn.kernels.vendor import Native
from seqattn.masks import Causal, Dilated, NotPadding, Prefix, SameSegment, SlidingWindow
from seqattn.score_mods import SoftCap
from tests import oracle
from tests.contract import Shape, agrees_with_oracle, arrays, close, forward, spoil
from tests.mask_trees import coordinates, mask_trees

SHAPE = Shape(T=10, S=14, N=4, K=2, H=8, V=8)
SQUARE = Shape(T=10, S=10, N=4, K=2, H=8, V=8)


def _at(start, segments):
    segment = np.asarray(segments, np.int32)
    position = np.arange(start, start + segment.shape[1], dtype=np.int32)
    return Coordinates(np.array(np.broadcast_to(position, segment.shape)), segment)


def _text(length, start=0):
    return _at(start, [[1] * length])


def _lengths(lengths, length):
    return _at(0, [[1] * n + [0] * (length - n) for n in lengths])


def _said(native, length, size):
    """Who may attend by the fields, `[rows, T, S]`; read as the documentation of `Native` says."""
    back = np.arange(length)[:, None] - np.arange(size)[None]
    pairs = np.ones((1, length, size), bool)
    pairs &= (native.left is None or back <= native.left) & (native.right is None or -native.right <= back)
    if native.query_lengths is not None:
        pairs = pairs & (np.arange(length)[None, :, None] < native.query_lengths[:, None, None])
    if native.key_lengths is not None:
        pairs = pairs & (np.arange(size)[None, None, :] < native.key_lengths[:, None, None])
    return pairs


def _is_exact(native, mask, q_at, kv_at):
    length, size = q_at.shape[-1], kv_at.shape[-1]
    dense = np.asarray(mask.dense(q_at, kv_at))
    first, last = native.ends(length, size)
    between = (first[:, :, None] <= np.arange(size)) & (np.arange(size) < last[:, :, None])
    np.testing.assert_array_equal(*np.broadcast_arrays(_said(native, length, size), dense))
    np.testing.assert_array_equal(*np.broadcast_arrays(between, dense))


WINDOWS = [SlidingWindow(size, ahead) for size in (1, 2, 4) for ahead in (0, 1, 3)]


@pytest.mark.parametrize("mask", [Causal(), *WINDOWS, *(Causal() & window for window in WINDOWS)], ids=repr)
def test_every_band_is_served_unless_it_misses_the_diagonal(mask):
    for length, size, start in itertools.product((1, 2, 5), (1, 3, 5), (-2, 0, 1, 4)):
        q_at, kv_at = _text(length, start), _text(size)
        try:
            native = Native.of(mask, q_at, kv_at)
        except NotImplementedError:
            assert not mask.dense(q_at, kv_at)[0, 0, 0]
            continue
        _is_exact(native, mask, q_at, kv_at)


@given(mask_trees(), coordinates(4), coordinates(5), st.booleans())
def test_what_is_served_is_what_the_mask_says(pair, q_at, kv_at, runs):
    mask, (q_at, kv_at) = pair[0], (jax.tree.map(lambda x: x[None], at) for at in (q_at, kv_at))
    if runs:
        q_at, kv_at = (Coordinates(np.arange(at.shape[-1])[None], at.segment) for at in (q_at, kv_at))
    try:
        native = Native.of(mask, q_at, kv_at)
    except NotImplementedError:
        return
    _is_exact(native, mask, q_at, kv_at)


@pytest.mark.parametrize(
    ("mask", "q_at", "kv_at", "expected"),
    [
        (None, _text(5), _text(7), Native()),
        (Causal(), _text(5), _text(5), Native(right=0)),
        (Causal(), _text(5), _text(7), Native(right=0)),
        (Causal(), _text(2, start=5), _text(7), Native(right=5)),
        (Causal(), _text(1, start=6), _text(7), Native()),
        (Causal() & SlidingWindow(3), _text(5), _text(5), Native(left=2, right=0)),
        (Causal() & SlidingWindow(3, ahead=2), _text(5), _text(5), Native(left=2, right=0)),
        (SlidingWindow(3, ahead=1), _text(5), _text(5), Native(left=2, right=1)),
        (SlidingWindow(5, ahead=4), _text(5), _text(5), Native()),
        (SameSegment() & NotPadding(), _text(5), _text(5), Native()),
    ],
    ids=str,
)
def test_what_is_asked_for(mask, q_at, kv_at, expected):
    assert Native.of(mask, q_at, kv_at) == expected


@pytest.mark.parametrize("part", [NotPadding(), SameSegment()], ids=repr)
def test_padding_behind_the_tokens_is_lengths(part):
    q_at, kv_at = _lengths([5], 5), _lengths([3, 7], 7)
    native = Native.of(Causal() & part, q_at, kv_at)
    assert (native.right, native.query_lengths) == (0, None)
    np.testing.assert_array_equal(native.key_lengths, [3, 7])
    _is_exact(native, Causal() & part, q_at, kv_at)


TRACED = Coordinates(jnp.arange(5)[None], jnp.ones((1, 5), jnp.int32))


@pytest.mark.parametrize(
    ("mask", "q_at", "kv_at", "reason"),
    [
        (Prefix(2), _text(5), _text(5), "Prefix is no causal mask"),
        (Causal() & (Causal() | Dilated(2)), _text(5), _text(5), "Or is no causal mask"),
        (~Causal(), _text(5), _text(5), "Not is no causal mask"),
        (Causal(), TRACED, _text(5), "Causal reads are not known at trace time"),
        (NotPadding(), _text(5), TRACED, "NotPadding reads are not known at trace time"),
        (SlidingWindow(2), _text(5, start=3), _text(5), "before the diagonal"),
        (Causal(), _text(5, start=-1), _text(5), "before the diagonal"),
        (Causal(), Coordinates(np.array([[0, 1, 0]]), np.ones((1, 3), int)), _text(5), "do not count up alike"),
        (SameSegment(), _at(0, [[1, 1, 2]]), _at(0, [[1, 1, 2]]), "more than one text"),
        (SameSegment(), _at(0, [[1, 1, 1]]), _at(0, [[2, 2, 2]]), "more than one text"),
        (NotPadding(), _at(0, [[0, 1, 1]]), _text(3), "padding before a token"),
    ],
)
def test_what_has_no_native_form(mask, q_at, kv_at, reason):
    with pytest.raises(NotImplementedError, match=reason):
        Native.of(mask, q_at, kv_at)


def test_what_xla_is_asked_for(monkeypatch):
    asked = _spy(monkeypatch)
    x = jnp.ones((2, 5, 3, 8))

    def options(**given):
        asked.clear()
        jax.eval_shape(lambda: attend(x, x, x, **given, implementation="xla"))
        assert asked.pop("implementation") == "xla"
        assert asked.pop("scale") == 1 / np.sqrt(8)
        return asked

    assert options() == {}
    assert options(mask=Causal()) == {"is_causal": True}
    assert options(mask=Causal() & SlidingWindow(3)) == {"local_window_size": (2, 0)}
    assert options(mask=SlidingWindow(3, ahead=2)) == {"local_window_size": (2, 2)}
    assert options(mask=Prefix(2))["mask"].shape == (1, 1, 5, 5)
    assert "dense" in explain(x, x, x, mask=Prefix(2)).notes["xla"]
    assert "dense" not in explain(x, x, x, mask=Causal()).notes["xla"]


@pytest.mark.parametrize("name", ["key", "value"])
@pytest.mark.parametrize("garbage", [np.nan, np.inf, -np.inf], ids=str)
def test_what_is_not_finite_is_seen_by_every_query_of_its_heads_where_nothing_is_masked(name, garbage):
    output, lse = forward("xla", spoil(arrays(SQUARE), (1, 4, 1, 2), garbage, name))
    clean, clean_lse = forward("xla", arrays(SQUARE))
    seen = np.zeros((2, 10, 4), bool)
    seen[1, :, 2:] = True
    assert np.isnan(output[seen]).all()
    assert np.isnan(lse[seen]).all()
    np.testing.assert_array_equal(output[~seen], clean[~seen])
    np.testing.assert_array_equal(lse[~seen], clean_lse[~seen])


def test_a_bias_lower_than_what_jax_nn_hides_with_hides_no_more_than_itself():
    """All that the first query may see has the lowest bias, as in masks of other libraries for padding on the left."""
    bias = np.zeros((SQUARE.T, SQUARE.S), np.float32)
    bias[0] = np.finfo(np.float32).min
    agrees_with_oracle("xla", SQUARE, pairs=np.tri(10, dtype=bool), mask=Causal(), bias=bias)


@pytest.mark.parametrize(
    ("options", "value_dim", "dtype", "reason"),
    [
        ({"score_mod": SoftCap(2.0)}, 8, "float32", r"no score modification \(SoftCap\); chunked and reference"),
        ({"dropout": Dropout(0.1, jax.random.key(0))}, 8, "float32", "no dropout"),
        ({}, 5, "float32", r"V \(5\) must be the head dim H \(8\)"),
        ({}, 8, "float64", "softmax of float64 in float32"),
    ],
    ids=str,
)
def test_what_xla_refuses(options, value_dim, dtype, reason):
    with jax.enable_x64(dtype == "float64"), pytest.raises(NotImplementedError, match=reason):
        forward("xla", arrays(Shape(N=4, K=2, H=8, V=value_dim), dtype), **options)


def _spy(monkeypatch):
    """Puts XLA in the place of every implementation of jax.nn; tells with which options it was last called."""
    asked, real = {}, jax.nn.dot_product_attention

    def spy(query, key, value, bias=None, **options):
        asked.update(options, **({} if bias is None else {"bias": bias}))
        wide = [x.astype(jnp.float32) for x in (query, key, value)]
        return real(*wide, bias, **options | {"implementation": "xla"}).astype(query.dtype)

    monkeypatch.setattr(jax.nn, "dot_product_attention", spy)
    return asked


@pytest.fixture
def on_gpu(monkeypatch):
    monkeypatch.setattr(vendor, "platform", lambda query: "gpu")


@pytest.fixture
def on_tpu(monkeypatch):
    monkeypatch.setattr(vendor, "platform", lambda query: "tpu")


@pytest.mark.parametrize(
    ("mask", "expected"),
    [
        (None, {"is_causal": False}),
        (Causal(), {"is_causal": True}),
        (Causal() & SlidingWindow(3), {"is_causal": True, "local_window_size": (2, 0)}),
        (SlidingWindow(3), {"is_causal": True, "local_window_size": (2, 0)}),
    ],
    ids=str,
)
@pytest.mark.parametrize("shape", [SQUARE, SHAPE], ids=["square", "more_keys"])
def test_cudnn_keeps_the_contract_around_what_it_is_asked_for(on_gpu, monkeypatch, mask, expected, shape):
    asked = _spy(monkeypatch)
    located = {} if mask is None else {"mask": mask, "q_at": _text(shape.T), "kv_at": _text(shape.S)}
    pairs = np.ones(()) if mask is None else np.asarray(mask.dense(_text(shape.T), _text(shape.S)))[:, None]
    located = {name: jax.tree.map(lambda x: x[0], x) if "at" in name else x for name, x in located.items()}

    def attend_there(inputs):
        return attend(**inputs, **located, implementation="cudnn", return_lse=True)

    inputs = spoil(arrays(shape, "bfloat16"), (1, 9, 1), np.nan, "key")
    output, lse = (np.asarray(x) for x in jax.jit(attend_there)(inputs))
    seen = np.zeros((2, shape.T, 4), bool)
    seen[1, :, 2:] = np.broadcast_to(pairs, (1, 1, shape.T, shape.S))[0, 0, :, 9, None]
    expected_output = oracle.attention(**arrays(shape, "bfloat16"), visible=pairs)
    assert np.isnan(output[seen].astype(np.float32)).all()
    assert np.isnan(lse[seen]).all()
    close(output[~seen], expected_output.output[~seen], "bfloat16")
    close(lse[~seen], expected_output.lse[~seen], "float32")
    assert {name: asked[name] for name in expected} == expected
    assert asked["implementation"] == "cudnn"


def test_cudnn_masks_where_a_bias_is_minus_infinity_and_passes_gradients_of_the_log_sum_exp(on_gpu, monkeypatch):
    asked = _spy(monkeypatch)
    bias = arrays(Shape(batch=(2, 4), T=10, N=1, H=10), "bfloat16")["query"][:, :, :, 0]
    bias[:, :, 3:5, 2:] = -np.inf
    bias[:, :, 1] = -np.inf
    pairs = np.tri(10, dtype=bool) & (bias != -np.inf)
    agrees_with_oracle("cudnn", SQUARE, "bfloat16", pairs=pairs, bias=bias, mask=Causal())
    assert asked["bias"].dtype == jnp.bfloat16
    assert asked["is_causal"]


def test_cudnn_gets_lengths(on_gpu, monkeypatch):
    asked = _spy(monkeypatch)
    at = _lengths([10, 4], 10)
    x = {name: jnp.asarray(x) for name, x in arrays(SQUARE, "bfloat16").items()}
    output, lse = attend(**x, mask=Causal() & NotPadding(), q_at=at, kv_at=at, implementation="cudnn", return_lse=True)
    np.testing.assert_array_equal(asked["query_seq_lengths"], [10, 4])
    np.testing.assert_array_equal(asked["key_value_seq_lengths"], [10, 4])
    assert asked["is_causal"]
    assert not np.asarray(output[1, 4:]).any()
    assert np.all(np.asarray(lse[1, 4:]) == -np.inf)


BF16 = jnp.ones((2, 10, 4, 8), jnp.bfloat16)


@pytest.mark.parametrize(
    ("shape", "options", "reason"),
    [
        ((2, 10, 4, 8), {"dtype": jnp.float32}, "float16 and bfloat16, not float32"),
        ((2, 10, 4, 5), {}, r"head_dim \(5\) must be a multiple of 8"),
        ((2, 10, 4, 264), {}, r"head_dim \(264\) must be .* at most 256"),
        ((2, 10, 4, 8), {"mask": jnp.ones((10, 10), bool)}, "dense bias"),
        ((2, 10, 4, 8), {"mask": Prefix(3)}, "Prefix"),
        ((2, 10, 4, 8), {"mask": SlidingWindow(3, ahead=1)}, "no window of 1 keys ahead"),
        ((2, 10, 4, 8), {"mask": SlidingWindow(3, ahead=9)}, "earlier keys only where causal"),
        ((2, 10, 4, 8), {"bias": jnp.ones((10, 10))}, "dtype bfloat16, got float32"),
        ((2, 10, 4, 8), {"bias": jnp.ones((1, 10), jnp.bfloat16)}, r"got \(1, 10\)"),
        ((2, 11, 4, 8), {"bias": jnp.ones((11, 11), jnp.bfloat16)}, "even T and S"),
        (
            (2, 10, 4, 8),
            {"bias": jnp.ones((10, 10), jnp.bfloat16), "mask": Causal() & SlidingWindow(3)},
            "without a bias",
        ),
        ((2, 10, 4, 8), {"scale": jnp.float32(0.3)}, "known at trace time"),
        ((2, 10, 4, 8), {"score_mod": SoftCap(1.0)}, "SoftCap"),
        ((2, 10, 4, 8), {"mask": NotPadding(), "q_at": _lengths([0], 10), "kv_at": _text(10)}, "length 0"),
    ],
    ids=str,
)
def test_what_cudnn_refuses(on_gpu, shape, options, reason):
    options = {name: jax.tree.map(lambda x: x[0], x) if "at" in name else x for name, x in options.items()}
    x = jnp.ones(shape, options.pop("dtype", jnp.bfloat16))
    with pytest.raises(NotImplementedError, match=reason):
        attend(x, x, x, **options, implementation="cudnn")


@pytest.mark.parametrize(("name", "dtype"), [("bias", np.float32), ("mask", bool)])
def test_a18_a_wide_bias_or_a_mask_alone_leaves_cudnn_for_one_that_can(on_gpu, name, dtype):
    options = {name: jnp.ones((10, 10), dtype)}
    told = explain(BF16, BF16, BF16, **options)
    assert told.refusals["cudnn"] is not None
    assert told.chosen == "chunked"
    gradient = jax.grad(lambda x: jnp.sum(attend(x, x, x, **options).astype(jnp.float32)))(BF16)
    assert np.isfinite(gradient.astype(jnp.float32)).all()


def test_a_gpu_without_cudnn_refuses(on_gpu):
    with pytest.raises(NotImplementedError, match="cuDNN is not detected"):
        attend(BF16, BF16, BF16, implementation="cudnn")


@pytest.mark.parametrize("mask", [None, Causal(), Causal() & SlidingWindow(3)], ids=str)
def test_cudnn_lowers_for_a_gpu_with_gradients(on_gpu, monkeypatch, mask):
    fused = "jax._src.cudnn.fused_attention_stablehlo.check_cudnn_version"
    monkeypatch.setattr(fused, lambda: 91000)

    def loss(query, key, value):
        return jnp.sum(attend(query, key, value, mask=mask, implementation="cudnn").astype(jnp.float32))

    lowered = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).trace(BF16, BF16, BF16).lower(lowering_platforms=("cuda",))
    assert "__cudnn$fmhaSoftmaxBackward" in lowered.as_text()


SPLASH = Shape(batch=(1,), T=128, S=256, N=4, K=2, H=64, V=64)


@pytest.mark.parametrize(
    ("mask", "start"),
    [(None, 0), (Causal(), 0), (Causal(), 100), (Causal() & SlidingWindow(40), 0), (SlidingWindow(9, ahead=30), 0)],
    ids=str,
)
def test_splash_computes_what_it_is_asked_for(mask, start):
    q_at, kv_at, x = _text(SPLASH.T, start), _text(SPLASH.S), arrays(SPLASH)
    native = Native.of(mask, q_at, kv_at)
    scaled = (jnp.asarray(x["query"] / np.float32(8)), jnp.asarray(x["key"]), jnp.asarray(x["value"]))
    output = vendor.splash_output(*scaled, native, interpret=True)
    pairs = True if mask is None else np.asarray(mask.dense(q_at, kv_at))
    close(output, oracle.attention(**x, visible=pairs).output)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("mask", [None, Causal(), Causal() & SlidingWindow(40)], ids=str)
def test_splash_lowers_for_a_tpu_with_gradients(on_tpu, mask, dtype):
    def loss(query, key, value):
        located = {"mask": mask} if mask is None else {"mask": mask, "q_at": at[0], "kv_at": at[1]}
        return jnp.sum(attend(query, key, value, **located, implementation="splash").astype(jnp.float32))

    at = Coordinates.range(SPLASH.T), Coordinates.range(SPLASH.S)
    with jax.numpy_dtype_promotion("standard"):  # the backward pass of splash attention relies on it in bfloat16
        lowered = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).trace(*arrays(SPLASH, dtype).values())
    assert "splash" in lowered.lower(lowering_platforms=("tpu",)).as_text()


@pytest.mark.parametrize(
    ("shape", "options", "reason"),
    [
        ((2, 128, 4, 64), {"bias": jnp.ones((128, 128))}, "no bias"),
        ((2, 128, 4, 64), {"dtype": jnp.float16}, "not float16"),
        ((2, 100, 4, 64), {}, r"T \(100\) and S \(100\) must be multiples of 128"),
        ((2, 128, 4, 64), {"mask": jnp.ones((128, 128), bool)}, "boolean array"),
        ((2, 128, 4, 64), {"mask": Dilated(2)}, "Dilated"),
        ((2, 128, 4, 64), {"score_mod": SoftCap(1.0)}, "SoftCap"),
        ((2, 128, 4, 64), {"mask": NotPadding(), "q_at": _lengths([9], 128), "kv_at": _text(128)}, "padding"),
    ],
    ids=str,
)
def test_what_splash_refuses(on_tpu, shape, options, reason):
    options = {name: jax.tree.map(lambda x: x[0], x) if "at" in name else x for name, x in options.items()}
    x = jnp.ones(shape, options.pop("dtype", jnp.float32))
    with pytest.raises(NotImplementedError, match=reason):
        attend(x, x, x, **options, implementation="splash")


def test_the_platform_is_that_of_the_array_or_the_default():
    x = jnp.ones(3)
    assert vendor.platform(x) == "cpu"
    assert jax.eval_shape(lambda x: x if vendor.platform(x) == jax.default_backend() else x[0], x).shape == x.shape
