"""Counts the operations that each device computes, from the matrix products in the text of a compiled program.

The jaxpr says how much work there is, and the compiled program what each device does of it: work that the partitioner
repeats on every device shows here. Kernels (Pallas, cuDNN) are calls without a body and count as nothing.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

from benchmarks.compile.hlo import Instruction, Module, Shape
from benchmarks.compile.work import Work

_LABELS = re.compile(r"dim_labels=(\w+)_(\w+)->(\w+)")
_CONTRACTED = re.compile(r'"lhs_contracting_dimensions":\[([^\]]*)\]')


def products(text: str) -> Work:
    """Counts the operations of matrix products and convolutions on one device, loops counted.

    Args:
        text: what `jax.stages.Compiled.as_text` returns.

    >>> import jax, jax.numpy as jnp
    >>> products(jax.jit(jnp.matmul).lower(jnp.ones((2, 3)), jnp.ones((3, 5))).compile().as_text())
    Work(flop=60.0, bound='')
    """
    total = Work()
    for instruction, computation, times in Module(text).instructions():
        if flop := _flop(instruction, computation):
            work = Work(flop * times.known)
            total += work if times.exact else work.to_at_least()
    return total


def _flop(instruction: Instruction, computation: Mapping[str, Instruction]) -> int:
    """Returns the operations of one instruction; 0 if it is no product."""
    if instruction.opcode not in ("dot", "convolution", "custom-call"):
        return 0
    operands = [computation[name].result[0] for name in instruction.operands if name in computation]
    if instruction.opcode == "convolution":
        return _of_convolution(instruction, *operands[:2])
    contracted = instruction.attribute("lhs_contracting_dims")
    if instruction.opcode == "custom-call":
        # cuBLAS: its configuration is JSON.
        found = _CONTRACTED.search(instruction.rest)
        contracted = found[1] if found else None
    if contracted is None:
        return 0
    sizes = [operands[0].sizes[int(axis)] for axis in re.findall(r"\d+", contracted)]
    # A call of cuBLAS returns its workspace beside the product.
    return 2 * instruction.result[0].count * math.prod(sizes)


@dataclass(frozen=True)
class _Window:
    """One dimension of the window of a convolution."""

    size: int = 1
    stride: int = 1
    low: int = 0
    lhs_dilate: int = 1
    rhs_dilate: int = 1

    def pairs(self, inputs: int, outputs: int) -> int:
        """Returns the number of pairs of an output and a weight that meet an input, not padding or a hole."""
        found = 0
        for weight in range(self.size):
            for output in range(outputs):
                place = output * self.stride - self.low + weight * self.rhs_dilate
                found += place >= 0 and place % self.lhs_dilate == 0 and place // self.lhs_dilate < inputs
        return found


def _of_convolution(instruction: Instruction, inputs: Shape, weights: Shape) -> int:
    """Counts a convolution. Compilers for TPUs write all products as such, and batches as windows full of holes."""
    labels = _LABELS.search(instruction.rest)
    if labels is None:
        return 0
    given, kernel, result = (
        dict(zip(names, shape.sizes, strict=True))
        for names, shape in zip(labels.groups(), (inputs, weights, instruction.result[0]), strict=True)
    )
    windows = _windows(instruction, len(given) - 2)
    pairs = math.prod(window.pairs(given[str(i)], result[str(i)]) for i, window in enumerate(windows))
    return 2 * pairs * kernel["i"] * result["f"] * result["b"]


def _windows(instruction: Instruction, dims: int) -> list[_Window]:
    found = instruction.attribute("window") or ""
    values = {name: text.split("x") for name, text in re.findall(r"(\w+)=([\w\-]+)", found)}
    windows = []
    for dim in range(dims):
        numbers = {name: values[name][dim] for name in values if name in ("size", "stride", "lhs_dilate", "rhs_dilate")}
        low = values["pad"][dim].split("_")[0] if "pad" in values else "0"
        windows.append(_Window(low=int(low), **{name: int(number) for name, number in numbers.items()}))
    return windows
