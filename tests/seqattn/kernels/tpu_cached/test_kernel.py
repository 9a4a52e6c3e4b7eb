"""The kernel for TPUs that reads a cache: NumPy in float64, the tiles that it reads, and where `cached` replaces it.

No TPU is needed: Pallas interprets the kernel, or lowers it. tests/benchmarks/compile compiles it.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from seqattn.coordinates import Coordinates
from seqattn.dropout import Dropout
from seqattn.kernels import cached, tpu_cached
from seqattn.kernels.call import Call, Columns
from seqattn.kernels.dispatch import explain_call
from seqattn.kernels.tpu_cached import plan as plans
from seqattn.kernels.tpu_cached.forward import codes, steps_of
from seqattn.kernels.tpu_cached.plan import Plan
from seqattn.masks import Causal
from seqattn.nn import KeyColumns, KeyValue
from seqattn.score_mods import Alibi
from tests import cache_programs, oracle
from tests.contract import close, small_tpu_tiles

B, S, K, H, V = 4, 11, 2, 5, 7
LENGTHS = np.array([1, 5, 0, 11])
"""Filled slots of each row: one, more than a tile of four, none, all."""


def _case(length=3, group=2, dtypes=("float32", "float32"), value_dim=V):
    """Queries, columns and visible pairs `[B, T, S]`: new tokens see what is filled, the first ones less of it."""
    random = np.random.default_rng(0)
    query = jnp.asarray(random.normal(size=(B, length, K * group, H)), dtypes[0])
    key, value = (jnp.asarray(random.normal(size=(B, S, K, dim)), dtypes[1]) for dim in (H, value_dim))
    behind = np.arange(length)[::-1, None]
    visible = np.arange(S) < np.maximum(LENGTHS[:, None, None] - behind, 0)
    laid = KeyColumns.of(KeyValue(key, value, Coordinates.range(S)))
    return query, Columns(laid.key, laid.value, laid.finite), jnp.asarray(visible), (query, key, value)


UNUSED = dict.fromkeys(("mask", "score_mod", "q_at", "kv_at", "dropout"))
_interpreted = functools.partial(tpu_cached.attend, interpret=True)


def _attend(query, columns, visible, kernel=_interpreted):
    mask = None if visible is None else visible[:, None]
    with small_tpu_tiles():
        return kernel(Call.of_columns(query, columns, **UNUSED | {"mask": mask}))


_jitted = jax.jit(_attend)


@pytest.mark.parametrize(
    ("length", "group", "dtypes", "value_dim"),
    [
        (1, 1, ("float32", "float32"), V),
        (3, 2, ("bfloat16", "bfloat16"), V),
        (2, 3, ("float32", "bfloat16"), V),
        (3, 2, ("bfloat16", "float32"), 128),
    ],
    ids=["one_token", "bfloat16", "smaller_cache", "values_that_fill_vectors"],
)
def test_equals_the_oracle_for_rows_of_any_length(length, group, dtypes, value_dim):
    query, columns, visible, arrays = _case(length, group, dtypes, value_dim)
    output, lse = _jitted(query, columns, visible)
    expected = oracle.attention(*(np.asarray(x, np.float64) for x in arrays), visible=np.asarray(visible)[:, None])
    least = "bfloat16" if "bfloat16" in dtypes else "float32"
    assert output.dtype == dtypes[0]
    assert lse.dtype == np.float32
    close(output, expected.output, least)
    seen = np.isfinite(expected.lse)
    close(np.where(seen, lse, 0), np.where(seen, expected.lse, 0))
    assert not seen[2].any()
    assert (np.asarray(lse)[~seen] == np.finfo(np.float32).min).all(), "rows that see nothing"


@pytest.mark.parametrize(
    ("by_head", "value_dim"), [(False, 128), (True, V)], ids=["one_mask_and_values_in_rows", "masks_of_heads"]
)
def test_heads_that_do_not_fit_into_one_step_take_several(monkeypatch, by_head, value_dim):
    """Each key head has its own queries, keys, values, marks and results."""
    query, columns, visible, arrays = _case(value_dim=value_dim)
    whole = Plan.of(Call(query, None, None, *[None] * 8, columns=columns), interpret=True)
    # As small tiles are, so that one head fits.
    alone = dataclasses.replace(whole, tile=4, heads=1)
    monkeypatch.setattr(plans, "_MOST_BYTES", alone.bytes)
    pairs = np.asarray(visible)[:, None]
    if by_head:
        pairs = pairs & (np.arange(S) % 4 != np.arange(4)[:, None, None])
    call = Call.of_columns(query, columns, **UNUSED | {"mask": jnp.asarray(pairs)})
    with small_tpu_tiles():
        assert Plan.of(call, interpret=True) == alone
        output, lse = _interpreted(call)
    expected = oracle.attention(*arrays, visible=pairs)
    close(output, expected.output)
    seen = np.isfinite(expected.lse)
    close(np.where(seen, lse, 0), np.where(seen, expected.lse, 0))


def test_without_a_mask_every_slot_is_seen():
    query, columns, _, arrays = _case()
    output, _ = jax.jit(lambda *x: _attend(*x, None))(query, columns)
    close(output, oracle.attention(*arrays).output)


def test_tiles_that_no_query_sees_are_not_read():
    """NaN in every slot of a tile behind the filled ones, where a product with a weight of 0 would spread it."""
    query, columns, visible, _ = _case()
    expected = _jitted(query, columns, visible)
    unread = np.arange(S) >= -(-np.maximum(LENGTHS, 1)[:, None] // 4) * 4
    np.testing.assert_array_equal(unread.sum(axis=1), [7, 3, 7, 0])
    spoilt = Columns(
        jnp.where(unread[:, None, None], jnp.nan, columns.key),
        jnp.where(unread[:, None, :, None], jnp.nan, columns.value),
        columns.finite,
    )
    for a, b in zip(_jitted(query, spoilt, visible), expected, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    ("lengths", "tiles"), [([100], [1]), ([4096, 0, 100, 512, 513], [8, 1, 1, 1, 2])], ids=["one_row", "ragged"]
)
def test_a_row_visits_as_many_tiles_as_it_fills(lengths, tiles):
    shapes = (len(lengths), 1, 8, 64), (len(lengths), 2, 64, 4096), (len(lengths), 2, 4096, 64)
    query, key, value = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes)
    columns = Columns(key, value, jnp.ones((len(lengths), 4096), bool))
    plan = Plan.of(Call(query, None, None, *[None] * 8, columns=columns), interpret=False)
    visible = jnp.asarray(np.arange(4096) < np.array(lengths)[:, None, None, None])
    steps = steps_of(plan, visible)
    assert plan.tile == 512
    assert plan.heads == 2, "all heads in one step"
    assert int(steps.count) == sum(tiles)
    rows = np.repeat(np.arange(len(lengths)), tiles)
    np.testing.assert_array_equal(steps.row[: sum(tiles)], rows)
    np.testing.assert_array_equal(steps.inner[: sum(tiles)], np.concatenate([np.arange(n) for n in tiles]))


def test_one_token_of_all_heads_reads_its_mask_once():
    query, columns, visible, _ = _case(length=1, group=3)
    call = Call(query, None, None, *[None] * 8, columns=columns)
    plan = Plan.of(call, interpret=True)
    assert codes(plan, visible[:, None], columns).shape == (B, 1, 1, S)
    by_head = jnp.broadcast_to(visible[:, None], (B, 6, 1, S))
    assert codes(plan, by_head, columns).shape == (B, K, plan.rows, S)


@pytest.mark.parametrize("of_heads", [False, True], ids=["marks_of_tokens", "marks_of_heads"])
def test_keys_that_are_not_finite_make_nan_of_the_rows_that_see_them(of_heads):
    query, columns, visible, _ = _case()
    finite = np.ones((B, K, S), bool)
    finite[3, 1, 9] = finite[1, :, 6] = False  # the second is hidden from all
    if not of_heads:
        finite = finite.all(axis=1)
    marked = Columns(columns.key, columns.value, jnp.asarray(finite))
    found, expected = (_attend(query, marked, visible, kernel)[0] for kernel in (_interpreted, cached.attend))
    close(found, expected)
    assert np.isnan(found[3, 1:, 2:]).all()
    assert np.isnan(found).sum() == (2 if of_heads else 4) * 2 * V, "the last two tokens of row 3"


def test_gradients_are_those_of_cached():
    query, columns, visible, _ = _case()
    cache_programs.assert_gradients_of_cached(
        _interpreted, query, columns, 0.3, lambda query, columns, kernel: _attend(query, columns, visible, kernel)
    )


def test_forward_mode_is_refused():
    query, columns, visible, _ = _case()
    with pytest.raises(NotImplementedError, match="forward-mode derivatives"):
        jax.jvp(lambda query: _attend(query, columns, visible)[0], (query,), (query,))


def _lowered(implementation=None, **options):
    return cache_programs.lowered("tpu", 1500, implementation, **options)


def test_it_serves_a_step_on_a_tpu_by_default():
    text = _lowered()
    assert text.count("tpu_custom_call") == 1
    assert "stablehlo.dot_general" not in text
    assert "tpu_custom_call" not in _lowered("cached")


def test_it_lowers_under_vmap():
    assert "tpu_custom_call" in _lowered(vmap=True)


def test_its_backward_pass_is_that_of_cached():
    cache_programs.assert_is_cached(_lowered(grad=True), "tpu_custom_call")


@pytest.mark.skipif(jax.device_count() < 2, reason="needs several devices")
def test_a_program_that_the_compiler_splits_uses_cached():
    """JAX refuses a kernel there, and nothing tells that while the step is traced."""
    mesh = Mesh(np.array(jax.devices()[:2]), ("data",))
    cache_programs.assert_is_cached(_lowered(sharding=NamedSharding(mesh, P("data"))), "tpu_custom_call")


def _refusal(query=(2, 3, 4, 8), dtype="float32", platform="tpu", kv_heads=2, size=9, **options):
    shapes = (query[0], kv_heads, query[3], size), (query[0], kv_heads, size, query[3])
    key, value = (jnp.zeros(shape, jnp.float32) for shape in shapes)
    columns = Columns(key, value, jnp.ones((query[0], size), bool))
    make = lambda x: Call.of_columns(x, columns, **UNUSED | options)  # noqa: E731
    told = explain_call(None, make, (jnp.zeros(query, dtype),), platform=platform)
    return told.refusals["tpu_cached"], told.chosen


AT = {"q_at": Coordinates.range(3, start=6), "kv_at": Coordinates.range(9)}


@pytest.mark.parametrize(
    ("options", "reason", "chosen"),
    [
        ({"dtype": "float16"}, "takes float32 and bfloat16, not queries of float16", "cached"),
        ({"mask": Causal(), "score_mod": Alibi(), **AT}, "no score modification over a cache (Alibi)", "cached"),
        ({"dropout": Dropout(0.5, jax.random.key(0))}, "attention to a cache has no dropout", "reference"),
        ({"query": (2, 65, 4, 8)}, "takes up to 64 queries over a cache, not 65", "xla"),
        (
            {"query": (1, 64, 64, 8), "kv_heads": 1},
            "4096 queries of a key head, with head dims 8",
            "cached",
        ),
        ({"platform": "cpu"}, "runs on a tpu, and this is a cpu", "cached"),
    ],
    ids=["dtype", "score_mod", "dropout", "queries", "memory", "platform"],
)
def test_what_it_refuses_and_what_serves_instead(options, reason, chosen):
    told, instead = _refusal(**options)
    assert reason in told
    assert instead == chosen


def test_more_tiles_than_the_memory_for_lists_holds_are_refused():
    columns = Columns(
        jax.ShapeDtypeStruct((1024, 1, 8, 2**16), jnp.bfloat16),
        jax.ShapeDtypeStruct((1024, 1, 2**16, 8), jnp.bfloat16),
        None,
    )
    call = Call(jax.ShapeDtypeStruct((1024, 1, 1, 8), jnp.bfloat16), None, None, *[None] * 8, columns=columns)
    with pytest.raises(NotImplementedError, match="1024 rows of 128 tiles take 393216 words"):
        Plan.of(call, interpret=False)


def test_it_takes_what_it_does_not_refuse():
    assert _refusal() == (None, "tpu_cached")
    assert _refusal(mask=Causal(), **AT) == (None, "tpu_cached")
