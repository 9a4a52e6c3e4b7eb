"""What cuDNN is asked for, and what it refuses. No GPU is needed: XLA plays it on the same arguments."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqattn.attention import attend
from seqattn.kernels import dispatch
from seqattn.kernels.dispatch import explain
from seqattn.masks import Causal, NotPadding, Prefix, SlidingWindow
from seqattn.score_mods import SoftCap
from tests import oracle
from tests.contract import Shape, agrees_with_oracle, arrays, close, spoil
from tests.vendor_calls import SHAPE, SQUARE, lengths, spy, text


@pytest.fixture
def on_gpu(monkeypatch):
    monkeypatch.setattr(dispatch, "platform_of", lambda arrays: "gpu")


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
    asked = spy(monkeypatch)
    located = {} if mask is None else {"mask": mask, "q_at": text(shape.T), "kv_at": text(shape.S)}
    pairs = np.ones(()) if mask is None else np.asarray(mask.dense(text(shape.T), text(shape.S)))[:, None]
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
    asked = spy(monkeypatch)
    bias = arrays(Shape(batch=(2, 4), T=10, N=1, H=10), "bfloat16")["query"][:, :, :, 0]
    bias[:, :, 3:5, 2:] = -np.inf
    bias[:, :, 1] = -np.inf
    pairs = np.tri(10, dtype=bool) & (bias != -np.inf)
    agrees_with_oracle("cudnn", SQUARE, "bfloat16", pairs=pairs, bias=bias, mask=Causal())
    assert asked["bias"].dtype == jnp.bfloat16
    assert asked["is_causal"]


def test_cudnn_gets_lengths(on_gpu, monkeypatch):
    asked = spy(monkeypatch)
    at = lengths([10, 4], 10)
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
        ((2, 10, 4, 8), {"mask": SlidingWindow(3, ahead=9)}, "left window only with a causal mask"),
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
        ((2, 10, 4, 8), {"mask": NotPadding(), "q_at": lengths([0], 10), "kv_at": text(10)}, "length 0"),
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
    assert told.chosen == "xla"
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
