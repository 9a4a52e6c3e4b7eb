"""Evaluates the operations of a mask or score function on a tile of pairs, inside a kernel.

Every scalar of the program becomes a whole tile. What compilers of kernels lack is expressed by what they have: a
choice between booleans by `&` and `|`, a table by one comparison for each entry, a branch by both of its sides.
"""

import dataclasses
import functools
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend import core
from jaxtyping import Array

from seqattn.kernels.per_pair import Late, in_32_bits
from seqattn.kernels.traced import inner_program, is_rule, one_equation

Rule = Callable[..., Array]
"""Computes one primitive on tiles, from its operands and parameters."""


@dataclasses.dataclass(frozen=True)
class Table:
    """Numbers to choose from: scalars, or integers that are known at trace time.

    Attributes:
        entries: the numbers, in the order of a flattened array.
        shape: the shape of the array.
    """

    entries: Any
    shape: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Device:
    """What the compiler of a kernel can do.

    Attributes:
        name: for messages.
        plain: the names of the primitives that it computes as they are.
        rules: others, by name.
        differentiated: whether JAX differentiates the tiles, so that functions must keep their own derivative rules.
    """

    name: str
    plain: frozenset[str]
    rules: Mapping[str, Rule]
    differentiated: bool = True


def check(late: Late, device: Device) -> None:
    """Raises NotImplementedError, with the reason, if a kernel on the device cannot evaluate the operations."""
    shape = (2, 2)

    def run(*arguments: Array) -> list[Array]:
        borders = [
            [np.ones((), each.dtype)] * each.entries if not each.by_token else jnp.ones(shape, each.dtype)
            for each in late.borders
        ]
        return evaluate_all(late, borders, arguments, shape, device)

    types = [jax.ShapeDtypeStruct(shape, x.aval.dtype) for x in late.instructions.inputs]
    jax.eval_shape(run, *types)


def aval(variable: Any) -> Any:
    """Returns the type of a variable or of a literal of a program."""
    return variable.aval


def evaluate(
    late: Late, borders: Sequence[Any], arguments: Sequence[Array], shape: tuple[int, int], device: Device
) -> Array:
    """Returns the result for each pair of a tile.

    Args:
        late: the operations.
        borders: an array that broadcasts to the tile for each border of tokens; a list of scalars for any other one.
        arguments: the score of each pair, or nothing.
        shape: the shape of the tile.
        device: what the compiler can do.
    """
    (result,) = evaluate_all(late, borders, arguments, shape, device)
    return result


def evaluate_all(
    late: Late, borders: Sequence[Any], arguments: Sequence[Array], shape: tuple[int, int], device: Device
) -> list[Array]:
    """Returns the same as `evaluate` for operations with several results."""
    given = [_border(late, i, value) for i, value in enumerate(borders)]
    results = _Tile(shape, device).run(late.instructions.jaxpr, [*given, *arguments])
    return [jnp.broadcast_to(x, shape) for x in results]


def _border(late: Late, i: int, value: Any) -> Any:
    """Returns a border as a table or as a number."""
    border, known = late.borders[i], late.tables[i]
    if known is not None:
        return Table(np.frombuffer(known, np.int32), border.shape)
    if border.by_token:
        return value
    return Table(value, border.shape) if border.shape else value[0]


