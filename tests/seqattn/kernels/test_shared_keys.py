"""Keys and values of batch 1 beside queries of a larger batch: what repeated keys give, without copies of them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqattn.attention import attend, attention_weights
from seqattn.coordinates import Coordinates
from seqattn.dropout import Dropout
from seqattn.kernels.dispatch import explain
from seqattn.mask import MaskMod
from seqattn.masks import Causal, SameSegment, SlidingWindow
from seqattn.score_mods import Alibi, RelativePositions
from tests.contract import close, every_implementation

BATCH, T, S, N, K, H = (3, 2), 5, 7, 4, 2, 3


def _inputs(shared, length=T, size=S):
    random, rows = np.random.default_rng(0), tuple(1 if i in shared else n for i, n in enumerate(BATCH))
    shapes = {"query": (*BATCH, length, N, H), "key": (*rows, size, K, H), "value": (*rows, size, K, H)}
    return {name: jnp.asarray(random.normal(size=shape), jnp.float32) for name, shape in shapes.items()}


def _repeated(inputs):
    return inputs | {
        name: jnp.broadcast_to(inputs[name], (*BATCH, *inputs[name].shape[-3:])) for name in ("key", "value")
    }


def _at(length, rows=()):
    position = np.random.default_rng(1).integers(0, 9, (*rows, length)).astype(np.int32)
    return Coordinates(position, position % 3)


ROWED = {"q_at": _at(T, BATCH), "kv_at": _at(S)}
OPTIONS = {
    "plain": {},
    "mask": {"mask": Causal() & SameSegment() | SlidingWindow(2), **ROWED},
    "one_place": {"mask": Causal(), "q_at": Coordinates.range(T, start=2), "kv_at": Coordinates.range(S)},
    "pairs": {"mask": jnp.asarray(np.random.default_rng(2).random((*BATCH, 1, T, S)) < 0.6)},
    "keys_alone": {"mask": jnp.asarray(np.random.default_rng(2).random((1, 1, 1, 1, S)) < 0.6)},
    "square": {"bias": jnp.asarray(np.random.default_rng(2).normal(size=(T, S)), jnp.float32)},
    "bias": {"bias": jnp.asarray(np.random.default_rng(2).normal(size=(3, 1, N, 1, S)), jnp.float32)},
    "mod": {"score_mod": Alibi().then(RelativePositions(jnp.ones((3, H)))), **ROWED},
    "sinks": {"sinks": jnp.arange(4.0)},
    "rows_differ": {"mask": MaskMod(lambda query, key: key.position > query.batch), **ROWED},
    "keys_differ": {"mask": SameSegment(), "q_at": _at(T, BATCH), "kv_at": _at(S, BATCH)},
    "dropout": {"dropout": Dropout(0.4, jax.random.key(0))},
}


@functools.partial(every_implementation, slow=["ring", "tpu", "hopper"])
@pytest.mark.parametrize(
    "shared", [(0,), pytest.param((1,), marks=pytest.mark.slow), pytest.param((0, 1), marks=pytest.mark.slow)], ids=str
)
@pytest.mark.parametrize("name", OPTIONS)
def test_keys_of_batch_1_are_those_of_every_row(implementation, name, shared):
    """Values and gradients, which add up over the rows."""
    if implementation == "ring" and name in ("rows_differ", "keys_differ"):
        pytest.skip("as repeated keys")

    def loss(inputs):
        output, lse = attend(**inputs, **OPTIONS[name], implementation=implementation, return_lse=True)
        return jnp.sum(output**2) + jnp.sum(lse), (output, lse)

    differentiate = jax.jit(jax.value_and_grad(loss, has_aux=True))
    inputs = _inputs(shared)
    (_, found), gradients = differentiate(inputs)
    (_, expected), whole = differentiate(_repeated(inputs))
    for a, b in zip(found, expected, strict=True):
        close(a, b)
    for key, x in gradients.items():
        axes = tuple(shared) if key != "query" else ()
        np.testing.assert_allclose(x, whole[key].sum(axis=axes, keepdims=True), atol=2e-5)


def test_no_copy_of_the_keys_is_made():
    """No array of the compiled program has a row of keys for each row of queries."""
    inputs = _inputs((0, 1), 2, 1021)
    for implementation in ("reference", "chunked", "xla"):
        call = jax.jit(functools.partial(attend, implementation=implementation))
        text = call.lower(**inputs).as_text()
        assert "3x2x1021x2x3" not in text
        assert "6x1021x2x3" not in text


def test_causal_masks_by_default_are_those_of_each_row():
    inputs = _inputs((0,), T, T)
    close(attend(**inputs, mask=Causal()), attend(**_repeated(inputs), mask=Causal()))


def test_what_is_refused_is_refused_as_for_repeated_keys():
    inputs = _inputs((0,))
    with pytest.raises(ValueError, match="5 queries and 7 keys: say how they align"):
        attend(**inputs, mask=Causal())
    with pytest.raises(ValueError, match="both or neither"):
        attend(**inputs, mask=Causal(), q_at=Coordinates.range(T))
    with pytest.raises(ValueError, match="only matter to a Mask"):
        attend(**inputs, q_at=Coordinates.range(T), kv_at=Coordinates.range(S))
    with pytest.raises(ValueError, match="batch dims must agree"):
        attend(inputs["query"], inputs["key"], inputs["value"][:, :1])


ONE_ROW = {"query": (4, T, 4, H), "key": (1, S, 4, H), "value": (1, S, 4, H)}
"""As many rows as heads: a mask of three dims could be of either."""
PLACES = {"mask": Causal(), "q_at": Coordinates.range(T), "kv_at": Coordinates.range(S)}

UNFIT = {
    "mask_of_three_dims": {"mask": np.ones((4, T, S), bool)},
    "mask_of_one_dim": {"mask": np.ones(S, bool)},
    "mask_of_other_keys": {"mask": np.ones((4, 4, T, S - 1), bool)},
    "mask_of_numbers": {"mask": np.ones((T, S))},
    "class_of_masks": {"mask": Causal},
    "class_of_masks_with_places": PLACES | {"mask": Causal},
    "bias_of_three_dims": {"bias": np.zeros((4, T, S), np.float32)},
    "bias_of_integers": {"bias": np.zeros((T, S), np.int32)},
    "one_place_of_queries": PLACES | {"q_at": Coordinates.range(1, start=3)},
    "one_row_of_queries": PLACES | {"q_at": _at(T, (1,))},
    "more_queries": PLACES | {"q_at": Coordinates.range(T + 1)},
    "unsigned_queries": PLACES | {"q_at": Coordinates(np.zeros(T, np.uint8), np.ones(T, np.uint8))},
    "one_place_of_keys": PLACES | {"kv_at": Coordinates.range(1)},
    "two_rows_of_keys": PLACES | {"kv_at": _at(S, (2,))},
    "one_place_for_a_mod": PLACES | {"mask": None, "score_mod": Alibi(), "q_at": Coordinates.range(1, start=3)},
    "dropout_of_a_number": {"dropout": 0.4},
    "scale_of_heads": {"scale": np.ones(4, np.float32)},
}


def _said(call, arguments):
    with pytest.raises((TypeError, ValueError)) as told:
        call(**arguments)
    return type(told.value), str(told.value)


@pytest.mark.usefixtures("as_users_call_it")
@pytest.mark.parametrize("name", UNFIT)
def test_keys_of_batch_1_raise_what_keys_of_every_row_raise(name):
    options = UNFIT[name]
    arrays = {name: jnp.ones(shape) for name, shape in ONE_ROW.items()}
    repeated = {name: jnp.ones((4, *shape[1:])) for name, shape in ONE_ROW.items()}
    expected = _said(attend, repeated | options)
    assert _said(attend, arrays | options) == expected
    assert _said(explain, arrays | options) == expected


def test_keys_of_batch_1_have_coordinates_of_their_own_batch():
    inputs = _inputs((0,))
    own = {"q_at": _at(T, BATCH), "kv_at": _at(S, (1, 2))}
    of_each = own | {"kv_at": jax.tree.map(lambda x: np.broadcast_to(x, (*BATCH, S)), own["kv_at"])}
    for more in ({}, {"dropout": Dropout(0.4, jax.random.key(0))}):
        found = attend(**inputs, mask=ROWED_MASK, **own, **more)
        close(found, attend(**_repeated(inputs), mask=ROWED_MASK, **of_each, **more))


def test_explain_says_what_runs():
    inputs = _inputs((0, 1))
    assert explain(*inputs.values(), implementation="chunked").chosen == "chunked"
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in inputs.values()]
    assert explain(*shapes).chosen == explain(*inputs.values()).chosen


def test_no_rows_and_weights_and_dtypes():
    inputs = _inputs((0, 1))
    nothing = attend(inputs["query"][:0], inputs["key"], inputs["value"])
    assert nothing.shape == (0, 2, T, N, H)
    weights = attention_weights(inputs["query"], inputs["key"], mask=ROWED_MASK, **ROWED)
    close(weights, attention_weights(inputs["query"], _repeated(inputs)["key"], mask=ROWED_MASK, **ROWED))
    with jax.enable_x64(True):
        slopes = jnp.ones(N, jnp.float32)
        for dtype in (jnp.float32, jnp.bfloat16):
            small = {name: x.astype(dtype) for name, x in inputs.items()}
            assert attend(**small, score_mod=lambda score, q, k, head: score - slopes[head], **ROWED).dtype == dtype


ROWED_MASK = Causal() & SameSegment() | SlidingWindow(2)
