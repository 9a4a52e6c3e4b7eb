"""Small configs of every family of Hugging Face models, with parameters that are drawn from a seed by their names.

`values.json` beside the tests holds the logits of the last token that transformers computes. To write it again, where
PyTorch and transformers are installed: `python -m tests.huggingface_models`.
"""

import json
import re
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from seqattn.coordinates import Coordinates
from seqattn.interop.huggingface import huggingface_config
from seqattn.interop.huggingface.families import FAMILIES
from seqattn.interop.saved import empty_model
from seqattn.models import EncoderConfig, TransformerConfig

VALUES = Path(__file__).parent / "seqattn" / "interop" / "huggingface" / "values.json"
VOCABULARY, SOURCE_LENGTH, LENGTH = 11, 7, 5
LENGTHS = (7, 4)

_SEQ2SEQ: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "d_model": 12,
    "encoder_layers": 2,
    "decoder_layers": 1,
    "encoder_attention_heads": 3,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 7,
    "decoder_ffn_dim": 5,
    "max_position_embeddings": 13,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
}
_T5: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "d_model": 12,
    "d_kv": 5,
    "d_ff": 7,
    "num_layers": 2,
    "num_decoder_layers": 1,
    "num_heads": 3,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 6,
    "decoder_start_token_id": 0,
}
_GPT2: dict[str, Any] = {"vocab_size": VOCABULARY, "n_positions": 13, "n_embd": 12, "n_layer": 2, "n_head": 3}
_GPT2 |= {"bos_token_id": 1, "eos_token_id": 2}
_DECODER: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 12,
    "intermediate_size": 7,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_LLAMA3 = {"rope_type": "llama3", "rope_theta": 50.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
_LLAMA3 |= {"original_max_position_embeddings": 16}
_YARN = {"rope_type": "yarn", "rope_theta": 50.0, "factor": 4.0, "original_max_position_embeddings": 16}
_GEMMA2 = _DECODER | {"head_dim": 4, "sliding_window": 3, "query_pre_attn_scalar": 13}

_BERT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 7,
    "max_position_embeddings": 13,
    "type_vocab_size": 2,
    "pad_token_id": 0,
}
_DISTILBERT: dict[str, Any] = {"vocab_size": VOCABULARY, "dim": 12, "n_layers": 2, "n_heads": 3, "hidden_dim": 7}
_DISTILBERT |= {"max_position_embeddings": 13, "pad_token_id": 0}
_ROBERTA = _BERT | {"model_type": "roberta", "type_vocab_size": 1, "pad_token_id": 1}
_THREE = {"id2label": {"0": "a", "1": "b", "2": "c"}, "label2id": {"a": 0, "b": 1, "c": 2}}

