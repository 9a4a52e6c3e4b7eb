"""The forward pass: a kernel that is built from the table of `protocol`, with the arithmetic of `tile`.

A block computes two tiles of 64 queries of one head, one for each consumer warpgroup. The tiles of keys that it visits
are lists in global memory: first the full ones, in which every pair is visible, then the partial ones.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from seqattn.kernels.finite import marked, marked_query
from seqattn.kernels.hopper import protocol
from seqattn.kernels.hopper.plan import Operands, Plan
from seqattn.kernels.hopper.protocol import CONSUMERS, Action, Index, Protocol, Row, When
from seqattn.kernels.hopper.rule import Rule
from seqattn.kernels.hopper.tile import Arithmetic, Place, Sums
from seqattn.kernels.hopper.units import units
from seqattn.kernels.per_pair import QUERY

Results = tuple[Float[Array, "B T N V"], Float[Array, "B T N"], Float[Array, "B T N"]]
"""The output, the largest logit of each row and the log of the sum of `exp(logit - largest)`."""


def forward(plan: Plan, operands: Operands) -> Results:
    """Returns the results of the forward pass."""
    length = plan.sizes[3]
    output, peak, log_total = compute(plan, padded(plan, operands))
    return output[:, :length], peak[..., :length].swapaxes(1, 2), log_total[..., :length].swapaxes(1, 2)


def padded(plan: Plan, operands: Operands) -> Operands:
    """Returns the arrays that the kernel reads: padded to whole tiles, and marked where they are not finite."""
    queries, keys = plan.padded
    # A key is NaN where key or value are not finite, and the value 0: the mask can then hide both.
    key, value = marked(operands.key, operands.value)
    rows = {"query": (marked_query(operands.query), queries), "key": (key, keys), "value": (value, keys)}
    whole = {name: jnp.pad(x, ((0, 0), (0, n - x.shape[1]), (0, 0), (0, 0))) for name, (x, n) in rows.items()}
    return dataclasses.replace(
        operands,
        **whole,
        mask=_vectors(plan, plan.mask, operands.mask),
        mod=_vectors(plan, plan.score_mod, operands.mod),
        # The compiler loads no booleans.
        shown=[_pairs(plan, x.astype(jnp.int8)) for x in operands.shown],
        bias=[_pairs(plan, x) for x in operands.bias],
        counts=jnp.asarray(operands.counts),
        tiles=jnp.asarray(operands.tiles),
    )


def _vectors(plan: Plan, rule: Rule | None, arrays: list[Array]) -> list[Array]:
    """Returns what the pairs read, padded to whole tiles with the last entry."""
    borders = [] if rule is None else [border for border, _, read in rule.sources() if read]
    given = []
    for border, x in zip(borders, arrays, strict=True):
        # The compiler loads no booleans.
        wide = x.astype(jnp.int32) if x.dtype == jnp.bool_ else x
        if border.by_token:
            length = plan.padded[0 if QUERY in border.reads else 1]
            wide = jnp.pad(wide, ((0, 0), (0, 0), (0, length - wide.shape[2])), mode="edge")
        given.append(wide)
    return given


def _pairs(plan: Plan, x: Array) -> Array:
    """Returns an array of pairs `[B or 1, N or 1, T or 1, S or 1]` padded to whole tiles, with all keys."""
    x = jnp.broadcast_to(x, (*x.shape[:3], plan.sizes[4]))
    behind = [(0, 0 if n == 1 else whole - n) for n, whole in zip(x.shape[2:], plan.padded, strict=True)]
    if x.shape[3] == 1:
        behind[1] = (0, plan.padded[1] - 1)
    return jnp.pad(x, ((0, 0), (0, 0), *behind))


def compute(plan: Plan, given: Operands, table: Protocol | None = None) -> list[Array]:
    """Runs the kernel on arrays that fill whole tiles; `table` is the protocol, by default that of the plan."""
    batch, length, num_heads, _ = given.query.shape
    flat, tree = jax.tree.flatten(given)
    if table is None:
        table = protocol.forward(plan.tiling.slots)
    if plan.interpret is not None:
        table = protocol.observed(table)

    def seqattn_hopper(*refs: Any) -> None:
        _Block(plan, table, jax.tree.unflatten(tree, refs[: len(flat)]), *refs[len(flat) :]).run()

    row = jax.ShapeDtypeStruct((batch, num_heads, length), jnp.float32)
    return plgpu.kernel(
        seqattn_hopper,
        out_type=[jax.ShapeDtypeStruct(given.query.shape, given.query.dtype), row, row],
        # Neighbouring blocks are the heads of the same queries: those of a group read the same keys.
        grid=(batch, length // plan.tiling.together, num_heads),
        grid_names=("batch", "queries", "heads"),
        num_threads=CONSUMERS + 1,
        thread_name="warpgroup",
        scratch_types=[_buffers(plan, table), _barriers(table)],
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=plan.interpret,
    )(*flat)


def _buffers(plan: Plan, table: Protocol) -> dict[str, Any]:
    """Returns the buffers of the table in shared memory."""
    # The layout that wgmma reads without bank conflicts: rows of 128 bytes, swizzled.
    layout = (plgpu.TilingTransform((8, 128 // plan.dtype.itemsize)), plgpu.SwizzleTransform(128))
    rows = {"query": plan.tiling.queries, "key": plan.tiling.keys, "value": plan.tiling.keys}
    return {
        name: plgpu.SMEM((each.count, rows[name], plan.sizes[5]), plan.dtype, transforms=layout)
        for name, each in table.buffers.items()
    }


def _barriers(table: Protocol) -> dict[str, Any]:
    """Returns the barriers of the table."""
    return {
        name: plgpu.Barrier(num_arrivals=each.arrivals, num_barriers=each.count)
        for name, each in table.barriers.items()
    }


class _Block:
    """The programs of the warpgroups of one block, as Pallas traces them.

    Args:
        plan: the static part of the call.
        table: the protocol.
        given: references to the arrays in global memory.
        output: a reference to the output.
        peak: a reference to the largest logits.
        log_total: a reference to the logs of the totals.
        shared: the buffers.
        barriers: the barriers.
    """

    def __init__(
        self,
        plan: Plan,
        table: Protocol,
        given: Operands,
        output: Any,
        peak: Any,
        log_total: Any,
        shared: Any,
        barriers: Any,
    ) -> None:
        self.plan, self.table, self.given = plan, table, given
        self.output, self.numbers, self.shared, self.barriers = output, (peak, log_total), shared, barriers
        self.units = units(interpret=plan.interpret is not None)
        self.arithmetic = Arithmetic(
            self.units, plan.sizes[4], plan.mask, plan.score_mod, plan.dropout_rate, given.scale[0], given
        )
        self.batch, self.head = lax.axis_index("batch"), lax.axis_index("heads")
        # The last queries come first: under a causal mask they have most to do, and short blocks fill the gaps.
        self.pair = given.counts.shape[1] - 1 - lax.axis_index("queries")
        self.consumer = lax.axis_index("warpgroup")
        self.row = self.batch if given.counts.shape[0] > 1 else 0
        self.full = given.counts[self.row, self.pair, 0]
        self.steps = self.full + given.counts[self.row, self.pair, 1]

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
        sums = self.arithmetic.start(self.plan.tiling.queries, self.plan.sizes[5])
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
            self._load(row, step)
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

    def _load(self, row: Row, step: Any) -> None:
        """Starts the copy of a tile of queries, keys or values."""
        array = getattr(self.given, row.name)
        if row.name == "query":
            first, number, head = self._first_query(int(row.index is Index.SECOND)), self.plan.tiling.queries, self.head
        else:
            # Query head n reads key head n // group (Ainslie 2023).
            first, number = self._first_key(step), self.plan.tiling.keys
            head = lax.div(self.head, jnp.int32(self.plan.sizes[1] // self.plan.sizes[2]))
        ready = self.barriers[self.table.buffers[row.name].ready]
        plgpu.copy_gmem_to_smem(
            array.at[self.batch, pl.ds(first, number), head],
            self._at(self.shared[row.name], row.index, step),
            self._at(ready, row.index, step),
        )

    def _first_query(self, consumer: Any) -> Any:
        return (self.pair * CONSUMERS + consumer) * self.plan.tiling.queries

    def _first_key(self, step: Any) -> Any:
        return self.given.tiles[self.row, self.pair, step] * self.plan.tiling.keys

    def _step(self, rows: tuple[Row, ...], step: Any, sums: Sums, *, partial: bool) -> Sums:
        """Executes the rows of a step. What stands between the start and the end of a product runs beside it."""
        at = 0
        products: Any = None
        weights: Any = None
        while at < len(rows):
            row = rows[at]
            if row.action is Action.ISSUE:
                end = rows.index(dataclasses.replace(row, action=Action.FINISH))
                meanwhile = functools.partial(self._rows, rows[at + 1 : end], step)
                reads = {
                    x.buffer: self._at(self.shared[x.buffer], x.index, step) for x in self.table.products[row.name]
                }
                if row.name == "scores":
                    products = self.units.scores(reads["query"], reads["key"], meanwhile)
                else:
                    sums = sums._replace(output=self.units.output(sums.output, weights, reads["value"], meanwhile))
                at = end
            elif row.action is Action.ENTER:
                weights, sums = self._exponentials(products, step, sums, partial=partial)
            elif row.action is not Action.LEAVE:
                self._rows((row,), step)
            at += 1
        return sums

    def _exponentials(self, products: Any, step: Any, sums: Sums, *, partial: bool) -> tuple[Array, Sums]:
        place = Place(self.batch, self.head, self._first_query(self.consumer), self._first_key(step))
        weights, sums = self.arithmetic.weights(products, sums, place, partial=partial)
        # The product runs in the dtype of the values, as in FlashAttention; its sums are float32. Without the barrier
        # the compiler moves exponentials past the hand-over of the tensor cores.
        return lax.optimization_barrier((weights.astype(self.plan.dtype), sums))

    def _store(self, rows: tuple[Row, ...], sums: Sums) -> None:
        """Executes the rows after the last step."""
        output, *numbers = self.arithmetic.finish(sums)
        where = self.batch, pl.ds(self._first_query(self.consumer), self.plan.tiling.queries), self.head
        for row in rows:
            if row.action in (Action.WAIT, Action.ARRIVE):
                self._rows((row,), self.steps)
                continue
            buffer = self._at(self.shared[row.name], row.index, self.steps)
            match row.action:
                case Action.WRITE:
                    buffer[...] = output.astype(self.plan.dtype)
                    for ref, x in zip(self.numbers, numbers, strict=True):
                        ref[where[0], where[2], where[1]] = x
                case Action.FENCE:
                    plgpu.commit_smem()
                case Action.STORE:
                    plgpu.copy_smem_to_gmem(buffer, self.output.at[where])
                case Action.DRAIN:
                    plgpu.wait_smem_to_gmem(0)
