"""Ring attention: the sequence is split over devices, and blocks of keys and values travel round a ring (Liu 2023).

Each device keeps its queries. In step m it attends to the block of the device m places before it and, at the same time,
passes that block on: n - 1 transfers for n devices. The online softmax of `chunked` continues from block to block, so
partial results are never rounded. The schedule of tiles is computed at run time from the coordinates that travel with a
block: a block outside the mask costs only its transfer.

The backward pass is a second ring. A block travels with its gradients, to which each device adds the contribution of
its queries; after n steps they are back home. Only the current block is kept: memory is O((T + S) / n).
"""

import dataclasses
import functools
from collections.abc import Hashable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array

from seqattn.kernels.call import Call, Result, refuse_unknown
from seqattn.kernels.chunked import backward, tile_loop
from seqattn.kernels.chunked.plan import Leaves, Plan, prepare
from seqattn.kernels.chunked.schedule import Grid
from seqattn.kernels.log_total import lse_of
from seqattn.kernels.mesh_axes import varying
from seqattn.kernels.no_gradient import is_floating, no_gradient
from seqattn.kernels.traced import capture
from seqattn.mask import Mask
from seqattn.precision import accumulator

Arrays = dict[str, Any]
"""Arrays of a call, by name."""

Block = dict[str, Any]
"""The arrays that travel: key, value and, if the mask or the score modification reads them, their coordinates kv_at."""


@dataclasses.dataclass(frozen=True)
class Ring:
    """The static part of a call.

    Attributes:
        axis_name: the mesh axis, or axes, over which the sequence is split.
        devices: the number of devices along it.
        grid: the tiles of each step.
        tree: the structure of the `Call` and of its mask as the caller gave it, whose leaves are the inputs of the
            compiled program.
    """

    axis_name: Hashable
    devices: int
    grid: Grid
    tree: jax.tree_util.PyTreeDef

    def call(self, leaves: Leaves) -> tuple[Call, Mask | None]:
        """Rebuilds the call and the mask from their leaves.

        The call has its mask as a program, which evaluates pairs but knows nothing of tiles. The mask knows which tiles
        it reaches.
        """
        return jax.tree.unflatten(self.tree, leaves)

    def source(self, step: int | Array) -> Array:
        """Returns the device that owns the block of a step."""
        # Each send moves a block one device up, so after `step` sends it comes from `step` devices before.
        return (lax.axis_index(self.axis_name) - step) % self.devices

    def send(self, tree: Any) -> Any:
        """Sends a tree to the next device, and returns the tree of the previous one."""
        if self.devices == 1:
            return tree
        to_next = [(i, (i + 1) % self.devices) for i in range(self.devices)]
        return jax.tree.map(lambda x: lax.ppermute(x, self.axis_name, to_next), tree)


def attend(call: Call, axis_name: Hashable) -> Result:
    """Returns the output and the log-sum-exp of this device's queries over the keys of all devices along `axis_name`.

    As `reference.attend`, except that a boolean mask and a bias have a column for each key of each device, in the order
    of the devices. Supports reverse mode only.
    """
    if call.dropout is not None and call.origin is None:
        raise NotImplementedError(
            "the ring has no dropout: it depends on a weight's index in the whole batch, which one device does not know"
        )
    refuse_unknown("a ring", call.query.shape, call.key.shape)
    devices = lax.axis_size(axis_name)
    if call.is_empty:
        return call.nothing()
    # Blocks differ on each device, so everything computed from them varies over the axis. Coordinates become traced
    # arrays: all blocks must share one grid, whatever coordinates they bring.
    call = jax.tree.map(jnp.asarray, dataclasses.replace(call, scale=jnp.asarray(call.scale, call.high)))
    here = lax.axis_index(axis_name)
    mask = lax.stop_gradient(call.mask) if isinstance(call.mask, Mask) else None
    call, mask = varying((capture(call, like=[call, here]), mask), [call, here])
    leaves, tree = jax.tree.flatten((call, mask))
    # Any block gives the same grid, as grids of traced coordinates depend on shapes alone.
    plan, _ = _step(call, mask, _block(call), 0)
    return _attend(Ring(axis_name, devices, plan.grid, tree), leaves)


def _block(call: Call) -> Block:
    """Returns the arrays of a call that travel."""
    matter = isinstance(call.mask, Mask) or (call.score_mod is not None and call.score_mod.uses_coordinates)
    return {name: getattr(call, name) for name in ("key", "value", *(["kv_at"] if matter else []))}


def _step(call: Call, mask: Mask | None, block: Block, source: int | Array) -> tuple[Plan, Leaves]:
    """Returns the call of `chunked` for the block of one device."""
    size, origin = block["key"].shape[1], call.origin
    of_pairs = {name: _columns(getattr(call, name), source, size) for name in ("mask", "bias")}
    # The index of the first key of the block among the keys of all devices, which dropout reads.
    origin = None if origin is None else dataclasses.replace(origin, key=source * size)
    return prepare(dataclasses.replace(call, **block, **of_pairs, origin=origin), reaching=mask)


def _columns(x: Any, source: int | Array, size: int) -> Any:
    """Returns the pairs with the keys of one device, `[B or 1, N or 1, T or 1, size or 1]`, of a mask or a bias."""
    if x is None or isinstance(x, Mask) or x.shape[3] == 1:
        return x
    return lax.dynamic_slice_in_dim(x, source * size, size, axis=3)


