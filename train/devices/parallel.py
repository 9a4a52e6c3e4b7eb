"""Data and model parallelism: placement of the state, and distribution of an update over devices and processes.

Each process provides its own rows of the same global batch, and these rows depend only on the step. So all processes
make the same number of updates, and none waits for one that has run out of batches.
"""

import abc
import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, Sharding
from jax.sharding import PartitionSpec as P

from seqattn.checks import check_integer
from seqattn.kernels.split import Split
from seqattn.models import CaptionerConfig, RecurrentLanguageModelConfig, Seq2SeqConfig
from seqattn.models.parameter_rules import PARAMETER_RULES
from seqattn.nn import with_split
from seqattn.nn.parameter_rule import ParameterRule
from train.devices.fit import rules_for
from train.devices.layout import is_scanned, to_gather
from train.devices.sharding import AXES, ROWS, one_at_a_time, put, shardings, whole_over
from train.update.parameters import matching, paths
from train.update.step import Metrics, TrainState, Update

Batch = Mapping[str, np.ndarray]
"""This process's rows of a batch, as `train.data.batches` makes them: each array has its rows first."""

Given = Mapping[str, tuple[Any, Any]]
"""Parameters by path: an array, and the rows of it that count, bool `[V]`; None for all rows."""

_AXIS = "devices"
_IN_ORDER = (Seq2SeqConfig, RecurrentLanguageModelConfig, CaptionerConfig)
"""Models with a layer that needs the whole of a text, or of an image, on one device."""


