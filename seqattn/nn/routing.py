"""Which experts a token uses, and what is to be told of that: loads, losses, and what found no room."""

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
    """How tokens are shared among experts; the capacity is that of Fedus 2021 (section 2.2), for `top_k` experts.

    Raises:
        ValueError: a number is out of its range.
    """

    num_experts: int = 8
    """E, the feed-forward networks to choose from."""
    top_k: int = 2
    """How many of them each token uses."""
    capacity_factor: float | None = 1.25
    """Where a call has a dropout key, an expert takes at most ceil(capacity_factor * top_k * tokens / num_experts)
    tokens, the factor to two decimals; None for any number of them, as in every call without a key."""
    noise: bool = True
    """Add trainable noise to the gates where a call has a dropout key (Shazeer 2017, equation 4)."""
    balance_weight: float = 0.01
    """Of the balance loss in a routing's loss."""
    z_weight: float = 0.001
    """Of the z loss in a routing's loss."""

    def __post_init__(self) -> None:
        check_integer("top_k", self.top_k, 1, self.num_experts, maximum_name="num_experts")
        if self.capacity_factor is not None:
            check_number("capacity_factor", self.capacity_factor, minimum=0.01, hint=", or None for no limit")
        for name in ("balance_weight", "z_weight"):
            check_number(name, getattr(self, name), minimum=0)

    @property
    def share(self) -> tuple[int, int]:
        """The part of all tokens that one expert takes at most, as a numerator and a denominator."""
        if self.capacity_factor is None:
            return 1, 1
        # In hundredths a factor is what its digits say: the float next to 1.1 is larger, which a ceiling would show.
        part, whole = round(100 * self.capacity_factor) * self.top_k, 100 * self.num_experts
        divisor = math.gcd(part, whole)
        return (part // divisor, whole // divisor) if part < whole else (1, 1)


@pytree
@dataclasses.dataclass(frozen=True)
class Routing:
    """How one call of a layer shared its tokens.

    Attributes:
        loss: `balance_weight * balance_loss + z_weight * z_loss`, to be added to a mean over tokens.
        balance_loss: E times the sum over experts of their share of the choices times their mean probability, which
            is 1 where all are used alike (Fedus 2021, equation 4).
        z_loss: mean over tokens of the squared log-sum-exp of the gate's logits (Zoph 2022, equation 5).
        load: how many tokens chose each expert, `[E]`, those that it had no room for included.
        dropped: how many of these choices found no room; none in a call without a dropout key.
        tokens: how many tokens there were, without padding.
    """

    loss: Array
    balance_loss: Array
    z_loss: Array
    load: Array
    dropped: Array
    tokens: Array


@dataclasses.dataclass(frozen=True)
class Choice:
    """The experts of each token, best first, and their weights; none of them is computed yet."""

    logits: Float[Array, "T E"]
    expert: Int[Array, "T K"]
    weight: Float[Array, "T K"]
    real: Bool[Array, " T"]
    room: Int[Array, ""]
    """How many tokens an expert takes."""
    capacity: int
    """The bound on it that is known without the data."""

    def uses(self) -> Bool[Array, "T K E"]:
        """Which expert each choice is, none of padding."""
        experts = jnp.arange(self.logits.shape[-1], dtype=jnp.int32)
        return (self.expert[..., None] == experts[None, None]) & self.real[:, None, None]

    def load(self) -> Int[Array, " E"]:
        """How many tokens chose each expert."""
        return self.uses().sum(axis=(0, 1), dtype=jnp.int32)

    def slots(self) -> Int[Array, " choices"]:
        """Where each choice lies in the experts' input `[E * capacity]`, all different; beyond its end without room."""
        (num_tokens, top_k), num_experts = self.expert.shape, self.logits.shape[-1]
        index = jnp.arange(num_tokens * top_k, dtype=jnp.int32)
        real = jnp.repeat(self.real, top_k)
        expert = jnp.where(real, self.expert.reshape(-1), num_experts)  # padding comes last
        # A stable sort counts each choice inside its expert, without a [T, E, capacity] matrix of ones and zeros.
        in_order, order = jax.lax.sort((expert, index), num_keys=1, is_stable=True)
        load = self.load()
        start = jnp.cumulative_sum(load, dtype=jnp.int32) - load
        rank = index - start.at[in_order].get(mode="fill", fill_value=0)
        rank = jnp.zeros_like(index).at[order].set(rank, unique_indices=True)
        kept = real & (rank < self.room)
        return jnp.where(kept, expert * self.capacity + rank, num_experts * self.capacity + index)

    def routing(self, config: MixtureConfig) -> Routing:
        """What is to be told of it."""
        load, tokens, dtype = self.load(), self.real.sum(dtype=jnp.int32), self.logits.dtype
        count = jnp.maximum(tokens, 1).astype(dtype)
        probability = jnp.where(self.real[:, None], jax.nn.softmax(self.logits, axis=-1), 0).sum(axis=0) / count
        balance = config.num_experts * (load.astype(dtype) / (count * config.top_k) * probability).sum()
        z = jnp.where(self.real, jax.nn.logsumexp(self.logits, axis=-1) ** 2, 0).sum() / count
        loss = config.balance_weight * balance + config.z_weight * z
        return Routing(loss, balance, z, load, (load - jnp.minimum(load, self.room)).sum(dtype=jnp.int32), tokens)


def part_of(count: Any, part: int, whole: int) -> Any:
    """The ceiling of `part * count / whole`, with products that stay inside int32."""
    return part * (count // whole) - (-part * (count % whole)) // whole
