"""Arrays for a compiled program, drawn from a seed: the same ones in every process and on every device."""

import zlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from benchmarks.attention import patterns
from benchmarks.attention.shapes import Shape
from benchmarks.compile.program import Program

_SMALL = 0.02
"""Standard deviation of the parameters of models."""


def arguments_of(program: Program, infos: Any) -> Any:
    """Returns arrays for the arguments of a program.

    Args:
        program: the program, whose name and sizes say what its arguments mean.
        infos: a tree with the shape and the dtype of each argument, as `lowered.args_info`.

    Returns:
        A tree of NumPy arrays of the same structure.
    """
    leaves, tree = jax.tree_util.tree_flatten_with_path(infos)
    draw = _of_attention if program.group in ("attention", "kernel") else _of_model
    names = [jax.tree_util.keystr(path) for path, _ in leaves]
    integers = [name for name, (_, info) in zip(names, leaves, strict=True) if info.dtype == np.int32]
    found = []
    for number, (name, (_, info)) in enumerate(zip(names, leaves, strict=True)):
        rng = np.random.default_rng([zlib.crc32(program.group.encode()), number])
        found.append(draw(program, name, integers, info, rng).astype(info.dtype))
    return jax.tree.unflatten(tree, found)


def _of_attention(program: Program, name: str, integers: list[str], info: Any, rng: np.random.Generator) -> np.ndarray:
    """Draws query, key, value and cotangent, the slopes or cap `[N]`, and positions and segments `[B, T]`."""
    if info.dtype != np.int32:
        # Numbers of heads are slopes, and the first one is a soft cap: both are positive.
        return rng.standard_normal(info.shape, np.float32) if len(info.shape) > 1 else 2.0 ** -np.arange(1.0, 9.0)
    batch, length = info.shape
    if program.sizes["mask"] == "prefix":
        return np.full(info.shape, length // 4)
    segment = patterns.segments(Shape("documents", batch, length, 1, 1, "here"))
    if len(integers) == 1 or name == integers[-1]:
        return segment
    starts = np.diff(segment, axis=1, prepend=0) != 0
    return np.arange(length) - np.maximum.accumulate(np.where(starts, np.arange(length), 0), axis=1)


def _of_model(program: Program, name: str, integers: list[str], info: Any, rng: np.random.Generator) -> np.ndarray:
    """Draws parameters, the state of the optimizer or of a cache, and tokens."""
    shape, vocab = info.shape, program.sizes.get("vocab_size", 1000)
    if np.issubdtype(info.dtype, np.bool_):
        return np.ones(shape)
    if not np.issubdtype(info.dtype, np.integer):
        return _NUMBERS.get(next((word for word in _NUMBERS if word in name), ""), _small)(shape, rng)
    if "position" in name:
        return np.broadcast_to(np.arange(shape[-1]), shape) if program.group == "update" and shape else np.ones(shape)
    if "segment" in name or (program.group == "decode" and name != "[0][1]"):
        return np.ones(shape)
    is_token = any(word in name for word in ("source", "target", "label")) or program.group == "decode"
    return rng.integers(1, vocab, shape) if is_token else np.zeros(shape)


def _small(shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    return _SMALL * rng.standard_normal(shape, np.float32)


_NUMBERS: dict[str, Callable[[tuple[int, ...], np.random.Generator], np.ndarray]] = {
    "opt_state": lambda shape, rng: np.zeros(shape, np.float32),
    "scale": lambda shape, rng: np.ones(shape, np.float32),
}
"""How floating numbers are drawn that are no weights, by a part of their name."""
