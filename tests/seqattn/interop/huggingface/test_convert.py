"""Models of transformers as ours and back. The values that transformers computes are stored; see below."""

import dataclasses
import gc
import json
import weakref
from collections.abc import Iterator, Mapping

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from seqattn.interop import to_arrays
from seqattn.interop.huggingface import from_huggingface, huggingface_config, to_huggingface
from seqattn.interop.huggingface.families import FAMILIES
from seqattn.models import (
    Full,
    LanguageModelConfig,
    Pooling,
    TextLabels,
    TokenLabels,
    Transformer,
    TransformerConfig,
    Window,
)
from seqattn.nn import Activation, BlockConfig, LinearScaling, Rotary, YarnScaling
from tests.huggingface_models import CONFIGS, VALUES, arrays_of, logits_of

FIRST = {fields["model_type"]: name for name, fields in reversed(CONFIGS.items())}
"""The first config of each family."""


def test_every_family_has_three_configs():
    kinds = [fields["model_type"] for fields in CONFIGS.values()]
    assert set(kinds) == set(FAMILIES)
    assert all(kinds.count(kind) >= 3 for kind in FAMILIES)


@pytest.mark.parametrize(
    "name", [name if name in FIRST.values() else pytest.param(name, marks=pytest.mark.slow) for name in CONFIGS]
)
def test_logits_are_those_of_transformers(name):
    expected = np.array(json.loads(VALUES.read_text("utf-8"))[name])
    model = from_huggingface(CONFIGS[name], arrays_of(CONFIGS[name]))
    np.testing.assert_allclose(logits_of(name, model)[:, -1], expected, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize("name", CONFIGS)
def test_there_and_back_is_the_same_checkpoint(name):
    fields, arrays = CONFIGS[name], arrays_of(CONFIGS[name])
    written, back = to_huggingface(from_huggingface(fields, arrays), fields["model_type"])
    assert huggingface_config(written) == huggingface_config(fields)
    assert back.keys() == arrays.keys()
    for key, x in arrays.items():
        # Two rows of the positions of BART and RoBERTa are never read. Gemma's gains are rounded when 1 is added.
        unread = 2 if "embed_positions" in key or key.startswith("roberta.embeddings.position") else 0
        atol = 2e-7 if fields["model_type"] == "gemma2" and "norm" in key else 0
        np.testing.assert_allclose(back[key][unread:], x[unread:], rtol=0, atol=atol, err_msg=key)
        assert back[key].flags.c_contiguous


def test_what_a_config_leaves_out_is_the_default_of_the_family():
    config = huggingface_config({"model_type": "t5"})
    assert isinstance(config, TransformerConfig)
    assert (config.vocab_size, config.num_decoder_layers, config.block.head_dim) == (32_128, 6, 64)
    config = huggingface_config({"model_type": "qwen3"})
    assert isinstance(config, LanguageModelConfig)
    assert (config.block.head_dim, config.block.qk_norm, config.num_layers) == (128, True, 32)


HUB = json.loads((VALUES.parent / "hub.json").read_text("utf-8"))
"""Fields of `config.json` of models on the hub, as authors and older versions of transformers wrote them."""
FEW_LAYERS = dict.fromkeys(
    (
        "num_layers",
        "num_decoder_layers",
        "num_hidden_layers",
        "encoder_layers",
        "decoder_layers",
        "n_layers",
        "n_layer",
    ),
    2,
)


@pytest.mark.parametrize("name", HUB)
def test_configs_of_the_hub_are_read(name):
    fields = HUB[name]
    few = {field: layers for field, layers in FEW_LAYERS.items() if field in fields}
    assert huggingface_config(fields | few).vocab_size == fields["vocab_size"]


def test_what_configs_of_the_hub_mean():
    long = huggingface_config(HUB["Qwen2.5, long"] | {"num_hidden_layers": 1})
    assert long.positions == Rotary(1e6, YarnScaling(4.0, 32_768))
    assert long.pattern == (Full(),)
    assert huggingface_config(HUB["Mistral-7B-v0.1"] | {"num_hidden_layers": 1}).pattern == (Window(4096),)
    pattern = huggingface_config(HUB["gemma-2-9b"] | {"num_hidden_layers": 4}).pattern
    assert pattern == (Window(4096), Full())
    labelled = huggingface_config(HUB["distilbert-sst-2"] | {"n_layers": 1})
    assert labelled.head == TextLabels(2, Pooling.FIRST, Activation.RELU)
    assert huggingface_config(HUB["bert-base-NER"] | {"num_hidden_layers": 1}).head == TokenLabels(9)


LLAMA, GPT2, T5, QWEN2, GEMMA2 = (CONFIGS[name] for name in ("llama", "gpt2", "t5", "qwen2", "gemma2"))
BERT, BART, PEGASUS = (CONFIGS[name] for name in ("bert, masked", "bart", "pegasus"))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "model_type must be one of bart, .*, got None"),
        ({"model_type": "mamba"}, "model_type must be one of .*, got 'mamba'"),
        ({"model_type": ["t5"]}, "model_type must be one of .*, got a list"),
        (LLAMA | {"pretraining_tp": 2}, "llama: pretraining_tp must be 1, got 2"),
        (LLAMA | {"hidden_act": "mish"}, "llama: hidden_act must be one of relu, .*, got 'mish'"),
        (LLAMA | {"clip_qkv": 8.0}, r"llama: clip_qkv \(8.0\) is unknown"),
        (LLAMA | {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type must be .*, got 'dynamic'"),
        (LLAMA | {"rope_parameters": {"mscale": 2.0}}, r"mscale \(2.0\) of default rotations is unknown"),
        (LLAMA | {"partial_rotary_factor": 0.5}, "llama: partial_rotary_factor must be 1, got 0.5"),
        (LLAMA | {"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor must be 1, got 0.5"),
        (
            BERT | {"architectures": ["BertForQuestionAnswering"]},
            "must be a list with one of BertModel, .*, got 'BertForQuestion",
        ),
        (BERT | {"architectures": "BertModel"}, "architectures must be a list with one of .*, got 'BertModel'"),
        (BERT | {"architectures": ["BertForSequenceClassification"], "problem_type": "regression"}, "got 'regression'"),
        (BERT | {"position_embedding_type": "relative_key"}, "position_embedding_type must be absolute"),
        (
            QWEN2 | {"layer_types": ["chunked_attention"] * 3},
            "layer_types must be .*, got 'chunked_attention'",
        ),
        (
            GEMMA2 | {"use_bidirectional_attention": True},
            "use_bidirectional_attention must be False, got True",
        ),
        (GPT2 | {"embd_pdrop": 0.3}, r"gpt2: embd_pdrop \(0.3\) and resid_pdrop \(0.1\) must be equal"),
        (GPT2 | {"add_cross_attention": True}, "gpt2: add_cross_attention must be False, got True"),
        (T5 | {"feed_forward_proj": "gated-mish"}, "t5: feed_forward_proj must be one of .*, got 'gated-mish'"),
        (CONFIGS["bart"] | {"tie_word_embeddings": False}, "bart: tie_word_embeddings must be True, got False"),
        (CONFIGS["mbart"] | {"normalize_before": False}, "mbart: normalize_before must be True, got False"),
    ],
)
def test_what_we_lack_is_refused_by_name(fields, message):
    with pytest.raises(NotImplementedError, match=message):
        huggingface_config(fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (LLAMA | {"hidden_size": 0}, r"llama: hidden_size \(0\) must be an integer of at least 1"),
        (
            LLAMA | {"num_hidden_layers": 10**9},
            r"llama: num_hidden_layers \(1000000000\) must be an integer from 1 to 256",
        ),
        (LLAMA | {"vocab_size": 2**31}, r"llama: vocab_size \(2147483648\) must be an integer from 1 to 2147483647"),
        (LLAMA | {"rms_norm_eps": 10**400}, "llama: rms_norm_eps must have at most 64 bits, got a huge integer"),
        (LLAMA | {"hidden_size": "12"}, r"llama: hidden_size \('12'\) must be an integer"),
        (LLAMA | {"num_key_value_heads": 4}, r"num_heads \(6\) must be a multiple of num_kv_heads \(4\)"),
        (LLAMA | {"rms_norm_eps": float("nan")}, r"llama: rms_norm_eps \(nan\) must be"),
        (LLAMA | {"tie_word_embeddings": "no"}, "llama: tie_word_embeddings must be true or false, got 'no'"),
        (LLAMA | {"rope_parameters": {"rope_type": "linear"}}, r"factor \(None\) must be"),
        (LLAMA | {"rope_scaling": "linear"}, "rope_scaling and rope_parameters must be objects, got 'linear'"),
        (LLAMA | {"rope_theta": 0}, r"llama: rope_theta \(0\) must be positive"),
        (T5 | {"num_hidden_layers": 3}, r"t5: num_hidden_layers \(3\) must be num_layers \(2\)"),
        (GPT2 | {"hidden_size": 13}, r"gpt2: hidden_size \(13\) must be n_embd \(12\)"),
        (GEMMA2 | {"sliding_window_size": 5}, r"gemma2: sliding_window_size \(5\) must be sliding_window \(3\)"),
        (LLAMA | {"head_dim": 3}, r"head_dim \(3\) must be even to be rotated"),
        (
            QWEN2 | {"layer_types": ["sliding_attention"] * 3},
            "qwen2: use_sliding_window must be true where layer_types",
        ),
        (QWEN2 | {"layer_types": ["full_attention"]}, "layer_types must name what each of 3 layers"),
        (GPT2 | {"n_head": 5}, r"gpt2: n_embd \(12\) must be a multiple of n_head \(5\)"),
        (GPT2 | {"resid_pdrop": 1.0}, r"gpt2: resid_pdrop \(1.0\) must be in \[0, 1\)"),
        (T5 | {"relative_attention_num_buckets": 7}, r"num_buckets \(7\) must be even"),
    ],
)
@pytest.mark.usefixtures("as_users_call_it")
def test_numbers_that_make_no_model_are_refused_by_name(fields, message):
    with pytest.raises(ValueError, match=message):
        huggingface_config(fields)


