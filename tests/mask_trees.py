"""Random masks with what they mean, written again on Python integers, and random coordinates."""

import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st

from seqattn.coordinates import Coordinates
from seqattn.mask import MaskMod
from seqattn.masks import Causal, Dilated, NotPadding, Prefix, SameBlock, SameSegment, SlidingWindow


def _window(size, ahead):
    return SlidingWindow(size, ahead), lambda qp, qs, kp, ks: kp in range(qp - size + 1, qp + ahead + 1)


def _prefix(length, as_array):
    return Prefix(jnp.array(length) if as_array else length), lambda qp, qs, kp, ks: kp < length


def _dilated(step):
    return Dilated(step), lambda qp, qs, kp, ks: abs(qp - kp) in range(0, 1000, step)


def _block(size):
    return SameBlock(size), lambda qp, qs, kp, ks: qp // size == kp // size


def _table(seed):
    table = np.random.default_rng(seed).random((10, 10)) < 0.5
    mask = MaskMod(lambda query, key, table: table[query.position, key.position], jnp.array(table))
    return mask, lambda qp, qs, kp, ks: bool(table[qp, kp])


PRIMITIVES = st.one_of(
    st.just((Causal(), lambda qp, qs, kp, ks: kp <= qp)),
    st.just((SameSegment(), lambda qp, qs, kp, ks: qs == ks and qs != 0)),
    st.just((NotPadding(), lambda qp, qs, kp, ks: 0 not in (qs, ks))),
    st.builds(_window, st.integers(1, 6), st.integers(0, 3)),
    st.builds(_prefix, st.integers(0, 9), st.booleans()),
    st.builds(_dilated, st.integers(1, 5)),
    st.builds(_block, st.integers(1, 5)),
    st.builds(_table, st.integers(0, 3)),
)


def _both(a, b):
    return a[0] & b[0], lambda *pair: a[1](*pair) and b[1](*pair)


def _either(a, b):
    return a[0] | b[0], lambda *pair: a[1](*pair) or b[1](*pair)


def _inverse(a):
    return ~a[0], lambda *pair: not a[1](*pair)


def mask_trees(max_leaves: int = 5) -> st.SearchStrategy:
    """Pairs of a `Mask` and the predicate `(query position, query segment, key position, key segment) -> bool`."""
    return st.recursive(
        PRIMITIVES,
        lambda inner: st.one_of(
            st.builds(_both, inner, inner), st.builds(_either, inner, inner), st.builds(_inverse, inner)
        ),
        max_leaves=max_leaves,
    )


def coordinates(length: int) -> st.SearchStrategy:
    """Positions 0 to 9 and segments -1 to 3, in any order or in runs, as NumPy arrays: known at trace time."""

    def fields(low, high):
        numbers = st.integers(low, high)
        any_order = st.lists(numbers, min_size=length, max_size=length)
        runs = st.lists(numbers, min_size=1, max_size=3).map(lambda few: np.repeat(few, length)[:: len(few)])
        return st.one_of(any_order, runs).map(lambda chosen: np.array(chosen, np.int32))

    return st.builds(Coordinates, fields(0, 9), fields(-1, 3))