class Placed(abc.ABC):
    """An update placed on devices.

    Attributes:
        rows: the number of rows that this process provides must be a multiple of this.
        lengths: the padded lengths of source and target must be multiples of this.
        part: the part of each global batch that this process provides: its index, and the number of parts. Two
            processes whose devices compute the same rows provide the same part.
    """

    rows: int
    lengths: int
    part: tuple[int, int]

    @abc.abstractmethod
    def shardings(self, state: TrainState) -> Any:
        """Returns the tree of `state`, of arrays or shapes, with the sharding of each placed array in its place."""

    @abc.abstractmethod
    def place(self, state: TrainState) -> TrainState:
        """Puts a state on the devices. It must be the same in every process."""

    @abc.abstractmethod
    def update(self, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        """Makes one update.

        Args:
            state: the state; placed first if necessary. Its buffers are donated.
            batch: this process's rows of the batch, `[B, ...]` each.

        Returns:
            The state after the update, and the metrics.

        Raises:
            ValueError: the rows or lengths of the batch do not divide among the devices.
        """

    def lower(self, state: TrainState, batch: Mapping[str, jax.ShapeDtypeStruct]) -> jax.stages.Lowered:
        """Lowers an update of shapes, also for devices that this machine lacks; computes nothing.

        Args:
            state: the shapes of the state.
            batch: the shapes of the rows of all processes.

        Raises:
            NotImplementedError: this way to distribute an update needs arrays.
        """
        raise NotImplementedError(f"{type(self).__name__} cannot lower an update without arrays")

    @abc.abstractmethod
    def draw(self, make: Callable[[Given], TrainState], given: Given) -> TrainState:
        """Makes the state before the first update. All processes must call it.

        Args:
            make: returns the state, with these parameters in place of its own. A pure function, which may be compiled.
            given: parameters by path, as from `train.engine.start.given`; the same in every process.

        Returns:
            The state. Over a mesh it is made where it belongs, and no device holds more than its part.
        """

    @abc.abstractmethod
    def for_evaluation(self, params: Any) -> Any:
        """Returns parameters as evaluation and decoding take them; see `train.devices.layout`.

        The result may share buffers with the state, so it is invalid after the next update.
        """


@dataclasses.dataclass(frozen=True)
class Replicated:
    """Data parallelism: every device keeps the whole state and computes its share of each batch (`jax.pmap`).

    Each device has its own dropout key. The capacity of experts and the statistics of batch norm are those of the
    device's share; running statistics follow the whole batch.
    """

    def check(self, config: Any) -> None:
        """Accepts every model: each device computes all of it."""

    def prepare(self, model: nnx.Module) -> nnx.Module:
        """Returns the model unchanged: inside `jax.pmap` it computes a device's own rows."""
        return model

    def spread(
        self, update: Update, devices: Sequence[jax.Device] | None = None, *, model: nnx.Module | None = None
    ) -> Placed:
        """Distributes `update` over devices, by default those of all processes. Any model fits."""
        del model
        return _Mapped(update, jax.devices() if devices is None else devices)


@dataclasses.dataclass(frozen=True)
class Sharded:
    """Data and model parallelism: one program over a mesh of all devices, partitioned by the compiler (`jax.jit`).

    It computes the same as one device. `train.devices.sharding` splits the parameters. The product of the axis sizes is
    the number of devices.
    """

    data: int = 0
    """Data parallelism: number of parts of the rows of a batch. 0 for all devices that the other axes leave."""
    fsdp: int = 1
    """Fully sharded data parallelism: parts of the rows, and of each parameter and its optimizer state, which is
    gathered only while it is used (Rajbhandari 2020; Zhao 2023)."""
    tensor: int = 1
    """Tensor parallelism: parts of heads, hidden layers and vocabulary (Shoeybi 2019)."""
    sequence: int = 1
    """Sequence parallelism: parts of each text."""
    expert: int = 1
    """Expert parallelism: parts of the rows, and of the experts of each mixture (Lepikhin 2020)."""

    def __post_init__(self) -> None:
        for name in AXES:
            check_integer(name, getattr(self, name), 0 if name == "data" else 1)

    def mesh(self, devices: Sequence[jax.Device] | None = None) -> Mesh:
        """Makes the mesh over devices, by default those of all processes.

        Raises:
            ValueError: the product of the axis sizes is not the number of devices.
        """
        devices = jax.devices() if devices is None else devices
        sizes = {name: getattr(self, name) for name in AXES}
        fixed = math.prod(size for size in sizes.values() if size)
        told = " x ".join(f"{name} ({size})" for name, size in sizes.items() if size)
        if self.data and fixed != len(devices):
            raise ValueError(f"{told} = {fixed} must be the number of devices ({len(devices)}); data 0 takes the rest")
        if len(devices) % fixed:
            raise ValueError(f"{told} = {fixed} must divide the number of devices ({len(devices)})")
        shape = (self.data or len(devices) // fixed, *(sizes[name] for name in AXES[1:]))
        return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)

    def check(self, config: Any) -> None:
        """Raises ValueError if the devices do not make this mesh, or if it cannot split a model of this config."""
        self.mesh()
        if self.sequence > 1 and isinstance(config, _IN_ORDER):
            raise ValueError(
                f"sequence ({self.sequence}) splits each text over devices, but a {type(config).__name__} reads it "
                "from end to end: set --parallel.sequence 1"
            )

    def prepare(self, model: nnx.Module) -> nnx.Module:
        """Returns a model whose attention computes on each device its own rows, heads and part of each text."""
        return with_split(model, Split(batch=ROWS, heads="tensor", sequence="sequence"))

    def spread(
        self, update: Update, devices: Sequence[jax.Device] | None = None, *, model: nnx.Module | None = None
    ) -> Placed:
        """Distributes `update` over devices, by default those of all processes.

        Args:
            update: the update, as from `make_update`.
            devices: the devices.
            model: the model, of arrays or shapes, to check that the axes divide its heads and experts. Key and value
                heads that `tensor` does not divide are whole on every device.

        Raises:
            ValueError: the product of the axis sizes is not the number of devices; the rows of two processes overlap
                only in part; or the axes do not divide the heads or experts of the model.
        """
        mesh, rules = self.mesh(devices), PARAMETER_RULES
        if model is not None:
            rules = rules_for(model, tensor=self.tensor, expert=self.expert)
        return _Compiled(update, mesh, rules, scanned=is_scanned(model))


Parallel = Replicated | Sharded
"""Any way to distribute an update over devices: `spread(update)` returns a `Placed` update."""


class _Mapped(Placed):
    """`jax.pmap`: the state is replicated, and each process sees only the copies on its own devices."""

    def __init__(self, update: Update, devices: Sequence[jax.Device]) -> None:
        # The order of pmap: the devices of a process are adjacent.
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
            # An update returns a state on all devices. An input placed differently would be compiled for separately.
            state = self.place(state)
        shares = {name: self._shares(name, array) for name, array in batch.items()}
        return one_at_a_time(self._several, self._mapped(state, shares))

    def _shares(self, name: str, array: np.ndarray) -> np.ndarray:
        """Reshapes `[B, ...]` to `[devices, B / devices, ...]`."""
        if len(array) % self.rows:
            raise ValueError(f"the batch's {len(array)} rows ({name}) must be a multiple of the {self.rows} devices")
        return array.reshape(self.rows, len(array) // self.rows, *array.shape[1:])

    def draw(self, make: Callable[[Given], TrainState], given: Given) -> TrainState:
        return make(given)

    def for_evaluation(self, params: Any) -> Any:
        """Returns the copies on the first device of each process."""
        return jax.tree.map(lambda leaf: leaf.addressable_data(0), params)


class _Compiled(Placed):
    """`jax.jit` over a mesh: arrays are global, and each process sees its own shards."""

    def __init__(
        self, update: Update, mesh: Mesh, rules: Sequence[ParameterRule] = PARAMETER_RULES, *, scanned: bool = False
    ) -> None:
        self._update, self._mesh, self._rules, self._scanned = update, mesh, rules, scanned
        self.rows, self.part = _share(mesh)
        # The zigzag order cuts each text into two chunks for each device.
        self.lengths = 2 * mesh.shape["sequence"] if mesh.shape["sequence"] > 1 else 1
        self._whole = NamedSharding(mesh, P())
        self._known: dict[Any, Any] = {}
        self._shardings: Any = None
        self._compiled: Any = None

    def shardings(self, state: TrainState) -> Any:
        key = jax.tree.structure(state), tuple(leaf.shape for leaf in jax.tree.leaves(state))
        # Computed once for each kind of state, as it warns of arrays that are not split.
        if key not in self._known:
            self._known[key] = shardings(state, self._mesh, self._rules)
        return self._known[key]

    def place(self, state: TrainState) -> TrainState:
        self._jit(state)
        return jax.tree.map(put, state, self._shardings)

    def lower(self, state: TrainState, batch: Mapping[str, jax.ShapeDtypeStruct]) -> jax.stages.Lowered:
        def on_mesh(leaf: Any, sharding: Sharding) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

        rows = {name: on_mesh(leaf, self._sharding_of(leaf)) for name, leaf in batch.items()}
        update = self._jit(state)
        with jax.set_mesh(self._mesh):
            return update.lower(jax.tree.map(on_mesh, state, self._shardings), rows)

    def _jit(self, state: TrainState) -> Any:
        """Returns the compiled update for states of these shapes, made once."""
        if self._compiled is None:
            # Without `out_shardings` the compiler might shard the new state differently, and the next update would
            # compile again.
            self._shardings = self.shardings(state)
            out_shardings = (self._shardings, self._whole)
            self._compiled = jax.jit(self._with_whole_params, donate_argnums=0, out_shardings=out_shardings)
        return self._compiled

    def update(self, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        arrays = {name: self._global(name, array) for name, array in batch.items()}
        if self._compiled is None or getattr(state.step, "sharding", None) != self._shardings.step:
            state = self.place(state)
        # Inside, the axes of `Sharded.prepare` are those of this mesh.
        with jax.set_mesh(self._mesh):
            return one_at_a_time(self._mesh.size > 1, self._compiled(state, arrays))

    def _with_whole_params(self, state: TrainState, batch: Any) -> tuple[TrainState, Metrics]:
        pattern = to_gather(state.params, scanned=self._scanned)

        # Inside the differentiated function, so that it holds for the gradients too: they are added over the rows
        # before they are split, and no activation takes over their split.
        def gathered(params: Any) -> Any:
            if self._mesh.shape["fsdp"] > 1:
                # XLA would gather first and cast then, which sends twice the bytes.
                params = jax.tree.map(jax.lax.optimization_barrier, params)
            whole = whole_over("fsdp", self._shardings.params)
            return jax.tree.map(
                lambda chosen, leaf, where: jax.lax.with_sharding_constraint(leaf, where) if chosen else leaf,
                matching(params, [pattern]),
                params,
                whole,
            )

        return self._update(state, batch, gathered=gathered)

    def _global(self, name: str, array: np.ndarray) -> jax.Array:
        """Makes the global array from this process's rows."""
        _, count = self.part
        if len(array) % self.rows:
            sizes = " x ".join(f"{axis} ({self._mesh.shape[axis]})" for axis in ROWS)
            among = f" among {count} processes" if count > 1 else ""
            raise ValueError(
                f"the batch's {len(array)} rows ({name}) must be a multiple of {self.rows}, that is {sizes}{among}"
            )
        if array.ndim == 2 and array.shape[1] % (parts := self._mesh.shape["sequence"]):
            raise ValueError(f"the batch's length {array.shape[1]} ({name}) must be a multiple of sequence ({parts})")
        shape = (len(array) * count, *array.shape[1:])
        return jax.make_array_from_process_local_data(self._sharding_of(array), array, shape)

    def _sharding_of(self, array: Any) -> NamedSharding:
        """Returns how an array of a batch is split."""
        # Images stay whole: neighboring rows of pixels belong together, so the second axis is not split.
        return NamedSharding(self._mesh, P(ROWS, "sequence") if array.ndim == 2 else P(ROWS))

    def draw(self, make: Callable[[Given], TrainState], given: Given) -> TrainState:
        where = self.shardings(jax.eval_shape(make, given))
        by_path = dict(zip(jax.tree.leaves(paths(where.params)), jax.tree.leaves(where.params), strict=True))
        placed = {
            path: (put(values, by_path[path]), None if rows is None else put(rows, self._whole))
            for path, (values, rows) in given.items()
        }
        # One program with sharded outputs. Random bits depend on the key and the index alone, so each device draws its
        # part of an array, and the numbers are those of one device.
        return one_at_a_time(self._mesh.size > 1, jax.jit(make, out_shardings=where)(placed))

    def for_evaluation(self, params: Any) -> Any:
        """Returns the parameters as they are, sharded."""
        return params


def _share(mesh: Mesh) -> tuple[int, tuple[int, int]]:
    """The number of row shards of this process in a global batch over the mesh, and `Placed.part`."""
    total = math.prod(mesh.shape[axis] for axis in ROWS)
    held: dict[int, set[int]] = {}
    for device, (shard,) in NamedSharding(mesh, P(ROWS)).devices_indices_map((total,)).items():
        held.setdefault(device.process_index, set()).add(shard.start or 0)  # type: ignore[attr-defined]
    parts = sorted({tuple(sorted(shards)) for shards in held.values()})
    if sum(map(len, parts)) != total or len(set(map(len, parts))) != 1:
        axes = " x ".join(f"{axis} ({size})" for axis, size in mesh.shape.items())
        raise ValueError(
            f"with {axes} the rows of the {len(held)} processes overlap; data x fsdp x expert must be a multiple or a "
            "divisor of their number"
        )
    mine = tuple(sorted(held[jax.process_index()]))
    return len(mine), (parts.index(mine), len(parts))
