"""A traced function without its arrays, as a value: equal where it is the same instructions on the same types.

JAX's own jaxprs are equal only where they are one object, so that what is compiled for one would never be used again.
"""

import dataclasses
import enum
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from seqattn.kernels.mesh_axes import over


@dataclasses.dataclass(frozen=True, eq=False)
class Instructions:
    """A jaxpr whose constants come as operands.

    Two are equal where primitives, parameters, types, numbers and the flow of values are. What cannot be compared, such
    as the derivative rule that a `jax.custom_jvp` brings, is equal to nothing.

    Attributes:
        jaxpr: its constvars are the operands.
        key: what it does, as a value. Made at once: a NumPy array in it may be written over later.
    """

    jaxpr: core.Jaxpr
    key: Hashable

    @staticmethod
    def of(jaxpr: core.Jaxpr) -> "Instructions":
        """Those of a jaxpr."""
        return Instructions(jaxpr, _key_of_jaxpr(jaxpr))

    def run(self, operands: Sequence[Any], arguments: Sequence[Any]) -> Any:
        """The result; arguments become what the jaxpr was traced for."""
        types: list[Any] = [x.aval for x in self.jaxpr.invars]
        typed = [
            over(jnp.asarray(x, t.dtype), t.manual_axis_type.varying) for x, t in zip(arguments, types, strict=True)
        ]
        (result,) = core.jaxpr_as_fun(core.ClosedJaxpr(self.jaxpr, operands))(*typed)
        return result

    def reads(self, argument: int) -> bool:
        """Whether anything is computed from an argument."""
        return _reads(self.jaxpr, argument)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Instructions) and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)


@dataclasses.dataclass(frozen=True, eq=False)
class Once:
    """A function of operands and arguments that is equal to nothing but itself: it is traced for one call.

    Attributes:
        run: the function.
        jaxpr: what it was when it was traced, of the arguments.
    """

    run: Callable[[Sequence[Any], Sequence[Any]], Any]
    jaxpr: core.Jaxpr

    def reads(self, argument: int) -> bool:
        """Whether anything is computed from an argument."""
        return _reads(self.jaxpr, argument)


def _reads(jaxpr: core.Jaxpr, argument: int) -> bool:
    used = [x for equation in jaxpr.eqns for x in equation.invars] + jaxpr.outvars
    return any(x is jaxpr.invars[argument] for x in used)


@dataclasses.dataclass(frozen=True, eq=False)
class _Same:
    """Equal to another one of the same object, which it keeps alive."""

    value: Any

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.value is other.value

    def __hash__(self) -> int:
        return id(self.value)


def _key_of_jaxpr(jaxpr: core.Jaxpr) -> Hashable:
    """All that a jaxpr does, with its variables numbered in the order in which they appear."""
    numbers: dict[Any, int] = {}

    def number(variable: Any) -> Hashable:
        return numbers.setdefault(variable, len(numbers)), variable.aval

    def atom(x: Any) -> Hashable:
        return _key_of_literal(x) if isinstance(x, core.Literal) else numbers[x]

    inputs = tuple(number(x) for x in (*jaxpr.constvars, *jaxpr.invars))
    equations = []
    for equation in jaxpr.eqns:
        operands = tuple(atom(x) for x in equation.invars)
        parameters = tuple((name, _key_of(x)) for name, x in sorted(equation.params.items()))
        equations.append((equation.primitive, operands, parameters, tuple(number(x) for x in equation.outvars)))
    return len(jaxpr.constvars), inputs, tuple(equations), tuple(atom(x) for x in jaxpr.outvars)


def _key_of_literal(literal: core.Literal) -> Hashable:
    value = np.asarray(literal.val)
    return literal.aval, value.dtype, value.tobytes()


def _key_of(parameter: Any) -> Hashable:
    """What stands for a parameter of a primitive."""
    if isinstance(parameter, core.ClosedJaxpr):
        return _key_of_jaxpr(parameter.jaxpr), tuple(_key_of_array(x) for x in parameter.consts)
    if isinstance(parameter, core.Jaxpr):
        return _key_of_jaxpr(parameter)
    if isinstance(parameter, tuple | list):
        return type(parameter), tuple(_key_of(x) for x in parameter)
    if isinstance(parameter, dict):
        return tuple((name, _key_of(x)) for name, x in parameter.items())
    if isinstance(parameter, np.ndarray | jax.Array):
        return _key_of_array(parameter)
    # Meshes can be called, too, as decorators.
    values = (type, enum.Enum, jax.sharding.Mesh, jax.sharding.AbstractMesh)
    return _hashable(parameter) if isinstance(parameter, values) or not callable(parameter) else _Same(object())


def _key_of_array(x: Any) -> Hashable:
    """An array of JAX is itself. Any other holds what it holds now, as NumPy's may be written over."""
    if isinstance(x, jax.Array):
        return _Same(x)
    values = np.asarray(x)
    return values.shape, values.dtype, values.tobytes()


def _hashable(x: Any) -> Hashable:
    try:
        hash(x)
    except TypeError:
        return _Same(object())
    return type(x), x
