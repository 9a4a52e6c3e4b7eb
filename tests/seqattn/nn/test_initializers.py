"""Parameters of every module in small dtypes: those of float32, rounded, and what their distribution is."""

import functools
import importlib
import inspect
import pkgutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import seqattn
from seqattn.models import (
    AttentionEncoder,
    BucketBiases,
    Captioner,
    CaptionerConfig,
    Compressed,
    Convolutional,
    Encoder,
    EncoderConfig,
    Full,
    LanguageModel,
    LanguageModelConfig,
    Learned,
    MaskedTokens,
    Patches,
    RecurrentLanguageModel,
    RecurrentLanguageModelConfig,
    RelativeKeys,
    Seq2Seq,
    Seq2SeqConfig,
    TextLabels,
    TokenLabels,
    Transformer,
    TransformerConfig,
)
from seqattn.models.position_encodings import PositionScores
from seqattn.nn import (
    BatchNorm,
    BlockConfig,
    Cell,
    Direction,
    MixtureConfig,
    MixtureOfExperts,
    PatchEncoder,
    PositionEmbedding,
    Predictive,
    Recurrent,
    Score,
    ScoredAttention,
    Statistic,
    TokenEmbedding,
)
from seqattn.nn.convolution import ConvolutionalEncoder
from seqattn.nn.initializers import drawn_wide
from seqattn.nn.linear import Linear
from seqattn.nn.local_window import LocalWindow

V, D, F, H = 11, 8, 5, 4
BLOCK = BlockConfig(model_dim=D, hidden_dim=F, num_heads=2, gated=True, attention_bias=True, qk_norm=True)
EXPERTS = BlockConfig(model_dim=D, hidden_dim=F, num_heads=2, mixture=MixtureConfig(num_experts=3))
TRANSFORMER = TransformerConfig(V, num_encoder_layers=1, num_decoder_layers=1, block=BLOCK, logits_bias=True)
MODELS = {
    "transformer": (Transformer, TRANSFORMER),
    "learned": (LanguageModel, LanguageModelConfig(V, num_layers=1, block=BLOCK, positions=Learned(7))),
    "relative": (Encoder, EncoderConfig(V, 1, BLOCK, positions=RelativeKeys(3, by_head=True), head=TokenLabels(3))),
    "buckets": (Encoder, EncoderConfig(V, 1, BLOCK, positions=BucketBiases(4, 8), head=TextLabels(3))),
    "masked": (Encoder, EncoderConfig(V, 1, EXPERTS, head=MaskedTokens())),
    "compressed": (LanguageModel, LanguageModelConfig(V, num_layers=2, block=BLOCK, pattern=(Full(), Compressed(3)))),
    "recurrent": (RecurrentLanguageModel, RecurrentLanguageModelConfig(V, embedding_dim=H, hidden_dim=H)),
    "convolutions": (Captioner, CaptionerConfig(V, Convolutional((3, 5)), Seq2SeqConfig(0, 8, 8, cell=Cell.SIMPLE))),
    "patches": (Captioner, CaptionerConfig(V, Patches((2, 3)), TransformerConfig(0, 0, 1, block=EXPERTS))),
    "between": (Seq2Seq, Seq2SeqConfig(V, H, H, attention_encoder=AttentionEncoder(num_heads=2))),
    "lstm": (Seq2Seq, Seq2SeqConfig(V, H, H, cell=Cell.LSTM, direction=Direction.BOTH, local=Predictive(2))),
}
KINDS = {name: functools.partial(kind, config) for name, (kind, config) in MODELS.items()}
KINDS |= {score.value: functools.partial(ScoredAttention, score, H, H, hidden_dim=D) for score in Score}
KINDS["norm"] = functools.partial(BatchNorm, D)


@functools.cache
def made(name: str, dtype: str) -> nnx.Module:
    return KINDS[name](param_dtype=jnp.dtype(dtype), rngs=nnx.Rngs(0))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", KINDS)
def test_parameters_of_a_small_dtype_are_those_of_float32_rounded(name, dtype):
    small, exact = (nnx.to_flat_state(nnx.state(made(name, kind))) for kind in (dtype, "float32"))
    for (path, leaf), (same, wide) in zip(small, exact, strict=True):
        assert path == same
        wanted = jnp.float32 if isinstance(leaf, Statistic) else dtype  # in a small one, moves would be lost
        assert (leaf.dtype, wide.dtype) == (jnp.dtype(wanted), np.float32), path
        np.testing.assert_array_equal(leaf[...], wide[...].astype(wanted), err_msg=str(path))


def test_every_module_of_the_library_that_draws_is_among_them():
    ours = set()
    for found in pkgutil.walk_packages(seqattn.__path__, "seqattn."):
        members = vars(importlib.import_module(found.name)).values()
        ours |= {x for x in members if isinstance(x, type) and issubclass(x, nnx.Module)}
    ours = {kind for kind in ours if "rngs" in inspect.signature(kind.__init__).parameters}
    assert len(ours) > 20
    seen = {type(module) for name in KINDS for _, module in nnx.iter_modules(made(name, "float32"))}
    assert {kind.__name__ for kind in ours if kind.__module__.startswith("seqattn.")} <= {x.__name__ for x in seen}


