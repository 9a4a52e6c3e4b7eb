"""A traced function without its arrays, as a value: equal if it has the same instructions on the same types.

JAX's own jaxprs compare by identity, so a program compiled for one would never be reused.
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
    """A jaxpr that receives its constants as operands, which are its first inputs.

    Two are equal if their primitives, parameters, types, literals and data flow are equal. A parameter that cannot be
    compared, such as the derivative rule of a `jax.custom_jvp`, is equal to nothing.

    Attributes:
        jaxpr: its inputs are the operands, then the arguments. It has no constvars: from JAX 0.12 on, only inputs with
            a value are constvars.
        num_operands: the number of operands.
        key: the instructions as a hashable value. Computed at once, because a NumPy array in the jaxpr may be
            overwritten later.
    """

    jaxpr: core.Jaxpr
    num_operands: int
    key: Hashable

    @staticmethod
    def of(jaxpr: core.Jaxpr, num_operands: int) -> "Instructions":
        """Returns the instructions of a jaxpr without constvars, whose first inputs are the operands."""
        return Instructions(jaxpr, num_operands, (num_operands, _key_of_jaxpr(jaxpr)))

    @property
    def inputs(self) -> list[Any]:
        """The variables of the arguments."""
        return self.jaxpr.invars[self.num_operands :]

    def run(self, operands: Sequence[Any], arguments: Sequence[Any]) -> Any:
        """Evaluates the instructions; casts arguments to the types for which the jaxpr was traced."""
        types: list[Any] = [x.aval for x in self.inputs]
        # The jaxpr fixes dtypes and the mesh axes over which each input varies; tiles may bring weaker types.
        typed = [
            over(jnp.asarray(x, t.dtype), t.manual_axis_type.varying) for x, t in zip(arguments, types, strict=True)
        ]
        (result,) = core.jaxpr_as_fun(core.ClosedJaxpr(self.jaxpr, ()))(*operands, *typed)
        return result

    def reads(self, argument: int) -> bool:
        """Returns whether the result is computed from an argument."""
        return _reads(self.jaxpr, self.inputs[argument])

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Instructions) and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)


@dataclasses.dataclass(frozen=True, eq=False)
class Once:
    """A function of operands and arguments that equals only itself: it is traced for one call.

    Attributes:
        run: the function.
        jaxpr: the trace of the function, which tells what it reads.
    """

    run: Callable[[Sequence[Any], Sequence[Any]], Any]
    jaxpr: core.Jaxpr

    @property
    def inputs(self) -> list[Any]:
        """The variables of the arguments."""
        return self.jaxpr.invars

    def reads(self, argument: int) -> bool:
        """Returns whether the result is computed from an argument."""
        return _reads(self.jaxpr, self.inputs[argument])


def _reads(jaxpr: core.Jaxpr, variable: Any) -> bool:
    """Returns whether an equation or an output of the jaxpr uses the variable."""
    used = [x for equation in jaxpr.eqns for x in equation.invars] + jaxpr.outvars
    return any(x is variable for x in used)


@dataclasses.dataclass(frozen=True, eq=False)
class _Same:
    """Compares by the identity of an object, and keeps the object alive."""

    value: Any

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.value is other.value

    def __hash__(self) -> int:
        # The object is kept alive, so no later object can get its id.
        return id(self.value)


def _key_of_jaxpr(jaxpr: core.Jaxpr) -> Hashable:
    """Returns everything that a jaxpr does as a value, with variables numbered in order of appearance."""
    # JAX names variables anew in each trace. Numbers make two traces of the same function comparable.
    numbers: dict[Any, int] = {}

    def number(variable: Any) -> Hashable:
        return numbers.setdefault(variable, len(numbers)), variable.aval

    def atom(x: Any) -> Hashable:
        return _key_of_literal(x) if isinstance(x, core.Literal) else numbers[x]

    # Types are part of the key: the same primitives on other shapes are another program.
    inputs = tuple(number(x) for x in (*jaxpr.constvars, *jaxpr.invars))
    equations = []
    for equation in jaxpr.eqns:
        operands = tuple(atom(x) for x in equation.invars)
        # Sorted, so that the order in which a primitive received its parameters does not matter.
        parameters = tuple((name, _key_of(x)) for name, x in sorted(equation.params.items()))
        equations.append((equation.primitive, operands, parameters, tuple(number(x) for x in equation.outvars)))
    return len(jaxpr.constvars), inputs, tuple(equations), tuple(atom(x) for x in jaxpr.outvars)


def _key_of_literal(literal: core.Literal) -> Hashable:
    """Returns a literal as a value. Bytes compare NaN as equal and keep 0.0 and -0.0 apart."""
    value = np.asarray(literal.val)
    return literal.aval, value.dtype, value.tobytes()


def _key_of(parameter: Any) -> Hashable:
    """Returns a parameter of a primitive as a value."""
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
    # A function may change what it does, so it is equal to nothing. Types, enums and meshes are callable as well, but
    # they are plain values.
    values = (type, enum.Enum, jax.sharding.Mesh, jax.sharding.AbstractMesh)
    return _hashable(parameter) if isinstance(parameter, values) or not callable(parameter) else _Same(object())


def _key_of_array(x: Any) -> Hashable:
    """Returns a JAX array by identity, any other array by its present contents: NumPy arrays may be overwritten."""
    if isinstance(x, jax.Array):
        return _Same(x)
    values = np.asarray(x)
    return values.shape, values.dtype, values.tobytes()


def _hashable(x: Any) -> Hashable:
    """Returns a value with its type, or a key that equals nothing if the value is not hashable."""
    try:
        hash(x)
    except TypeError:
        return _Same(object())
    # With the type, as 1, 1.0 and True are equal in Python but not in a program.
    return type(x), x
