"""What the kernel evaluates for each pair, a mask or a score modification, and where it finds what the pairs read."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Array

from seqattn.kernels.call import Call
from seqattn.kernels.hopper.operations import HOPPER
from seqattn.kernels.on_tile import check
from seqattn.kernels.per_pair import KEY, QUERY, Border, Cut, Late, arguments_of, cut


@dataclasses.dataclass(frozen=True)
class Rule:
    """The operations of a mask or score modification.

    Attributes:
        late: the operations for each pair.
        first: for each border that counts tokens, such as the positions of one text, the number of the first token: the
            kernel counts itself. None for all others.
    """

    late: Late
    first: tuple[int | None, ...]

    def sources(self) -> Iterator[tuple[Border, int | None, bool]]:
        """Yields each border, the number of its first token, and whether it is an array that the kernel reads."""
        for border, table, first in zip(self.late.borders, self.late.tables, self.first, strict=True):
            yield border, first, table is None and first is None

    @property
    def entries(self) -> int:
        """The number of entries of the largest table that pairs search.

        A table of integers that is known at trace time is a part of the code.
        """
        return max((border.entries for border, _, read in self.sources() if read), default=1)


def rule_of(call: Call, program: Any, *, mod: bool) -> tuple[Rule, list[Array]]:
    """Returns the rule of a traced mask or score modification, and the arrays that the kernel reads.

    Raises:
        NotImplementedError: the kernel cannot compute it.
    """
    parts = cut(program, arguments_of(call.q_at, call.kv_at, mod=mod, rows=mod and call.rows is not None))
    check(parts.late, HOPPER)
    query, key = jax.tree.leaves(call.q_at), jax.tree.leaves(call.kv_at)
    rule = Rule(parts.late, _first(parts, query, key))
    batch, _, num_heads, _ = call.query.shape
    borders = parts.borders((*program.arrays, *program.fixed), query, key, batch, num_heads)
    return rule, [x for x, (_, _, read) in zip(borders, rule.sources(), strict=True) if read]


def _first(parts: Cut, query: Sequence[Any], key: Sequence[Any]) -> tuple[int | None, ...]:
    """Returns for each border that counts tokens the number of the first one."""
    fields = {QUERY: iter(query), KEY: iter(key)}
    arguments = parts.jaxpr.invars[len(parts.jaxpr.invars) - len(parts.arguments) :]
    known: dict[Any, int] = {}
    for variable, (name,) in zip(arguments, parts.arguments, strict=True):
        if name in fields and (first := _counted(next(fields[name]))) is not None:
            known[variable] = first
    return tuple(known.get(x) for x in parts.jaxpr.outvars)


def _counted(field: Any) -> int | None:
    """Returns the first number of coordinates that are known at trace time and count tokens in all rows alike."""
    counts = isinstance(field, np.ndarray) and field.shape[0] == 1 and (np.diff(field[0]) == 1).all()
    return int(field[0, 0]) if counts else None
