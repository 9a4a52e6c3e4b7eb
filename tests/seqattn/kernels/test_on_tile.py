"""Programs of scalars on tiles: what compilers of kernels lack is expressed by what they have, or refused by name."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from seqattn.kernels import on_tile
from seqattn.kernels.instructions import Instructions
from seqattn.kernels.per_pair import Border, Late

SHAPE = (5, 7)


def _late(fn, *dtypes):
    """A function of numbers for each pair as the late part of a program, without borders."""
    closed = jax.make_jaxpr(fn)(*(jax.ShapeDtypeStruct((), dtype) for dtype in dtypes))
    return Late(Instructions.of(closed.jaxpr, 0), (), ())


def _evaluate(fn, *tiles):
    return on_tile.evaluate(_late(fn, *(x.dtype for x in tiles)), [], tiles, SHAPE, on_tile.TPU)


def _numbers(seed=0, scale=3.0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=SHAPE).astype(np.float32) * np.float32(scale))


INTEGERS = jnp.asarray(np.random.default_rng(1).integers(-9, 9, SHAPE).astype(np.int32))


@pytest.mark.parametrize(
    "fn",
    [
        lambda x: jnp.where(x > 0, jnp.tanh(x), x * x),
        lambda x: lax.cond(x > 1, lambda: x + 1, lambda: -x),
        lambda x: lax.switch(jnp.clip(x, -1, 5).astype(jnp.int32), [lambda: x, lambda: 2 * x, lambda: 3 * x]),
        lambda x: jax.nn.gelu(x) + jax.nn.relu(x),
        lambda x: jnp.sign(x) * jnp.floor(x) + jnp.round(x),
        lambda x: jnp.expm1(x),
        lambda x: (x > 0).astype(jnp.float32) - jnp.float32(2) ** x,
    ],
    ids=["where", "cond", "switch", "rules", "rounding", "expm1", "boolean"],
)
def test_a_function_of_a_score_is_that_of_vmap(fn):
    x = _numbers()
    np.testing.assert_allclose(_evaluate(fn, x), jax.vmap(jax.vmap(fn))(x), rtol=2e-6, atol=1e-6)


def test_expm1_is_exact_near_zero():
    x = _numbers(scale=1e-5)
    np.testing.assert_allclose(_evaluate(jnp.expm1, x), np.expm1(np.asarray(x, np.float64)), rtol=1e-6)


@pytest.mark.parametrize(
    "fn",
    [
        lambda x: jnp.where(x > 2, x % 2 == 0, x % 3 == 0),
        lambda x: lax.cond(x > 2, lambda: x == 4, lambda: x < -3),
        lambda x: jnp.where(x > 2, True, x == 0) != (x < 5),
        lambda x: lax.switch(jnp.clip(x, 0, 2), [lambda: x == 4, lambda: x < -3, lambda: x > 0]),
        lambda x: (x // 4 == -1) ^ (abs(x) > 3),
    ],
    ids=["where", "cond", "constant", "switch", "arithmetic"],
)
def test_a_choice_between_booleans_holds_no_select(fn):
    np.testing.assert_array_equal(_evaluate(fn, INTEGERS), jax.vmap(jax.vmap(fn))(INTEGERS))
    jaxpr = jax.make_jaxpr(lambda x: _evaluate(fn, x))(INTEGERS).jaxpr
    selects = [equation for equation in jaxpr.eqns if equation.primitive.name == "select_n"]
    assert all(equation.outvars[0].aval.dtype != jnp.bool_ for equation in selects)


def test_the_derivative_rule_of_a_function_is_kept():
    """The derivative of relu at 0 is 0 by its rule, and 1/2 by that of the maximum."""
    zero = jnp.zeros(SHAPE)
    _, pull = jax.vjp(lambda x: _evaluate(jax.nn.relu, x), zero)
    np.testing.assert_array_equal(pull(jnp.ones(SHAPE))[0], zero)


@pytest.mark.parametrize("known", [False, True])
def test_a_table_gives_each_pair_its_entry_and_the_last_one_beyond_its_end(known):
    table = np.array([3, 3, 3, 7, 7, 1, 1, 1, 2], np.int32)

    def pick(table, index):
        return lax.dynamic_slice(table, (index,), (1,))[0]

    types = (jax.ShapeDtypeStruct(table.shape, jnp.int32), jax.ShapeDtypeStruct((), jnp.int32))
    jaxpr = jax.make_jaxpr(lambda table, index: lax.squeeze(lax.dynamic_slice(table, (index,), (1,)), (0,)))(*types)
    border = Border(frozenset(), table.shape, table.dtype, trains=False)
    late = Late(Instructions.of(jaxpr.jaxpr, 1), (border,), (table.tobytes() if known else None,))
    actual = on_tile.evaluate(late, [list(table)], (INTEGERS + 4,), SHAPE, on_tile.TPU)
    expected = jax.vmap(jax.vmap(pick, (None, 0)), (None, 0))(jnp.asarray(table), INTEGERS + 4)
    np.testing.assert_array_equal(actual, expected)


@pytest.mark.parametrize(
    ("fn", "reason"),
    [
        (lambda x: lax.while_loop(lambda y: y < 3, lambda y: y + 1, x), "the TPU kernel has no while"),
        (lambda x: lax.erf_inv(x), "the TPU kernel has no erf_inv, which this mask or score_mod computes"),
        (lambda x: jnp.sum(jnp.full(3, x)), r"of arrays \[\(\)\] that differ by pair"),
    ],
    ids=["loop", "function", "array"],
)
def test_what_a_kernel_lacks_is_refused_by_name(fn, reason):
    with pytest.raises(NotImplementedError, match=reason):
        on_tile.check(_late(fn, jnp.float32), on_tile.TPU)
