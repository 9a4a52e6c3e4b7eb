"""The defaults of decoding in a folder of transformers: `generation_config.json`, or older fields of `config.json`."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from seqattn.checks import check_integer, check_number
from seqattn.decoding import AverageLength, Stopping
from seqattn.interop.codec import shown
from train.data.json_files import read_object
from train.inference.decoding import Decoding

log = logging.getLogger(__name__)

GENERATION = "generation_config.json"
_STOPPING: Mapping[Any, Stopping] = {True: Stopping.FIRST, False: Stopping.LIKELY, "never": Stopping.EXACT}
_ELSEWHERE = frozenset(
    """
    bos_token_id eos_token_id pad_token_id decoder_start_token_id forced_bos_token_id transformers_version
    return_dict_in_generate output_attentions output_hidden_states output_scores output_logits use_cache
    cache_implementation cache_config num_return_sequences _from_model_config remove_invalid_values
    renormalize_logits forced_eos_token_id
    """.split()
)
"""Fields that are read elsewhere, or change only how transformers runs, scores or cuts its outputs."""
_NEUTRAL: Mapping[str, Any] = {
    **{"diversity_penalty": 0.0, "typical_p": 1.0, "epsilon_cutoff": 0.0, "eta_cutoff": 0.0, "num_beam_groups": 1},
    **{"encoder_no_repeat_ngram_size": 0, "encoder_repetition_penalty": 1.0, "guidance_scale": 1.0},
    **{"num_beams": 1, "repetition_penalty": 1.0, "no_repeat_ngram_size": 0},
}
"""Values with which fields that we do not serve, or not for a language model, have no effect."""
_TOP_K = 50
"""What transformers draws from if a file says that it draws, and not from how many tokens."""
_LARGEST = 2**31 - 1
_OF_CONFIG = (
    *("num_beams", "length_penalty", "early_stopping", "max_length", "min_length", "no_repeat_ngram_size"),
    *("repetition_penalty", "bad_words_ids", "suppress_tokens", "do_sample", "temperature", "top_k", "top_p"),
)
"""The fields that older models have in `config.json`."""


def decoding_of(folder: Path, *, decoder_only: bool = False) -> Decoding:
    """Reads the defaults of decoding.

    A field that we do not serve is named in a warning.

    Args:
        folder: the folder.
        decoder_only: whether the model is a language model, in which the prompt counts towards lengths: they are then
            left out.

    Raises:
        ValueError: a field has a value out of its range. The message names the file.
    """
    path = folder / GENERATION
    if not path.is_file():
        path = folder / "config.json"
    fields = read_object(path)
    given = {name: value for name, value in fields.items() if value is not None}
    if path.name != GENERATION:
        given = {name: given[name] for name in _OF_CONFIG if name in given}
    try:
        return _read(given, path, decoder_only)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _read(given: dict[str, Any], path: Path, decoder_only: bool) -> Decoding:
    left = dict(given)
    # transformers has other defaults than this program where beam search is chosen.
    stopping = left.pop("early_stopping", False)
    if not isinstance(stopping, bool | str) or stopping not in _STOPPING:
        raise ValueError(f'early_stopping must be true, false or "never", got {shown(stopping)}')
    found: dict[str, Any] = {"length_penalty": AverageLength(_number(left, "length_penalty", 1.0))}
    found["stopping"] = _STOPPING[stopping]
    # It counts the start token; we do not.
    longest = _integer(left, "max_length", None, smallest=1 if decoder_only else 2)
    longest = _integer(left, "max_new_tokens", None if longest is None else longest - 1)
    shortest = _integer(left, "min_length", 0)
    more = _integer(left, "min_new_tokens", None)
    # A language model only goes on by sampling: what is left over is told.
    if not decoder_only:
        found |= {"max_length": longest, "min_length": max(shortest, 0 if more is None else more + 1)}
        found["beam_size"] = _integer(left, "num_beams", 1, smallest=1)
        repeated = _number(left, "repetition_penalty", 1.0, above=0.0)
        found["repetition_penalty"] = None if repeated == 1 else repeated
        found["no_repeat_ngram"] = _integer(left, "no_repeat_ngram_size", 0) or None
        found["banned"] = _banned(left)
    sampled = _sampling(left)
    if decoder_only:
        found |= sampled
    elif sampled:
        left["do_sample"] = True
    _warn(left, path)
    return Decoding(**found)


def _sampling(left: dict[str, Any]) -> dict[str, Any]:
    """How tokens are drawn; empty if none are, since the fields have no effect then."""
    fields: dict[str, Any] = {name: left.pop(name) for name in ("temperature", "top_k", "top_p") if name in left}
    drawn = left.pop("do_sample", False)
    if not isinstance(drawn, bool):
        raise ValueError(f"do_sample must be true or false, got {shown(drawn)}")
    if not drawn:
        return {}
    return {
        "temperature": _number(fields, "temperature", None, minimum=0.0),
        "top_p": _number(fields, "top_p", None, above=0.0, maximum=1.0),
        "top_k": _integer(fields, "top_k", _TOP_K) or None,
    }


def _warn(left: Mapping[str, Any], path: Path) -> None:
    """Names the fields that would change outputs and have no effect here."""
    for name, value in sorted(left.items()):
        if name in _ELSEWHERE or value in (False, "", [], {}) or _NEUTRAL.get(name) == value:
            continue
        log.warning("%s: %s (%s) has no effect here", path, name, value)


def _integer(left: dict[str, Any], name: str, default: int | None, smallest: int = 0) -> Any:
    value = left.pop(name, default)
    if value is not None:
        check_integer(name, value, smallest, _LARGEST)
    return value


def _number(left: dict[str, Any], name: str, default: float | None, **between: Any) -> Any:
    value = left.pop(name, default)
    if value is None:
        return None
    check_number(name, value, **between)
    return float(value)


def _banned(left: dict[str, Any]) -> tuple[int, ...]:
    """The tokens that are never generated."""
    words = left.get("bad_words_ids", [])
    tokens = left.pop("suppress_tokens", [])
    if not isinstance(words, list) or not all(isinstance(word, list) and word for word in words):
        raise ValueError(f"bad_words_ids must be a list of lists of ids, got {shown(words)}")
    # A word of several tokens stays among the fields that have no effect.
    left["bad_words_ids"] = [word for word in words if len(word) > 1]
    if not isinstance(tokens, list):
        raise ValueError(f"suppress_tokens must be a list of ids, got {shown(tokens)}")
    banned: list[Any] = [*tokens, *(word[0] for word in words if len(word) == 1)]
    if not all(type(token) is int and token >= 0 for token in banned):
        raise ValueError(f"suppress_tokens and bad_words_ids must be ids, got {banned}")
    return tuple(sorted(set(banned)))
