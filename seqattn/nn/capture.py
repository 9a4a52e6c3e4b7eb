"""Collects auxiliary values that layers report in a call, without storing them in the model."""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
from flax import nnx

Output = TypeVar("Output")


def captured(
    call: Callable[..., Output], kinds: Sequence[type[nnx.Variable]], model: nnx.Module, *args: Any, **kwargs: Any
) -> tuple[Output, list[Any]]:
    """Runs `call(model, *args, **kwargs)` and collects what its layers sow.

    Args:
        call: the function to run. It gets a copy of the model.
        kinds: the kinds of variables to collect.
        model: the model whose layers report.
        *args: further arguments of `call`.
        **kwargs: further arguments of `call`.

    Returns:
        The output of `call`, and the sown values for each kind of variable.
    """
    # Flax marks each module that it captures from. It cannot do so if a transformation closes over the model, and it
    # leaves the marks after an error, so that later calls would store tracers in the model. A copy avoids both.
    copy = jax.tree.map(lambda leaf: leaf, model)
    output, *sown = nnx.capture(call, *kinds)(copy, *args, **kwargs)
    return output, sown


def tell(module: nnx.Module, kind: type[nnx.Variable], make: Callable[[], Any]) -> None:
    """Sows the value of `make()` if a caller captures. Without a capture, Flax would store it in the module."""
    if hasattr(module, "__captures__"):
        module.sow(kind, "told", make())
