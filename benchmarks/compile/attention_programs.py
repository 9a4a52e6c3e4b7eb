"""Calls of attention: one on one device, and `ring_attend` on several."""

import functools
import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from benchmarks.attention import patterns
from benchmarks.attention.case import BACKWARD, AttentionCase
from benchmarks.attention.shapes import Shape
from benchmarks.compile.pipelines import moved_by_kernels
from benchmarks.compile.program import Built, Program
from benchmarks.compile.work import AT_MOST, Work, of_function
from seqattn import Causal, Coordinates, Split, attend, explain, ring_attend, ring_cost, zigzag
from seqattn.kernels.dispatch import IMPLEMENTATIONS, Implementation
from seqattn.masks import Mask, SameSegment, SlidingWindow

MASKS = ("full", "causal", "window", "documents")
"""Masks by name, see `benchmarks.attention.patterns`; the segments of `documents` are known at run time only."""

_ONLY_ON = {"cudnn": ("gpu",), "splash": ("tpu",), "tpu": ("tpu",), "hopper": ("gpu",), "tokamax": ("tpu",)}
LENGTH, LONG = 8192, 65536
_HEADS, _DIM = 8, 128
_ROWS = 4
"""Parts of the rows, where a mesh of 8 devices splits rows and heads."""
_TILE = 128
"""Queries and keys of a tile of a vendor's kernel, to count the tiles that it visits."""


def attention_programs(length: int = LENGTH, long: int | None = LONG) -> list[Program]:
    """Makes the programs of all implementations that read plain keys and values.

    Args:
        length: the number of queries and of keys.
        long: another length, for causal attention alone; None for no such programs.
    """
    names = [name for name, each in _installed().items() if not each.reads_columns]
    cases = [(length, mask, direction) for mask in MASKS for direction in ("fwd", "bwd")]
    # Longer ones show whether memory grows with the length or with its square.
    cases += [(long, "causal", direction) for direction in ("fwd", "bwd") if long is not None]
    return [
        Program(
            f"attention/{name}/{mask}/t{length}/{direction}",
            (1,),
            functools.partial(_attention, name, case),
            case.fields() | {"implementation_of_attention": name, "group": f"{mask}\n{case.shape.name} {direction}"},
            platforms=_ONLY_ON.get(name, ("tpu", "gpu")),
        )
        for name in names
        for length, mask, direction in cases
        if (case := _case(length, mask, direction))
    ]


def split_programs() -> list[Program]:
    """Makes causal attention over a mesh that splits rows and heads, by each kernel that runs on a device's share."""
    case = {direction: _case(LENGTH, "causal", direction, batch=_ROWS * 2) for direction in ("fwd", "bwd")}
    return [
        Program(
            f"split/{name}/causal/t{LENGTH}/{direction}",
            (8,),
            functools.partial(_split, name, case[direction]),
            case[direction].fields() | {"implementation_of_attention": name},
        )
        for name, implementation in _installed().items()
        if implementation.in_shares and not implementation.reads_columns
        for direction in case
    ]


def _installed() -> dict[str, Implementation]:
    """Returns the implementations whose packages are installed."""
    missing = [name for name in ("tokamax",) if importlib.util.find_spec(name) is None]
    return {name: each for name, each in IMPLEMENTATIONS.items() if name not in missing}


def ring_programs() -> list[Program]:
    """Makes the programs of `ring_attend`, in the zigzag order."""
    return [
        Program(f"ring/{mask}/t{length}/{direction}", (4, 8), functools.partial(_ring, case), case.fields())
        for length, mask in ((LENGTH, "full"), (LENGTH, "causal"), (LENGTH, "documents"), (LONG, "causal"))
        for direction in ("fwd", "bwd")
        if (case := _case(length, mask, direction))
    ]


def _case(length: int, mask: str, direction: str, batch: int = 1) -> AttentionCase:
    return AttentionCase(Shape(f"t{length}", batch, length, _HEADS, _DIM, "this table"), mask, direction, "bfloat16")


def _mask(pattern: str) -> Mask | None:
    masks: dict[str, Mask | None] = {
        "full": None,
        "causal": Causal(),
        "window": Causal() & SlidingWindow(patterns.WINDOW),
        "documents": Causal() & SameSegment(),
    }
    return masks[pattern]


def _attention(name: str, case: AttentionCase, devices: Sequence[Any], platform: str) -> Built:
    mask, dtype = _mask(case.pattern), jnp.dtype(case.dtype)
    here = NamedSharding(Mesh(np.array(devices), ("device",)), P())
    x = jax.ShapeDtypeStruct(case.shape.query, dtype, sharding=here)
    at = [jax.ShapeDtypeStruct(case.shape.query[:2], jnp.int32, sharding=here)] * 2 * (case.pattern == "documents")

    def call(implementation: Any, query: Any, key: Any, value: Any, *at: Any) -> dict[str, Any]:
        places = dict.fromkeys(("q_at", "kv_at"), Coordinates(*at)) if at else {}
        return {"query": query, "key": key, "value": value, "mask": mask, "implementation": implementation} | places

    def refuse(*arrays: Any) -> None:
        told = explain(**call(name, *arrays), platform=platform)
        if told.chosen is None:
            raise NotImplementedError(told.refusals[name])

    jax.eval_shape(refuse, x, x, x, *at)

    # The traced program also has a branch for this machine, where a vendor's kernel would refuse.
    def attention(*arrays: Any) -> Any:
        return attend(**call((name, "chunked"), *arrays))

    function, arrays = (_with_gradients(attention), (x, x, x, x, *at)) if case.backward else (attention, (x, x, x, *at))
    lowered = jax.jit(function).trace(*arrays).lower()
    work = _work(name, case, platform, function, arrays)
    if platform != "tpu" or name not in _ONLY_ON:
        return Built(lowered, work)
    known = patterns.segments(case.shape) if at else None
    places = () if known is None else jax.tree.leaves(Coordinates.from_segments(jnp.asarray(known)))
    return Built(lowered, work, moved_by_kernels(function, *arrays[: len(arrays) - len(at)], *places))


