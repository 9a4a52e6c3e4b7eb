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


def _of_booleans(fn, *arguments):
    """The comparisons and choices between booleans in a program, also in nested ones."""
    names = ("select_n", "eq", "ne", "lt", "le", "gt", "ge", "max", "min")

    def found(jaxpr):
        for equation in jaxpr.eqns:
            inner = equation.params.get("jaxpr")
            yield from found(inner.jaxpr) if inner is not None else ()
            if equation.primitive.name in names and equation.invars[-1].aval.dtype == jnp.bool_:
                yield equation.primitive.name

    return list(found(jax.make_jaxpr(fn)(*arguments).jaxpr))


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
        lambda x: jnp.maximum(x > 3, x < -4) & ((x > 0) <= (x > 5)) | jnp.minimum(x > 6, x != 8),
        lambda x: ((x > 0) < (x < 2)) ^ ((x > -3) >= (x > 1)) ^ ((x > 4) > (x > 6)),
    ],
    ids=["where", "cond", "constant", "switch", "arithmetic", "extremes", "order"],
)
def test_a_choice_between_booleans_holds_no_select(fn):
    np.testing.assert_array_equal(_evaluate(fn, INTEGERS), jax.vmap(jax.vmap(fn))(INTEGERS))
    assert _of_booleans(lambda x: _evaluate(fn, x), INTEGERS) == []


def test_the_derivative_rule_of_a_function_is_kept():
    """The derivative of relu at 0 is 0 by its rule, and 1/2 by that of the maximum."""
    zero = jnp.zeros(SHAPE)
    _, pull = jax.vjp(lambda x: _evaluate(jax.nn.relu, x), zero)
    np.testing.assert_array_equal(pull(jnp.ones(SHAPE))[0], zero)


def test_the_derivative_rule_of_a_reverse_pass_is_kept():
    @jax.custom_vjp
    def clipped(x):
        return 2 * x

    clipped.defvjp(lambda x: (2 * x, None), lambda _, d: (jnp.clip(d, -0.5, 0.5),))
    x, direction = _numbers(), _numbers(seed=1)
    value, pull = jax.vjp(lambda x: _evaluate(clipped, x), x)
    np.testing.assert_array_equal(value, 2 * x)
    np.testing.assert_array_equal(pull(direction)[0], jnp.clip(direction, -0.5, 0.5))


@jax.custom_jvp
def _with_a_rule(x):
    """A function that holds what a kernel lacks, behind its derivative rule."""
    return lax.erf_inv(x)


_with_a_rule.defjvp(lambda primals, tangents: (_with_a_rule(*primals), *tangents))


@jax.custom_jvp
def _of_two(x):
    return jnp.stack([x, x])


_of_two.defjvp(lambda primals, tangents: (_of_two(*primals), _of_two(*tangents)))


TABLE = np.array([3, 3, 3, 7, 7, 1, 1, 1, 2], np.int32)


@pytest.mark.parametrize(
    ("table", "known"),
    [(TABLE, False), (TABLE, True), (TABLE.astype(np.uint32), True), (TABLE > 2, False)],
    ids=["scalars", "known", "known_uint32", "booleans"],
)
def test_a_table_gives_each_pair_its_entry_and_the_last_one_beyond_its_end(table, known):
    def pick(table, index):
        # An operation of the table's own dtype follows: the entry must have it.
        entry = lax.dynamic_slice(table, (index,), (1,))[0]
        return entry == jnp.asarray(1, table.dtype)

    def late(table, index):
        return lax.squeeze(lax.dynamic_slice(table, (index,), (1,)), (0,)) == jnp.asarray(1, table.dtype)

    types = (jax.ShapeDtypeStruct(table.shape, table.dtype), jax.ShapeDtypeStruct((), jnp.int32))
    jaxpr = jax.make_jaxpr(late)(*types)
    border = Border(frozenset(), table.shape, table.dtype, trains=False)
    parts = Late(Instructions.of(jaxpr.jaxpr, 1), (border,), (table.tobytes() if known else None,))

    def run(index):
        return on_tile.evaluate(parts, [[jnp.asarray(x) for x in table]], (index,), SHAPE, on_tile.TPU)

    expected = jax.vmap(jax.vmap(pick, (None, 0)), (None, 0))(jnp.asarray(table), INTEGERS + 4)
    np.testing.assert_array_equal(run(INTEGERS + 4), expected)
    assert _of_booleans(run, INTEGERS) == []


@pytest.mark.parametrize(
    ("fn", "reason"),
    [
        (lambda x: lax.while_loop(lambda y: y < 3, lambda y: y + 1, x), "the TPU kernel has no while"),
        (lambda x: lax.erf_inv(x), "the TPU kernel has no erf_inv, which this mask or score_mod computes"),
        (lambda x: jnp.sum(jnp.full(3, x)), r"of arrays \[\(\)\] that differ by pair"),
        (_with_a_rule, "the TPU kernel has no erf_inv"),
        (lambda x: _of_two(x)[0], r"custom_jvp_call of arrays \[\(\), \(2,\)\] that differ by pair"),
        (
            lambda x: lax.cond(x > 0, lambda: x.astype(jnp.int8) > 3, lambda: True),
            "the TPU kernel has no convert_element_type in int8",
        ),
    ],
    ids=["loop", "function", "array", "rule", "array_of_a_rule", "int8_in_a_branch"],
)
def test_what_a_kernel_lacks_is_refused_by_name(fn, reason):
    with pytest.raises(NotImplementedError, match=reason):
        on_tile.check(_late(fn, jnp.float32), on_tile.TPU)
