"""Reads the fields of a `config.json`, and refuses by name what a family does not know."""

import math
from collections.abc import Mapping
from typing import Any, TypeVar

from seqattn.checks import check_integer, check_number, check_rate
from seqattn.interop.codec import shown
from seqattn.nn.feed_forward import Activation

Value = TypeVar("Value")

ACTIVATIONS = {
    "relu": Activation.RELU,
    "gelu": Activation.EXACT_GELU,
    "gelu_new": Activation.GELU,
    "gelu_pytorch_tanh": Activation.GELU,
    "silu": Activation.SILU,
    "swish": Activation.SILU,
    "tanh": Activation.TANH,
}
"""The activations of transformers that we have. Its `gelu` is the exact one."""


def activation_name(activation: Activation) -> str:
    """Returns the first name of an activation in transformers.

    >>> activation_name(Activation.GELU)
    'gelu_new'
    """
    return next(name for name, ours in ACTIVATIONS.items() if ours is activation)


LIBRARY = frozenset(
    """
    architectures model_type transformers_version torch_dtype dtype _name_or_path name_or_path _commit_hash
    tokenizer_class return_dict use_cache output_attentions output_hidden_states output_past torchscript use_bfloat16
    gradient_checkpointing tf_legacy_loss chunk_size_feed_forward is_encoder_decoder attn_implementation
    _attn_implementation _attn_implementation_autoset _flash_attn_2_enabled sentence_transformers
    cache_implementation transformers.js_config unsloth_fixed unsloth_version
    initializer_range initializer_factor init_std classifier_dropout classif_dropout classifier_dropout_prob
    finetuning_task save_step replacing_rate max_sequence_length extra_pos_embeddings
    """.split()
)
"""Fields of any config for libraries, for initial values, for the dropout of heads, and about the training."""

TEXTS = frozenset(
    """
    id2label label2id num_labels _num_labels problem_type task_specific_params prefix
    bos_token_id eos_token_id eos_token_ids pad_token_id sep_token_id unk_token_id mask_token_id cls_token_id
    decoder_start_token_id forced_bos_token_id forced_eos_token_id force_bos_token_to_be_generated
    max_length min_length max_new_tokens min_new_tokens do_sample early_stopping num_beams num_beam_groups
    diversity_penalty temperature top_k top_p typical_p repetition_penalty length_penalty no_repeat_ngram_size
    encoder_no_repeat_ngram_size bad_words_ids num_return_sequences output_scores return_dict_in_generate
    remove_invalid_values renormalize_logits exponential_decay_length_penalty suppress_tokens begin_suppress_tokens
    """.split()
)
"""Fields of any config for labels, for tokens and for decoding. `save_pretrained` copies them from another config."""

WITHOUT_EFFECT = LIBRARY | TEXTS
"""Fields of any config that do not change what a model computes."""


_LARGEST, _MOST_LAYERS = 2**31 - 1, 256


class Fields:
    """The fields of a `config.json`. Remembers which were read.

    Args:
        values: the fields.
        defaults: values of missing fields.

    >>> fields = Fields({"d_model": 8, "rotary": True}, {"dropout": 0.1})
    >>> fields.size("d_model"), fields.rate("dropout")
    (8, 0.1)
    >>> fields.finish()
    Traceback (most recent call last):
    NotImplementedError: rotary (True) is unknown
    """

    def __init__(self, values: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
        self._values, self._defaults, self._read = values, defaults, set[str]()

    def __getitem__(self, name: str) -> Any:
        """Returns a field of any type.

        Raises:
            ValueError: the field is missing and has no default, or is an integer of more than 64 bits.
        """
        self._read.add(name)
        if name in self._values:
            value = self._values[name]
            if isinstance(value, int) and abs(value) >= 2**63:
                raise ValueError(f"{name} must have at most 64 bits, got {shown(value)}")
            return value
        if name not in self._defaults:
            raise ValueError(f"the config must have the field {name}")
        return self._defaults[name]

    def size(self, name: str, smallest: int = 1) -> int:
        """Returns an integer of at least `smallest`, and at most 256 if it counts layers."""
        value = self[name]
        check_integer(name, value, smallest)
        # Without a limit, a damaged config would fill the memory with the shapes of its layers.
        if value > (most := _MOST_LAYERS if "layer" in name else _LARGEST):
            check_integer(name, value, smallest, most)
        return int(value)

    def number(self, name: str, *, above: float = -math.inf) -> float:
        """Returns a finite number above a limit."""
        value = self[name]
        check_number(name, value, above=above)
        return float(value)

    def rate(self, name: str) -> float:
        """Returns a dropout rate, in [0, 1)."""
        value = self[name]
        check_rate(value, name)
        return float(value)

    def flag(self, name: str) -> bool:
        """Returns True or False."""
        value = self[name]
        if not isinstance(value, bool):
            raise ValueError(f"{name} must be true or false, got {shown(value)}")
        return value

    def choice(self, name: str, choices: Mapping[str, Value]) -> Value:
        """Returns what a name stands for.

        Raises:
            NotImplementedError: the name is none of the choices.
        """
        value = self[name]
        if not isinstance(value, str) or value not in choices:
            raise NotImplementedError(f"{name} must be one of {', '.join(choices)}, got {shown(value)}")
        return choices[value]

    def require(self, **values: Any) -> None:
        """Checks that fields have the only values that we serve.

        Raises:
            NotImplementedError: a field has another value; names it.
        """
        for name, wanted in values.items():
            if self[name] != wanted:
                raise NotImplementedError(f"{name} must be {wanted}, got {shown(self[name])}")

    def ignore(self, *names: str) -> None:
        """Marks fields that change nothing in what we compute."""
        self._read.update(names)

    def alias(self, **names: str) -> None:
        """Checks that second names of fields, which may be missing, have the values of the first: `second="first"`.

        Raises:
            ValueError: both differ; names them.
        """
        for second, first in names.items():
            self._read.add(second)
            if self._values.get(second) not in (None, self[first]):
                raise ValueError(f"{second} ({shown(self[second])}) must be {first} ({shown(self[first])})")

    def finish(self) -> None:
        """Checks that every field was read, is known to have no effect, or is empty (null, false, 0, or no items).

        Raises:
            NotImplementedError: a field is unknown; names the first one and its value.
        """
        for name in sorted(self._values.keys() - self._read - WITHOUT_EFFECT):
            value = self._values[name]
            if value not in (None, False, "", [], {}, ()):
                raise NotImplementedError(f"{name} ({shown(value)}) is unknown")
