"""Attention over a sequence that is split over devices: blocks of keys and values travel round a ring (Liu 2023).

Each device keeps its queries. In step m it attends to the block of the device m places before it, and hands that block
on meanwhile: n - 1 transfers for n devices. The online softmax of `chunked` goes on from block to block, so partial
results are never rounded. The schedule of tiles is made at run time, from the coordinates that travel with a block: one
that the mask does not reach costs its transfer.

The backward pass is a second ring. A block travels with its gradients, to which each device adds the part of its
queries; after n steps they are at home. Nothing but the block at hand is kept: memory is O((T + S) / n).
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
from seqattn.kernels.chunked.plan import Leaves, Plan, is_floating, prepare
from seqattn.kernels.chunked.schedule import Grid
from seqattn.kernels.mesh_axes import varying
from seqattn.kernels.traced import capture
from seqattn.mask import Mask
from seqattn.precision import accumulator

Arrays = dict[str, Any]
"""Arrays of a call, by their names."""

Block = dict[str, Any]
"""What travels: key, value and, where they matter, their coordinates kv_at."""


@dataclasses.dataclass(frozen=True)
class Ring:
    """What is static in a call.

    Attributes:
        axis_name: the mesh axis, or axes, over which the sequence is split.
        devices: how many there are along it.
        grid: the tiles of each step.
        tree: the structure of the `Call`, whose leaves JAX sees.
    """

    axis_name: Hashable
    devices: int
    grid: Grid
    tree: jax.tree_util.PyTreeDef

    def call(self, leaves: Leaves) -> Call:
        """The call that was taken apart."""
        return jax.tree.unflatten(self.tree, leaves)

    def source(self, step: int | Array) -> Array:
        """Which device's block is here in a step."""
        return (lax.axis_index(self.axis_name) - step) % self.devices

    def send(self, tree: Any) -> Any:
        """What the device before this one had."""
        if self.devices == 1:
            return tree
        to_next = [(i, (i + 1) % self.devices) for i in range(self.devices)]
        return jax.tree.map(lambda x: lax.ppermute(x, self.axis_name, to_next), tree)


def attend(call: Call, axis_name: Hashable) -> Result:
    """The output and the log-sum-exp of this device's queries over the keys of all devices along `axis_name`.

    As `reference.attend`, but for a boolean mask and a bias: they have a column for each key of each device, in the
    order of the devices. Reverse mode only.
    """
    if call.dropout is not None:
        raise NotImplementedError(
            "the ring has no dropout: that drops by the place of a weight in the whole batch, unknown to one device"
        )
    refuse_unknown("a ring", call.query.shape, call.key.shape)
    devices = lax.axis_size(axis_name)
    if call.is_empty:
        return call.nothing()
    # What travels differs on each device, and so does all that is made of it. No coordinate stays known at trace time:
    # the grid must be the same for the block that is here as for those that will be.
    call = jax.tree.map(jnp.asarray, dataclasses.replace(call, scale=jnp.asarray(call.scale, call.high)))
    here = lax.axis_index(axis_name)
    call = varying(capture(call, like=[call, here]), [call, here])
    leaves, tree = jax.tree.flatten(call)
    plan, _ = _step(call, _block(call), 0)
    return _attend(Ring(axis_name, devices, plan.grid, tree), leaves)


def _block(call: Call) -> Block:
    matter = isinstance(call.mask, Mask) or (call.score_mod is not None and call.score_mod.uses_coordinates)
    return {name: getattr(call, name) for name in ("key", "value", *(["kv_at"] if matter else []))}


def _step(call: Call, block: Block, source: int | Array) -> tuple[Plan, Leaves]:
    """The call of `chunked` for the block that came from a device."""
    of_pairs = {name: _columns(getattr(call, name), source, block["key"].shape[1]) for name in ("mask", "bias")}
    return prepare(dataclasses.replace(call, **block, **of_pairs))


def _columns(x: Any, source: int | Array, size: int) -> Any:
    """The pairs `[B or 1, N or 1, T or 1, size or 1]` with the keys of a device, of `[..., devices * size or 1]`."""
    if x is None or isinstance(x, Mask) or x.shape[3] == 1:
        return x
    return lax.dynamic_slice_in_dim(x, source * size, size, axis=3)


