"""Counts floating-point operations and peak rates for model FLOPs utilization (Chowdhery 2022, appendix B)."""

import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.extend.core
import jax.numpy as jnp

_PEAKS = {
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
}
"""Peak FLOP/s of dense bfloat16 products, by the prefix of a device's name, from the makers' data sheets."""
_SIZE, _ROUNDS = 1024, 5


def products(function: Callable[..., Any], *arguments: Any) -> int:
    """Counts the floating-point operations of all matrix products and convolutions of a function.

    The function is traced, not computed. Multiplications and additions both count. A loop of static length counts all
    its iterations, a loop of dynamic length one. Of several branches the most expensive one counts. The backward pass
    has two products for each one of the forward pass, so an update has three times the operations of its loss.

    Args:
        function: a function that JAX can trace.
        arguments: its arguments, arrays or shapes.

    Returns:
        The number of floating-point operations.

    >>> products(lambda x, y: x @ y, jnp.ones((2, 3)), jnp.ones((3, 5)))
    60
    """
    return _count(jax.make_jaxpr(function)(*arguments).jaxpr)


def _count(jaxpr: Any) -> int:
    return sum(_of_equation(equation) for equation in jaxpr.eqns)


def _of_equation(equation: Any) -> int:
    name, params = equation.primitive.name, equation.params
    if (product := of_product(equation)) is not None:
        return product
    if name == "cond":
        return max(_count(branch.jaxpr) for branch in params["branches"])
    times = params["length"] if name == "scan" else 1
    return times * sum(_count(program) for program in inner(params))


def of_product(equation: Any) -> int | None:
    """Counts the operations of an equation of a jaxpr that is a matrix product or a convolution; None for others."""
    name, params = equation.primitive.name, equation.params
    if name in ("dot_general", "ragged_dot", "ragged_dot_general"):
        contracted = params["dimension_numbers"][0][0] if name == "dot_general" else (equation.invars[0].aval.ndim - 1,)
        size = math.prod(equation.invars[0].aval.shape[axis] for axis in contracted)
        return 2 * math.prod(equation.outvars[0].aval.shape) * size
    if name == "conv_general_dilated":
        kernel, numbers = equation.invars[1].aval.shape, params["dimension_numbers"]
        inputs = math.prod(kernel[axis] for axis in numbers.rhs_spec[1:])
        return 2 * math.prod(equation.outvars[0].aval.shape) * inputs
    return None


def inner(params: dict[str, Any]) -> Iterator[Any]:
    """Yields the inner programs of an equation, such as a called function or the body of a loop."""
    for name, value in params.items():
        if name in ("fwd_jaxpr_thunk", "bwd", "jvp_jaxpr_fun"):  # derivative rules run instead
            continue
        if isinstance(value, jax.extend.core.ClosedJaxpr):
            yield value.jaxpr
        elif isinstance(value, jax.extend.core.Jaxpr):
            yield value


def peak(device: jax.Device) -> tuple[float, str]:
    """Returns the peak rate of a device in FLOP/s and its source in words.

    For known devices the rate comes from the data sheet, for others from timing a matrix product.
    """
    for name, figure in _PEAKS.items():
        if device.device_kind.startswith(name):
            return figure, f"{figure / 1e12:,.0f} TFLOP/s of the data sheet of {name}"
    square = jax.device_put(jnp.ones((_SIZE, _SIZE), jnp.float32), device)
    multiply = jax.jit(jnp.dot)
    multiply(square, square).block_until_ready()
    best = math.inf
    for _ in range(_ROUNDS):
        begun = time.monotonic()
        multiply(square, square).block_until_ready()
        best = min(best, time.monotonic() - begun)
    rate = 2 * _SIZE**3 / best
    return rate, f"{rate / 1e9:,.0f} GFLOP/s of a product of {_SIZE} x {_SIZE} float32 matrices, as timed here"
