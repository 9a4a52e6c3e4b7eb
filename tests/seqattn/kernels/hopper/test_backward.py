"""The kernels of the backward pass with their warpgroups, copies and barriers, as Pallas's interpreter runs them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqattn.kernels.call import Call
from seqattn.kernels.hopper import backward_plan, backward_protocol
from seqattn.kernels.hopper import plan as plans
from seqattn.kernels.hopper.backward_plan import Pass, lengths
from seqattn.kernels.hopper.inputs import Rows, of_backward, of_pass
from seqattn.kernels.hopper.plan import Tiling, prepare
from seqattn.kernels.hopper.protocol import Action, Index, Row, When
from seqattn.masks import Causal, SameSegment
from seqattn.score_mods import SoftCap
from tests import hopper_plain
from tests.contract import Shape, arrays, close, cotangents

pytest.importorskip("absl", reason="Pallas Mosaic GPU needs absl-py")
from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams

from seqattn.kernels.hopper import backward

# The interpreter runs the three warpgroups at the same time in threads of XLA. With too few, it waits for ever.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(jax.device_count() < 4, reason="the interpreter needs a thread for each warpgroup"),
]

SHAPE = Shape(batch=(1,), T=29, S=37, N=2, K=1, H=64, V=64)
OF_QUERIES, OF_BOTH = Pass("query", ("query",), 8, 8, 2), Pass("key", ("key", "value"), 8, 8, 2)
OF_KEYS, OF_VALUES = (dataclasses.replace(OF_BOTH, results=(name,)) for name in OF_BOTH.results)


def prepared(monkeypatch, each, shape=SHAPE, **options):
    """A plan with one kernel and its arrays, from results of the forward pass that are made up."""
    # Tiles so small that each slot of the ring is used several times. The interpreter multiplies any.
    monkeypatch.setattr(plans, "TILINGS", {64: Tiling(8, 8, 2)})
    monkeypatch.setattr(backward_plan, "PASSES", {64: (each,)})
    given = {"mask": None, "bias": None, "score_mod": None, "q_at": None, "kv_at": None, "scale": None, "dropout": None}
    x = {name: jnp.asarray(each) for name, each in arrays(shape, "bfloat16").items()}
    plan, operands = prepare(Call.of(**x, **(given | options)), interpret=InterpretGPUParams(detect_races=True))
    d_output, delta = (jnp.asarray(x) for x in cotangents(shape, "bfloat16"))
    by_head = delta.swapaxes(1, 2)
    rows = Rows(d_output, 1 + 0 * by_head, 2 + by_head, by_head)
    return plan, of_pass(*of_backward(plan, operands, rows, lengths((each,), shape.T, shape.S)), 0, each)


def interpreted(plan, each, given, table=None):
    """The results of a kernel, and whether the interpreter found a race."""
    return hopper_plain.interpreted(lambda: backward.compute(plan, each, given, table))


@pytest.mark.parametrize("each", [OF_QUERIES, OF_BOTH, OF_KEYS, OF_VALUES], ids=["queries", "both", "keys", "values"])
def test_the_interpreted_kernel_computes_what_its_arithmetic_does(each, monkeypatch):
    options = {"mask": Causal() & SameSegment(), "score_mod": SoftCap(3.0), **hopper_plain.packed(SHAPE.T)}
    plan, given = prepared(monkeypatch, each, **options)
    counts = given[0].walk.counts[0]
    assert counts.sum(axis=1).min() == 0 < counts.sum(axis=1).max()
    results, races = interpreted(plan, each, given)
    assert not races
    expected = hopper_plain.compute_gradients(plan, each, given)
    assert results.keys() == expected.keys()
    for name, x in results.items():
        assert np.abs(np.asarray(expected[name], np.float32)).max() > 0
        close(x, expected[name], "bfloat16", name)


def test_the_interpreter_finds_a_race_where_the_next_queries_are_not_awaited(monkeypatch):
    # Two tiles for two slots: the interpreter would wait for ever where a barrier ends a phase that nobody awaits.
    plan, given = prepared(monkeypatch, OF_BOTH, dataclasses.replace(SHAPE, T=16, S=13, N=1))
    table = backward_protocol.backward(2, "key", OF_BOTH.results)
    wait = Row(Action.WAIT, "query_ready", Index.NEXT, When.MORE)
    step = tuple(row for row in table.consumer.step if row != wait)
    assert len(step) == len(table.consumer.step) - 1
    early = dataclasses.replace(table, consumer=dataclasses.replace(table.consumer, step=step))
    assert interpreted(plan, OF_BOTH, given, early)[1]
