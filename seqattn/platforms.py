"""The platform that a computation runs on: that of its arrays or, inside `jax.jit`, the one it is compiled for.

A traced function does not know its platform. `jax.jit` compiles it for the arrays that it receives; `jax.export` and
ahead-of-time compilation may compile it for platforms that this machine lacks. So JAX makes the choice between
programs.
"""

import functools
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
"""Platform names, as returned by `jax.default_backend`."""

_LOWERED = {"gpu": ("cuda", "rocm")}
"""The names of `jax.lax.platform_dependent` for a platform, if they differ."""


def platform_of(arrays: Iterable[Any]) -> str | None:
    """Returns the platform of a call with these arrays, or None if one is traced: the program may then run on any.

    Without an array it is JAX's default.
    """
    given = [x for x in arrays if isinstance(x, jax.Array)]
    if not given:
        return jax.default_backend()
    # Arrays that a traced function closes over are concrete, but its program may still be compiled for any platform.
    # Inside a trace every operation is traced, also one without operands, which transfers nothing to a device.
    if any(isinstance(x, jax.core.Tracer) for x in (*given, lax.iota(jnp.int32, 1))):
        return None
    return next(iter(given[0].devices())).platform


def all_platforms() -> tuple[str, ...]:
    """Returns the platforms that a program may run on: all known ones, JAX's default first."""
    return tuple(dict.fromkeys((jax.default_backend(), *PLATFORMS)))


def by_platform(branches: Mapping[str, Callable[..., Result]], *operands: Array) -> Result:
    """Returns the result of the function for the compiled platform, whose program holds only that function.

    Args:
        branches: a function for each platform. Equal functions are traced once. Compiling for a platform without a
            function is JAX's error.
        *operands: the arguments of the functions, which return results of the same shapes and dtypes.

    >>> import jax.numpy as jnp
    >>> branches = {"cpu": jnp.sin, "gpu": jnp.cos, "tpu": jnp.cos}
    >>> traced = jax.jit(lambda x: by_platform(branches, x)).trace(jnp.ones(3))
    >>> ["cosine" in traced.lower(lowering_platforms=(name,)).as_text() for name in ("cpu", "cuda", "tpu")]
    [False, True, True]
    """
    # The shortcut needs all platforms: for a missing one, JAX must raise.
    if len(functions := dict.fromkeys(branches.values())) == 1 and branches.keys() >= set(PLATFORMS):
        return next(iter(functions))(*operands)
    lowered = {name: fn for platform, fn in branches.items() for name in _LOWERED.get(platform, (platform,))}
    return lax.platform_dependent(*operands, **lowered)


def on_tpu(
    fn: Callable[..., Any], *operands: Any, results: Any = None, if_split: Callable[..., Any] | None = None
) -> Any:
    """Returns `fn(*operands)` in a program for a TPU.

    For kernels that JAX compiles for TPUs only, in a branch of `by_platform`. A program that `jax.export` compiles for
    several platforms contains every branch for each of them, and JAX would refuse the kernel there. In such a program
    the results are NaN on the other platforms, whose branch is never taken. The primitive has no derivatives; wrap it
    in a `jax.custom_vjp`.

    Args:
        fn: the function.
        *operands: its arguments, pytrees of arrays.
        results: the shapes and dtypes of the results. If given, the function is only traced where a program for a TPU
            is lowered: on other machines a long kernel costs no time.
        if_split: computes the same in a program that the compiler splits over several devices, where JAX refuses a
            kernel. If None, compiling such a program is JAX's error.

    Raises:
        NotImplementedError: while a program for another platform alone is compiled.
    """
    return _only_on("tpu", fn, operands, results, if_split)


def on_gpu(
    fn: Callable[..., Any], *operands: Any, results: Any = None, if_split: Callable[..., Any] | None = None
) -> Any:
    """Returns `fn(*operands)` in a program for an NVIDIA GPU. The same as `on_tpu`, for kernels of that kind.

    Where the compiler splits a program, it gathers the operands of such a kernel without an error.
    """
    return _only_on("gpu", fn, operands, results, if_split)


