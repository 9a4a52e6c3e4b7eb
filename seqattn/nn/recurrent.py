"""Recurrent layers over sequences with padding anywhere, built on the cells of Flax."""

import enum
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike
from jaxtyping import Array, Float, PRNGKeyArray

from seqattn.checks import check_even, check_rate, check_sizes
from seqattn.coordinates import Coordinates
from seqattn.dropout import drop, split
from seqattn.nn.initializers import lecun_normal, orthogonal
from seqattn.nn.parameter_rule import Kind, ParameterRule

RULES = (
    # A split over `tensor` would need to gather the gates of each token before the next step.
    ParameterRule("*/cell/*/kernel", Kind.MATRIX, P("fsdp")),
)

Carry = Any
"""State of a cell: one array `[*batch, H]`, or two for an LSTM (cell, hidden)."""


class Cell(enum.Enum):
    """Recurrent cell: simple (Elman 1990), GRU (Cho 2014) or LSTM (Hochreiter 1997).

    The GRU follows PyTorch and cuDNN: the reset gate multiplies the recurrent product, including its bias.
    """

    SIMPLE = "simple"
    GRU = "gru"
    LSTM = "lstm"


class Direction(enum.Enum):
    """Reading direction of an encoder. BACKWARD reverses the source (Sutskever 2014); BOTH concatenates two halves."""

    FORWARD = "forward"
    BACKWARD = "backward"
    BOTH = "both"


class _GRUCell(nnx.GRUCell):
    """Flax's GRU cell with its missing bias b_hn: `n = tanh(W_in x + b_in + r * (W_hn h + b_hn))`.

    `hidden_bias` is b_hn. Flax Linen and PyTorch have it, so their weights can be loaded. It starts at zero.
    """

    def __init__(self, in_features: int, hidden_features: int, *, param_dtype: DTypeLike, **options: Any) -> None:
        super().__init__(in_features, hidden_features, param_dtype=param_dtype, **options)
        self.hidden_bias = nnx.Param(jnp.zeros(hidden_features, param_dtype))

    def __call__(self, carry: Array, inputs: Array) -> tuple[Array, Array]:
        """Returns the next state twice: as the state and as the output."""
        r_in, z_in, n_in = jnp.split(self.dense_i(inputs), 3, axis=-1)
        r_hidden, z_hidden, n_hidden = jnp.split(self.dense_h(carry), 3, axis=-1)
        r, z = self.gate_fn(r_in + r_hidden), self.gate_fn(z_in + z_hidden)
        bias = self.hidden_bias[...].reshape((1,) * (n_hidden.ndim - 1) + (-1,))
        n_hidden, bias = self.promote_dtype((n_hidden, bias), dtype=self.dtype)
        n = self.activation_fn(n_in + r * (n_hidden + bias))
        state = (1.0 - z) * n + z * carry
        return state, state


_CELLS = {Cell.SIMPLE: nnx.SimpleCell, Cell.GRU: _GRUCell, Cell.LSTM: nnx.OptimizedLSTMCell}


