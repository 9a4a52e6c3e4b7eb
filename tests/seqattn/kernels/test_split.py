"""A call that a mesh splits: the same result and gradients as on one device, each device's share of the work alone."""

import dataclasses
import functools
import inspect
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from seqattn import (
    Causal,
    Coordinates,
    Dropout,
    Mask,
    MaskMod,
    SameSegment,
    ScoreFunction,
    Split,
    attend,
    explain,
    pytree,
    ring_cost,
    zigzag,
)
from seqattn.attention import attend_columns
from seqattn.kernels.call import Columns
from seqattn.kernels.chunked import kernel, plan
from seqattn.kernels.dispatch import IMPLEMENTATIONS
from seqattn.nn import KeyColumns, KeyValue
from tests import oracle
from tests.contract import OVER_A_CACHE

B, T, N, K, H = 6, 28, 12, 4, 5
TABLE = np.linspace(0.3, 1.7, N, dtype=np.float32)


@pytest.fixture(scope="module")
def mesh():
    return jax.make_mesh((2, 2, 2), ("data", "tensor", "sequence"), axis_types=(AxisType.Auto,) * 3)


SPLITS = {
    "batch": Split(batch="data"),
    "heads": Split(heads="tensor"),
    "batch and heads": Split(batch="data", heads="tensor"),
    "sequence": Split(sequence="sequence"),
    "everything": Split(batch="data", heads="tensor", sequence="sequence"),
    "one dim over two axes": Split(heads=("data", "tensor"), sequence="sequence"),
}


def arrays(size=T, kv_heads=K, length=T):
    rng = np.random.default_rng(0)
    shapes = {"query": (B, length, N, H), "key": (B, size, kv_heads, H), "value": (B, size, kv_heads, H + 2)}
    return {name: jnp.asarray(rng.standard_normal(shape), jnp.float32) for name, shape in shapes.items()}


def coordinates(length):
    """Rows with padding, two texts in a row, and one row of padding alone."""
    segment = np.ones((B, length), np.int32)
    segment[1, 20:], segment[2, 11:], segment[3] = 0, 2, 0
    position = np.where(segment == 2, np.arange(length) - 11, np.arange(length)).astype(np.int32)
    return Coordinates(position, segment)


def by_index(query, key):
    """A mask that reads the indices of row and head, which a device must count in the whole call."""
    return (query.batch + 2 * query.head + key.position) % 3 != 0


def tilted(score, query, key, head, table):
    return score + table[head] * (key.position - query.position).astype(score.dtype) / 9


def expected(given, at, dropout, d_output, d_lse):
    """Output, log-sum-exp and gradients by NumPy in float64."""
    row, head = np.arange(B)[:, None, None, None], np.arange(N)[None, :, None, None]
    position, segment = at.position[:, None], at.segment[:, None]
    ahead = position[..., None, :] - position[..., :, None]
    visible = (ahead <= 0) & (segment[..., None, :] == segment[..., :, None]) & (segment[..., None] != 0)
    visible = visible & ((row + 2 * head + position[..., None, :]) % 3 != 0)
    index = jnp.arange(B * N * T).reshape(B, N, T, 1)
    kept = np.asarray(dropout.keep(index, jnp.arange(T).reshape(1, 1, 1, T))) / (1 - dropout.rate)
    options = {"visible": visible, "bias": TABLE[:, None, None] * ahead / 9 + given["bias"], "kept": kept}
    three = [given[name] for name in ("query", "key", "value")]
    found = oracle.attention(*three, **options)
    gradients = oracle.attention_gradients(*three, d_output, d_lse, **options)
    full = gradients.pop("bias")
    gradients |= {"bias": full.sum(axis=0, keepdims=True), "table": (full * ahead / 9).sum(axis=(0, 2, 3))}
    del gradients["scale"]
    return found, gradients


