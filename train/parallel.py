"""An update over all local devices: each takes its share of the batch, all keep the same state."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from train.step import Metrics, TrainState, Update

_AXIS = "devices"


def data_parallel(
    update: Update, devices: Sequence[jax.Device] | None = None
) -> Callable[[TrainState, dict[str, Any]], tuple[TrainState, Metrics]]:
    """`update` under `jax.pmap` over devices (all local ones by default, also one); the state is donated.

    Raises (when called):
        ValueError: the rows of the batch do not divide among the devices.
    """
    devices = jax.local_devices() if devices is None else list(devices)
    mapped = jax.pmap(
        partial(update, axis_name=_AXIS),
        axis_name=_AXIS,
        in_axes=(None, 0),
        out_axes=None,
        devices=devices,
        donate_argnums=0,
    )

    everywhere = NamedSharding(Mesh(np.array(devices), (_AXIS,)), PartitionSpec())

    def run(state: TrainState, batch: dict[str, Any]) -> tuple[TrainState, Metrics]:
        if state.step.sharding != everywhere:
            # The state that comes out lies on all devices; one that goes in otherwise would be compiled for apart.
            state = jax.device_put(state, everywhere)
        return mapped(state, {name: _share(name, array, len(devices)) for name, array in batch.items()})

    return run


def _share(name: str, array: np.ndarray, count: int) -> np.ndarray:
    """`[B, ...]` as `[devices, B / devices, ...]`."""
    if len(array) % count:
        raise ValueError(f"the batch's {len(array)} rows ({name}) must be a multiple of the {count} devices")
    return array.reshape(count, len(array) // count, *array.shape[1:])
