"""What each logits processor means: loops over the tokens of one row, in NumPy float64."""

import functools

import numpy as np

from seqattn.decoding import (
    Banned,
    ForcedPrefix,
    LogitsProcessor,
    MinLength,
    MinLogProbability,
    MinP,
    NoRepeatNgram,
    PrefixCost,
    RepetitionPenalty,
    Temperature,
    TopK,
    TopP,
)


@functools.singledispatch
def expected(processor: LogitsProcessor, logits: np.ndarray, said: list[int], row: int) -> np.ndarray:
    """The logits `[V]` after `processor`, of one hypothesis; `said` holds the first token and what followed."""
    raise NotImplementedError(type(processor).__name__)


def probabilities(logits: np.ndarray) -> np.ndarray:
    weights = np.exp(logits - logits.max())
    return weights / weights.sum()


def _keep(logits: np.ndarray, tokens) -> np.ndarray:
    return np.array([x if token in tokens else -np.inf for token, x in enumerate(logits)])


def _number(value, row: int) -> float:
    return float(value if np.ndim(value) == 0 else value[row])


def _best_first(logits: np.ndarray) -> list[int]:
    return sorted(range(len(logits)), key=lambda token: (-logits[token], token))


@expected.register
def _repetition(processor: RepetitionPenalty, logits, said, row):
    penalty = _number(processor.penalty, row)
    penalised = [x / penalty if x > 0 else x * penalty for x in logits]
    return np.array([penalised[token] if token in said else x for token, x in enumerate(logits)])


@expected.register
def _ngram(processor: NoRepeatNgram, logits, said, row):
    size = processor.size
    spoken = {tuple(said[start : start + size]) for start in range(len(said) - size + 1)}
    context = said[len(said) - size + 1 :]
    return _keep(logits, [token for token in range(len(logits)) if (*context, token) not in spoken])


@expected.register
def _min_length(processor: MinLength, logits, said, row):
    ended_here = len(said)  # one is the first token, and the end token would be one more
    allowed = ended_here >= _number(processor.length, row)
    return _keep(logits, [token for token in range(len(logits)) if allowed or token != processor.end_token])


@expected.register
def _prefix(processor: ForcedPrefix, logits, said, row):
    step = len(said) - 1
    if step >= processor.length[row]:
        return logits
    forced = processor.tokens[row, step]
    free = processor.cost is PrefixCost.NOTHING
    return _keep(np.where(np.isfinite(logits), 0.0, logits) if free else logits, [forced])


@expected.register
def _banned(processor: Banned, logits, said, row):
    return _keep(logits, set(range(len(logits))) - set(processor.tokens))


@expected.register
def _temperature(processor: Temperature, logits, said, row):
    value = _number(processor.value, row)
    if value == 0:
        return _keep(logits - logits.max(), _best_first(logits)[:1])
    return (logits - logits.max()) / value


@expected.register
def _top_k(processor: TopK, logits, said, row):
    return _keep(logits, _best_first(logits)[: processor.count])


@expected.register
def _top_p(processor: TopP, logits, said, row):
    wanted, kept, total = _number(processor.probability, row), [], 0.0
    for token in _best_first(logits):
        if kept and total >= wanted and wanted < 1:
            break
        kept.append(token)
        total += probabilities(logits)[token]
    return _keep(logits, kept)


@expected.register
def _min_log_probability(processor: MinLogProbability, logits, said, row):
    with np.errstate(divide="ignore"):
        kept = np.flatnonzero(np.log(probabilities(logits)) >= _number(processor.floor, row))
    return _keep(logits, [*kept, _best_first(logits)[0]])


@expected.register
def _min_p(processor: MinP, logits, said, row):
    chance = probabilities(logits)
    return _keep(logits, np.flatnonzero(chance >= _number(processor.probability, row) * chance.max()))
