"""Functions of scalars that close over arrays, as programs that have these arrays as leaves.

Derivative rules of kernels forbid closures over traced arrays: JAX must see an array to map over it and to bring it a
gradient. Inside `jax.shard_map` it must also vary over the same mesh axes as all else in the kernel.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend import core
from jaxtyping import Array

from seqattn.coordinates import Coordinates
from seqattn.masks import Mask
from seqattn.precision import accumulator
from seqattn.score_mod import ScoreMod
from seqattn.static import pytree


def capture(
    mask: Mask | Array | None,
    score_mod: ScoreMod | None,
    *,
    query: Array,
    rows: Array | None,
    q_at: Coordinates,
    kv_at: Coordinates,
    like: Any,
) -> tuple[Mask | Array | None, ScoreMod | None]:
    """Mask and score modification with all the traced arrays that they compute with as leaves.

    Args:
        mask, score_mod: those of a call, as are the query `[B, T, N, H]`, its rows `[B, T, N, R]` and the coordinates.
        like: a tree; inside `jax.shard_map` the scalars will vary over the mesh axes of all its leaves together.
    """
    pair = [np.zeros((), x.dtype) for at in (q_at, kv_at) for x in (at.position, at.segment)]
    row = [] if rows is None else [np.zeros(rows.shape[-1:], rows.dtype)]
    score, head = np.zeros((), accumulator(query.dtype)), np.int32(0)
    functions: dict[type, tuple[Callable[..., Any], list[Any]]] = {}
    if isinstance(mask, Mask):
        functions[_Mask] = (_function_of_mask(mask), pair)
    if score_mod is not None:
        functions[_ScoreMod] = (_function_of_mod(score_mod), [score, *pair, head, *row])
    known = {id(x) for x in jax.tree.leaves((mask, score_mod))}
    axes, traced = mesh_axes(like), {kind: _trace(*each, mesh_axes(like)) for kind, each in functions.items()}
    hidden = {kind for kind, program in traced.items() if any(_is_hidden(x, known) for x in program.consts)}
    all_axes = axes | mesh_axes([x for kind in hidden for x in traced[kind].consts])
    for kind in hidden:
        program = traced[kind] if axes == all_axes else _trace(*functions[kind], all_axes)
        captured = kind(_split(program, functions[kind][1], all_axes) if all_axes else _Program.of(program))
        mask, score_mod = (captured, score_mod) if kind is _Mask else (mask, captured)
    return mask, score_mod


def varying(tree: Any, like: Any) -> Any:
    """`tree` as different on each device of a `jax.shard_map` as the leaves of `like` are together.

    A loop keeps the type of its carry there, and what is the same on all devices gets the sum of their gradients.
    """
    axes = mesh_axes(like)
    return jax.tree.map(lambda x: _over(x, axes), tree)


def mesh_axes(tree: Any) -> frozenset[str]:
    """The mesh axes of a surrounding `jax.shard_map` over which some leaf of the tree varies."""
    return frozenset().union(*(jax.typeof(x).manual_axis_type.varying for x in jax.tree.leaves(tree)))


def _over(x: Any, axes: frozenset[str]) -> Any:
    missing = axes - mesh_axes(x)
    return lax.pcast(x, tuple(missing), to="varying") if missing else x


@pytree
@dataclasses.dataclass(frozen=True)
class _Program:
    """A function of scalars that JAX traced, with the arrays that it computes with as leaves."""

    arrays: tuple[Any, ...]
    jaxpr: core.Jaxpr = dataclasses.field(metadata={"static": True})

    @staticmethod
    def of(closed: core.ClosedJaxpr) -> "_Program":
        return _Program(tuple(closed.consts), closed.jaxpr)

    def __call__(self, *scalars: Any) -> Array:
        types: list[Any] = [x.aval for x in self.jaxpr.invars]
        typed = (
            _over(jnp.asarray(x, t.dtype), t.manual_axis_type.varying) for x, t in zip(scalars, types, strict=True)
        )
        (result,) = core.jaxpr_as_fun(core.ClosedJaxpr(self.jaxpr, self.arrays))(*typed)
        return result


@pytree
@dataclasses.dataclass(frozen=True)
class _Mask(Mask):
    program: _Program

    def __call__(self, query: Coordinates, key: Coordinates) -> Array:
        return self.program(query.position, query.segment, key.position, key.segment)


@pytree
@dataclasses.dataclass(frozen=True)
class _ScoreMod(ScoreMod):
    program: _Program

    def __call__(
        self, score: Array, query: Coordinates, key: Coordinates, head: Array | int, row: Array | None = None
    ) -> Array:
        scalars = (score, query.position, query.segment, key.position, key.segment, head)
        return self.program(*scalars, *(() if row is None else (row,)))


def _function_of_mask(mask: Mask) -> Callable[..., Array]:
    return lambda qp, qs, kp, ks: jnp.asarray(mask(Coordinates(qp, qs), Coordinates(kp, ks)))


def _function_of_mod(mod: ScoreMod) -> Callable[..., Array]:
    return lambda score, qp, qs, kp, ks, head, *row: mod(score, Coordinates(qp, qs), Coordinates(kp, ks), head, *row)


def _is_hidden(x: Any, known: set[int]) -> bool:
    return isinstance(x, jax.core.Tracer) and id(x) not in known


def _trace(fn: Callable[..., Array], scalars: Sequence[Any], axes: frozenset[str]) -> core.ClosedJaxpr:
    return jax.make_jaxpr(fn)(*(_over(x, axes) for x in scalars))


def _split(closed: core.ClosedJaxpr, scalars: Sequence[Any], axes: frozenset[str]) -> _Program:
    """The program of scalars that vary over `axes`, as one whose arrays vary over them too.

    JAX casts an array where it meets a scalar that varies over more axes, in the middle of the program. So what comes
    of arrays alone is computed here, casts included, and the program begins with its results.
    """
    closed = _trace(lambda *scalars: _without_jits(closed.jaxpr, closed.consts, scalars)[0], scalars, axes)
    of_arrays: set[core.Var] = set(closed.jaxpr.constvars)
    of_nothing: set[core.Var] = set()
    early, late = [], []
    for equation in closed.jaxpr.eqns:
        inputs = set(_variables(equation.invars))
        if inputs <= of_nothing:
            of_nothing.update(equation.outvars)
            early.append(equation)
            late.append(equation)
        elif inputs <= of_arrays | of_nothing:
            of_arrays.update(equation.outvars)
            early.append(equation)
        else:
            late.append(equation)
    used = _variables([*(x for equation in late for x in equation.invars), *closed.jaxpr.outvars])
    border = list(dict.fromkeys(x for x in used if x in of_arrays))
    if any(x.aval.manual_axis_type.varying != axes for x in border):
        raise NotImplementedError(
            "inside jax.shard_map a mask or score_mod that closes over arrays may not use them in control flow, which "
            "hides from tiles over which mesh axes they vary"
        )
    before = closed.jaxpr.replace(constvars=[], invars=closed.jaxpr.constvars, outvars=border, eqns=early)
    arrays = core.jaxpr_as_fun(core.ClosedJaxpr(before, ()))(*closed.consts)
    return _Program(tuple(arrays), closed.jaxpr.replace(constvars=border, eqns=late))


def _variables(atoms: Sequence[Any]) -> Iterator[Any]:
    return (x for x in atoms if not isinstance(x, core.Literal))


def _without_jits(jaxpr: core.Jaxpr, consts: Sequence[Any], inputs: Sequence[Any]) -> list[Any]:
    """The results of a program, computed without the `jit`s in it, whose types are those of their first inputs."""
    values = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *inputs), strict=True))
    for equation in jaxpr.eqns:
        given = [x.val if isinstance(x, core.Literal) else values[x] for x in equation.invars]
        if equation.primitive.name == "jit":
            inner = equation.params["jaxpr"]
            results = _without_jits(inner.jaxpr, inner.consts, given)
        else:
            results = _alone(jaxpr, equation)(*given)
        values |= zip(equation.outvars, results, strict=True)
    return [x.val if isinstance(x, core.Literal) else values[x] for x in jaxpr.outvars]


def _alone(jaxpr: core.Jaxpr, equation: core.JaxprEqn) -> Callable[..., list[Any]]:
    """One equation of a program as a function of its inputs, literal ones too."""
    used, made = list(dict.fromkeys(_variables(equation.invars))), equation.outvars
    named = [x for x in made if not isinstance(x, core.DropVar)]
    one = core.jaxpr_as_fun(
        core.ClosedJaxpr(jaxpr.replace(constvars=[], invars=used, outvars=named, eqns=[equation]), ())
    )

    def compute(*inputs: Any) -> list[Any]:
        values = {x: y for x, y in zip(equation.invars, inputs, strict=True) if not isinstance(x, core.Literal)}
        results = iter(one(*(values[x] for x in used)))
        return [None if isinstance(x, core.DropVar) else next(results) for x in made]

    return compute
