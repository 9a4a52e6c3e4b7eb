"""A sequence that is split over devices is the same sequence: `ring_attend` against `reference` on one device."""

import functools

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from seqattn.attention import attend
from seqattn.coordinates import Coordinates
from seqattn.dropout import Dropout
from seqattn.kernels import ring
from seqattn.kernels.call import Call
from seqattn.kernels.chunked import tile_loop
from seqattn.masks import Causal, NotPadding, Prefix, SameSegment, SlidingWindow
from seqattn.ring_attention import ring_attend, ring_cost, zigzag
from seqattn.score_mod import compose
from seqattn.score_mods import Alibi, RelativePositions, SoftCap
from tests.contract import NUMPY_DTYPES, Shape, arrays, close, cotangents

SHAPE = Shape(T=48, S=48, N=4, K=2, H=3, V=5)
LENGTHS = (19, 13, 11, 5)
TEXTS = np.repeat(np.array([[1, 2, 3, 0], [4, 4, 0, 5]], np.int32), LENGTHS, axis=1)
PACKED = Coordinates(np.stack([np.concatenate([np.arange(n, dtype=np.int32) for n in LENGTHS])] * 2), TEXTS)
ONE_TEXT = jax.tree.map(lambda x: np.stack([x, x]), Coordinates.range(48))
SPLIT = P(None, "sequence")

CASES = {
    "full": (None, None),
    "causal": (Causal(), ONE_TEXT),
    "window": (Causal() & SlidingWindow(7), ONE_TEXT),
    "documents": (Causal() & SameSegment() | (Prefix(2) & SameSegment()), PACKED),
}


def mesh_of(**axes):
    count = int(np.prod(list(axes.values())))
    types = (AxisType.Auto,) * len(axes)
    return jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=types, devices=jax.devices()[:count])


def specs_of(inputs, **others):
    """Queries, keys and values are split along the sequence, pairs along the queries; the rest is on each device."""
    split = dict.fromkeys(("query", "key", "value"), SPLIT) | {"bias": P(None, None, "sequence")}
    return {name: (split | others).get(name, P()) for name in inputs}


@functools.partial(jax.jit, static_argnames=("devices", "check_vma"))
def in_parts(inputs, at, mask, directions, devices, check_vma=True):
    """Results of `ring_attend` and, by their direction, the gradients of all inputs, taken outside of the split."""

    def local(inputs, at, mask):
        located = {} if at is None else {"q_at": at, "kv_at": at}
        return ring_attend(**inputs, **located, mask=mask, axis_name="sequence", return_lse=True)

    def call(inputs):
        in_specs = (specs_of(inputs), SPLIT, P() if not isinstance(mask, jax.Array) else P(None, None, "sequence"))
        mesh = mesh_of(sequence=devices)
        mapped = jax.shard_map(local, mesh=mesh, in_specs=in_specs, out_specs=SPLIT, check_vma=check_vma)
        return mapped(inputs, at, mask)

    results, pull_back = jax.vjp(call, inputs)
    return results, pull_back(directions)[0]


@jax.jit
def whole(inputs, at, mask, directions):
    """The same on one device."""
    located = {} if at is None else {"q_at": at, "kv_at": at}

    def call(inputs):
        return attend(**inputs, **located, mask=mask, implementation="reference", return_lse=True)

    results, pull_back = jax.vjp(call, inputs)
    return results, pull_back(directions)[0]


def agree(actual, expected, dtype="float32"):
    (output, lse), gradients = actual
    (expected_output, expected_lse), expected_gradients = expected
    assert output.dtype == expected_output.dtype
    close(output, expected_output, dtype, "output")
    close(lse, expected_lse, what="lse")
    paths, _ = jax.tree.flatten_with_path(expected_gradients)
    for (path, wanted), gradient in zip(paths, jax.tree.leaves(gradients), strict=True):
        assert gradient.dtype == wanted.dtype
        what = f"gradient of {jax.tree_util.keystr(path)}"
        if wanted.shape == ():  # thousands of terms of both signs
            np.testing.assert_allclose(gradient, wanted, rtol=1e-4, err_msg=what)
        else:
            close(gradient, wanted, dtype, what)