def _add_columns(x: Array | None, new: Array | None, source: Array, size: int) -> Array | None:
    """A bias `[..., devices * size or 1]` with something added to the pairs with the keys of a device."""
    if x is None or new is None:
        return None
    if x.shape[3] == 1:
        return x + new
    return lax.dynamic_update_slice_in_dim(x, _columns(x, source, size) + new, source * size, axis=3)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(ring: Ring, leaves: Leaves) -> tuple[Array, Array]:
    output, peak, log_total = _results(ring, leaves)
    return output, tile_loop.lse_of(peak, log_total)


def _forward(ring: Ring, leaves: Leaves) -> tuple[tuple[Array, Array], tuple]:
    output, peak, log_total = _results(ring, leaves)
    return (output, tile_loop.lse_of(peak, log_total)), (leaves, output, peak, log_total)


def _backward(ring: Ring, residuals: tuple, directions: tuple) -> tuple[list[Array | np.ndarray]]:
    leaves, *results = residuals
    gradients = iter(_gradients(ring, leaves, *results, *directions))
    return ([next(gradients) if is_floating(x) else np.zeros(x.shape, jax.dtypes.float0) for x in leaves],)


@functools.partial(jax.jit, static_argnums=0)
def _results(ring: Ring, leaves: Leaves) -> tuple[Array, Array, Array]:
    """What `tile_loop.finish` gives for the keys of all devices."""
    call = ring.call(leaves)

    def absorb(step: int | Array, block: Block, state: tile_loop.State) -> tile_loop.State:
        return tile_loop.absorb(*_step(call, block, ring.source(step)), state)

    def absorb_and_send(step: Array, carry: tuple[Block, tile_loop.State]) -> tuple[Block, tile_loop.State]:
        block, state = carry
        return ring.send(block), absorb(step, block, state)

    first = _step(call, _block(call), ring.source(0))
    block, state = _block(call), varying(tile_loop.start(*first), leaves)
    last = ring.devices - 1
    if last:
        block, state = lax.fori_loop(0, last, absorb_and_send, (block, state))
    return tile_loop.finish(*first, absorb(last, block, state))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
@functools.partial(jax.jit, static_argnums=0)
def _gradients(
    ring: Ring, leaves: Leaves, output: Array, peak: Array, log_total: Array, d_output: Array, d_lse: Array
) -> list[Array]:
    """The gradients by all floating leaves of the call."""
    call, high = ring.call(leaves), accumulator(output.dtype)

    def zeros(tree: Any) -> Any:
        return varying(jax.tree.map(lambda x: jnp.zeros(x.shape, high), tree), leaves)

    def add(step: int | Array, block: Block, travelling: Arrays, resting: Arrays) -> tuple[Arrays, Arrays]:
        source, total = ring.source(step), travelling | resting
        part = backward.backward(*_step(call, block, source), output, peak, log_total, d_output, d_lse)
        new = {name: jax.tree.map(jnp.add, total[name], part[name]) for name in total if name != "bias"}
        new["bias"] = _add_columns(total["bias"], part["bias"], source, block["key"].shape[1])
        return {name: new[name] for name in travelling}, {name: new[name] for name in resting}

    def add_and_send(step: Array, carry: tuple[Block, Arrays, Arrays]) -> tuple[Block, Arrays, Arrays]:
        block, *totals = carry
        travelling, resting = add(step, block, *totals)
        return ring.send(block), ring.send(travelling), resting

    travelling = zeros({name: getattr(call, name) for name in ("key", "value")})
    resting = zeros({name: getattr(call, name) for name in ("query", "bias", "rows", "scale")})
    resting["score_mod"] = zeros(backward.arrays_of(call.score_mod))
    block, last = _block(call), ring.devices - 1
    if last:
        block, travelling, resting = lax.fori_loop(0, last, add_and_send, (block, travelling, resting))
    travelling, resting = add(last, block, travelling, resting)
    gradients = ring.send(travelling) | resting
    everything = jax.tree.leaves(backward.with_gradients(call, gradients))
    return [d.astype(x.dtype) for d, x in zip(everything, leaves, strict=True) if is_floating(x)]


def _refuse_second(ring: Ring, *residuals: Any) -> Any:
    raise NotImplementedError("the ring has no second derivatives")


_attend.defvjp(_forward, _backward)
_gradients.defvjp(_refuse_second, _refuse_second)
