"""What the kernel for TPUs promises beyond the contract: gradients of what masks and scores capture, memory, lowering.

No TPU is needed: Pallas interprets the kernel, or lowers it. tests/benchmarks/compile compiles it.
"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given, settings

from seqattn.attention import attend
from seqattn.coordinates import Coordinates
from seqattn.dropout import Dropout
from seqattn.kernels import reference, tpu
from seqattn.kernels.call import Call
from seqattn.kernels.dispatch import explain
from seqattn.kernels.tpu.plan import prepare
from seqattn.mask import MaskMod
from seqattn.masks import Causal, Dilated, NotPadding, Prefix, SameSegment, SlidingWindow
from seqattn.score_mod import ScoreFunction
from seqattn.score_mods import Alibi, RelativeBuckets, RelativePositions, SoftCap
from tests.contract import Shape, arrays, close, small_tpu_tiles
from tests.mask_trees import coordinates, mask_trees

SHAPE = Shape(batch=(2,), T=13, S=11, N=4, K=2, H=3, V=5)


def _call(inputs, mask=None, score_mod=None, at=None, dropout=None):
    q_at, kv_at = at or (None, None)
    given = {"mask": mask, "score_mod": score_mod, "q_at": q_at, "kv_at": kv_at, "dropout": dropout}
    return Call.of(*inputs, bias=None, scale=None, **given)


def _both(make, *learned, shape=SHAPE, dtype="float32"):
    """Results and gradients of the kernel and of the reference, for `make(inputs, *learned) -> Call`."""
    inputs = tuple(jnp.asarray(x) for x in arrays(shape, dtype).values())

    def loss(kernel, inputs, learned):
        output, lse = kernel(make(inputs, *learned))
        seen = jnp.where(jnp.isfinite(lse), lse, 0)
        # The sum itself is not compared: its terms cancel, so that it has fewer digits than they.
        return jnp.sum(jnp.sin(output.astype(jnp.float32))) + jnp.sum(jnp.cos(seen)), (output, lse)

    def run(kernel):
        both = jax.value_and_grad(functools.partial(loss, kernel), argnums=(0, 1), has_aux=True)
        (_, results), gradients = jax.jit(both)(inputs, learned)
        return results, gradients

    with small_tpu_tiles():
        return run(functools.partial(tpu.attend, interpret=True)), run(reference.attend)


def _close(found, expected, dtype="float32"):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        close(a, b, dtype)


AT = Coordinates.range(13, start=2), Coordinates.range(11)
TABLE = np.random.default_rng(7).normal(size=(8, 4)).astype(np.float32)


@pytest.mark.parametrize(
    "mod",
    [
        Alibi,
        lambda x: ScoreFunction(lambda score, query, key, head, cap: cap * jnp.tanh(score / cap), 2 + x[0] ** 2),
        lambda x: ScoreFunction(lambda score, query, key, head, x: jax.nn.relu(score) * x[head] + x[query.batch], x),
        lambda x: ScoreFunction(
            lambda score, query, key, head, x: score + x[head] * key.position.astype(jnp.float32), x
        ),
    ],
    ids=["by_head", "scalar", "by_head_and_row", "times_a_position"],
)
def test_gradients_reach_what_a_score_function_captures(mod):
    _close(*_both(lambda inputs, x: _call(inputs, Causal(), mod(x), AT), jnp.asarray(TABLE[0])))


def test_gradients_reach_a_table_of_buckets():
    def make(inputs, table):
        return _call(inputs, Causal() & SlidingWindow(9), RelativeBuckets(table, max_distance=5), AT)

    _close(*_both(make, jnp.asarray(TABLE)))


def test_padding_brings_no_infinite_derivative():
    """The logarithm is finite for all pairs, and infinite for a score of 0, which is what no pair here has."""

    def make(inputs, factor):
        query, key, value = inputs
        mod = ScoreFunction(lambda score, query, key, head, x: x * jnp.log(score), factor)
        return _call((jnp.abs(query) + 1, jnp.abs(key) + 1, value), None, mod, AT)

    _close(*_both(make, jnp.float32(0.7)))


def test_a_mask_reads_numbers_of_tokens_that_a_program_computes():
    """A mask has no gradient, so its numbers may be indexed by token."""

    def make(inputs, height):
        mask = MaskMod(lambda query, key, height: height[query.position] >= height[key.position], height)
        return _call(inputs, mask, None, AT)

    _close(*_both(make, jnp.asarray(np.random.default_rng(3).normal(size=16).astype(np.float32))))


def test_packed_texts_that_are_known_at_run_time_only():
    segment = jnp.asarray([[1] * 3 + [2] * 5 + [3] * 4 + [0], [1] * 11 + [2] * 2], jnp.int32)

    def make(inputs, scale):
        query, key, value = inputs
        at = Coordinates.from_segments(jnp.where(scale > 0, segment, 0))
        keys = jax.tree.map(lambda x: x[:, :11], at)
        return _call((query * scale, key, value), Causal() & SameSegment(), None, (at, keys))

    _close(*_both(make, jnp.float32(0.7)))


@pytest.mark.parametrize("mask", [None, Causal()], ids=str)
def test_dropout_drops_what_the_reference_drops(mask):
    dropout = Dropout(0.3, jax.random.key(5))
    at = None if mask is None else AT
    _close(*_both(lambda inputs: _call(inputs, mask, None, at, dropout)))


def test_sums_of_bfloat16_are_float32():
    _close(*_both(lambda inputs: _call(inputs, Causal() | Prefix(3), SoftCap(5.0), AT), dtype="bfloat16"), "bfloat16")


@settings(deadline=None, max_examples=5)
@given(mask_trees(), coordinates(13), coordinates(11))
def test_random_mask_trees(mask, q_at, kv_at):
    call = functools.partial(_call, mask=mask[0], at=(q_at, kv_at))
    try:
        found, expected = _both(call)
    except NotImplementedError as reason:
        assume("from which pairs choose" not in str(reason))
        raise
    _close(found, expected)


@pytest.mark.slow
@settings(deadline=None, max_examples=60)
@given(mask_trees(), coordinates(13), coordinates(11))
def test_many_random_mask_trees(mask, q_at, kv_at):
    test_random_mask_trees.hypothesis.inner_test(mask, q_at, kv_at)


def test_layers_of_one_shape_are_traced_once(monkeypatch):
    """The plans of equal calls are equal, so that `jit` finds the traced program."""
    query = jnp.ones((1, 130, 2, 8))

    def plan():
        call = _call((query, query, query), Causal(), ScoreFunction(lambda s, q, k, h: s * 2), (AT_130, AT_130))
        return prepare(call, interpret=False)[0]

    assert plan() == plan()
    assert hash(plan()) == hash(plan())


AT_130 = Coordinates.range(130)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "options",
    [{}, {"mask": Causal()}, {"mask": Causal() & Dilated(3), "score_mod": Alibi()}],
    ids=["full", "causal", "alibi"],
)
def test_it_lowers_for_a_tpu_with_gradients_and_holds_no_loop(options, dtype):
    """Odd lengths, grouped heads. The program has three kernels, and no loop over tiles beside them."""
    x = jax.ShapeDtypeStruct((1, 130, 4, 16), jnp.dtype(dtype))
    key = jax.ShapeDtypeStruct((1, 130, 2, 16), jnp.dtype(dtype))

    def loss(query, key):
        return jnp.sum(attend(query, key, key, **options, implementation=("tpu", "reference")).astype(jnp.float32))

    text = jax.jit(jax.grad(loss, argnums=(0, 1))).trace(x, key).lower(lowering_platforms=("tpu",)).as_text()
    assert text.count("tpu_custom_call") == 3
    assert "stablehlo.while" not in text


@pytest.mark.parametrize(
    "make",
    [
        lambda x: {"score_mod": ScoreFunction(lambda score, query, key, head, x: score * x[head], x)},
        lambda x: {"dropout": Dropout(0.1, jax.random.fold_in(jax.random.key(0), x[0].astype(jnp.int32)))},
        lambda x: {"mask": Causal() | Prefix(x[0].astype(jnp.int32))},
    ],
    ids=["by_head", "dropout", "prefix"],
)
def test_it_lowers_for_a_tpu_under_vmap_over_what_it_captures(make):
    def loss(query, x):
        return jnp.sum(attend(query, query, query, **make(x), implementation=("tpu", "reference")))

    gradient = jax.jit(jax.vmap(jax.grad(loss)))
    given = jax.ShapeDtypeStruct((3, 1, 130, 2, 8), jnp.float32), jax.ShapeDtypeStruct((3, 2), jnp.float32)
    assert gradient.trace(*given).lower(lowering_platforms=("tpu",)).as_text().count("tpu_custom_call") == 3


def test_vmap_over_what_a_score_function_captures():
    inputs = [jnp.asarray(x) for x in arrays(Shape(batch=(3, 1), T=5, S=5, N=2, K=1, H=3, V=2)).values()]
    factor = jnp.asarray(TABLE[:3, :2])

    def one(kernel, inputs, factor):
        mod = ScoreFunction(lambda score, query, key, head, x: score * x[head], factor)
        return kernel(_call(inputs, Causal(), mod, (Coordinates.range(5),) * 2))

    with small_tpu_tiles():
        found = jax.jit(jax.vmap(functools.partial(one, functools.partial(tpu.attend, interpret=True))))(inputs, factor)
    _close(found, jax.vmap(functools.partial(one, reference.attend))(inputs, factor))


@pytest.mark.parametrize("garbage", [np.nan, 3e38])
def test_what_is_masked_leaves_no_trace_in_what_a_score_function_captures(garbage):
    """Neither in the results nor in any gradient: those of the captured arrays are multiplied by scores."""
    inputs = [jnp.asarray(x) for x in arrays(SHAPE).values()]
    mask = MaskMod(lambda query, key: (key.position != 6) & (query.position != 4))

    @jax.jit
    def run(inputs, table):
        def loss(inputs, table):
            mod = ScoreFunction(_of_head_and_distance, table)
            output, lse = tpu.attend(_call(inputs, mask, mod, AT), interpret=True)
            return jnp.sum(jnp.sin(output)) + jnp.sum(jnp.where(lse > -1e30, jnp.cos(lse), 0)), output

        return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(inputs, table)

    with small_tpu_tiles():
        clean, table = run(inputs, jnp.asarray(TABLE)), jnp.asarray(TABLE)
        spoilt = [inputs[0].at[:, 2].set(garbage), *(x.at[:, 6].set(garbage) for x in inputs[1:])]
        found = run(spoilt, table)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(clean), strict=True):
        assert np.isfinite(a).all()
        np.testing.assert_array_equal(a, b)


def _of_head_and_distance(score, query, key, head, table):
    return table[0, head] * jnp.tanh(score) * score + table[jnp.abs(query.position - key.position) % 8, head]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"dtype": jnp.float16}, "the TPU kernel takes float32 and bfloat16, not float16"),
        ({"bias": jnp.ones((9, 9))}, "takes no bias"),
        ({"mask": NotPadding(), "score_mod": RelativePositions(jnp.ones((3, 8)))}, "an array for each query and head"),
        ({"score_mod": ScoreFunction(lambda score, query, key, head: jax.lax.erf_inv(score))}, "no erf_inv"),
    ],
    ids=["dtype", "bias", "rows", "function"],
)
def test_what_it_refuses(options, reason, monkeypatch):
    monkeypatch.setattr("seqattn.kernels.dispatch.platform_of", lambda arrays: "tpu")
    options = dict(options)
    x = jnp.ones((1, 9, 2, 8), options.pop("dtype", jnp.float32))
    with pytest.raises(NotImplementedError, match=reason):
        attend(x, x, x, implementation="tpu", **options)


def _by_row_head_and_distance(score, query, key, head, table):
    return score + table[query.batch, head, jnp.abs(query.position - key.position)]


@pytest.mark.parametrize(
    ("shape", "options", "reason"),
    [
        ((1, 9, 2, 513), {}, "takes head dims up to 512, not 513"),
        ((60, 9, 16, 8), {"score_mod": _by_row_head_and_distance}, "1 pairs of tiles and 288000 numbers for rows"),
        ((1, 2**17, 1, 8), {}, r"65536 pairs of tiles and 0 numbers for rows and heads take 262144 words"),
        ((2**10, 9, 128, 8), {"dropout": Dropout(0.5, jax.random.key(0))}, "262144 numbers for rows and heads"),
    ],
    ids=["head_dim", "table", "tiles", "dropout"],
)
def test_what_exceeds_a_memory_is_refused(shape, options, reason):
    x, options = jax.ShapeDtypeStruct(shape, jnp.float32), dict(options)
    if "score_mod" in options:
        options["score_mod"] = ScoreFunction(options["score_mod"], jnp.zeros((60, 16, 300)))
    told = explain(x, x, x, platform="tpu", **options)
    assert re.search(reason, told.refusals["tpu"])


def test_on_another_machine_it_says_so():
    x = jnp.ones((1, 9, 2, 8))
    with pytest.raises(NotImplementedError, match="the TPU kernel runs on a tpu, and this is a cpu"):
        attend(x, x, x, implementation="tpu")


def test_derivatives_that_only_the_reference_has_are_refused():
    inputs = tuple(jnp.asarray(x) for x in arrays(SHAPE, "float32").values())

    def loss(*inputs):
        return jnp.sum(tpu.attend(_call(inputs, mask=Causal(), at=AT), interpret=True)[0])

    with small_tpu_tiles(), pytest.raises(NotImplementedError, match=r"forward-mode derivatives .* 'reference'"):
        jax.jvp(loss, inputs, inputs)


def test_a_call_without_gradients_marks_the_rows_that_see_nothing():
    """Its log-sum-exp is one array, in which they have the lowest number and no other row has."""
    inputs = tuple(jnp.asarray(x) for x in arrays(SHAPE, "float32").values())
    call = _call(
        inputs,
        mask=MaskMod(lambda query, key: query.position % 3 > 0),
        at=(Coordinates.range(13), Coordinates.range(11)),
    )
    with small_tpu_tiles():
        _, lse = tpu.attend(call, interpret=True)
    expected = reference.attend(call)[1]
    assert (expected == jnp.finfo(jnp.float32).min).any()
    np.testing.assert_array_equal(lse == jnp.finfo(jnp.float32).min, expected == jnp.finfo(jnp.float32).min)
    close(lse, expected, "float32")
