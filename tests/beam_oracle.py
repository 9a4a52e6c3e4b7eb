"""Beam search in NumPy float64 over a model of tables: every sequence there is, and a loop over sorted lists."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from seqattn.decoding.beam import Beams, beam_search
from seqattn.decoding.penalties import GNMT, AverageLength, CoveragePenalty
from seqattn.decoding.stopping import Stopping
from seqattn.hypotheses import Shared

V, END, PAD, S = 5, 3, 1, 3
FIRST = jnp.array([0, 2, 4])


def table_step(tokens, state):
    """Logits and attention by the last two tokens; a row's tables are shared by its hypotheses."""
    logits, weights = state["tables"].value
    row = jnp.repeat(jnp.arange(len(logits)), len(tokens) // max(len(logits), 1))
    at = (row, state["before"], tokens)
    return logits[at], {"tables": state["tables"], "before": tokens, "weights": (weights[at], jnp.int32(7))}


def table_state(logits, weights=None):
    rows = len(logits)
    if weights is None:
        weights = np.ones((*logits.shape[:3], S), np.float32)
    before, last = jnp.zeros(rows, jnp.int32), (jnp.zeros((rows, weights.shape[-1]), jnp.float32), jnp.int32(7))
    return {"tables": Shared((jnp.asarray(logits), jnp.asarray(weights))), "before": before, "weights": last}


def random_tables(seed, rows=3, end=0.0, vocab=V):
    draw = np.random.default_rng(seed)
    logits = 2 * draw.normal(size=(rows, vocab, vocab, vocab)).astype(np.float32)
    logits[..., END % vocab] += end
    return logits, draw.uniform(size=(rows, vocab, vocab, S)).astype(np.float32)


@functools.partial(jax.jit, static_argnames=("beam_size", "max_length", "n_best", "stopping", "aligned", "end"))
def search(state, first, beam_size, max_length, n_best=1, aligned=False, end=END, **options) -> Beams:
    alignment = (lambda state: state["weights"][0]) if aligned else None
    sizes = {"beam_size": beam_size, "max_length": max_length, "n_best": n_best}
    return beam_search(table_step, state, first, **sizes, end_token=end, pad_token=PAD, alignment=alignment, **options)


def _penalised(penalty, total, length):
    """In float64, from the formulas."""
    if isinstance(penalty, AverageLength):
        return total / float(length) ** float(penalty.power)
    return total / ((5 + length) / 6) ** float(penalty.alpha) if isinstance(penalty, GNMT) else total


def covered(beta):
    return CoveragePenalty(beta, present=True)


def _coverage(beta, weights):
    return beta * np.log(np.minimum(np.sum(weights, axis=0), 1)).sum()


class TableModel:
    """One row of the tables, in float64."""

    def __init__(self, logits, weights, first):
        logits = np.asarray(logits, np.float64)
        top = logits.max(-1, keepdims=True)
        self.log_probabilities = logits - top - np.log(np.exp(logits - top).sum(-1, keepdims=True))
        self.weights, self.first = np.asarray(weights, np.float64), int(first)

    def at(self, tokens):
        before, last = ([0, self.first, *tokens])[-2:]
        return self.log_probabilities[before, last], self.weights[before, last]


def all_sequences(model, max_length, penalty, beta):
    """(score, tokens) of every sequence that ends, or is cut, best first."""
    found = []

    def go_on(tokens, total, weights):
        gains, attended = model.at(tokens)
        for token, gain in enumerate(gains):
            longer = (*tokens, token), total + gain, [*weights, attended]
            if token == END or len(longer[0]) == max_length:
                score = _penalised(penalty, longer[1], len(longer[0])) + _coverage(beta, longer[2])
                found.append((score, longer[0]))
            else:
                go_on(*longer)

    go_on((), 0.0, [])
    return sorted(found, reverse=True)


def plain_beam(model, beam_size, max_length, penalty, stopping, beta=0.0):
    """(score, tokens) of what ended, best first, by a list that is sorted in each step."""
    running, ended = [((), 0.0, [])], []
    for length in range(1, max_length + 1):
        longer = []
        for tokens, total, weights in running:
            gains, attended = model.at(tokens)
            longer += [((*tokens, t), total + g, [*weights, attended]) for t, g in enumerate(gains) if g > -np.inf]
        longer = sorted(longer, key=lambda h: -h[1])[: 2 * beam_size]
        is_last = length == max_length
        for tokens, total, weights in longer[:beam_size]:
            if tokens[-1] == END or is_last:
                ended.append((_penalised(penalty, total, length) + _coverage(beta, weights), tokens))
        ended = sorted(ended, key=lambda e: -e[0])[:beam_size]
        running = [h for h in longer if h[0][-1] != END][:beam_size]
        if len(ended) == beam_size and running and not is_last:
            present = max(_penalised(penalty, h[1], length) + _coverage(beta, h[2]) for h in running)
            best = max(_penalised(penalty, running[0][1], n) for n in range(length + 1, max_length + 1))
            bar = {Stopping.FIRST: -np.inf, Stopping.LIKELY: present, Stopping.EXACT: best}[stopping]
            if bar <= ended[-1][0]:
                break
    return ended


def agree(found: Beams, row, expected, message=""):
    """Every sequence of a row of the result, and nothing behind what there is."""
    for place in range(found.tokens.shape[1]):
        score, tokens = expected[place] if place < len(expected) else (-np.inf, ())
        padded = [*tokens, *[PAD] * (found.tokens.shape[2] - len(tokens))]
        assert found.tokens[row, place].tolist() == padded, f"row {row} place {place} {message}"
        assert found.length[row, place] == len(tokens)
        assert found.ended[row, place] == (END in tokens)
        np.testing.assert_allclose(found.score[row, place], score, rtol=2e-5, atol=1e-5)
    assert found.failed[row] == (not expected)
