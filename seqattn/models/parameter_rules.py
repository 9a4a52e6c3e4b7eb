"""The rules of all parameters: those that the files of their modules state, the special ones first."""

from collections.abc import Sequence
from fnmatch import fnmatchcase

from seqattn.models import attention_encoder, encoder, positions, seq2seq
from seqattn.nn import (
    attention,
    compressed,
    convolution,
    embedding,
    feed_forward,
    linear,
    local,
    mixture,
    normalization,
    recurrent,
    scored_attention,
)
from seqattn.nn.parameter_rule import ParameterRule

_FILES = (
    *(mixture, convolution, compressed, local, scored_attention, attention, feed_forward, recurrent),
    *(positions, embedding, encoder, seq2seq, attention_encoder, normalization, linear),
)
PARAMETER_RULES: tuple[ParameterRule, ...] = tuple(rule for file in _FILES for rule in file.RULES)
"""The first rule that matches a path decides."""


def rule_of(path: str, rules: Sequence[ParameterRule] = PARAMETER_RULES) -> ParameterRule | None:
    """The rule about the parameter of a path; None where no rule matches: it is of no model of this library.

    >>> tuple(rule_of("encoder/0/feed_forward/hidden/kernel").split)
    ('fsdp', 'tensor')
    """
    return next((rule for rule in rules if fnmatchcase(path, rule.glob)), None)
