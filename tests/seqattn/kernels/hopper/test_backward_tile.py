"""The arithmetic of the backward pass with the tiles of the device, in plain JAX, against NumPy float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqattn.coordinates import Coordinates
from seqattn.dropout import Dropout
from seqattn.kernels.call import Call
from seqattn.kernels.hopper.backward_plan import NARROW, PASSES, Pass
from seqattn.masks import Causal, SameSegment
from seqattn.score_mods import SoftCap
from tests import hopper_plain, oracle
from tests.contract import Shape, arrays, close, cotangents, kept

# Neither length is a multiple of a tile.
SHAPE = Shape(batch=(2,), T=150, S=190, N=4, K=2, H=64, V=64)
AT = {"q_at": Coordinates.range(SHAPE.T, start=40), "kv_at": Coordinates.range(SHAPE.S)}


def gradients(x, directions, *, mask=None, score_mod=None, dropout=None, scale=None, **located):
    """The gradients of query, key and value, which the kernels compute."""

    def results(x):
        options = {"mask": mask, "bias": None, "score_mod": score_mod, "scale": scale, "dropout": dropout}
        return hopper_plain.attend(Call.of(**x, **options, **({"q_at": None, "kv_at": None} | located)))

    return jax.vjp(results, {name: jnp.asarray(each) for name, each in x.items()})[1](
        jax.tree.map(jnp.asarray, directions)
    )[0]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_causal_gradients_of_odd_lengths_are_the_oracles(dtype):
    x, directions = arrays(SHAPE, dtype), cotangents(SHAPE, dtype)
    actual = gradients(x, directions, mask=Causal(), **AT)
    expected = oracle.attention_gradients(
        **x, d_output=directions[0], d_lse=directions[1], visible=np.asarray(Causal().dense(AT["q_at"], AT["kv_at"]))
    )
    for name in x:
        close(actual[name], expected[name], dtype, name)


@pytest.mark.parametrize("scale", [-2.0, 0.0, 0.3])
def test_the_scale_may_have_any_sign(scale):
    x, directions = arrays(SHAPE, "bfloat16"), cotangents(SHAPE, "bfloat16")
    actual = gradients(x, directions, scale=scale)
    expected = oracle.attention_gradients(**x, d_output=directions[0], d_lse=directions[1], scale=scale)
    if scale == 0:
        # A tiny scale takes the place of 0.
        assert max(np.abs(np.asarray(actual.pop(name), np.float32)).max() for name in ("query", "key")) < 1e-28
    for name, gradient in actual.items():
        close(gradient, expected[name], "bfloat16", name)


@pytest.mark.parametrize("passes", [None, NARROW[128]], ids=["together", "apart"])
def test_dropout_drops_the_same_weights_as_in_the_forward_pass(passes, monkeypatch):
    if passes is not None:
        monkeypatch.setitem(NARROW, 64, passes)
    x, directions, dropout = arrays(SHAPE, "float16"), cotangents(SHAPE, "float16"), Dropout(0.4, jax.random.key(3))
    actual = gradients(x, directions, dropout=dropout)
    expected = oracle.attention_gradients(**x, d_output=directions[0], d_lse=directions[1], kept=kept(dropout, SHAPE))
    for name in x:
        close(actual[name], expected[name], "float16", name)


@pytest.mark.parametrize("score_mod", [None, SoftCap(5.0)], ids=["plain", "soft cap"])
def test_nan_behind_the_mask_leaves_no_trace_and_in_front_of_it_marks_what_it_reaches(score_mod):
    x, directions = arrays(SHAPE, "bfloat16"), cotangents(SHAPE, "bfloat16")
    segment = np.repeat(np.int32([1, 2, 0]), [100, 60, 30])
    kv_at = Coordinates.from_segments(jnp.asarray(segment))
    located = {"mask": Causal() & SameSegment(), "q_at": jax.tree.map(lambda x: x[: SHAPE.T], kv_at), "kv_at": kv_at}
    clean = gradients(x, directions, score_mod=score_mod, **located)
    x["value"][0, 120, 0, 3], x["key"][0, 170, 1, 5], x["query"][1, 7, 3, 2] = np.nan, np.inf, -np.inf
    actual = gradients(x, directions, score_mod=score_mod, **located)
    # Key head 0 serves query heads 0 and 1: the later queries of text 2 see the key 120, and all keys that they see.
    bad = {name: np.zeros(each.shape[:3], bool) for name, each in clean.items()}
    bad["query"][0, 120:150, :2] = bad["key"][0, 100:150, 0] = bad["value"][0, 100:150, 0] = True
    bad["query"][1, 7, 3] = bad["key"][1, :8, 1] = bad["value"][1, :8, 1] = True
    for name, each in bad.items():
        np.testing.assert_array_equal(np.isnan(np.asarray(actual[name], np.float32)).all(axis=-1), each)
        np.testing.assert_array_equal(np.asarray(actual[name])[~each], np.asarray(clean[name])[~each])
    # The keys of padding are seen by nobody.
    assert not np.asarray(clean["key"])[:, 160:].any()


def test_sums_do_not_depend_on_the_split_into_kernels(monkeypatch):
    x, directions = arrays(SHAPE, "bfloat16"), cotangents(SHAPE, "bfloat16")
    together = gradients(x, directions, mask=Causal(), **AT)
    apart = tuple(Pass("key", (name,), 64, 64, 2) for name in ("key", "value"))
    monkeypatch.setitem(PASSES, 64, (Pass("query", ("query",), 64, 64, 2), *apart))
    jax.tree.map(np.testing.assert_array_equal, gradients(x, directions, mask=Causal(), **AT), together)
