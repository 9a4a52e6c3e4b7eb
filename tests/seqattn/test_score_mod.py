"""What any score modification promises: in which form kernels get it, and what is refused."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqattn.attention import attend
from seqattn.coordinates import Coordinates
from seqattn.kernels.call import Call
from seqattn.kernels.traced import capture
from seqattn.score_mod import ScoreFunction, ScoreMod, compose
from seqattn.score_mods import Alibi, RelativePositions, SoftCap
from tests.contract import GROUPED, arrays

N, H, T, S = GROUPED.N, GROUPED.H, GROUPED.T, GROUPED.S
Q_AT, KV_AT = Coordinates.range(T), Coordinates.range(S)


def _inputs():
    return {name: jnp.asarray(x) for name, x in arrays(GROUPED).items()}


def test_what_a_function_closes_over_reaches_kernels_as_leaves():
    """Traced integers and concrete arrays too; two programs of one meaning are equal, and known to JAX's caches."""

    def captured(mod):
        unused = dict.fromkeys(("mask", "bias", "rows", "scale", "dropout"))
        call = Call(**_inputs(), score_mod=mod, q_at=Q_AT, kv_at=KV_AT, **unused)
        return capture(call, like=None).score_mod

    @jax.jit
    def hoisted(factor, unit):
        mod = ScoreFunction(lambda score, query, key, head: jnp.where(head == unit, score * factor[head], score))
        assert not jax.tree.leaves(mod)
        return jax.tree.leaves(captured(mod))

    leaves = sorted(map(np.asarray, hoisted(np.arange(3.0, dtype=np.float32), 2)), key=np.ndim)
    np.testing.assert_array_equal(leaves[0], 2)
    np.testing.assert_array_equal(leaves[1], [0, 1, 2])
    factors = jnp.arange(3.0)
    mod = ScoreFunction(lambda score, query, key, head: score * factors[head])
    before = captured(mod)
    factors = factors + 1
    after = captured(mod)
    assert jax.tree.structure(before) == jax.tree.structure(after)
    for program, expected in ((before, [0, 1, 2]), (after, [1, 2, 3])):
        np.testing.assert_array_equal(jax.tree.leaves(program), [expected])
    doubled, tripled = (captured(ScoreFunction(lambda score, *_, n=n: score * n)) for n in (2.0, 3.0))
    assert jax.tree.structure(doubled) != jax.tree.structure(tripled)


def test_no_keys_no_queries_no_rows():
    mod = compose(Alibi(), RelativePositions(jnp.ones((5, H))))
    for batch, length, size in ((2, 0, 3), (2, 3, 0), (0, 3, 5)):
        query, key = jnp.ones((batch, length, N, H)), jnp.ones((batch, size, N, H))
        at = {"q_at": Coordinates.range(length), "kv_at": Coordinates.range(size)}
        output = jax.jit(functools.partial(attend, implementation="reference"))(query, key, key, score_mod=mod, **at)
        np.testing.assert_array_equal(output, np.zeros((batch, length, N, H)))


def test_half_precision_is_modified_in_float32():
    seen = []

    def fn(score, query, key, head):
        seen.append(score.dtype)
        return score

    x, mod = jnp.ones((3, 2, 5), jnp.bfloat16), compose(fn, Alibi(jnp.ones(2, jnp.bfloat16)))
    assert jax.eval_shape(functools.partial(attend, score_mod=mod), x, x, x).dtype == jnp.bfloat16
    assert set(seen) == {np.dtype("float32")}


class _Rows(ScoreMod):
    row_size = 2

    def __call__(self, score, query, key, head, row=None):
        return score

    def rows(self, query, scale):
        return query[..., :3]


class _Integer(ScoreMod):
    def __call__(self, score, query, key, head, row=None):
        return head


REFUSED = {
    "a class": (Alibi, TypeError, r"must be an instance, not its class: write Alibi\(\.\.\.\)"),
    "an array": (jnp.ones((T, S)), TypeError, "an array to add is a bias"),
    "a vector": (lambda score, *pair: score * jnp.ones(3), TypeError, r"one floating score .* shape \(3,\)"),
    "a boolean": (lambda score, query, key, head: head == 0, TypeError, "one floating score .* got bool"),
    "few arguments": (lambda score, query: score, TypeError, r"\(score, query, key, head\), .* takes \(score, query\)"),
    "an integer": (_Integer(), TypeError, "_Integer must return one float32 score, got int32"),
    "rows": (_Rows(), ValueError, r"rows of the score_mod _Rows must be .* \(2, 7, 6, 2\), .* got \(2, 7, 6, 3\)"),
    "nothing": (ScoreMod(), TypeError, "ScoreMod must define __call__"),
}


@pytest.mark.usefixtures("as_users_call_it")
@pytest.mark.parametrize(("mod", "error", "message"), REFUSED.values(), ids=REFUSED)
def test_what_does_not_fit_is_refused(mod, error, message):
    inputs = _inputs()
    with pytest.raises(error, match=message):
        attend(**inputs, score_mod=mod, q_at=Q_AT, kv_at=KV_AT)


def test_a_composition_of_nothing_is_refused():
    with pytest.raises(ValueError, match="compose needs at least one"):
        compose()


def test_coordinates_are_asked_for_where_they_matter():
    inputs = _inputs()
    with pytest.raises(ValueError, match="7 queries and 11 keys: say how they align"):
        attend(**inputs, score_mod=Alibi())
    capped = jax.eval_shape(functools.partial(attend, score_mod=SoftCap(3.0)), **inputs)
    assert capped.shape == (2, T, N, GROUPED.V)
    with pytest.raises(ValueError, match=r"q_at and kv_at only matter to a Mask, .* or to a ScoreMod"):
        attend(**inputs, score_mod=SoftCap(3.0), q_at=Q_AT, kv_at=KV_AT)