def permuted(order, *trees):
    """Everything `[B, T, ...]` with its tokens in another order."""
    return jax.tree.map(lambda x: x if np.ndim(x) < 2 else x[:, order], trees)


@pytest.mark.parametrize(
    ("case", "devices"),
    [
        ("full", 1),
        ("full", 2),
        *(("causal", n) for n in (1, 2, 8)),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in (("causal", 4), ("window", 4), ("documents", 2))),
        ("documents", 8),
    ],
)
def test_values_and_gradients_are_those_of_one_device(case, devices):
    """In the order of the text, and zigzag: results come back in that order."""
    mask, at = CASES[case]
    inputs, directions = arrays(SHAPE) | {"scale": np.float32(-0.7)}, cotangents(SHAPE)
    expected = whole(inputs, at, mask, directions)
    agree(in_parts(inputs, at, mask, directions, devices), expected)
    order, inverse = zigzag(48, devices)
    moved_inputs, moved_at, moved_directions = permuted(order, inputs, at, directions)
    moved = in_parts(moved_inputs, moved_at, mask, moved_directions, devices)
    agree(permuted(inverse, *moved), expected)


@pytest.mark.parametrize(
    ("check_vma", "bias"), [pytest.param(True, (2, 4, 48, 48), marks=pytest.mark.slow), (False, (1, 1, 48, 1))]
)
def test_score_mods_biases_and_their_gradients(check_vma, bias):
    """Learned slopes, distances that read the query, a cap, a bias of each pair or shared by all keys."""
    random = np.random.default_rng(5)
    learned = [random.normal(size=shape).astype(np.float32) for shape in ((4,), (5, 4, 3))]
    mod = compose(SoftCap(2.0), Alibi(learned[0]), RelativePositions(learned[1]))
    inputs = arrays(SHAPE) | {"scale": np.float32(0.7), "score_mod": mod}
    mask = Causal() & SameSegment()
    inputs["bias"] = random.normal(size=bias).astype(np.float32)
    expected = whole(inputs, PACKED, mask, cotangents(SHAPE))
    agree(in_parts(inputs, PACKED, mask, cotangents(SHAPE), 4, check_vma), expected)


def test_a_boolean_mask_has_a_column_for_each_key_of_all_devices():
    pairs = np.random.default_rng(2).random((2, 1, 48, 48)) < 0.6
    pairs[:, :, 5] = False
    expected = whole(arrays(SHAPE), None, pairs, cotangents(SHAPE))
    assert not np.any(expected[0][0][:, 5])
    agree(in_parts(arrays(SHAPE), None, jnp.asarray(pairs), cotangents(SHAPE), 4), expected)


def test_a_closure_over_traced_arrays_has_its_gradient():
    inputs, mesh = {name: jnp.asarray(x[0]) for name, x in arrays(SHAPE).items()}, mesh_of(sequence=4)
    at = jax.tree.map(lambda x: x[0], ONE_TEXT)

    def loss(factor, attention):
        return jnp.sum(attention(lambda score, query, key, head: score * factor[head]) ** 2)

    def in_parts(mod):
        def local(inputs, at):
            return ring_attend(**inputs, axis_name="sequence", mask=Causal(), score_mod=mod, q_at=at, kv_at=at)

        specs = {"in_specs": (P("sequence"), P("sequence")), "out_specs": P("sequence")}
        return jax.shard_map(local, mesh=mesh, **specs)(inputs, at)

    def on_one(mod):
        return attend(**inputs, mask=Causal(), score_mod=mod, q_at=at, kv_at=at, implementation="reference")

    factor = jnp.array([0.5, 1, -1, 2])
    actual, expected = (jax.jit(jax.grad(functools.partial(loss, attention=f)))(factor) for f in (in_parts, on_one))
    close(actual, expected)


