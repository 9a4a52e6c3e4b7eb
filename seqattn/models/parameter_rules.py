"""The rules of all parameters: those that the files of their modules state, the special ones first."""

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
"""The first rule that matches a path decides."""


def rule_of(path: str, rules: Sequence[ParameterRule] = PARAMETER_RULES) -> ParameterRule | None:
    """The rule about the parameter of a path; None where no rule matches: it is of no model of this library.

    >>> tuple(rule_of("encoder/0/feed_forward/hidden/kernel").split)
    ('fsdp', 'tensor')
    """
    return next((rule for rule in rules if fnmatchcase(path, rule.glob)), None)
