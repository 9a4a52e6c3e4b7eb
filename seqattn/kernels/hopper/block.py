"""The programs of the warpgroups of a block, as Pallas traces them: the rows of a `Protocol`, one after the other.

A kernel states what the names of its table mean: where tiles come from, what a product computes, what is written.
"""

import abc
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array

from seqattn.kernels.hopper.protocol import CONSUMERS, Action, Index, Protocol, Row, When
from seqattn.kernels.hopper.units import Meanwhile

Reads = dict[str, Any]
"""The buffers that a product reads, by name."""


class Step(abc.ABC):
    """What a consumer computes in one step.

    Attributes:
        sums: the state that the step receives, and updates.
    """

    sums: Any

    @abc.abstractmethod
    def product(self, name: str, reads: Reads, meanwhile: Meanwhile) -> None:
        """Computes a product of the table, and runs `meanwhile` beside it."""

    def region(self, name: str) -> None:
        """Computes what stands between the rows ENTER and LEAVE."""
        raise NotImplementedError(f"this kernel has no region {name}")


class Block(abc.ABC):
    """The programs of one block.

    Args:
        table: the protocol.
        shared: the buffers.
        barriers: the barriers.

    Attributes:
        consumer: the number of the warpgroup.
        full: how many steps have a full tile. They come first.
        steps: how many steps there are.
    """

    full: Any
    steps: Any

    def __init__(self, table: Protocol, shared: Any, barriers: Any) -> None:
        self.table, self.shared, self.barriers = table, shared, barriers
        self.consumer = lax.axis_index("warpgroup")

    @abc.abstractmethod
    def source(self, row: Row, step: Any) -> Any:
        """Returns the tile in global memory that a row loads."""

    @abc.abstractmethod
    def target(self, name: str) -> Any:
        """Returns the tile in global memory to which a buffer is stored."""

    @abc.abstractmethod
    def start(self) -> Any:
        """Returns the state of a consumer before the steps."""

    @abc.abstractmethod
    def begin(self, step: Any, sums: Any, *, partial: bool) -> Step:
        """Returns the computation of a step, whose tile is full or partial."""

    @abc.abstractmethod
    def finish(self, sums: Any) -> Any:
        """Returns the results of a consumer from its state after the steps."""

    @abc.abstractmethod
    def write(self, name: str, buffer: Any, results: Any) -> None:
        """Writes a result to a buffer."""

    def run(self) -> None:
        """Gives each warpgroup its program and its share of the registers."""

        @pl.when(self.consumer < CONSUMERS)
        def _consume() -> None:
            plgpu.set_max_registers(240, action="increase")
            self._consume()

        @pl.when(self.consumer == CONSUMERS)
        def _load() -> None:
            # One thread starts copies, and needs few registers.
            plgpu.set_max_registers(24, action="decrease")
            self._fill()

    def _fill(self) -> None:
        """The program of the memory warpgroup."""
        program = self.table.memory
        self._rows(program.before, 0)

        def step(i: Array, nothing: tuple[()]) -> tuple[()]:
            self._rows(program.step, i)
            return nothing

        lax.fori_loop(0, self.steps + program.more, step, ())
        self._rows(program.after, self.steps)

    def _consume(self) -> None:
        """The program of a consumer."""
        program = self.table.consumer
        sums = self.start()
        self._rows(program.before, 0)
        # Two loops instead of a branch in one: full tiles evaluate no mask at all.
        full, partial = (functools.partial(self._step, program.step, partial=each) for each in (False, True))
        sums = lax.fori_loop(0, self.full, full, sums)
        sums = lax.fori_loop(self.full, self.steps, partial, sums)
        self._store(program.after, sums)

    def _rows(self, rows: tuple[Row, ...], step: Any) -> None:
        """Executes rows that wait, arrive and load."""
        for row in rows:
            self._if(row.when, step, functools.partial(self._row, row, step))

    def _row(self, row: Row, step: Any) -> None:
        if row.action is Action.LOAD:
            buffer = self._at(self.shared[row.name], row.index, step)
            ready = self.barriers[self.table.buffers[row.name].ready]
            plgpu.copy_gmem_to_smem(self.source(row, step), buffer, self._at(ready, row.index, step))
            return
        barrier = self._at(self.barriers[row.name], row.index, step)
        (plgpu.barrier_wait if row.action is Action.WAIT else plgpu.barrier_arrive)(barrier)

    def _if(self, when: When, step: Any, do: Callable[[], None]) -> None:
        """Executes a row if its condition holds."""
        if when is When.ALWAYS:
            do()
            return
        conditions: dict[When, Callable[[], Any]] = {
            When.ANY: lambda: self.steps > 0,
            When.AGAIN: lambda: step >= self.table.slots,
            When.MORE: lambda: step + 1 < self.steps,
            When.TILE: lambda: step < self.steps,
            When.FIRST: lambda: self.consumer == 0,
            When.SECOND: lambda: self.consumer == 1,
        }
        pl.when(conditions[when]())(do)

    def _at(self, several: Any, index: Index, step: Any) -> Any:
        """Returns one of several barriers or buffers."""
        if index is Index.ONLY:
            return several
        slots = jnp.int32(self.table.slots)
        found: dict[Index, Callable[[], Any]] = {
            Index.FIRST: lambda: 0,
            Index.SECOND: lambda: 1,
            Index.OWN: lambda: self.consumer,
            Index.SLOT: lambda: lax.rem(step, slots),
            Index.NEXT: lambda: lax.rem(step + 1, slots),
        }
        return several.at[found[index]()]

    def _step(self, rows: tuple[Row, ...], step: Any, sums: Any, *, partial: bool) -> Any:
        """Executes the rows of a step. What stands between the start and the end of a product runs beside it."""
        at, now = 0, self.begin(step, sums, partial=partial)
        while at < len(rows):
            row = rows[at]
            if row.action is Action.ISSUE:
                end = rows.index(dataclasses.replace(row, action=Action.FINISH))
                meanwhile = functools.partial(self._rows, rows[at + 1 : end], step)
                reads = {
                    x.buffer: self._at(self.shared[x.buffer], x.index, step) for x in self.table.products[row.name]
                }
                now.product(row.name, reads, meanwhile)
                at = end
            elif row.action is Action.ENTER:
                now.region(row.name)
            elif row.action is not Action.LEAVE:
                self._rows((row,), step)
            at += 1
        return now.sums

    def _store(self, rows: tuple[Row, ...], sums: Any) -> None:
        """Executes the rows after the last step."""
        results = self.finish(sums)
        for row in rows:
            if row.action in (Action.WAIT, Action.ARRIVE):
                self._rows((row,), self.steps)
                continue
            buffer = self._at(self.shared[row.name], row.index, self.steps)
            match row.action:
                case Action.WRITE:
                    self.write(row.name, buffer, results)
                case Action.FENCE:
                    plgpu.commit_smem()
                case Action.STORE:
                    plgpu.copy_smem_to_gmem(buffer, self.target(row.name))
                case Action.DRAIN:
                    plgpu.wait_smem_to_gmem(0)


def buffers(table: Protocol, rows: dict[str, int], dim: int, dtype: Any) -> dict[str, Any]:
    """Returns the buffers of a table in shared memory: tiles of `rows[name]` vectors of `dim` numbers."""
    return {
        name: plgpu.SMEM((each.count, rows[name], dim), dtype, transforms=layout(dtype, min(rows.values())))
        for name, each in table.buffers.items()
    }


def layout(dtype: Any, least: int) -> tuple[Any, ...]:
    """Returns the layout that wgmma reads without bank conflicts: swizzled rows of 128 bytes, or of fewer.

    A product over `least` rows of a tile needs that many numbers in each swizzled row, or a part of them.
    """
    width = next((each for each in (128, 64) if least * dtype.itemsize >= each), 32)
    return plgpu.TilingTransform((8, width // dtype.itemsize)), plgpu.SwizzleTransform(width)


def barriers(table: Protocol) -> dict[str, Any]:
    """Returns the barriers of a table."""
    return {
        name: plgpu.Barrier(num_arrivals=each.arrivals, num_barriers=each.count)
        for name, each in table.barriers.items()
    }
