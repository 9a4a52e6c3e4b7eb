"""Calls of attention for the tests of vendors' kernels, and jax.nn with its XLA in the place of each of them."""

import jax
import jax.numpy as jnp
import numpy as np

from seqattn.coordinates import Coordinates
from tests.contract import Shape

SHAPE = Shape(T=10, S=14, N=4, K=2, H=8, V=8)
SQUARE = Shape(T=10, S=10, N=4, K=2, H=8, V=8)


def at(start, segments):
    segment = np.asarray(segments, np.int32)
    position = np.arange(start, start + segment.shape[1], dtype=np.int32)
    return Coordinates(np.array(np.broadcast_to(position, segment.shape)), segment)


def text(length, start=0):
    return at(start, [[1] * length])


def lengths(lengths, length):
    return at(0, [[1] * n + [0] * (length - n) for n in lengths])


def spy(monkeypatch):
    """Puts XLA in the place of every implementation of jax.nn; tells with which options it was last called."""
    asked, real = {}, jax.nn.dot_product_attention

    def spy(query, key, value, bias=None, **options):
        asked.update(options, **({} if bias is None else {"bias": bias}))
        wide = [x.astype(jnp.float32) for x in (query, key, value)]
        return real(*wide, bias, **options | {"implementation": "xla"}).astype(query.dtype)

    monkeypatch.setattr(jax.nn, "dot_product_attention", spy)
    return asked