def test_empty_fields_that_nobody_knows_are_harmless():
    harmless = {"novel_option": None, "another": False, "pruned_heads": {}, "list": [], "number": 0}
    assert huggingface_config(LLAMA | harmless) == huggingface_config(LLAMA)
    assert huggingface_config(GEMMA2 | {"use_bidirectional_attention": False}) == huggingface_config(GEMMA2)


def test_the_older_field_of_rotations_replaces_the_newer_one():
    """As in transformers 5."""
    older = {"type": "linear", "factor": 3.0}
    config = huggingface_config(LLAMA | {"rope_scaling": older, "rope_parameters": {"rope_theta": 50.0}})
    assert config.positions == Rotary(10_000.0, LinearScaling(3.0))
    config = huggingface_config(LLAMA | {"rope_scaling": None, "rope_parameters": older | {"rope_theta": 50.0}})
    assert config.positions == Rotary(50.0, LinearScaling(3.0))


def test_null_fields_of_rotations_are_their_defaults():
    null = dict.fromkeys(("beta_fast", "beta_slow", "attention_factor", "mscale"))
    yarn = {"rope_type": "yarn", "factor": 2.0, "partial_rotary_factor": None}
    config = huggingface_config(LLAMA | {"rope_scaling": yarn | null})
    assert config.positions == Rotary(10_000.0, YarnScaling(2.0, 64))


