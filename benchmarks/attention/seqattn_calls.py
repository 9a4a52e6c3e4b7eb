"""Calls of `seqattn.attend`: masks as predicates, documents as coordinates of the batch."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from benchmarks.attention import patterns
from benchmarks.attention.call import AttentionCall
from benchmarks.attention.case import AttentionCase
from seqattn.attention import attend
from seqattn.coordinates import Coordinates
from seqattn.kernels.dispatch import Explanation, explain
from seqattn.masks import Causal, Prefix, SameSegment, SlidingWindow
from seqattn.score_mods import Alibi, SoftCap


def call(case: AttentionCase, implementation: str | None) -> AttentionCall:
    """Returns the call for a case, with `implementation` as in `attend`."""
    extra: tuple[Array, ...] = ()
    if case.pattern == "documents":
        at = Coordinates.from_segments(jnp.asarray(patterns.segments(case.shape)))
        extra = (jnp.asarray(at.position), jnp.asarray(at.segment))
    arguments, words = _arguments(case)

    def attention(query: Array, key: Array, value: Array, *at: Array) -> Array:
        return attend(query, key, value, **arguments(*at), implementation=implementation)

    def explained(query: Array, key: Array, value: Array, *at: Array) -> Explanation:
        return explain(query, key, value, **arguments(*at), implementation=implementation)

    return AttentionCall(
        attention, ", ".join(filter(None, [*_choice(case, implementation, explained, extra), words])), extra
    )


def _arguments(case: AttentionCase) -> tuple[Callable[..., dict[str, Any]], str]:
    """Returns the further arguments of `attend`, as a function of the coordinates, and how they are written."""
    if case.pattern == "documents":
        return _packed, "Causal() & SameSegment()"
    length, cap = patterns.prefix_length(case.shape), patterns.CAP
    if window := patterns.window(case.pattern):
        mask = Causal() & SlidingWindow(window)
        return lambda: {"mask": mask}, f"Causal() & SlidingWindow({window})"
    given: dict[str, tuple[dict[str, Any], str]] = {
        "full": ({}, ""),
        "causal": ({"mask": Causal()}, "Causal()"),
        "prefix": ({"mask": Causal() | Prefix(length)}, f"Causal() | Prefix({length})"),
        "alibi": ({"mask": Causal(), "score_mod": Alibi()}, "Causal(), Alibi()"),
        "cap": ({"mask": Causal(), "score_mod": SoftCap(cap)}, f"Causal(), SoftCap({cap:g})"),
    }
    arguments, words = given[case.pattern]
    return lambda: arguments, words


def _packed(position: Array, segment: Array) -> dict[str, Any]:
    at = Coordinates(position, segment)
    return {"mask": Causal() & SameSegment(), "q_at": at, "kv_at": at}


def _choice(
    case: AttentionCase, implementation: str | None, explained: Callable[..., Explanation], extra: tuple[Array, ...]
) -> list[str]:
    """Returns the kernel that was chosen, unless it was named, and the notes of its explanation."""
    found: list[Explanation] = []

    def trace(*arguments: Any) -> None:
        # Trace exactly as for timing: values known at trace time decide which kernels support the call.
        found.append(explained(*arguments))

    sizes = (case.shape.query, case.shape.key, case.shape.key)
    jax.eval_shape(trace, *(jax.ShapeDtypeStruct(size, case.dtype) for size in sizes), *extra)
    chosen = found[0].chosen or ""
    return [chosen if implementation is None else "", found[0].notes.get(chosen, "")]
