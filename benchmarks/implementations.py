"""Who computes: every implementation by the name that `--implementations` takes."""

from collections.abc import Callable, Iterable

import numpy as np

from benchmarks import machine, ours, peers, pytorch
from benchmarks.case import Case
from benchmarks.program import Call, Program, compiled
from seqattn.kernels.dispatch import IMPLEMENTATIONS

Prepare = Callable[[Case, Iterable[np.ndarray]], Program]
"""Makes a program for a case from its inputs.

Raises ImportError where the library is not installed, NotImplementedError where it cannot serve the case.
"""


def _in_jax(call: Callable[[Case, str | None], Call], implementation: str | None = None) -> Prepare:
    return lambda case, inputs: compiled(call(case, implementation), case, inputs)


def _in_pytorch(implementation: str) -> Prepare:
    return lambda case, inputs: pytorch.prepare(case, inputs, implementation)


NAMES: dict[str, Prepare] = {
    "seqattn": _in_jax(ours.call),
    **{f"seqattn:{name}": _in_jax(ours.call, name) for name in IMPLEMENTATIONS},
    "jax.nn:xla": _in_jax(peers.jax_nn, "xla"),
    "jax.nn:cudnn": _in_jax(peers.jax_nn, "cudnn"),
    "flax.nnx": _in_jax(peers.flax_nnx),
    "tokamax": _in_jax(peers.tokamax),
    **{f"tokamax:{name}": _in_jax(peers.tokamax, name) for name in ("xla_chunked", "triton", "mosaic", "cudnn")},
    "torch:sdpa": _in_pytorch("sdpa"),
    "torch:flex": _in_pytorch("flex"),
}

BASELINE = "jax.nn:xla"
"""What speeds are given relative to, unless another one is asked for."""

SHORT = ("seqattn", "jax.nn:xla", "tokamax", "torch:sdpa")

_ON_GPU = ("jax.nn:cudnn", "tokamax:triton", "tokamax:mosaic", "tokamax:cudnn", "seqattn:cudnn", "seqattn:flash")


def default() -> tuple[str, ...]:
    """All that may run on the device at hand, and what is not installed."""
    elsewhere = {"cpu": (*_ON_GPU, "seqattn:splash"), "gpu": ("seqattn:splash",)}.get(machine.platform_name(), ())
    return tuple(name for name in NAMES if name not in elsewhere)


def check(names: Iterable[str]) -> None:
    """Raises ValueError for a name that nobody has."""
    unknown = [name for name in names if name not in NAMES]
    if unknown:
        raise ValueError(f"no implementation {unknown[0]!r}: give {', '.join(NAMES)}")