def test_missing_and_unknown_arrays_are_named():
    arrays = arrays_of(LLAMA)
    arrays["model.layers.7.mlp.up_proj.weight"] = arrays.pop("model.layers.2.mlp.up_proj.weight")
    with pytest.raises(ValueError, match=r"llama: .* missing 'model.layers.2.mlp.*'; unknown 'model.layers.7.mlp"):
        from_huggingface(LLAMA, arrays)


@pytest.mark.parametrize("name", ["transformer.h.0.attn.c_attn.weight", "transformer.wpe.weight"])
def test_another_shape_is_refused(name):
    arrays = arrays_of(GPT2)
    shape = arrays[name].shape
    arrays[name] = np.zeros((shape[0] + 1, shape[1]), np.float32)
    with pytest.raises(
        ValueError, match=rf"{name} must have the shape \[{shape[0]}, {shape[1]}\], got \[{shape[0] + 1}"
    ):
        from_huggingface(GPT2, arrays)


def test_integers_are_no_parameters():
    arrays = arrays_of(GPT2)
    arrays["transformer.wte.weight"] = arrays["transformer.wte.weight"].astype(np.int8)
    with pytest.raises(ValueError, match=r"transformer\.wte\.weight must hold floating-point numbers, got int8"):
        from_huggingface(GPT2, arrays)


