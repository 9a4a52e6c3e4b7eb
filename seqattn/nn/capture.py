"""What layers tell of a call beside its output, without leaving a trace in the model."""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
from flax import nnx

Output = TypeVar("Output")


def captured(
    call: Callable[..., Output], kinds: Sequence[type[nnx.Variable]], model: nnx.Module, *args: Any, **kwargs: Any
) -> tuple[Output, list[Any]]:
    """`call(model, *args, **kwargs)`, and what the layers of the model sowed inside it, for each kind of variable."""
    # flax marks each module that it captures from, refuses to where a transformation closes over the model, and after
    # an error leaves the marks: later calls would store their tracers in it. A copy has none of this.
    copy = jax.tree.map(lambda leaf: leaf, model)
    output, *sown = nnx.capture(call, *kinds)(copy, *args, **kwargs)
    return output, sown


def tell(module: nnx.Module, kind: type[nnx.Variable], make: Callable[[], Any]) -> None:
    """Sows what `make` gives where somebody captures; anywhere else flax would store it in the module."""
    if hasattr(module, "__captures__"):
        module.sow(kind, "told", make())
