"""What the devices of a compiled program send to each other, and what the partitioner warned of."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.compile.hlo import Instruction, Module, Times

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "collective-permute", "all-to-all")
"""Kinds of collectives, as HLO names them."""

_OTHER_NAMES = {"ragged-all-to-all": "all-to-all", "collective-broadcast": "collective-permute"}
_ALONE = re.compile(r"\breplica_groups=(\{(\{\d+\},?)+\}|\[\d+,1\]<=)")
"""Groups of one device: each of them listed, or as rows of a matrix of one column."""
_WARNING = re.compile(r"\[SPMD\] ([^\n]*)")


@dataclass(frozen=True)
class Traffic:
    """All collectives of one kind."""

    kind: str
    count: int
    """Number of instructions in the text."""
    runs: int
    """How often they run, loops counted."""
    bytes: int
    """Bytes of the arrays, times how often: the result of an all-gather, and the operand of every other kind."""
    exact: bool
    """False if one is inside a loop whose number of iterations is not known, and which counts once."""


def traffic(text: str) -> list[Traffic]:
    """Reads the collectives of a compiled program, in the order of `KINDS`; leaves out kinds that it has none of.

    Bytes are those of one device. They are not the bytes on its links, which depend on the algorithm: a ring sends
    (n - 1) / n of the result of an all-gather, and twice that share of the operand of an all-reduce.

    Args:
        text: what `jax.stages.Compiled.as_text` returns.

    >>> text = '''
    ... ENTRY %main (x: f32[4]) -> f32[8] {
    ...   %x = f32[4]{0} parameter(0)
    ...   ROOT %y = f32[8]{0} all-gather(%x), channel_id=1, replica_groups={{0,1}}, dimensions={0}
    ... }
    ... '''
    >>> traffic(text)
    [Traffic(kind='all-gather', count=1, runs=1, bytes=32, exact=True)]
    """
    found: dict[str, list[tuple[float, Times]]] = {}
    for instruction, computation, times in Module(text).instructions():
        kind = kind_of(instruction)
        if kind is not None and not _alone(instruction):
            given = sum(
                x.bytes for name in instruction.operands if name in computation for x in computation[name].result
            )
            found.setdefault(kind, []).append((_bytes(kind, instruction, given), times))
    return [
        Traffic(
            kind,
            len(found[kind]),
            sum(times.known for _, times in found[kind]),
            round(sum(size * times.known for size, times in found[kind])),
            all(times.exact for _, times in found[kind]),
        )
        for kind in KINDS
        if kind in found
    ]


def kind_of(instruction: Instruction) -> str | None:
    """Returns the kind of a collective, or None. An asynchronous one counts where it starts."""
    name = instruction.opcode.removesuffix("-start")
    name = _OTHER_NAMES.get(name, name)
    return name if name in KINDS else None


def _bytes(kind: str, instruction: Instruction, given: float) -> float:
    """Returns the bytes of a collective whose operands have `given` bytes."""
    if kind != "all-gather":
        return given
    result = sum(x.bytes for x in instruction.result)
    # The start of an asynchronous one returns its operands beside the result.
    return result - given if instruction.opcode.endswith("-start") else result


def _alone(instruction: Instruction) -> bool:
    """Whether each device is in a group of its own, so that nothing is sent."""
    return bool(_ALONE.search(instruction.rest))


def warnings(printed: str) -> list[str]:
    """Returns what the partitioner warned of, one line for each warning in what the compiler printed.

    >>> warnings("E0000 spmd_partitioner.cc:1] [SPMD] Involuntary full rematerialization. The compiler was not able")
    ['Involuntary full rematerialization. The compiler was not able']
    """
    return [" ".join(words.split()) for words in _WARNING.findall(printed)]


def largest(found: Sequence[Traffic]) -> int:
    """Returns the bytes of all collectives together."""
    return sum(each.bytes for each in found)
