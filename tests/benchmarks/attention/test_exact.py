"""The float64 answer in tiles, against the oracle that goes row by row."""

import numpy as np
import pytest

from benchmarks.attention import exact, patterns
from benchmarks.attention.case import AttentionCase
from benchmarks.attention.shapes import named
from tests import oracle

(SHAPE,) = named("b2-t37-n6-k3-d5")


def by_rows(case: AttentionCase) -> list[np.ndarray]:
    """Output and gradients of a case by tests/oracle.py."""
    query, key, value, d_output = case.inputs()
    bias = patterns.dense_bias(case.pattern, case.shape).astype(np.float64)
    if case.pattern == "alibi":  # the slopes are exact only before they are rounded to float32
        back = np.arange(case.shape.length)[:, None] - np.arange(case.shape.size)
        slopes = patterns.slopes(case.pattern, case.shape)[:, None, None]
        bias = np.where(np.isfinite(bias), -slopes * back, bias)
    visible = patterns.dense_mask(case.pattern, case.shape)
    options = {"visible": visible, "bias": bias, "cap": patterns.cap(case.pattern) or np.inf}
    output = oracle.attention(query, key, value, **options).output
    d_lse = np.zeros(output.shape[:-1])
    gradients = oracle.attention_gradients(query, key, value, d_output, d_lse, **options)
    return [output, gradients["query"], gradients["key"], gradients["value"]]


@pytest.mark.parametrize("pattern", patterns.PATTERNS)
def test_the_answer_is_the_oracles(pattern, monkeypatch):
    monkeypatch.setattr(exact, "_TILE", 1)  # tiles of 16 queries
    case = AttentionCase(SHAPE, pattern, "bwd", "float32")
    answer = exact.solve(case, tolerance=1e-12)
    assert len(answer.answers) == SHAPE.batch * SHAPE.kv_heads
    error = answer.error(by_rows(case))
    assert error.right, error


def test_fewer_keys_than_queries():
    case = AttentionCase(named("b1-t23-s7-n2-d3")[0], "full", "bwd", "float32")
    assert exact.solve(case, tolerance=1e-12).error(by_rows(case)).right


def test_a_large_case_is_checked_in_part(monkeypatch):
    case = AttentionCase(SHAPE, "causal", "bwd", "float32")
    monkeypatch.setattr(exact, "_PAIRS", 1)
    answer = exact.solve(case)
    assert len(answer.answers) == 1
    assert answer.error(by_rows(case)).right


@pytest.mark.parametrize("place", range(4))
@pytest.mark.parametrize("wrong", [1e-3, np.nan, np.inf])
def test_one_wrong_number_is_seen(place, wrong):
    case = AttentionCase(SHAPE, "causal", "bwd", "float32")
    results, answer = by_rows(case), exact.solve(case)
    assert answer.error(results).right
    results[place] = results[place].copy()
    results[place][1, 36, 2, 4] += wrong
    error = answer.error(results)
    assert not error.right
    np.testing.assert_allclose(error.largest, wrong, rtol=1e-9)


def test_one_number_is_seen_that_is_lost_in_the_mean():
    case = AttentionCase(SHAPE, "causal", "bwd", "float32")
    answer = exact.solve(case)
    output = by_rows(case)[0]
    output[1, 36, 2, 4] += 1.5e-4
    error = answer.error([output])
    assert error.relative < answer.tolerance
    assert not error.right


@pytest.mark.parametrize("dtype", exact.TOLERANCES)
def test_a_window_that_is_one_key_too_wide_is_wrong_in_every_dtype(dtype):
    (shape,) = named("b1-t600-n2-d16")
    wide = np.subtract.outer(np.arange(600), np.arange(600))
    visible = (wide >= 0) & (wide <= patterns.WINDOW)
    case = AttentionCase(shape, "window", "fwd", dtype)
    answer = exact.solve(case)
    right = (wide >= 0) & (wide < patterns.WINDOW)
    assert answer.error([oracle.attention(*case.inputs(), visible=right).output]).right
    assert not answer.error([oracle.attention(*case.inputs(), visible=visible).output]).right
