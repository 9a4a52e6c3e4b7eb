"""Ring attention over a sequence that is split over devices, its cost, and a token order that balances the work."""

import dataclasses
from collections.abc import Hashable
from typing import Literal, overload

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from seqattn.coordinates import Coordinates
from seqattn.kernels import ring
from seqattn.kernels.call import Call, Shaped, check_arrays, flatten, infinite_where_empty, locate, scale_of
from seqattn.kernels.chunked.schedule import plan
from seqattn.mask import Mask
from seqattn.precision import accumulator
from seqattn.score_mod import ScoreMod, ScoreModLike, for_kernel
from seqattn.score_mods import Alibi


@overload
def ring_attend(
    query: Array,
    key: Array,
    value: Array,
    *,
    axis_name: Hashable,
    mask: Mask | Array | None = ...,
    bias: Array | None = ...,
    score_mod: ScoreModLike = ...,
    q_at: Coordinates | None = ...,
    kv_at: Coordinates | None = ...,
    scale: float | Array | None = ...,
    return_lse: Literal[False] = ...,
) -> Array: ...
@overload
def ring_attend(
    query: Array,
    key: Array,
    value: Array,
    *,
    axis_name: Hashable,
    mask: Mask | Array | None = ...,
    bias: Array | None = ...,
    score_mod: ScoreModLike = ...,
    q_at: Coordinates | None = ...,
    kv_at: Coordinates | None = ...,
    scale: float | Array | None = ...,
    return_lse: Literal[True],
) -> tuple[Array, Array]: ...


