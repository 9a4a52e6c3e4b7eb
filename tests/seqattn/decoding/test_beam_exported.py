"""A search is exported once for any number of rows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from seqattn.decoding import (
    CoveragePenalty,
    DiverseGroups,
    MinLength,
    NoRepeatNgram,
    RepetitionPenalty,
    Sample,
    TopK,
    beam_search,
    generate,
)

B, V, L = 5, 7, 4
LOGITS = jnp.asarray(np.random.default_rng(0).normal(size=(B, V, V)), jnp.float32)
PROCESSORS = (RepetitionPenalty(1.5), NoRepeatNgram(2), MinLength(2, end_token=1))
LIMITS = {"max_length": L, "end_token": 1, "processors": PROCESSORS}


def _step(tokens, state):
    return jnp.take_along_axis(state, tokens[:, None, None], axis=1)[:, 0], state


def _search(logits, first, **options):
    return beam_search(_step, logits, first, beam_size=4, n_best=2, **LIMITS, **options)


WAYS = {
    "beam": _search,
    "groups": lambda *given: _search(*given, groups=DiverseGroups(2)),
    "coverage": lambda *given: _search(
        *given,
        alignment=lambda state: jax.nn.softmax(state[:, 0], axis=-1),
        coverage=CoveragePenalty(0.2, jnp.ones(given[0].shape[:2], bool)),
    ),
    "sample": lambda *given: generate(_step, *given, **LIMITS, sampling=Sample((TopK(5),)), key=jax.random.key(0)),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_search_is_exported_once_for_any_number_of_rows(way, as_users_call_it):
    (rows,) = export.symbolic_shape("rows")
    shapes = jax.ShapeDtypeStruct((rows, V, V), jnp.float32), jax.ShapeDtypeStruct((rows,), jnp.int32)
    program = export.export(jax.jit(WAYS[way]))(*shapes)
    first = jnp.arange(2, 2 + B)
    expected = jax.jit(WAYS[way])(LOGITS, first)
    for count in (B, 1):
        found = program.call(LOGITS[:count], first[:count])
        for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(ours, theirs[:count], rtol=1e-5)
