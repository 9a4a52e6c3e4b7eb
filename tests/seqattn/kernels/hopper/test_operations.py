"""Operations that the compiler lacks, against NumPy in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special

from seqattn import dropout
from seqattn.coordinates import Coordinates
from seqattn.dropout import Dropout
from seqattn.kernels.call import Call
from seqattn.kernels.hopper.operations import HOPPER, kept
from seqattn.kernels.hopper.plan import prepare
from seqattn.mask import MaskMod

POINTS = np.float32([0, 1e-6, 0.3, 1, 2.5, 7, 40, 1e7, -1e-6, -0.3, -1, -2.5, -7, -40, -1e7])
POSITIVE = np.abs(POINTS)

EXACT = {
    "sqrt": (np.sqrt, POSITIVE),
    "floor": (np.floor, np.append(POINTS, np.float32([3e9, -3e9]))),
    "tanh": (np.tanh, POINTS),
    "logistic": (special.expit, POINTS),
    "log1p": (np.log1p, POSITIVE),
}


@pytest.mark.parametrize("name", EXACT)
def test_a_rewritten_operation_is_numpys(name):
    exact, points = EXACT[name]
    actual = np.asarray(HOPPER.rules[name](jnp.asarray(points)))
    np.testing.assert_allclose(actual, exact(points.astype(np.float64)), rtol=1e-5, atol=1e-7)


def test_a_power_is_numpys():
    base, exponent = POSITIVE[:7], np.float32(1.7)
    actual = np.asarray(HOPPER.rules["pow"](jnp.asarray(base), jnp.full(base.shape, exponent)))
    np.testing.assert_allclose(actual, base.astype(np.float64) ** np.float64(exponent), rtol=1e-5)


def test_an_operation_that_is_missing_is_refused_by_its_name():
    x = jnp.zeros((1, 5, 1, 64), jnp.bfloat16)
    at = Coordinates.range(5)
    mask = MaskMod(lambda query, key: jnp.arctan((query.position - key.position).astype(jnp.float32)) > 0)
    given = {"bias": None, "score_mod": None, "scale": None, "dropout": None}
    with pytest.raises(
        NotImplementedError, match="the Hopper kernel has no atan, which this mask or score_mod computes"
    ):
        prepare(Call.of(x, x, x, mask=mask, q_at=at, kv_at=at, **given))


def test_the_random_bits_are_those_of_every_kernel():
    words = Dropout(0.3, jax.random.key(5)).words()
    row, column = jnp.arange(13, dtype=jnp.uint32)[:, None], jnp.arange(2**31 - 7, 2**31, dtype=jnp.uint32)[None]
    expected = np.asarray(dropout.kept(words, 0.3, row, column))
    row, column = jnp.broadcast_arrays(row, column)
    np.testing.assert_array_equal(kept([words[0], words[1]], 0.3, row, column), expected)
    assert 0 < expected.sum() < expected.size
