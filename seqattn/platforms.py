"""Which platform a computation is for: where its arrays lie, or, inside `jax.jit`, the one it is compiled for.

A traced function does not know the latter: `jax.jit` compiles it for the arrays that it gets, and `jax.export` and
ahead-of-time compilation for platforms that this machine need not have. So a choice between programs is left to JAX.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend import core
from jax.interpreters import batching, mlir
from jaxtyping import Array

Result = TypeVar("Result")

PLATFORMS = ("cpu", "gpu", "tpu")
"""Names as `jax.default_backend` gives them."""

_LOWERED = {"gpu": ("cuda", "rocm")}
"""What `jax.lax.platform_dependent` calls a platform, where it has other names."""


def platform_of(arrays: Iterable[Any]) -> str | None:
    """Where a call with these arrays runs; None where one is traced, and the program may be for any platform.

    Without an array it is JAX's default.
    """
    given = [x for x in arrays if isinstance(x, jax.Array)]
    if any(isinstance(x, jax.core.Tracer) for x in given):
        return None
    return next(iter(given[0].devices())).platform if given else jax.default_backend()


def all_platforms() -> tuple[str, ...]:
    """The platforms that a program may be for: all that we know, and JAX's default first."""
    return tuple(dict.fromkeys((jax.default_backend(), *PLATFORMS)))


def by_platform(branches: Mapping[str, Callable[..., Result]], *operands: Array) -> Result:
    """What the function for the platform that is compiled for returns; the others leave no trace in its program.

    Args:
        branches: a function for each platform. Equal ones are traced once; without one for a platform, compiling for
            it is JAX's error.
        *operands: their arguments. Results have the same shapes and dtypes.

    >>> import jax.numpy as jnp
    >>> branches = {"cpu": jnp.sin, "gpu": jnp.cos, "tpu": jnp.cos}
    >>> traced = jax.jit(lambda x: by_platform(branches, x)).trace(jnp.ones(3))
    >>> ["cosine" in traced.lower(lowering_platforms=(name,)).as_text() for name in ("cpu", "cuda", "tpu")]
    [False, True, True]
    """
    if len(functions := dict.fromkeys(branches.values())) == 1:
        return next(iter(functions))(*operands)
    lowered = {name: fn for platform, fn in branches.items() for name in _LOWERED.get(platform, (platform,))}
    return lax.platform_dependent(*operands, **lowered)


def on_tpu(fn: Callable[..., Result], *operands: Any) -> Result:
    """`fn(*operands)` in a program for a TPU; in one for several platforms the results are NaN on the others.

    For kernels that JAX compiles for TPUs alone, in a branch of `by_platform`: a program that `jax.export` makes for
    several platforms holds every branch for each of them, the kernel too, which then is refused. It has no derivatives;
    `jax.custom_vjp` around it does.
    """
    leaves, tree = jax.tree.flatten(operands)

    def flat(*leaves: Array) -> Result:
        return fn(*jax.tree.unflatten(tree, leaves))

    closed, shapes = jax.make_jaxpr(flat, return_shape=True)(*leaves)
    results = _on_tpu.bind(*leaves, closed=closed)
    return jax.tree.unflatten(jax.tree.structure(shapes), results)


_on_tpu = core.Primitive("on_tpu")
_on_tpu.multiple_results = True


@_on_tpu.def_impl
def _run(*operands: Any, closed: Any) -> Any:
    return core.jaxpr_as_fun(closed)(*operands)


@_on_tpu.def_abstract_eval
def _types(*operands: Any, closed: core.ClosedJaxpr) -> list[Any]:
    return closed.out_avals


def _nowhere(*operands: Any, closed: Any) -> Any:
    return [
        jnp.full(x.shape, jnp.nan if jnp.issubdtype(x.dtype, jnp.inexact) else 0, x.dtype) for x in closed.out_avals
    ]


def _batched(operands: Any, dims: Any, *, closed: core.ClosedJaxpr) -> tuple[list[Array], list[int]]:
    results = on_tpu(jax.vmap(core.jaxpr_as_fun(closed), in_axes=tuple(dims)), *operands)
    return results, [0] * len(results)


mlir.register_lowering(_on_tpu, mlir.lower_fun(_run, multiple_results=True), platform="tpu")
mlir.register_lowering(_on_tpu, mlir.lower_fun(_nowhere, multiple_results=True))
batching.primitive_batchers[_on_tpu] = _batched