CONFIGS: dict[str, dict[str, Any]] = {
    "bart": {"model_type": "bart"} | _SEQ2SEQ,
    "bart, scaled": {"model_type": "bart", "scale_embedding": True, "activation_function": "gelu_new"} | _SEQ2SEQ,
    "bart, equal sides": {"model_type": "bart"} | _SEQ2SEQ | {"decoder_attention_heads": 3, "decoder_ffn_dim": 7},
    "bert": {"model_type": "bert", "architectures": ["BertModel"]} | _BERT,
    "bert, masked": {"model_type": "bert", "architectures": ["BertForMaskedLM"], "hidden_act": "relu"} | _BERT,
    "bert, texts": {"model_type": "bert", "architectures": ["BertForSequenceClassification"]} | _BERT | _THREE,
    "bert, tokens": {"model_type": "bert", "architectures": ["BertForTokenClassification"]} | _BERT | _THREE,
    "distilbert": {"model_type": "distilbert", "architectures": ["DistilBertModel"]} | _DISTILBERT,
    "distilbert, masked": {"model_type": "distilbert", "architectures": ["DistilBertForMaskedLM"]} | _DISTILBERT,
    "distilbert, texts": {"model_type": "distilbert", "architectures": ["DistilBertForSequenceClassification"]}
    | _DISTILBERT
    | _THREE,
    "distilbert, tokens": {"model_type": "distilbert", "architectures": ["DistilBertForTokenClassification"]}
    | _DISTILBERT
    | _THREE,
    "gemma2": {"model_type": "gemma2"} | _GEMMA2,
    "gemma2, caps": {"model_type": "gemma2", "attn_logit_softcapping": 1.5, "final_logit_softcapping": 4.0} | _GEMMA2,
    "gemma2, no caps": {"model_type": "gemma2", "attn_logit_softcapping": None, "final_logit_softcapping": None}
    | (_GEMMA2 | {"query_pre_attn_scalar": 4, "layer_types": ["full_attention"] * 3}),
    "gpt2": {"model_type": "gpt2"} | _GPT2,
    "gpt2, inner": {"model_type": "gpt2", "n_inner": 5, "activation_function": "relu"} | _GPT2,
    "gpt2, not scaled": {"model_type": "gpt2", "scale_attn_weights": False} | _GPT2,
    "llama": {"model_type": "llama"} | _DECODER,
    "llama, biases": {"model_type": "llama", "attention_bias": True, "mlp_bias": True, "head_dim": 4} | _DECODER,
    "llama, tied": {"model_type": "llama", "tie_word_embeddings": True, "num_key_value_heads": 6} | _DECODER,
    "llama, linear": {"model_type": "llama", "rope_scaling": {"type": "linear", "factor": 3.0}} | _DECODER,
    "llama 3": {"model_type": "llama", "rope_parameters": _LLAMA3} | _DECODER,
    "llama, yarn": {"model_type": "llama", "rope_parameters": _YARN} | _DECODER,
    "m2m_100": {"model_type": "m2m_100"} | _SEQ2SEQ,
    "m2m_100, not scaled": {"model_type": "m2m_100", "scale_embedding": False} | _SEQ2SEQ,
    "m2m_100, other padding": {"model_type": "m2m_100"} | _SEQ2SEQ | {"pad_token_id": 0},
    "marian": {"model_type": "marian"} | _SEQ2SEQ,
    "marian, opus": {"model_type": "marian", "scale_embedding": True, "activation_function": "swish"} | _SEQ2SEQ,
    "marian, relu": {"model_type": "marian", "activation_function": "relu"} | _SEQ2SEQ,
    "mbart": {"model_type": "mbart"} | _SEQ2SEQ,
    "mbart, scaled": {"model_type": "mbart", "scale_embedding": True} | _SEQ2SEQ,
    "mbart, relu": {"model_type": "mbart", "activation_function": "relu"} | _SEQ2SEQ,
    "mistral": {"model_type": "mistral", "sliding_window": 3} | _DECODER,
    "mistral, full": {"model_type": "mistral", "sliding_window": None, "head_dim": 4} | _DECODER,
    "mistral, tied": {"model_type": "mistral", "tie_word_embeddings": True} | _DECODER,
    "mt5": {"model_type": "mt5"} | _T5,
    "mt5, untied": {"model_type": "mt5", "tie_word_embeddings": False} | _T5,
    "mt5, gated silu": {"model_type": "mt5", "feed_forward_proj": "gated-silu"} | _T5,
    "pegasus": {"model_type": "pegasus"} | _SEQ2SEQ,
    "pegasus, scaled": {"model_type": "pegasus", "scale_embedding": True} | _SEQ2SEQ,
    "pegasus, relu": {"model_type": "pegasus", "activation_function": "relu"} | _SEQ2SEQ,
    "qwen2": {"model_type": "qwen2"} | _DECODER,
    "qwen2, windows": {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 2, "max_window_layers": 1}
    | _DECODER,
    "qwen2, tied": {"model_type": "qwen2", "tie_word_embeddings": True} | _DECODER,
    "qwen3": {"model_type": "qwen3", "head_dim": 4} | _DECODER,
    "qwen3, biases": {"model_type": "qwen3", "head_dim": 2, "attention_bias": True} | _DECODER,
    "qwen3, tied": {"model_type": "qwen3", "head_dim": 2, "tie_word_embeddings": True} | _DECODER,
    "roberta": _ROBERTA | {"architectures": ["RobertaModel"]},
    "roberta, masked": _ROBERTA | {"architectures": ["RobertaForMaskedLM"]},
    "roberta, texts": _ROBERTA | {"architectures": ["RobertaForSequenceClassification"]} | _THREE,
    "roberta, tokens": _ROBERTA | {"architectures": ["RobertaForTokenClassification"]} | _THREE,
    "t5": {"model_type": "t5"} | _T5,
    "t5 1.1": {"model_type": "t5", "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False} | _T5,
    "t5, silu": {"model_type": "t5", "feed_forward_proj": "silu"} | _T5,
}
"""At least three configs of each family, by name."""


def shapes_of(fields: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """The shapes of the arrays of a checkpoint, by their names."""
    config = huggingface_config(fields)
    shapes = {name: x.shape for name, x in _leaves(empty_model(config, jnp.float32)).items()}
    return {
        parameter.name: parameter.layout.shape([shapes[path] for path in parameter.paths])
        for parameter in FAMILIES[fields["model_type"]].parameters(config)
    }


def _leaves(model: nnx.Module) -> dict[str, jax.ShapeDtypeStruct]:
    return {".".join(map(str, path)): leaf for path, leaf in nnx.to_flat_state(nnx.state(model))}


def arrays_of(fields: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Parameters by the names of transformers. Each depends on its name and shape alone."""
    return {name: _draw(name, shape) for name, shape in shapes_of(fields).items()}


def _draw(name: str, shape: tuple[int, ...]) -> np.ndarray:
    random = np.random.default_rng(zlib.crc32(name.encode()))
    drawn = random.standard_normal(shape).astype(np.float32)
    # Matrices of unit gain, so that no layer vanishes beside the others; small biases; gains around 1.
    if len(shape) > 1 and min(shape) > 1:
        return drawn / np.float32(shape[-1] ** 0.5) if "embed" not in name and "shared" not in name else drawn / 2
    return drawn * np.float32(0.3) + np.float32("norm" in name and name.endswith("weight"))


def tokens_of(name: str) -> tuple[np.ndarray, np.ndarray]:
    """A source `[2, S]` and a target `[2, T]` for a config."""
    random = np.random.default_rng(zlib.crc32(name.encode()))
    source, target = random.integers(3, VOCABULARY, (2, SOURCE_LENGTH)), random.integers(3, VOCABULARY, (2, LENGTH))
    return source, target


@nnx.jit
def seq2seq_logits(model: Any, source: jax.Array, target: jax.Array) -> jax.Array:
    """Logits `[2, T, V]` of an encoder-decoder whose second source is shorter."""
    memory = model.encode(source, Coordinates.from_lengths(LENGTHS, SOURCE_LENGTH))
    return model.decode(target, Coordinates.from_lengths([LENGTH, LENGTH], LENGTH), memory)


@nnx.jit
def decoder_logits(model: Any, tokens: jax.Array) -> jax.Array:
    """Logits `[2, S, V]` of a decoder-only model without a prefix."""
    nothing = jnp.zeros((2, 0), jnp.int32)
    memory = model.encode(nothing, Coordinates(nothing, nothing))
    return model.decode(tokens, Coordinates.from_lengths([SOURCE_LENGTH] * 2, SOURCE_LENGTH), memory)


@nnx.jit
def encoder_logits(model: Any, tokens: jax.Array) -> jax.Array:
    """Logits or vectors of the tokens that both rows have, `[2, 4, C]`; those of labels of texts `[2, 1, C]`."""
    found = model(tokens, Coordinates.from_lengths(LENGTHS, SOURCE_LENGTH))
    return found[:, None] if found.ndim == 2 else found[:, : min(LENGTHS)]


def logits_of(name: str, model: Any) -> np.ndarray:
    """Our logits for the tokens of a config."""
    source, target = map(jnp.asarray, tokens_of(name))
    if isinstance(model.config, EncoderConfig):
        return np.asarray(encoder_logits(model, source))
    if isinstance(model.config, TransformerConfig):
        return np.asarray(seq2seq_logits(model, source, target))
    return np.asarray(decoder_logits(model, source))


def head_of(fields: Mapping[str, Any]) -> Any:
    """The class of transformers that makes and loads models of these fields."""
    import transformers

    if (named := fields.get("architectures")) is not None:
        return {
            "Model": transformers.AutoModel,
            "LM": transformers.AutoModelForMaskedLM,
            "SequenceClassification": transformers.AutoModelForSequenceClassification,
            "TokenClassification": transformers.AutoModelForTokenClassification,
        }[re.split("For|(?=Model)|(?=LM)", named[0].replace("Masked", ""))[-1]]
    if fields["model_type"] in ("gemma2", "gpt2", "llama", "mistral", "qwen2", "qwen3"):
        return transformers.AutoModelForCausalLM
    return transformers.AutoModelForSeq2SeqLM


def peer_of(fields: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> Any:
    """The model of transformers with these parameters."""
    import torch
    import transformers

    transformers.utils.logging.set_verbosity_error()
    kind = fields["model_type"]
    config = transformers.AutoConfig.for_model(kind).from_dict(dict(fields))
    model = head_of(fields).from_config(config, attn_implementation="eager").eval()
    if "lm_head.weight" in arrays:  # transformers ties it in every T5
        model.lm_head.weight = torch.nn.Parameter(torch.empty(arrays["lm_head.weight"].shape))
    # The names of a bare model have no prefix.
    own = model.state_dict()
    given = {name if name in own else name.partition(".")[2]: torch.from_numpy(x.copy()) for name, x in arrays.items()}
    found = model.load_state_dict(given, strict=False)
    # The rest are sinusoids, aliases of the table of tokens, and a layer that a bare BERT does not use for vectors.
    known = ("embed_", "lm_head.weight", "pooler.", "decoder.", "vocab_projector.weight")
    missing = [name for name in found.missing_keys if not any(part in name for part in known)]
    if missing or found.unexpected_keys:
        raise RuntimeError(f"{kind} lacks {missing} and does not know {found.unexpected_keys}")
    return model


def peer_logits(name: str, peer: Any) -> np.ndarray:
    """The logits of transformers for the tokens of a config."""
    import torch

    source, target = map(torch.from_numpy, tokens_of(name))
    mask = (torch.arange(SOURCE_LENGTH) < torch.tensor(LENGTHS)[:, None]).long()
    with torch.no_grad():
        if any(part in type(peer).__name__ for part in ("Bert", "Roberta")):
            output = peer(input_ids=source, attention_mask=mask)
            found = (output.logits if "logits" in output else output.last_hidden_state).numpy()
            return np.asarray(found[:, None] if found.ndim == 2 else found[:, : min(LENGTHS)])
        if not peer.config.is_encoder_decoder:
            return np.asarray(peer(input_ids=source).logits.numpy())
        given = {"input_ids": source, "attention_mask": mask, "decoder_input_ids": target}
        return np.asarray(peer(**given).logits.numpy())


def main() -> None:
    """Writes the logits of transformers for the last token, for all configs."""
    values = {name: peer_logits(name, peer_of(fields, arrays_of(fields))) for name, fields in CONFIGS.items()}
    rows = [f"{json.dumps(name)}: {json.dumps(x[:, -1].astype(float).round(5).tolist())}" for name, x in values.items()]
    VALUES.write_text("{\n" + ",\n".join(rows) + "\n}\n", "utf-8")


if __name__ == "__main__":
    main()
