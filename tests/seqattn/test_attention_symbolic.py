"""Programs that `jax.export` compiles once, for sizes that are not known then."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from seqattn.attention import attend, attention_weights
from seqattn.coordinates import Coordinates
from seqattn.drop_in import dot_product_attention
from seqattn.kernels.dispatch import explain
from seqattn.mask import MaskMod
from seqattn.masks import Causal, SameSegment, SlidingWindow
from seqattn.score_mods import Alibi, RelativePositions

N, K, H = 4, 2, 3


def _arrays(batch, length, size):
    random = np.random.default_rng(length)
    shapes = ((batch, length, N, H), (batch, size, K, H), (batch, size, K, H))
    return [jnp.asarray(random.normal(size=shape), jnp.float32) for shape in shapes]


def _agrees(fn, *, square=True):
    """The exported program at two sizes is the function called directly."""
    batch, length, size = export.symbolic_shape("b, t, s")
    size = length if square else size
    shapes = ((batch, length, N, H), (batch, size, K, H), (batch, size, K, H))
    program = export.export(jax.jit(fn))(*(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes))
    for dims in ((3, 7, 7 if square else 2), (1, 4, 4 if square else 11)):
        given = _arrays(*dims)
        for a, b in zip(jax.tree.leaves(program.call(*given)), jax.tree.leaves(fn(*given)), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-6)


@pytest.mark.parametrize("implementation", [None, "reference", "xla"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"mask": Causal()},
        {"mask": Causal() & SlidingWindow(3)},
        {"mask": MaskMod(lambda query, key: query.position + query.batch != key.position)},
    ],
    ids=["all", "causal", "window", "mod"],
)
def test_attend_of_a_symbolic_length_and_batch(implementation, options):
    _agrees(lambda *x: attend(*x, **options, implementation=implementation, return_lse=True))


def test_scores_of_a_symbolic_length_are_modified():
    for mod in (Alibi(), RelativePositions(jnp.ones((5, H)))):
        _agrees(lambda *x, mod=mod: attend(*x, mask=Causal(), score_mod=mod))
    _agrees(lambda *x: attention_weights(*x[:2], mask=Causal()))


def test_gradients_of_a_symbolic_length():
    _agrees(lambda *x: jax.grad(lambda *x: jnp.sum(attend(*x, mask=Causal()) ** 2), (0, 1, 2))(*x))


def test_coordinates_of_a_symbolic_length():
    def fn(query, key, value):
        at = Coordinates.from_segments(jnp.ones(query.shape[:2], jnp.int32))
        assert Coordinates.range(query.shape[1]).shape == (query.shape[1],)
        return attend(query, key, value, mask=Causal() & SameSegment(), q_at=at, kv_at=at)

    _agrees(fn)


@pytest.mark.parametrize("causal", [False, True])
def test_the_drop_in_of_symbolic_lengths(causal):
    """As jax.nn: causal also where keys are more or fewer than queries."""
    _agrees(lambda *x: dot_product_attention(*x, is_causal=causal), square=False)
    _agrees(lambda *x: dot_product_attention(*x, is_causal=causal, local_window_size=2))


def test_a_kernel_that_needs_sizes_is_passed_over_with_its_reason():
    batch, length = export.symbolic_shape("b, t")
    told = []

    def fn(query):
        told.append(explain(query, query, query, mask=Causal()))
        with pytest.raises(NotImplementedError, match="tiles needs all sizes as numbers"):
            attend(query, query, query, mask=Causal(), implementation="chunked")
        return attend(query, query, query, mask=Causal())

    export.export(jax.jit(fn))(jax.ShapeDtypeStruct((batch, length, N, H), jnp.float32))
    assert told[0].chosen == "xla"
    assert "(b, t, 4, 3)" in told[0].refusals["chunked"]


def test_a_symbolic_batch_alone():
    """Positions are known then, but no grid is cut for any number of rows."""
    (batch,) = export.symbolic_shape("b")
    x = jax.ShapeDtypeStruct((batch, 70, K, H), jnp.float32)
    program = export.export(jax.jit(lambda x: attend(x, x, x, mask=Causal())))(x)
    given = _arrays(3, 70, 70)[1]
    np.testing.assert_allclose(program.call(given), attend(given, given, given, mask=Causal()), atol=1e-6)