@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_other_dtypes(dtype):
    with jax.enable_x64(dtype == "float64"):
        inputs, directions = arrays(SHAPE, dtype), cotangents(SHAPE, dtype)
        mask = Causal() & SameSegment()
        high = {name: x.astype(np.float64 if dtype == "float64" else np.float32) for name, x in inputs.items()}
        up = tuple(x.astype(high["query"].dtype) for x in directions)
        (output, lse), gradients = whole(high, PACKED, mask, up)
        narrow = {name: np.asarray(x).astype(NUMPY_DTYPES[dtype]) for name, x in gradients.items()}
        agree(
            in_parts(inputs, PACKED, mask, directions, 4),
            ((np.asarray(output).astype(NUMPY_DTYPES[dtype]), lse), narrow),
            dtype,
        )


@pytest.mark.parametrize("garbage", [np.nan, np.inf])
def test_what_is_masked_leaves_no_trace_and_what_is_visible_does(garbage):
    inputs, directions, mask = arrays(SHAPE), cotangents(SHAPE), Causal() & NotPadding() & SameSegment()
    clean = in_parts(inputs, PACKED, mask, directions, 4)
    spoilt = {name: x.copy() for name, x in inputs.items()}
    for x in spoilt.values():
        x[0, -5:] = garbage  # padding
    (output, lse), gradients = in_parts(spoilt, PACKED, mask, directions, 4)
    jax.tree.map(np.testing.assert_array_equal, ((output, lse), gradients), clean)
    assert not output[0, -5:].any()
    assert np.all(lse[0, -5:] == -np.inf)
    assert not any(np.any(gradient[0, -5:]) for gradient in gradients.values())
    inputs["value"][0, 19] = garbage  # the first token of the second text
    seen = np.zeros((2, 48), bool)
    seen[0, 19:32] = True
    output, lse = in_parts(inputs, PACKED, mask, directions, 4)[0]
    np.testing.assert_array_equal(np.isnan(output).any(axis=(2, 3)), seen)
    np.testing.assert_array_equal(np.isnan(lse).all(axis=2), seen)
    np.testing.assert_array_equal(output[~seen], clean[0][0][~seen])


def test_huge_logits_in_one_block_do_not_overflow():
    inputs = arrays(SHAPE) | {"scale": np.float32(0.5)}
    inputs["key"][:, 30] *= 1e4
    expected = whole(inputs, ONE_TEXT, Causal(), cotangents(SHAPE))
    agree(in_parts(inputs, ONE_TEXT, Causal(), cotangents(SHAPE), 4), expected)


@pytest.mark.parametrize(
    ("axes", "tokens", "at", "axis_name"),
    [
        ({"data": 2, "sequence": 4}, P("data", "sequence"), P("data", "sequence"), "sequence"),
        ({"sequence": 4, "heads": 2}, P(None, "sequence", "heads"), P(None, "sequence"), "sequence"),
        ({"node": 2, "device": 4}, P(None, ("node", "device")), P(None, ("node", "device")), ("node", "device")),
    ],
)
def test_two_mesh_axes(axes, tokens, at, axis_name):
    """Slopes are split with the heads; the scale is on all devices, and its gradient the sum over them."""
    mask, slopes = Causal() & SameSegment(), np.array([0.1, 0.2, 0.3, 0.4], np.float32)
    inputs, directions = arrays(SHAPE) | {"scale": np.float32(0.7), "score_mod": Alibi(slopes)}, cotangents(SHAPE)

    def local(inputs, at):
        return ring_attend(**inputs, mask=mask, q_at=at, kv_at=at, axis_name=axis_name, return_lse=True)

    @jax.jit
    def with_gradients(inputs):
        split = dict.fromkeys(("query", "key", "value"), tokens) | {"score_mod": P(*tokens[2:])}
        in_specs = (specs_of(inputs, **split), at)
        mapped = jax.shard_map(local, mesh=mesh_of(**axes), in_specs=in_specs, out_specs=tokens)
        results, pull_back = jax.vjp(lambda inputs: mapped(inputs, PACKED), inputs)
        return results, pull_back(directions)[0]

    agree(with_gradients(inputs), whole(inputs, PACKED, mask, directions))


