"""A traced mask or score function, cut into what a kernel evaluates for each pair and what is known before it runs.

A kernel on a device has few operations: no gather, no loop, no function of the user. Most of what a predicate does
needs none of them for each pair: `window[query.head]`, `document[query.position]` and `key.position // size` depend on
the head, on the query or on the key alone. They are computed before the kernel, by JAX itself, which also
differentiates them. Only the remaining operations run inside, on whole tiles.
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
from seqattn.kernels.instructions import Instructions
from seqattn.kernels.traced import Program, inner_program, is_rule, one_equation

SCORE, QUERY, KEY, BATCH, HEAD = "score", "query", "key", "batch", "head"
"""What a value of a program may depend on."""

Reads = frozenset[str]

_PAIR = (frozenset({SCORE}), frozenset({QUERY, KEY}))
"""A value that depends on one of these sets differs from pair to pair."""

MOST_ENTRIES = 512
"""The largest table that a kernel searches for each pair, one comparison for each entry."""


@dataclasses.dataclass(frozen=True)
class Border:
    """A value that is computed before the kernel and read inside.

    Attributes:
        reads: what it depends on: query or key, batch and head, but not both query and key.
        shape: () for a number; the shape of a table, which depends on neither query nor key.
        dtype: its dtype.
        trains: whether it may have a gradient.
    """

    reads: Reads
    shape: tuple[int, ...]
    dtype: np.dtype
    trains: bool

    @property
    def by_token(self) -> bool:
        """Whether there is one for each query or for each key."""
        return not self.reads.isdisjoint({QUERY, KEY})

    @property
    def entries(self) -> int:
        """The number of entries of the table; 1 for a number."""
        return int(np.prod(self.shape))


@dataclasses.dataclass(frozen=True)
class Late:
    """The operations for each pair, as a value: equal if they do the same to borders of the same types.

    Attributes:
        instructions: their inputs are the borders, then the arguments: the score, if they modify it.
        borders: what the first inputs are.
        tables: for each border, the contents of a table of integers that is known at trace time, or None.
    """

    instructions: Instructions
    borders: tuple[Border, ...]
    tables: tuple[bytes | None, ...]


@dataclasses.dataclass(frozen=True)
class Cut:
    """A program in two parts.

    Attributes:
        late: the part that runs inside the kernel.
        jaxpr: the early part, from operands, constants and arguments to the borders.
        constants: the arrays that nested programs hold.
        arguments: for each argument, what it is.
    """

    late: Late
    jaxpr: core.Jaxpr
    constants: tuple[Any, ...]
    arguments: tuple[Reads, ...]

    def borders(
        self, operands: Sequence[Any], query: Sequence[Any], key: Sequence[Any], batch: int, num_heads: int
    ) -> list[Array]:
        """Returns the borders, `[B or 1, N or 1, L]`: L is T or S, or the number of entries if they read no token.

        Args:
            operands: the arrays of the program.
            query: the fields of the queries' coordinates, `[B or 1, T]`.
            key: the fields of the keys' coordinates, `[B or 1, S]`.
            batch: B.
            num_heads: N.
        """
        found: dict[int, Array] = {}
        operands = (*operands, *self.constants)
        for reads in dict.fromkeys(border.reads for border in self.late.borders):
            chosen = [i for i, border in enumerate(self.late.borders) if border.reads == reads]
            outvars = [self.jaxpr.outvars[i] for i in chosen]
            part = _needed(self.jaxpr, outvars)
            values = self._lifted(part, reads, operands, query, key, batch, num_heads)
            found |= dict(zip(chosen, values, strict=True))
        return [found[i] for i in range(len(self.late.borders))]

    def _lifted(
        self,
        part: core.Jaxpr,
        reads: Reads,
        operands: Sequence[Any],
        query: Sequence[Any],
        key: Sequence[Any],
        batch: int,
        num_heads: int,
    ) -> list[Array]:
        """Returns the results of a part that reads no more than `reads`, for all rows, heads and tokens."""
        evaluate = core.jaxpr_as_fun(core.ClosedJaxpr(part, ()))
        tokens = query if QUERY in reads else key if KEY in reads else []
        rows = max((x.shape[0] for x in tokens), default=1)
        by_row = rows > 1 or BATCH in reads

        def one(row: Array, head: Array, fields: Sequence[Array]) -> list[Array]:
            given, zeros = iter(fields), np.int32(0)
            known = {BATCH: row, HEAD: head}
            values = []
            for variable, argument in zip(part.invars[len(operands) :], self.arguments, strict=True):
                (name,) = argument
                aval: Any = variable.aval
                used = known[name] if name in known else next(given) if name in reads else zeros
                values.append(jnp.asarray(used, aval.dtype))
            return [jnp.ravel(x) for x in evaluate(*operands, *values)]

        lifted = jax.vmap(one, (None, None, 0), 1) if tokens else one
        lifted = jax.vmap(lifted, (None, 0, None)) if HEAD in reads else _once(lifted, 1)
        fields = [jnp.broadcast_to(x, (rows, x.shape[1])) for x in tokens]
        if not by_row:
            fields = [x[0] for x in fields]
        lifted = jax.vmap(lifted, (0, None, 0)) if by_row else _once(lifted, 0)
        index = jnp.arange(batch, dtype=jnp.int32) if by_row else jnp.int32(0)
        heads = jnp.arange(num_heads, dtype=jnp.int32) if HEAD in reads else jnp.int32(0)
        if by_row and rows == 1:
            fields = [jnp.broadcast_to(x, (batch, x.shape[1])) for x in fields]
        results = lifted(index, heads, fields)
        # A number for each token is `[B, N, 1, L]` here, a table `[B, N, R]`.
        return [x.reshape(*x.shape[:2], -1) for x in results]


def _once(fn: Callable[..., list[Array]], argument: int) -> Callable[..., list[Array]]:
    """Returns the function with a leading dim of size 1 on its results."""
    return lambda *given: [x[None] for x in fn(*given)]


def cut(program: Program, arguments: Sequence[str]) -> Cut:
    """Returns a program of one pair in two parts.

    Args:
        program: a mask or score modification, as `traced.capture` returns.
        arguments: for each argument of the program, what it is.

    Raises:
        NotImplementedError: the program cannot be cut: it is traced anew for each call, pairs need a large table or a
            number that has no 32 bits, or a gradient would reach an array that is indexed by token.
    """
    if not isinstance(program.instructions, Instructions):
        raise NotImplementedError("a mask or score_mod that closes over arrays which differ by device of a shard_map")
    operands = (*program.arrays, *program.fixed)
    named = tuple(frozenset({name}) for name in arguments)
    jaxpr, constants = _flat(program.instructions.jaxpr, [*[frozenset[str]()] * len(operands), *named], len(operands))
    operands = (*operands, *constants)
    # A mask has no gradient, whatever it reads.
    trained = set(jaxpr.invars[: len(program.arrays) if SCORE in arguments else 0])
    contents = dict(zip(jaxpr.invars, operands, strict=False))
    reads: dict[Any, Reads] = dict(zip(jaxpr.invars, [*[frozenset[str]()] * len(operands), *named], strict=True))
    early: list[core.JaxprEqn] = []
    late: list[core.JaxprEqn] = []
    for equation in jaxpr.eqns:
        union = frozenset().union(*(reads[x] for x in _variables(equation.invars)))
        learned = not trained.isdisjoint(_variables(equation.invars))
        # `slope[head] * key.position` is a number for each key, but a gradient reaches only numbers of rows and heads.
        # So the product is left to each pair.
        waits = learned and not union.isdisjoint({QUERY, KEY}) and _is_of_scalars(equation)
        (late if _by_pair(union) or waits else early).append(equation)
        if learned:
            trained.update(equation.outvars)
        reads |= dict.fromkeys(equation.outvars, union)
    score = [x for x, name in zip(jaxpr.invars[len(operands) :], arguments, strict=True) if name == SCORE]
    used = _variables([*(x for equation in late for x in equation.invars), *jaxpr.outvars])
    made = {x for equation in late for x in equation.outvars} | set(score)
    border = [x for x in dict.fromkeys(used) if x not in made]
    # The dtypes first: a key of `jax.random` has none that NumPy knows.
    _check_dtypes([*border, *(x for equation in late for x in equation.outvars)])
    borders = tuple(_border(x, reads[x], x in trained) for x in border)
    known = tuple(_known(contents.get(x), each) for x, each in zip(border, borders, strict=True))
    for each, table in zip(borders, known, strict=True):
        _check(each, table)
    inside = jaxpr.replace(constvars=[], invars=[*border, *score], eqns=late)
    before = jaxpr.replace(outvars=border, eqns=early)
    return Cut(Late(Instructions.of(inside, len(border)), borders, known), before, constants, named)


def _is_of_scalars(equation: core.JaxprEqn) -> bool:
    avals: list[Any] = [x.aval for x in equation.invars]
    return all(x.shape == () for x in avals)


def _by_pair(reads: Reads) -> bool:
    """Returns whether a value that depends on `reads` differs from pair to pair."""
    return any(each <= reads for each in _PAIR)


def _border(variable: Any, reads: Reads, trains: bool) -> Border:
    aval = variable.aval
    return Border(reads, aval.shape, np.dtype(aval.dtype), trains and jnp.issubdtype(aval.dtype, jnp.floating))


def _known(array: Any, border: Border) -> bytes | None:
    """Returns the contents of a table of integers, if they are known at trace time."""
    known = array is not None and not isinstance(array, jax.core.Tracer)
    if not known or len(border.shape) != 1 or not np.issubdtype(border.dtype, np.integer):
        return None
    return np.asarray(array).astype(np.int32).tobytes()


def _check_dtypes(variables: Sequence[Any]) -> None:
    """Raises NotImplementedError unless everything is a boolean or has 32 bits.

    Compilers of kernels lack wider numbers, and end their process on some arithmetic of narrower integers.
    """
    for variable in variables:
        if not in_32_bits(dtype := variable.aval.dtype):
            raise NotImplementedError(f"a mask or score_mod computes in {dtype} for each pair; kernels have 32 bits")


def in_32_bits(dtype: Any) -> bool:
    """Returns whether a kernel computes in a dtype: a number of 32 bits or a boolean, but no key of `jax.random`."""
    return not jnp.issubdtype(dtype, jax.dtypes.extended) and (dtype == np.bool_ or np.dtype(dtype).itemsize == 4)


def _check(border: Border, table: bytes | None) -> None:
    """Raises NotImplementedError unless a kernel can read a border."""
    tokens = border.reads & {QUERY, KEY}
    if tokens and border.shape:
        raise NotImplementedError(
            f"each {min(tokens)} has an array {border.shape}, from which pairs choose: a gather for each pair"
        )
    if tokens and border.trains:
        raise NotImplementedError(f"an array with a gradient is indexed by the {min(tokens)}")
    if table is None and border.entries > MOST_ENTRIES:
        raise NotImplementedError(
            f"a table of {border.entries} entries is indexed by the pair; a kernel searches at most {MOST_ENTRIES}"
        )


def _variables(atoms: Sequence[Any]) -> Iterator[Any]:
    return (x for x in atoms if not isinstance(x, core.Literal))


def _needed(jaxpr: core.Jaxpr, outvars: Sequence[Any]) -> core.Jaxpr:
    """Returns the program with other outputs and no equation that they do not need."""
    needed, kept = set(_variables(outvars)), []
    for equation in reversed(jaxpr.eqns):
        if not needed.isdisjoint(equation.outvars):
            kept.append(equation)
            needed.update(_variables(equation.invars))
    return jaxpr.replace(outvars=list(outvars), eqns=kept[::-1])


def _flat(jaxpr: core.Jaxpr, reads: Sequence[Reads], num_operands: int) -> tuple[core.Jaxpr, tuple[Any, ...]]:
    """Returns the program with nested `jit` inlined and each choice from a table made along one axis at a time.

    `table[query.head, distance]` becomes `table[query.head][distance]`: the first choice is then made before the
    kernel. The arrays that nested programs hold become inputs behind the operands, and are returned as well.
    """
    avals: list[Any] = [x.aval for x in jaxpr.invars]
    types = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in avals]

    def run(*inputs: Array) -> list[Array]:
        return [value for value, _ in _walk(jaxpr, list(zip(inputs, reads, strict=True)))]

    closed = jax.make_jaxpr(run)(*types)
    flat, inputs = closed.jaxpr, closed.jaxpr.invars
    inputs = [*inputs[:num_operands], *flat.constvars, *inputs[num_operands:]]
    return flat.replace(constvars=[], invars=inputs), tuple(closed.consts)


Read = tuple[Any, Reads]
"""A value and what it depends on."""


def _walk(jaxpr: core.Jaxpr, inputs: Sequence[Read]) -> list[Read]:
    values: dict[Any, Read] = dict(zip((*jaxpr.constvars, *jaxpr.invars), inputs, strict=True))

    def read(x: Any) -> Read:
        return (x.val, frozenset()) if isinstance(x, core.Literal) else values[x]

    for equation in jaxpr.eqns:
        given = [read(x) for x in equation.invars]
        union = frozenset().union(*(reads for _, reads in given))
        if equation.primitive.name == "jit":
            inner = inner_program(equation)
            results = _walk(inner.jaxpr, [*((x, frozenset[str]()) for x in inner.consts), *given])
        elif equation.primitive is lax.dynamic_slice_p and len(given) > 2:
            results = [(_axis_by_axis(given, equation.params["slice_sizes"]), union)]
        elif _is_of_numbers(equation, [x for x, _ in given]):
            results = [(x, union) for x in _folded(jaxpr, equation, [x for x, _ in given])]
        else:
            results = [(x, union) for x in one_equation(jaxpr, equation)(*(x for x, _ in given))]
        values |= zip(equation.outvars, results, strict=True)
    return [read(x) for x in jaxpr.outvars]


def _is_of_numbers(equation: core.JaxprEqn, given: Sequence[Any]) -> bool:
    """Returns whether an operation makes numbers from numbers that the program itself holds."""
    results: list[Any] = [x.aval for x in equation.outvars]
    held = all(not isinstance(x, jax.Array) and jnp.ndim(x) == 0 for x in given)
    plain = all(x.shape == () and not jnp.issubdtype(x.dtype, jax.dtypes.extended) for x in results)
    return held and plain and not is_rule(equation)


def _folded(jaxpr: core.Jaxpr, equation: core.JaxprEqn, given: Sequence[Any]) -> list[Any]:
    """Returns the results of an operation on numbers, as numbers: they need no place in the memory of a kernel."""
    with jax.ensure_compile_time_eval():
        results = one_equation(jaxpr, equation)(*given)
    return [np.asarray(x)[()] for x in results]


def _axis_by_axis(given: Sequence[Read], sizes: Sequence[int]) -> Array:
    """Slices an array along the axes whose index is known first."""
    (table, _), *starts = given
    axes = sorted(range(len(sizes)), key=lambda axis: (_by_pair(starts[axis][1]), len(starts[axis][1])))
    for axis in axes:
        table = lax.dynamic_slice_in_dim(table, starts[axis][0], sizes[axis], axis)
    return table


def arguments_of(q_at: Coordinates, kv_at: Coordinates, *, mod: bool, rows: bool = False) -> list[str]:
    """Returns what the arguments of a traced mask, or of a traced score modification, are.

    Raises:
        NotImplementedError: the score modification has an array for each query.
    """
    if rows:
        raise NotImplementedError("the score_mod has an array for each query and head, from which pairs choose")
    fields = [QUERY] * len(jax.tree.leaves(q_at)) + [BATCH, HEAD] + [KEY] * len(jax.tree.leaves(kv_at))
    return [SCORE, *fields, HEAD] if mod else fields