def _work(name: str, case: AttentionCase, platform: str, function: Callable[..., Any], arrays: Sequence[Any]) -> Work:
    """Returns the operations of the tiles that a kernel visits."""
    if name in ("splash", "cudnn", "hopper", "tokamax"):
        # No such kernel is in the jaxpr as what it computes. Tiles of this size are its own, or a guess (cuDNN).
        pairs = visited(case, _TILE, _TILE)
        work = Work(4 * pairs * _HEADS * _DIM * (BACKWARD if case.backward else 1))
        return work if name != "cudnn" else Work(work.flop, AT_MOST)
    if case.pattern == "documents":
        # With segments that are known, the schedule and so the number of tiles is known, too.
        at = Coordinates.from_segments(jnp.asarray(patterns.segments(case.shape)))
        places = (np.asarray(at.position), np.asarray(at.segment))
        return of_function(platform, lambda *given: function(*given, *places), *arrays[:-2])
    return of_function(platform, function, *arrays)


def visited(case: AttentionCase, queries: int, keys: int) -> int:
    """Returns the number of pairs in the tiles that have a visible one."""
    found = patterns.spans(case.pattern, case.shape)
    total = 0
    for row in range(case.shape.batch):
        span = found.row(row)
        first = span.first.reshape(-1, queries).min(axis=1) // keys
        beyond = -(-span.beyond.reshape(-1, queries).max(axis=1) // keys)
        total += int((beyond - first).sum()) * queries * keys
    return total


def _with_gradients(attention: Callable[..., Any]) -> Callable[..., Any]:
    def both(query: Any, key: Any, value: Any, d_output: Any, *at: Any) -> Any:
        output, backward = jax.vjp(lambda *inputs: attention(*inputs, *at), query, key, value)
        return output, *backward(d_output)

    return both


def _split(name: str, case: AttentionCase, devices: Sequence[Any], platform: str) -> Built:
    mesh = Mesh(np.array(devices).reshape(_ROWS, -1), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    parts = NamedSharding(mesh, P("data", None, "tensor"))
    x = jax.ShapeDtypeStruct(case.shape.query, jnp.dtype(case.dtype), sharding=parts)
    split = Split("data", "tensor", mesh=mesh)
    options: dict[str, Any] = {"mask": _mask(case.pattern)}
    if reason := explain(x, x, x, **options, platform=platform, split=split).refusals[name]:
        raise NotImplementedError(reason)

    def attention(*arrays: Any) -> Any:
        return attend(*arrays, **options, implementation=name, split=split)

    function = _with_gradients(attention) if case.backward else attention
    arrays = (x,) * (4 if case.backward else 3)
    lowered = jax.jit(function, out_shardings=parts).trace(*arrays).lower()
    pairs = visited(case, _TILE, _TILE)
    return Built(lowered, Work(4 * pairs * _HEADS * _DIM * (BACKWARD if case.backward else 1)))


def _ring(case: AttentionCase, devices: Sequence[Any], platform: str) -> Built:
    mesh = Mesh(np.array(devices), ("sequence",), axis_types=(AxisType.Auto,))
    split, mask = P(None, "sequence"), _mask(case.pattern)
    x = jax.ShapeDtypeStruct(case.shape.query, jnp.dtype(case.dtype), sharding=NamedSharding(mesh, split))
    at = jax.ShapeDtypeStruct(case.shape.query[:2], jnp.int32, sharding=NamedSharding(mesh, split))

    def attention(query: Any, key: Any, value: Any, position: Any, segment: Any) -> Any:
        # Coordinates without a mask are refused.
        places = None if mask is None else Coordinates(position, segment)
        return ring_attend(query, key, value, axis_name="sequence", mask=mask, q_at=places, kv_at=places)

    spread = jax.shard_map(attention, mesh=mesh, in_specs=(split,) * 5, out_specs=split)
    function = _with_gradients(spread) if case.backward else spread
    arrays = (x,) * (4 if case.backward else 3) + (at, at)
    lowered = jax.jit(function).trace(*arrays).lower()
    return Built(lowered, _ring_work(case, len(devices)))


def _ring_work(case: AttentionCase, devices: int) -> Work:
    """Returns the operations of the tiles that the ring visits; the zigzag order balances them over its devices."""
    length = case.shape.length
    segment = patterns.segments(case.shape)[0] if case.pattern == "documents" else np.ones(length, np.int32)
    at = Coordinates.from_segments(jnp.asarray(segment)) if case.pattern == "documents" else Coordinates.range(length)
    order, _ = zigzag(length, devices)
    at = jax.tree.map(lambda field: jnp.asarray(field)[order], at)
    x = jax.ShapeDtypeStruct(case.shape.query[1:], jnp.bfloat16)
    places = {} if case.pattern == "full" else {"q_at": at, "kv_at": at}
    cost = ring_cost(x, x, x, devices=devices, mask=_mask(case.pattern), **places)
    forward, backward = (float(flops.sum()) for flops in (cost.flops_forward, cost.flops_backward))
    return Work(forward + backward * case.backward)