QUICK = ("batch and heads", "everything")


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in SPLITS]
)
def test_masks_biases_modifications_and_dropout_keep_their_meaning(name, mesh):
    at, dropout = coordinates(T), Dropout(0.3, jax.random.key(1))
    given = arrays() | {"bias": jnp.asarray(np.random.default_rng(1).standard_normal((1, N, T, T)), jnp.float32)}
    given["table"] = jnp.asarray(TABLE)
    rng = np.random.default_rng(2)
    d_output, d_lse = rng.standard_normal((B, T, N, H + 2)), rng.standard_normal((B, T, N))

    def results(given):
        mask = Causal() & SameSegment() & MaskMod(by_index)
        options = {"mask": mask, "q_at": at, "kv_at": at, "bias": given["bias"], "dropout": dropout}
        options["score_mod"] = ScoreFunction(tilted, given["table"])
        three = (given["query"], given["key"], given["value"])
        return attend(*three, **options, implementation="chunked", split=SPLITS[name], return_lse=True)

    def loss(given):
        output, lse = results(given)
        seen = jnp.where(lse == -jnp.inf, jnp.zeros_like(lse), lse)
        return jnp.sum(output * d_output.astype(np.float32)) + jnp.sum(seen * d_lse.astype(np.float32)), (output, lse)

    with jax.set_mesh(mesh):
        gradients, (output, lse) = jax.jit(jax.grad(loss, has_aux=True))(given)
    found, wanted = expected(given, at, dropout, d_output, d_lse)
    np.testing.assert_allclose(output, found.output, atol=2e-5)
    np.testing.assert_allclose(lse, found.lse, atol=2e-5)
    assert gradients.keys() == wanted.keys()
    for key, gradient in gradients.items():
        np.testing.assert_allclose(gradient, wanted[key], atol=2e-4, err_msg=key)


@pytest.mark.parametrize(("length", "size"), [(24, 7), (7, 24), (24, 14), (5, 7)])
def test_a_split_sequence_gathers_the_shorter_side(length, size, mesh):
    given = arrays(size, length=length)
    hidden = np.random.default_rng(3).random((B, 1, length, size)) < 0.4
    hidden[0, :, 2] = True

    def results(split, implementation, *three):
        output, lse = attend(
            *three, mask=jnp.asarray(~hidden), implementation=implementation, split=split, return_lse=True
        )
        return jnp.sum(output**2) + jnp.sum(jnp.where(lse == -jnp.inf, jnp.zeros_like(lse), lse)), (output, lse)

    def all_of(*options):
        return jax.jit(jax.value_and_grad(functools.partial(results, *options), (0, 1, 2), has_aux=True))

    three = [given[name] for name in ("query", "key", "value")]
    with jax.set_mesh(mesh):
        actual = all_of(Split(batch="data", sequence=("tensor", "sequence")), "chunked")(*three)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(all_of(None, "reference")(*three)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def program(mesh, split, spec, of_keys, **options):
    """The compiled forward and backward pass over arrays that the mesh holds in parts."""
    shapes = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in arrays(256, length=256).items()}
    placed = [
        jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec if name == "query" else of_keys))
        for name, x in shapes.items()
    ]

    def gradients(query, key, value):
        def loss(*three):
            return jnp.sum(attend(*three, implementation="chunked", split=split, **options) ** 2)

        return jax.grad(loss, (0, 1, 2))(query, key, value)

    with jax.set_mesh(mesh):
        return jax.jit(gradients, out_shardings=tuple(x.sharding for x in placed)).lower(*placed).compile().as_text()


MOVES = ("all-gather", "all-to-all", "collective-permute", "reduce-scatter", "all-reduce")


def moves(text):
    return {name for name in MOVES if f" {name}(" in text or f" {name}-start(" in text}


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_nothing_moves_along_batch_and_heads(kind):
    mesh = jax.make_mesh((2, 4), ("data", "tensor"), axis_types=(kind,) * 2)
    split = Split(batch="data", heads="tensor") if kind is AxisType.Auto else None
    parts = P("data", None, "tensor")
    assert moves(program(mesh, split, parts, parts, mask=Causal())) == set()


def test_without_a_split_the_compiler_gathers(mesh):
    parts = P("data", None, "tensor")
    assert "all-gather" in moves(program(mesh, None, parts, parts, mask=Causal()))


def test_a_ring_only_passes_blocks_on(mesh):
    parts = P("data", "sequence", "tensor")
    split = Split(batch="data", heads="tensor", sequence="sequence")
    assert moves(program(mesh, split, parts, parts, mask=Causal())) == {"collective-permute"}