def ring_attend(
    query: Array,
    key: Array,
    value: Array,
    *,
    axis_name: Hashable,
    mask: Mask | Array | None = None,
    bias: Array | None = None,
    score_mod: ScoreModLike = None,
    q_at: Coordinates | None = None,
    kv_at: Coordinates | None = None,
    scale: float | Array | None = None,
    return_lse: bool = False,
) -> Array | tuple[Array, Array]:
    """Computes `attend` inside `jax.shard_map` over a mesh axis that splits the sequence (ring attention: Liu 2023).

    Each device passes its part of the queries, keys, values and coordinates, and receives the output of its queries
    over the keys of all devices: the same result as `attend` on one device. Blocks of keys travel from device to
    device, with n - 1 transfers in the forward pass. The backward pass sends them round again, with their gradients.
    Memory is that of one block of T / n queries and S / n keys.

    Only coordinates tell where a token is, so the sequence may be in any order. With a causal mask, the order of
    `zigzag` balances the work. `ring_cost` counts transfers and operations.

    Batch and heads may be split over other mesh axes. The `head` of a score modification then counts from 0 on each
    device, and the modification's arrays must be split in the same way. `Alibi()` raises there; use `Alibi(slopes)`.

    There is no dropout, because it depends on a weight's index in the whole batch, which one device does not know.
    There is no argument for sinks: with `return_lse`, multiply the output by `jax.nn.sigmoid(lse - sinks)[..., None]`.

    Args:
        query: `[*batch, T / n, N, H]`, this device's part.
        key: `[*batch, S / n, K, H]`, this device's part.
        value: `[*batch, S / n, K, V]`, this device's part.
        axis_name: the mesh axis, or a tuple of axes, that splits the sequence into n parts of equal length.
        mask: a `Mask` over coordinates, or a boolean array with a row for each query of this device and a column for
            each key of all devices, in their order: `[T / n, S]`, or `[*batch, N, T / n, S]` with any dim 1.
        bias: added to the logits after scaling; shapes as for a boolean mask.
        score_mod: as in `attend`.
        q_at: coordinates of this device's queries, `[T / n]` or `[*batch, T / n]`. Required by a `Mask` or a
            `ScoreMod`.
        kv_at: coordinates of this device's keys, `[S / n]` or `[*batch, S / n]`. Required by a `Mask` or a `ScoreMod`.
        scale: multiplies the products. Defaults to `1 / sqrt(H)`.
        return_lse: If True, also returns the log-sum-exp of the logits, which is differentiable.

    Returns:
        The output `[*batch, T / n, N, V]`. With `return_lse` a pair of the output and the log-sum-exp
        `[*batch, T / n, N]`, float32 or wider.

    Raises:
        TypeError: as `attend`, and by JAX in forward mode.
        ValueError: as `attend`; `axis_name` is no axis of a surrounding `jax.shard_map`; or coordinates are missing.
        NotImplementedError: for second derivatives.

    >>> from functools import partial
    >>> from jax.sharding import AxisType, PartitionSpec as P
    >>> from seqattn.masks import Causal
    >>> mesh = jax.make_mesh((4,), ("sequence",), axis_types=(AxisType.Auto,))
    >>> tokens, at = jnp.eye(8).reshape(8, 1, 8), Coordinates(jnp.arange(8), jnp.ones(8, int))
    >>> order, inverse = zigzag(8, devices=4)
    >>> @jax.jit
    ... @partial(jax.shard_map, mesh=mesh, in_specs=(P("sequence"), P("sequence")), out_specs=P("sequence"))
    ... def attention(x, at):
    ...     return ring_attend(x, x, x, axis_name="sequence", mask=Causal(), q_at=at, kv_at=at, scale=0.0)
    >>> output = attention(tokens[order], jax.tree.map(lambda x: x[order], at))[inverse]
    >>> print(np.asarray(output[:4, 0]).round(2))
    [[1.   0.   0.   0.   0.   0.   0.   0.  ]
     [0.5  0.5  0.   0.   0.   0.   0.   0.  ]
     [0.33 0.33 0.33 0.   0.   0.   0.   0.  ]
     [0.25 0.25 0.25 0.25 0.   0.   0.   0.  ]]
    """
    devices = _devices(axis_name)
    query, key, value = jnp.asarray(query), jnp.asarray(key), jnp.asarray(value)
    check_arrays(query, key, value)
    batch, mod = query.shape[:-3], None if score_mod is None else ScoreMod.of(score_mod)
    _refuse_slopes_by_device(mod, axis_name)
    over_coordinates = isinstance(mask, Mask) or (mod is not None and mod.uses_coordinates)
    if over_coordinates and (q_at is None or kv_at is None):
        raise ValueError(
            "a Mask or a ScoreMod in a ring needs q_at and kv_at: the part of the sequence that a device holds would "
            "be a guess"
        )
    # Coordinates travel with the keys, so they fit this device's block. Dense masks and biases stay here and have
    # columns for the keys of all devices.
    whole = (*key.shape[:-3], key.shape[-3] * devices, *key.shape[-2:])
    is_mask = mask is None or isinstance(mask, (Mask, type))
    located = locate(query.shape, key.shape, mask if is_mask else None, None, q_at, kv_at, mod)
    of_pairs = locate(query.shape, whole, None if is_mask else mask, bias, None, None)
    located["bias"] = of_pairs["bias"]
    if not is_mask:
        located["mask"] = of_pairs["mask"]
    query, key, value = (flatten(x, batch) for x in (query, key, value))
    scale, rows = scale_of(scale, query.shape[-1]), None
    if mod is not None:
        mod, rows = for_kernel(mod, query, scale, located["q_at"], located["kv_at"])
    call = Call(query, key, value, **located, score_mod=mod, rows=rows, scale=scale, dropout=None)
    output, lse = ring.attend(call, axis_name)
    output = output.reshape(*batch, *output.shape[1:])
    return (output, infinite_where_empty(lse).reshape(*batch, *lse.shape[1:])) if return_lse else output


def _devices(axis_name: Hashable) -> int:
    """Returns the number of devices along the axis. Raises ValueError outside of a `jax.shard_map` with this axis."""
    try:
        return jax.lax.axis_size(axis_name)
    except NameError as error:
        raise ValueError(
            f"axis_name ({axis_name!r}) must be an axis of the mesh of a jax.shard_map around ring_attend: the axis "
            "that splits the sequence"
        ) from error


def _refuse_slopes_by_device(mod: ScoreMod | None, axis_name: Hashable) -> None:
    """Raises ValueError for `Alibi()` without slopes if other mesh axes may split the heads."""
    mesh = jax.sharding.get_abstract_mesh()
    ours = axis_name if isinstance(axis_name, tuple) else (axis_name,)
    others = [name for name in mesh.manual_axes if name not in ours and mesh.shape[name] > 1]
    parts = jax.tree.leaves(mod, is_leaf=lambda part: isinstance(part, Alibi))
    if others and any(isinstance(part, Alibi) and part.slopes is None for part in parts):
        raise ValueError(
            f"Alibi() counts the heads of one device, and the mesh axes {others} besides {ours} may split them: use "
            "Alibi(slopes) with slopes that are split as the heads are; Alibi.geometric(N) returns those of the paper"
        )