def _add_columns(x: Array | None, new: Array | None, source: Array, size: int) -> Array | None:
    """Adds `new` to a bias at the pairs with the keys of one device."""
    if x is None or new is None:
        return None
    if x.shape[3] == 1:
        return x + new
    return lax.dynamic_update_slice_in_dim(x, _columns(x, source, size) + new, source * size, axis=3)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(ring: Ring, leaves: Leaves) -> tuple[Array, Array]:
    """Returns the output and the log-sum-exp; the custom derivative rules are attached below."""
    output, peak, log_total = _results(ring, leaves)
    return output, lse_of(peak, log_total)


def _forward(ring: Ring, leaves: Leaves) -> tuple[tuple[Array, Array], tuple]:
    """Returns the results, and the residuals for the backward pass: this device's part, and no travelling block."""
    output, peak, log_total = _results(ring, leaves)
    return (output, lse_of(peak, log_total)), (leaves, output, peak, log_total)


def _backward(ring: Ring, residuals: tuple, directions: tuple) -> tuple[list[Array | np.ndarray]]:
    """Returns the gradients of the leaves; integer leaves have the gradient dtype `float0`."""
    leaves, *results = residuals
    gradients = iter(_gradients(ring, leaves, *results, *directions))
    return ([next(gradients) if is_floating(x) else no_gradient(x) for x in leaves],)


@functools.partial(jax.jit, static_argnums=0)
def _results(ring: Ring, leaves: Leaves) -> tuple[Array, Array, Array]:
    """Runs the forward ring and returns what `tile_loop.finish` does, for the keys of all devices."""
    call, mask = ring.call(leaves)

    def absorb(step: int | Array, block: Block, state: tile_loop.State) -> tile_loop.State:
        return tile_loop.absorb(*_step(call, mask, block, ring.source(step)), state)

    def absorb_and_send(step: Array, carry: tuple[Block, tile_loop.State]) -> tuple[Block, tile_loop.State]:
        block, state = carry
        # Sending does not depend on the computation, so the compiler may overlap the two.
        return ring.send(block), absorb(step, block, state)

    first = _step(call, mask, _block(call), ring.source(0))
    block, state = _block(call), varying(tile_loop.start(*first), leaves)
    # The last block is absorbed outside the loop. No other device needs it, so one transfer is saved.
    last = ring.devices - 1
    if last:
        block, state = lax.fori_loop(0, last, absorb_and_send, (block, state))
    return tile_loop.finish(*first, absorb(last, block, state))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
@functools.partial(jax.jit, static_argnums=0)
def _gradients(
    ring: Ring, leaves: Leaves, output: Array, peak: Array, log_total: Array, d_output: Array, d_lse: Array
) -> list[Array]:
    """Returns the gradients with respect to all floating leaves of the call."""
    (call, mask), high = ring.call(leaves), accumulator(output.dtype)

    def zeros(tree: Any) -> Any:
        return varying(jax.tree.map(lambda x: jnp.zeros(x.shape, high), tree), leaves)

    def add(step: int | Array, block: Block, travelling: Arrays, resting: Arrays) -> tuple[Arrays, Arrays]:
        source, total = ring.source(step), travelling | resting
        # FlashAttention-2's backward for this block alone. Output and log-sum-exp are those of all keys, so the weights
        # are final and the contributions of the blocks just add up.
        part = backward.backward(*_step(call, mask, block, source), output, peak, log_total, d_output, d_lse)
        new = {name: jax.tree.map(jnp.add, total[name], part[name]) for name in total if name != "bias"}
        # The bias stays with the queries; this block's gradient belongs to its own columns.
        new["bias"] = _add_columns(total["bias"], part["bias"], source, block["key"].shape[1])
        return {name: new[name] for name in travelling}, {name: new[name] for name in resting}

    def add_and_send(step: Array, carry: tuple[Block, Arrays, Arrays]) -> tuple[Block, Arrays, Arrays]:
        # The gradients travel with their block, so every device adds to the block that it holds.
        block, *totals = carry
        travelling, resting = add(step, block, *totals)
        return ring.send(block), ring.send(travelling), resting

    travelling = zeros({name: getattr(call, name) for name in ("key", "value")})
    # Query, rows, bias, scale and score modification stay here and collect their gradients from all blocks.
    resting = zeros({name: getattr(call, name) for name in ("query", "bias", "rows", "scale")})
    resting["score_mod"] = zeros(backward.arrays_of(call.score_mod))
    block, last = _block(call), ring.devices - 1
    if last:
        block, travelling, resting = lax.fori_loop(0, last, add_and_send, (block, travelling, resting))
    travelling, resting = add(last, block, travelling, resting)
    # One more transfer brings the gradients of a block back to the device that owns it.
    gradients = ring.send(travelling) | resting
    # The mask that tells of tiles has no gradients.
    unmoved = jax.tree.map(jnp.zeros_like, mask)
    everything = jax.tree.leaves((backward.with_gradients(call, gradients), unmoved))
    return [d.astype(x.dtype) for d, x in zip(everything, leaves, strict=True) if is_floating(x)]


def _refuse_second(ring: Ring, *residuals: Any) -> Any:
    """Raises NotImplementedError for second derivatives."""
    raise NotImplementedError("the ring has no second derivatives")


_attend.defvjp(_forward, _backward)
_gradients.defvjp(_refuse_second, _refuse_second)