def test_tied_arrays_that_differ_are_refused():
    arrays = arrays_of(GPT2)
    same = arrays | {"lm_head.weight": arrays["transformer.wte.weight"]}
    from_huggingface(GPT2, same)
    with pytest.raises(ValueError, match=r"lm_head\.weight must equal transformer\.wte\.weight"):
        from_huggingface(GPT2, same | {"lm_head.weight": arrays["transformer.wte.weight"] + 1})


def test_one_name_of_tied_arrays_is_enough():
    arrays = arrays_of(GPT2)
    arrays["lm_head.weight"] = arrays.pop("transformer.wte.weight")
    model = from_huggingface(GPT2, arrays)
    np.testing.assert_array_equal(model.embedding.table[...], arrays["lm_head.weight"])


def test_a_t5_that_calls_its_logits_tied_may_have_others():
    """As transformers 5 writes T5 1.1."""
    arrays = arrays_of(T5)
    other = arrays["shared.weight"][::-1].copy()
    model = from_huggingface(T5 | {"scale_decoder_outputs": False}, arrays | {"lm_head.weight": other})
    assert not model.config.tie_logits
    assert model.config.logits_scale == 1
    np.testing.assert_array_equal(model.output.kernel[...], other.T)


def test_a_bare_model_has_names_without_prefix_and_causal_masks():
    arrays = {name.removeprefix("transformer."): x for name, x in arrays_of(GPT2).items()}
    arrays |= {"h.0.attn.bias": np.ones((1, 1, 13, 13), np.float32)}
    model = from_huggingface(GPT2, arrays)
    np.testing.assert_array_equal(model.embedding.table[...], arrays["wte.weight"])


def test_a_bare_encoder_decoder_has_no_bias_of_logits():
    """As the checkpoints of bart-base and bart-large, in which only the model without logits was saved."""
    arrays = arrays_of(BART)
    bare = {name.removeprefix("model."): x for name, x in arrays.items() if name != "final_logits_bias"}
    bare |= {"encoder.embed_tokens.weight": bare["shared.weight"]}
    model, zeros = from_huggingface(BART, bare), np.zeros_like(arrays["final_logits_bias"])
    expected = from_huggingface(BART, arrays | {"final_logits_bias": zeros})
    jax.tree.map(np.testing.assert_array_equal, nnx.state(model), nnx.state(expected))


def test_a_head_may_lie_beside_names_without_prefix():
    arrays = {name.removeprefix("model."): x for name, x in arrays_of(LLAMA).items()}
    model = from_huggingface(LLAMA, arrays)
    np.testing.assert_array_equal(model.output.kernel[...], arrays["lm_head.weight"].T)


