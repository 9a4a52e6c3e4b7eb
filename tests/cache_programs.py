"""What tests of the kernels over a cache share: a decoding step lowered for a device, gradients beside `cached`."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding

from seqattn.attention import attend_columns
from seqattn.coordinates import Coordinates
from seqattn.kernels import cached
from seqattn.kernels.call import Columns, Kernel, Result
from seqattn.masks import Causal
from tests.contract import close

B, N, K, H = 2, 8, 2, 64


def lowered(
    platform: str,
    size: int,
    implementation: str | Sequence[str] | None,
    *,
    sharding: Sharding | None = None,
    grad: bool = False,
    vmap: bool = False,
) -> str:
    """The StableHLO of a step over a cache, of which a number of slots is filled that is known at run time only.

    Args:
        platform: what JAX names it: "tpu" or "cuda".
        size: the slots of the cache.
        implementation: as in `attend`.
        sharding: of every array.
        grad: the gradients of the sum of the output instead of the output.
        vmap: three such calls under `jax.vmap`.
    """
    more = (3,) * vmap

    def array(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((*more, *shape), dtype, sharding=sharding)

    floats = [array(shape, jnp.bfloat16) for shape in ((B, 1, N, H), (B, K, H, size), (B, K, size, H))]
    finite, filled = array((B, size), bool), array((B, 1), jnp.int32)

    def step(query: Any, key: Any, value: Any, finite: Any, filled: Any) -> jax.Array:
        at = {"q_at": Coordinates(filled, jnp.ones_like(filled)), "kv_at": Coordinates.range(size)}
        return attend_columns(query, Columns(key, value, finite), mask=Causal(), **at, implementation=implementation)

    def loss(*arrays: Any) -> jax.Array:
        return jnp.sum(step(*arrays).astype(jnp.float32))

    function = jax.grad(loss, argnums=(0, 1, 2)) if grad else step
    traced = jax.jit(jax.vmap(function) if vmap else function).trace(*floats, finite, filled)
    return traced.lower(lowering_platforms=(platform,)).as_text()


def assert_is_cached(text: str, operation: str) -> None:
    """Checks that a program by `lowered` has the products of `cached`, and not the operation of a kernel.

    Gradients alone need no kernel: nothing reads the output itself.
    """
    assert operation not in text
    assert "stablehlo.dot_general" in text


def assert_gradients_of_cached(
    kernel: Kernel, query: Any, columns: Columns, scale: float, attend: Callable[[Any, Columns, Kernel], Result]
) -> None:
    """Checks the results of a kernel and their gradients against those of `cached`, in every operand.

    Args:
        kernel: the kernel.
        query: `[B, T, N, H]`.
        columns: the cache.
        scale: what products are multiplied by; its gradient is compared as well.
        attend: takes queries, columns and a kernel, and returns the kernel's results for them.
    """

    def loss(kernel: Kernel, query: Any, key: Any, value: Any, scale: Any) -> jax.Array:
        output, lse = attend(
            query,
            Columns(key, value, columns.finite),
            lambda call: kernel(dataclasses.replace(call, scale=scale)),
        )
        return jnp.sum(jnp.sin(output)) + jnp.sum(jnp.where(lse > -1e30, jnp.cos(lse), 0))

    given = query, columns.key, columns.value, jnp.float32(scale)
    found, expected = (
        jax.jit(jax.value_and_grad(functools.partial(loss, each), argnums=(0, 1, 2, 3)))(*given)
        for each in (kernel, cached.attend)
    )
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        close(a, b)
    assert all(np.any(x) for x in found[1])
