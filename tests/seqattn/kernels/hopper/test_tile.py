"""The arithmetic with the tiles of the device, in plain JAX, against attention in NumPy float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqattn.coordinates import Coordinates
from seqattn.kernels.call import Call
from seqattn.masks import Causal, SameSegment
from seqattn.precision import lowest
from seqattn.score_mods import SoftCap
from tests import hopper_plain, oracle
from tests.contract import Shape, arrays, close

# Neither length is a multiple of a tile, and the queries fill three tiles of a consumer.
SHAPE = Shape(batch=(1,), T=150, S=190, N=2, K=1, H=64, V=64)


def result(x, *, mask=None, score_mod=None, scale=None, q_at=None, kv_at=None):
    given = {name: jnp.asarray(x[name]) for name in ("query", "key", "value")}
    options = {"mask": mask, "bias": None, "score_mod": score_mod, "q_at": q_at, "kv_at": kv_at}
    return hopper_plain.attend(Call.of(**given, **options, scale=scale, dropout=None))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_causal_attention_of_odd_lengths_is_the_oracles(dtype):
    at = {"q_at": Coordinates.range(SHAPE.T, start=40), "kv_at": Coordinates.range(SHAPE.S)}
    x = arrays(SHAPE, dtype)
    output, lse = result(x, mask=Causal(), **at)
    expected = oracle.attention(**x, visible=np.asarray(Causal().dense(at["q_at"], at["kv_at"])))
    close(output, expected.output, dtype)
    close(lse, expected.lse, dtype)


@pytest.mark.parametrize("scale", [-2.0, 0.0, 3.0])
def test_the_scale_may_have_any_sign(scale):
    x = arrays(SHAPE, "bfloat16")
    output, lse = result(x, scale=scale)
    expected = oracle.attention(**x, scale=scale)
    close(output, expected.output, "bfloat16")
    close(lse, expected.lse, "bfloat16")


def test_keys_past_the_end_are_not_seen():
    # Every score is -8. A key of zeros, with which tiles are filled, would score 0 and outweigh all others.
    x = {name: np.full_like(each, 1) for name, each in arrays(SHAPE, "bfloat16").items()}
    output, lse = result(x | {"key": -x["key"]})
    np.testing.assert_array_equal(np.asarray(output, np.float32), 1)
    np.testing.assert_allclose(np.asarray(lse), np.log(SHAPE.S) - 8, rtol=1e-6)


def test_rows_without_a_visible_key_are_zero_with_the_lowest_log_sum_exp():
    segment = np.sort(np.random.default_rng(3).integers(0, 3, size=SHAPE.S)).astype(np.int32)
    kv_at = Coordinates.from_segments(jnp.asarray(segment))
    q_at = jax.tree.map(lambda x: x[: SHAPE.T], kv_at)
    output, lse = result(arrays(SHAPE, "bfloat16"), mask=SameSegment(), q_at=q_at, kv_at=kv_at)
    empty = segment[: SHAPE.T] == 0
    assert 0 < empty.sum() < SHAPE.T
    np.testing.assert_array_equal(np.asarray(output)[0, empty], 0)
    np.testing.assert_array_equal(
        np.asarray(lse)[0] == lowest(jnp.float32), np.broadcast_to(empty[:, None], lse.shape[1:])
    )


@pytest.mark.parametrize("score_mod", [None, SoftCap(5.0)], ids=["plain", "soft cap"])
def test_nan_behind_the_mask_leaves_no_trace_and_in_front_of_it_marks_the_row(score_mod):
    x = arrays(SHAPE, "bfloat16")
    at = {"q_at": Coordinates.range(SHAPE.T), "kv_at": Coordinates.range(SHAPE.S)}
    clean, _ = result(x, mask=Causal(), score_mod=score_mod, **at)
    x["value"][0, 100, 0, 3], x["key"][0, 120, 0, 5] = np.nan, -np.inf
    output, lse = result(x, mask=Causal(), score_mod=score_mod, **at)
    np.testing.assert_array_equal(np.asarray(output)[:, :100], np.asarray(clean)[:, :100])
    assert np.isnan(np.asarray(output, np.float32)[:, 100:]).all()
    assert np.isnan(np.asarray(lse)[:, 100:]).all()
