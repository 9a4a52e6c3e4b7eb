"""GPT-2 (Radford 2019)."""

from collections.abc import Iterator, Mapping
from typing import Any

from seqattn.checks import check_multiple
from seqattn.interop.huggingface.family import Family, Parameter, norm
from seqattn.interop.huggingface.fields import ACTIVATIONS, Fields, activation_name
from seqattn.interop.huggingface.layouts import Joined, Transposed
from seqattn.models.language_model import LanguageModelConfig
from seqattn.models.position_encodings import Learned
from seqattn.nn.blocks import BlockConfig

_DEFAULTS: Mapping[str, Any] = {
    "vocab_size": 50_257,
    "n_positions": 1024,
    "n_embd": 768,
    "n_layer": 12,
    "n_head": 12,
    "n_inner": None,
    "activation_function": "gelu_new",
    "resid_pdrop": 0.1,
    "embd_pdrop": 0.1,
    "attn_pdrop": 0.1,
    "layer_norm_epsilon": 1e-5,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "reorder_and_upcast_attn": False,
    "add_cross_attention": False,
    "tie_word_embeddings": True,
}


def _read(fields: Fields) -> LanguageModelConfig:
    fields.require(scale_attn_by_inverse_layer_idx=False, reorder_and_upcast_attn=False, add_cross_attention=False)
    names = {"max_position_embeddings": "n_positions", "num_hidden_layers": "n_layer"}
    fields.alias(hidden_size="n_embd", num_attention_heads="n_head", **names)
    # Older fields that transformers no longer reads, and a head that summarizes a text.
    fields.ignore("n_ctx", "n_special", "predict_special_tokens")
    fields.ignore(*(f"summary_{name}" for name in ("type", "use_proj", "activation", "proj_to_labels")))
    fields.ignore("summary_first_dropout")
    if fields.rate("embd_pdrop") != fields.rate("resid_pdrop"):
        raise NotImplementedError(
            f"embd_pdrop ({fields['embd_pdrop']}) and resid_pdrop ({fields['resid_pdrop']}) must be equal"
        )
    model_dim, heads = fields.size("n_embd"), fields.size("n_head")
    check_multiple("n_embd", model_dim, heads, "n_head")
    block = BlockConfig(
        model_dim=model_dim,
        hidden_dim=4 * model_dim if fields["n_inner"] is None else fields.size("n_inner"),
        num_heads=heads,
        attention_scale=None if fields.flag("scale_attn_weights") else 1.0,
        activation=fields.choice("activation_function", ACTIVATIONS),
        norm_first=True,
        attention_bias=True,
        norm_epsilon=fields.number("layer_norm_epsilon"),
        dropout_rate=fields.rate("resid_pdrop"),
        attention_dropout_rate=fields.rate("attn_pdrop"),
    )
    return LanguageModelConfig(
        fields.size("vocab_size"),
        fields.size("n_layer"),
        block,
        Learned(fields.size("n_positions")),
        embedding_scale=1.0,
        tie_logits=fields.flag("tie_word_embeddings"),
    )


def _write(config: LanguageModelConfig) -> dict[str, Any]:
    block, positions = config.block, config.positions
    if not isinstance(positions, Learned):
        raise ValueError(f"positions must be Learned, got {positions}")
    return {
        "vocab_size": config.vocab_size,
        "n_positions": positions.max_length,
        "n_embd": block.model_dim,
        "n_layer": config.num_layers,
        "n_head": block.num_heads,
        "n_inner": block.hidden_dim,
        "activation_function": activation_name(block.activation),
        "resid_pdrop": block.dropout_rate,
        "embd_pdrop": block.dropout_rate,
        "attn_pdrop": block.attention_dropout_rate,
        "layer_norm_epsilon": block.norm_epsilon,
        "scale_attn_weights": block.attention_scale is None,
        "tie_word_embeddings": config.tie_logits,
    }


def _parameters(config: LanguageModelConfig) -> Iterator[Parameter]:
    yield Parameter("transformer.wte.weight", ("embedding.table",))
    yield Parameter("transformer.wpe.weight", ("learned.table",))
    yield from norm("transformer.ln_f", "stack.norm")
    if not config.tie_logits:
        yield Parameter("lm_head.weight", ("output.kernel",), Transposed())
    for layer in range(config.num_layers):
        theirs, ours = f"transformer.h.{layer}", f"stack.blocks.{layer}"
        yield from norm(f"{theirs}.ln_1", f"{ours}.attention_residual.norm")
        yield from norm(f"{theirs}.ln_2", f"{ours}.feed_forward_residual.norm")
        # Matrices are `[in, out]` here, and one holds queries, keys and values side by side.
        for theirs_end, ours_end in (("weight", "kernel"), ("bias", "bias")):
            joined = tuple(f"{ours}.attention.{name}.{ours_end}" for name in ("query", "key", "value"))
            yield Parameter(f"{theirs}.attn.c_attn.{theirs_end}", joined, Joined())
            yield Parameter(f"{theirs}.attn.c_proj.{theirs_end}", (f"{ours}.attention.output.{ours_end}",))
            yield Parameter(f"{theirs}.mlp.c_fc.{theirs_end}", (f"{ours}.feed_forward.hidden.{ours_end}",))
            yield Parameter(f"{theirs}.mlp.c_proj.{theirs_end}", (f"{ours}.feed_forward.output.{ours_end}",))


GPT2 = Family(
    "gpt2",
    LanguageModelConfig,
    _DEFAULTS,
    _read,
    _write,
    _parameters,
    same=lambda config: {"lm_head.weight": "transformer.wte.weight"} if config.tie_logits else {},
    ignored=("transformer.h.*.attn.bias", "transformer.h.*.attn.masked_bias"),
    prefix="transformer.",
    architecture=lambda config: "GPT2LMHeadModel",
)
"""The ignored arrays are causal masks."""
