"""The forward pass: a kernel that is built from the table of `protocol`, with the arithmetic of `tile`.

A block computes two tiles of 64 queries of one head, one for each consumer warpgroup. The tiles of keys that it visits
are lists in global memory: first the full ones, in which every pair is visible, then the partial ones.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from seqattn.kernels.hopper import protocol
from seqattn.kernels.hopper.block import Block, Reads, Step, barriers, buffers
from seqattn.kernels.hopper.inputs import of_forward
from seqattn.kernels.hopper.plan import Operands, Plan
from seqattn.kernels.hopper.protocol import CONSUMERS, Index, Protocol, Row
from seqattn.kernels.hopper.tile import Arithmetic, Place, Sums
from seqattn.kernels.hopper.units import Meanwhile, units

Results = tuple[Float[Array, "B T N V"], Float[Array, "B T N"], Float[Array, "B T N"]]
"""The output, the largest logit of each row and the log of the sum of `exp(logit - largest)`."""


def forward(plan: Plan, operands: Operands) -> Results:
    """Returns the results of the forward pass."""
    length = plan.sizes[3]
    output, peak, log_total = compute(plan, of_forward(plan, operands))
    return output[:, :length], peak[..., :length].swapaxes(1, 2), log_total[..., :length].swapaxes(1, 2)


def compute(plan: Plan, given: Operands, table: Protocol | None = None) -> list[Array]:
    """Runs the kernel on arrays that fill whole tiles; `table` is the protocol, by default that of the plan."""
    batch, length, num_heads, head_dim = given.query.shape
    flat, tree = jax.tree.flatten(given)
    if table is None:
        table = protocol.forward(plan.tiling.slots)
    if plan.interpret is not None:
        table = protocol.observed(table)

    def seqattn_hopper(*refs: Any) -> None:
        _Block(plan, table, jax.tree.unflatten(tree, refs[: len(flat)]), *refs[len(flat) :]).run()

    row = jax.ShapeDtypeStruct((batch, num_heads, length), jnp.float32)
    rows = {"query": plan.tiling.queries, "key": plan.tiling.keys, "value": plan.tiling.keys}
    return plgpu.kernel(
        seqattn_hopper,
        out_type=[jax.ShapeDtypeStruct(given.query.shape, given.query.dtype), row, row],
        # Neighbouring blocks are the heads of the same queries: those of a group read the same keys.
        grid=(batch, length // plan.tiling.together, num_heads),
        grid_names=("batch", "queries", "heads"),
        num_threads=CONSUMERS + 1,
        thread_name="warpgroup",
        scratch_types=[buffers(table, rows, head_dim, plan.dtype), barriers(table)],
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=plan.interpret,
    )(*flat)


class _Block(Block):
    """The programs of the warpgroups of one block.

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
        super().__init__(table, shared, barriers)
        self.plan, self.given, self.output, self.numbers = plan, given, output, (peak, log_total)
        self.units = units(interpret=plan.interpret is not None)
        self.arithmetic = Arithmetic(self.units, plan, given.scale[0], given)
        self.batch, self.head = lax.axis_index("batch"), lax.axis_index("heads")
        counts = given.walk.counts
        # The last queries come first: under a causal mask they have most to do, and short blocks fill the gaps.
        self.pair = counts.shape[1] - 1 - lax.axis_index("queries")
        self.row = self.batch if counts.shape[0] > 1 else 0
        self.full = counts[self.row, self.pair, 0]
        self.steps = self.full + counts[self.row, self.pair, 1]

    def source(self, row: Row, step: Any) -> Any:
        if row.name == "query":
            first, number, head = self._first_query(int(row.index is Index.SECOND)), self.plan.tiling.queries, self.head
        else:
            # Query head n reads key head n // group (Ainslie 2023).
            first, number = self._first_key(step), self.plan.tiling.keys
            head = lax.div(self.head, jnp.int32(self.plan.group))
        return getattr(self.given, row.name).at[self.batch, pl.ds(first, number), head]

    def target(self, name: str) -> Any:
        return self.output.at[self.batch, self._own(), self.head]

    def _own(self) -> Any:
        """Returns the queries of this consumer."""
        return pl.ds(self._first_query(self.consumer), self.plan.tiling.queries)

    def _first_query(self, consumer: Any) -> Any:
        return (self.pair * CONSUMERS + consumer) * self.plan.tiling.queries

    def _first_key(self, step: Any) -> Any:
        return self.given.walk.tiles[self.row, self.pair, step] * self.plan.tiling.keys

    def place(self, step: Any) -> Place:
        """Returns where the tile of a step is."""
        return Place(self.batch, self.head, self._first_query(self.consumer), self._first_key(step))

    def start(self) -> Sums:
        return self.arithmetic.start(self.plan.tiling.queries, self.plan.sizes[5])

    def begin(self, step: Any, sums: Sums, *, partial: bool) -> Step:
        return _Step(self, step, sums, partial=partial)

    def finish(self, sums: Sums) -> tuple[Array, Array, Array]:
        return self.arithmetic.finish(sums)

    def write(self, name: str, buffer: Any, results: tuple[Array, Array, Array]) -> None:
        output, *numbers = results
        buffer[...] = output.astype(self.plan.dtype)
        for ref, x in zip(self.numbers, numbers, strict=True):
            ref[self.batch, self.head, self._own()] = x


class _Step(Step):
    """A tile of keys: its scores, their exponentials, and the output."""

    def __init__(self, block: _Block, step: Any, sums: Sums, *, partial: bool) -> None:
        self.block, self.step, self.sums, self.partial = block, step, sums, partial
        self.products: Any = None
        self.weights: Any = None

    def product(self, name: str, reads: Reads, meanwhile: Meanwhile) -> None:
        units = self.block.units
        if name == "scores":
            self.products, _ = units.scores(reads["query"], reads["key"], meanwhile)
        else:
            output = units.output(self.sums.output, self.weights, reads["value"], meanwhile)
            self.sums = self.sums._replace(output=output)

    def region(self, name: str) -> None:
        place = self.block.place(self.step)
        weights, sums = self.block.arithmetic.weights(self.products, self.sums, place, partial=self.partial)
        # The product runs in the dtype of the values, as in FlashAttention; its sums are float32. Without the barrier
        # the compiler moves exponentials past the hand-over of the tensor cores.
        self.weights, self.sums = lax.optimization_barrier((weights.astype(self.block.plan.dtype), sums))