class Recurrent(nnx.Module):
    """One recurrent layer.

    Padding (segment 0) is skipped: the state is held, the output is zeros, and the content of padding has no influence.
    A text of length 0 ends in the initial state, and reading backward starts at the last real token. If a new segment
    begins inside a row, the state restarts.

    Args:
        input_dim: D, the size of the input.
        hidden_dim: H, the size of state and output.
        cell: the recurrent cell.
        backward: if True, reads from the last token to the first.
        param_dtype: dtype of the parameters.
        rngs: initialises the parameters and is not kept.

    Raises:
        ValueError: a size is below 1.

    >>> layer = Recurrent(3, 4, cell=Cell.LSTM, rngs=nnx.Rngs(0))
    >>> output, (cell, hidden) = layer(jnp.ones((2, 5, 3)), Coordinates.from_lengths([5, 2], 5))
    >>> output.shape, hidden.shape
    ((2, 5, 4), (2, 4))
    """

    def __init__(
        self,
        input_dim: int,
        hidden_dim: int,
        *,
        cell: Cell = Cell.GRU,
        backward: bool = False,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        check_sizes(input_dim=input_dim, hidden_dim=hidden_dim)
        self.hidden_dim, self.backward, self.is_lstm = hidden_dim, backward, cell is Cell.LSTM
        # With dtype=None the cells promote the dtypes of inputs and parameters; Flax's simple cell defaults to float32.
        options: dict[str, Any] = {"dtype": None, "param_dtype": param_dtype, "rngs": rngs}
        options |= {"kernel_init": lecun_normal, "recurrent_kernel_init": orthogonal}
        self.cell = _CELLS[cell](input_dim, hidden_dim, **options)

    def start(self, batch: tuple[int, ...]) -> Carry:
        """Returns the initial state: zeros `[*batch, H]` in the dtype of the parameters."""
        zeros = jnp.zeros((*batch, self.hidden_dim), self.cell.dense_h.kernel.dtype)
        return (zeros, zeros) if self.is_lstm else zeros

    def step(self, carry: Carry, x: Float[Array, "*batch D"]) -> tuple[Carry, Float[Array, "*batch H"]]:
        """Reads one token `[*batch, D]` per row. Returns the next state and the output `[*batch, H]`."""
        return self.cell(carry, x)

    def __call__(
        self, x: Float[Array, "*batch T D"], at: Coordinates, carry: Carry = None
    ) -> tuple[Float[Array, "*batch T H"], Carry]:
        """Reads a sequence.

        Args:
            x: tokens `[*batch, T, D]`.
            at: their coordinates.
            carry: the state to start from. Defaults to `start`.

        Returns:
            Outputs `[*batch, T, H]`, and the last state `[*batch, H]`.
        """
        initial = self.start(x.shape[:-2]) if carry is None else carry
        # A scan needs one dtype for the state, although tokens and parameters may differ.
        dtype = jnp.result_type(x, self.cell.dense_h.kernel[...], *jax.tree.leaves(initial))
        initial = jax.tree.map(lambda state: state.astype(dtype), initial)
        segment = jnp.broadcast_to(at.segment, x.shape[:-1])
        # Padding may hold NaN, which the masked step would still carry into the gradients of the weights.
        x = jnp.where(segment[..., None] != 0, x, jnp.zeros_like(x))

        def advance(state: tuple[Carry, Array], token: tuple[Array, Array]) -> tuple[tuple[Carry, Array], Array]:
            (held, last), (vector, now) = state, token
            # `last` is the segment of the latest real token, so padding inside a text does not restart the state.
            new_text = (now != 0) & (last != 0) & (now != last)
            held = _select(new_text, initial, held)
            moved, output = self.step(held, vector)
            # The cell also runs on padding, as all rows step together. Its results are discarded.
            output = jnp.where(now[..., None] != 0, output, jnp.zeros_like(output))
            return (_select(now != 0, moved, held), jnp.where(now != 0, now, last)), output

        tokens = (jnp.moveaxis(x, -2, 0), jnp.moveaxis(segment, -1, 0))
        state = (initial, jnp.zeros(x.shape[:-2], segment.dtype))
        (last_carry, _), outputs = jax.lax.scan(advance, state, tokens, reverse=self.backward)
        return jnp.moveaxis(outputs, 0, -2), last_carry


def _select(where: Array, new: Carry, old: Carry) -> Carry:
    return jax.tree.map(lambda a, b: jnp.where(where[..., None], a, b), new, old)


class RecurrentEncoder(nnx.Module):
    """Stack of recurrent layers, each reading forward, backward or both ways.

    Args:
        input_dim: D, the size of the input.
        hidden_dim: H, the size of output and state. With `Direction.BOTH` each direction has half of it (Bahdanau 2014,
            section 3.2).
        num_layers: number of layers.
        cell: the recurrent cell.
        direction: reading direction.
        dropout_rate: dropout rate of the input of each layer except the first, in [0, 1) (Zaremba 2014). Applies only
            in calls with a dropout key.
        param_dtype: dtype of the parameters.
        rngs: initialises the parameters and is not kept.

    Raises:
        ValueError: `hidden_dim` is odd with `Direction.BOTH`, a size is below 1, or the dropout rate is not in [0, 1).
    """

    def __init__(
        self,
        input_dim: int,
        hidden_dim: int,
        *,
        num_layers: int = 1,
        cell: Cell = Cell.GRU,
        direction: Direction = Direction.FORWARD,
        dropout_rate: float = 0.0,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        check_rate(dropout_rate)
        check_sizes(num_layers=num_layers)
        if direction is Direction.BOTH:
            check_even("hidden_dim", hidden_dim, " to be shared by two directions")
        self.dropout_rate = dropout_rate
        backwards = {Direction.FORWARD: [False], Direction.BACKWARD: [True], Direction.BOTH: [False, True]}[direction]
        size = hidden_dim // len(backwards)

        def layer(inputs: int) -> list[Recurrent]:
            options: dict[str, Any] = {"cell": cell, "param_dtype": param_dtype, "rngs": rngs}
            return [Recurrent(inputs, size, backward=backward, **options) for backward in backwards]

        self.layers = nnx.List([nnx.List(layer(hidden_dim if index else input_dim)) for index in range(num_layers)])

    def __call__(
        self, x: Float[Array, "*batch T D"], at: Coordinates, *, dropout_key: PRNGKeyArray | None = None
    ) -> tuple[Float[Array, "*batch T H"], list[Carry]]:
        """Encodes a sequence.

        Args:
            x: tokens `[*batch, T, D]`.
            at: their coordinates.
            dropout_key: if None, nothing is dropped.

        Returns:
            Outputs `[*batch, T, H]` of the last layer, and the last state `[*batch, H]` of each layer.
        """
        carries = []
        for index, (layer, key) in enumerate(zip(self.layers, split(dropout_key, len(self.layers)), strict=True)):
            x = drop(x, self.dropout_rate, key) if index else x
            results = [direction(x, at) for direction in layer]
            x = jnp.concatenate([output for output, _ in results], axis=-1)
            # The states of both directions together have the size H that a decoder layer starts from.
            carries.append(jax.tree.map(lambda *parts: jnp.concatenate(parts, axis=-1), *[c for _, c in results]))
        return x, carries
