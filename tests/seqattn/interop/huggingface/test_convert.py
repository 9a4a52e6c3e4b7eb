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
from seqattn.models import LanguageModelConfig, Transformer, TransformerConfig
from seqattn.nn import BlockConfig
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


LLAMA, GPT2, T5, QWEN2, GEMMA2 = (CONFIGS[name] for name in ("llama", "gpt2", "t5", "qwen2", "gemma2"))


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
        (
            QWEN2 | {"layer_types": ["chunked_attention"] * 3},
            "layer_types must be .*, got 'chunked_attention'",
        ),
        (
            GEMMA2 | {"use_bidirectional_attention": True},
            "use_bidirectional_attention must be None, got True",
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
        (LLAMA | {"hidden_size": "12"}, r"llama: hidden_size \('12'\) must be an integer"),
        (LLAMA | {"num_key_value_heads": 4}, r"num_heads \(6\) must be a multiple of num_kv_heads \(4\)"),
        (LLAMA | {"rms_norm_eps": float("nan")}, r"llama: rms_norm_eps \(nan\) must be"),
        (LLAMA | {"tie_word_embeddings": "no"}, "llama: tie_word_embeddings must be true or false, got 'no'"),
        (LLAMA | {"rope_parameters": {"rope_type": "linear"}}, r"factor \(None\) must be"),
        (LLAMA | {"head_dim": 3}, r"head_dim \(3\) must be even to be rotated"),
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
    harmless = {"novel_option": None, "another": False, "pruned_heads": {}, "list": []}
    assert huggingface_config(LLAMA | harmless) == huggingface_config(LLAMA)


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
    ],
)
def test_a_model_that_a_family_cannot_express_is_refused(changes, message):
    config = dataclasses.replace(huggingface_config(T5), **changes)
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
