"""The derivative of a score modification for each pair, against differences in NumPy float64 and against JAX."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqattn.coordinates import Coordinates
from seqattn.kernels import on_tile
from seqattn.kernels.call import Call
from seqattn.kernels.hopper.operations import HOPPER
from seqattn.kernels.hopper.rule import Rule, rule_of
from seqattn.kernels.hopper.slope import with_slope
from seqattn.kernels.traced import capture

POINTS = np.float32([[-40, -3, -1.5], [0, 0.25, 1], [2.5, 7, 30]])


def rule(fn) -> Rule:
    x, at = jnp.zeros((1, 3, 1, 64), jnp.bfloat16), Coordinates.range(3)
    given = {"mask": None, "bias": None, "scale": None, "dropout": None}
    call = Call.of(x, x, x, score_mod=fn, q_at=at, kv_at=at, **given)
    traced = capture(call, like=call)
    return rule_of(traced, traced.score_mod.program, mod=True)[0]


def evaluated(made: Rule) -> list[np.ndarray]:
    borders = [None] * len(made.late.borders)
    results = on_tile.evaluate_all(made.late, borders, (jnp.asarray(POINTS),), POINTS.shape, HOPPER)
    return [np.asarray(x) for x in results]


@pytest.mark.parametrize(
    "fn",
    [
        lambda x: 3 * jnp.tanh(x / 3),
        lambda x: x * jax.nn.sigmoid(x),
        lambda x: jnp.sqrt(jnp.abs(x) + 1) + jnp.floor(x),
        lambda x: jnp.log1p(jnp.abs(x)) - jnp.power(jnp.abs(x) + 1, 1.5),
        lambda x: jnp.where(x > 0, x, -jnp.inf),
        jax.lax.stop_gradient,
        jnp.square,
    ],
    ids=["cap", "sigmoid", "sqrt", "log1p", "mask", "constant", "square"],
)
def test_the_slope_is_jaxs(fn):
    value, slope = evaluated(with_slope(rule(lambda score, query, key, head: fn(score))))
    expected = jax.vmap(jax.vmap(jax.grad(fn)))(jnp.asarray(POINTS))
    np.testing.assert_allclose(value, np.asarray(fn(jnp.asarray(POINTS))), rtol=1e-5)
    np.testing.assert_allclose(slope, np.asarray(expected), rtol=1e-5, atol=1e-6)


def test_the_slope_of_a_cap_is_1_where_the_score_is_0():
    """A tanh rewritten by |x|, as the device computes it, has there the derivative 0."""
    _, slope = evaluated(with_slope(rule(lambda score, query, key, head: 3 * jnp.tanh(score / 3))))
    assert POINTS[1, 0] == 0
    assert slope[1, 0] == 1


def test_a_functions_own_derivative_rule_counts():
    """The derivative of relu at 0 is 0 by its rule, and 1/2 by that of the maximum."""
    traced = {}

    @jax.jit  # outside of a trace there are no derivatives, and rules are left out
    def run(x):
        traced["rule"] = rule(lambda score, query, key, head: jax.nn.relu(score) + 0 * x)
        return x

    run(jnp.float32(1))
    made = with_slope(traced["rule"])
    results = on_tile.evaluate_all(made.late, [[jnp.float32(0)]], (jnp.asarray(POINTS),), POINTS.shape, HOPPER)
    np.testing.assert_array_equal(results[0], np.maximum(POINTS, 0))
    np.testing.assert_array_equal(results[1], POINTS > 0)


@jax.custom_vjp
def _only_backward(x):
    return 2 * x


_only_backward.defvjp(lambda x: (2 * x, None), lambda _, g: (2 * g,))


def test_a_rule_without_forward_mode_is_refused():
    @jax.jit
    def run(x):
        with pytest.raises(NotImplementedError, match="a derivative rule for reverse mode only"):
            with_slope(rule(lambda score, query, key, head: _only_backward(score) * x))
        return x

    run(jnp.float32(1))
