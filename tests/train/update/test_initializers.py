"""Variance and bounds of what is drawn, what is left alone, and that a path decides a draw."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from seqattn.models import RelativeKeys
from seqattn.models.position_encodings import PositionScores
from seqattn.nn import MemoryCompressedAttention, Predictive, Score, ScoredAttention, TokenEmbedding
from seqattn.nn.local_window import LocalWindow
from tests.parameters import drawn
from train.update.initializers import Kaiming, Normal, Uniform, Xavier, redraw

D, F, E, WINDOW, COMPRESSED, DISTANCE, QUERY, KEY = 37, 61, 11, 5, 13, 9, 23, 41


class Model(nnx.Module):
    def __init__(self, num_layers=2, dtype=jnp.float32):
        rngs = nnx.Rngs(0)
        options = {"param_dtype": dtype, "rngs": rngs}
        self.layers = nnx.List([nnx.Linear(D, F, **options) for _ in range(num_layers)])
        keys = jax.random.split(rngs.params(), E)
        self.experts = jax.vmap(lambda key: nnx.Linear(D, F, param_dtype=dtype, rngs=nnx.Rngs(key)))(keys)
        self.conv = nnx.Conv(D, F, kernel_size=(WINDOW,), **options)
        self.norm = nnx.LayerNorm(D, **options)
        self.buckets = nnx.Param(jnp.zeros((7, 3), dtype))
        self.embedding = TokenEmbedding(F, D, **options)
        self.attention = ScoredAttention(Score.ADDITIVE, QUERY, KEY, hidden_dim=F, **options)
        self.window = LocalWindow(Predictive(2), QUERY, F, **options)
        sizes = {"num_heads": E, "head_dim": D, "bidirectional": True}
        self.scores = PositionScores(RelativeKeys(DISTANCE, by_head=True), 2, **sizes, **options)
        self.compressed = MemoryCompressedAttention(COMPRESSED * 7, COMPRESSED, stride=WINDOW, **options)
        self.count = nnx.BatchStat(jnp.zeros((2, 3)))


@pytest.fixture(scope="module")
def model():
    made = drawn(Model)
    made.buckets[...] = jnp.zeros((7, 3))
    return made


def kernels(model):
    found = {"layer": model.layers[0].kernel, "experts": model.experts.kernel, "conv": model.conv.kernel}
    found |= {"query": model.attention.query_weight, "key": model.attention.key_weight, "window": model.window.weight}
    found |= {"filter": model.compressed.key_filter, "table": model.embedding.table, "keys": model.scores.tables}
    return {name: np.asarray(kernel[...], np.float64) for name, kernel in found.items()}


FANS = {"layer": (D, F), "experts": (D, F), "conv": (WINDOW * D, WINDOW * F), "filter": (WINDOW * 7, WINDOW * 7)}
FANS |= {"table": (D, F), "keys": (D, 2 * DISTANCE + 1), "query": (QUERY, F), "key": (KEY, F), "window": (QUERY, F)}
"""Fan in and fan out of each kind of kernel; a table of vectors makes logits."""


def assert_distributed(values, distribution, variance, name):
    """Within five standard errors of mean and variance, and inside or outside of the bounds of a uniform one."""
    size, bound = values.size, math.sqrt(3 * variance)
    assert abs(values.mean()) < 5 * math.sqrt(variance / size), name
    excess = {"normal": 2.0, "uniform": 0.8}[distribution]
    assert abs(values.var() / variance - 1) < 5 * math.sqrt(excess / size), name
    largest = np.abs(values).max()
    assert (0.99 * bound < largest <= bound * (1 + 1e-6)) if distribution == "uniform" else largest > 1.3 * bound, name


@pytest.mark.parametrize("distribution", ["normal", "uniform"])
def test_xavier_is_equation_12_of_glorot(model, distribution):
    for name, values in kernels(redraw(model, Xavier(distribution, gain=1.5), seed=3)).items():
        assert_distributed(values, distribution, 2 * 1.5**2 / sum(FANS[name]), name)


@pytest.mark.parametrize("distribution", ["normal", "uniform"])
@pytest.mark.parametrize(("mode", "side"), [("fan_in", 0), ("fan_out", 1)])
def test_kaiming_is_equations_10_and_14_of_he(model, distribution, mode, side):
    for name, values in kernels(redraw(model, Kaiming(distribution, mode), seed=3)).items():
        assert_distributed(values, distribution, 2 / FANS[name][side], name)


def test_uniform_and_normal_know_no_fan(model):
    for name, values in kernels(redraw(model, Uniform(0.08), seed=3)).items():
        assert_distributed(values, "uniform", 0.08**2 / 3, name)
    for name, values in kernels(redraw(model, Normal(0.3), seed=3)).items():
        assert_distributed(values, "normal", 0.09, name)


def test_only_matrices_of_parameters_that_are_not_zero_change(model):
    before, after = (nnx.to_flat_state(nnx.state(each)) for each in (model, redraw(model, Normal(), seed=0)))
    changed = {}
    for (path, old), (same_path, new) in zip(before, after, strict=True):
        assert path == same_path
        assert type(old) is type(new)
        changed[path[-1]] = not np.array_equal(old[...], new[...])
    drawn_anew = ("kernel", "key_filter", "value_filter", "table", "tables", "query_weight", "key_weight", "weight")
    kept = ("bias", "scale", "projection", "buckets", "count")
    assert changed == dict.fromkeys(drawn_anew, True) | dict.fromkeys(kept, False)


def test_the_model_itself_is_not_changed():
    model, same = drawn(Model), drawn(Model)
    redraw(model, Normal(), seed=0)
    jax.tree.map(np.testing.assert_array_equal, nnx.state(model), nnx.state(same))


def test_a_draw_is_a_function_of_seed_and_path_alone(model):
    expected = kernels(redraw(model, Normal(), seed=5))
    deeper = redraw(drawn(lambda: Model(num_layers=3), seed=9), Normal(), seed=5)
    for name, values in kernels(deeper).items():
        np.testing.assert_array_equal(values, expected[name])
    firsts = [deeper.layers[index].kernel[0, 0].item() for index in range(3)]
    firsts += [deeper.experts.kernel[index, 0, 0].item() for index in range(E)]
    firsts += [values.flat[0] for values in kernels(redraw(model, Normal(), seed=-5)).values()]
    assert len(set(firsts)) == 3 + E + len(FANS)


def test_a_matrix_keeps_its_dtype(model):
    narrow = redraw(drawn(lambda: Model(dtype=jnp.bfloat16)), Kaiming(), seed=5)
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(narrow, nnx.Param))} == {jnp.dtype("bfloat16")}
    expected = redraw(model, Kaiming(), seed=5).conv.kernel[...].astype(jnp.bfloat16)
    np.testing.assert_allclose(narrow.conv.kernel.astype(jnp.float32), expected.astype(jnp.float32), rtol=0.01)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Uniform(0.0), r"scale \(0.0\) must be positive"),
        (lambda: Normal(-1.0), r"stddev \(-1.0\) must be positive"),
        (lambda: Xavier("cauchy"), r"distribution \(cauchy\) must be one of normal, uniform"),
        (lambda: Xavier(gain=float("nan")), r"gain \(nan\) must be positive"),
        (lambda: Kaiming(mode="fan_avg"), r"mode \(fan_avg\) must be one of fan_in, fan_out"),
    ],
)
def test_settings_that_make_no_sense(make, message):
    with pytest.raises(ValueError, match=message):
        make()
