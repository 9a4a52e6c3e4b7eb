"""Functions of scalars, as programs that have the arrays with which they compute as leaves.

A kernel that JAX compiles must not hold a function of the user's: the same function may compute something else at its
next call, as the arrays and numbers that it closes over change. So each call traces it. What is compiled belongs to
instructions, which are equal where the function would do the same, and every array is an operand. An array that JAX
traces must be one anyway: derivative rules forbid closures over it. Inside `jax.shard_map` it must also vary over the
same mesh axes as all else in the kernel.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core
from jaxtyping import Array

from seqattn.coordinates import Coordinates
from seqattn.kernels.call import Call
from seqattn.kernels.instructions import Instructions, Once
from seqattn.kernels.mesh_axes import mesh_axes, over
from seqattn.mask import Mask
from seqattn.pytrees import pytree
from seqattn.score_mod import ScoreMod

AnyCall = TypeVar("AnyCall", bound=Call)


def capture(call: AnyCall, like: Any) -> AnyCall:
    """A call with mask and score modification as programs. What is one stays as it is, as does a mask that is an array.

    Args:
        call: the call.
        like: a tree; inside `jax.shard_map` the scalars will vary over the mesh axes of all its leaves together.
    """
    index, score = np.int32(0), np.zeros((), call.high)
    at = [jax.tree.map(lambda x: np.zeros((), x.dtype), each) for each in (call.q_at, call.kv_at)]
    pair = (dataclasses.replace(at[0], batch=index, head=index), at[1])
    row = () if call.rows is None else (np.zeros(call.rows.shape[-1:], call.rows.dtype),)
    functions: dict[str, _Function] = {}
    if isinstance(call.mask, Mask) and not isinstance(call.mask, TracedMask):
        functions["mask"] = _Function.of(call.mask, pair)
    if call.score_mod is not None and not isinstance(call.score_mod, TracedMod):
        functions["score_mod"] = _Function.of(call.score_mod, (score, *pair, index, *row))
    programs, traced = _programs(functions, mesh_axes(like)), dict[str, Any]()
    if not any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves((call, programs))):
        programs = {name: program.without_rules() for name, program in programs.items()}
    if "mask" in programs:
        # The head is the last leaf of the query.
        traced["mask"] = TracedMask(programs["mask"], len(jax.tree.leaves(pair[0])) - 1)
    if "score_mod" in programs:
        traced["score_mod"] = TracedMod(programs["score_mod"])
    return dataclasses.replace(call, **traced)


@pytree
@dataclasses.dataclass(frozen=True)
class Program:
    """A function that JAX traced, with the arrays that it computes with as leaves.

    Attributes:
        arrays: those that a gradient may have to reach.
        fixed: all others.
        instructions: what is done with them and with the arguments.
    """

    arrays: tuple[Any, ...]
    fixed: tuple[Any, ...]
    instructions: Instructions | Once = dataclasses.field(metadata={"static": True})

    @staticmethod
    def of(closed: core.ClosedJaxpr) -> "Program":
        """The program that JAX traced."""
        constants = list(zip(closed.jaxpr.constvars, closed.consts, strict=True))
        arrays, fixed = ([x for x in constants if _may_differ(x[1]) is differs] for differs in (True, False))
        jaxpr = closed.jaxpr.replace(constvars=[variable for variable, _ in (*arrays, *fixed)])
        return Program(tuple(x for _, x in arrays), tuple(_own(x) for _, x in fixed), Instructions.of(jaxpr))

    def __call__(self, *arguments: Any) -> Array:
        return self.instructions.run((*self.arrays, *self.fixed), jax.tree.leaves(arguments))

    def without_rules(self) -> "Program":
        """The same without derivative rules of its own, for which nobody asks where nothing is traced.

        A rule is a function, which may change as any other: a program with one is equal to no other program.
        """
        jaxpr = self.instructions.jaxpr
        if not _has_rules(jaxpr):
            return self
        constants = (*self.arrays, *self.fixed)
        avals: list[Any] = [x.aval for x in jaxpr.invars]
        types = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in avals]
        plain = jax.make_jaxpr(lambda *given: _inlined(jaxpr, constants, given, ("jit", *_RULES)))(*types)
        return Program.of(plain)

    def reads(self, argument: int) -> bool:
        """Whether the result depends on an argument, one leaf of all."""
        return self.instructions.reads(argument)


def _may_differ(x: Any) -> bool:
    """Whether a gradient may be asked for an array: JAX would trace it."""
    return isinstance(x, jax.core.Tracer) and jnp.issubdtype(x.dtype, jnp.inexact)


def _own(x: Any) -> Any:
    """An array that nobody writes over: a NumPy array may change before a device has read it."""
    return x if isinstance(x, jax.Array) else np.array(x)


@pytree
@dataclasses.dataclass(frozen=True)
class TracedMask(Mask):
    """A mask as a program; `query.batch` and `query.head` are always given to it.

    Attributes:
        program: of the leaves of the query and of the key.
        head: which of these leaves is the head.
    """

    program: Program
    head: int = dataclasses.field(metadata={"static": True})

    def __call__(self, query: Coordinates, key: Coordinates) -> Array:
        return self.program(query, key)

    @property
    def reads_head(self) -> bool:
        """Whether it differs by head."""
        return self.program.reads(self.head)


@pytree
@dataclasses.dataclass(frozen=True)
class TracedMod(ScoreMod):
    """A score modification as a program; `query.batch` and `query.head` are always given to it."""

    program: Program

    def __call__(
        self, score: Array, query: Coordinates, key: Coordinates, head: Array | int, row: Array | None = None
    ) -> Array:
        return self.program(score, query, key, head, row)

    @property
    def uses_coordinates(self) -> bool:
        """Whether it reads more than the score: where query and key are, or which head it is."""
        return any(self.program.reads(i) for i in range(1, len(self.program.instructions.jaxpr.invars) - 1))

    @property
    def arrays(self) -> list[Array]:
        """The arrays that have gradients."""
        return list(self.program.arrays)

    def with_arrays(self, arrays: Sequence[Array]) -> "TracedMod":
        """The same with other arrays."""
        return TracedMod(dataclasses.replace(self.program, arrays=tuple(arrays)))


@dataclasses.dataclass(frozen=True)
class _Function:
    """A mask or a score modification, and arguments of the form that it will get.

    Attributes:
        leaves: its own arrays, and numbers as arrays: a number would be an instruction.
        tree: its structure.
        arguments: flat.
        arguments_tree: their structure.
    """

    leaves: tuple[Any, ...]
    tree: jax.tree_util.PyTreeDef
    arguments: tuple[Any, ...]
    arguments_tree: jax.tree_util.PyTreeDef

    @staticmethod
    def of(fn: Mask | ScoreMod, arguments: tuple[Any, ...]) -> "_Function":
        leaves, tree = jax.tree.flatten(fn)
        if not all(isinstance(x, jax.Array | bool | int | float | np.generic | np.ndarray) for x in leaves):
            # A class of the user's that JAX does not know as a pytree: all that it reads is closed over.
            leaves, tree = [], jax.tree.structure(_Unregistered(fn))
        arrays = tuple(x if isinstance(x, jax.Array) else jnp.array(x) for x in leaves)
        flat, arguments_tree = jax.tree.flatten(arguments)
        return _Function(arrays, tree, tuple(flat), arguments_tree)

    def __call__(self, leaves: Sequence[Any], arguments: Sequence[Any]) -> Array:
        fn = jax.tree.unflatten(self.tree, leaves)
        return jnp.asarray(fn(*jax.tree.unflatten(self.arguments_tree, arguments)))

    def trace(self, axes: frozenset[str]) -> core.ClosedJaxpr:
        """The function of arguments that vary over mesh axes, with its leaves among the constants.

        It is taken apart from leaves that JAX traces, too: a check of their values, as `Prefix` has one for what it can
        look at, would become a part of the program.
        """
        count = len(self.leaves)
        arguments = [*self.leaves, *(over(x, axes) for x in self.arguments)]
        closed = jax.make_jaxpr(lambda *given: self(given[:count], given[count:]))(*arguments)
        jaxpr, variables = closed.jaxpr, closed.jaxpr.invars
        constants, inputs = [*jaxpr.constvars, *variables[:count]], variables[count:]
        return core.ClosedJaxpr(_with_inputs(jaxpr, constants, inputs), [*closed.consts, *self.leaves])

    def hides(self, closed: core.ClosedJaxpr) -> bool:
        """Whether it closes over arrays that JAX traces, beside its leaves."""
        known = {id(x) for x in self.leaves}
        return any(isinstance(x, jax.core.Tracer) and id(x) not in known for x in closed.consts)

    def traced_once_more(self, closed: core.ClosedJaxpr) -> Program:
        """It as a program that traces it anew, from its leaves, and is equal to no other one."""
        order = sorted(range(len(self.leaves)), key=lambda i: not _may_differ(self.leaves[i]))
        sorted_leaves = [self.leaves[i] for i in order]
        count = sum(map(_may_differ, self.leaves))

        def run(operands: Sequence[Any], arguments: Sequence[Any]) -> Array:
            leaves = dict(zip(order, operands, strict=True))
            return self([leaves[i] for i in range(len(order))], arguments)

        return Program(tuple(sorted_leaves[:count]), tuple(sorted_leaves[count:]), Once(run, closed.jaxpr))


def _trace(fn: Callable[..., Array], arguments: Sequence[Any], axes: frozenset[str]) -> core.ClosedJaxpr:
    # `fn` must be a new function: JAX remembers what an equal one did.
    return jax.make_jaxpr(fn)(*(over(x, axes) for x in arguments))


@pytree
@dataclasses.dataclass(frozen=True)
class _Unregistered:
    """A mask or score modification as one that has no leaves."""

    fn: Any = dataclasses.field(metadata={"static": True})

    def __call__(self, *arguments: Any) -> Array:
        return self.fn(*arguments)


def _with_inputs(jaxpr: core.Jaxpr, constants: list[Any], inputs: list[Any]) -> core.Jaxpr:
    """The same equations with other variables as constants and inputs."""
    return jaxpr.replace(constvars=constants, invars=inputs)


def _programs(functions: dict[str, _Function], axes: frozenset[str]) -> dict[str, Program]:
    """The functions as programs of arguments that vary over the mesh axes `axes`, and over those of their arrays."""
    traced = {name: function.trace(axes) for name, function in functions.items()}
    hidden = {name for name, function in functions.items() if function.hides(traced[name])}
    all_axes = axes | mesh_axes([x for name in hidden for x in traced[name].consts])
    if not all_axes:
        return {name: Program.of(closed) for name, closed in traced.items()}
    programs = {name: functions[name].traced_once_more(traced[name]) for name in functions.keys() - hidden}
    for name in hidden:
        closed = traced[name] if axes == all_axes else functions[name].trace(all_axes)
        programs[name] = _split(closed, functions[name].arguments, all_axes)
    return programs


def _split(closed: core.ClosedJaxpr, arguments: Sequence[Any], axes: frozenset[str]) -> Program:
    """The program of scalars that vary over `axes`, as one whose arrays vary over them too.

    JAX casts an array where it meets a scalar that varies over more axes, in the middle of the program. So what comes
    of arrays alone is computed here, casts included, and the program begins with its results.
    """
    closed = _trace(lambda *scalars: _inlined(closed.jaxpr, closed.consts, scalars, ("jit",))[0], arguments, axes)
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
    return Program.of(core.ClosedJaxpr(closed.jaxpr.replace(constvars=border, eqns=late), arrays))


def _variables(atoms: Sequence[Any]) -> Iterator[Any]:
    return (x for x in atoms if not isinstance(x, core.Literal))


_RULES = ("custom_jvp_call", "custom_vjp_call")
"""Primitives that are a program with a derivative rule."""


def _inner(equation: core.JaxprEqn) -> core.ClosedJaxpr:
    return equation.params["call_jaxpr" if equation.primitive.name in _RULES else "jaxpr"]


def _has_rules(jaxpr: core.Jaxpr) -> bool:
    """Whether there is a derivative rule in a program, or in a `jit` in it."""
    names = [equation.primitive.name for equation in jaxpr.eqns]
    inner = (_inner(equation).jaxpr for equation in jaxpr.eqns if equation.primitive.name == "jit")
    return any(name in _RULES for name in names) or any(map(_has_rules, inner))


def _inlined(jaxpr: core.Jaxpr, consts: Sequence[Any], inputs: Sequence[Any], names: Sequence[str]) -> list[Any]:
    """The results of a program, computed with the programs inside of it, of primitives of these names, written out.

    The types of a `jit` are those of its first inputs.
    """
    values = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *inputs), strict=True))
    for equation in jaxpr.eqns:
        given = [x.val if isinstance(x, core.Literal) else values[x] for x in equation.invars]
        if equation.primitive.name in names:
            inner = _inner(equation)
            results = _inlined(inner.jaxpr, inner.consts, given, names)
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
