"""Where dropout begins to count in a call, for kernels that compute the random bits themselves."""

import jax.numpy as jnp
from jaxtyping import Array

from seqattn.kernels.call import Call


def first_counters(call: Call) -> Array:
    """Returns the row and the column at which dropout starts to count, for each batch row and head.

    The same counters as in every kernel: row (b * N + n) * T + t and column s, of the whole call.
    """
    batch, length, num_heads, _ = call.query.shape
    row, head = jnp.arange(batch, dtype=jnp.int32)[:, None], jnp.arange(num_heads, dtype=jnp.int32)[None]
    if (origin := call.origin) is None:
        first, column = (row * num_heads + head) * length, jnp.zeros((), jnp.int32)
    else:
        head = (row + origin.batch) * origin.num_heads + head + origin.head
        first, column = head * origin.length + origin.query, jnp.asarray(origin.key, jnp.int32)
    return jnp.stack([first, jnp.broadcast_to(column, first.shape)], axis=-1)
