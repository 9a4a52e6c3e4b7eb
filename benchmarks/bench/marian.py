"""A translation model with random weights, in the names and shapes of MarianMT, for all decoding implementations.

It needs no training, since the time of a step does not depend on the weights. But the weights are chosen so that
outputs can be compared: no sequence ends early, the output depends on the source, tokens seldom repeat, and the best
candidates have clearly different scores.
"""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx

from seqattn.interop import model_type
from seqattn.interop.huggingface import huggingface_config, to_huggingface

END = 0
_NEVER = -1e9  # a logit: effectively forbidden, without the -inf that some libraries mishandle
_GAINS = {
    "shared": 3.4,  # a token's embedding outweighs its position
    "q_proj": 2.0,  # attention is selective
    "k_proj": 2.0,
    "encoder_attn": 3.0,  # the output depends on the source
    "": 0.5,  # no other term dominates
}
"""Gain of each parameter relative to unit variance; the first part found in its name decides."""
_SEED = 20


@dataclass(frozen=True)
class Sizes:
    """Sizes of the model and of its sources."""

    num_layers: int = 3
    """Number of layers of the encoder, and of the decoder."""
    model_dim: int = 256
    hidden_dim: int = 1024
    num_heads: int = 4
    vocab_size: int = 8000
    source_length: int = 24
    """Number of tokens of each source, including the end token."""

    @property
    def pad_token(self) -> int:
        """The last token, which also starts each target."""
        return self.vocab_size - 1


@dataclass(frozen=True)
class RandomMarian:
    """The weights, and a folder for libraries that load them from a file."""

    sizes: Sizes
    folder: Path

    @property
    def config(self) -> dict[str, Any]:
        """The fields of a MarianMT `config.json`."""
        sizes = self.sizes
        sides = {
            f"{side}_{name}": value
            for side in ("encoder", "decoder")
            for name, value in (
                ("layers", sizes.num_layers),
                ("attention_heads", sizes.num_heads),
                ("ffn_dim", sizes.hidden_dim),
            )
        }
        tokens = {"eos_token_id": END, "pad_token_id": sizes.pad_token, "decoder_start_token_id": sizes.pad_token}
        others = {"activation_function": "relu", "scale_embedding": True, "forced_eos_token_id": None}
        return (
            {"model_type": "marian", "vocab_size": sizes.vocab_size, "d_model": sizes.model_dim}
            | sides
            | tokens
            | others
        )

    @functools.cached_property
    def arrays(self) -> dict[str, np.ndarray]:
        """Float32 parameters by Marian's names; the same in every process."""
        config = huggingface_config(self.config)
        _, names = to_huggingface(model_type(config)(config, rngs=nnx.Rngs(0)), "marian")
        random = np.random.default_rng(_SEED)
        arrays = {name: _draw(name, names[name].shape, random) for name in sorted(names)}
        # As in every OPUS-MT model, the start token has a zero embedding. CTranslate2 relies on it.
        arrays["model.shared.weight"][self.sizes.pad_token] = 0
        arrays["final_logits_bias"][0, [END, self.sizes.pad_token]] = _NEVER
        # The last token dominates the input of the last norm; random signs keep it from being repeated.
        last = f"model.decoder.layers.{self.sizes.num_layers - 1}.final_layer_norm.weight"
        arrays[last] *= random.choice(np.array([-1, 1], np.float32), arrays[last].shape)
        return arrays


def marian_mt(config: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> Any:
    """Returns the `MarianMTModel` of transformers with these parameters."""
    import torch
    import transformers

    transformers.utils.logging.set_verbosity_error()
    network = transformers.MarianMTModel(transformers.MarianConfig.from_dict(dict(config))).eval()
    found = network.load_state_dict({name: torch.from_numpy(x) for name, x in arrays.items()}, strict=False)
    # The rest are sinusoids and aliases of the shared table.
    missing = [name for name in found.missing_keys if "embed_" not in name and name != "lm_head.weight"]
    if missing or found.unexpected_keys:
        raise RuntimeError(f"MarianMTModel lacks {missing} and does not know {found.unexpected_keys}")
    return network


def _draw(name: str, shape: tuple[int, ...], random: np.random.Generator) -> np.ndarray:
    """Draws a weight `[out, in]`, a bias, or an embedding table `[V, D]`, which Marian scales by `sqrt(D)`."""
    if name.endswith("layer_norm.weight"):
        return np.ones(shape, np.float32)
    if name == "final_logits_bias" or len(shape) == 1:
        return random.standard_normal(shape, np.float32) * np.float32(0.02)
    gain = next(gain for part, gain in _GAINS.items() if part in name)
    return random.standard_normal(shape, np.float32) * np.float32(gain / shape[-1] ** 0.5)
