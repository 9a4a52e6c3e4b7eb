"""How kernels with a derivative rule for reverse mode alone refuse forward mode."""

import contextlib
from collections.abc import Iterator


@contextlib.contextmanager
def reverse_only() -> Iterator[None]:
    """Raises NotImplementedError where the functions called inside meet forward mode.

    JAX raises a TypeError for a `jax.custom_vjp`. If an outer `jax.jit` has already traced the call, JAX differentiates
    the traced program, and its TypeError is raised outside.
    """
    try:
        yield
    except TypeError as error:
        # JAX reports forward mode only by the text of its TypeError.
        if "forward-mode" not in str(error):
            raise
        raise NotImplementedError("forward-mode derivatives of attention are only supported by 'reference'") from error
