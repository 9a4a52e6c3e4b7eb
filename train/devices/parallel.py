"""An update over the devices of all processes: what lies where, and which rows of a batch each process gives.

Each process gives its own rows of the same global batch, and what they are follows from the step alone. So all make
equally many updates, and none waits for one that has no batch left.
"""

import abc
import dataclasses
import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, Sharding
from jax.sharding import PartitionSpec as P

from seqattn.checks import check_integer
from train.devices.sharding import AXES, shardings, whole_over
from train.update.step import Metrics, TrainState, Update

Batch = Mapping[str, np.ndarray]
"""This process's rows of a batch, as `train.data.batches` makes them: each array has its rows first."""

_AXIS = "devices"
# The devices that share out the experts share out the rows, too: every other layer would be computed by each of them.
_ROWS = ("data", "fsdp", "expert")


class Placed(abc.ABC):
    """An update and the devices that make it.

    Attributes:
        rows: the rows that this process gives are a multiple of it.
        lengths: the lengths of source and target, padding counted, are multiples of it.
        part: which part of the rows of each global batch this process gives: its index, and how many there are. Two
            processes whose devices compute the same rows give the same.
    """

    rows: int
    lengths: int
    part: tuple[int, int]

    @abc.abstractmethod
    def shardings(self, state: TrainState) -> Any:
        """The tree of `state`, of arrays or of their shapes, with the sharding that each has once it is placed."""

    @abc.abstractmethod
    def place(self, state: TrainState) -> TrainState:
        """The state, the same in every process, on the devices."""

    @abc.abstractmethod
    def update(self, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        """The state after one update, and its metrics. The old state is donated; one not yet placed is placed.

        Raises:
            ValueError: the batch does not divide among the devices.
        """

    @abc.abstractmethod
    def gather(self, tree: Any) -> Any:
        """A part of the state, such as its parameters, whole on the first device of each process.

        All processes must call it. Its arrays may be those of the state: they are gone after the next update.
        """


@dataclasses.dataclass(frozen=True)
class Replicated:
    """Every device keeps the whole state and computes its share of each batch (`jax.pmap`).

    Each device drops by a key of its own, and an expert's room is counted in its share of the batch. Batch norm is by
    the statistics of that share, and the running ones follow the whole batch.
    """

    def spread(self, update: Update, devices: Sequence[jax.Device] | None = None) -> Placed:
        """`update` over devices, those of all processes by default."""
        return _Mapped(update, jax.devices() if devices is None else devices)


@dataclasses.dataclass(frozen=True)
class Sharded:
    """One program over a mesh of all devices, split by the compiler (`jax.jit`); it computes what one device would.

    `train.devices.sharding` says how parameters are split.
    """

    data: int = 0
    """Parts of the rows of a batch; 0 for what the other axes leave of the devices."""
    fsdp: int = 1
    """Parts of the rows, and of each parameter with its moments, which is whole only while it is used (Rajbhandari
    2020; Zhao 2023)."""
    tensor: int = 1
    """Parts of heads, hidden layers and vocabulary (Shoeybi 2019)."""
    sequence: int = 1
    """Parts of each text."""
    expert: int = 1
    """Parts of the rows, and of the experts of each mixture (Lepikhin 2020)."""

    def __post_init__(self) -> None:
        for name in AXES:
            check_integer(name, getattr(self, name), 0 if name == "data" else 1)

    def mesh(self, devices: Sequence[jax.Device] | None = None) -> Mesh:
        """The mesh of devices, those of all processes by default.

        Raises:
            ValueError: the sizes of the axes do not multiply to the number of devices.
        """
        devices = jax.devices() if devices is None else devices
        sizes = {name: getattr(self, name) for name in AXES}
        fixed = math.prod(size for size in sizes.values() if size)
        told = " x ".join(f"{name} ({size})" for name, size in sizes.items() if size)
        if self.data and fixed != len(devices):
            raise ValueError(f"{told} = {fixed} must be the number of devices ({len(devices)}); data 0 is what is left")
        if len(devices) % fixed:
            raise ValueError(f"{told} = {fixed} must divide the number of devices ({len(devices)})")
        shape = (self.data or len(devices) // fixed, *(sizes[name] for name in AXES[1:]))
        return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)

    def spread(self, update: Update, devices: Sequence[jax.Device] | None = None) -> Placed:
        """`update` over devices, those of all processes by default.

        Raises:
            ValueError: the sizes of the axes do not multiply to the number of devices, or processes would share rows.
        """
        return _Compiled(update, self.mesh(devices))


Parallel = Replicated | Sharded
"""How an update is spread over devices: `spread(update)` gives what is `Placed` there."""


class _Mapped(Placed):
    """`jax.pmap`: the state lies whole on each device, and each process sees only the copies that are its own."""

    def __init__(self, update: Update, devices: Sequence[jax.Device]) -> None:
        # As pmap orders them: those of a process follow each other.
        devices = sorted(devices, key=lambda device: device.process_index)
        local = [device for device in devices if device.process_index == jax.process_index()]
        self.rows, self.lengths, self.part = len(local), 1, (jax.process_index(), len(devices) // len(local))
        self._several = len(devices) > 1
        self._everywhere = NamedSharding(Mesh(np.array(local), (_AXIS,)), P())
        self._mapped = jax.pmap(
            partial(update, axis_name=_AXIS),
            axis_name=_AXIS,
            in_axes=(None, 0),
            out_axes=None,
            devices=devices,
            donate_argnums=0,
        )

    def shardings(self, state: TrainState) -> Any:
        return jax.tree.map(lambda _: self._everywhere, state)

    def place(self, state: TrainState) -> TrainState:
        return jax.device_put(state, self._everywhere)

    def update(self, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        if getattr(state.step, "sharding", None) != self._everywhere:
            # The state that comes out lies on all devices; one that goes in otherwise would be compiled for apart.
            state = self.place(state)
        shares = {name: self._shares(name, array) for name, array in batch.items()}
        return _one_at_a_time(self._several, self._mapped(state, shares))

    def _shares(self, name: str, array: np.ndarray) -> np.ndarray:
        """`[B, ...]` as `[devices, B / devices, ...]`."""
        if len(array) % self.rows:
            raise ValueError(f"the batch's {len(array)} rows ({name}) must be a multiple of the {self.rows} devices")
        return array.reshape(self.rows, len(array) // self.rows, *array.shape[1:])

    def gather(self, tree: Any) -> Any:
        return _first_copies(tree)


class _Compiled(Placed):
    """`jax.jit` over a mesh: arrays are global, and a process sees its shards of them."""

    def __init__(self, update: Update, mesh: Mesh) -> None:
        self._update, self._mesh = update, mesh
        self.rows, self.part = _share(mesh)
        self.lengths = mesh.shape["sequence"]
        self._whole = NamedSharding(mesh, P())
        self._shardings: Any = None
        self._compiled: Any = None

    def shardings(self, state: TrainState) -> Any:
        if self._shardings is None:
            self._shardings = shardings(state, self._mesh)
        return self._shardings

    def place(self, state: TrainState) -> TrainState:
        if self._compiled is None:
            # Without `out_shardings` the compiler might split the new state in another way, and compile again for it.
            out_shardings = (self.shardings(state), self._whole)
            self._compiled = jax.jit(self._with_whole_params, donate_argnums=0, out_shardings=out_shardings)
        return jax.tree.map(_put, state, self._shardings)

    def update(self, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        arrays = {name: self._global(name, array) for name, array in batch.items()}
        if self._compiled is None or getattr(state.step, "sharding", None) != self._shardings.step:
            state = self.place(state)
        return _one_at_a_time(self._mesh.size > 1, self._compiled(state, arrays))

    def _with_whole_params(self, state: TrainState, batch: Any) -> tuple[TrainState, Metrics]:
        # Left alone, the compiler brings together the activations of all rows where it could the parameters.
        whole = whole_over("fsdp", self._shardings.params)
        return self._update(
            dataclasses.replace(state, params=jax.lax.with_sharding_constraint(state.params, whole)), batch
        )

    def _global(self, name: str, array: np.ndarray) -> jax.Array:
        """The global array of which this process has these rows."""
        _, count = self.part
        if len(array) % self.rows:
            sizes = " x ".join(f"{axis} ({self._mesh.shape[axis]})" for axis in _ROWS)
            among = f" among {count} processes" if count > 1 else ""
            raise ValueError(
                f"the batch's {len(array)} rows ({name}) must be a multiple of {self.rows}, that is {sizes}{among}"
            )
        # Of images, whose rows of pixels are neighbours, only whole ones are given to a device.
        spec = P(_ROWS, "sequence") if array.ndim == 2 else P(_ROWS)
        if array.ndim == 2 and array.shape[1] % self.lengths:
            raise ValueError(
                f"the batch's length {array.shape[1]} ({name}) must be a multiple of sequence ({self.lengths})"
            )
        shape = (len(array) * count, *array.shape[1:])
        return jax.make_array_from_process_local_data(NamedSharding(self._mesh, spec), array, shape)

    def gather(self, tree: Any) -> Any:
        return _first_copies(jax.device_put(tree, self._whole))


def _share(mesh: Mesh) -> tuple[int, tuple[int, int]]:
    """Of the rows of a global batch, split over a mesh: how many shards a process has, and `Placed.part`."""
    total = math.prod(mesh.shape[axis] for axis in _ROWS)
    held: dict[int, set[int]] = {}
    for device, (shard,) in NamedSharding(mesh, P(_ROWS)).devices_indices_map((total,)).items():
        held.setdefault(device.process_index, set()).add(shard.start or 0)  # type: ignore[attr-defined]
    parts = sorted({tuple(sorted(shards)) for shards in held.values()})
    if sum(map(len, parts)) != total or len(set(map(len, parts))) != 1:
        axes = " x ".join(f"{axis} ({size})" for axis, size in mesh.shape.items())
        raise ValueError(
            f"{axes} gives the {len(held)} processes rows that overlap; give data x fsdp x expert a size that is a "
            "multiple or a divisor of their number"
        )
    mine = tuple(sorted(held[jax.process_index()]))
    return len(mine), (parts.index(mine), len(parts))


def _put(leaf: Any, sharding: Sharding) -> jax.Array:
    """An array on the devices of a sharding, some of which may be those of other processes, where it is the same."""
    is_global = isinstance(leaf, jax.Array) and not leaf.is_fully_addressable
    if sharding.is_fully_addressable or is_global:
        return jax.device_put(leaf, sharding)
    # `jax.device_put` would send the array to all processes, to compare it.
    host = np.asarray(leaf)
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])


def _one_at_a_time(several: bool, made: tuple[TrainState, Metrics]) -> tuple[TrainState, Metrics]:
    """What an update made; on several CPU devices once it is there.

    Updates that wait for each other there take the threads that the first of them needs to meet at a sum, and XLA ends
    the process after 40 seconds (jaxlib 0.10.2: 300 updates of eight devices on two cores, three times of four).
    """
    return jax.block_until_ready(made) if several and jax.default_backend() == "cpu" else made


def _first_copies(tree: Any) -> Any:
    """Arrays that lie whole on several devices, on the first one of this process alone."""
    return jax.tree.map(lambda leaf: leaf.addressable_data(0), tree)
