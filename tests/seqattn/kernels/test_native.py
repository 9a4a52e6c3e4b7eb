"""Masks in the words of vendors: what has such a form, and that it says the same."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from seqattn.coordinates import Coordinates
from seqattn.kernels.native import Native
from seqattn.masks import Causal, Dilated, NotPadding, Prefix, SameSegment, SlidingWindow
from tests.mask_trees import coordinates, mask_trees
from tests.vendor_calls import at, lengths, text


def _said(native, length, size):
    """Who may attend by the fields, `[rows, T, S]`; read as the documentation of `Native` says."""
    back = np.arange(length)[:, None] - np.arange(size)[None]
    pairs = np.ones((1, length, size), bool)
    pairs &= (native.left is None or back <= native.left) & (native.right is None or -native.right <= back)
    if native.query_lengths is not None:
        pairs = pairs & (np.arange(length)[None, :, None] < native.query_lengths[:, None, None])
    if native.key_lengths is not None:
        pairs = pairs & (np.arange(size)[None, None, :] < native.key_lengths[:, None, None])
    return pairs


def _is_exact(native, mask, q_at, kv_at):
    length, size = q_at.shape[-1], kv_at.shape[-1]
    dense = np.asarray(mask.dense(q_at, kv_at))
    first, last = native.ends(length, size)
    between = (first[:, :, None] <= np.arange(size)) & (np.arange(size) < last[:, :, None])
    np.testing.assert_array_equal(*np.broadcast_arrays(_said(native, length, size), dense))
    np.testing.assert_array_equal(*np.broadcast_arrays(between, dense))


WINDOWS = [SlidingWindow(size, ahead) for size in (1, 2, 4) for ahead in (0, 1, 3)]


@pytest.mark.parametrize("mask", [Causal(), *WINDOWS, *(Causal() & window for window in WINDOWS)], ids=repr)
def test_every_band_is_served_unless_it_misses_the_diagonal(mask):
    for length, size, start in itertools.product((1, 2, 5), (1, 3, 5), (-2, 0, 1, 4)):
        q_at, kv_at = text(length, start), text(size)
        try:
            native = Native.of(mask, q_at, kv_at)
        except NotImplementedError:
            assert not mask.dense(q_at, kv_at)[0, 0, 0]
            continue
        _is_exact(native, mask, q_at, kv_at)


@given(mask_trees(), coordinates(4), coordinates(5), st.booleans())
def test_what_is_served_is_what_the_mask_says(pair, q_at, kv_at, runs):
    mask, (q_at, kv_at) = pair[0], (jax.tree.map(lambda x: x[None], at) for at in (q_at, kv_at))
    if runs:
        q_at, kv_at = (Coordinates(np.arange(at.shape[-1])[None], at.segment) for at in (q_at, kv_at))
    try:
        native = Native.of(mask, q_at, kv_at)
    except NotImplementedError:
        return
    _is_exact(native, mask, q_at, kv_at)


@pytest.mark.parametrize(
    ("mask", "q_at", "kv_at", "expected"),
    [
        (None, text(5), text(7), Native()),
        (Causal(), text(5), text(5), Native(right=0)),
        (Causal(), text(5), text(7), Native(right=0)),
        (Causal(), text(2, start=5), text(7), Native(right=5)),
        (Causal(), text(1, start=6), text(7), Native()),
        (Causal() & SlidingWindow(3), text(5), text(5), Native(left=2, right=0)),
        (Causal() & SlidingWindow(3, ahead=2), text(5), text(5), Native(left=2, right=0)),
        (SlidingWindow(3, ahead=1), text(5), text(5), Native(left=2, right=1)),
        (SlidingWindow(5, ahead=4), text(5), text(5), Native()),
        (SameSegment() & NotPadding(), text(5), text(5), Native()),
    ],
    ids=str,
)
def test_what_is_asked_for(mask, q_at, kv_at, expected):
    assert Native.of(mask, q_at, kv_at) == expected


@pytest.mark.parametrize("part", [NotPadding(), SameSegment()], ids=repr)
def test_padding_behind_the_tokens_is_lengths(part):
    q_at, kv_at = lengths([5], 5), lengths([3, 7], 7)
    native = Native.of(Causal() & part, q_at, kv_at)
    assert (native.right, native.query_lengths) == (0, None)
    np.testing.assert_array_equal(native.key_lengths, [3, 7])
    _is_exact(native, Causal() & part, q_at, kv_at)


TRACED = Coordinates(jnp.arange(5)[None], jnp.ones((1, 5), jnp.int32))


@pytest.mark.parametrize(
    ("mask", "q_at", "kv_at", "reason"),
    [
        (Prefix(2), text(5), text(5), "Prefix is no causal mask"),
        (Causal() & (Causal() | Dilated(2)), text(5), text(5), "Or is no causal mask"),
        (~Causal(), text(5), text(5), "Not is no causal mask"),
        (Causal(), TRACED, text(5), "Causal reads are not known at trace time"),
        (NotPadding(), text(5), TRACED, "NotPadding reads are not known at trace time"),
        (SlidingWindow(2), text(5, start=3), text(5), "before the diagonal"),
        (Causal(), text(5, start=-1), text(5), "before the diagonal"),
        (Causal(), Coordinates(np.array([[0, 1, 0]]), np.ones((1, 3), int)), text(5), "do not count up alike"),
        (SameSegment(), at(0, [[1, 1, 2]]), at(0, [[1, 1, 2]]), "more than one text"),
        (SameSegment(), at(0, [[1, 1, 1]]), at(0, [[2, 2, 2]]), "more than one text"),
        (NotPadding(), at(0, [[0, 1, 1]]), text(3), "padding before a token"),
    ],
)
def test_what_has_no_native_form(mask, q_at, kv_at, reason):
    with pytest.raises(NotImplementedError, match=reason):
        Native.of(mask, q_at, kv_at)