def test_gradients_inside_of_the_split():
    """Of a sum over all devices; by what is on all devices, its gradient is that of the sum, once."""
    inputs, mesh = {name: x[0] for name, x in arrays(SHAPE).items()}, mesh_of(sequence=4)
    at, scale = jax.tree.map(lambda x: x[0], ONE_TEXT), jnp.float32(0.7)

    def local(inputs, scale, at):
        def loss(inputs, scale):
            output = ring_attend(**inputs, scale=scale, mask=Causal(), q_at=at, kv_at=at, axis_name="sequence")
            return jax.lax.psum(jnp.sum(output**2), "sequence")

        return jax.grad(loss, argnums=(0, 1))(inputs, scale)

    split = P("sequence")
    actual = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=(split, P(), split), out_specs=(split, P())))(
        inputs, scale, at
    )

    def loss(inputs, scale):
        return jnp.sum(attend(**inputs, scale=scale, mask=Causal(), implementation="reference") ** 2)

    expected = jax.jit(jax.grad(loss, argnums=(0, 1)))(inputs, scale)
    jax.tree.map(close, actual[0], expected[0])
    np.testing.assert_allclose(actual[1], expected[1], rtol=1e-4)


def test_vmap_inside_and_outside_of_the_split():
    inputs, mesh, at = arrays(SHAPE), mesh_of(sequence=4), jax.tree.map(lambda x: x[0], ONE_TEXT)

    def local(query, key, value, at):
        return ring_attend(query, key, value, mask=Causal(), q_at=at, kv_at=at, axis_name="sequence")

    over_rows = jax.vmap(local, in_axes=(0, 0, 0, None))
    inside = jax.shard_map(over_rows, mesh=mesh, in_specs=(SPLIT,) * 3 + (P("sequence"),), out_specs=SPLIT)
    split = jax.shard_map(local, mesh=mesh, in_specs=P("sequence"), out_specs=P("sequence"))
    outside = jax.vmap(split, in_axes=(0, 0, 0, None))

    def with_gradient(attention, at):
        def loss(inputs):
            output = attention(**inputs, at=at)
            return jnp.sum(output**2), output

        return jax.jit(jax.grad(loss, has_aux=True))(inputs)

    def on_one(query, key, value, at):
        return attend(query, key, value, mask=Causal(), implementation="reference")

    expected = with_gradient(on_one, at)
    for attention in (inside, outside):
        flat = with_gradient(lambda query, key, value, at, f=attention: f(query, key, value, at), at)
        jax.tree.map(close, flat, expected)


def transfers(jaxpr, times=1):
    """Bytes that each device sends in a program: those of each ppermute, as often as it runs."""
    total = 0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "ppermute":
            total += times * sum(x.aval.size * x.aval.dtype.itemsize for x in eqn.invars)
        runs = times * eqn.params.get("length", 1)
        inside = sum(transfers(x, runs) for x in jax.extend.core.jaxprs_in_params(eqn.params))
        assert not (inside and eqn.primitive.name == "while"), "how often it runs is not known"
        total += inside
    return total


