"""What the FlashAttention packages are asked for. They need a GPU, so functions of NumPy stand in for them.

A stand-in attends as the parameters of the packages say. What it gets is right if its results are those of the case.
"""

import dataclasses
import itertools
import sys
import types

import numpy as np
import pytest

from benchmarks.attention import exact, flash_calls, patterns
from benchmarks.attention.case import AttentionCase
from benchmarks.attention.shapes import named
from tests import oracle

(SHAPE,) = named("b2-t37-n4-k2-d8")
REFUSED = {("flash-2", "prefix"), ("flash-3", "prefix"), ("flash-3", "alibi")}


class Tensor(np.ndarray):
    """An array with the two methods of a tensor that are used."""

    def flatten(self, first, last):
        return self.reshape(-1, *self.shape[last + 1 :]).view(Tensor)

    def unflatten(self, axis, sizes):
        return self.reshape(*sizes, *self.shape[1:]).view(Tensor)


def attends(query, key, value, *, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None):
    """What `flash_attn_func` documents, for as many queries as keys."""
    back = np.subtract.outer(np.arange(query.shape[1]), np.arange(key.shape[1]))
    visible = np.ones(back.shape, bool)
    if causal:
        visible &= back >= 0
    if window_size[0] >= 0:
        visible &= back <= window_size[0]
    if window_size[1] >= 0:
        visible &= -back <= window_size[1]
    bias = 0.0 if alibi_slopes is None else -np.asarray(alibi_slopes, np.float64)[:, None, None] * np.abs(back)
    return oracle.attention(query, key, value, visible=visible, bias=bias, cap=softcap or np.inf).output.view(Tensor)


def attends_in_parts(query, key, value, *, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, **options):
    """What `flash_attn_varlen_func` documents."""
    assert cu_seqlens_q.tolist() == cu_seqlens_k.tolist()
    assert max_seqlen_q == max_seqlen_k == max(np.diff(cu_seqlens_q))
    parts = [slice(*pair) for pair in itertools.pairwise(cu_seqlens_q)]
    assert parts[0].start == 0
    assert parts[-1].stop == len(query)
    outputs = [attends(*(x[None, part] for x in (query, key, value)), **options)[0] for part in parts]
    return np.concatenate(outputs).view(Tensor)


@pytest.fixture
def packages(monkeypatch):
    monkeypatch.setattr(patterns, "WINDOW", 7)
    monkeypatch.setattr(flash_calls, "_on", lambda device, array: array)
    for package in flash_calls.PACKAGES.values():
        offered = types.SimpleNamespace(flash_attn_func=attends, flash_attn_varlen_func=attends_in_parts)
        monkeypatch.setitem(sys.modules, package.module, offered)


def case_of(pattern, dtype="float16"):
    return AttentionCase(SHAPE, pattern, "fwd", dtype)


@pytest.mark.parametrize("name", flash_calls.CALLS)
@pytest.mark.parametrize("pattern", patterns.PATTERNS)
def test_the_arguments_say_the_mask(packages, name, pattern):
    case = case_of(pattern)
    if (name, pattern) in REFUSED:
        with pytest.raises(NotImplementedError, match=flash_calls.PACKAGES[name].module):
            flash_calls.CALLS[name](case, "cuda")
        return
    attention, how = flash_calls.CALLS[name](case, "cuda")
    output = attention(*(x.astype(np.float64).view(Tensor) for x in case.inputs()))
    assert exact.solve(case, tolerance=1e-6).error([output]).right
    assert ("causal" in how) == (pattern != "full")


def test_an_output_beside_a_log_sum_exp_is_taken_alone(packages, monkeypatch):
    pair = types.SimpleNamespace(flash_attn_func=lambda *arrays, **options: (attends(*arrays, **options), "lse"))
    monkeypatch.setitem(sys.modules, "flash_attn_interface", pair)
    attention, _ = flash_calls.CALLS["flash-3"](case_of("full"), "cuda")
    inputs = [x.astype(np.float64).view(Tensor) for x in case_of("full").inputs()]
    assert attention(*inputs).shape == SHAPE.query


@pytest.mark.parametrize(
    ("device", "dtype", "reason"),
    [("cpu", "float16", "runs on NVIDIA GPUs only"), ("cuda", "float32", "takes bfloat16 and float16, not float32")],
)
def test_what_the_packages_do_not_serve_is_refused(packages, device, dtype, reason):
    case = dataclasses.replace(case_of("causal"), dtype=dtype)
    for name, package in flash_calls.PACKAGES.items():
        with pytest.raises(NotImplementedError, match=f"{package.module} {reason}"):
            flash_calls.CALLS[name](case, device)
