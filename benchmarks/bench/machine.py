"""The machine that measures: device, available memory, and versions of all libraries involved."""

import functools
import os
import platform
import re
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

_PACKAGES = (
    "jax jaxlib flax numpy torch tokamax transformers ctranslate2 "
    "jax-cuda12-plugin jax-cuda13-plugin nvidia-cudnn-cu12 nvidia-cudnn-cu13"
)


def platform_name() -> str:
    """ "cpu", "gpu" or "tpu"."""
    return jax.default_backend()


def cores() -> int:
    """Returns the number of CPU cores available to this process."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@functools.cache
def describe() -> dict[str, Any]:
    """Returns device, processor, cores, commit and versions; omits packages that are not installed."""
    return {
        "platform": platform_name(),
        "device": jax.devices()[0].device_kind if platform_name() != "cpu" else _processor(),
        "processor": _processor(),
        "cores": cores(),
        "python": platform.python_version(),
        "versions": {name: version for name in _PACKAGES.split() if (version := _version(name))},
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "glibc_tunables": os.environ.get("GLIBC_TUNABLES", ""),
        "commit": _commit(),
    }


def free_bytes() -> int | None:
    """Returns the free memory of the device; None if unknown."""
    stats = jax.devices()[0].memory_stats() or {}
    if "bytes_limit" in stats:
        return stats["bytes_limit"] - stats["bytes_in_use"]
    return _from_proc("/proc/meminfo", "MemAvailable") if platform_name() == "cpu" else None


def peak_bytes() -> int:
    """Returns the peak main memory of this process.

    Avoids `ru_maxrss` of `getrusage` where possible: a process inherits it from its parent.
    """
    peak = _from_proc("/proc/self/status", "VmHWM")
    if peak is None:
        import resource  # not on every platform

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if platform.system() == "Darwin" else 1024)
    return peak


def require(count: int, purpose: str) -> None:
    """Raises NotImplementedError if fewer bytes are free: running out would kill the process, not raise."""
    free = free_bytes()
    if free is not None and count > free:
        raise NotImplementedError(f"{purpose} of {count / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB are free")


def only_on_a_cpu(name: str) -> None:
    """Raises NotImplementedError on any device other than a CPU."""
    if platform_name() != "cpu":
        raise NotImplementedError(f"{name} is measured on the CPU only, set JAX_PLATFORMS=cpu")


def _from_proc(path: str, name: str) -> int | None:
    """Returns a number of kB from a Linux proc file, in bytes."""
    found = re.search(rf"^{name}:\s*(\d+) kB", Path(path).read_text(), re.MULTILINE) if Path(path).exists() else None
    return int(found[1]) * 1024 if found else None


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), re.MULTILINE) if cpuinfo.exists() else None
    return found[1] if found else platform.processor() or platform.machine()


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """Returns the commit of the checkout, with "+" if files differ from it; outside a checkout `SEQATTN_COMMIT`."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        run = functools.partial(subprocess.run, capture_output=True, text=True, check=True, timeout=10)
        changed = run([*git, "status", "--porcelain", "--untracked-files=no"]).stdout.strip()
        return run([*git, "rev-parse", "--short", "HEAD"]).stdout.strip() + ("+" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return os.environ.get("SEQATTN_COMMIT")
