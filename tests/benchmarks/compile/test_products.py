"""Products of programs compiled for the simulated devices, and in the words of the compiler for TPUs."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from benchmarks.compile.products import products
from benchmarks.compile.work import AT_LEAST, Work


def compiled(function, *arguments):
    return products(jax.jit(function).lower(*arguments).compile().as_text())


def test_each_device_counts_its_own_part():
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    x, y = (
        jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec))
        for shape, spec in (((8 * 64, 96), P("x")), ((96, 80), P()))
    )
    assert compiled(jnp.matmul, x, y) == Work(2 * 64 * 96 * 80)


def test_batches_and_loops_count():
    x = jnp.ones((3, 64, 64))
    assert compiled(lambda x: x @ x, x) == Work(2 * 3 * 64**3)
    assert compiled(lambda x: jax.lax.fori_loop(0, 7, lambda _, y: jnp.sin(y @ x), x), x) == Work(7 * 2 * 3 * 64**3)


def test_a_loop_of_unknown_length_counts_once():
    x = jnp.ones((64, 64))
    looped = compiled(lambda x: jax.lax.while_loop(lambda y: y.sum() > 1, lambda y: jnp.sin(y @ x), x), x)
    assert looped == Work(2 * 64**3, AT_LEAST)


CONVOLUTION = """
ENTRY %main (x: bf16[8,96], y: bf16[96,80]) -> bf16[8,80] {{
  %x = {x}{{1,0}} parameter(0)
  %y = {y}{{1,0}} parameter(1)
  ROOT %z = {z} convolution(%x, %y), {rest}, metadata={{op_name="dot_general"}}
}}
"""


@pytest.mark.parametrize(
    ("x", "y", "z", "rest", "flop"),
    [
        ("bf16[8,96]", "bf16[96,80]", "bf16[8,80]", "dim_labels=bf_io->bf", 2 * 8 * 96 * 80),
        ("bf16[8,96]", "bf16[80,96]", "bf16[8,80]", "dim_labels=bf_oi->bf", 2 * 8 * 96 * 80),
        # A batch of 5 as a window: of 5 x 5 pairs, the 5 on the diagonal meet an input.
        (
            "bf16[5,8,96]",
            "bf16[5,96,80]",
            "bf16[5,8,80]",
            "window={size=5 stride=4 lhs_dilate=5}, dim_labels=0bf_0io->0bf",
            2 * 5 * 8 * 96 * 80,
        ),
        # A true convolution of width 3, with one place of padding on either side.
        (
            "bf16[7,11,13]",
            "bf16[3,13,17]",
            "bf16[7,11,17]",
            "window={size=3 pad=1_1}, dim_labels=b0f_0io->b0f",
            2 * 7 * (3 * 11 - 2) * 13 * 17,
        ),
    ],
)
def test_products_that_are_written_as_convolutions(x, y, z, rest, flop):
    assert products(CONVOLUTION.format(x=x, y=y, z=z, rest=rest)) == Work(flop)


def test_products_of_cublas():
    config = 'backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"]}}}'
    text = CONVOLUTION.format(x="bf16[8,96]", y="bf16[96,80]", z="(bf16[8,80]{1,0}, s8[4])", rest=config)
    assert products(text.replace("convolution(", "custom-call(")) == Work(2 * 8 * 96 * 80)


def test_kernels_count_as_nothing():
    rest = 'custom_call_target="tpu_custom_call"'
    text = CONVOLUTION.format(x="bf16[8,96]", y="bf16[96,80]", z="bf16[8,80]{1,0:T(8,128)(2,1)}", rest=rest)
    assert products(text.replace("convolution(", "custom-call(")) == Work()