def zigzag(length: int, devices: int) -> tuple[Int[np.ndarray, " length"], Int[np.ndarray, " length"]]:
    """Returns a token order that balances the work of a causal mask over devices, and its inverse.

    The sequence is cut into 2n chunks, and device i holds the chunks i and 2n - 1 - i (Llama 3: Grattafiori 2024,
    section 3.3.2). Striped attention (Brandon 2023) deals out single tokens instead, which leaves no tile of scores
    fully visible.

    Index tokens and coordinates with the first array before `ring_attend`, and its results with the second. If chunks
    are shorter than a tile of queries, several share a tile and the balance is coarse: see `ring_cost`.

    Args:
        length: the number of tokens, a multiple of `2 * devices`.
        devices: n, at least 1.

    Returns:
        Two integer arrays `[length]`: the order and its inverse.

    Raises:
        ValueError: `length` is not a multiple of `2 * devices`.

    >>> order, inverse = zigzag(16, devices=4)
    >>> print(order.reshape(4, 4))
    [[ 0  1 14 15]
     [ 2  3 12 13]
     [ 4  5 10 11]
     [ 6  7  8  9]]
    >>> print(order[inverse])
    [ 0  1  2  3  4  5  6  7  8  9 10 11 12 13 14 15]
    """
    if devices < 1 or length < 0 or length % (2 * devices):
        raise ValueError(f"length ({length}) must be a multiple of twice the devices (2 * {devices})")
    chunks = np.arange(length).reshape(2 * devices, -1)
    order = np.stack([chunks[:devices], chunks[: devices - 1 : -1]], axis=1).reshape(-1)
    return order, np.argsort(order)


@dataclasses.dataclass(frozen=True)
class RingCost:
    """The transfers and operations of `ring_attend`; prints as a table.

    Attributes:
        bytes_forward: bytes that each device sends in the forward pass.
        bytes_backward: bytes that each device sends in the backward pass.
        flops_forward: `[steps, devices]`, floating-point operations of the matrix products in the tiles that a device
            visits. Masked pairs in a partly visible tile count.
        flops_backward: `[steps, devices]`, the same for the backward pass.
    """

    bytes_forward: int
    bytes_backward: int
    flops_forward: Float[np.ndarray, "n n"]
    flops_backward: Float[np.ndarray, "n n"]

    @property
    def balance(self) -> float:
        """The fraction of the devices' time spent on work, if each step waits for the slowest device.

        1 is perfectly even, and the value without any work.
        """
        waited = self.flops_forward.max(axis=1).sum() * self.flops_forward.shape[1]
        return float(self.flops_forward.sum() / waited) if waited else 1.0

    def __str__(self) -> str:
        """Returns the table: bytes sent, operations of each device, and the balance."""
        lines = [f"each device sends {self.bytes_forward:,} bytes forward, {self.bytes_backward:,} backward"]
        for device, flops in enumerate(
            zip(self.flops_forward.sum(axis=0), self.flops_backward.sum(axis=0), strict=True)
        ):
            lines.append("device {}: {:.2f} GFLOP forward, {:.2f} backward".format(device, *(x / 1e9 for x in flops)))
        return "\n".join([*lines, f"balance {self.balance:.2f}"])