def _only_on(
    platform: str,
    fn: Callable[..., Any],
    operands: tuple[Any, ...],
    results: Any,
    if_split: Callable[..., Any] | None = None,
) -> Any:
    """Returns `fn(*operands)` in a program for one platform."""
    primitive = _ONLY[platform]
    leaves, tree = jax.tree.flatten(operands)

    def flattened(fn: Callable[..., Any]) -> Callable[..., list[Array]]:
        return lambda *leaves: jax.tree.leaves(fn(*jax.tree.unflatten(tree, leaves)))

    other = None if if_split is None else flattened(if_split)
    if results is None:
        closed, results = jax.make_jaxpr(lambda *leaves: fn(*jax.tree.unflatten(tree, leaves)), return_shape=True)(
            *leaves
        )
        run = core.jaxpr_as_fun(closed)
        found = primitive.bind(*leaves, run=run, if_split=other, types=tuple(closed.out_avals))
    else:
        types = tuple(jax.core.ShapedArray(x.shape, x.dtype) for x in jax.tree.leaves(results))
        found = primitive.bind(*leaves, run=flattened(fn), if_split=other, types=types)
    return jax.tree.unflatten(jax.tree.structure(results), found)


_ONLY = {"tpu": core.Primitive("on_tpu"), "gpu": core.Primitive("on_gpu")}
"""A primitive for each platform, which stands for a function that is compiled for that platform only."""


def _run(*operands: Any, run: Callable[..., Any], if_split: Any, types: Any) -> Any:
    """Evaluates the function, or the other one if the operands lie on several devices."""
    devices = set().union(*(x.devices() for x in operands if isinstance(x, jax.Array)))
    return run(*operands) if if_split is None or len(devices) < 2 else if_split(*operands)


def _types(*operands: Any, run: Any, if_split: Any, types: Any) -> list[Any]:
    """Returns the types of the results."""
    return list(types)


def _nowhere(*operands: Any, run: Any, if_split: Any, types: Any) -> Any:
    """Returns NaN or 0 in place of the results, on other platforms."""
    return [jnp.full(x.shape, jnp.nan if jnp.issubdtype(x.dtype, jnp.inexact) else 0, x.dtype) for x in types]


def _batched(
    primitive: core.Primitive, operands: Any, dims: Any, *, run: Callable[..., Any], if_split: Any, types: Any
) -> tuple[list[Array], list[int]]:
    """Applies `jax.vmap` to the function."""
    size = next(x.shape[d] for x, d in zip(operands, dims, strict=True) if d is not None)
    more = tuple(x.update(shape=(size, *x.shape)) for x in types)
    both = {"run": run, "if_split": if_split}
    mapped = {name: None if fn is None else jax.vmap(fn, in_axes=tuple(dims)) for name, fn in both.items()}
    return primitive.bind(*operands, **mapped, types=more), [0] * len(more)


def _here(context: Any, *operands: Any, run: Any, if_split: Any, types: Any) -> Any:
    """Lowers the function, or the other one in a program that the compiler splits over devices."""
    # JAX refuses a kernel by the same number. A program inside of `jax.shard_map` has none: each device has its own.
    devices = getattr(context.module_context.axis_context, "num_devices", None) or 1
    chosen = run if if_split is None or devices == 1 else if_split
    return mlir.lower_fun(chosen, multiple_results=True)(context, *operands)


def _elsewhere(kind: str, context: Any, *operands: Any, run: Any, if_split: Any, types: Any) -> Any:
    """Lowers to `_nowhere` in a program for several platforms, and raises in a program for one."""
    if len(platforms := context.module_context.platforms) == 1:
        raise NotImplementedError(f"a kernel for {kind} cannot be compiled for {platforms[0]}")
    lower = mlir.lower_fun(_nowhere, multiple_results=True)
    return lower(context, *operands, run=run, if_split=if_split, types=types)


for _platform, _lowered, _kind in (("tpu", "tpu", "TPUs"), ("gpu", "cuda", "NVIDIA GPUs")):
    _primitive = _ONLY[_platform]
    _primitive.multiple_results = True
    _primitive.def_impl(_run)
    _primitive.def_abstract_eval(_types)
    mlir.register_lowering(_primitive, _here, platform=_lowered)
    mlir.register_lowering(_primitive, functools.partial(_elsewhere, _kind))
    batching.primitive_batchers[_primitive] = functools.partial(_batched, _primitive)
