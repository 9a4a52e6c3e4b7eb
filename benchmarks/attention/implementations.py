"""The implementations of attention, by the name that `--implementations` takes."""

from collections.abc import Callable, Iterable

import numpy as np

from benchmarks.attention import flash_calls, jax_calls, pytorch_calls, seqattn_calls
from benchmarks.attention.call import AttentionCall, prepare
from benchmarks.attention.case import AttentionCase
from benchmarks.bench import machine
from benchmarks.bench.program import Program
from seqattn.kernels.dispatch import IMPLEMENTATIONS

PrepareCall = Callable[[AttentionCase, Iterable[np.ndarray]], Program]
"""Makes a program for a case from its inputs.

Raises ImportError if the library is not installed, NotImplementedError if it does not support the case.
"""


def _in_jax(
    call: Callable[[AttentionCase, str | None], AttentionCall], implementation: str | None = None
) -> PrepareCall:
    return lambda case, inputs: prepare(call(case, implementation), case, inputs)


def _in_pytorch(implementation: str) -> PrepareCall:
    return lambda case, inputs: pytorch_calls.prepare(case, inputs, implementation)


NAMES: dict[str, PrepareCall] = {
    "seqattn": _in_jax(seqattn_calls.call),
    **{f"seqattn:{name}": _in_jax(seqattn_calls.call, name) for name in IMPLEMENTATIONS},
    "jax.nn:xla": _in_jax(jax_calls.jax_nn, "xla"),
    "jax.nn:cudnn": _in_jax(jax_calls.jax_nn, "cudnn"),
    "flax.nnx": _in_jax(jax_calls.flax_nnx),
    "tokamax": _in_jax(jax_calls.tokamax),
    **{f"tokamax:{name}": _in_jax(jax_calls.tokamax, name) for name in ("xla_chunked", "triton", "mosaic", "cudnn")},
    "torch:sdpa": _in_pytorch("sdpa"),
    **{f"torch:{name}": _in_pytorch(name) for name in ("flex", *flash_calls.CALLS)},
}

BASELINE = "jax.nn:xla"
"""The default implementation that defines speed 1."""

SHORT = ("seqattn", "jax.nn:xla", "tokamax", "torch:sdpa")

_ON_GPU = (
    *("jax.nn:cudnn", "tokamax:triton", "tokamax:mosaic", "tokamax:cudnn", "seqattn:cudnn", "seqattn:hopper"),
    "seqattn:tokamax",  # and on TPUs
    *(f"torch:{name}" for name in flash_calls.CALLS),
)
_ON_TPU = ("seqattn:tpu", "seqattn:splash")


def default() -> tuple[str, ...]:
    """Returns all implementations that support this device, installed or not."""
    elsewhere = {"cpu": (*_ON_GPU, *_ON_TPU), "gpu": _ON_TPU}.get(machine.platform_name(), ())
    return tuple(name for name in NAMES if name not in elsewhere)
