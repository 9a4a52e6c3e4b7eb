"""The devices that programs are compiled for. None of them needs to be at hand."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]

_H200 = """
gpu_device_info {
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: 4800000000000
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: 151397597184
  shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 minor: 0 feature_extension: ACCELERATED_FEATURES }
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 patch: 0 }
runtime_version { major: 13 }
device_description_str: "NVIDIA H200"
"""
"""A `GpuTargetConfigProto` in text form."""

_CUDNN = 91000
"""The version of cuDNN in `_H200`, as cuDNN counts."""

_VARIABLES = {
    "tpu": {
        # Without these libtpu looks for a TPU in the network, and allows one process at a time on a machine.
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": "v5litepod-8",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    },
    # The compiler alone needs no cuDNN, cuBLAS, cuFFT or cuSPARSE, which are most of the bytes of a CUDA installation.
    "gpu": {"JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1"},
}


@dataclass(frozen=True)
class Target:
    """Some devices of one kind.

    Attributes:
        name: the name that `--targets` takes.
        platform: "tpu" or "gpu".
        topology: the name of the topology, as the compiler's plugin knows it.
        count: number of its devices that programs use.
        memory: bytes of memory of each device, from the maker's data sheet.
        links: bytes per second that a device sends to all others, from the maker's data sheet.
    """

    name: str
    platform: str
    topology: str
    count: int
    memory: int
    links: float

    @property
    def kind(self) -> str:
        """The name without the number of devices."""
        return self.name.split("-")[0]

    @property
    def environment(self) -> Path:
        """The virtual environment whose packages hold the compiler."""
        return ROOT / f".venv-aot-{self.platform}"

    def missing(self) -> str | None:
        """Returns what to do if the compiler is not installed, else None."""
        if self.environment.joinpath("installed").exists():
            return None
        return f"the compiler for {self.platform.upper()}s is not installed: run `make {self.environment.name}`"

    def variables(self) -> Mapping[str, str]:
        """Returns the environment variables of a process that compiles for this target."""
        here = {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
        # A program from the cache would leave nothing to measure and no warning to read.
        return os.environ | _VARIABLES[self.platform] | here | {"JAX_COMPILATION_CACHE_DIR": "", "XLA_FLAGS": ""}

    def devices(self) -> Sequence[Any]:
        """Returns descriptions of the devices; only in a process with the target's packages and variables."""
        # Imported here: the process that shows the table needs neither.
        from jax._src.cudnn import fused_attention_stablehlo
        from jax.experimental import topologies

        # JAX asks the library for its version, which the environment does without: the call stays a call.
        vars(fused_attention_stablehlo)["check_cudnn_version"] = lambda: _CUDNN

        if self.platform == "tpu":
            found = topologies.get_topology_desc(platform="tpu", topology_name=self.topology)
        else:
            found = topologies.get_topology_desc(platform="cuda", topology=self.topology, target_config=_H200)
        return list(found.devices)[: self.count]


def _tpus(kind: str, topologies: Mapping[int, str], memory: int, links: float) -> list[Target]:
    return [Target(f"{kind}-{n}", "tpu", f"{kind}:{where}", n, memory, links) for n, where in topologies.items()]


_FLAT = {1: "2x2", 4: "2x2", 8: "2x4", 256: "16x16"}
_CUBE = {1: "2x2x1", 4: "2x2x1", 8: "2x2x2", 256: "4x8x8"}

TARGETS = {
    target.name: target
    for target in (
        *_tpus("v5e", _FLAT, 16 * 10**9, 200e9),  # cloud.google.com/tpu/docs/v5e: 1,600 Gbit/s
        *_tpus("v5p", _CUBE, 95 * 10**9, 600e9),  # cloud.google.com/tpu/docs/v5p: 4,800 Gbit/s
        *_tpus("v6e", _FLAT, 32 * 10**9, 400e9),  # cloud.google.com/tpu/docs/v6e: 3,200 Gbit/s
        *(Target(f"h200-{n}", "gpu", f"1x{n}x1", n, 141 * 10**9, 450e9) for n in (1, 8)),  # NVLink, each direction
    )
}
"""Targets by the name that `--targets` takes."""

SHORT = ("v5e-1", "v5e-8", "h200-1", "h200-8")
"""One kind of each platform."""


def check_installed(targets: Sequence[Target]) -> None:
    """Raises ValueError, with the command that installs it, if the compiler of a target is missing."""
    for target in targets:
        if reason := target.missing():
            raise ValueError(f"{target.name}: {reason}")