@pytest.mark.parametrize("name", ["transformer", "recurrent", "convolutions"])
def test_float32_draws_are_those_of_flax(name, monkeypatch):
    """Runs of before, and figures that were measured, stay as they were."""
    ours = nnx.to_flat_state(nnx.state(made(name, "float32")))
    monkeypatch.setattr("seqattn.nn.linear.drawn_wide", lambda initializer: initializer)
    bare = KINDS[name](rngs=nnx.Rngs(0))
    for (path, leaf), (_, theirs) in zip(ours, nnx.to_flat_state(nnx.state(bare)), strict=True):
        np.testing.assert_array_equal(leaf[...], theirs[...], err_msg=str(path))


def test_float64_stays_float64():
    with jax.enable_x64(True):
        kernel = Linear(37, 41, param_dtype=jnp.float64, rngs=nnx.Rngs(0)).kernel[...]
        plain = nnx.Linear(37, 41, param_dtype=jnp.float64, rngs=nnx.Rngs(0)).kernel[...]
    assert kernel.dtype == np.float64
    np.testing.assert_array_equal(kernel, plain)


def test_an_initializer_of_the_user_draws_wide_too():
    def uniform(key, shape, dtype, out_sharding=None):
        return jax.random.uniform(key, shape, dtype)

    options = {"kernel_init": uniform, "bias_init": uniform}
    layer, exact = (Linear(37, 41, param_dtype=t, rngs=nnx.Rngs(0), **options) for t in (jnp.bfloat16, jnp.float32))
    for name in ("kernel", "bias"):
        found, wide = (getattr(each, name)[...] for each in (layer, exact))
        np.testing.assert_array_equal(found, wide.astype(jnp.bfloat16))
    integers = drawn_wide(lambda key, shape, dtype: jax.random.randint(key, shape, 0, 9, dtype))
    assert integers(jax.random.key(0), (3,), jnp.int8).dtype == jnp.int8


LARGE = {
    "normal, cut at two deviations": lambda **o: Linear(401, 397, **o).kernel,
    "a table of tokens": lambda **o: TokenEmbedding(401, 397, **o).table,
    "a table of positions": lambda **o: PositionEmbedding(401, 397, **o).table,
    "relative keys": lambda **o: _relative(**o).tables,
    "what a cell takes in": lambda **o: Recurrent(701, 233, cell=Cell.SIMPLE, **o).cell.dense_i.kernel,
    "what a cell keeps": lambda **o: Recurrent(3, 397, cell=Cell.SIMPLE, **o).cell.dense_h.kernel,
    "a score": lambda **o: ScoredAttention(Score.ADDITIVE, 401, 3, hidden_dim=397, **o).query_weight,
    "a window": lambda **o: LocalWindow(Predictive(2), 401, 397, **o).weight,
    "a patch": lambda **o: PatchEncoder(400, patch=(20, 20), **o).output.kernel,
    "a convolution": lambda **o: ConvolutionalEncoder(8, channels=(131, 137), **o).convolutions[1].kernel,
    "experts": lambda **o: _mixture(197, 401, 3, **o).experts.hidden.kernel,
    "a gate": lambda **o: _mixture(401, 2, 397, **o).gate.kernel,
}


def _relative(**options) -> PositionScores:
    return PositionScores(RelativeKeys(200), 4, num_heads=1, head_dim=101, bidirectional=True, **options)


def _mixture(model_dim: int, hidden_dim: int, num_experts: int, **options) -> MixtureOfExperts:
    return MixtureOfExperts(model_dim, hidden_dim, config=MixtureConfig(num_experts=num_experts), **options)


@pytest.mark.parametrize("name", LARGE)
def test_weights_are_not_biased_by_their_dtype(name):
    """Mean, spread, tails, number of values: a draw in bfloat16 has 128, and a mean of -0.015 deviations."""
    small, exact = (
        np.asarray(LARGE[name](param_dtype=dtype, rngs=nnx.Rngs(5))[...].astype(jnp.float32), np.float64).ravel()
        for dtype in (jnp.bfloat16, jnp.float32)
    )
    deviation = exact.std()
    # Five standard errors of the mean; rounding adds none, since it is to the nearest.
    assert abs(small.mean()) < 5 * deviation / small.size**0.5
    assert small.std() == pytest.approx(deviation, rel=1e-3)
    assert abs(small).max() == pytest.approx(abs(exact).max(), rel=2**-8)
    assert np.quantile(small, 0.999) == pytest.approx(np.quantile(exact, 0.999), rel=2**-7)
    assert np.quantile(small, 0.001) == pytest.approx(np.quantile(exact, 0.001), rel=2**-7)
    assert len(np.unique(small)) > 1000