@dataclasses.dataclass(frozen=True)
class _Tile:
    """An interpreter of programs of scalars, on tiles."""

    shape: tuple[int, int]
    device: Device

    def run(self, jaxpr: core.Jaxpr, inputs: Sequence[Any]) -> list[Any]:
        """Returns the outputs of a program."""
        values = dict(zip((*jaxpr.constvars, *jaxpr.invars), inputs, strict=True))

        def read(x: Any) -> Any:
            return x.val if isinstance(x, core.Literal) else values[x]

        for equation in jaxpr.eqns:
            results = self._equation(jaxpr, equation, [read(x) for x in equation.invars])
            values |= zip(equation.outvars, results, strict=True)
        return [read(x) for x in jaxpr.outvars]

    def _equation(self, jaxpr: core.Jaxpr, equation: core.JaxprEqn, given: Sequence[Any]) -> list[Any]:
        name, parameters = equation.primitive.name, equation.params
        if name == "jit":
            inner = inner_program(equation)
            return self.run(inner.jaxpr, [*inner.consts, *given])
        if name == "cond":
            return self._branches(given[0], parameters["branches"], given[1:])
        if is_rule(equation):
            return self._with_rule(jaxpr, equation, given)
        if any(isinstance(x, Table) for x in given):
            return [self._from_table(name, parameters, given)]
        if name in ("squeeze", "reshape", "broadcast_in_dim") and aval(equation.outvars[0]).size == 1:
            return [given[0]]  # one number in another shape
        if any(math.prod(aval(x).shape) != 1 for x in (*equation.invars, *equation.outvars)):
            raise self._refusal(f"{name} of arrays {[aval(x).shape for x in equation.invars]} that differ by pair")
        return [self._elementwise(name, equation, given)]

    def _elementwise(self, name: str, equation: core.JaxprEqn, given: Sequence[Any]) -> Array:
        """Computes a primitive on tiles."""
        whole = [self._whole(x, aval(variable).dtype) for x, variable in zip(given, equation.invars, strict=True)]
        dtype = aval(equation.outvars[0]).dtype
        if not in_32_bits(dtype):
            raise self._refusal(f"{name} in {dtype}, which this mask or score_mod computes for each pair")
        if name == "select_n":
            return _select(whole[0], whole[1:], booleans=dtype == jnp.bool_)
        if name in _OF_BOOLEANS and whole[0].dtype == jnp.bool_:
            return _OF_BOOLEANS[name](*whole)
        if name in self.device.rules:
            return self.device.rules[name](*whole, **equation.params)
        if name not in self.device.plain:
            raise self._refusal(f"{name}, which this mask or score_mod computes for each pair")
        if name == "convert_element_type":
            return _converted(whole[0], np.dtype(equation.params["new_dtype"]))
        return equation.primitive.bind(*whole, **equation.params)

    def _whole(self, x: Any, dtype: Any) -> Array:
        """Returns a number as a tile."""
        return jnp.broadcast_to(jnp.asarray(x, dtype), self.shape)

    def _branches(self, index: Any, branches: Sequence[core.ClosedJaxpr], given: Sequence[Any]) -> list[Any]:
        """Returns the results of a branch for each pair: all are computed, as `jax.vmap` does."""
        results = [self.run(branch.jaxpr, [*branch.consts, *given]) for branch in branches]
        which, chosen = jnp.asarray(index), []
        for outputs, variable in zip(zip(*results, strict=True), branches[0].jaxpr.outvars, strict=True):
            self._check_numbers("cond", variable)
            cases = [self._whole(x, aval(variable).dtype) for x in outputs]
            chosen.append(_select(self._whole(which, which.dtype), cases, booleans=aval(variable).dtype == jnp.bool_))
        return chosen

    def _with_rule(self, jaxpr: core.Jaxpr, equation: core.JaxprEqn, given: Sequence[Any]) -> list[Any]:
        """Returns the results of a function with a derivative rule of its own, which differentiation then uses."""
        self._check_numbers(equation.primitive.name, *equation.invars, *equation.outvars)
        whole = [self._whole(x, aval(variable).dtype) for x, variable in zip(given, equation.invars, strict=True)]
        if not self.device.differentiated:
            inner = inner_program(equation)
            return self.run(inner.jaxpr, [*inner.consts, *whole])
        rule = jax.vmap(jax.vmap(one_equation(jaxpr, equation)))

        # The body contains no more than the compiler has. The rule is the function's own: it is not rewritten.
        @jax.custom_jvp
        def apply(*whole: Array) -> list[Array]:
            inner = inner_program(equation)
            results = zip(self.run(inner.jaxpr, [*inner.consts, *whole]), inner.jaxpr.outvars, strict=True)
            return [self._whole(x, aval(variable).dtype) for x, variable in results]

        apply.defjvp(lambda primals, tangents: jax.jvp(rule, primals, tangents))
        return list(apply(*whole))

    def _from_table(self, name: str, parameters: Mapping[str, Any], given: Sequence[Any]) -> Any:
        """Returns the entry of a table that each pair chooses."""
        table, *starts = given
        sizes = parameters.get("slice_sizes", ())
        if name != "dynamic_slice" or not isinstance(table, Table) or math.prod(sizes) != 1:
            raise self._refusal(f"{name} of a table for each pair")
        # Other axes have one entry each if they were sliced before: `per_pair` slices along one axis at a time.
        axes = [axis for axis, count in enumerate(table.shape) if count > 1]
        if len(axes) > 1:
            raise self._refusal(f"choice from a table {table.shape} by {len(axes)} indices of a pair")
        if not axes:
            return table.entries[0]
        # `dynamic_slice` moves an index outside of the table to its end.
        at = jnp.clip(self._whole(starts[axes[0]], jnp.int32), 0, len(table.entries) - 1)
        return _runs(at, table.entries) if isinstance(table.entries, np.ndarray) else _one_by_one(at, table.entries)

    def _check_numbers(self, name: str, *variables: Any) -> None:
        """Raises NotImplementedError unless a nested program receives or returns one number in each variable."""
        shapes = [aval(x).shape for x in variables]
        if any(math.prod(shape) != 1 for shape in shapes):
            raise self._refusal(f"{name} of arrays {shapes} that differ by pair")

    def _refusal(self, what: str) -> NotImplementedError:
        return NotImplementedError(f"{self.device.name} has no {what}")


