"""What a warpgroup does with a tile: products, loads of vectors, layouts. On the device, and as the interpreter can.

The interpreter of Pallas Mosaic GPU knows neither a transposed operand nor layouts. So the kernel is written over a
`Units`, and everything else (arithmetic, lists of tiles, indices, protocol) is the same code in both forms.
"""

import abc
import functools
import inspect
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

Meanwhile = Callable[[], Any]
"""What the warpgroup does while a product runs."""


class Units(abc.ABC):
    """The operations that differ between the device and the interpreter."""

    @abc.abstractmethod
    def scores(self, query: Any, key: Any, meanwhile: Meanwhile) -> tuple[Array, Any]:
        """Returns the products of the queries `[rows, H]` and the keys `[columns, H]` in shared memory, float32.

        The second result is that of `meanwhile`. Queries and keys may be any vectors of rows and of columns.
        """

    @abc.abstractmethod
    def product(self, left: Any, right: Any, meanwhile: Meanwhile) -> tuple[Array, Any]:
        """Returns the product of `[rows, H]` and `[H, columns]` in shared memory, as `scores` does."""

    @abc.abstractmethod
    def output(self, total: Array, weights: Array, value: Any, meanwhile: Meanwhile) -> Array:
        """Returns `total + weights @ value`, with the values `[columns, V]` in shared memory."""

    @abc.abstractmethod
    def tile(self, number: float, shape: tuple[int, ...]) -> Array:
        """Returns a float32 tile of equal numbers."""

    @abc.abstractmethod
    def rows(self, number: float, length: int) -> Array:
        """Returns equal float32 numbers, one for each query."""

    @abc.abstractmethod
    def index(self, shape: tuple[int, ...], axis: int) -> Array:
        """Returns the row or the column of each entry of a tile, int32."""

    @abc.abstractmethod
    def part(self, array: Any, at: tuple[Any, ...], first: Any, length: int, axis: int) -> Array:
        """Returns a part of the last axis of an array in global memory.

        Args:
            array: the array.
            at: indices of all axes but the last.
            first: where the part begins.
            length: how long it is.
            axis: 0 for a number for each row of a tile, 1 for one for each column.
        """

    def vector(self, array: Any, at: tuple[Any, ...], first: Any, axis: int, shape: tuple[int, ...]) -> Array:
        """Returns the same as `part`, repeated over a tile."""
        return self.spread(self.part(array, at, first, shape[axis], axis), shape, axis)

    @abc.abstractmethod
    def pairs(self, array: Any, at: tuple[Any, ...], first: tuple[Any, Any], shape: tuple[int, ...]) -> Array:
        """Returns a tile of the last two axes of an array in global memory, that begins at `first`."""

    def spread(self, vector: Array, shape: tuple[int, ...], axis: int = 0) -> Array:
        """Repeats a number of each row, or of each column, over a tile."""
        return lax.broadcast_in_dim(vector, shape, (axis,))


