"""The peak of a process alone."""

import pytest

from benchmarks.attention import memory
from benchmarks.attention.case import AttentionCase
from benchmarks.attention.shapes import named
from benchmarks.bench import machine

CASE = AttentionCase(named("b1-t64-n2-d8")[0], "causal", "bwd", "float32")


def test_a_case_survives_the_command_line():
    words = [CASE.shape.name, CASE.pattern, CASE.direction, CASE.dtype, "jax.nn:xla"]
    assert memory.parse(words) == (CASE, "jax.nn:xla")


@pytest.mark.parametrize(
    "words",
    [[], ["b1-t64-n2-d8", "causal", "up", "float32", "seqattn"], ["b1-t64-n2-d8", "causal", "fwd", "float32", "me"]],
)
def test_other_words_are_refused(words):
    with pytest.raises(ValueError, match=r"usage|no such case|no implementation"):
        memory.parse(words)


@pytest.mark.slow
def test_the_peak_is_not_that_of_this_process():
    ballast = bytearray(1 << 30)
    ballast[:: 1 << 12] = b"x" * len(ballast[:: 1 << 12])  # touched, so that it is held
    found = memory.peak(CASE, "jax.nn:xla")
    assert machine.peak_bytes() > 1 << 30
    assert 1 << 26 < found.process_idle_bytes <= found.process_peak_bytes < 1 << 30


@pytest.mark.slow
def test_a_failure_is_told():
    with pytest.raises(RuntimeError, match="cuDNN"):
        memory.peak(CASE, "jax.nn:cudnn")
