"""The rules of all parameters, collected from the files of their modules. Special rules come first."""

from collections.abc import Sequence
from fnmatch import fnmatchcase

from seqattn.models import attention_encoder, encoder, position_encodings, seq2seq
from seqattn.nn import (
    compressed,
    convolution,
    embedding,
    feed_forward,
    linear,
    local_window,
    mixture,
    multi_head_attention,
    normalization,
    recurrent,
    scored_attention,
)
from seqattn.nn.parameter_rule import ParameterRule

_FILES = (
    *(mixture, convolution, compressed, local_window, scored_attention),
    *(multi_head_attention, feed_forward, recurrent, position_encodings),
    *(embedding, encoder, seq2seq, attention_encoder, normalization, linear),
)
PARAMETER_RULES: tuple[ParameterRule, ...] = tuple(rule for file in _FILES for rule in file.RULES)
"""All rules. The first one whose pattern matches a path applies."""


def rule_of(path: str, rules: Sequence[ParameterRule] = PARAMETER_RULES) -> ParameterRule | None:
    """Returns the rule for the parameter at a path. None if no model of this library has such a parameter.

    >>> tuple(rule_of("encoder/0/feed_forward/hidden/kernel").split)
    ('fsdp', 'tensor')
    """
    return next((rule for rule in rules if fnmatchcase(path, rule.glob)), None)
