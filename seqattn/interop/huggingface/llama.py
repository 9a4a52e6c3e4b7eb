"""Llama 2 and 3 (Touvron 2023; Llama Team 2024), and what the families that share its names have in common with it."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from seqattn.interop.codec import shown
from seqattn.interop.huggingface import rope
from seqattn.interop.huggingface.family import Family, Parameter, linear, norm
from seqattn.interop.huggingface.fields import ACTIVATIONS, Fields, activation_name
from seqattn.interop.huggingface.layouts import SAME, Layout, Transposed
from seqattn.models.language_model import LanguageModelConfig
from seqattn.models.position_encodings import Rotary
from seqattn.models.stack import Attention, Full, Window
from seqattn.nn.blocks import BlockConfig

DEFAULTS: Mapping[str, Any] = {
    **rope.DEFAULTS,
    "vocab_size": 32_000,
    "hidden_size": 4096,
    "intermediate_size": 11_008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": None,
    "head_dim": None,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "mlp_bias": False,
    "tie_word_embeddings": False,
    "sliding_window": None,
    "layer_types": None,
}


def read_config(
    fields: Fields, *, pattern: Sequence[Attention] = (Full(),), block: Mapping[str, Any], **choices: Any
) -> LanguageModelConfig:
    """Reads the fields that all these families have.

    Args:
        fields: the fields.
        pattern: what each layer attends to.
        block: further choices of the blocks.
        **choices: further choices of the model.
    """
    model_dim, heads = fields.size("hidden_size"), fields.size("num_attention_heads")
    key_heads = heads if fields["num_key_value_heads"] is None else fields.size("num_key_value_heads")
    head_dim = None if fields["head_dim"] is None else fields.size("head_dim")
    options: dict[str, Any] = {
        "model_dim": model_dim,
        "hidden_dim": fields.size("intermediate_size"),
        "num_heads": heads,
        "num_kv_heads": None if key_heads == heads else key_heads,
        "attention_head_dim": None if head_dim is not None and head_dim * heads == model_dim else head_dim,
        "gated": True,
        "norm_first": True,
        "norm_epsilon": fields.number("rms_norm_eps"),
        "rms_norm": True,
        "norm_bias": False,
        "dropout_rate": 0.0,
        "attention_dropout_rate": fields.rate("attention_dropout"),
    }
    return LanguageModelConfig(
        fields.size("vocab_size"),
        fields.size("num_hidden_layers"),
        BlockConfig(**options | dict(block)),
        rope.read_rotary(fields),
        tuple(pattern),
        tie_logits=fields.flag("tie_word_embeddings"),
        **choices,
    )


def write_config(config: LanguageModelConfig) -> dict[str, Any]:
    """Returns the fields that all these families have."""
    block, positions = config.block, config.positions
    if not isinstance(positions, Rotary):
        raise ValueError(f"positions must be Rotary, got {positions}")
    return {
        **rope.write_rotary(positions),
        "vocab_size": config.vocab_size,
        "hidden_size": block.model_dim,
        "intermediate_size": block.hidden_dim,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": block.num_heads,
        "num_key_value_heads": block.num_heads if block.num_kv_heads is None else block.num_kv_heads,
        "head_dim": block.head_dim,
        "hidden_act": activation_name(block.activation),
        "rms_norm_eps": block.norm_epsilon,
        "attention_dropout": block.attention_dropout_rate,
        "tie_word_embeddings": config.tie_logits,
    }


def read_pattern(fields: Fields, *, default: Sequence[str] = ("full_attention",)) -> tuple[Attention, ...]:
    """Reads what the layers attend to, as the shortest pattern that repeats.

    Args:
        fields: the fields, with `layer_types` and `sliding_window`.
        default: the kinds of the layers, repeated, where `layer_types` is missing.
    """
    fields.ignore("sliding_window")  # has no effect if no layer has a window
    kinds, number = fields["layer_types"], fields.size("num_hidden_layers")
    if kinds is None:
        kinds = [default[layer % len(default)] for layer in range(number)]
    if not isinstance(kinds, list | tuple) or len(kinds) != number:
        raise ValueError(f"layer_types must name what each of {number} layers attends to, got {shown(kinds)}")
    for kind in kinds:
        if kind not in ("full_attention", "sliding_attention"):
            raise NotImplementedError(f"layer_types must be full_attention or sliding_attention, got {shown(kind)}")
    period = next(n for n in range(1, number + 1) if all(kinds[i] == kinds[i % n] for i in range(number)))
    return tuple(
        Full() if kind == "full_attention" else Window(fields.size("sliding_window")) for kind in kinds[:period]
    )


def write_pattern(config: LanguageModelConfig) -> dict[str, Any]:
    """Returns `layer_types` and `sliding_window`."""
    layers = [config.pattern[layer % len(config.pattern)] for layer in range(config.num_layers)]
    sizes = {layer.size for layer in layers if isinstance(layer, Window)}
    if len(sizes) > 1 or not all(isinstance(layer, Full | Window) for layer in layers):
        raise ValueError(f"pattern must have Full and one size of Window, got {config.pattern}")
    kinds = ["sliding_attention" if isinstance(layer, Window) else "full_attention" for layer in layers]
    return {"layer_types": kinds, "sliding_window": next(iter(sizes), None)}


def parameters(
    config: LanguageModelConfig, *, norms: Mapping[str, str] | None = None, gain: Layout = SAME
) -> Iterator[Parameter]:
    """Yields the arrays of a model of any of these families.

    Args:
        config: the config.
        norms: names of the norms of a block by their path in ours. Defaults to those of Llama.
        gain: the layout of the gain of norms.
    """
    block = config.block
    norms = _NORMS if norms is None else norms
    yield Parameter("model.embed_tokens.weight", ("embedding.table",))
    yield from norm("model.norm", "stack.norm", bias=False, layout=gain)
    if not config.tie_logits:
        yield Parameter("lm_head.weight", ("output.kernel",), Transposed())
    bias = dict.fromkeys(("query", "key", "value", "output"), block.attention_bias)
    bias |= {} if block.output_bias is None else {"output": block.output_bias}
    for layer in range(config.num_layers):
        theirs, ours = f"model.layers.{layer}", f"stack.blocks.{layer}"
        for name, biased in bias.items():
            yield from linear(f"{theirs}.self_attn.{name[0]}_proj", f"{ours}.attention.{name}", bias=biased)
        for name, part in {"gate": "gate", "up": "hidden", "down": "output"}.items():
            full = f"{ours}.feed_forward.{part}"
            yield from linear(f"{theirs}.mlp.{name}_proj", full, bias=block.feed_forward_bias)
        for part, name in norms.items():
            yield from norm(f"{theirs}.{name}", f"{ours}.{part}", bias=False, layout=gain)
        if block.qk_norm:
            for name in ("query", "key"):
                yield from norm(f"{theirs}.self_attn.{name[0]}_norm", f"{ours}.attention.{name}_norm", bias=False)


_NORMS = {"attention_residual.norm": "input_layernorm", "feed_forward_residual.norm": "post_attention_layernorm"}


def same(config: LanguageModelConfig) -> Mapping[str, str]:
    """Returns the name of tied logits."""
    return {"lm_head.weight": "model.embed_tokens.weight"} if config.tie_logits else {}


OPTIONS: Mapping[str, Any] = {"same": same, "ignored": ("*rotary_emb.inv_freq",), "prefix": "model."}
"""What all these families have in common. Frequencies are in some older checkpoints."""


def _read(fields: Fields) -> LanguageModelConfig:
    fields.ignore("is_llama_config")  # of SmolLM
    # The number of parts in which products were computed in training: with 1 they are the usual ones.
    if fields["pretraining_tp"] != 1:
        raise NotImplementedError(f"pretraining_tp must be 1, got {shown(fields['pretraining_tp'])}")
    block = {
        "activation": fields.choice("hidden_act", ACTIVATIONS),
        "attention_bias": fields.flag("attention_bias"),
        "feed_forward_bias": fields.flag("mlp_bias"),
    }
    return read_config(fields, block=block, embedding_scale=1.0)


def _write(config: LanguageModelConfig) -> dict[str, Any]:
    block = config.block
    return write_config(config) | {"attention_bias": block.attention_bias, "mlp_bias": block.feed_forward_bias}


LLAMA = Family(
    "llama",
    LanguageModelConfig,
    {**DEFAULTS, "pretraining_tp": 1},
    _read,
    _write,
    parameters,
    architecture=lambda config: "LlamaForCausalLM",
    **OPTIONS,
)
