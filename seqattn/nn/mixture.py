"""A mixture of experts: many feed-forward networks, of which each token uses a few."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from seqattn.dropout import split
from seqattn.nn.capture import Output, captured, tell
from seqattn.nn.feed_forward import Activation, FeedForward
from seqattn.nn.initializers import drawn_wide
from seqattn.nn.parameter_rule import INTO, OUT_OF, Kind, ParameterRule
from seqattn.nn.routing import Choice, MixtureConfig, Routing, part_of
from seqattn.precision import accumulator
from seqattn.sizes import may_exceed
from seqattn.top_k import top_k

RULES = (
    ParameterRule("*/experts/*/bias", Kind.VECTOR, P("expert")),
    # `[E, F, D]` and `[E, D, F]`.
    ParameterRule("*/experts/output/kernel", Kind.MATRIX, P("expert", *OUT_OF)),
    ParameterRule("*/experts/*/kernel", Kind.MATRIX, P("expert", *INTO)),
    ParameterRule("*feed_forward/noise/kernel", Kind.MATRIX, P("fsdp")),
)

_MOST_TOGETHER = 4096
"""Of so many tokens at most `[E, tokens, D]` and `[E, tokens, F]` are made at once in evaluation."""


class Routed(nnx.Intermediate):
    """The kind of variable as which a layer sows its `Routing`: see `routings`."""


class MixtureOfExperts(nnx.Module):
    """Sparsely gated mixture of feed-forward networks (Shazeer 2017; Liu 2018, section 4.2).

    A linear gate gives each token a logit for each expert. The token goes through the `top_k` experts of the largest
    logits, of equal ones the first, and the output is their sum, weighted by a softmax over these logits alone. With
    `top_k` 1 that weight is 1, so the gate learns from the routing's loss only.

    In a call with a dropout key, that is in training, an expert that more tokens choose than its capacity takes the
    earlier ones, in the order of `x` with its leading dims joined; to the others it adds nothing. Its room is a share
    of all tokens of the call. So then the texts of a batch are not independent: what an earlier one chose may leave no
    room to a later one. Of the tokens behind it a token depends on their number, never on what they are. Without a key
    there is no capacity, and no token depends on another.

    Where there is no capacity every expert computes every token: without a key and with more than 4096 tokens one
    expert after the other, so that memory is that of one, else all at once. One after the other, experts that are
    split over devices are gathered, each in its turn.

    Args:
        model_dim: D, the size of input and output.
        hidden_dim: F, the size of each expert's hidden layer.
        config: how many experts, and who may use them.
        activation: the nonlinearity of the experts.
        gated: multiply the experts' hidden layer by an activated gate.
        dropout_rate: of the experts' hidden layer, where a call has a dropout key.
        param_dtype: dtype of the parameters; the gate computes in float32 at least.
        rngs: initialises the parameters; not kept. The experts `[E, ...]` as `FeedForward`, the gate small as in
            Fedus 2021 (section 2.4), its noise at zero weights.

    Raises:
        ValueError: a size is below 1, or the rate is not a probability.

    >>> layer = MixtureOfExperts(4, 8, config=MixtureConfig(num_experts=3, noise=False), rngs=nnx.Rngs(0))
    >>> jax.jit(layer)(jnp.ones((2, 5, 4))).shape, layer.experts.hidden.kernel.shape
    ((2, 5, 4), (3, 4, 8))
    >>> routing = jax.jit(layer.route)(jnp.ones((2, 5, 4)), dropout_key=jax.random.key(0))
    >>> print(routing.load.sum(), routing.dropped)  # ten equal tokens, of which two experts take ceil(8.3) each
    20 2
    """

    def __init__(
        self,
        model_dim: int,
        hidden_dim: int,
        *,
        config: MixtureConfig,
        activation: Activation = Activation.RELU,
        gated: bool = False,
        dropout_rate: float = 0.0,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        self.config = config
        options: dict[str, Any] = {"activation": activation, "gated": gated, "dropout_rate": dropout_rate}
        linear: dict[str, Any] = {"use_bias": False, "param_dtype": param_dtype, "rngs": rngs}
        small = drawn_wide(nnx.initializers.variance_scaling(0.1, "fan_in", "truncated_normal"))
        zeros = nnx.initializers.zeros

        def expert(key: PRNGKeyArray) -> FeedForward:
            return FeedForward(model_dim, hidden_dim, **options, param_dtype=param_dtype, rngs=nnx.Rngs(key))

        self.experts = jax.vmap(expert)(jax.random.split(rngs.params(), config.num_experts))
        self.gate = nnx.Linear(model_dim, config.num_experts, kernel_init=small, **linear)
        self.noise = nnx.Linear(model_dim, config.num_experts, kernel_init=zeros, **linear) if config.noise else None

    def __call__(
        self,
        x: Float[Array, "*batch D"],
        *,
        real: Bool[Array, "*batch"] | None = None,
        dropout_key: PRNGKeyArray | None = None,
    ) -> Float[Array, "*batch D"]:
        """`[*batch, D]` to `[*batch, D]`. Without a dropout key nothing drops, no token either, and no noise is added.

        Args:
            x: the tokens.
            real: which of them are not padding, `[*batch]`; all of them by default. Padding uses no expert, takes no
                room and counts in no loss; it may hold anything, and gives zeros.
            dropout_key: for the noise and for dropout inside the experts; with it the capacity holds.
        """
        noise_key, hidden_key = split(dropout_key, 2)
        tokens, choice = self._choose(x, real, noise_key)
        tell(self, Routed, lambda: choice.routing(self.config))
        if not tokens.shape[0]:
            return x
        # A capacity of all tokens is room for all real ones too, however few they are.
        limited = may_exceed(tokens.shape[0], choice.capacity)
        mixed = self._within_capacity if limited else self._without_limit
        return mixed(tokens, choice, hidden_key).reshape(x.shape)

    def route(
        self,
        x: Float[Array, "*batch D"],
        *,
        real: Bool[Array, "*batch"] | None = None,
        dropout_key: PRNGKeyArray | None = None,
    ) -> Routing:
        """How a call with these arguments shares its tokens."""
        _, choice = self._choose(x, real, split(dropout_key, 2)[0])
        return choice.routing(self.config)

    def _choose(self, x: Array, real: Array | None, key: PRNGKeyArray | None) -> tuple[Array, Choice]:
        """The tokens `[T, D]`, padding as zeros, and their experts."""
        tokens = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
        real = jnp.ones(tokens.shape[:1], bool) if real is None else real.reshape(tokens.shape[0])
        tokens = jnp.where(real[:, None], tokens, jnp.zeros_like(tokens))
        logits = self._logits(tokens, key)
        # Only the places: where `top_k` makes every zero the same zero, it has no gradient.
        _, expert = top_k(jax.lax.stop_gradient(logits), self.config.top_k)
        weight = jax.nn.softmax(jnp.take_along_axis(logits, expert, axis=-1), axis=-1)
        # Room by the number of real tokens, so that padding changes nothing; capacity, the array's size, by all.
        share = (1, 1) if key is None else self.config.share
        room, capacity = (part_of(count, *share) for count in (real.sum(dtype=jnp.int32), tokens.shape[0]))
        return tokens, Choice(logits, expert, weight, real, room, capacity)

    def _logits(self, tokens: Float[Array, "T D"], key: PRNGKeyArray | None) -> Float[Array, "T E"]:
        exact = accumulator(tokens.dtype)
        tokens = tokens.astype(exact)
        logits = tokens @ self.gate.kernel[...].astype(exact)
        if self.noise is None or key is None:
            return logits
        deviation = jax.nn.softplus(tokens @ self.noise.kernel[...].astype(exact))
        return logits + deviation * jax.random.normal(key, logits.shape, exact)

    def _within_capacity(
        self, tokens: Float[Array, "T D"], choice: Choice, key: PRNGKeyArray | None
    ) -> Float[Array, "T D"]:
        """Each expert on the tokens that it has room for."""
        size, slot = self.config.num_experts * choice.capacity, choice.slots()
        # A slot that nobody takes reads beyond the tokens, which gives zeros.
        owner = jnp.arange(slot.size, dtype=jnp.int32) // self.config.top_k
        token = jnp.full(size, tokens.shape[0], jnp.int32).at[slot].set(owner, mode="drop", unique_indices=True)
        taken = tokens.at[token].get(mode="fill", fill_value=0)
        taken = taken.reshape(self.config.num_experts, choice.capacity, tokens.shape[-1])
        output = jax.vmap(_apply)(self.experts, taken, self._keys(key)).reshape(size, tokens.shape[-1])
        parts = output.at[slot].get(mode="fill", fill_value=0, unique_indices=True)
        parts = parts.reshape(*choice.weight.shape, tokens.shape[-1]).astype(choice.weight.dtype)
        return (parts * choice.weight[..., None]).sum(axis=1).astype(output.dtype)

    def _without_limit(
        self, tokens: Float[Array, "T D"], choice: Choice, key: PRNGKeyArray | None
    ) -> Float[Array, "T D"]:
        """Each expert on all tokens, of which those count that chose it."""

        def part(expert: FeedForward, key: PRNGKeyArray | None, chosen: Array, weight: Array) -> Array:
            output = _apply(expert, tokens, key)
            return jnp.where(chosen[:, None], output.astype(weight.dtype) * weight[:, None], 0)

        uses = choice.uses()
        weight = jnp.where(uses, choice.weight[..., None], 0).sum(axis=1)
        given = self.experts, self._keys(key), uses.any(axis=1).T, weight.T
        if key is None and may_exceed(tokens.shape[0], _MOST_TOGETHER):
            total = jnp.zeros(tokens.shape, weight.dtype)
            total, _ = jax.lax.scan(lambda total, given: (total + part(*given), None), total, given)
        else:
            total = jax.vmap(part)(*given).sum(axis=0)
        return total.astype(jnp.result_type(tokens, self.experts.output.kernel[...]))

    def _keys(self, key: PRNGKeyArray | None) -> Array | None:
        """One for each expert."""
        return None if key is None else jax.random.split(key, self.config.num_experts)


def _apply(expert: FeedForward, x: Float[Array, "T D"], key: PRNGKeyArray | None) -> Float[Array, "T D"]:
    return expert(x, dropout_key=key)


def routings(call: Callable[..., Output], model: nnx.Module, *args: Any, **kwargs: Any) -> tuple[Output, list[Routing]]:
    """`call(model, *args, **kwargs)`, and the routing of each call of a mixture layer of the model inside it.

    They are in the order of the layers' paths in the model. `call` gets a copy of the model, so what it changes there
    is gone. This may stand inside `jax.jit`, `jax.grad`, `jax.vmap` and `jax.pmap`, but routings do not leave such a
    transformation inside `call`: a layer that goes through `jax.jit` or `jax.checkpoint` as an argument keeps them to
    itself. `nnx.remat` brings them back, in the tree mode of NNX.

    Raises:
        ValueError: the model has mixture layers and no routing came back.

    >>> layer = MixtureOfExperts(4, 8, config=MixtureConfig(num_experts=3), rngs=nnx.Rngs(0))
    >>> twice = lambda layer, x: layer(layer(x))
    >>> output, found = jax.jit(routings, static_argnums=0)(twice, layer, jnp.ones((5, 4)))
    >>> len(found), found[0].load.shape
    (2, (3,))
    """
    output, (sown,) = captured(call, [Routed], model, *args, **kwargs)
    return output, routings_among(sown, model)


def routings_among(sown: Any, model: nnx.Module) -> list[Routing]:
    """The routings that the mixture layers of a model sowed; see `routings`."""
    found = jax.tree.leaves(sown, is_leaf=lambda node: isinstance(node, Routing))
    layers = [module for _, module in nnx.iter_modules(model) if isinstance(module, MixtureOfExperts)]
    if layers and not found:
        raise ValueError(
            f"none of the {len(layers)} mixture layers gave its routing: either none was called, or all were copies, "
            "as inside jax.jit(call)(model) or jax.checkpoint(call)(model)"
        )
    return found
