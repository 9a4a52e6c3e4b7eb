"""How an array of a checkpoint holds one or several of our parameters."""

import dataclasses
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np

Shape = tuple[int, ...]


@runtime_checkable
class Layout(Protocol):
    """The relation between an array of a checkpoint and the parameters that it holds."""

    def shape(self, ours: Sequence[Shape]) -> Shape:
        """Returns the shape of the checkpoint's array for the shapes of our parameters."""
        ...

    def read(self, theirs: np.ndarray, ours: Sequence[Shape]) -> Sequence[np.ndarray]:
        """Returns our parameters, of the given shapes."""
        ...

    def write(self, ours: Sequence[np.ndarray]) -> np.ndarray:
        """Returns the checkpoint's array, the inverse of `read`."""
        ...


@dataclasses.dataclass(frozen=True)
class Same:
    """The same array."""

    def shape(self, ours: Sequence[Shape]) -> Shape:
        return ours[0]

    def read(self, theirs: np.ndarray, ours: Sequence[Shape]) -> Sequence[np.ndarray]:
        return [theirs]

    def write(self, ours: Sequence[np.ndarray]) -> np.ndarray:
        return ours[0]


SAME = Same()


@dataclasses.dataclass(frozen=True)
class Transposed:
    """A matrix `[out, in]`, as PyTorch's linear layers store it. Ours is `[in, out]`."""

    def shape(self, ours: Sequence[Shape]) -> Shape:
        return ours[0][::-1]

    def read(self, theirs: np.ndarray, ours: Sequence[Shape]) -> Sequence[np.ndarray]:
        return [theirs.T]

    def write(self, ours: Sequence[np.ndarray]) -> np.ndarray:
        return ours[0].T


@dataclasses.dataclass(frozen=True)
class Joined:
    """Several parameters, one after the other along the last axis."""

    def shape(self, ours: Sequence[Shape]) -> Shape:
        return (*ours[0][:-1], sum(shape[-1] for shape in ours))

    def read(self, theirs: np.ndarray, ours: Sequence[Shape]) -> Sequence[np.ndarray]:
        return np.split(theirs, np.cumsum([shape[-1] for shape in ours])[:-1], axis=-1)

    def write(self, ours: Sequence[np.ndarray]) -> np.ndarray:
        return np.concatenate(ours, axis=-1)


@dataclasses.dataclass(frozen=True)
class Row:
    """A matrix of one row, `[1, size]`. Ours is `[size]`."""

    def shape(self, ours: Sequence[Shape]) -> Shape:
        return (1, *ours[0])

    def read(self, theirs: np.ndarray, ours: Sequence[Shape]) -> Sequence[np.ndarray]:
        return [theirs[0]]

    def write(self, ours: Sequence[np.ndarray]) -> np.ndarray:
        return ours[0][None]


@dataclasses.dataclass(frozen=True)
class After:
    """A table whose first rows are never looked up. Ours lacks them; they are written as zeros."""

    unused: int

    def shape(self, ours: Sequence[Shape]) -> Shape:
        return (ours[0][0] + self.unused, *ours[0][1:])

    def read(self, theirs: np.ndarray, ours: Sequence[Shape]) -> Sequence[np.ndarray]:
        return [theirs[self.unused :]]

    def write(self, ours: Sequence[np.ndarray]) -> np.ndarray:
        return np.concatenate([np.zeros_like(ours[0][:1]).repeat(self.unused, axis=0), ours[0]])


@dataclasses.dataclass(frozen=True)
class AboveOne:
    """A gain that is stored as its difference from 1 (Gemma).

    The sum is rounded to the dtype of the array. Writing has no rounding error for gains of at least 1/2.
    """

    def shape(self, ours: Sequence[Shape]) -> Shape:
        return ours[0]

    def read(self, theirs: np.ndarray, ours: Sequence[Shape]) -> Sequence[np.ndarray]:
        return [theirs + np.ones((), theirs.dtype)]

    def write(self, ours: Sequence[np.ndarray]) -> np.ndarray:
        return ours[0] - np.ones((), ours[0].dtype)
