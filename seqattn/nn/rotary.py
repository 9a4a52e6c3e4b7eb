"""Rotary position embeddings as a value: the base, the rotated part of each head, and scaling to longer texts."""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Shaped

from seqattn.checks import check_even, check_number, check_sizes
from seqattn.positions import angular_frequencies, rotate


@dataclasses.dataclass(frozen=True)
class LinearScaling:
    """Divides all frequencies: position `p` gets the angles of `p / factor` (position interpolation, Chen 2023)."""

    factor: float = 2.0
    """Ratio of the new to the old maximum length; at least 1."""

    def __post_init__(self) -> None:
        check_number("factor", self.factor, minimum=1)

    @property
    def magnitude(self) -> float:
        """Factor of rotated queries and keys."""
        return 1.0

    def scaled(self, frequencies: Float[np.ndarray, "half"], base: float) -> Float[np.ndarray, "half"]:
        """Returns the scaled frequencies `[half]`, float64."""
        return frequencies / self.factor


@dataclasses.dataclass(frozen=True)
class Llama3Scaling:
    """Divides low frequencies, keeps high ones, and interpolates between them (Llama 3.1: Llama Team 2024)."""

    factor: float = 8.0
    """Divisor of low frequencies; at least 1."""
    low: float = 1.0
    """Frequencies with fewer rotations than this within `original_length` are low."""
    high: float = 4.0
    """Frequencies with more rotations than this within `original_length` are high. Must exceed `low`."""
    original_length: int = 8192
    """Maximum length of a text before scaling."""

    def __post_init__(self) -> None:
        check_number("factor", self.factor, minimum=1)
        check_number("low", self.low, above=0)
        check_number("high", self.high, above=self.low)
        check_sizes(original_length=self.original_length)

    @property
    def magnitude(self) -> float:
        """Factor of rotated queries and keys."""
        return 1.0

    def scaled(self, frequencies: Float[np.ndarray, "half"], base: float) -> Float[np.ndarray, "half"]:
        """Returns the scaled frequencies `[half]`, float64."""
        rotations = self.original_length * frequencies / (2 * math.pi)
        kept = np.clip((rotations - self.low) / (self.high - self.low), 0, 1)
        return kept * frequencies + (1 - kept) * frequencies / self.factor


