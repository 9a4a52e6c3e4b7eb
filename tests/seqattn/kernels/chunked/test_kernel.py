"""What the tiled kernel promises beyond the contract: memory, transformations, platforms, lengths around tiles."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from seqattn.attention import attend
from seqattn.coordinates import Coordinates
from seqattn.dropout import Dropout
from seqattn.kernels.chunked import schedule as tiles
from seqattn.mask import MaskMod
from seqattn.masks import Causal, SameSegment, SlidingWindow
from seqattn.score_mod import ScoreFunction
from seqattn.score_mods import Alibi, SoftCap
from tests import oracle
from tests.contract import Shape, agrees_with_oracle, arrays, close, cotangents, equal, forward, with_gradients

SHAPE = Shape(batch=(2,), T=13, S=13, N=4, K=2, H=3, V=5)
chunked = functools.partial(attend, implementation="chunked")


@pytest.mark.parametrize(
    "length", [1, 3, 4, 5, 7, *(pytest.param(length, marks=pytest.mark.slow) for length in (8, 9, 11, 12)), 13]
)
def test_a19_lengths_around_the_tiles(length):
    """Tiles of 4 queries and 4 keys, in blocks of 2: whole tiles, one more, one less."""
    shape = Shape(batch=(1,), T=length, S=length + 2, N=2, K=2, H=3, V=5)
    pairs = np.tri(length, length + 2, 2, dtype=bool)
    located = {"q_at": Coordinates.range(length, start=2), "kv_at": Coordinates.range(length + 2)}
    agrees_with_oracle("chunked", shape, pairs=pairs, mask=Causal(), **located)


@pytest.mark.parametrize("lanes", [2, 6, 12])
def test_tiles_of_several_heads_and_rows(lanes, monkeypatch):
    """Two heads of a row, all heads of a row, and several rows in a tile, each with its own texts."""
    monkeypatch.setattr(tiles, "_LANES", lanes)
    shape = Shape(batch=(4,), T=11, S=11, N=12, K=6, H=3, V=5)
    segment = np.random.default_rng(0).integers(0, 3, (4, 11)).astype(np.int32)
    at = Coordinates.from_segments(jnp.asarray(np.sort(segment, axis=1)))
    pairs = oracle.pairs(lambda qp, qs, kp, ks: kp <= qp and qs == ks != 0, at, at)[:, None]
    bias = np.random.default_rng(1).normal(size=(4, 12, 1, 11)).astype(np.float32)
    agrees_with_oracle("chunked", shape, pairs=pairs, mask=Causal() & SameSegment(), q_at=at, kv_at=at, bias=bias)


def test_traced_coordinates_give_what_known_ones_give():
    """The schedule is made at run time there; values and gradients are bitwise the same."""
    at, mask = Coordinates.range(13), Causal() & SlidingWindow(5)
    traced = jax.tree.map(jnp.asarray, at)
    inputs, directions = arrays(SHAPE), cotangents(SHAPE)
    known = with_gradients("chunked", inputs, directions, mask=mask)
    equal(with_gradients("chunked", inputs, directions, mask=mask, q_at=traced, kv_at=traced), known)


def test_what_no_query_may_see_is_never_computed():
    """Time does not show it in a test, so the number of steps does: as many as the window needs, not T * S."""
    at = jax.tree.map(lambda x: x[None], Coordinates.range(64))
    causal, window = (
        tiles.plan((1, 1, 1, 64, 64), mask, False, at, at)[1] for mask in (Causal(), Causal() & SlidingWindow(4))
    )
    steps = [sum(x.size for x in (schedule.full, schedule.partial)) for schedule in (causal, window)]
    assert steps[1] < steps[0] / 3


@pytest.mark.parametrize("gradient", [False, True])
def test_memory_grows_with_the_length_and_not_with_its_square(gradient, monkeypatch):
    """Temporary bytes of the compiled program, with the tiles that users get; 16 times less than the scores alone."""
    monkeypatch.undo()

    def temporary(length):
        x = jax.ShapeDtypeStruct((1, length, 2, 8), jnp.float32)
        call = functools.partial(chunked, mask=Causal())
        if gradient:
            call = jax.grad(lambda *inputs: chunked(*inputs, mask=Causal()).sum(), (0, 1, 2))
        return jax.jit(call).lower(x, x, x).compile().memory_analysis().temp_size_in_bytes

    short, long = temporary(4096), temporary(16384)
    assert long < 4.5 * short
    assert long < 2 * 16384**2 * 4 / 16


def test_gradients_reach_what_a_mask_and_a_score_mod_close_over():
    inputs = arrays(SHAPE)
    table = jnp.asarray(np.random.default_rng(0).random((13, 13)) < 0.7)
    slope = jnp.float32(0.3)

    @functools.partial(jax.jit, static_argnames="implementation")
    def gradients(inputs, table, slope, implementation):
        def loss(inputs, slope):
            mask = MaskMod(lambda query, key: table[query.position, key.position])

            def mod(score, query, key, head):
                return score - slope * (query.position - key.position).astype(score.dtype)

            return jnp.sum(attend(**inputs, mask=mask, score_mod=mod, implementation=implementation) ** 2)

        return jax.grad(loss, (0, 1))(inputs, slope)

    for actual, expected in zip(
        *(jax.tree.leaves(gradients(inputs, table, slope, name)) for name in ("chunked", "reference")), strict=True
    ):
        assert np.any(expected)
        close(actual, expected)


def test_vmap_over_tables_that_a_mask_closes_over():
    inputs = {name: jnp.asarray(x) for name, x in arrays(SHAPE).items()}
    tables = jnp.asarray(np.random.default_rng(0).random((3, 13, 13)) < 0.7)

    def one(table):
        return chunked(**inputs, mask=MaskMod(lambda query, key: table[query.position, key.position]))

    output = jax.jit(jax.vmap(one))(tables)
    for i, table in enumerate(np.asarray(tables)):
        close(output[i], oracle.attention(**inputs, visible=table).output)


def test_vmap_over_coordinates_of_a_gradient():
    """The number of steps differs between the mapped calls."""
    inputs = {name: x[0] for name, x in arrays(SHAPE).items()}
    segment = np.sort(np.random.default_rng(0).integers(0, 4, (3, 13)), axis=1).astype(np.int32)

    def gradient(segment):
        at = Coordinates.from_segments(segment)
        return jax.grad(lambda x: jnp.sum(chunked(**x, mask=SameSegment(), q_at=at, kv_at=at) ** 2))(inputs)

    mapped = jax.jit(jax.vmap(gradient))(jnp.asarray(segment))
    for i, row in enumerate(segment):
        at = Coordinates.from_segments(jnp.asarray(row))
        pairs = oracle.pairs(lambda qp, qs, kp, ks: qs == ks != 0, at, at)
        expected = oracle.attention(**inputs, visible=pairs)
        nothing = np.zeros(expected.lse.shape)
        gradients = oracle.attention_gradients(**inputs, d_output=2 * expected.output, d_lse=nothing, visible=pairs)
        for name in inputs:
            close(mapped[name][i], gradients[name], what=name)


def test_checkpoint_and_donation():
    inputs = {name: jnp.asarray(x) for name, x in arrays(SHAPE).items()}

    def loss(inputs):
        return jnp.sum(chunked(**inputs, mask=Causal()) ** 2)

    plain = jax.jit(jax.grad(loss))(inputs)
    equal(jax.jit(jax.grad(jax.checkpoint(loss)))(inputs), plain)
    donated = jax.jit(lambda inputs: jax.tree.map(jnp.subtract, inputs, jax.grad(loss)(inputs)), donate_argnums=0)
    expected = jax.tree.map(np.subtract, arrays(SHAPE), plain)
    for name, after in donated(inputs).items():
        close(after, expected[name], what=name)
    assert inputs["query"].is_deleted()


@pytest.mark.parametrize("check_vma", [True, False])
def test_shard_map_over_batch_and_heads(check_vma):
    """The slope is the same on all devices: its gradient is the sum of theirs."""
    mesh = jax.make_mesh((2, 2), ("data", "heads"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    inputs, slope = arrays(SHAPE), jnp.float32(0.3)

    def local(inputs, slope):
        def mod(score, query, key, head):
            return score - slope * (query.position - key.position).astype(score.dtype)

        return chunked(**inputs, mask=Causal(), score_mod=mod)

    split = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(P("data", None, "heads"), P()),
        out_specs=P("data", None, "heads"),
        check_vma=check_vma,
    )
    actual, expected = (
        jax.jit(jax.value_and_grad(lambda *x, call=call: jnp.sum(call(*x) ** 2), (0, 1)))(inputs, slope)
        for call in (split, local)
    )
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        close(a, b)


@pytest.mark.parametrize("platform", ["cpu", "cuda", "tpu"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_it_lowers_for_every_platform(platform, dtype):
    x, lengths = jax.ShapeDtypeStruct((2, 13, 4, 8), dtype), jax.ShapeDtypeStruct((2,), jnp.int32)

    def loss(query, key, value, lengths):
        at = Coordinates.from_lengths(lengths, 13)
        return jnp.sum(chunked(query, key, value, mask=Causal() & SameSegment(), q_at=at, kv_at=at))

    lowered = jax.jit(jax.grad(loss, (0, 1, 2))).trace(x, x, x, lengths).lower(lowering_platforms=(platform,))
    assert "stablehlo.while" in lowered.as_text()


def test_derivatives_that_only_the_reference_has_are_refused_with_that_hint():
    inputs = {name: jnp.asarray(x) for name, x in arrays(SHAPE).items()}

    def loss(inputs):
        return jnp.sum(chunked(**inputs, mask=Causal()))

    with pytest.raises(NotImplementedError, match=r"forward-mode derivatives .* 'reference'"):
        jax.jvp(loss, (inputs,), (inputs,))
    with pytest.raises(NotImplementedError, match=r"second derivatives .* 'reference'"):
        jax.grad(lambda x: jnp.sum(jax.grad(loss)(x)["query"]))(inputs)


def test_dropout_is_the_same_for_every_tile(monkeypatch):
    """What is dropped is decided by the pair, not by the tile: the reference has the same pattern (contract)."""
    inputs, directions = arrays(SHAPE), cotangents(SHAPE)
    options = {"mask": Causal(), "dropout": Dropout(0.3, jax.random.key(0))}
    small = with_gradients("chunked", inputs, directions, **options)
    monkeypatch.undo()
    jax.clear_caches()
    whole = with_gradients("chunked", inputs, directions, **options)
    for actual, expected in zip(jax.tree.leaves(small), jax.tree.leaves(whole), strict=True):
        close(actual, expected)


_NOT_LAST = np.arange(SHAPE.S) < SHAPE.S - 1


@pytest.mark.parametrize(
    ("options", "hides", "last"),
    [
        ({}, False, 1),
        ({"bias": np.full((SHAPE.T, SHAPE.S), 0.25, np.float32)}, False, 1),
        ({"mask": Causal()}, True, 1),
        # Scores of a negative last key have no logarithm. It is hidden, and so must be what repeats it.
        ({"mask": np.broadcast_to(_NOT_LAST, (SHAPE.T, SHAPE.S))}, True, -9),
        ({"bias": np.broadcast_to(np.where(_NOT_LAST, np.float32(0.25), -np.inf), (SHAPE.T, SHAPE.S))}, True, -9),
    ],
    ids=["nothing", "bias", "causal", "array", "hiding-bias"],
)
def test_a_score_mod_that_is_infinite_at_zero_meets_no_padding(options, hides, last):
    """Padding has no pair whose logarithm is infinite, which would make the gradient of the parameter NaN."""
    inputs = {name: jnp.abs(jnp.asarray(x)) + 0.1 for name, x in arrays(SHAPE).items()}
    inputs["key"] = inputs["key"].at[..., -1, :, :].multiply(last)

    def loss(implementation, scale, inputs):
        def logarithm(score, query, key, head):
            # Masked pairs have scores of 0 by contract: it must be finite there, if there are any.
            return scale * jnp.log(jnp.where(score == 0, 1, score) if hides else score)

        mod = ScoreFunction(logarithm)
        given = {name: jnp.asarray(x) if isinstance(x, np.ndarray) else x for name, x in options.items()}
        return jnp.sum(jnp.sin(attend(**inputs, **given, score_mod=mod, implementation=implementation)))

    for found, expected in zip(
        *(
            jax.tree.leaves(jax.jit(jax.grad(functools.partial(loss, name), (0, 1)))(jnp.float32(0.7), inputs))
            for name in ("chunked", "reference")
        ),
        strict=True,
    ):
        assert np.isfinite(expected).all()
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-5)


def test_a_score_mod_of_infinite_slope_at_zero_meets_no_padding():
    """The queries that fill the last tile have scores of 0, where the slope of the square root is infinite."""
    inputs, directions = arrays(SHAPE), cotangents(SHAPE)

    def root(score, query, key, head):
        return jnp.sign(score) * jnp.sqrt(jnp.abs(score))

    for options in ({}, {"mask": Causal()}):
        (actual, expected) = (
            with_gradients(name, inputs, directions, score_mod=ScoreFunction(root), **options)[1]
            for name in ("chunked", "reference")
        )
        for name, gradient in expected.items():
            assert np.isfinite(gradient).all()
            np.testing.assert_allclose(actual[name], gradient, rtol=1e-3, atol=1e-3 * np.abs(gradient).max())


def test_what_only_a_score_mod_hides_leaves_no_trace_after_a_cap():
    """The cap has a derivative at NaN that is NaN."""
    inputs, directions = arrays(SHAPE), cotangents(SHAPE)
    inputs["key"][0, 3] = np.nan
    inputs["bias"] = np.random.default_rng(0).normal(size=(2, 4, 13, 13)).astype(np.float32)

    def hidden(score, query, key, head):
        return jnp.where(key.position == 3, -jnp.inf, score)

    mod = SoftCap(2.0).then(hidden)
    actual, expected = (with_gradients(name, inputs, directions, score_mod=mod) for name in ("chunked", "reference"))
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert np.isfinite(b).all()
        close(a, b)


def test_gradients_outside_of_vmap_and_scan_over_what_a_mask_closes_over():
    inputs = {name: jnp.asarray(x) for name, x in arrays(SHAPE).items()}
    tables = jnp.asarray(np.random.default_rng(0).random((2, 13, 13)) < 0.7)

    def loss(inputs, table, implementation="chunked"):
        mask = Causal() & MaskMod(lambda query, key: table[query.position, key.position])
        return jnp.sum(attend(**inputs, mask=mask, implementation=implementation))

    expected = jax.jit(jax.grad(lambda x: sum(loss(x, table, "reference") for table in tables)))(inputs)
    mapped = jax.grad(lambda x: jnp.sum(jax.vmap(loss, in_axes=(None, 0))(x, tables)))(inputs)
    scanned = jax.grad(lambda x: jax.lax.scan(lambda s, table: (s + loss(x, table), None), 0.0, tables)[0])(inputs)
    for name, gradient in expected.items():
        close(mapped[name], gradient, what=name)
        close(scanned[name], gradient, what=name)


@pytest.mark.parametrize("implementation", ["chunked", "reference"])
def test_closures_inside_shard_map_vary_as_their_arrays_do(implementation):
    """`factor` is split with the heads, `shift` and `table` are on all devices; each is cast where it meets a score."""
    mesh = jax.make_mesh((2, 2), ("data", "heads"), axis_types=(AxisType.Auto,) * 2, devices=jax.devices()[:4])
    factor, shift = np.arange(1, 5, dtype=np.float32), np.float32(0.3)
    table = jnp.asarray(np.random.default_rng(0).random(13) < 0.5)

    def local(inputs, factor, shift, table, implementation=implementation):
        def mod(score, query, key, head):
            behind = query.position > key.position
            return jnp.where(behind, score * factor[head] + jax.nn.softplus(shift), score * 2.0)

        mask = MaskMod(lambda query, key: jnp.where(query.position >= key.position, True, table[key.position]))
        return attend(**inputs, mask=mask, score_mod=mod, implementation=implementation)

    def gradients(call):
        def loss(inputs, factor, shift):
            return jnp.sum(call(inputs, factor, shift, table) ** 2)

        return jax.jit(jax.value_and_grad(loss, (0, 1, 2)))(arrays(SHAPE), factor, shift)

    by_head = P("data", None, "heads")
    split = jax.shard_map(local, mesh=mesh, in_specs=(by_head, P("heads"), P(), P()), out_specs=by_head)
    expected = gradients(functools.partial(local, implementation="reference"))
    for a, b in zip(jax.tree.leaves(gradients(split)), jax.tree.leaves(expected), strict=True):
        close(a, b)


@pytest.mark.parametrize("spec", [P("data"), P("data", None, "heads")], ids=str)
def test_arrays_that_are_split_over_explicit_axes(spec):
    mesh = jax.make_mesh((2, 2), ("data", "heads"), axis_types=(AxisType.Explicit,) * 2, devices=jax.devices()[:4])

    def results(inputs, slopes, implementation):
        def loss(inputs, slopes):
            output = attend(**inputs, mask=Causal(), score_mod=Alibi(slopes), implementation=implementation)
            return jnp.sum(output**2), output

        (_, output), gradients = jax.value_and_grad(loss, (0, 1), has_aux=True)(inputs, slopes)
        return output, gradients

    run = jax.jit(results, static_argnums=2)
    inputs, slopes = arrays(SHAPE), np.arange(4, dtype=np.float32)
    expected = run(inputs, slopes, "reference")
    with jax.set_mesh(mesh):
        split = jax.device_put(inputs, NamedSharding(mesh, spec))
        actual = run(split, jax.device_put(slopes, NamedSharding(mesh, P())), "chunked")
    assert jax.typeof(actual[0]).sharding.spec == P(*spec, *[None] * (4 - len(spec)))
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        close(a, b)


def test_a_score_mod_without_a_derivative_runs_forward():
    @jax.custom_vjp
    def rounded(score):
        return jnp.round(score)

    def refuse(*residuals):
        raise NotImplementedError("no derivative")

    rounded.defvjp(refuse, refuse)
    mod = ScoreFunction(lambda score, query, key, head: rounded(score))
    inputs = arrays(SHAPE)
    actual, expected = (forward(name, inputs, mask=Causal(), score_mod=mod)[0] for name in ("chunked", "reference"))
    close(actual, expected)
