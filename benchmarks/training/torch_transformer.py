"""The MarianMT model as PyTorch users build it: `torch.nn.Transformer` between a shared embedding and its logits.

Imports torch only when a model is built, since it is optional.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

_ATTENTIONS = {"self_attn": "self_attn", "encoder_attn": "multihead_attn"}
_LINEARS = {"fc1": "linear1", "fc2": "linear2"}
_NORMS = {
    "encoder": {"self_attn_layer_norm": "norm1", "final_layer_norm": "norm2"},
    "decoder": {"self_attn_layer_norm": "norm1", "encoder_attn_layer_norm": "norm2", "final_layer_norm": "norm3"},
}
"""Names of Marian's layers, and the names used here."""


def torch_transformer(config: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> Any:
    """Returns a `torch.nn.Module` from source `[B, S]`, its padding `[B, S]` and target `[B, T]` to logits `[B, T, V]`.

    Dropout applies only to the embeddings and to each sublayer's output. `torch.nn.Transformer` also has it in
    attention and in the hidden layer; MarianMT and ours do not.

    Args:
        config: the fields of a MarianMT `config.json`.
        arrays: its parameters by Marian's names.
    """
    import torch

    class Translator(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = torch.nn.Embedding(config["vocab_size"], config["d_model"])
            self.bias = torch.nn.Parameter(torch.empty(config["vocab_size"]))
            self.dropout = torch.nn.Dropout(config["dropout"])
            self.transformer = _transformer(config)

        def forward(self, source: Any, source_padding: Any, target: Any) -> Any:
            length = target.shape[1]
            # Target padding needs no mask: it follows the tokens, and the causal mask hides it from them.
            later = torch.ones(length, length, dtype=torch.bool).triu(1)
            decoded = self.transformer(
                self.embed(source),
                self.embed(target),
                tgt_mask=later,
                src_key_padding_mask=source_padding,
                memory_key_padding_mask=source_padding,
                tgt_is_causal=True,
            )
            return torch.nn.functional.linear(decoded, self.table.weight, self.bias)

        def embed(self, tokens: Any) -> Any:
            scaled = self.table(tokens) * self.table.embedding_dim**0.5
            return self.dropout(scaled + positions[: tokens.shape[1]])

    positions = torch.from_numpy(_positions(1024, config["d_model"]))
    network = Translator()
    network.load_state_dict({name: torch.from_numpy(x) for name, x in _renamed(config, arrays).items()})
    return network


def _transformer(config: Mapping[str, Any]) -> Any:
    """Returns `torch.nn.Transformer` without final norms, which post-norm models of this kind lack."""
    from torch import nn

    sizes = {"d_model": config["d_model"], "nhead": config["encoder_attention_heads"]}
    sizes |= {"dim_feedforward": config["encoder_ffn_dim"], "dropout": config["dropout"], "batch_first": True}
    encoder = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(**sizes), config["encoder_layers"], enable_nested_tensor=False
    )
    decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(**sizes), config["decoder_layers"])
    for layer in (*encoder.layers, *decoder.layers):
        layer.dropout.p = 0.0  # of the hidden layer
    for module in (*encoder.modules(), *decoder.modules()):
        if isinstance(module, nn.MultiheadAttention):
            module.dropout = 0.0
    outer = {"d_model": config["d_model"], "nhead": config["encoder_attention_heads"], "batch_first": True}
    return nn.Transformer(custom_encoder=encoder, custom_decoder=decoder, **outer)


def _positions(length: int, dim: int) -> np.ndarray:
    """Returns MarianMT's positions `[length, dim]`: all sines first, then all cosines."""
    angles = np.arange(length)[:, None] / 10_000 ** (np.arange(0, dim, 2) / dim)
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1).astype(np.float32)


def _renamed(config: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Renames the parameters; query, key and value are joined into one."""
    renamed = {"table.weight": arrays["model.shared.weight"], "bias": arrays["final_logits_bias"][0]}
    for side, norms in _NORMS.items():
        for layer in range(config[f"{side}_layers"]):
            theirs, ours = f"model.{side}.layers.{layer}", f"transformer.{side}.layers.{layer}"
            for kind in ("weight", "bias"):
                for old, new in (_LINEARS | norms).items():
                    renamed[f"{ours}.{new}.{kind}"] = arrays[f"{theirs}.{old}.{kind}"]
                for old, new in _ATTENTIONS.items():
                    if f"{theirs}.{old}.out_proj.{kind}" in arrays:
                        parts = [arrays[f"{theirs}.{old}.{letter}_proj.{kind}"] for letter in "qkv"]
                        renamed[f"{ours}.{new}.in_proj_{kind}"] = np.concatenate(parts)
                        renamed[f"{ours}.{new}.out_proj.{kind}"] = arrays[f"{theirs}.{old}.out_proj.{kind}"]
    return renamed
