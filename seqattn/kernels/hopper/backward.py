"""The backward pass: kernels built from the tables of `backward_protocol`, with the arithmetic of `backward_tile`.

One kernel owns tiles of queries and visits tiles of keys, another owns tiles of keys and visits tiles of queries. Each
result belongs to one block, so nothing is added to global memory: the sums are deterministic.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array

from seqattn.kernels.hopper import backward_protocol, protocol
from seqattn.kernels.hopper.backward_plan import Pass, lengths
from seqattn.kernels.hopper.backward_protocol import SIDES, other
from seqattn.kernels.hopper.backward_tile import Gradients, Weights
from seqattn.kernels.hopper.block import Block, Reads, Step, barriers, buffers
from seqattn.kernels.hopper.inputs import Rows, of_backward, of_pass
from seqattn.kernels.hopper.plan import Operands, Plan
from seqattn.kernels.hopper.protocol import CONSUMERS, Index, Protocol, Row
from seqattn.kernels.hopper.tile import Place
from seqattn.kernels.hopper.units import Meanwhile, units


def backward(
    plan: Plan, operands: Operands, output: Array, peak: Array, log_total: Array, d_output: Array, d_lse: Array
) -> dict[str, Array]:
    """Returns the gradients of query, key and value, by name, from the results of `forward` and their gradients."""
    assert plan.backward is not None
    # D = rowsum(dO * O) of algorithm 2, line 4. The gradient of the log-sum-exp with respect to a score is its weight,
    # so d_lse enters the same bracket: dS = P * (dP - (D - d_lse)).
    delta = jnp.sum(d_output.astype(jnp.float32) * output.astype(jnp.float32), axis=-1) - d_lse
    numbers = (x.swapaxes(1, 2) for x in (peak, log_total, delta))
    whole = lengths(plan.backward.passes, plan.sizes[3], plan.sizes[4])
    given = of_backward(plan, operands, Rows(d_output, *numbers), whole)
    found: dict[str, Array] = {}
    for i, each in enumerate(plan.backward.passes):
        found |= compute(plan, each, of_pass(*given, i, each))
    return {name: x[:, : getattr(operands, name).shape[1]] for name, x in found.items()}


def compute(plan: Plan, each: Pass, given: tuple[Operands, Rows], table: Protocol | None = None) -> dict[str, Array]:
    """Runs a kernel on arrays that fill whole tiles; `table` is the protocol, by default that of the kernel."""
    operands = given[0]
    flat, tree = jax.tree.flatten(given)
    if table is None:
        table = backward_protocol.backward(each.slots, each.owner, each.results)
    if plan.interpret is not None:
        table = protocol.observed(table)

    def run(*refs: Any) -> None:
        at = len(flat), len(flat) + len(each.results)
        outputs = dict(zip(each.results, refs[at[0] : at[1]], strict=True))
        _Block(plan, each, table, jax.tree.unflatten(tree, refs[: at[0]]), outputs, *refs[at[1] :]).run()

    run.__name__ = "_".join(("seqattn_hopper_d", *each.results))
    types = {name: getattr(operands, name) for name in each.results}
    owned = getattr(operands, each.owner)
    rows = dict.fromkeys(SIDES[each.owner], each.rows) | dict.fromkeys(SIDES[other(each.owner)], each.columns)
    found = plgpu.kernel(
        run,
        out_type=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in types.values()],
        grid=(owned.shape[0], operands.walk.counts.shape[1], owned.shape[2]),
        grid_names=("batch", "tiles", "heads"),
        num_threads=CONSUMERS + 1,
        thread_name="warpgroup",
        scratch_types=[buffers(table, rows, owned.shape[3], plan.dtype), barriers(table)],
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=plan.interpret,
    )(*flat)
    return dict(zip(types, found, strict=True))


class _Block(Block):
    """The programs of the warpgroups of one block.

    Args:
        plan: the static part of the call.
        each: the static part of the kernel.
        table: the protocol.
        given: references to the arrays in global memory.
        outputs: references to the gradients, by name.
        shared: the buffers.
        barriers: the barriers.
    """

    def __init__(
        self,
        plan: Plan,
        each: Pass,
        table: Protocol,
        given: tuple[Operands, Rows],
        outputs: dict[str, Any],
        shared: Any,
        barriers: Any,
    ) -> None:
        super().__init__(table, shared, barriers)
        self.plan, self.kernel, self.outputs = plan, each, outputs
        self.operands, self.rows = given
        self.of_keys = each.owner == "key"
        self.units = units(interpret=plan.interpret is not None)
        self.arithmetic = Gradients(self.units, plan, self.operands.scale[0], self.operands, transposed=self.of_keys)
        self.batch, self.head = lax.axis_index("batch"), lax.axis_index("heads")
        counts = self.operands.walk.counts
        tile = lax.axis_index("tiles")
        # Under a causal mask the last queries and the first keys have most to do. They come first.
        self.tile = tile if self.of_keys else counts.shape[1] - 1 - tile
        self.row = self.batch if counts.shape[0] > 1 else 0
        # For each tile of keys all query heads of their group are visited, so that their gradients are summed here.
        self.repeats = plan.group if self.of_keys else 1
        self.counts = [counts[self.row, self.tile, i] for i in range(2)]
        self.full, more = (x * self.repeats for x in self.counts)
        self.steps = self.full + more

    def visited(self, step: Any, *, partial: bool | None = None) -> tuple[Any, Any]:
        """Returns the query head of a step, and the index of its tile of the other side.

        `partial` tells which tile the step has, where that is known.
        """
        at, head = step, self.head
        if self.repeats > 1:
            # All heads visit the full tiles, then all heads visit the partial ones.
            known, unknown = (lambda *x: x[bool(partial)]), functools.partial(jnp.where, step < self.full)
            choose: Callable[..., Any] = unknown if partial is None else known
            count, rest = choose(*self.counts), step - choose(0, self.full)
            passed = lax.div(rest, count)
            head = self.head * self.repeats + passed
            at = rest - passed * count + choose(0, self.counts[0])
        return head, self.operands.walk.tiles[self.row, self.tile, at]

    def source(self, row: Row, step: Any) -> Any:
        if row.name in SIDES[self.kernel.owner]:
            first, number, head = self._first_row(int(row.index is Index.SECOND)), self.kernel.rows, self.head
        else:
            head, tile = self.visited(step)
            first, number = tile * self.kernel.columns, self.kernel.columns
            # Query head n reads key head n // group (Ainslie 2023).
            head = head if self.of_keys else lax.div(head, jnp.int32(self.plan.group))
        array = self.rows.d_output if row.name == "d_output" else getattr(self.operands, row.name)
        return array.at[self.batch, pl.ds(first, number), head]

    def target(self, name: str) -> Any:
        output = self.outputs[self._written(name)]
        return output.at[self.batch, pl.ds(self._first_row(self.consumer), self.kernel.rows), self.head]

    def _written(self, buffer: str) -> str:
        """Returns the gradient that a buffer receives: that of the values alone takes the place of the keys."""
        return "value" if self.kernel.results == ("value",) else buffer

    def _first_row(self, consumer: Any) -> Any:
        return (self.tile * CONSUMERS + consumer) * self.kernel.rows

    def place(self, step: Any, *, partial: bool) -> Place:
        """Returns where the tile of a step is."""
        head, tile = self.visited(step, partial=partial)
        row, column = self._first_row(self.consumer), tile * self.kernel.columns
        return Place(self.batch, head, *((column, row) if self.of_keys else (row, column)))

    def numbers(self, name: str, place: Place) -> Array:
        """Returns a number of each query, repeated over a tile."""
        axis = int(self.of_keys)
        shape = self.kernel.rows, self.kernel.columns
        return self.units.vector(getattr(self.rows, name), (place.batch, place.head), place.query, axis, shape)

    def start(self) -> dict[str, Array]:
        shape = self.kernel.rows, self.plan.sizes[5]
        return {name: self.units.tile(0.0, shape) for name in self.kernel.results}

    def begin(self, step: Any, sums: dict[str, Array], *, partial: bool) -> Step:
        return _Step(self, step, sums, partial=partial)

    def finish(self, sums: dict[str, Array]) -> dict[str, Array]:
        # The products were scaled: dQ and dK are the scale times the sums.
        return {name: x if name == "value" else x * self.arithmetic.scale for name, x in sums.items()}

    def write(self, name: str, buffer: Any, results: dict[str, Array]) -> None:
        buffer[...] = results[self._written(name)].astype(self.plan.dtype)


class _Step(Step):
    """A tile of pairs: its weights, their gradients, and what they add to the sums."""

    def __init__(self, block: _Block, step: Any, sums: dict[str, Array], *, partial: bool) -> None:
        self.block, self.sums, self.partial = block, dict(sums), partial
        self.place = block.place(step, partial=partial)
        self.products: Any = None
        self.weights: Any = None
        self.d_weights: Any = None

    def product(self, name: str, reads: Reads, meanwhile: Meanwhile) -> None:
        units, (first, second) = self.block.units, SIDES[other(self.block.kernel.owner)]
        mine = SIDES[self.block.kernel.owner]
        match name:
            case "scores":
                self.products, _ = units.scores(reads[mine[0]], reads[first], meanwhile)
                if "d_weights" not in self.block.table.products:
                    self.weights = self._recomputed()
            case "d_weights":
                # The exponentials run beside the product. dP = dO V^T, line 13.
                def beside() -> Weights:
                    meanwhile()
                    return self._recomputed()

                self.d_weights, self.weights = units.scores(reads[mine[1]], reads[second], beside)
            case "d_value":
                # dV += P^T dO, line 12.
                weights = self.weights.kept.astype(self.block.plan.dtype)
                self.sums["value"] = units.output(self.sums["value"], weights, reads[second], meanwhile)
            case _:
                # dQ += dS K and dK += dS^T Q, lines 15 and 16.
                owner = self.block.kernel.owner
                delta = self.block.numbers("delta", self.place)
                d_products = self.block.arithmetic.d_products(
                    self.weights, self.d_weights, delta, partial=self.partial
                ).astype(self.block.plan.dtype)
                self.sums[owner] = units.output(self.sums[owner], d_products, reads[first], meanwhile)

    def _recomputed(self) -> Weights:
        peak, log_total = (self.block.numbers(name, self.place) for name in ("peak", "log_total"))
        return self.block.arithmetic.recomputed(self.products, peak, log_total, self.place, partial=self.partial)
