"""Converts recurrent layers of PyTorch: `torch.nn.RNN` with tanh, `torch.nn.GRU` and `torch.nn.LSTM`. Arrays only.

PyTorch adds two biases per gate. Ours have one, except for the candidate state of a GRU, whose second bias is inside
the reset gate.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from seqattn.nn.recurrent import Cell, Recurrent

_GATES = {Cell.SIMPLE: 1, Cell.GRU: 3, Cell.LSTM: 4}


def recurrent_from_torch(
    cell: Cell,
    weight_ih: np.ndarray,
    weight_hh: np.ndarray,
    bias_ih: np.ndarray | None = None,
    bias_hh: np.ndarray | None = None,
    *,
    backward: bool = False,
    param_dtype: DTypeLike = jnp.float32,
) -> Recurrent:
    """Returns a recurrent layer with the parameters of one layer and direction of PyTorch.

    G is the number of gates, H the hidden size, D the input size. The gates are in PyTorch's order: reset, update, new
    for a GRU; input, forget, cell, output for an LSTM.

    Args:
        cell: the kind of cell; SIMPLE for `torch.nn.RNN`, whose nonlinearity must be tanh.
        weight_ih: `[G * H, D]`, PyTorch's `weight_ih_l0`.
        weight_hh: `[G * H, H]`, PyTorch's `weight_hh_l0`.
        bias_ih: `[G * H]`; None for zeros, as in a layer with `bias=False`.
        bias_hh: `[G * H]`; None for zeros.
        backward: if True, reads from the last token to the first, as PyTorch's arrays with `_reverse` in their names
            do.
        param_dtype: dtype of the parameters.

    Raises:
        ValueError: an array has the wrong shape.

    >>> weights = np.ones((3 * 4, 5)), np.ones((3 * 4, 4))
    >>> layer = recurrent_from_torch(Cell.GRU, *weights, bias_hh=np.arange(12.0))
    >>> print(layer.cell.dense_i.bias[...], layer.cell.hidden_bias[...])
    [0. 1. 2. 3. 4. 5. 6. 7. 0. 0. 0. 0.] [ 8.  9. 10. 11.]
    """
    for name, weight in (("weight_ih", weight_ih), ("weight_hh", weight_hh)):
        if np.ndim(weight) != 2:
            raise ValueError(f"{name} of {cell.name} must have 2 dims, got {list(np.shape(weight))}")
    hidden, dim = np.shape(weight_hh)[1], np.shape(weight_ih)[1]
    rows = _GATES[cell] * hidden
    bias_ih, bias_hh = (np.zeros(rows) if bias is None else np.asarray(bias) for bias in (bias_ih, bias_hh))
    wanted = {"weight_ih": (rows, dim), "weight_hh": (rows, hidden), "bias_ih": (rows,), "bias_hh": (rows,)}
    for (name, shape), array in zip(wanted.items(), (weight_ih, weight_hh, bias_ih, bias_hh), strict=True):
        if np.shape(array) != shape:
            raise ValueError(f"{name} of {cell.name} must be {list(shape)}, got {list(np.shape(array))}")
    arrays = _biases(cell, bias_ih, bias_hh)
    arrays |= {("dense_i", "kernel"): np.asarray(weight_ih).T, ("dense_h", "kernel"): np.asarray(weight_hh).T}
    options: dict[str, Any] = {"cell": cell, "backward": backward, "param_dtype": param_dtype}
    graph, state = nnx.split(nnx.eval_shape(lambda: Recurrent(dim, hidden, **options, rngs=nnx.Rngs(0))))
    filled = nnx.map_state(lambda path, empty: empty.replace(jnp.asarray(arrays[path[1:]], empty.dtype)), state)
    return nnx.merge(graph, filled)


def _biases(cell: Cell, bias_ih: np.ndarray, bias_hh: np.ndarray) -> dict[tuple[str, ...], np.ndarray]:
    """Returns PyTorch's biases by their paths in our cell."""
    if cell is not Cell.GRU:
        return {("dense_i" if cell is Cell.SIMPLE else "dense_h", "bias"): bias_ih + bias_hh}
    (r_in, z_in, n_in), (r_hidden, z_hidden, n_hidden) = np.split(bias_ih, 3), np.split(bias_hh, 3)
    return {("dense_i", "bias"): np.concatenate([r_in + r_hidden, z_in + z_hidden, n_in]), ("hidden_bias",): n_hidden}
