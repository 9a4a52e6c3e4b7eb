"""Operations of programs whose number is known."""

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from benchmarks.compile.work import ABOUT, AT_LEAST, AT_MOST, EXACT, RULES, Counter, Work, of_function
from seqattn import Causal, attend
from seqattn.platforms import by_platform

ONE = 2 * 3 * 5 * 7  # of a product [3, 5] x [5, 7]
X, Y = jnp.ones((3, 5)), jnp.ones((5, 7))
SQUARE = jnp.ones((11, 11))


def test_static_loops_count_each_iteration():
    assert of_function("cpu", lambda x, y: x @ y, X, Y) == Work(ONE)
    looped = of_function("cpu", lambda x: jax.lax.fori_loop(0, 13, lambda _, z: z @ x, x), SQUARE)
    assert looped == Work(13 * 2 * 11**3)


def test_dynamic_loops_count_once_and_say_so():
    looped = of_function("cpu", lambda x, n: jax.lax.fori_loop(0, n, lambda _, z: z @ x, x), SQUARE, 13)
    assert looped == Work(2 * 11**3, AT_LEAST)


def test_each_platform_has_its_own_branch():
    def chosen(x):
        return by_platform({"cpu": lambda x: x @ x, "gpu": lambda x: x @ x @ x, "tpu": lambda x: x + 1}, x)

    counts = {platform: of_function(platform, chosen, SQUARE).flop for platform in ("cpu", "gpu", "tpu")}
    assert counts == {"cpu": 2 * 11**3, "gpu": 4 * 11**3, "tpu": 0}


def test_the_larger_branch_counts_where_the_choice_is_unknown():
    work = of_function("cpu", lambda x, c: jax.lax.cond(c, lambda x: x @ x @ x, lambda x: x @ x, x), SQUARE, True)
    assert work.flop == 4 * 11**3


def test_what_no_result_needs_is_not_counted():
    assert of_function("cpu", lambda x: (x @ x, x + 1)[1], SQUARE) == Work()


def test_each_device_of_a_shard_map_counts():
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
    x = jnp.ones((4 * 3, 5))
    spread = jax.shard_map(lambda x: x @ x.T, mesh=mesh, in_specs=P("a"), out_specs=P("a"), axis_names={"a"})
    assert of_function("cpu", spread, x).flop == 4 * 2 * 3 * 5 * 3


def test_a_kernel_counts_every_step_of_its_grid():
    def kernel(x, y, out):
        out[...] = x[...] @ y[...]

    blocks = pl.BlockSpec((11, 11), lambda i: (0, 0))
    call = pl.pallas_call(kernel, out_shape=SQUARE, grid=(3,), in_specs=[blocks] * 2, out_specs=blocks, interpret=True)
    assert of_function("tpu", call, SQUARE, SQUARE) == Work(3 * 2 * 11**3, AT_MOST)


def test_tiled_attention_skips_what_its_mask_skips():
    x = jax.ShapeDtypeStruct((1, 4096, 2, 8), jnp.float32)
    full, causal = (
        of_function("cpu", lambda x, mask=mask: attend(x, x, x, mask=mask, implementation="chunked"), x).flop
        for mask in (None, Causal())
    )
    assert full >= 4 * 4096**2 * 2 * 8
    assert 0.5 < causal / full < 0.65


def test_a_rule_counts_a_primitive_that_hides_its_program():
    rules = RULES | {"sin": lambda counter, equation: Work(17 * equation.outvars[0].aval.size)}
    jaxpr = jax.make_jaxpr(lambda x: jnp.sin(x @ x))(SQUARE).jaxpr
    assert Counter("cpu", rules)(jaxpr) == Work(2 * 11**3 + 17 * 11**2)


@pytest.mark.parametrize(
    ("bounds", "together"),
    [((EXACT, EXACT), EXACT), ((EXACT, AT_MOST), AT_MOST), ((AT_LEAST, AT_MOST), ABOUT), ((ABOUT, EXACT), ABOUT)],
)
def test_bounds_of_sums(bounds, together):
    first, second = (Work(1, bound) for bound in bounds)
    assert (first + second).bound == (second + first).bound == together
