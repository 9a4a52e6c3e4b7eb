"""Models as plain values and arrays: back to the bit, and nothing that a stranger could write is taken for a model."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from seqattn.coordinates import Coordinates
from seqattn.interop import from_arrays, from_dict, to_arrays, to_dict
from seqattn.models import (
    AttentionEncoder,
    BucketBiases,
    Captioner,
    CaptionerConfig,
    Compressed,
    Convolutional,
    Encoder,
    EncoderConfig,
    LanguageModel,
    LanguageModelConfig,
    Learned,
    LinearBiases,
    Local,
    MaskedTokens,
    Patches,
    RecurrentLanguageModel,
    RecurrentLanguageModelConfig,
    RelativeKeys,
    Rotary,
    Seq2Seq,
    Seq2SeqConfig,
    TextLabels,
    TokenLabels,
    Transformer,
    TransformerConfig,
    Window,
)
from seqattn.nn import Activation, BlockConfig, Cell, Direction, MixtureConfig, Monotonic, OverBatch, Predictive, Score
from tests.parameters import drawn

BLOCK = BlockConfig(model_dim=12, hidden_dim=7, num_heads=2, activation=Activation.SILU, gated=True, norm_first=True)
EXPERTS = dataclasses.replace(BLOCK, mixture=MixtureConfig(num_experts=3, capacity_factor=None))
CONFIGS = {
    "transformer": TransformerConfig(11, 2, 1, BLOCK, share_embeddings=False, logits_bias=True, decoder_window=3),
    "transformer with learned positions": TransformerConfig(11, 0, 1, BLOCK, Learned(5)),
    "transformer of experts": TransformerConfig(11, 1, 1, EXPERTS, BucketBiases(8, 9)),
    "language model": LanguageModelConfig(11, 3, BLOCK, RelativeKeys(3, True), (Local(5), Compressed(2), Window(3))),
    "recurrent language model": RecurrentLanguageModelConfig(11, 6, 6, 2, Cell.LSTM, tie_embeddings=True),
    "tagger": EncoderConfig(11, 1, BLOCK, LinearBiases(), head=TokenLabels(5)),
    "classifier": EncoderConfig(11, 1, BLOCK, None, head=TextLabels(3)),
    "masked": EncoderConfig(11, 1, BLOCK, Rotary(500.0), head=MaskedTokens()),
    "seq2seq": Seq2SeqConfig(11, 5, 8, 2, Cell.SIMPLE, Direction.BACKWARD, Score.CONCAT, local=Predictive(2)),
    "seq2seq without attention": Seq2SeqConfig(11, 5, 8, attention=None, input_feeding=False),
    "between": Seq2SeqConfig(11, 5, 8, local=Monotonic(0), attention_encoder=AttentionEncoder(1, 2, 7, Learned(9))),
    "captioner": CaptionerConfig(11, Patches((2, 3)), TransformerConfig(0, 0, 1, BLOCK)),
    "recurrent captioner": CaptionerConfig(11, Convolutional((3, 5), 2), Seq2SeqConfig(0, 8, 6)),
    "batch norm": CaptionerConfig(11, Convolutional((3,), norm=OverBatch(0.5)), Seq2SeqConfig(0, 8, 6)),
}
MODELS = {
    CaptionerConfig: Captioner,
    EncoderConfig: Encoder,
    LanguageModelConfig: LanguageModel,
    RecurrentLanguageModelConfig: RecurrentLanguageModel,
    Seq2SeqConfig: Seq2Seq,
    TransformerConfig: Transformer,
}
VALUES = to_dict(CONFIGS["transformer"])
everywhere = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


def made(config, **options):
    return drawn(lambda: MODELS[type(config)](config, rngs=nnx.Rngs(0), **options))


def changed(values, path, value):
    """The values with another one at a path such as "block.num_heads"."""
    name, _, rest = path.partition(".")
    return {**values, name: changed(values[name], rest, value) if rest else value}


@everywhere
def test_a_config_comes_back_from_json_equal(config):
    again = from_dict(json.loads(json.dumps(to_dict(config), allow_nan=False)))
    assert again == config
    assert type(again) is type(config)


@everywhere
def test_a_model_comes_back_to_the_bit(config):
    model = made(config)
    arrays = to_arrays(model)
    again = from_arrays(config, arrays)
    assert type(again) is type(model)
    assert again.config == config
    assert jax.tree.structure(again) == jax.tree.structure(model)
    for before, after in zip(jax.tree.leaves(model), jax.tree.leaves(again), strict=True):
        assert before.dtype == after.dtype
        assert np.asarray(before).tobytes() == np.asarray(after).tobytes()
    assert len(arrays) == len(jax.tree.leaves(nnx.state(model)))
    assert sum(x.size for x in arrays.values()) == sum(x.size for x in jax.tree.leaves(nnx.state(model)))


def test_a_model_comes_back_that_computes_the_same():
    model = made(CONFIGS["transformer"])
    again = from_arrays(CONFIGS["transformer"], to_arrays(model))

    @jax.jit
    def logits(model, source, target):
        memory = model.encode(source, Coordinates.from_lengths([3, 2], 3))
        return model.decode(target, Coordinates.from_lengths([2, 2], 2), memory)

    source, target = jnp.array([[5, 8, 9], [3, 4, 0]]), jnp.array([[1, 6], [1, 7]])
    np.testing.assert_array_equal(logits(model, source, target), logits(again, source, target))


def test_a_parameter_that_is_not_finite_comes_back():
    arrays = to_arrays(made(CONFIGS["masked"]))
    arrays["head.bias"] = np.array([np.nan, np.inf, -np.inf, *range(8)], np.float32)
    assert to_arrays(from_arrays(CONFIGS["masked"], arrays))["head.bias"].tobytes() == arrays["head.bias"].tobytes()


def aligned(x):
    """The same array where the CPU would compute with its memory itself."""
    memory = np.empty(x.nbytes + 64, np.uint8)
    start = -memory.ctypes.data % 64
    copy = memory[start : start + x.nbytes].view(x.dtype).reshape(x.shape)
    copy[...] = x
    return copy


def test_a_parameter_is_a_copy():
    arrays = {name: aligned(x) for name, x in to_arrays(made(CONFIGS["masked"])).items()}
    model = from_arrays(CONFIGS["masked"], arrays)
    before = np.array(model.embedding.table[...])
    for array in arrays.values():
        array[...] = 7
    np.testing.assert_array_equal(model.embedding.table[...], before)


def test_parameters_may_be_of_another_dtype_where_that_is_said():
    arrays = to_arrays(made(CONFIGS["between"], param_dtype=jnp.bfloat16))
    assert {x.dtype for x in arrays.values()} == {jnp.dtype(jnp.bfloat16)}
    again = to_arrays(from_arrays(CONFIGS["between"], arrays, param_dtype=jnp.bfloat16))
    assert all(again[name].tobytes() == x.tobytes() for name, x in arrays.items())
    with pytest.raises(ValueError, match=r"embedding.table': bfloat16\[11, 5\] given, float32\[11, 5\] wanted"):
        from_arrays(CONFIGS["between"], arrays)


def test_a_gru_that_was_saved_without_its_hidden_bias_is_refused_by_name():
    config = RecurrentLanguageModelConfig(11, embedding_dim=5, hidden_dim=7, num_layers=1, cell=Cell.GRU)
    arrays = to_arrays(RecurrentLanguageModel(config, rngs=nnx.Rngs(0)))
    del arrays["layers.0.cell.hidden_bias"]
    with pytest.raises(ValueError, match=r"layers.0.cell.hidden_bias': none given, float32\[7\] wanted"):
        from_arrays(config, arrays)


def test_d23_a_tied_embedding_is_one_leaf_after_jit_and_back():
    config = CONFIGS["recurrent language model"]
    model = jax.jit(lambda model: model)(made(config))
    arrays = to_arrays(model)
    assert [name for name, x in arrays.items() if x.shape == (11, 6)] == ["embedding.table"]
    again = jax.jit(lambda model: model)(from_arrays(config, arrays))
    assert to_arrays(again).keys() == arrays.keys()
    gradient = jax.grad(lambda model: model.embedding.logits(model.embedding(jnp.array([3]))).sum())(again)
    assert np.count_nonzero(to_arrays(gradient)["embedding.table"].any(axis=1)) == 11, "both uses reach the one table"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda x: x.pop("embedding.table"), r"embedding.table': none given, float32\[11, 12\] wanted"),
        (lambda x: x.update(more=np.zeros(3)), r"'more': float64\[3\] given, none wanted"),
        (lambda x: x.update({"head.bias": np.zeros((11, 1), np.float32)}), r"float32\[11, 1\] given, float32\[11\]"),
        (lambda x: x.update({"head.bias": np.zeros(12, np.float32)}), r"float32\[12\] given, float32\[11\] wanted"),
        (lambda x: x.update({"head.bias": np.zeros(11, np.int32)}), r"int32\[11\] given, float32\[11\] wanted"),
        (lambda x: x.update({"head.bias": np.zeros(11, ">f4")}), r">f4\[11\] given, float32\[11\] wanted"),
        (lambda x: x.update({str(i) * 99: np.zeros(1) for i in range(50)}), "and 38 more"),
    ],
)
def test_wrong_arrays_are_listed(change, words):
    arrays = to_arrays(made(CONFIGS["masked"]))
    change(arrays)
    with pytest.raises(ValueError, match=words):
        from_arrays(CONFIGS["masked"], arrays)


def deep(levels=100_000):
    nested = []
    for _ in range(levels):
        nested = [nested]
    return nested


D21 = {
    "unknown key": (changed(VALUES, "x\n", 1), r"has the unknown field 'x\\n'; the fields of TransformerConfig are"),
    "unknown inner key": (changed(VALUES, "block.x", 1), "config.block has the unknown field 'x'"),
    "missing key": ({"type": "TransformerConfig"}, "config.vocab_size is missing"),
    "no type": ({}, "config must be an object of type CaptionerConfig or .*, got one of type None"),
    "another type": (changed(VALUES, "block", {"type": "Rotary"}), "config.block must be .* BlockConfig, got .*Rotary"),
    "a type that is none": (changed(VALUES, "block.type", ["BlockConfig"]), "config.block must be .* type a list"),
    "a type of Python": (changed(VALUES, "positions", {"type": "Path"}), "config.positions must be .*, got .*'Path'"),
    "no object": (3, "config must be CaptionerConfig or .*, got 3"),
    "NaN": (changed(VALUES, "block.dropout_rate", float("nan")), "config.block.dropout_rate must be a finite number"),
    "Infinity": (changed(VALUES, "block.norm_epsilon", float("inf")), "config.block.norm_epsilon must be a finite"),
    "a rate above 1": (changed(VALUES, "block.dropout_rate", 1.5), r"dropout rate \(1.5\) must be in \[0, 1\)"),
    "bool for int": (changed(VALUES, "vocab_size", True), "config.vocab_size must be an integer, got True"),
    "int for bool": (changed(VALUES, "logits_bias", 1), "config.logits_bias must be true or false, got 1"),
    "str for int": (changed(VALUES, "vocab_size", "11"), "config.vocab_size must be an integer, got '11'"),
    "float for int": (changed(VALUES, "vocab_size", 11.0), "config.vocab_size must be an integer, got 11.0"),
    "null for int": (changed(VALUES, "vocab_size", None), "config.vocab_size must be an integer, got None"),
    "object for int": (changed(VALUES, "vocab_size", {"type": "int"}), "vocab_size must be no object"),
    "no member": (
        changed(VALUES, "block.activation.value", "sine"),
        "config.block.activation must .* relu, gelu, exact_gelu, silu, tanh",
    ),
    "more than a member": (changed(VALUES, "block.activation.x", 1), "config.block.activation must have the fields"),
    "a rule of a type": (
        changed(to_dict(CONFIGS["transformer of experts"]), "block.mixture.top_k", 4),
        r"config.block.mixture: top_k \(4\) must be an integer from 1 to num_experts \(3\)",
    ),
    "negative": (changed(VALUES, "vocab_size", -1), "config.vocab_size must be from 0 to 2147483647, got -1"),
    "zero heads": (changed(VALUES, "block.num_heads", 0), "config.block.num_heads must be from 1 to .*, got 0"),
    "sizes that do not fit": (changed(VALUES, "block.num_heads", 5), r"model_dim \(12\) must be a multiple of .*\(5\)"),
    "an int of 5000 digits": (changed(VALUES, "vocab_size", 10**5000), "config.vocab_size must be .*, got a huge int"),
    "a float of 5000 digits": (changed(VALUES, "block.dropout_rate", 10**5000), "dropout_rate must be a number"),
    "layers without end": (
        changed(VALUES, "num_encoder_layers", 10**9),
        "config.num_encoder_layers must be from 0 to 256",
    ),
    "items without end": (
        changed(to_dict(CONFIGS["recurrent captioner"]), "image.channels", [1] * 257),
        "config.image.channels must have at most 256 items, got 257",
    ),
    "an item": (
        changed(to_dict(CONFIGS["recurrent captioner"]), "image.channels", [3, 0]),
        r"config.image.channels\[1\] must be from 1 to",
    ),
    "too few items": (
        changed(to_dict(CONFIGS["captioner"]), "image.patch", [2]),
        "config.image.patch must have 2 items, got 1",
    ),
    "a list nested without end": (deep(), "config must be .*, got a list"),
    "a field nested without end": (changed(VALUES, "positions", deep()), "config.positions must be .*, got a list"),
    "a member nested without end": (changed(VALUES, "block.activation.value", deep()), "config.block.activation must"),
    "a huge table": (changed(VALUES, "vocab_size", 2**31 - 1), r"config has 53,.* parameters, and max_parameters is"),
    "sizes beyond 64 bits": (
        changed(
            to_dict(CONFIGS["captioner"]),
            "image",
            {"type": "Patches", "patch": [2**31 - 1] * 2, "image_channels": 2**31 - 1},
        ),
        "config has 118,842,243,.* parameters",
    ),
}


@pytest.mark.parametrize(("values", "words"), D21.values(), ids=D21)
def test_d21_values_that_make_no_model_are_refused_by_name(values, words):
    with pytest.raises(ValueError, match=words):
        from_dict(values)


def test_d21_the_cap_counts_every_parameter_and_can_be_raised():
    count = sum(x.size for x in to_arrays(made(CONFIGS["transformer"])).values())
    assert from_dict(VALUES, max_parameters=count) == CONFIGS["transformer"]
    with pytest.raises(ValueError, match=f"config has {count:,} parameters, and max_parameters is {count - 1:,}"):
        from_dict(VALUES, max_parameters=count - 1)


def test_fields_left_out_take_their_defaults_and_whole_numbers_may_be_rates():
    assert from_dict({"type": "Seq2SeqConfig", "vocab_size": 11, "dropout_rate": 0}) == Seq2SeqConfig(
        11, dropout_rate=0.0
    )


@pytest.mark.parametrize("name", ["Slower", "Rotary"])
def test_what_could_not_be_read_back_is_not_written(name):
    own = dataclasses.dataclass(frozen=True)(type(name, (Rotary,), {}))
    with pytest.raises(ValueError, match="config"):
        to_dict(dataclasses.replace(CONFIGS["masked"], positions=own()))


WRITTEN_BEFORE = {
    "language model": """
{"type": "LanguageModelConfig", "vocab_size": 11, "num_layers": 3, "block": {"type": "BlockConfig", "model_dim": 12,
"hidden_dim": 7, "num_heads": 2, "num_kv_heads": null, "activation": {"type": "Activation", "value": "silu"},
"gated": true, "norm_first": true, "qk_norm": false, "attention_bias": false, "norm_epsilon": 1e-06, "use_norm":
true, "norm_gain": true, "norm_bias": true, "use_residual": true, "dropout_rate": 0.1, "attention_dropout_rate":
0.0, "hidden_dropout_rate": 0.0, "mixture": null, "remat": false, "scan_layers": false}, "positions": {"type":
"RelativeKeys", "max_distance": 3, "by_head": true}, "pattern": [{"type": "Local", "size": 5}, {"type":
"Compressed", "stride": 2}, {"type": "Window", "size": 3}]}
""",
    "recurrent captioner": """
{"type": "CaptionerConfig", "vocab_size": 11, "image": {"type": "Convolutional", "channels": [3, 5],
"image_channels": 2}, "decoder": {"type": "Seq2SeqConfig", "vocab_size": 0, "embedding_dim": 8, "hidden_dim": 6,
"num_layers": 1, "cell": {"type": "Cell", "value": "gru"}, "direction": {"type": "Direction", "value": "both"},
"attention": {"type": "Score", "value": "additive"}, "input_feeding": true, "dropout_rate": 0.1, "local": null,
"attention_encoder": null}}
""",
}
"""What `to_dict` gave in November 2026."""


ADDED_SINCE = {
    "recurrent captioner": {'"image_channels": 2}': '"image_channels": 2, "norm": {"type": "OverImage"}}'},
    "language model": {
        '"num_kv_heads": null': '"num_kv_heads": null, "attention_head_dim": null, "attention_scale": null, '
        '"attention_soft_cap": null',
        '"attention_bias": false': '"attention_bias": false, "key_bias": null, "output_bias": null, '
        '"feed_forward_bias": true, "norm_outputs": false',
        '"norm_epsilon": 1e-06': '"norm_epsilon": 1e-06, "rms_norm": false',
        '"size": 3}]': '"size": 3}], "embedding_scale": null, "tie_logits": true, "logits_soft_cap": null',
    },
}


@pytest.mark.parametrize("name", WRITTEN_BEFORE)
def test_the_one_codec_reads_and_writes_what_was_written_before_it(name):
    assert from_dict(json.loads(WRITTEN_BEFORE[name])) == CONFIGS[name]
    before = " ".join(WRITTEN_BEFORE[name].split())
    for had, has in ADDED_SINCE.get(name, {}).items():
        before = before.replace(had, has)
    assert json.dumps(to_dict(CONFIGS[name])) == before