def _select(which: Array, cases: Sequence[Array], *, booleans: bool) -> Array:
    """Returns the case that each pair chooses. Compilers of kernels refuse choices between booleans."""
    if which.dtype == jnp.bool_ and not booleans:
        return jnp.where(which, cases[1], cases[0])
    chosen = [lax.bitwise_not(which), which] if which.dtype == jnp.bool_ else _indices(which, len(cases))
    if booleans:
        return functools.reduce(operator.or_, (here & case for here, case in zip(chosen, cases, strict=True)))
    result = cases[0]
    for here, case in zip(chosen[1:], cases[1:], strict=True):
        result = jnp.where(here, case, result)
    return result


def _indices(which: Array, count: int) -> list[Array]:
    """Returns for each case whether a pair chooses it; an index outside chooses the nearest, as `lax.switch` does."""
    return [which <= 0, *(which == i for i in range(1, count - 1)), which >= count - 1]


def _converted(x: Array, dtype: np.dtype) -> Array:
    """Converts a tile to a dtype of 32 bits or to booleans."""
    if x.dtype == jnp.bool_ and jnp.issubdtype(dtype, jnp.floating):
        x = x.astype(jnp.int32)
    if dtype == jnp.bool_:
        return x != jnp.zeros_like(x)
    return x.astype(dtype)


def _one_by_one(at: Array, entries: Sequence[Any]) -> Array:
    """Returns the chosen scalar, found by a comparison with each index."""
    if jnp.result_type(entries[0]) == jnp.bool_:
        return functools.reduce(operator.or_, ((at == i) & entry for i, entry in enumerate(entries)))
    result = jnp.broadcast_to(entries[0], at.shape)
    for i, entry in enumerate(entries[1:], 1):
        result = jnp.where(at == i, entry, result)
    return result


def _runs(at: Array, entries: np.ndarray) -> Array:
    """Returns the chosen integer of a table known at trace time, found by a comparison for each run of equal ones."""
    result = jnp.full(at.shape, entries[0], jnp.int32)
    for start in np.flatnonzero(np.diff(entries)) + 1:
        result = jnp.where(at >= int(start), jnp.int32(entries[start]), result)
    return result


_ARITHMETIC = {"add", "sub", "mul", "div", "rem", "neg", "abs", "max", "min"}
_ARITHMETIC |= {"integer_pow", "pow", "square", "add_any"}
_COMPARISONS = {"eq", "ne", "lt", "le", "gt", "ge", "and", "or", "not", "xor"}
_BITS = {"shift_left", "shift_right_logical", "shift_right_arithmetic"}
_FUNCTIONS = {"exp", "exp2", "log", "log1p", "tanh", "logistic", "sqrt", "rsqrt", "sin", "cos", "erf", "floor", "round"}
_TYPES = {"convert_element_type", "stop_gradient", "copy"}


_OF_BOOLEANS: Mapping[str, Rule] = {
    "eq": lambda x, y: ~(x ^ y),
    "ne": lambda x, y: x ^ y,
    "lt": lambda x, y: ~x & y,
    "le": lambda x, y: ~x | y,
    "gt": lambda x, y: x & ~y,
    "ge": lambda x, y: x | ~y,
    "max": lambda x, y: x | y,
    "min": lambda x, y: x & y,
}
"""Operations on booleans, for which compilers of kernels have only logic."""


def _sign(x: Array, **_: Any) -> Array:
    """Returns the sign of a tile. The primitive asks for the kind of the machine's own TPU."""
    zero, one = jnp.zeros_like(x), jnp.ones_like(x)
    return jnp.where(x > zero, one, jnp.where(x < zero, -one, x))


def _expm1(x: Array, **_: Any) -> Array:
    """Returns exp(x) - 1 = 2 tanh(x / 2) / (1 - tanh(x / 2)), which is exact near 0, and exp(x) - 1 elsewhere."""
    half = jnp.tanh(jnp.clip(x, -1, 1) / 2)
    return jnp.where(jnp.abs(x) < 1, 2 * half / (1 - half), jnp.exp(x) - 1)


def _clamp(low: Array, x: Array, high: Array, **_: Any) -> Array:
    """Returns numbers within bounds."""
    return jnp.minimum(jnp.maximum(x, low), high)


def one_minus_square(x: Array, **_: Any) -> Array:
    """Returns 1 - x^2, in which JAX 0.12 writes the derivative of tanh."""
    return 1 - x * x


TPU = Device(
    "the TPU kernel",
    frozenset(_ARITHMETIC | _COMPARISONS | _BITS | _FUNCTIONS | _TYPES),
    {"sign": _sign, "expm1": _expm1, "clamp": _clamp, "one_minus_square": one_minus_square},
)
"""What Pallas's compiler for TPUs accepts (jax 0.10.2, compiled for v5e, v5p and v6e)."""
