"""Several processes that train together, each with devices of its own, through `jax.distributed`."""

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
"""The variables by which JAX finds these clusters; the first one says how many tasks there are."""
_DAY = 24 * 60 * 60
_LAST_WORDS = 1.0
"""Seconds that process 0 stays when all leave: without it JAX ends the others, who may have something to say."""
_HEARTBEAT = 100
"""Seconds after which JAX takes a silent process for dead, at most."""


@dataclasses.dataclass(frozen=True)
class Processes:
    """The processes that train together: by default the tasks of a SLURM or Open MPI job, elsewhere one alone."""

    coordinator: str | None = None
    """Host and port of process 0, such as `10.0.0.1:1234`; None for `JAX_COORDINATOR_ADDRESS`, or what a cluster says.
    """
    count: int | None = None
    """How many processes; None for what a cluster says. With 1 this process is alone in a cluster, too."""
    index: int | None = None
    """Which of them this one is, from 0; None for what a cluster says."""
    cluster: Literal["slurm", "ompi", "k8s", "mpi4py", "gketpu", "gcetpu"] | None = None
    """Whom JAX asks for what is not given; None for SLURM or Open MPI where their variables tell of several tasks.
    Kubernetes needs the package `kubernetes` and an indexed job with a headless service."""
    timeout: int = 300
    """Seconds to wait for the other processes."""

    def __post_init__(self) -> None:
        if self.count is not None:
            check_integer("processes.count", self.count, 1)
        if self.index is not None and not 0 <= self.index < (self.count or self.index + 1):
            raise ValueError(f"processes.index ({self.index}) must be in [0, {self.count or 'count'})")
        check_integer("processes.timeout", self.timeout, 1)

    def connect(self) -> None:
        """Meets the other processes; call it before JAX computes anything. One process alone has nothing to do.

        Raises:
            ValueError: something is missing, or what two processes say does not fit together.
            TimeoutError: some process did not come in time.
            OSError: the port of the coordinator is not free.
        """
        found = self._resolved(os.environ)
        if found is None:
            return
        address, count, index, local_devices = found
        if not 0 <= index < count:
            raise ValueError(f"processes.index ({index}) must be in [0, {count})")
        host, port = _parsed(address)
        meet(host, port, count, index, timeout=self.timeout)
        # Its handler of SIGTERM would take the place of ours (`train.engine.signals`).
        jax.config.update("jax_enable_preemption_service", False)
        jax.distributed.initialize(
            address,
            count,
            index,
            local_device_ids=local_devices,
            cluster_detection_method="deactivate",
            initialization_timeout=self.timeout,
            heartbeat_timeout_seconds=min(self.timeout, _HEARTBEAT),
            # Process 0 judges the test split while the others have nothing more to do.
            shutdown_timeout_seconds=_DAY,
        )
        sys.excepthook = functools.partial(_told_and_left, sys.excepthook)

    def _resolved(self, environment: Mapping[str, str]) -> tuple[str, int, int, Any] | None:
        """Coordinator, count, index and local devices; None for one process alone."""
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
    """The cluster whose variables tell of several tasks, of which this process is one; None where none does.

    >>> task = {"SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "a,b", "SLURM_PROCID": "1", "SLURM_LOCALID": "0"}
    >>> print(detected(task | {"SLURM_NTASKS": "2"}), detected(task | {"SLURM_NTASKS": "1"}))
    slurm None
    """
    for cluster, names in _TASKS.items():
        if all(name in environment for name in names) and int(environment[names[0]]) > 1:
            return cluster
    return None


def _asked(cluster: str, address: Any, count: Any, index: Any, timeout: int) -> tuple[Any, ...]:
    """Coordinator, count, index and local devices, with what a cluster says of those that are None."""
    # Not public, but what JAX itself would ask; a process alone does without.
    from jax._src.clusters import ClusterEnv

    kind = {kind.name or "k8s": kind for kind in ClusterEnv._cluster_types}[cluster]  # JAX forgot the name of this one
    if not kind.is_env_present():
        raise ValueError(f"processes.cluster ({cluster}) was not found: its variables, or a package, are missing")
    try:
        return ClusterEnv.auto_detect_unset_distributed_params(address, count, index, None, kind.name, timeout)
    except (RuntimeError, KeyError) as error:
        raise ValueError(f"processes.cluster ({cluster}) does not tell what is needed: {error}") from error


def is_first() -> bool:
    """Whether this process is the one that writes and prints."""
    return jax.process_index() == 0


def leave(code: int) -> NoReturn:
    """Ends a process that failed; where it is one of several, at once.

    Else JAX would wait here for the others, for minutes, and they in the middle of an update for this one. So they
    miss its heartbeat, and JAX ends them, too.
    """
    if jax.distributed.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        if is_first():
            time.sleep(_LAST_WORDS)
        os._exit(code)
    sys.exit(code)


def _told_and_left(tell: Callable[..., object], *error: Any) -> NoReturn:
    """What becomes of an error that nobody caught."""
    tell(*error)
    leave(1)


def any_process(flag: bool) -> bool:
    """Whether the flag is set in any process; all must ask. It waits for what the devices were given before."""
    return flag if jax.process_count() == 1 else bool(_any(flag))


def differing(texts: Mapping[str, str]) -> list[str]:
    """The names of the texts that are not the same in all processes, the same answer in each; all must ask."""
    if jax.process_count() == 1:
        return []
    names = sorted(texts)
    mine = np.array([[*hashlib.sha256(texts[name].encode("utf-8", "surrogatepass")).digest()] for name in names])
    found = multihost_utils.process_allgather(mine.astype(np.uint8))
    return [name for name, digests in zip(names, found.swapaxes(0, 1), strict=True) if (digests != digests[0]).any()]


class Agreement:
    """A flag that may rise in any process, such as that a signal came, and that all see at the same call.

    The answer is that to the call before: one to this call would come only when the devices are done with all that
    they were given, and would make every step wait. Alone, a process hears at once what it says.

    >>> agreed = Agreement()
    >>> agreed(False), agreed(True)
    (False, True)
    """

    def __init__(self) -> None:
        self._asked: jax.Array | None = None

    def __call__(self, flag: bool) -> bool:
        """Whether the flag was set in any process in the call before; all processes call equally often."""
        if jax.process_count() == 1:
            return flag
        before, self._asked = self._asked, _any(flag)
        return before is not None and bool(before)


def _any(flag: bool) -> jax.Array:
    sharding, reduce = _reduction()
    flags = jax.make_array_from_callback((jax.device_count(),), sharding, lambda _: np.array([flag]))
    answer = reduce(flags)
    # On the CPU nothing keeps it and the next update in order: see `train.devices.parallel`.
    return jax.block_until_ready(answer) if jax.default_backend() == "cpu" else answer


@functools.cache
def _reduction() -> tuple[NamedSharding, Any]:
    """Where the flags of all devices lie, and the function of them, compiled once."""
    mesh = Mesh(np.array(jax.devices()), ("devices",))
    return NamedSharding(mesh, P("devices")), jax.jit(jnp.any, out_shardings=NamedSharding(mesh, P()))


def _parsed(address: str) -> tuple[str, int]:
    """Host and port of "host:port".

    >>> _parsed("[::1]:1234")
    ('::1', 1234)
    """
    host, colon, port = address.rpartition(":")
    if not (host and colon and port.isdecimal() and 0 < int(port) < 2**16):
        raise ValueError(f"processes.coordinator ({address!r}) must be a host and a port, such as 10.0.0.1:1234")
    return host.strip("[]"), int(port)
