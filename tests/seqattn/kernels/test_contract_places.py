"""Masks and score functions that depend on the head, on the batch row, and on positions of two dimensions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqattn.attention import attend
from seqattn.coordinates import Coordinates
from seqattn.mask import MaskMod
from seqattn.masks import Causal, Neighborhood, Prefix
from seqattn.score_mod import ScoreFunction
from tests.contract import GROUPED, Shape, agrees_with_oracle, arrays, close, every_implementation, with_gradients

B, T, S, N = (*GROUPED.batch, GROUPED.T, GROUPED.S, GROUPED.N)
Q_AT, KV_AT = Coordinates.range(T, start=3), Coordinates.range(S)
AT = {"q_at": Q_AT, "kv_at": KV_AT}
Q, K = Q_AT.position[:, None], KV_AT.position
SIZES, LENGTHS = jnp.array([1, 9, 2, 5, 3, 4]), jnp.array([4, 9])
MASKS = {
    "head": (
        MaskMod(lambda query, key: query.position - key.position < SIZES[query.head]),
        np.stack([n > Q - K for n in np.asarray(SIZES)])[None],
    ),
    "row": (
        Causal() & MaskMod(lambda query, key, lengths: key.position < lengths[query.batch], LENGTHS),
        np.stack([(Q >= K) & (n > K) for n in np.asarray(LENGTHS)])[:, None],
    ),
    "both": (
        ~MaskMod(lambda query, key: (key.position + query.head) % 3 == query.batch),
        np.stack([[np.broadcast_to((K + n) % 3 != b, (T, S)) for n in range(N)] for b in range(B)]),
    ),
    "prefix": (Causal() | Prefix(LENGTHS), np.stack([(Q >= K) | (n > K) for n in np.asarray(LENGTHS)])[:, None]),
}


@every_implementation
@pytest.mark.parametrize("name", MASKS)
def test_a_mask_reads_head_and_row(implementation, name):
    mask, pairs = MASKS[name]
    pairs = np.broadcast_to(pairs, GROUPED.pairs)
    agrees_with_oracle(implementation, GROUPED, pairs=pairs, mask=mask, **AT)


@every_implementation
def test_a_neighborhood_of_an_image(implementation):
    """Patches of 5 times 7 beside each other; with text behind them in one sequence, a mask still knows its axes."""
    shape, at = Shape(T=35, S=35, N=4, K=2), Coordinates.grid(5, 7)
    near = [np.abs(x[:, None] - x) <= r for x, r in zip(at.axes, (1, 2), strict=True)]
    pairs = np.broadcast_to(near[0] & near[1], shape.pairs)
    agrees_with_oracle(implementation, shape, pairs=pairs, mask=Neighborhood((1, 2)), q_at=at, kv_at=at)


@every_implementation
def test_a_score_function_reads_its_row(implementation):
    """An array with a value for each row, whose gradient reaches it."""
    factors = jnp.array([0.5, 2.0])
    mod = ScoreFunction(lambda score, query, key, head, factor: score * factor[query.batch], factors)
    inputs = {name: jnp.asarray(x) for name, x in arrays(GROUPED).items()}
    directions = (jnp.ones((B, T, N, GROUPED.V)), jnp.zeros((B, T, N)))
    (output, _), gradients = with_gradients(implementation, inputs | {"score_mod": mod}, directions, **AT)
    scaled = [inputs["query"][b : b + 1] * np.asarray(factors)[b] for b in range(B)]
    alone = [
        attend(query, *(inputs[name][b : b + 1] for name in ("key", "value")), implementation="reference")
        for b, query in enumerate(scaled)
    ]
    close(output, np.concatenate(alone))
    assert np.all(np.abs(gradients["score_mod"].arrays[0]) > 1e-3)


@every_implementation
def test_coordinates_may_share_positions_and_differ_in_segments(implementation):
    """A score function sees the segments of its own row, not of the first."""
    segments = jnp.asarray(np.random.default_rng(0).integers(0, 3, (B, S)), jnp.int32)
    kv_at = Coordinates(jnp.arange(S), segments)

    def mod(score, query, key, head):
        return score + key.segment.astype(score.dtype)

    bias = np.asarray(segments, np.float32)[:, None, None, :].repeat(T, 2)
    inputs = {name: jnp.asarray(x) for name, x in arrays(GROUPED).items()}
    found = attend(**inputs, score_mod=mod, q_at=Q_AT, kv_at=kv_at, implementation=implementation)
    close(found, attend(**inputs, bias=jnp.asarray(bias), implementation="reference"))


@pytest.mark.parametrize("field", ["batch", "head"])
def test_a_call_that_gives_row_or_head_itself_is_refused(field):
    at = Coordinates(jnp.arange(S), jnp.ones(S, jnp.int32), **{field: jnp.int32(0)})
    x = jnp.ones((S, 2, 3))
    with pytest.raises(ValueError, match="must not give batch and head: attention counts both itself"):
        attend(x, x, x, mask=Causal(), q_at=at, kv_at=at)


def test_axes_of_another_shape_are_refused():
    at, x = Coordinates.grid(2, 3), jnp.ones((6, 2, 3))
    wrong = Coordinates(at.position, at.segment, (at.axes[0][:4], at.axes[1]))
    with pytest.raises(ValueError, match=r"q_at \(4,\) must be \(6,\)"):
        attend(x, x, x, mask=Neighborhood(1), q_at=wrong, kv_at=at)
    with pytest.raises(TypeError, match="signed integers"):
        attend(x, x, x, mask=Neighborhood(1), q_at=jax.tree.map(jnp.float32, at), kv_at=at)


@every_implementation
def test_queries_on_a_grid_and_keys_in_a_text(implementation):
    """Axes on one side alone."""
    at = {"q_at": Coordinates.grid(1, T), "kv_at": KV_AT}
    pairs = np.broadcast_to(np.stack([n > K for n in np.asarray(SIZES)])[None, :, None], GROUPED.pairs)
    mask = MaskMod(lambda query, key: key.position < SIZES[query.head])
    agrees_with_oracle(implementation, GROUPED, pairs=pairs, mask=mask, **at)
