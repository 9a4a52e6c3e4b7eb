"""`jax.debug_nans` and `jax.debug_infs`: nothing that is computed of finite numbers is NaN or infinite."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from seqattn.attention import attend, attend_scores, attention_weights
from seqattn.coordinates import Coordinates
from seqattn.drop_in import dot_product_attention
from seqattn.masks import Causal, NotPadding, SameSegment
from seqattn.models import Seq2Seq, Seq2SeqConfig, Transformer, TransformerConfig
from seqattn.nn import BlockConfig, Monotonic, MultiHeadAttention, Score, ScoredAttention, StaticCache
from seqattn.score_mods import Alibi, RelativePositions, SoftCap
from tests.contract import every_implementation

B, T, N, H = 2, 5, 4, 3
LENGTHS = [5, 3]
"""The second row is padded: some queries see nothing."""


@pytest.fixture(params=["nans", "infs", "both"], autouse=True)
def flags(request):
    with contextlib.ExitStack() as flags:
        if request.param != "infs":
            flags.enter_context(jax.debug_nans(True))
        if request.param != "nans":
            flags.enter_context(jax.debug_infs(True))
        yield


@functools.cache
def _x():
    return jnp.asarray(np.random.default_rng(0).normal(size=(B, T, N, H)), jnp.float32)


def _at():
    return Coordinates.from_lengths(LENGTHS, T)


def _loss(implementation, x, **options):
    at = {"q_at": _at(), "kv_at": _at()}
    return jnp.sum(attend(x, x, x, mask=Causal() & SameSegment(), **at, implementation=implementation, **options) ** 2)


@functools.partial(every_implementation, slow=["ring", "tpu", "hopper"])
@pytest.mark.parametrize("name", [None, "alibi", "relative", "cap", "bias"])
def test_attention_of_finite_inputs_raises_nothing(implementation, name):
    """Eager and jitted, forward and backward, with rows that see nothing and padding."""
    mods = {"alibi": Alibi(), "relative": RelativePositions(jnp.ones((3, H))), "cap": SoftCap(5.0)}
    options = {"score_mod": mods[name]} if name in mods else {}
    if name == "bias":
        options["bias"] = jnp.where(jnp.arange(T) == 1, -jnp.float32(1e30), 0.0)[None].repeat(T, 0)
    for differentiate in (jax.grad(_loss, 1), jax.jit(jax.grad(_loss, 1), static_argnums=0), _loss):
        differentiate(implementation, _x(), **options)


def test_weights_scores_and_the_drop_in_raise_nothing():
    x, at = _x(), {"q_at": _at(), "kv_at": _at()}
    attention_weights(x, x, mask=Causal() & SameSegment(), **at)
    attention_weights(x, x, mask=Causal(), sinks=jnp.ones(N), **at)
    attend_scores(jnp.ones((B, N, T, T)), x, mask=SameSegment(), **at)
    dot_product_attention(x, x, x, is_causal=True, key_value_seq_lengths=jnp.array(LENGTHS))
    jax.grad(lambda x: dot_product_attention(x, x, x, mask=jnp.zeros((T, T), bool)).sum())(x)
    attend(x, x, x, sinks=jnp.ones(N), return_lse=True)


def test_an_empty_row_is_minus_infinity_only_where_the_log_sum_exp_is_asked_for(request):
    x = _x()
    attend(x, x, x, mask=jnp.zeros((T, T), bool))
    if "nans" in request.node.name:
        _, lse = attend(x, x, x, mask=jnp.zeros((T, T), bool), return_lse=True)
        assert np.all(np.asarray(lse) == -np.inf)
    else:
        with pytest.raises(FloatingPointError, match="inf"):
            attend(x, x, x, mask=jnp.zeros((T, T), bool), return_lse=True)


def test_a_cache_and_its_unwritten_slots_raise_nothing():
    attention, x = MultiHeadAttention(8, 4, mask=Causal(), rngs=nnx.Rngs(0)), jnp.ones((B, 2, 8))
    cache, at = StaticCache.empty(B, T, 4, 2), Coordinates.from_lengths([2, 1], 2)
    cache, kv = cache.append(attention.project(x, at))
    attention(x, at, kv)
    attention(x, at, kv.rows())


def test_models_raise_nothing():
    tokens, at = jnp.ones((B, T), jnp.int32), _at()
    block = BlockConfig(model_dim=8, hidden_dim=5, num_heads=2)
    transformer = Transformer(TransformerConfig(7, 1, 1, block), rngs=nnx.Rngs(0))
    recurrent = Seq2Seq(Seq2SeqConfig(7, 3, 6), rngs=nnx.Rngs(0))
    for model in (transformer, recurrent):
        jax.grad(lambda model: model.decode(tokens, at, model.encode(tokens, at)).sum())(model)


def test_local_attention_over_scores_raises_nothing():
    attention = ScoredAttention(Score.ADDITIVE, 5, 7, local=Monotonic(1), rngs=nnx.Rngs(0))
    memory = attention.project(jnp.ones((B, T, 7)), _at())
    attention(jnp.ones((B, T, 5)), _at(), memory)


def test_a_nan_made_elsewhere_is_blamed_on_what_made_it(request):
    """JAX repeats a jitted function step by step, and stops at the first step whose result is NaN."""

    @jax.jit
    def fn(x):
        at = {"q_at": _at(), "kv_at": _at()}
        options = {"mask": Causal() & NotPadding(), "score_mod": RelativePositions(jnp.ones((3, H)))}
        return attend(x, x, x, **options, **at).sum() + jnp.log(-jnp.abs(x).sum() - 1)

    if "infs" in request.node.name:
        return
    with pytest.raises(FloatingPointError) as error:
        fn(_x())
    frames = [str(entry.path) for entry in error.traceback]
    assert not any("seqattn/kernels" in frame for frame in frames), frames
