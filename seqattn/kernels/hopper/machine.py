"""What kernels for Hopper require of a call and of the machine."""

from collections.abc import Collection

import jax

from seqattn.kernels.call import Call
from seqattn.kernels.guard import refuse_assembler

DTYPES = ("bfloat16", "float16")

_MOST_ROWS = 65535
"""The largest second and third dim of a grid in CUDA."""


def refuse_dims(head_dim: int, value_dim: int, dims: Collection[int]) -> None:
    """Raises NotImplementedError for dims without a tiling."""
    if head_dim not in dims or value_dim != head_dim:
        told = ", ".join(map(str, dims))
        raise NotImplementedError(f"H ({head_dim}) and V ({value_dim}) must be equal, and one of {told}")


def refuse_rows(call: Call) -> None:
    """Raises NotImplementedError for more batch rows than a grid has."""
    if call.query.shape[0] > _MOST_ROWS:
        raise NotImplementedError(f"{call.query.shape[0]} batch rows; the grid of a kernel has at most {_MOST_ROWS}")


def refuse_machine() -> None:
    """Raises NotImplementedError if Pallas Mosaic GPU is missing, or the machine's GPU is of another generation."""
    try:
        # Imported here, because the import is slow and needs absl-py, which JAX does not install.
        from jax.experimental.pallas import mosaic_gpu  # noqa: F401
    except ImportError as error:
        raise NotImplementedError(f"Pallas Mosaic GPU cannot be imported ({error}); it needs absl-py") from error
    refuse_assembler()
    if jax.default_backend() == "gpu" and (found := jax.local_devices()[0].compute_capability) != "9.0":
        raise NotImplementedError(f"the Hopper kernel is for compute capability 9.0, and this GPU has {found}")
