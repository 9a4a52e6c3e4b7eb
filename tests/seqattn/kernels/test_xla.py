"""What jax.nn is asked for on XLA, and what it refuses; the contract itself is held by test_contract.py."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqattn.attention import attend, attend_columns
from seqattn.coordinates import Coordinates
from seqattn.dropout import Dropout
from seqattn.kernels.call import Columns
from seqattn.kernels.dispatch import explain
from seqattn.masks import Causal, Prefix, SlidingWindow
from seqattn.nn import KeyColumns, KeyValue
from seqattn.score_mods import SoftCap
from tests.contract import Shape, agrees_with_oracle, arrays, forward, spoil
from tests.vendor_calls import SQUARE, spy


def test_what_xla_is_asked_for(monkeypatch):
    asked = spy(monkeypatch)
    x = jnp.ones((2, 5, 3, 8))

    def options(**given):
        asked.clear()
        jax.eval_shape(lambda: attend(x, x, x, **given, implementation="xla"))
        assert asked.pop("implementation") == "xla"
        assert asked.pop("scale") == 1 / np.sqrt(8)
        return asked

    assert options() == {}
    assert options(mask=Causal()) == {"is_causal": True}
    assert options(mask=Causal() & SlidingWindow(3)) == {"local_window_size": (2, 0)}
    assert options(mask=SlidingWindow(3, ahead=2)) == {"local_window_size": (2, 2)}
    assert options(mask=Prefix(2))["mask"].shape == (1, 1, 5, 5)
    assert "dense" in explain(x, x, x, mask=Prefix(2)).notes["xla"]
    assert "dense" not in explain(x, x, x, mask=Causal()).notes["xla"]


@pytest.mark.parametrize("name", ["key", "value"])
@pytest.mark.parametrize("garbage", [np.nan, np.inf, -np.inf], ids=str)
def test_what_is_not_finite_is_seen_by_every_query_of_its_heads_where_nothing_is_masked(name, garbage):
    output, lse = forward("xla", spoil(arrays(SQUARE), (1, 4, 1, 2), garbage, name))
    clean, clean_lse = forward("xla", arrays(SQUARE))
    seen = np.zeros((2, 10, 4), bool)
    seen[1, :, 2:] = True
    assert np.isnan(output[seen]).all()
    assert np.isnan(lse[seen]).all()
    np.testing.assert_array_equal(output[~seen], clean[~seen])
    np.testing.assert_array_equal(lse[~seen], clean_lse[~seen])


def test_a_bias_lower_than_what_jax_nn_hides_with_hides_no_more_than_itself():
    """All that the first query may see has the lowest bias, as in masks of other libraries for padding on the left."""
    bias = np.zeros((SQUARE.T, SQUARE.S), np.float32)
    bias[0] = np.finfo(np.float32).min
    agrees_with_oracle("xla", SQUARE, pairs=np.tri(10, dtype=bool), mask=Causal(), bias=bias)


@pytest.mark.parametrize(
    ("options", "value_dim", "dtype", "reason"),
    [
        ({"score_mod": SoftCap(2.0)}, 8, "float32", r"no score modification \(SoftCap\); chunked and reference"),
        ({"dropout": Dropout(0.1, jax.random.key(0))}, 8, "float32", "no dropout"),
        ({}, 5, "float32", r"V \(5\) must be the head dim H \(8\)"),
        ({}, 8, "float64", "softmax of float64 in float32"),
    ],
    ids=str,
)
def test_what_xla_refuses(options, value_dim, dtype, reason):
    with jax.enable_x64(dtype == "float64"), pytest.raises(NotImplementedError, match=reason):
        forward("xla", arrays(Shape(N=4, K=2, H=8, V=value_dim), dtype), **options)


def test_keys_of_a_cache_in_another_dtype_are_refused_and_left_to_a_kernel_that_takes_both():
    keys = jnp.linspace(-1, 1, 70 * 4).reshape(1, 70, 1, 4)
    columns = KeyColumns.of(KeyValue(keys, keys, Coordinates.range(70)))
    columns = Columns(columns.key, columns.value, columns.finite)
    query = keys.astype(jnp.bfloat16)
    with pytest.raises(NotImplementedError, match="keys are float32 and queries bfloat16"):
        attend_columns(query, columns, mask=None, implementation="xla")
    output = attend_columns(query, columns, mask=None)
    np.testing.assert_allclose(output.astype(jnp.float32), attend(query.astype(jnp.float32), keys, keys), atol=1e-2)
