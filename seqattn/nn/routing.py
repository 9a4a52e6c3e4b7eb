"""Assignment of tokens to experts, and its statistics: loads, losses and dropped choices."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from seqattn.checks import check_integer, check_number
from seqattn.pytrees import pytree


@dataclasses.dataclass(frozen=True)
class MixtureConfig:
    """Sizes and choices of a mixture of experts.

    The capacity is that of Fedus 2021 (section 2.2), extended to `top_k` experts.

    Raises:
        ValueError: a number is out of its range.
    """

    num_experts: int = 8
    """E, the number of experts."""
    top_k: int = 2
    """Number of experts per token, from 1 to `num_experts`."""
    capacity_factor: float | None = 1.25
    """In calls with a dropout key, an expert takes at most ceil(capacity_factor * top_k * tokens / num_experts) tokens.

    Rounded to two decimals; at least 0.01. If None, or in calls without a key, there is no limit.
    """
    noise: bool = True
    """If True, adds trainable noise to the gate's logits in calls with a dropout key (Shazeer 2017, equation 4)."""
    balance_weight: float = 0.01
    """Weight of the balance loss in the routing's loss; at least 0."""
    z_weight: float = 0.001
    """Weight of the z-loss in the routing's loss; at least 0."""

    def __post_init__(self) -> None:
        check_integer("top_k", self.top_k, 1, self.num_experts, maximum_name="num_experts")
        if self.capacity_factor is not None:
            check_number("capacity_factor", self.capacity_factor, minimum=0.01, hint=", or None for no limit")
        for name in ("balance_weight", "z_weight"):
            check_number(name, getattr(self, name), minimum=0)

    @property
    def share(self) -> tuple[int, int]:
        """The largest fraction of all tokens that one expert takes, as (numerator, denominator)."""
        if self.capacity_factor is None:
            return 1, 1
        # Integer hundredths are exact. The float nearest to 1.1 is larger than 1.1, and a ceiling would round it up.
        part, whole = round(100 * self.capacity_factor) * self.top_k, 100 * self.num_experts
        divisor = math.gcd(part, whole)
        return (part // divisor, whole // divisor) if part < whole else (1, 1)


@pytree
@dataclasses.dataclass(frozen=True)
class Routing:
    """Statistics of one call of a mixture layer.

    Attributes:
        loss: `balance_weight * balance_loss + z_weight * z_loss`, to be added to a mean over tokens.
        balance_loss: E times the sum over experts of (fraction of choices) * (mean probability); 1 if all experts are
            used equally (Fedus 2021, equation 4).
        z_loss: mean over tokens of the squared log-sum-exp of the gate's logits (Zoph 2022, equation 5).
        load: `[E]`, the number of tokens that chose each expert, including dropped ones.
        dropped: number of choices that found no room; 0 in a call without a dropout key.
        tokens: number of tokens, without padding.
    """

    loss: Array
    balance_loss: Array
    z_loss: Array
    load: Array
    dropped: Array
    tokens: Array


@dataclasses.dataclass(frozen=True)
class Choice:
    """The experts of each token, best first, and their weights. The experts have not run yet."""

    logits: Float[Array, "T E"]
    expert: Int[Array, "T K"]
    weight: Float[Array, "T K"]
    real: Bool[Array, " T"]
    room: Int[Array, ""]
    """Number of tokens that an expert takes."""
    capacity: int
    """Upper bound of `room` that does not depend on the data."""

    def uses(self) -> Bool[Array, "T K E"]:
        """`[T, K, E]`, True where choice k of a token is expert e. False for padding."""
        experts = jnp.arange(self.logits.shape[-1], dtype=jnp.int32)
        return (self.expert[..., None] == experts[None, None]) & self.real[:, None, None]

    def load(self) -> Int[Array, " E"]:
        """`[E]`, the number of tokens that chose each expert."""
        return self.uses().sum(axis=(0, 1), dtype=jnp.int32)

    def slots(self) -> Int[Array, " choices"]:
        """Assigns each choice a slot in the experts' input `[E * capacity]`.

        Returns:
            `[T * K]`, all different, so that scatters are deterministic. A choice without room has a slot past the end.
        """
        (num_tokens, top_k), num_experts = self.expert.shape, self.logits.shape[-1]
        index = jnp.arange(num_tokens * top_k, dtype=jnp.int32)
        real = jnp.repeat(self.real, top_k)
        expert = jnp.where(real, self.expert.reshape(-1), num_experts)  # sorts padding behind all experts
        # A stable sort ranks each choice within its expert in token order, without a one-hot array [T, E, capacity].
        in_order, order = jax.lax.sort((expert, index), num_keys=1, is_stable=True)
        load = self.load()
        start = jnp.cumulative_sum(load, dtype=jnp.int32) - load
        # In sorted order, rank = index - first index of the same expert. The scatter returns the ranks to token order.
        rank = index - start.at[in_order].get(mode="fill", fill_value=0)
        rank = jnp.zeros_like(index).at[order].set(rank, unique_indices=True)
        kept = real & (rank < self.room)
        return jnp.where(kept, expert * self.capacity + rank, num_experts * self.capacity + index)

    def routing(self, config: MixtureConfig) -> Routing:
        """Computes the statistics of this choice."""
        load, tokens, dtype = self.load(), self.real.sum(dtype=jnp.int32), self.logits.dtype
        # A call with padding only must give losses of 0, not 0 / 0.
        count = jnp.maximum(tokens, 1).astype(dtype)
        probability = jnp.where(self.real[:, None], jax.nn.softmax(self.logits, axis=-1), 0).sum(axis=0) / count
        # The load has no gradient; the mean probability carries it (Fedus 2021, equation 4).
        balance = config.num_experts * (load.astype(dtype) / (count * config.top_k) * probability).sum()
        # Large logits round badly in the softmax. The z-loss keeps them small (Zoph 2022, equation 5).
        z = jnp.where(self.real, jax.nn.logsumexp(self.logits, axis=-1) ** 2, 0).sum() / count
        loss = config.balance_weight * balance + config.z_weight * z
        return Routing(loss, balance, z, load, (load - jnp.minimum(load, self.room)).sum(dtype=jnp.int32), tokens)


def part_of(count: Any, part: int, whole: int) -> Any:
    """Returns the ceiling of `part * count / whole`, with intermediate products that fit int32."""
    return part * (count // whole) - (-part * (count % whole)) // whole
