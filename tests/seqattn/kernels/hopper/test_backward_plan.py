"""Which kernels compute the backward pass, when `chunked` does, and which tiles they visit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqattn.coordinates import Coordinates
from seqattn.dropout import Dropout
from seqattn.kernels.call import Call
from seqattn.kernels.hopper.backward_plan import NARROW, PASSES, lengths, why_chunked
from seqattn.kernels.hopper.plan import prepare
from seqattn.kernels.hopper.rule import rule_of
from seqattn.kernels.traced import capture
from seqattn.masks import Causal, SlidingWindow
from seqattn.score_mod import ScoreFunction, ScoreMod
from seqattn.score_mods import RelativeBuckets, SoftCap

LENGTH = 300


def call(dim=64, length=LENGTH, **options):
    given = {"mask": Causal(), "bias": None, "score_mod": None, "scale": None, "dropout": None}
    x, at = jnp.zeros((1, length, 1, dim), jnp.bfloat16), Coordinates.range(length)
    return Call.of(x, x, x, q_at=at, kv_at=at, **given | options)


@pytest.mark.parametrize(
    ("made", "reason"),
    [
        (lambda x: call(bias=jnp.zeros((1, 1, 5, 5)), length=5), "a bias may need one"),
        (lambda x: call(scale=x), "the scale, which is traced, may need one"),
        (
            lambda x: call(score_mod=ScoreFunction(lambda score, query, key, head, x: score * x, x)),
            "floating arrays of the score_mod may need one",
        ),
        (lambda x: call(dim=256), "head dim 256 takes too many registers"),
        (lambda x: call(scale=0.5, score_mod=SoftCap(3.0)), None),
        (lambda x: call(), None),
    ],
    ids=["bias", "scale", "score_mod", "dim", "constants", "mask"],
)
def test_who_computes_the_gradients(made, reason):
    @jax.jit
    def run(x):
        given = made(x)
        traced = capture(given, like=given)
        mod = None if given.score_mod is None else rule_of(traced, traced.score_mod.program, mod=True)[0]
        assert why_chunked(given, mod) == reason
        assert (prepare(given)[0].backward is None) == (reason is not None)
        return x

    run(jnp.float32(0.5))


@pytest.mark.parametrize("dim", PASSES)
def test_random_bits_tables_and_positions_in_scores_take_narrow_tiles(dim):
    mod = ScoreMod.of(RelativeBuckets(jnp.zeros((32, 1))))
    dropped = call(dim, dropout=Dropout(0.5, jax.random.key(0)))
    for given, passes in ((call(dim), PASSES), (dropped, NARROW), (call(dim, score_mod=mod), NARROW)):
        backward = prepare(given)[0].backward
        assert backward is not None
        assert backward.passes == passes[dim]


@pytest.mark.parametrize("mask", [Causal(), SlidingWindow(130, ahead=7)], ids=str)
@pytest.mark.parametrize("passes", [PASSES[64], NARROW[128]], ids=["wide", "narrow"])
def test_each_visible_pair_is_in_one_tile_of_each_kernel(passes, mask, monkeypatch):
    monkeypatch.setitem(PASSES, 64, passes)
    _, operands = prepare(call(mask=mask))
    at = Coordinates.range(LENGTH)
    visible = np.asarray(mask.dense(at, at))
    assert len(operands.backward) == len(passes)
    for each, walk in zip(passes, operands.backward, strict=True):
        seen = np.zeros(lengths(passes, LENGTH, LENGTH), int)
        mine = seen if each.owner == "query" else seen.T
        for i, (full, partial) in enumerate(walk.counts[0]):
            for n, j in enumerate(walk.tiles[0, i, : full + partial]):
                where = np.s_[i * each.together : (i + 1) * each.together, j * each.columns : (j + 1) * each.columns]
                tile = mine[where]
                assert tile.size == each.together * each.columns
                tile += 1
                if n < full:
                    pairs = visible if each.owner == "query" else visible.T
                    assert pairs[where].size == tile.size
                    assert pairs[where].all()
        assert seen.max() == 1
        assert (seen[:LENGTH, :LENGTH][visible] == 1).all()
        # No tile without a visible pair is visited.
        assert seen.sum() < seen.size