def visited(monkeypatch, split, length, **options):
    """The scores in the tiles that one device visits in the forward pass."""
    found = []

    def noted(call):
        result = plan.prepare(call)
        grid, steps = result[0].grid, result[1]
        tiles = result[0].call(steps).schedule
        each = grid.lanes * grid.queries * grid.group * grid.keys
        found.append(each * sum(part.size for part in (tiles.full, tiles.partial)))
        return result

    monkeypatch.setattr(kernel, "prepare", noted)
    shape = jax.ShapeDtypeStruct((8, length, 8, 16), jnp.float32)
    call = functools.partial(attend, implementation="chunked", split=split, **options)
    jax.eval_shape(call, shape, shape, shape)
    return sum(found)


@pytest.mark.parametrize(
    "split", [Split(batch=("data", "tensor", "sequence")), Split(heads=("data", "tensor", "sequence"))], ids=repr
)
@pytest.mark.parametrize("mask", [None, Causal()], ids=repr)
def test_a_device_visits_its_share_of_the_tiles(split, mask, mesh, monkeypatch):
    whole = visited(monkeypatch, None, 2048, mask=mask)
    with jax.set_mesh(mesh):
        share = visited(monkeypatch, split, 2048, mask=mask)
    assert 0 < share <= 1.05 * whole / 8


def test_a_ring_in_zigzag_order_shares_a_causal_mask():
    shape, (order, _) = jax.ShapeDtypeStruct((8192, 8, 64), jnp.float32), zigzag(8192, devices=8)
    at = jax.tree.map(lambda x: x[order], Coordinates.range(8192))
    cost = functools.partial(ring_cost, shape, shape, shape, mask=Causal())
    whole = cost(devices=1).flops_forward.sum()
    assert cost(devices=8, q_at=at, kv_at=at).flops_forward.sum(axis=0).max() <= 1.05 * whole / 8


