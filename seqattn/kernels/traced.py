"""Masks and score modifications as traced programs, whose arrays are pytree leaves.

A kernel that JAX compiles must not hold a user's function: the arrays and numbers that the function closes over may
change before its next call. So each call traces it. The compiled kernel depends on instructions, which are equal if the
function would do the same, and every array is an operand. A traced array must be an operand anyway, as derivative rules
must not close over it. Inside `jax.shard_map` it must also vary over the same mesh axes as the rest of the kernel.
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
    """Returns a call with its mask and score modification as programs. Arrays and programs stay as they are.

    Args:
        call: the call.
        like: a tree. Inside `jax.shard_map` the scalars will vary over the mesh axes of all its leaves.
    """
    # Zeros of the right types represent one pair: only their types enter the trace.
    index, score = np.int32(0), np.zeros((), call.high)
    at = [jax.tree.map(lambda x: np.zeros((), x.dtype), each) for each in (call.q_at, call.kv_at)]
    pair = (dataclasses.replace(at[0], batch=index, head=index), at[1])
    row = () if call.rows is None else (np.zeros(call.rows.shape[-1:], call.rows.dtype),)
    functions: dict[str, _Function] = {}
    if isinstance(call.mask, Mask) and not isinstance(call.mask, TracedMask):
        functions["mask"] = _Function.of(call.mask, pair)
    if call.score_mod is not None and not isinstance(call.score_mod, TracedMod):
        functions["score_mod"] = _Function.of(call.score_mod, (score, *pair, index, *row))
    # Both functions together, as they must vary over the same mesh axes.
    programs, traced = _programs(functions, mesh_axes(like)), dict[str, Any]()
    # Outside of any trace there are no derivatives, and programs without rules are equal across calls.
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
    """A traced function with the arrays that it reads as leaves.

    Attributes:
        arrays: the arrays that may need a gradient.
        fixed: all other arrays.
        instructions: the operations on the arrays and the arguments.
    """

    arrays: tuple[Any, ...]
    fixed: tuple[Any, ...]
    instructions: Instructions | Once = dataclasses.field(metadata={"static": True})

    @staticmethod
    def of(closed: core.ClosedJaxpr) -> "Program":
        """Returns the program of a closed jaxpr."""
        constants = list(zip(closed.jaxpr.constvars, closed.consts, strict=True))
        # Arrays with gradients come first: the operands of the instructions are `(*arrays, *fixed)`.
        arrays, fixed = ([x for x in constants if _may_differ(x[1]) is differs] for differs in (True, False))
        operands = [variable for variable, _ in (*arrays, *fixed)]
        jaxpr = _with_inputs(closed.jaxpr, [], [*operands, *closed.jaxpr.invars])
        instructions = Instructions.of(jaxpr, len(operands))
        return Program(tuple(x for _, x in arrays), tuple(_own(x) for _, x in fixed), instructions)

    def __call__(self, *arguments: Any) -> Array:
        """Evaluates the program for one pair."""
        return self.instructions.run((*self.arrays, *self.fixed), jax.tree.leaves(arguments))

    def without_rules(self) -> "Program":
        """Returns the program without custom derivative rules, which nothing needs if nothing is traced.

        A rule is a function, which may change like any other. A program with a rule is therefore equal to no other
        program and would be compiled at each call.
        """
        jaxpr = self.instructions.jaxpr
        if not _has_rules(jaxpr):
            return self
        constants = (*self.arrays, *self.fixed)
        avals: list[Any] = [x.aval for x in self.instructions.inputs]
        types = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in avals]
        # The bodies of `jit` are inlined as well, since rules may be nested in them.
        plain = jax.make_jaxpr(lambda *given: _inlined(jaxpr, (), (*constants, *given), ("jit", *_RULES)))(*types)
        return Program.of(plain)

    def reads(self, argument: int) -> bool:
        """Returns whether the result depends on an argument, given as the index of its leaf."""
        return self.instructions.reads(argument)


def _may_differ(x: Any) -> bool:
    """Returns whether an array may need a gradient: JAX traces it, and it is floating."""
    return isinstance(x, jax.core.Tracer) and jnp.issubdtype(x.dtype, jnp.inexact)


def _own(x: Any) -> Any:
    """Returns an array that nobody overwrites: a NumPy array may change before a device has read it."""
    return x if isinstance(x, jax.Array) else np.array(x)


@pytree
@dataclasses.dataclass(frozen=True)
class TracedMask(Mask):
    """A mask as a program. It always receives `query.batch` and `query.head`.

    Attributes:
        program: a function of the leaves of the query and of the key.
        head: the index of the leaf that is the head.
    """

    program: Program
    head: int = dataclasses.field(metadata={"static": True})

    def __call__(self, query: Coordinates, key: Coordinates) -> Array:
        return self.program(query, key)

    @property
    def reads_head(self) -> bool:
        """Whether the mask depends on the head."""
        return self.program.reads(self.head)


@pytree
@dataclasses.dataclass(frozen=True)
class TracedMod(ScoreMod):
    """A score modification as a program. It always receives `query.batch` and `query.head`."""

    program: Program

    def __call__(
        self, score: Array, query: Coordinates, key: Coordinates, head: Array | int, row: Array | None = None
    ) -> Array:
        return self.program(score, query, key, head, row)

    @property
    def uses_coordinates(self) -> bool:
        """Whether it reads more than the score: coordinates, or the head."""
        return any(self.program.reads(i) for i in range(1, len(self.program.instructions.inputs) - 1))

    @property
    def arrays(self) -> list[Array]:
        """The arrays that have gradients."""
        return list(self.program.arrays)

    def with_arrays(self, arrays: Sequence[Array]) -> "TracedMod":
        """Returns the score modification with other arrays."""
        return TracedMod(dataclasses.replace(self.program, arrays=tuple(arrays)))


@dataclasses.dataclass(frozen=True)
class _Function:
    """A mask or a score modification, with example arguments.

    Attributes:
        leaves: its own arrays. Numbers are converted to arrays, since a number would become part of the instructions.
        tree: its structure.
        arguments: the flattened arguments.
        arguments_tree: the structure of the arguments.
    """

    leaves: tuple[Any, ...]
    tree: jax.tree_util.PyTreeDef
    arguments: tuple[Any, ...]
    arguments_tree: jax.tree_util.PyTreeDef

    @staticmethod
    def of(fn: Mask | ScoreMod, arguments: tuple[Any, ...]) -> "_Function":
        """Flattens the function and its arguments."""
        leaves, tree = jax.tree.flatten(fn)
        if not all(isinstance(x, jax.Array | bool | int | float | np.generic | np.ndarray) for x in leaves):
            # A user's class that is no pytree: it closes over everything that it reads.
            leaves, tree = [], jax.tree.structure(_Unregistered(fn))
        arrays = tuple(x if isinstance(x, jax.Array) else jnp.array(x) for x in leaves)
        flat, arguments_tree = jax.tree.flatten(arguments)
        return _Function(arrays, tree, tuple(flat), arguments_tree)

    def __call__(self, leaves: Sequence[Any], arguments: Sequence[Any]) -> Array:
        fn = jax.tree.unflatten(self.tree, leaves)
        return jnp.asarray(fn(*jax.tree.unflatten(self.arguments_tree, arguments)))

    def trace(self, axes: frozenset[str]) -> core.ClosedJaxpr:
        """Traces the function for arguments that vary over mesh axes, with its leaves among the constants.

        The function is rebuilt from traced leaves. A check of their values, such as that of `Prefix`, would otherwise
        become part of the program.
        """
        count = len(self.leaves)
        arguments = [*self.leaves, *(over(x, axes) for x in self.arguments)]
        closed = jax.make_jaxpr(lambda *given: self(given[:count], given[count:]))(*arguments)
        jaxpr, variables = closed.jaxpr, closed.jaxpr.invars
        # Leaves become constants of the jaxpr, like the arrays that the function closes over: one list of operands.
        constants, inputs = [*jaxpr.constvars, *variables[:count]], variables[count:]
        return core.ClosedJaxpr(_with_inputs(jaxpr, constants, inputs), [*closed.consts, *self.leaves])

    def hides(self, closed: core.ClosedJaxpr) -> bool:
        """Returns whether the function closes over traced arrays other than its leaves."""
        known = {id(x) for x in self.leaves}
        return any(isinstance(x, jax.core.Tracer) and id(x) not in known for x in closed.consts)

    def traced_once_more(self, closed: core.ClosedJaxpr) -> Program:
        """Returns a program that traces the function again from its leaves, and equals no other program."""
        # Arrays with gradients first, as in `Program.of`.
        order = sorted(range(len(self.leaves)), key=lambda i: not _may_differ(self.leaves[i]))
        sorted_leaves = [self.leaves[i] for i in order]
        count = sum(map(_may_differ, self.leaves))

        def run(operands: Sequence[Any], arguments: Sequence[Any]) -> Array:
            leaves = dict(zip(order, operands, strict=True))
            return self([leaves[i] for i in range(len(order))], arguments)

        return Program(tuple(sorted_leaves[:count]), tuple(sorted_leaves[count:]), Once(run, closed.jaxpr))


def _trace(fn: Callable[..., Array], arguments: Sequence[Any], axes: frozenset[str]) -> core.ClosedJaxpr:
    # `fn` must be a new function, because JAX caches traces by function.
    """Traces a function for arguments that vary over mesh axes."""
    return jax.make_jaxpr(fn)(*(over(x, axes) for x in arguments))


@pytree
@dataclasses.dataclass(frozen=True)
class _Unregistered:
    """Wraps a mask or score modification that is no pytree, as one without leaves."""

    fn: Any = dataclasses.field(metadata={"static": True})

    def __call__(self, *arguments: Any) -> Array:
        return self.fn(*arguments)


def _with_inputs(jaxpr: core.Jaxpr, constants: list[Any], inputs: list[Any]) -> core.Jaxpr:
    """Returns the same equations with other variables as constants and inputs."""
    return jaxpr.replace(constvars=constants, invars=inputs)


def _programs(functions: dict[str, _Function], axes: frozenset[str]) -> dict[str, Program]:
    """Returns the functions as programs of arguments that vary over `axes` and over the axes of their own arrays."""
    traced = {name: function.trace(axes) for name, function in functions.items()}
    # Arrays that a function closes over may vary over further axes, which only the trace reveals.
    hidden = {name for name, function in functions.items() if function.hides(traced[name])}
    # Types must agree throughout the kernel, so it varies over the union of all axes.
    all_axes = axes | mesh_axes([x for name in hidden for x in traced[name].consts])
    # Outside `jax.shard_map` there is nothing to cast, and instructions can be compared between calls.
    if not all_axes:
        return {name: Program.of(closed) for name, closed in traced.items()}
    programs = {name: functions[name].traced_once_more(traced[name]) for name in functions.keys() - hidden}
    for name in hidden:
        closed = traced[name] if axes == all_axes else functions[name].trace(all_axes)
        programs[name] = _split(closed, functions[name].arguments, all_axes)
    return programs


def _split(closed: core.ClosedJaxpr, arguments: Sequence[Any], axes: frozenset[str]) -> Program:
    """Returns a program of scalars that vary over `axes` such that its arrays vary over them, too.

    JAX casts an array where it meets a scalar that varies over more axes, in the middle of the program. So everything
    that is computed from arrays alone is evaluated here, casts included, and the program starts from the results.
    """
    # Inlining exposes the casts inside nested `jit` calls.
    closed = _trace(lambda *scalars: _inlined(closed.jaxpr, closed.consts, scalars, ("jit",))[0], arguments, axes)
    of_arrays: set[core.Var] = set(closed.jaxpr.constvars)
    of_nothing: set[core.Var] = set()
    early, late = [], []
    for equation in closed.jaxpr.eqns:
        inputs = set(_variables(equation.invars))
        # Constants such as iotas are cheap, so they are computed on both sides of the cut.
        if inputs <= of_nothing:
            of_nothing.update(equation.outvars)
            early.append(equation)
            late.append(equation)
        elif inputs <= of_arrays | of_nothing:
            of_arrays.update(equation.outvars)
            early.append(equation)
        else:
            late.append(equation)
    # The border: early results that the late equations read. They become the program's arrays.
    used = _variables([*(x for equation in late for x in equation.invars), *closed.jaxpr.outvars])
    border = list(dict.fromkeys(x for x in used if x in of_arrays))
    if any(x.aval.manual_axis_type.varying != axes for x in border):
        raise NotImplementedError(
            "inside jax.shard_map a mask or score_mod that closes over arrays may not use them in control flow, which "
            "hides from tiles over which mesh axes they vary"
        )
    before = closed.jaxpr.replace(constvars=[], invars=closed.jaxpr.constvars, outvars=border, eqns=early)
    # Evaluated once for a call, outside the kernel. JAX differentiates this part itself.
    arrays = core.jaxpr_as_fun(core.ClosedJaxpr(before, ()))(*closed.consts)
    return Program.of(core.ClosedJaxpr(closed.jaxpr.replace(constvars=border, eqns=late), arrays))


def _variables(atoms: Sequence[Any]) -> Iterator[Any]:
    """Yields the atoms that are variables, not literals."""
    return (x for x in atoms if not isinstance(x, core.Literal))


_RULES = ("custom_jvp_call", "custom_vjp_call")
"""Primitives that wrap a program with a custom derivative rule."""


def inner_program(equation: core.JaxprEqn) -> core.ClosedJaxpr:
    """Returns the program inside an equation."""
    return equation.params["call_jaxpr" if equation.primitive.name in _RULES else "jaxpr"]


def is_rule(equation: core.JaxprEqn) -> bool:
    """Returns whether an equation is a program with a custom derivative rule."""
    return equation.primitive.name in _RULES


def _has_rules(jaxpr: core.Jaxpr) -> bool:
    """Returns whether a program, or a `jit` in it, has a custom derivative rule."""
    names = [equation.primitive.name for equation in jaxpr.eqns]
    inner = (inner_program(equation).jaxpr for equation in jaxpr.eqns if equation.primitive.name == "jit")
    return any(name in _RULES for name in names) or any(map(_has_rules, inner))


def _inlined(jaxpr: core.Jaxpr, consts: Sequence[Any], inputs: Sequence[Any], names: Sequence[str]) -> list[Any]:
    """Evaluates a program with nested programs, of primitives with these names, inlined.

    Inlining is needed because the types of a nested `jit` are fixed at its first trace.
    """
    values = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *inputs), strict=True))
    for equation in jaxpr.eqns:
        given = [x.val if isinstance(x, core.Literal) else values[x] for x in equation.invars]
        if equation.primitive.name in names:
            inner = inner_program(equation)
            results = _inlined(inner.jaxpr, inner.consts, given, names)
        else:
            results = one_equation(jaxpr, equation)(*given)
        values |= zip(equation.outvars, results, strict=True)
    return [x.val if isinstance(x, core.Literal) else values[x] for x in jaxpr.outvars]


def one_equation(jaxpr: core.Jaxpr, equation: core.JaxprEqn) -> Callable[..., list[Any]]:
    """Returns one equation of a program as a function of its inputs, including literal ones."""
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
