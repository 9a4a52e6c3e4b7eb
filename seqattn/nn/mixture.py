"""Mixture of experts: many feed-forward networks, of which each token uses a few."""

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
"""In evaluation, arrays `[E, tokens, D]` and `[E, tokens, F]` are built for at most this many tokens."""


class Routed(nnx.Intermediate):
    """The kind of variable under which a layer sows its `Routing`; see `routings`."""


class MixtureOfExperts(nnx.Module):
    """Sparsely gated mixture of feed-forward networks (Shazeer 2017; Liu 2018, section 4.2).

    A linear gate computes a logit for each token and expert. The token goes through the `top_k` experts with the
    largest logits; ties go to the lower index. The output is the sum of their outputs, weighted by a softmax over these
    `top_k` logits. With `top_k` 1 the weight is 1, so the gate learns only from the routing's loss.

    A dropout key marks a training call. Then each expert has a capacity. If more tokens choose an expert than it has
    room for, it takes the earlier ones, in the order of `x` with its leading dimensions merged. It adds nothing to the
    others. Capacity is a fraction of all tokens of the call, so the texts of a batch are not independent: the choices
    of an earlier text may use up the room of a later one. A token depends on the number of the tokens after it, never
    on their content. Without a key there is no capacity, and no token depends on another.

    Without a capacity every expert computes every token. With more than 4096 tokens and no key, experts run one after
    another, so that memory is that of one expert; in all other cases they run together. If devices split the experts,
    running them one after another gathers each in turn.

    Args:
        model_dim: D, the size of input and output.
        hidden_dim: F, the size of each expert's hidden layer.
        config: the number of experts, the capacity and the losses.
        activation: the nonlinearity of the experts.
        gated: if True, multiplies the experts' hidden layer by an activated gate (Shazeer 2020).
        use_bias: if False, the layers of the experts have no biases.
        dropout_rate: dropout rate of the experts' hidden layer, in [0, 1). Applies only in calls with a dropout key.
        param_dtype: dtype of the parameters. The gate computes in float32 or wider.
        rngs: initialises the parameters and is not kept. The experts `[E, ...]` start as `FeedForward`, the gate small
            (Fedus 2021, section 2.4), the weights of its noise at zero.

    Raises:
        ValueError: a size is below 1, or the dropout rate is not in [0, 1).

    >>> layer = MixtureOfExperts(4, 8, config=MixtureConfig(num_experts=3, noise=False), rngs=nnx.Rngs(0))
    >>> jax.jit(layer)(jnp.ones((2, 5, 4))).shape, layer.experts.hidden.kernel.shape
    ((2, 5, 4), (3, 4, 8))
    >>> routing = jax.jit(layer.route)(jnp.ones((2, 5, 4)), dropout_key=jax.random.key(0))
    >>> print(routing.load.sum(), routing.dropped)  # ten equal tokens choose two experts with room for ceil(8.3)
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
        use_bias: bool = True,
        dropout_rate: float = 0.0,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        self.config = config
        options: dict[str, Any] = {"activation": activation, "gated": gated, "use_bias": use_bias}
        options |= {"dropout_rate": dropout_rate}
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
        """Maps `[*batch, D]` to `[*batch, D]`. Without a dropout key: no dropout, no noise and no capacity.

        Args:
            x: the tokens.
            real: `[*batch]`, True for tokens that are not padding. Defaults to all. Padding uses no expert, takes no
                room and counts in no loss. It may hold any values, and its output is zeros.
            dropout_key: key for the noise and for dropout inside the experts. If given, the capacity applies.
        """
        noise_key, hidden_key = split(dropout_key, 2)
        tokens, choice = self._choose(x, real, noise_key)
        tell(self, Routed, lambda: choice.routing(self.config))
        if not tokens.shape[0]:
            return x
        # If the capacity holds all tokens, `room` holds all real ones, however few they are: no expert can be full.
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
        """Returns the routing of a call with these arguments, without running the experts."""
        _, choice = self._choose(x, real, split(dropout_key, 2)[0])
        return choice.routing(self.config)

    def _choose(self, x: Array, real: Array | None, key: PRNGKeyArray | None) -> tuple[Array, Choice]:
        """Returns the tokens `[T, D]`, with zeros for padding, and the choice of their experts."""
        tokens = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
        real = jnp.ones(tokens.shape[:1], bool) if real is None else real.reshape(tokens.shape[0])
        # Padding may hold NaN, which would reach the gate's gradient.
        tokens = jnp.where(real[:, None], tokens, jnp.zeros_like(tokens))
        logits = self._logits(tokens, key)
        # Only the indices of `top_k` are used. It replaces zeros of either sign by a constant, which has no gradient.
        _, expert = top_k(jax.lax.stop_gradient(logits), self.config.top_k)
        weight = jax.nn.softmax(jnp.take_along_axis(logits, expert, axis=-1), axis=-1)
        # `room` counts real tokens only, so that padding changes no result. `capacity` sizes arrays, so it counts all.
        share = (1, 1) if key is None else self.config.share
        room, capacity = (part_of(count, *share) for count in (real.sum(dtype=jnp.int32), tokens.shape[0]))
        return tokens, Choice(logits, expert, weight, real, room, capacity)

    def _logits(self, tokens: Float[Array, "T D"], key: PRNGKeyArray | None) -> Float[Array, "T E"]:
        # Rounding decides which logit is larger, so the gate computes in float32 or wider (Fedus 2021, section 2.4).
        exact = accumulator(tokens.dtype)
        tokens = tokens.astype(exact)
        logits = tokens @ self.gate.kernel[...].astype(exact)
        if self.noise is None or key is None:
            return logits
        # Shazeer 2017, equation 4: trainable noise lets the gate explore other experts.
        deviation = jax.nn.softplus(tokens @ self.noise.kernel[...].astype(exact))
        return logits + deviation * jax.random.normal(key, logits.shape, exact)

    def _within_capacity(
        self, tokens: Float[Array, "T D"], choice: Choice, key: PRNGKeyArray | None
    ) -> Float[Array, "T D"]:
        """Runs each expert on the tokens that it has room for."""
        size, slot = self.config.num_experts * choice.capacity, choice.slots()
        # An empty slot reads past the last token, and the gather fills it with zeros.
        # Invert the map from choices to slots. Gathers by index cost O(T K D), one-hot products O(T E capacity D).
        owner = jnp.arange(slot.size, dtype=jnp.int32) // self.config.top_k
        token = jnp.full(size, tokens.shape[0], jnp.int32).at[slot].set(owner, mode="drop", unique_indices=True)
        taken = tokens.at[token].get(mode="fill", fill_value=0)
        taken = taken.reshape(self.config.num_experts, choice.capacity, tokens.shape[-1])
        # All experts run on equal shapes `[capacity, D]`: one batched product serves them, and devices can split E.
        output = jax.vmap(_apply)(self.experts, taken, self._keys(key)).reshape(size, tokens.shape[-1])
        # A choice without room has a slot past the end and adds zeros: only the residual connection carries its token.
        parts = output.at[slot].get(mode="fill", fill_value=0, unique_indices=True)
        parts = parts.reshape(*choice.weight.shape, tokens.shape[-1]).astype(choice.weight.dtype)
        return (parts * choice.weight[..., None]).sum(axis=1).astype(output.dtype)

    def _without_limit(
        self, tokens: Float[Array, "T D"], choice: Choice, key: PRNGKeyArray | None
    ) -> Float[Array, "T D"]:
        """Runs each expert on all tokens, and sums the outputs of the experts that each token chose."""

        def part(expert: FeedForward, key: PRNGKeyArray | None, chosen: Array, weight: Array) -> Array:
            output = _apply(expert, tokens, key)
            # `where` rather than a weight of 0: an expert that the token did not choose may give NaN.
            return jnp.where(chosen[:, None], output.astype(weight.dtype) * weight[:, None], 0)

        uses = choice.uses()
        weight = jnp.where(uses, choice.weight[..., None], 0).sum(axis=1)
        given = self.experts, self._keys(key), uses.any(axis=1).T, weight.T
        # A scan holds the activations of one expert at a time. With a key, gradients would keep all of them anyway.
        if key is None and may_exceed(tokens.shape[0], _MOST_TOGETHER):
            total = jnp.zeros(tokens.shape, weight.dtype)
            total, _ = jax.lax.scan(lambda total, given: (total + part(*given), None), total, given)
        else:
            total = jax.vmap(part)(*given).sum(axis=0)
        return total.astype(jnp.result_type(tokens, self.experts.output.kernel[...]))

    def _keys(self, key: PRNGKeyArray | None) -> Array | None:
        """Splits the key into one per expert."""
        return None if key is None else jax.random.split(key, self.config.num_experts)


def _apply(expert: FeedForward, x: Float[Array, "T D"], key: PRNGKeyArray | None) -> Float[Array, "T D"]:
    return expert(x, dropout_key=key)


def routings(call: Callable[..., Output], model: nnx.Module, *args: Any, **kwargs: Any) -> tuple[Output, list[Routing]]:
    """Runs `call(model, *args, **kwargs)` and collects the routing of each call of a mixture layer.

    `call` gets a copy of the model, so changes that it makes to the model are lost. `routings` works inside `jax.jit`,
    `jax.grad`, `jax.vmap` and `jax.pmap`. Routings cannot leave such a transformation inside `call`: a layer that is an
    argument of `jax.jit` or `jax.checkpoint` there does not report. `nnx.remat` in the tree mode of NNX returns them.

    Args:
        call: the function to run.
        model: the model whose mixture layers report.
        *args: further arguments of `call`.
        **kwargs: further arguments of `call`.

    Returns:
        The output of `call`, and the routings in the order of the layers' paths in the model.

    Raises:
        ValueError: the model has mixture layers and none reported a routing.

    >>> layer = MixtureOfExperts(4, 8, config=MixtureConfig(num_experts=3), rngs=nnx.Rngs(0))
    >>> twice = lambda layer, x: layer(layer(x))
    >>> output, found = jax.jit(routings, static_argnums=0)(twice, layer, jnp.ones((5, 4)))
    >>> len(found), found[0].load.shape
    (2, (3,))
    """
    output, (sown,) = captured(call, [Routed], model, *args, **kwargs)
    return output, routings_among(sown, model)


def routings_among(sown: Any, model: nnx.Module) -> list[Routing]:
    """Extracts from sown values the routings of a model's mixture layers; see `routings`."""
    found = jax.tree.leaves(sown, is_leaf=lambda node: isinstance(node, Routing))
    layers = [module for _, module in nnx.iter_modules(model) if isinstance(module, MixtureOfExperts)]
    if layers and not found:
        raise ValueError(
            f"none of the {len(layers)} mixture layers gave its routing: none was called, or the called ones were "
            "copies, as inside jax.jit(call)(model) or jax.checkpoint(call)(model)"
        )
    return found