@pytest.mark.parametrize("kv_heads", [1, 2])
def test_a_device_keeps_the_key_head_that_its_query_heads_read(kv_heads, mesh):
    three = [arrays(kv_heads=kv_heads)[name] for name in ("query", "key", "value")]

    def gradients(split, implementation):
        def loss(*three):
            return jnp.sum(attend(*three, implementation=implementation, split=split) ** 2)

        return jax.jit(jax.grad(loss, (0, 1, 2)))(*three)

    with jax.set_mesh(mesh):
        actual = gradients(Split(heads=("data", "tensor")), "chunked")
    for a, b in zip(actual, gradients(None, "reference"), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_explicit_axes_split_by_themselves_and_keep_their_type():
    mesh = jax.make_mesh((2, 2, 2), ("data", "tensor", "sequence"), axis_types=(AxisType.Explicit,) * 3)
    three = [arrays()[name] for name in ("query", "key", "value")]
    wanted = attend(*three, mask=Causal(), implementation="reference")
    spec = P("data", "sequence", "tensor")
    split = [jax.device_put(x, NamedSharding(mesh, spec)) for x in three]
    # Eager and without `jax.set_mesh`: the arrays know their mesh.
    output = attend(*split, mask=Causal(), implementation="chunked")
    assert jax.typeof(output).sharding.spec[:3] == tuple(spec)
    np.testing.assert_allclose(output, wanted, atol=2e-5)


def test_vmap_over_a_split_call(mesh):
    three = [jnp.stack([x, 2 * x]) for x in (arrays()[name] for name in ("query", "key", "value"))]

    def output(split, implementation, *three):
        return attend(*three, mask=Causal(), implementation=implementation, split=split)

    with jax.set_mesh(mesh):
        split = Split(batch="data", heads="tensor")
        actual = jax.jit(jax.vmap(functools.partial(output, split, "chunked")))(*three)
    wanted = jnp.stack([output(None, "reference", *(x[i] for x in three)) for i in range(2)])
    np.testing.assert_allclose(actual, wanted, atol=2e-5)


def test_rows_that_share_their_keys_are_split_too(mesh):
    given = arrays()
    three = [given["query"], given["key"][:1], given["value"][:1]]
    with jax.set_mesh(mesh):
        output = jax.jit(functools.partial(attend, implementation="chunked", split=Split(batch="data")))(*three)
    np.testing.assert_allclose(output, attend(*three, implementation="reference"), atol=2e-5)


def test_an_empty_call_is_not_split(mesh):
    three = [arrays(size=0)[name] for name in ("query", "key", "value")]
    with jax.set_mesh(mesh):
        assert not attend(*three, implementation="chunked", split=Split(batch="data")).any()


BAD = {
    "rows": (Split(batch=("data", "tensor", "sequence")), r"the batch rows \(6\) must be a multiple of data \(2\) x"),
    "heads": (
        Split(heads=("data", "tensor", "sequence")),
        r"data \(2\) x tensor \(2\) x sequence \(2\) must divide num_kv_heads \(4\), or cut each group of 3 query",
    ),
    "axis": (Split(batch="model"), r"names 'model', but the axes of the mesh are \('data', 'tensor', 'sequence'\)"),
    "twice": (Split(batch="data", heads="data"), "splits two dims over 'data'"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_split_that_does_not_fit(name, mesh):
    split, message = BAD[name]
    three = [arrays()[name] for name in ("query", "key", "value")]
    with jax.set_mesh(mesh), pytest.raises(ValueError, match=message):
        attend(*three, implementation="chunked", split=split)


@pytest.mark.parametrize("given", [{"batch": 3}, {"batch": ["data"]}, {"mesh": "x"}], ids=repr)
def test_what_is_no_split(given):
    split = object.__new__(Split)
    for name, value in ({"batch": None, "heads": None, "sequence": None, "mesh": None} | given).items():
        object.__setattr__(split, name, value)
    # The tests' own check of types would come first.
    with pytest.raises(TypeError, match=r"must be (the name of a mesh axis, or a tuple|a jax.sharding.Mesh)"):
        inspect.unwrap(Split.__post_init__)(split)


def test_an_axis_that_is_split_already(mesh):
    split = functools.partial(attend, split=Split(batch="data"))
    with jax.set_mesh(mesh), pytest.raises(ValueError, match=r"'data', which a surrounding jax\.shard_map has split"):
        jax.shard_map(split, in_specs=P("data"), out_specs=P("data"))(
            *[arrays()[name] for name in ("query", "key", "value")]
        )


def test_a_small_call_is_checked_like_a_large_one(mesh):
    three = [arrays()[name][:5] for name in ("query", "key", "value")]
    with jax.set_mesh(mesh), pytest.raises(ValueError, match=r"the batch rows \(5\) must be a multiple of data \(2\)"):
        attend(*three, split=Split(batch="data"))


@pytree
@dataclasses.dataclass(frozen=True)
class Table(Mask):
    """A mask that looks pairs up: its array has four dims, as a boolean mask has."""

    table: Any

    def __call__(self, query, key):
        return self.table[query.batch, query.head, query.position, key.position]


def test_an_array_inside_a_mask_stays_whole(mesh):
    three = [arrays()[name] for name in ("query", "key", "value")]
    mask = Table(jnp.asarray(np.random.default_rng(4).random((B, N, T, T)) < 0.5))
    wanted = attend(*three, mask=mask, implementation="reference")
    for split in (Split(batch="data", heads="tensor"), Split(sequence="sequence")):
        with jax.set_mesh(mesh):
            output = jax.jit(functools.partial(attend, implementation="chunked", split=split))(*three, mask=mask)
        np.testing.assert_allclose(output, wanted, atol=2e-5)


def test_a_kernel_that_states_no_axes_has_the_gradients_of_one_device(mesh, monkeypatch):
    """As `splash` and `cudnn`: JAX must sum the gradients over the devices that share an array."""
    untyped = dataclasses.replace(IMPLEMENTATIONS["chunked"], typed=False, rings=False)
    monkeypatch.setitem(IMPLEMENTATIONS, "untyped", untyped)
    given = arrays(kv_heads=1) | {"bias": jnp.ones((1, N, 1, T))}

    def gradients(split, implementation):
        def loss(given):
            three = [given[name] for name in ("query", "key", "value")]
            return jnp.sum(attend(*three, bias=given["bias"], implementation=implementation, split=split) ** 2)

        return jax.jit(jax.grad(loss))(given)

    with jax.set_mesh(mesh):
        actual = gradients(Split(batch="data", heads="tensor"), "untyped")
    for name, wanted in gradients(None, "reference").items():
        np.testing.assert_allclose(actual[name], wanted, rtol=1e-4, atol=1e-4, err_msg=name)


@pytest.mark.parametrize("kv_heads", [K, 1])
@pytest.mark.parametrize("name", ["tpu_cached", "hopper_cached"])
def test_each_device_reads_its_own_part_of_a_cache(mesh, monkeypatch, name, kv_heads):
    kernel = dataclasses.replace(IMPLEMENTATIONS[name], attend=OVER_A_CACHE[name], refuse=lambda call: None)
    monkeypatch.setitem(IMPLEMENTATIONS, name, kernel)
    query, key, value = arrays(kv_heads=kv_heads, length=3).values()
    mask, at = Causal() & MaskMod(by_index), {"q_at": Coordinates.range(3, start=19), "kv_at": Coordinates.range(T)}

    def output(implementation, split, key):
        laid = KeyColumns.of(KeyValue(key, value, Coordinates.range(T)))
        columns = Columns(laid.key, laid.value, laid.finite)
        return attend_columns(query, columns, mask=mask, **at, implementation=implementation, split=split)

    spoilt = key.at[1, 7].set(jnp.nan)
    with jax.set_mesh(mesh):
        found = jax.jit(functools.partial(output, name, Split(batch="data", heads="tensor")))(spoilt)
    expected = output("reference", None, spoilt)
    assert np.isnan(expected[1]).any()
    np.testing.assert_allclose(found, expected, atol=2e-5)
    with jax.set_mesh(mesh), pytest.raises(NotImplementedError, match="cannot split a sequence over devices"):
        output(name, Split(sequence="sequence"), key)


@pytest.mark.parametrize(
    ("sizes", "spec"),
    [((1, 8, 1), P("data", None, "tensor")), ((1, 8, 1), P("data")), ((2, 2, 2), P("data", None, "tensor"))],
    ids=repr,
)
def test_layers_in_a_scan_over_explicit_axes(sizes, spec):
    """The output has the type of the queries, also for axes of size 1 and where a split names only some of the axes."""
    mesh = jax.make_mesh(sizes, ("data", "tensor", "sequence"), axis_types=(AxisType.Explicit,) * 3)
    x = jnp.asarray(np.random.default_rng(5).standard_normal((4, T, 8, H)), jnp.float32)

    def loss(split, implementation, x):
        layer = functools.partial(attend, mask=Causal(), implementation=implementation, split=split)
        return jnp.sum(jax.lax.scan(lambda x, _: (layer(x, x, x), None), x, length=2)[0] ** 2)

    wanted = jax.grad(functools.partial(loss, None, "reference"))(x)
    with jax.set_mesh(mesh):
        placed = jax.device_put(x, NamedSharding(mesh, spec))
        for split in (None, Split(batch="data")):
            actual = jax.jit(jax.grad(functools.partial(loss, split, "chunked")))(placed)
            np.testing.assert_allclose(actual, wanted, rtol=1e-5, atol=2e-5)


def test_a_mesh_of_explicit_and_auto_axes():
    kinds = (AxisType.Explicit, AxisType.Auto)
    mesh = jax.make_mesh((2, 4), ("data", "tensor"), axis_types=kinds)
    three = [arrays()[name] for name in ("query", "key", "value")]
    with jax.set_mesh(mesh):
        placed = [jax.device_put(x, NamedSharding(mesh, P("data", None, "tensor"))) for x in three]
        output = jax.jit(functools.partial(attend, implementation="chunked", split=Split(heads="tensor")))(*placed)
    np.testing.assert_allclose(output, attend(*three, implementation="reference"), atol=2e-5)


def test_a_split_without_a_mesh():
    three = [arrays()[name] for name in ("query", "key", "value")]
    with pytest.raises(ValueError, match=r"a Split needs a mesh: give Split\(mesh=...\), or call jax.set_mesh first"):
        attend(*three, split=Split(batch="data"))


def test_only_the_ring_splits_a_sequence(mesh):
    shape = jax.ShapeDtypeStruct((4, 256, 8, 64), jnp.bfloat16)
    split = Split(batch="data", sequence="sequence", mesh=mesh)
    told = explain(shape, shape, shape, mask=Causal(), platform="tpu", split=split)
    assert told.chosen == "chunked"
    assert "cannot split a sequence over devices; chunked can" in str(told.refusals["splash"])
    whole = explain(shape, shape, shape, mask=Causal(), platform="tpu", split=dataclasses.replace(split, sequence=None))
    assert whole.chosen == "tpu"