@pytest.mark.parametrize("devices", [1, 2, 8])
@pytest.mark.parametrize("mask", [None, Causal()], ids=["full", "causal"])
def test_what_is_sent_is_what_ring_cost_says(devices, mask):
    inputs, mesh = jax.tree.map(jnp.asarray, arrays(SHAPE, "bfloat16")), mesh_of(sequence=devices)
    located = {} if mask is None else {"q_at": ONE_TEXT, "kv_at": ONE_TEXT}
    cost = ring_cost(**inputs, devices=devices, mask=mask, **located)

    def forward(inputs, located):
        def local(inputs, located):
            return ring_attend(**inputs, **located, mask=mask, axis_name="sequence")

        return jax.shard_map(local, mesh=mesh, in_specs=(SPLIT, SPLIT), out_specs=SPLIT)(inputs, located)

    def both(inputs, located):
        return jax.vjp(lambda inputs: forward(inputs, located), inputs)[1](inputs["value"].repeat(2, axis=2))

    sent = transfers(jax.make_jaxpr(forward)(inputs, located).jaxpr)
    assert sent == cost.bytes_forward
    assert (sent == 0) == (devices == 1)
    assert transfers(jax.make_jaxpr(both)(inputs, located).jaxpr) == cost.bytes_forward + cost.bytes_backward


def test_dropout_is_refused():
    x, at = jnp.ones((1, 2, 1, 3)), Coordinates.range(2)
    unused = dict.fromkeys(("mask", "bias", "score_mod", "rows"))
    dropout, located = Dropout(0.5, jax.random.key(0)), {"q_at": at, "kv_at": at}
    call = Call(x, x, x, **unused, **located, scale=1.0, dropout=dropout)
    with pytest.raises(NotImplementedError, match="no dropout: it depends on a weight's index in the whole batch"):
        ring.attend(call, "sequence")


def test_second_derivatives_are_refused():
    def loss(query):
        def local(query):
            return ring_attend(query, query, query, axis_name="sequence")

        return jnp.sum(jax.shard_map(local, mesh=mesh_of(sequence=2), in_specs=SPLIT, out_specs=SPLIT)(query))

    with pytest.raises(NotImplementedError, match="the ring has no second derivatives"):
        jax.make_jaxpr(jax.grad(lambda x: jnp.sum(jax.grad(loss)(x))))(jnp.ones((1, 4, 1, 2)))


def tiles_visited(monkeypatch, mask, order, length):
    """The tiles that all devices visit in a forward ring, counted while it runs."""
    counts, visit = [], tile_loop.visit

    def noted(call, step, carry):
        for steps in (call.schedule.full, call.schedule.partial):
            number = len(steps.at) if steps.count is None else steps.count
            jax.debug.callback(lambda n: counts.append(int(n)), jnp.asarray(number))
        return visit(call, step, carry)

    monkeypatch.setattr(tile_loop, "visit", noted)
    x = jnp.zeros((length, 1, 2))
    at = jax.tree.map(lambda field: jnp.asarray(field)[order], Coordinates.range(length))

    def local(x, at):
        return ring_attend(x, x, x, axis_name="sequence", mask=mask, q_at=at, kv_at=at)

    mesh = mesh_of(sequence=4)
    parts = P("sequence")
    run = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=(parts, parts), out_specs=parts))
    jax.block_until_ready(run(x, at))
    jax.effects_barrier()
    return sum(counts)


def test_a_ring_visits_the_tiles_that_its_cost_counts(monkeypatch):
    length, tokens = 8192, jax.ShapeDtypeStruct((8192, 1, 2), np.float32)
    order, _ = zigzag(length, devices=4)
    at = jax.tree.map(lambda field: jnp.asarray(field)[order], Coordinates.range(length))
    # No mask at all would be cut into other tiles: here both are chosen at run time.
    masks = Causal(), NotPadding()
    cost = functools.partial(ring_cost, tokens, tokens, tokens, devices=4, q_at=at, kv_at=at)
    causal, full = (cost(mask=mask).flops_forward.sum() for mask in masks)
    visited = [tiles_visited(monkeypatch, mask, order, length) for mask in masks]
    assert visited[0] / visited[1] == pytest.approx(causal / full, rel=0.02)
    assert 0 < visited[0] < 0.6 * visited[1]