@pytest.mark.parametrize("bare", [False, True])
def test_names_of_tensorflow_are_read(bare):
    """As the checkpoints of BERT's authors have them."""
    fields = CONFIGS["bert"] if bare else BERT | {"architectures": ["BertForPreTraining"]}
    arrays = arrays_of(CONFIGS["bert"] if bare else BERT)
    expected = from_huggingface(fields, arrays)
    old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    for now, before in old.items():
        arrays = {name.replace(now, before): x for name, x in arrays.items()}
    arrays = {name.removeprefix("bert.") if bare else name: x for name, x in arrays.items()}
    # The first of these is a head that is passed over.
    others = {} if bare else {"cls.seq_relationship.weight": np.zeros((2, 12), np.float32)}
    others |= {("" if bare else "bert.") + "embeddings.position_ids": np.arange(13)[None]}
    assert any("gamma" in name for name in arrays)
    model = from_huggingface(fields, arrays | others)
    jax.tree.map(np.testing.assert_array_equal, nnx.state(model), nnx.state(expected))


def test_both_names_of_a_norm_are_one_too_many():
    arrays = arrays_of(BERT)
    arrays["bert.embeddings.LayerNorm.gamma"] = arrays["bert.embeddings.LayerNorm.weight"] + 1
    with pytest.raises(ValueError, match=r"missing none; unknown 'bert\.embeddings\.LayerNorm\.gamma'"):
        from_huggingface(BERT, arrays)


@pytest.mark.parametrize(
    ("name", "buffers"),
    [
        (
            "pegasus",
            {"model.encoder.embed_positions.weight": (13, 12), "model.decoder.embed_positions.weight": (13, 12)},
        ),
        (
            "m2m_100",
            {"model.encoder.embed_positions.weights": (15, 12), "model.decoder.embed_positions.weights": (15, 12)},
        ),
        ("llama", {"model.layers.0.self_attn.rotary_emb.inv_freq": (1,)}),
        ("gpt2", {"transformer.h.1.attn.bias": (1, 1, 13, 13), "transformer.h.1.attn.masked_bias": ()}),
        ("t5", {"decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight": (8, 3)}),
        ("roberta, masked", {"roberta.embeddings.position_ids": (1, 13), "roberta.pooler.dense.bias": (12,)}),
    ],
)
def test_buffers_of_older_checkpoints_are_passed_over(name, buffers):
    made = {buffer: np.ones(shape) for buffer, shape in buffers.items()}
    from_huggingface(CONFIGS[name], arrays_of(CONFIGS[name]) | made)


def test_an_untied_table_is_seen_under_any_name_of_the_tokens():
    arrays = arrays_of(T5)
    arrays["encoder.embed_tokens.weight"] = arrays.pop("shared.weight")
    other = arrays["encoder.embed_tokens.weight"] + 1
    model = from_huggingface(T5 | {"scale_decoder_outputs": False}, arrays | {"lm_head.weight": other})
    np.testing.assert_array_equal(model.output.kernel[...], other.T)


def test_parameters_are_floating_point():
    with pytest.raises(ValueError, match="param_dtype must be a floating-point type, got int32"):
        from_huggingface(GPT2, arrays_of(GPT2), param_dtype=jnp.int32)


class Counted(Mapping):
    """Arrays that are made when they are read. Counts the reads, and how many arrays live at once."""

    def __init__(self, arrays: dict[str, np.ndarray]) -> None:
        self.arrays, self.reads, self.living, self.most = arrays, dict.fromkeys(arrays, 0), 0, 0

    def __getitem__(self, name: str) -> np.ndarray:
        made = np.array(self.arrays[name])
        self.reads[name] += 1
        self.living += 1
        gc.collect()
        self.most = max(self.most, self.living)
        weakref.finalize(made, self._gone)
        return made

    def _gone(self) -> None:
        self.living -= 1

    def __iter__(self) -> Iterator[str]:
        return iter(self.arrays)

    def __len__(self) -> int:
        return len(self.arrays)


