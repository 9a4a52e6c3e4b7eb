"""The arrays that the kernels read: padded to whole tiles, with what is not finite marked or replaced."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

from seqattn.kernels.finite import marked, marked_query, zero_unless_finite
from seqattn.kernels.hopper.backward_plan import Pass
from seqattn.kernels.hopper.plan import Operands, Plan
from seqattn.kernels.hopper.rule import Rule
from seqattn.kernels.per_pair import QUERY
from seqattn.pytrees import pytree

Lengths = tuple[int, int]
"""T and S, rounded up to whole tiles."""


@pytree
@dataclasses.dataclass(frozen=True)
class Rows:
    """What the backward pass knows of each query and head.

    Attributes:
        d_output: the gradient of the output, `[B, T, N, V]`.
        peak: the largest logit, `[B, N, T]`.
        log_total: the log of the sum of `exp(logit - peak)`, `[B, N, T]`.
        delta: the sum of output times its gradient, minus the gradient of the log-sum-exp, `[B, N, T]`.
    """

    d_output: Any
    peak: Any
    log_total: Any
    delta: Any


def of_forward(plan: Plan, operands: Operands) -> Operands:
    """Returns what the forward pass reads: vectors that are not finite are NaN, and make the rows that see them NaN."""
    # A key is NaN where key or value are not finite, and the value 0: the mask can then hide both.
    key, value = marked(operands.key, operands.value)
    given = dataclasses.replace(operands, query=marked_query(operands.query), key=key, value=value, backward=())
    return _padded(plan, given, plan.padded)


def of_backward(plan: Plan, operands: Operands, rows: Rows, lengths: Lengths) -> tuple[Operands, Rows]:
    """Returns what the backward pass reads: vectors that are not finite are 0, as the log-sum-exp marks their rows."""
    key, value = marked(operands.key, operands.value)
    vectors = {"query": zero_unless_finite(operands.query), "key": zero_unless_finite(key), "value": value}
    queries = lengths[0]
    numbers = (jnp.pad(x, ((0, 0), (0, 0), (0, queries - x.shape[2]))) for x in (rows.peak, rows.log_total, rows.delta))
    whole = Rows(_tokens(rows.d_output, queries), *numbers)
    return _padded(plan, dataclasses.replace(operands, **vectors), lengths), whole


def of_pass(operands: Operands, rows: Rows, number: int, each: Pass) -> tuple[Operands, Rows]:
    """Returns what one kernel of the backward pass reads: its lists, and arrays of pairs in the order of its tiles."""
    given = dataclasses.replace(operands, walk=operands.backward[number], backward=())
    if each.owner == "query":
        return given, rows
    # An array that all queries share has no axis to swap.
    return dataclasses.replace(given, shown=[x if x.shape[2] == 1 else x.swapaxes(2, 3) for x in given.shown]), rows


def _padded(plan: Plan, operands: Operands, lengths: Lengths) -> Operands:
    """Returns all arrays, padded to these lengths."""
    queries, keys = lengths
    return dataclasses.replace(
        operands,
        query=_tokens(operands.query, queries),
        key=_tokens(operands.key, keys),
        value=_tokens(operands.value, keys),
        mask=_vectors(plan.mask, operands.mask, lengths),
        mod=_vectors(plan.score_mod, operands.mod, lengths),
        # The compiler loads no booleans.
        shown=[_pairs(plan, x.astype(jnp.int8), lengths) for x in operands.shown],
        bias=[_pairs(plan, x, lengths) for x in operands.bias],
        walk=_arrays(operands.walk),
        backward=tuple(_arrays(x) for x in operands.backward),
    )


def _arrays(walk: Any) -> Any:
    return dataclasses.replace(walk, counts=jnp.asarray(walk.counts), tiles=jnp.asarray(walk.tiles))


def _tokens(x: Array, length: int) -> Array:
    """Returns vectors `[B, length, heads, dim]`, padded with zeros."""
    return jnp.pad(x, ((0, 0), (0, length - x.shape[1]), (0, 0), (0, 0)))


def _vectors(rule: Rule | None, arrays: list[Array], lengths: Lengths) -> list[Array]:
    """Returns what the pairs read, padded to whole tiles with the last entry."""
    borders = [] if rule is None else [border for border, _, read in rule.sources() if read]
    given = []
    for border, x in zip(borders, arrays, strict=True):
        # The compiler loads no booleans.
        wide = x.astype(jnp.int32) if x.dtype == jnp.bool_ else x
        if border.by_token:
            length = lengths[0 if QUERY in border.reads else 1]
            wide = jnp.pad(wide, ((0, 0), (0, 0), (0, length - wide.shape[2])), mode="edge")
        given.append(wide)
    return given


def _pairs(plan: Plan, x: Array, lengths: Lengths) -> Array:
    """Returns an array of pairs `[B or 1, N or 1, T or 1, S or 1]` padded to whole tiles, with all keys."""
    x = jnp.broadcast_to(x, (*x.shape[:3], plan.sizes[4]))
    behind = [(0, 0 if n == 1 else whole - n) for n, whole in zip(x.shape[2:], lengths, strict=True)]
    if x.shape[3] == 1:
        behind[1] = (0, lengths[1] - 1)
    return jnp.pad(x, ((0, 0), (0, 0), *behind))
