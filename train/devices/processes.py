"""Training in several processes through `jax.distributed`, each with its own devices."""

import dataclasses
import functools
import hashlib
import os
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, Literal, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from seqattn.checks import check_integer
from train.devices.rendezvous import meet

_ADDRESS = "JAX_COORDINATOR_ADDRESS"
_TASKS = {
    "slurm": ("SLURM_NTASKS", "SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_PROCID", "SLURM_LOCALID"),
    "ompi": ("OMPI_COMM_WORLD_SIZE", "OMPI_MCA_orte_hnp_uri", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK"),
}
"""The environment variables by which JAX detects these clusters. The first one is the number of tasks."""
_DAY = 24 * 60 * 60
_LAST_WORDS = 1.0
"""Seconds that process 0 waits before it exits: JAX ends the others at once, which may still print their errors."""
_HEARTBEAT = 100
"""Maximum number of seconds after which JAX treats a silent process as dead."""


@dataclasses.dataclass(frozen=True)
class Processes:
    """The processes that train together. Defaults to the tasks of a SLURM or Open MPI job, elsewhere to one process."""

    coordinator: str | None = None
    """Host and port of process 0, such as 10.0.0.1:1234. None for JAX_COORDINATOR_ADDRESS or the cluster's value."""
    count: int | None = None
    """Number of processes. None for the cluster's value. 1 trains alone, also inside a cluster."""
    index: int | None = None
    """Index of this process, from 0. None for the cluster's value."""
    cluster: Literal["slurm", "ompi", "k8s", "mpi4py", "gketpu", "gcetpu"] | None = None
    """Cluster that JAX asks for missing values. None detects SLURM and Open MPI jobs with several tasks. Kubernetes
    needs the package kubernetes and an indexed job with a headless service."""
    timeout: int = 300
    """Seconds to wait for the other processes."""

    def __post_init__(self) -> None:
        if self.count is not None:
            check_integer("processes.count", self.count, 1)
        if self.index is not None and not 0 <= self.index < (self.count or self.index + 1):
            raise ValueError(f"processes.index ({self.index}) must be in [0, {self.count or 'count'})")
        check_integer("processes.timeout", self.timeout, 1)

    def connect(self) -> None:
        """Connects the processes. Must be called before JAX uses a device; does nothing for a single process.

        Raises:
            ValueError: a value is missing, or the values of two processes contradict each other.
            TimeoutError: a process did not arrive within `timeout` seconds.
            OSError: the port of the coordinator is in use.
        """
        found = self._resolved(os.environ)
        if found is None:
            return
        address, count, index, local_devices = found
        if not 0 <= index < count:
            raise ValueError(f"processes.index ({index}) must be in [0, {count})")
        host, port = _parsed(address)
        meet(host, port, count, index, timeout=self.timeout)
        # JAX's preemption service would replace the SIGTERM handler of `train.engine.signals`.
        jax.config.update("jax_enable_preemption_service", False)
        jax.distributed.initialize(
            address,
            count,
            index,
            local_device_ids=local_devices,
            cluster_detection_method="deactivate",
            initialization_timeout=self.timeout,
            heartbeat_timeout_seconds=min(self.timeout, _HEARTBEAT),
            # The others wait at the end while process 0 evaluates the test split.
            shutdown_timeout_seconds=_DAY,
        )
        sys.excepthook = functools.partial(_told_and_left, sys.excepthook)

    def _resolved(self, environment: Mapping[str, str]) -> tuple[str, int, int, Any] | None:
        """Coordinator, count, index and local devices; None for a single process."""
        address = self.coordinator or environment.get(_ADDRESS)
        cluster = self.cluster or detected(environment)
        if self.count == 1 or (cluster is None and address is None and self.count is None and self.index is None):
            return None
        found: tuple[Any, ...] = (address, self.count, self.index, None)
        if cluster is not None:
            found = _asked(cluster, address, self.count, self.index, self.timeout)
        names = ("coordinator", "count", "index")
        missing = [f"--processes.{name}" for name, value in zip(names, found, strict=False) if value is None]
        if missing:
            raise ValueError(f"several processes need {' and '.join(missing)}")
        address, count, index, local_devices = found
        return None if count == 1 else (address, count, index, local_devices)


def detected(environment: Mapping[str, str]) -> str | None:
    """Detects a SLURM or Open MPI job with several tasks from its environment variables.

    Args:
        environment: the environment variables of this process.

    Returns:
        "slurm" or "ompi"; None outside such a job.

    >>> task = {"SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "a,b", "SLURM_PROCID": "1", "SLURM_LOCALID": "0"}
    >>> print(detected(task | {"SLURM_NTASKS": "2"}), detected(task | {"SLURM_NTASKS": "1"}))
    slurm None
    """
    for cluster, names in _TASKS.items():
        if all(name in environment for name in names) and int(environment[names[0]]) > 1:
            return cluster
    return None


def _asked(cluster: str, address: Any, count: Any, index: Any, timeout: int) -> tuple[Any, ...]:
    """Coordinator, count, index and local devices, where the cluster fills in the values that are None."""
    # A private module of JAX, but the one that JAX itself asks. Imported only for several processes.
    from jax._src.clusters import ClusterEnv

    kind = {kind.name or "k8s": kind for kind in ClusterEnv._cluster_types}[cluster]  # JAX gives this class no name
    if not kind.is_env_present():
        raise ValueError(f"processes.cluster ({cluster}) was not found: its variables, or a package, are missing")
    try:
        return ClusterEnv.auto_detect_unset_distributed_params(address, count, index, None, kind.name, timeout)
    except (RuntimeError, KeyError) as error:
        raise ValueError(f"processes.cluster ({cluster}) lacks a value that is needed: {error}") from error


def is_first() -> bool:
    """Whether this is process 0, which writes files and prints."""
    return jax.process_index() == 0


def leave(code: int) -> NoReturn:
    """Exits a failed process; immediately if it is one of several.

    A normal exit would wait for the other processes for minutes, while they wait in an update for this one. After an
    immediate exit they miss its heartbeat, and JAX ends them too.
    """
    if jax.distributed.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        if is_first():
            time.sleep(_LAST_WORDS)
        os._exit(code)
    sys.exit(code)


def _told_and_left(tell: Callable[..., object], *error: Any) -> NoReturn:
    """Handles an uncaught error: reports it and exits."""
    tell(*error)
    leave(1)


def any_process(flag: bool) -> bool:
    """Whether the flag is set in any process. All processes must call it; it waits for earlier work on the devices."""
    return flag if jax.process_count() == 1 else bool(_any(flag))


def differing(texts: Mapping[str, str]) -> list[str]:
    """The names of the texts that differ between processes. All processes must call it, and all get the same answer."""
    if jax.process_count() == 1:
        return []
    names = sorted(texts)
    mine = np.array([[*hashlib.sha256(texts[name].encode("utf-8", "surrogatepass")).digest()] for name in names])
    found = multihost_utils.process_allgather(mine.astype(np.uint8))
    return [name for name, digests in zip(names, found.swapaxes(0, 1), strict=True) if (digests != digests[0]).any()]


def check_same(texts: dict[str, str]) -> None:
    """Raises ValueError in all processes if these texts differ between them."""
    # Processes that train different models would add up unrelated gradients without an error.
    if others := differing(texts):
        raise ValueError(
            f"the processes differ in {', '.join(others)}; give all of them the same flags, files and versions"
        )


class Agreement:
    """Agreement of all processes on a flag that any of them may set, such as after a signal.

    All processes see the flag at the same call. With several processes, a call returns the answer to the previous call:
    waiting for its own answer would make every step wait for the devices. A single process gets its flag back at once.

    >>> agreed = Agreement()
    >>> agreed(False), agreed(True)
    (False, True)
    """

    def __init__(self) -> None:
        self._asked: jax.Array | None = None

    def __call__(self, flag: bool) -> bool:
        """Whether any process set the flag in the previous call. All processes must call it equally often."""
        if jax.process_count() == 1:
            return flag
        before, self._asked = self._asked, _any(flag)
        return before is not None and bool(before)


def _any(flag: bool) -> jax.Array:
    sharding, reduce = _reduction()
    flags = jax.make_array_from_callback((jax.device_count(),), sharding, lambda _: np.array([flag]))
    answer = reduce(flags)
    # On the CPU nothing orders it and the next update: see `train.devices.parallel`.
    return jax.block_until_ready(answer) if jax.default_backend() == "cpu" else answer


@functools.cache
def _reduction() -> tuple[NamedSharding, Any]:
    """The sharding of the flags over all devices, and their reduction, compiled once."""
    mesh = Mesh(np.array(jax.devices()), ("devices",))
    return NamedSharding(mesh, P("devices")), jax.jit(jnp.any, out_shardings=NamedSharding(mesh, P()))


def _parsed(address: str) -> tuple[str, int]:
    """Splits "host:port".

    >>> _parsed("[::1]:1234")
    ('::1', 1234)
    """
    host, colon, port = address.rpartition(":")
    if not (host and colon and port.isdecimal() and 0 < int(port) < 2**16):
        raise ValueError(f"processes.coordinator ({address!r}) must be a host and a port, such as 10.0.0.1:1234")
    return host.strip("[]"), int(port)