@pytest.mark.usefixtures("as_users_call_it")  # a check of types reads an item
def test_arrays_are_read_once_and_one_at_a_time():
    counted = Counted(arrays_of(LLAMA))
    from_huggingface(LLAMA, counted)
    assert set(counted.reads.values()) == {1}
    assert counted.most == 1


def test_parameters_have_the_dtype_and_the_place_that_the_caller_wants():
    arrays = {name: x.astype(jnp.bfloat16) for name, x in arrays_of(LLAMA).items()}
    mesh = Mesh(np.array(jax.devices()[:2]), ("tensor",))

    def in_halves(x: jax.ShapeDtypeStruct) -> NamedSharding:
        even = next(axis for axis, size in enumerate(x.shape) if size % 2 == 0)
        return NamedSharding(mesh, P(*(None,) * even, "tensor"))

    def shardings(model: nnx.Module) -> nnx.State:
        return jax.tree.map(in_halves, nnx.state(model))

    model = from_huggingface(LLAMA, arrays, param_dtype=jnp.bfloat16, shardings=shardings)
    leaves = jax.tree.leaves(nnx.state(model))
    assert {leaf.dtype for leaf in leaves} == {jnp.dtype(jnp.bfloat16)}
    for leaf in leaves:
        assert leaf.sharding == in_halves(leaf)
        assert [shard.data.size for shard in leaf.addressable_shards] == [leaf.size // 2] * 2
    table, other = arrays["model.embed_tokens.weight"], from_huggingface(LLAMA, arrays, param_dtype=jnp.bfloat16)
    np.testing.assert_array_equal(np.asarray(model.embedding.table[...]), table)
    for name, x in to_arrays(other).items():
        np.testing.assert_array_equal(to_arrays(model)[name], x)


@pytest.mark.parametrize(
    "shardings",
    [lambda model: nnx.state(model), lambda model: SingleDeviceSharding(jax.devices()[1])],
    ids=["arrays", "one for all"],
)
def test_shardings_that_are_no_tree_of_the_parameters_are_refused(shardings):
    with pytest.raises(ValueError, match=r"shardings must return the tree of nnx\.state\(model\)"):
        from_huggingface(LLAMA, arrays_of(LLAMA), shardings=shardings)


def test_later_changes_of_the_arrays_do_not_reach_the_model():
    arrays = arrays_of(GPT2)
    model = from_huggingface(GPT2, arrays)
    before = np.array(model.learned.table[...])
    arrays["transformer.wpe.weight"][:] = 7
    np.testing.assert_array_equal(model.learned.table[...], before)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"embedding_scale": 2.0}, "t5 has no such Transformer: embedding_scale must be 1.0, got 2.0"),
        ({"decoder_window": 3}, "t5 has no such Transformer: decoder_window must be None, got 3"),
        ({"positions": None}, "t5 has no such Transformer: positions must be BucketBiases, got None"),
        ({"gated": True}, r"activation and gated must be one of \(RELU, False, .*\), got EXACT_GELU, True"),
    ],
)
def test_a_model_that_a_family_cannot_express_is_refused(changes, message):
    config = huggingface_config(T5)
    if "gated" in changes:
        block = dataclasses.replace(config.block, activation=Activation.EXACT_GELU, **changes)
        changes = {"block": block}
    config = dataclasses.replace(config, **changes)
    with pytest.raises(ValueError, match=message):
        to_huggingface(Transformer(config, rngs=nnx.Rngs(0)), "t5")


def test_a_model_of_another_class_is_refused():
    block = BlockConfig(model_dim=12, hidden_dim=7, num_heads=3)
    model = Transformer(TransformerConfig(11, 1, 1, block), rngs=nnx.Rngs(0))
    with pytest.raises(
        ValueError,
        match="llama has no such Transformer: its config must be a LanguageModelConfig, got TransformerConfig",
    ):
        to_huggingface(model, "llama")
    with pytest.raises(NotImplementedError, match="model_type must be one of"):
        to_huggingface(model, "mamba")
