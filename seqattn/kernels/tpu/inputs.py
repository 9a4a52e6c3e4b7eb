"""The arrays that a Pallas kernel reads, each with the block that a step of its grid sees.

The grid is (batch rows, heads, steps). Lists that are read before the kernel starts tell the tiles of each step. If the
batch rows visit different tiles, the lists hold the steps of all rows, and the grid has one row.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

from seqattn.kernels.blocks import Steps
from seqattn.kernels.per_pair import QUERY, Late
from seqattn.kernels.tpu.plan import Operands, Plan

LISTS = 4
"""The number of lists that are read before the kernel starts: row, outer, inner, flags."""


@dataclasses.dataclass(frozen=True)
class Place:
    """Where the blocks of a step are.

    Attributes:
        plan: the static part of the call.
        transposed: whether the outer tiles are tiles of keys.
    """

    plan: Plan
    transposed: bool

    def row(self, ids: Sequence[Any], lists: Sequence[Any]) -> Any:
        """Returns the batch row of a step."""
        return ids[0] if self.plan.shared else lists[0][ids[2]]

    def head(self, ids: Sequence[Any]) -> Any:
        """Returns the query head of a step."""
        # Transposed, the heads of the grid are key heads, and its last dim counts the query heads of a group.
        return ids[1] * self.plan.group + ids[3] if self.transposed else ids[1]

    def kv_head(self, ids: Sequence[Any]) -> Any:
        """Returns the key head of a step."""
        # `lax.div`, as `//` asks for the kind of the machine's own TPU.
        return ids[1] if self.transposed else lax.div(ids[1], self.plan.group)

    def query_tile(self, ids: Sequence[Any], lists: Sequence[Any]) -> Any:
        """Returns the index of the tile of queries."""
        return lists[2 if self.transposed else 1][ids[2]]

    def key_tile(self, ids: Sequence[Any], lists: Sequence[Any]) -> Any:
        """Returns the index of the tile of keys."""
        return lists[1 if self.transposed else 2][ids[2]]

    def by_query(self, dim: int) -> pl.BlockSpec:
        """Returns the block of an array `[B, N, T, dim]`."""

        def index(*given: Any) -> tuple[Any, ...]:
            ids, lists = given[:-LISTS], given[-LISTS:]
            return self.row(ids, lists), self.head(ids), self.query_tile(ids, lists), 0

        return pl.BlockSpec((None, None, self.plan.tiles.queries, dim), index)

    def by_key(self, dim: int) -> pl.BlockSpec:
        """Returns the block of an array `[B, K, S, dim]`."""

        def index(*given: Any) -> tuple[Any, ...]:
            ids, lists = given[:-LISTS], given[-LISTS:]
            return self.row(ids, lists), self.kv_head(ids), self.key_tile(ids, lists), 0

        return pl.BlockSpec((None, None, self.plan.tiles.keys, dim), index)

    def by_pair(self, shape: Sequence[int]) -> pl.BlockSpec:
        """Returns the block of an array `[B or 1, N or 1, T, S]`."""

        def index(*given: Any) -> tuple[Any, ...]:
            ids, lists = given[:-LISTS], given[-LISTS:]
            at = (self.row(ids, lists), self.head(ids))
            first = (0 if n == 1 else x for n, x in zip(shape[:2], at, strict=True))
            return *first, self.query_tile(ids, lists), self.key_tile(ids, lists)

        return pl.BlockSpec((None, None, self.plan.tiles.queries, self.plan.tiles.keys), index)

    def vector(self, shape: Sequence[int], *, of_query: bool, kv_heads: bool = False) -> pl.BlockSpec:
        """Returns the block of an array `[B or 1, heads or 1, 1, T or S]`."""
        tile, width = (self.query_tile, self.plan.tiles.queries) if of_query else (self.key_tile, self.plan.tiles.keys)

        def index(*given: Any) -> tuple[Any, ...]:
            ids, lists = given[:-LISTS], given[-LISTS:]
            head = self.kv_head(ids) if kv_heads else self.head(ids)
            return (0 if shape[0] == 1 else self.row(ids, lists)), (0 if shape[1] == 1 else head), 0, tile(ids, lists)

        return pl.BlockSpec((None, None, 1, width), index)


@dataclasses.dataclass
class Inputs:
    """The inputs of a kernel by name, in order.

    Attributes:
        place: where blocks are.
        arrays: the arrays by name.
        specs: their blocks.
    """

    place: Place
    arrays: dict[str, Array]
    specs: dict[str, pl.BlockSpec]

    def scalars(self, name: str, x: Array) -> None:
        """Adds an array of which the kernel reads scalars, as `[1, entries]`."""
        wide = x.astype(jnp.int32) if x.dtype == jnp.bool_ else x
        # `jax.vmap` adds a leading dim of blocks; Pallas requires that the last two dims of a block are whole.
        self.arrays[name], self.specs[name] = wide.reshape(1, -1), pl.BlockSpec(memory_space=pltpu.SMEM)

    def rows(self, name: str, x: Array, spec: pl.BlockSpec) -> None:
        """Adds an array `[B, heads, T or S, dim]`."""
        self.arrays[name], self.specs[name] = x, spec

    def vectors(self, name: str, x: Array, *, of_query: bool, kv_heads: bool = False) -> None:
        """Adds an array `[B or 1, heads or 1, T or S]`, padded to whole tiles with its last entry."""
        wide = x.astype(jnp.int32) if x.dtype == jnp.bool_ else x
        length = self.place.plan.padded[0 if of_query else 1]
        wide = jnp.pad(wide, ((0, 0), (0, 0), (0, length - wide.shape[2])), mode="edge")[:, :, None]
        self.arrays[name] = wide
        self.specs[name] = self.place.vector(wide.shape, of_query=of_query, kv_heads=kv_heads)

    def pairs(self, x: Array) -> None:
        """Adds a boolean array `[B or 1, N or 1, T or 1, S or 1]` of visible pairs."""
        by_query, by_key = (n != 1 for n in x.shape[2:])
        if by_query and by_key:
            widths = zip(self.place.plan.padded, x.shape[2:], strict=True)
            behind = ((0, 0), (0, 0), *((0, whole - n) for whole, n in widths))
            wide = jnp.pad(x.astype(jnp.int8), behind, mode="edge")
            self.arrays["pairs"], self.specs["pairs"] = wide, self.place.by_pair(wide.shape)
        elif by_query:
            self.vectors("visible_query", x[..., 0], of_query=True)
        else:
            # An array with one entry for all pairs is one with an entry for each key.
            shape = (*x.shape[:2], self.place.plan.sizes[4])
            self.vectors("visible_key", jnp.broadcast_to(x[:, :, 0], shape), of_query=False)

    def borders(self, prefix: str, late: Late | None, borders: Sequence[Array]) -> None:
        """Adds the borders of a mask or of a score modification."""
        for i, (border, x) in enumerate(zip(() if late is None else late.borders, borders, strict=True)):
            if late is not None and late.tables[i] is not None:
                continue
            if border.by_token:
                self.vectors(f"{prefix}{i}", x, of_query=QUERY in border.reads)
            else:
                self.scalars(f"{prefix}{i}", x)


def of_scores(place: Place, operands: Operands) -> Inputs:
    """Returns what every kernel reads apart from queries, keys and values."""
    plan, inputs = place.plan, Inputs(place, {}, {})
    inputs.scalars("scale", operands.scale)
    if plan.mask is not None:
        inputs.borders("mask", plan.mask, operands.mask)
    elif operands.mask is not None:
        inputs.pairs(operands.mask)
    inputs.borders("mod", plan.score_mod, operands.mod)
    if plan.dropout_rate:
        inputs.scalars("words", operands.words)
        inputs.scalars("base", operands.base)
    return inputs


def in_heads(x: Array, length: int, *, repeats: bool = False) -> Array:
    """Returns `[B, L, heads, D]` as `[B, heads, L, D]`, padded to a length with zeros, or by repeating the last one.

    Queries and keys are repeated, as their coordinates are: a score modification then sees no pair that is not there.
    """
    behind = ((0, 0), (0, 0), (0, length - x.shape[1]), (0, 0))
    return jnp.pad(x.swapaxes(1, 2), behind, mode="edge" if repeats else "constant")


def call(
    body: Callable[..., None],
    inputs: Inputs,
    steps: Steps,
    outputs: Sequence[tuple[Any, pl.BlockSpec]],
    scratch: Sequence[Any],
    dims: int,
) -> Sequence[Array]:
    """Runs a kernel over the steps of its lists.

    Args:
        body: the kernel, from a dict of references by name, the references of outputs and of scratch memory.
        inputs: what it reads.
        steps: the tiles to visit.
        outputs: type and block of each output.
        scratch: the memory that keeps its contents from step to step.
        dims: the multiplications for each pair, in all products together.
    """
    place, plan = inputs.place, inputs.place.plan
    batch, num_heads, num_kv_heads = plan.sizes[:3]
    lists = [jnp.asarray(x) for x in (steps.row, steps.outer, steps.inner, steps.flags)]
    # Pallas's interpreter has no grid of a size that is only known at run time. Steps after the last have no flags.
    number = steps.size if steps.count is None or plan.interpret else steps.count
    grid: tuple[Any, ...] = (batch if plan.shared else 1, num_kv_heads if place.transposed else num_heads, number)
    grid = (*grid, plan.group) if place.transposed else grid
    # Rows and heads may be shared out among the cores of a chip; the steps of a head follow each other.
    semantics: Any = ("parallel", "parallel", *["arbitrary"] * (len(grid) - 2))
    names = list(inputs.arrays)

    def kernel(*refs: Any) -> None:
        read, rest = refs[LISTS : LISTS + len(names)], refs[LISTS + len(names) :]
        named = dict(zip(names, read, strict=True)) | dict(zip(("row", "outer", "inner", "flags"), refs, strict=False))
        body(named, rest[: len(outputs)], rest[len(outputs) :])

    return pl.pallas_call(
        kernel,
        out_shape=[shape for shape, _ in outputs],
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=LISTS,
            grid=grid,
            in_specs=list(inputs.specs.values()),
            out_specs=[spec for _, spec in outputs],
            scratch_shapes=list(scratch),
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=semantics),
        cost_estimate=_cost(place, inputs, steps, dims),
        interpret=plan.interpret,
        name="seqattn_transposed" if place.transposed else "seqattn",
    )(*lists, *inputs.arrays.values())


def _cost(place: Place, inputs: Inputs, steps: Steps, dims: int) -> pl.CostEstimate:
    """Returns what the kernel computes and moves, from which the compiler schedules what runs beside it.

    If the number of steps is known at run time only, this is the most that it can be.
    """
    plan, tiles = place.plan, place.plan.tiles
    visited = steps.size * plan.sizes[1] * (plan.sizes[0] if plan.shared else 1)
    pairs = visited * tiles.queries * tiles.keys
    # Each step reads the tile of its inner side; that of the outer side stays.
    inner = (("query", "d_output") if place.transposed else ("key", "value")) if visited else ()
    width = tiles.queries if place.transposed else tiles.keys
    read = sum(inputs.arrays[name].shape[-1] for name in inner if name in inputs.arrays) * width
    moved = visited * read * plan.dtype.itemsize
    moved += sum(x.size * x.dtype.itemsize for name, x in inputs.arrays.items() if name not in inner)
    return pl.CostEstimate(flops=2 * dims * pairs, transcendentals=pairs, bytes_accessed=moved)