@dataclasses.dataclass(frozen=True)
class YarnScaling:
    """Divides low frequencies, keeps high ones, and sharpens the softmax (YaRN, Peng 2023, section 3)."""

    factor: float = 4.0
    """Divisor of low frequencies; at least 1."""
    original_length: int = 4096
    """Maximum length of a text before scaling."""
    slow: float = 1.0
    """Frequencies with fewer rotations than about this within `original_length` are divided (alpha)."""
    fast: float = 32.0
    """Frequencies with more rotations than about this within `original_length` are kept (beta)."""
    attention_factor: float | None = None
    """Factor of rotated queries and keys. If None, `0.1 log(factor) + 1` (equation 22)."""

    def __post_init__(self) -> None:
        check_number("factor", self.factor, minimum=1)
        check_number("slow", self.slow, above=0)
        check_number("fast", self.fast, above=self.slow)
        check_sizes(original_length=self.original_length)
        if self.attention_factor is not None:
            check_number("attention_factor", self.attention_factor, above=0)

    @property
    def magnitude(self) -> float:
        """Factor of rotated queries and keys."""
        return 0.1 * math.log(self.factor) + 1 if self.attention_factor is None else self.attention_factor

    def scaled(self, frequencies: Float[np.ndarray, "half"], base: float) -> Float[np.ndarray, "half"]:
        """Returns the scaled frequencies `[half]`, float64."""
        dim = 2 * len(frequencies)

        def index(rotations: float) -> float:
            """The index, not always whole, of the frequency with this many rotations within `original_length`."""
            return dim * math.log(self.original_length / (2 * math.pi * rotations)) / (2 * math.log(base))

        # As in the authors' program: the ramp between both kinds starts and ends at whole indices.
        first, last = max(math.floor(index(self.fast)), 0), min(math.ceil(index(self.slow)), dim - 1)
        divided = np.clip((np.arange(dim // 2) - first) / max(last - first, 1e-3), 0, 1)
        return (1 - divided) * frequencies + divided * frequencies / self.factor


RotaryScaling = LinearScaling | Llama3Scaling | YarnScaling
"""How rotations are scaled to texts that are longer than those of the original training."""


@dataclasses.dataclass(frozen=True)
class Rotary:
    """RoPE: rotates the queries and keys of self-attention by their positions (Su 2021).

    >>> rotary = Rotary(fraction=0.5)
    >>> rotary.rotated_dim(8)
    4
    >>> heads = jnp.ones((1, 3, 2, 8))
    >>> print(rotary(heads, jnp.arange(3))[0, 1, 0, :5].round(1))  # by 1 and 0.01 radian; half is not rotated
    [-0.3  1.   1.4  1.   1. ]
    """

    base: float = 10_000.0
    """The longest wavelength is about `2 pi base` positions."""
    scaling: RotaryScaling | None = None
    """Scales frequencies to longer texts. If None, they are not scaled."""
    fraction: float = 1.0
    """Fraction of the features of each head that are rotated: the first ones (GPT-NeoX: Black 2022)."""
    interleaved: bool = False
    """If True, pairs feature 2 i with 2 i + 1 (Su 2021); if False, i with i + half of the rotated ones (GPT-NeoX)."""

    def rotated_dim(self, head_dim: int) -> int:
        """Returns the number of rotated features of a head.

        Raises:
            ValueError: the number is odd or 0, or `fraction` is not in (0, 1].
        """
        check_number("fraction", self.fraction, above=0, maximum=1)
        dim = int(head_dim * self.fraction)
        what = "head_dim" if self.fraction == 1 else f"the rotated {self.fraction} of head_dim ({head_dim})"
        check_even(what, dim, " to be rotated, a pair of features at a time")
        if dim < 2:
            raise ValueError(f"{what} must be at least 2, got {dim}")
        return dim

    def frequencies(self, head_dim: int) -> Float[Array, "half"]:
        """Returns the scaled frequencies in radians per position, `[rotated features / 2]` float32.

        Raises:
            ValueError: the number of rotated features is odd or 0, `base` is not positive, or `YarnScaling` has a
                base of at most 1, with which frequencies do not fall.
        """
        dim = self.rotated_dim(head_dim)
        check_number("base", self.base, above=1 if isinstance(self.scaling, YarnScaling) else 0)
        if self.scaling is None:
            return angular_frequencies(dim, base=self.base)
        # Sizes are static, so float64 costs nothing here.
        plain = self.base ** -(np.arange(0, dim, 2) / dim)
        return jnp.asarray(self.scaling.scaled(plain, self.base), jnp.float32)

    def __call__(self, x: Shaped[Array, "*batch T N H"], position: Int[Array, "..."]) -> Shaped[Array, "*batch T N H"]:
        """Rotates queries or keys `[*batch, T, N, H]` by their positions `[*batch, T]` or `[T]`."""
        dim, size = self.rotated_dim(x.shape[-1]), x.shape[-1]
        turned = x if dim == size else x[..., :dim]
        if self.interleaved:
            turned = turned.reshape(*x.shape[:-1], dim // 2, 2).swapaxes(-1, -2).reshape(*x.shape[:-1], dim)
        turned = rotate(turned, position, frequencies=self.frequencies(size))
        if self.interleaved:
            turned = turned.reshape(*x.shape[:-1], 2, dim // 2).swapaxes(-1, -2).reshape(*x.shape[:-1], dim)
        if self.scaling is not None and self.scaling.magnitude != 1:
            turned = turned * jnp.asarray(self.scaling.magnitude, x.dtype)
        return turned if dim == size else jnp.concatenate([turned, x[..., dim:]], axis=-1)
