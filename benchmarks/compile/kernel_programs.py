"""Calls of the library's own kernels that no vendor's kernel takes: other masks, score functions and head dims."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from benchmarks.attention import patterns
from benchmarks.attention.case import BACKWARD, AttentionCase
from benchmarks.attention.shapes import Shape
from benchmarks.compile.attention_programs import visited
from benchmarks.compile.program import Built, Program
from benchmarks.compile.work import ABOUT, AT_MOST, Work, of_function
from seqattn import Causal, Coordinates, attend
from seqattn.attention import attend_columns
from seqattn.kernels.call import Columns
from seqattn.masks import Prefix, SameSegment
from seqattn.score_mod import ScoreFunction
from seqattn.score_mods import Alibi

KERNELS = {"tpu": ("tpu",), "hopper": ("gpu",)}
"""The kernels, each with the platforms that it runs on."""

_LENGTH, _HEADS = 8192, 8


def _with_cap(cap: Any) -> ScoreFunction:
    """Returns a soft cap that is an array, with a gradient."""
    return ScoreFunction(lambda score, query, key, head, cap: cap * jnp.tanh(score / cap), cap)


CALLS: dict[str, Callable[[Any, Any], dict[str, Any]]] = {
    "causal": lambda x, segment: {"mask": Causal()},
    "prefix": lambda x, segment: {"mask": Causal() | Prefix(segment[0, 0])},
    "documents": lambda x, segment: {"mask": Causal() & SameSegment()},
    "alibi": lambda x, segment: {"mask": Causal(), "score_mod": Alibi(x)},
    "cap": lambda x, segment: {"mask": Causal(), "score_mod": _with_cap(x[0])},
}
"""For each name the arguments of `attend`, from `[N]` numbers and from segments `[1, T]` known at run time."""

_PATTERNS = {"cap": "causal"}
"""The mask of a call, where it is not its name: see `benchmarks.attention.patterns`."""

_CASES = (*((name, 128) for name in CALLS if name != "causal"), ("causal", 64), ("causal", 256), ("documents", 64))


def kernel_programs(length: int = _LENGTH) -> list[Program]:
    """Makes the programs: every call with a head dim of 128, and other head dims; steps over a cache of `length`."""
    return [
        Program(
            f"kernel/{kernel}/{name}/h{dim}/{direction}",
            (1,),
            functools.partial(_build, kernel, name, case),
            case.fields() | {"implementation_of_attention": kernel},
            platforms=platforms,
        )
        for kernel, platforms in KERNELS.items()
        for name, dim in _CASES
        for direction in ("fwd", "bwd")
        if (case := _case(name, dim, direction, length))
    ] + [_over_cache(length, dim) for dim in (64, 128, 256)]


def _over_cache(slots: int, dim: int) -> Program:
    """Makes a step of 4 hypotheses of each of 4 rows, which see the last document in a cache."""
    sizes = {"batch": 4, "length": 4, "num_keys": slots, "num_heads": _HEADS, "num_kv_heads": 2, "head_dim": dim}
    more = {"mask": "documents", "pass": "fwd", "dtype": "bfloat16", "implementation_of_attention": "hopper_cached"}
    name = f"kernel/hopper_cached/documents/h{dim}/fwd"
    return Program(name, (1,), functools.partial(_build_over_cache, sizes), sizes | more, platforms=("gpu",))


def _build_over_cache(sizes: dict[str, int], devices: Sequence[Any], platform: str) -> Built:
    here = NamedSharding(Mesh(np.array(devices), ("device",)), P())
    batch, length, slots, heads, kv_heads, dim = sizes.values()

    def step(query: Any, key: Any, value: Any, segment: Any) -> Any:
        columns = Columns(key, value, jnp.ones(segment.shape, bool))
        q_at = Coordinates.from_segments(segment[:, -length:])
        kv_at = Coordinates.from_segments(segment)
        # The traced program also has a branch for this machine, where the kernel would refuse.
        names = ("hopper_cached", "cached")
        return attend_columns(query, columns, mask=SameSegment(), q_at=q_at, kv_at=kv_at, implementation=names)

    shapes = (batch, length, heads, dim), (batch, kv_heads, dim, slots), (batch, kv_heads, slots, dim)
    arrays = [jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=here) for shape in shapes]
    arrays.append(jax.ShapeDtypeStruct((batch, slots), jnp.int32, sharding=here))
    # The kernel skips the tiles that no hypothesis sees.
    work = Work(4 * batch * heads * length * slots * dim, AT_MOST)
    return Built(jax.jit(step).trace(*arrays).lower(), work)


def _case(name: str, dim: int, direction: str, length: int) -> AttentionCase:
    pattern = _PATTERNS.get(name, name)
    assert pattern in patterns.PATTERNS
    return AttentionCase(
        Shape(f"t{length}-h{dim}", 1, length, _HEADS, dim, "this table"), pattern, direction, "bfloat16"
    )


def _build(kernel: str, name: str, case: AttentionCase, devices: Sequence[Any], platform: str) -> Built:
    here = NamedSharding(Mesh(np.array(devices), ("device",)), P())

    def typed(shape: tuple[int, ...], dtype: Any) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=here)

    def attention(query: Any, key: Any, value: Any, x: Any, segment: Any) -> Any:
        # The traced program also has a branch for this machine, where the kernel would refuse.
        options = CALLS[name](x, segment) | {"implementation": (kernel, "chunked")}
        if name == "documents":
            options |= dict.fromkeys(("q_at", "kv_at"), Coordinates.from_segments(segment))
        return attend(query, key, value, **options)

    def with_gradients(query: Any, key: Any, value: Any, x: Any, segment: Any) -> Any:
        results, pull = jax.vjp(lambda q, k, v, x: attention(q, k, v, x, segment), query, key, value, x)
        return results, *pull(results)

    x = typed(case.shape.query, jnp.dtype(case.dtype))
    arrays = (x, x, x, typed((_HEADS,), jnp.float32), typed(case.shape.query[:2], jnp.int32))
    function = with_gradients if case.backward else attention
    lowered = jax.jit(function).trace(*arrays).lower()
    if kernel == "tpu":
        return Built(lowered, of_function(platform, function, *arrays))
    # The products of the kernel for Hopper are no products in the jaxpr: its tiles of 128 x 128 are counted.
    shape, pairs = case.shape, visited(case, 128, 128)
    flop = 4 * pairs * shape.num_heads * shape.head_dim * (BACKWARD if case.backward else 1)
    return Built(lowered, Work(flop, ABOUT))