class Device(Units):
    """Operations of the tensor cores (wgmma) and the layouts of their operands in registers."""

    def __init__(self) -> None:
        # Imported here, as it needs absl-py, which JAX does not install.
        from jax.experimental import pallas as pl
        from jax.experimental.pallas import mosaic_gpu as plgpu

        self._pl, self._plgpu = pl, plgpu
        self._whole = plgpu.Layout.WGMMA
        self._of_axis = {0: plgpu.Layout.WGMMA.reduce(1), 1: plgpu.Layout.WGMMA.reduce(0)}
        # Until jax 0.11 the index is a required argument, too.
        given = inspect.signature(plgpu.load).parameters.get("idx")
        index: dict[str, Any] = {} if given is None or given.default is not given.empty else {"idx": ()}
        self._load: Callable[..., Array] = functools.partial(plgpu.load, optimized=False, **index)

    def scores(self, query: Any, key: Any, meanwhile: Meanwhile) -> tuple[Array, Any]:
        return self.product(query, key.transpose((1, 0)), meanwhile)

    def product(self, left: Any, right: Any, meanwhile: Meanwhile) -> tuple[Array, Any]:
        def multiply(sums: Any) -> tuple[Array, Any]:
            self._plgpu.wgmma(sums, left, right)
            done = meanwhile()
            return sums[...], done  # waits for the product

        return self._pl.run_scoped(multiply, self._plgpu.ACC((left.shape[0], right.shape[1]), jnp.float32))

    def output(self, total: Array, weights: Array, value: Any, meanwhile: Meanwhile) -> Array:
        def multiply(sums: Any) -> None:
            self._plgpu.wgmma(sums, weights, value)
            meanwhile()

        # `run_state` waits for the product before it returns the sums.
        return self._pl.run_state(multiply)(self._plgpu.ACC.init(total))

    def tile(self, number: float, shape: tuple[int, ...]) -> Array:
        return self._plgpu.layout_cast(jnp.full(shape, number, jnp.float32), self._whole)

    def rows(self, number: float, length: int) -> Array:
        return self._plgpu.layout_cast(jnp.full((length,), number, jnp.float32), self._of_axis[0])

    def index(self, shape: tuple[int, ...], axis: int) -> Array:
        return self._plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=self._whole)

    def part(self, array: Any, at: tuple[Any, ...], first: Any, length: int, axis: int) -> Array:
        part = (*at, self._pl.ds(first, length))
        return self._load(array.at[part], layout=self._of_axis[axis])

    def pairs(self, array: Any, at: tuple[Any, ...], first: tuple[Any, Any], shape: tuple[int, ...]) -> Array:
        part = (*at, self._pl.ds(first[0], shape[0]), self._pl.ds(first[1], shape[1]))
        return self._load(array.at[part], layout=self._whole)


class Interpreted(Units):
    """The same operations in terms of plain loads, which the interpreter knows and whose races it sees."""

    def scores(self, query: Any, key: Any, meanwhile: Meanwhile) -> tuple[Array, Any]:
        sums = lax.dot_general(query[...], key[...], (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
        self.after_loads()
        return sums, meanwhile()

    def product(self, left: Any, right: Any, meanwhile: Meanwhile) -> tuple[Array, Any]:
        sums = lax.dot_general(left[...], right[...], (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32)
        self.after_loads()
        return sums, meanwhile()

    def output(self, total: Array, weights: Array, value: Any, meanwhile: Meanwhile) -> Array:
        sums = lax.dot_general(weights, value[...], (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32)
        self.after_loads()
        meanwhile()
        return total + sums

    def after_loads(self) -> None:
        """Orders what was loaded before later copies to the same place.

        The hardware knows two kinds of accesses, and a fence orders them. wgmma is of the kind of copies and needs
        none; plain loads are not. From jax 0.12 on, the detector of races knows both kinds.
        """
        from jax.experimental.pallas import mosaic_gpu as plgpu

        plgpu.commit_smem()

    def tile(self, number: float, shape: tuple[int, ...]) -> Array:
        return jnp.full(shape, number, jnp.float32)

    def rows(self, number: float, length: int) -> Array:
        return jnp.full((length,), number, jnp.float32)

    def index(self, shape: tuple[int, ...], axis: int) -> Array:
        return lax.broadcasted_iota(jnp.int32, shape, axis)

    def part(self, array: Any, at: tuple[Any, ...], first: Any, length: int, axis: int) -> Array:
        from jax.experimental import pallas as pl

        return array[(*at, pl.ds(first, length))]

    def pairs(self, array: Any, at: tuple[Any, ...], first: tuple[Any, Any], shape: tuple[int, ...]) -> Array:
        from jax.experimental import pallas as pl

        return array[(*at, pl.ds(first[0], shape[0]), pl.ds(first[1], shape[1]))]


def units(*, interpret: bool) -> Units:
    """Returns the operations of the device, or those that the interpreter knows."""
    return Interpreted() if interpret else Device()
