"""The kernel for Hopper that reads a cache: NumPy in float64 for each kind of cache, what it refuses, its programs.

Its arithmetic, its lists of tiles and its parts run in plain JAX. No GPU is needed.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from seqattn.coordinates import Coordinates
from seqattn.dropout import Dropout
from seqattn.kernels import cached, hopper_cached
from seqattn.kernels.call import Call, Columns
from seqattn.kernels.hopper_cached import plan as plans
from seqattn.kernels.hopper_cached.plan import Tiling
from seqattn.masks import Causal, NotPadding, SlidingWindow
from seqattn.nn import KeyValue, PagedCache, RingCache, StaticCache
from seqattn.score_mods import Alibi
from tests import cache_programs, hopper_cached_plain, oracle
from tests.contract import close

pytest.importorskip("absl", reason="Pallas Mosaic GPU needs absl-py")

B, S, K, H, V, SLOTS = 3, 12, 2, 5, 7, 4
UNUSED = dict.fromkeys(("mask", "score_mod", "q_at", "kv_at", "dropout"))


def _tokens(at, dtype, seed=0):
    random = np.random.default_rng(seed)
    shape = *at.position.shape, K
    key, value = (jnp.asarray(random.normal(size=(*shape, dim)), dtype) for dim in (H, V))
    return KeyValue(key, value, at)


def _at(first, lengths, size):
    """`size` tokens a row from a position on, of which the first `lengths` are real."""
    position = np.add.outer(np.array(first), np.arange(size)).astype(np.int32)
    return Coordinates(jnp.asarray(position), jnp.asarray(np.arange(size) < np.array(lengths)[:, None], jnp.int32))


def _static(dtype):
    """Rows of different lengths; the last one has ended, and sees nothing."""
    cache = StaticCache.empty(B, S, K, H, value_dim=V, dtype=dtype)
    cache, _ = cache.append(_tokens(_at([0, 0, 0], [6, 2, 4], 6), dtype))
    new = _at([6, 2, 4], [3, 1, 0], 3)
    return new, cache.append(_tokens(new, dtype, seed=1))[1]


def _ring(dtype):
    """A ring that has wrapped around, one that is half full, and an empty one."""
    cache = RingCache.empty(B, 8, K, H, value_dim=V, dtype=dtype)
    cache, _ = cache.append(_tokens(_at([0, 0, 0], [10, 3, 0], 10), dtype))
    new = _at([10, 3, 0], [1, 1, 1], 1)
    return new, cache.append(_tokens(new, dtype, seed=1))[1]


def _paged(dtype):
    """Two hypotheses that branched from a prompt, of which one was continued twice."""
    cache = StaticCache.empty(B, 8, K, H, value_dim=V, dtype=dtype)
    cache, _ = cache.append(_tokens(_at([0, 0, 0], [4, 2, 3], 4), dtype))
    cache = PagedCache.of(cache, 2)
    for step, parents in enumerate([[[0, 0], [1, 1], [1, 0]], [[1, 0], [1, 1], [0, 0]], None]):
        now = jax.tree.map(lambda x: jnp.repeat(x, 2, axis=1), _at([4 + step, 2 + step, 3 + step], [1, 1, 1], 1))
        cache, seen = cache.append(_tokens(now, dtype, seed=step + 1))
        cache = cache if parents is None else cache.select(jnp.asarray(parents))
    assert seen.size == S
    return now, seen


CACHES = {"static": _static, "ring": _ring, "paged": _paged}


def _case(cache="static", dtype="float32", group=3):
    """Queries, columns, the mask with coordinates, and the visible pairs `[B, 1, T, S]` by NumPy."""
    q_at, seen = CACHES[cache](dtype)
    query = np.random.default_rng(7).normal(size=(*q_at.position.shape, K * group, H))
    position, segment, slot, real = (np.asarray(x) for x in (*jax.tree.leaves(q_at), *jax.tree.leaves(seen.at)))
    window = 8 if cache == "ring" else 100
    back = position[:, :, None] - slot[:, None]
    visible = (segment[:, :, None] != 0) & (real[:, None] != 0) & (back >= 0) & (back < window)
    options = {"mask": Causal() & NotPadding() & SlidingWindow(window), "q_at": q_at, "kv_at": seen.at}
    if seen.visible is not None:
        visible = visible & np.asarray(seen.visible)
        options = {"mask": jnp.asarray(visible)[:, None]}
    columns = Columns(seen.key, seen.value, seen.finite)
    return jnp.asarray(query, dtype), columns, options, visible[:, None]


def _plain(call):
    return hopper_cached_plain.attend(call, Tiling(64, SLOTS, 2))


def _attend(query, columns, options, kernel=_plain):
    return kernel(Call.of_columns(query, columns, **UNUSED | options))


_jitted = jax.jit(_attend)


def _expected(query, columns, visible):
    arrays = query, columns.key.transpose(0, 3, 1, 2), columns.value.swapaxes(1, 2)
    return oracle.attention(*(np.asarray(x, np.float64) for x in arrays), visible=visible)


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_equals_the_oracle_for_each_kind_of_cache(cache, dtype):
    query, columns, options, visible = _case(cache, dtype)
    output, lse = _jitted(query, columns, options)
    expected = _expected(query, columns, visible)
    assert output.dtype == dtype
    assert lse.dtype == np.float32
    close(output, expected.output, dtype)
    seen = np.isfinite(expected.lse)
    close(np.where(seen, lse, 0), np.where(seen, expected.lse, 0))
    assert seen.all() == (cache != "static"), "the last row has ended"
    assert (np.asarray(lse)[~seen] == np.finfo(np.float32).min).all()
    assert (np.asarray(output)[~seen] == 0).all()


def test_more_rows_than_bits_of_a_word():
    """11 heads of a group and 3 tokens: 33 rows."""
    query, columns, options, visible = _case(group=11)
    close(_jitted(query, columns, options)[0], _expected(query, columns, visible).output)


def test_heads_may_see_different_slots():
    query, columns, _, visible = _case()
    by_head = visible & (np.arange(S) % 6 != np.arange(K * 3)[:, None, None])
    found, _ = _jitted(query, columns, {"mask": jnp.asarray(by_head)})
    close(found, _expected(query, columns, by_head).output)


def test_without_a_mask_every_slot_is_seen():
    query, columns, *_ = _case()
    close(_jitted(query, columns, {})[0], _expected(query, columns, True).output)


def test_one_part_and_several_are_equal(monkeypatch):
    query, columns, options, _ = _case("paged")
    several = _attend(query, columns, options)
    monkeypatch.setattr(plans, "_BLOCKS", 1)
    for a, b in zip(_attend(query, columns, options), several, strict=True):
        close(a, b)


def test_tiles_that_no_query_sees_are_not_read():
    """NaN in every slot of a tile behind the filled ones, where a product with a weight of 0 would spread it."""
    query, columns, options, visible = _case()
    expected = _jitted(query, columns, options)
    unread = ~np.repeat(visible.any(axis=(1, 2)).reshape(B, -1, SLOTS).any(axis=-1), SLOTS, axis=1)
    np.testing.assert_array_equal(unread.sum(axis=1), [0, 4, 12])
    spoilt = Columns(
        jnp.where(unread[:, None, None], jnp.nan, columns.key),
        jnp.where(unread[:, None, :, None], jnp.nan, columns.value),
        columns.finite,
    )
    for a, b in zip(_jitted(query, spoilt, options), expected, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("of_heads", [False, True], ids=["marks_of_tokens", "marks_of_heads"])
def test_keys_that_are_not_finite_make_nan_of_the_rows_that_see_them(of_heads):
    query, columns, options, visible = _case()
    finite = np.ones((B, K, S), bool)
    finite[0, 1, 7] = finite[1, :, 11] = False  # the second is hidden from all
    assert visible[0, 0, :, 7].tolist() == [False, True, True]
    if not of_heads:
        finite = finite.all(axis=1)
    marked = Columns(columns.key, columns.value, jnp.asarray(finite))
    found, expected = (_attend(query, marked, options, kernel)[0] for kernel in (_plain, cached.attend))
    close(found, expected)
    assert np.isnan(found).sum() == (1 if of_heads else 2) * 3 * 2 * V, "the last two tokens of the first row"


def test_a_query_that_is_not_finite_makes_nan_of_its_row_alone():
    query, columns, options, _ = _case()
    expected = _jitted(query, columns, options)[0]
    found = _jitted(query.at[0, 1, 4, 2].set(-jnp.inf).at[2, 0, 0, 0].set(jnp.nan), columns, options)[0]
    np.testing.assert_array_equal(found, np.asarray(jnp.asarray(expected).at[0, 1, 4].set(jnp.nan)))


def test_gradients_are_those_of_cached():
    query, columns, options, _ = _case()
    cache_programs.assert_gradients_of_cached(
        _plain, query, columns, -0.3, lambda query, columns, kernel: _attend(query, columns, options, kernel)
    )


def test_forward_mode_is_refused():
    query, columns, options, _ = _case()
    with pytest.raises(NotImplementedError, match="forward-mode derivatives"):
        jax.jvp(lambda query: _attend(query, columns, options)[0], (query,), (query,))


def _lowered(implementation="hopper_cached", **options):
    # The traced program also has a branch for this machine, where the kernel would refuse.
    names = None if implementation is None else (implementation, "cached")
    return cache_programs.lowered("cuda", 1536, names, **options)


def test_it_serves_a_step_on_a_gpu_by_name_alone():
    text = _lowered()
    assert text.count("@mosaic_gpu") == 1
    assert "stablehlo.dot_general" not in text
    assert "@mosaic_gpu" not in _lowered(None)


def test_it_lowers_under_vmap():
    assert "@mosaic_gpu" in _lowered(vmap=True)


def test_its_backward_pass_is_that_of_cached():
    cache_programs.assert_is_cached(_lowered(grad=True), "@mosaic_gpu")


@pytest.mark.skipif(jax.device_count() < 2, reason="needs several devices")
def test_a_program_that_the_compiler_splits_uses_cached():
    """A kernel there would gather the cache of all devices, without a word."""
    mesh = Mesh(np.array(jax.devices()[:2]), ("data",))
    cache_programs.assert_is_cached(_lowered(sharding=NamedSharding(mesh, P("data"))), "@mosaic_gpu")


def _call(query=(2, 3, 4, 64), dtype="bfloat16", kv_heads=2, size=128, value_dim=None, cache_dtype=None, **options):
    value_dim = query[3] if value_dim is None else value_dim
    shapes = (query[0], kv_heads, query[3], size), (query[0], kv_heads, size, value_dim)
    key, value = (jnp.zeros(shape, cache_dtype or dtype) for shape in shapes)
    columns = Columns(key, value, jnp.ones((query[0], size), bool))
    return Call.of_columns(jnp.zeros(query, dtype), columns, **UNUSED | options)


AT = {"q_at": Coordinates.range(3, start=125), "kv_at": Coordinates.range(128)}


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"dtype": "float32"}, r"takes bfloat16 and float16, not queries of float32"),
        ({"cache_dtype": "float16"}, "keys of float16 and values of float16 with queries of bfloat16"),
        ({"mask": Causal(), "score_mod": Alibi(), **AT}, r"no score modification over a cache \(Alibi\)"),
        ({"dropout": Dropout(0.5, jax.random.key(0))}, "attention to a cache has no dropout"),
        ({"query": (2, 33, 4, 64)}, "33 queries of 2 heads are 66 rows of a key head, and .* takes up to 64"),
        ({"size": 100}, r"the slots of the cache \(100\) must be a multiple of 64"),
        ({"query": (2, 3, 4, 80)}, r"H \(80\) and V \(80\) must be equal, and one of 64, 128, 256"),
        ({"value_dim": 128}, r"H \(64\) and V \(128\) must be equal"),
        ({"query": (65536, 1, 1, 64), "kv_heads": 1, "size": 64}, "65536 batch rows"),
    ],
    ids=["dtype", "cache_dtype", "score_mod", "dropout", "rows", "slots", "dim", "value_dim", "batch"],
)
def test_what_it_refuses(options, reason):
    with pytest.raises(NotImplementedError, match=reason):
        jax.eval_shape(lambda: hopper_cached.refuse(_call(**options)))


def test_a_platform_and_keys_in_rows_are_refused():
    with pytest.raises(NotImplementedError, match="runs on a gpu, and this is a cpu"):
        hopper_cached.refuse(dataclasses.replace(_call(), platform="cpu"))
    with pytest.raises(NotImplementedError, match="not in the layout of a cache"):
        hopper_cached.refuse(dataclasses.replace(_call(), columns=None))


@pytest.mark.parametrize("dim", [64, 128, 256])
def test_it_takes_what_it_does_not_refuse(dim):
    hopper_cached.refuse(_call((2, 3, 4, dim), mask=Causal(), **AT))
    hopper_cached.refuse(_call((0, 3, 4, dim)))


def test_an_empty_call_has_no_kernel():
    output, lse = hopper_cached.attend(_call(query=(2, 0, 4, 64)))
    assert output.shape == (2, 0, 4, 64)
    assert lse.shape == (2, 0, 4)