def ring_cost(
    query: Shaped,
    key: Shaped,
    value: Shaped,
    *,
    devices: int,
    mask: Mask | None = None,
    q_at: Coordinates | None = None,
    kv_at: Coordinates | None = None,
) -> RingCost:
    """Counts the transfers and operations of `ring_attend` on each device, from its schedule of tiles.

    Computes no attention. It does not predict time: transfers overlap with the products as far as the compiler allows.

    Args:
        query: `[*batch, T, N, H]`, an array or a `jax.ShapeDtypeStruct`: the whole sequence, but only the batch rows
            and heads of one device.
        key: `[*batch, S, K, H]`, an array or a `jax.ShapeDtypeStruct`.
        value: `[*batch, S, K, V]`, an array or a `jax.ShapeDtypeStruct`.
        devices: n, the number of parts of the sequence. T and S must be multiples of it.
        mask: as in `attend`.
        q_at: coordinates of all queries, `[T]` or `[*batch, T]`, in the order in which they are split.
        kv_at: coordinates of all keys, `[S]` or `[*batch, S]`, in the order in which they are split.

    Returns:
        A `RingCost`.

    Raises:
        TypeError: as `attend`.
        ValueError: as `attend`; or T or S is not a multiple of `devices`.

    With a causal mask and tokens in their order, the last device has the most work; the zigzag order is even:

    >>> from seqattn.masks import Causal
    >>> tokens, at = jax.ShapeDtypeStruct((8192, 8, 64), jnp.bfloat16), Coordinates.range(8192)
    >>> print(ring_cost(tokens, tokens, tokens, devices=4, mask=Causal(), q_at=at, kv_at=at))
    each device sends 12,632,064 bytes forward, 46,186,496 backward
    device 0: 5.37 GFLOP forward, 13.42 backward
    device 1: 13.96 GFLOP forward, 34.90 backward
    device 2: 22.55 GFLOP forward, 56.37 backward
    device 3: 31.14 GFLOP forward, 77.85 backward
    balance 0.59
    >>> order, _ = zigzag(8192, devices=4)
    >>> at = jax.tree.map(lambda x: x[order], at)
    >>> print(ring_cost(tokens, tokens, tokens, devices=4, mask=Causal(), q_at=at, kv_at=at))
    each device sends 12,632,064 bytes forward, 46,186,496 backward
    device 0: 18.25 GFLOP forward, 45.63 backward
    device 1: 18.25 GFLOP forward, 45.63 backward
    device 2: 18.25 GFLOP forward, 45.63 backward
    device 3: 18.25 GFLOP forward, 45.63 backward
    balance 1.00
    """
    jax.eval_shape(lambda *arrays: check_arrays(*arrays), query, key, value)
    *batch, length, num_heads, head_dim = query.shape
    size, num_kv_heads, value_dim = value.shape[-3:]
    if devices < 1 or length % devices or size % devices:
        raise ValueError(f"queries ({length}) and keys ({size}) must be multiples of the devices ({devices})")
    located = locate(query.shape, key.shape, mask, None, q_at, kv_at)
    rows = int(np.prod(batch, dtype=np.int64))
    shape = (rows, num_kv_heads, num_heads // num_kv_heads, length // devices, size // devices)
    q_parts, kv_parts = (_parts(located[name], devices) for name in ("q_at", "kv_at"))
    scores = np.zeros((devices, devices)) if 0 in shape else np.asarray(_scores(shape, mask, q_parts, kv_parts))
    # In step m device i computes on the block of device i - m. Reordering the counts by step shows how long each step
    # takes: as long as its slowest device.
    source = (np.arange(devices)[None, :] - np.arange(devices)[:, None]) % devices
    by_step = np.take_along_axis(scores.T, source, axis=0)
    keys = rows * (size // devices) * num_kv_heads * (head_dim + value_dim)
    high = jnp.zeros((), accumulator(query.dtype)).dtype.itemsize
    # Coordinates travel only if a mask reads them.
    at = 0 if mask is None else sum(x.nbytes for x in jax.tree.leaves(located["kv_at"])) // devices
    forward = (devices - 1) * (keys * query.dtype.itemsize + at)
    # The backward pass computes five products for two of the forward pass: scores again, dP, dV, dK and dQ.
    return RingCost(
        bytes_forward=forward,
        bytes_backward=forward + (devices * keys * high if devices > 1 else 0),
        flops_forward=2 * (head_dim + value_dim) * by_step,
        flops_backward=2 * (3 * head_dim + 2 * value_dim) * by_step,
    )


def _parts(at: Coordinates, devices: int) -> Coordinates:
    """Returns coordinates `[rows, length]` as `[devices, rows, length / devices]`."""
    return jax.tree.map(lambda x: jnp.moveaxis(jnp.asarray(x).reshape(x.shape[0], devices, -1), 1, 0), at)


def _scores(
    shape: tuple[int, int, int, int, int], mask: Mask | None, q_at: Coordinates, kv_at: Coordinates
) -> Float[Array, "n n"]:
    """Returns the number of scores that each device computes for each part of the keys."""

    def count(q_at: Coordinates, kv_at: Coordinates) -> Float[Array, ""]:
        grid, schedule = plan(shape, mask, False, q_at, kv_at)
        partial, full = (
            steps.size if steps.count is None else steps.count for steps in (schedule.partial, schedule.full)
        )
        return jnp.asarray(partial + full, jnp.float32) * float(grid.lanes * grid.group * grid.queries * grid.keys)

    # A new function each time, because a user's mask may give another answer in its next call.
    return jax.jit(jax.vmap(jax.vmap(count, in_axes=(None, 0)), in_axes=(0, None)))(q_at, kv_at)
