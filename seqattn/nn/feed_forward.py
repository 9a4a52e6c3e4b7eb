"""The position-wise feed-forward network of a Transformer block."""

import enum

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, PRNGKeyArray

from seqattn.checks import check_rate, check_sizes
from seqattn.dropout import drop
from seqattn.nn.linear import Linear
from seqattn.nn.parameter_rule import INTO, OUT_OF, Kind, ParameterRule

RULES = (
    # `tensor` splits the hidden layer F; the output layer sums over it.
    ParameterRule("*feed_forward/output/kernel", Kind.MATRIX, OUT_OF),
    ParameterRule("*feed_forward/*/kernel", Kind.MATRIX, INTO),
)


class Activation(enum.Enum):
    """Nonlinearity of a feed-forward network. GELU is the tanh approximation (Hendrycks 2016), EXACT_GELU is not."""

    RELU = "relu"
    GELU = "gelu"
    EXACT_GELU = "exact_gelu"
    SILU = "silu"
    TANH = "tanh"

    def __call__(self, x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        """Applies the activation to each element."""
        if self is Activation.EXACT_GELU:
            return jax.nn.gelu(x, approximate=False)
        return {"relu": jax.nn.relu, "gelu": jax.nn.gelu, "silu": jax.nn.silu, "tanh": jnp.tanh}[self.value](x)


class FeedForward(nnx.Module):
    """Position-wise feed-forward network `W2 act(W1 x + b1) + b2` (Vaswani 2017, equation 2).

    If gated, `W2 (act(Wg x + bg) * (W1 x + b1)) + b2` (Shazeer 2020): GELU gives GEGLU, SILU gives SwiGLU.

    Args:
        model_dim: D, the size of input and output.
        hidden_dim: F, the size of the hidden layer.
        activation: the nonlinearity.
        gated: if True, multiplies the hidden layer by an activated gate.
        use_bias: if False, the layers have no biases `b1`, `b2` and `bg` (T5: Raffel 2020).
        dropout_rate: dropout rate of the hidden layer, in [0, 1). Applies only in calls with a dropout key.
        param_dtype: dtype of the parameters.
        rngs: initialises the parameters (Xavier uniform) and is not kept.

    Raises:
        ValueError: a size is below 1, or the dropout rate is not in [0, 1).

    >>> network = FeedForward(4, 8, activation=Activation.GELU, gated=True, rngs=nnx.Rngs(0))
    >>> network(jnp.ones((2, 3, 4))).shape
    (2, 3, 4)
    """

    def __init__(
        self,
        model_dim: int,
        hidden_dim: int,
        *,
        activation: Activation = Activation.RELU,
        gated: bool = False,
        use_bias: bool = True,
        dropout_rate: float = 0.0,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        check_rate(dropout_rate)
        check_sizes(model_dim=model_dim, hidden_dim=hidden_dim)
        self.activation, self.dropout_rate = activation, dropout_rate

        def linear(inputs: int, outputs: int) -> Linear:
            init = nnx.initializers.xavier_uniform()
            return Linear(inputs, outputs, use_bias=use_bias, kernel_init=init, param_dtype=param_dtype, rngs=rngs)

        self.hidden = linear(model_dim, hidden_dim)
        self.gate = linear(model_dim, hidden_dim) if gated else None
        self.output = linear(hidden_dim, model_dim)

    def __call__(
        self, x: Float[Array, "*batch D"], *, dropout_key: PRNGKeyArray | None = None
    ) -> Float[Array, "*batch D"]:
        """Maps `[*batch, D]` to `[*batch, D]`. Without a dropout key, nothing is dropped."""
        if self.gate is None:
            hidden = self.activation(self.hidden(x))
        else:
            hidden = self.activation(self.gate(x)) * self.hidden(x)
        return self.output(drop(hidden, self.dropout_rate, dropout_key))
