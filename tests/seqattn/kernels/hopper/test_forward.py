"""The kernel with its warpgroups, copies and barriers, as Pallas's interpreter runs it; slow, so only a few calls."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqattn.kernels.call import Call
from seqattn.kernels.hopper import plan as plans
from seqattn.kernels.hopper import protocol
from seqattn.kernels.hopper.inputs import of_forward
from seqattn.kernels.hopper.plan import Tiling, prepare
from seqattn.kernels.hopper.protocol import Action, Index, Row
from seqattn.masks import Causal, SameSegment
from seqattn.precision import lowest
from seqattn.score_mods import SoftCap
from tests import hopper_plain
from tests.contract import Shape, arrays, close

pytest.importorskip("absl", reason="Pallas Mosaic GPU needs absl-py")
from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams

from seqattn.kernels.hopper import forward

# The interpreter runs the three warpgroups at the same time in threads of XLA. With too few, it waits for ever.
pytestmark = pytest.mark.skipif(jax.device_count() < 4, reason="the interpreter needs a thread for each warpgroup")

SHAPE = Shape(batch=(1,), T=29, S=37, N=2, K=1, H=64, V=64)


@pytest.fixture(autouse=True)
def tiny_tiles(monkeypatch):
    """Tiles so small that each slot of the ring is used several times. The interpreter multiplies any."""
    monkeypatch.setattr(plans, "TILINGS", {64: Tiling(8, 8, 2)})


def prepared(shape=SHAPE, **options):
    given = {"mask": None, "bias": None, "score_mod": None, "q_at": None, "kv_at": None, "scale": None, "dropout": None}
    x = {name: jnp.asarray(each) for name, each in arrays(shape, "bfloat16").items()}
    return prepare(Call.of(**x, **(given | options)), interpret=InterpretGPUParams(detect_races=True))


def interpreted(plan, operands, table=None):
    """The results of the kernel, and whether the interpreter found a race."""
    return hopper_plain.interpreted(lambda: forward.compute(plan, of_forward(plan, operands), table))


@pytest.mark.slow
@pytest.mark.parametrize("score_mod", [None, SoftCap(3.0)], ids=["plain", "soft cap"])
def test_the_interpreted_kernel_computes_what_its_arithmetic_does(score_mod):
    plan, operands = prepared(mask=Causal() & SameSegment(), score_mod=score_mod, **hopper_plain.packed(SHAPE.T))
    assert operands.walk.counts[0, 0].sum() == 0 < operands.walk.counts[0, 1].sum()
    results, races = interpreted(plan, operands)
    assert not races
    for actual, expected in zip(results, hopper_plain.compute(plan, of_forward(plan, operands)), strict=True):
        close(actual, expected, "bfloat16")
    assert (np.asarray(results[1]) == lowest(jnp.float32)).any()


def without(row):
    """The protocol without a row of the consumers."""
    table = protocol.forward(2)
    step = [each for each in table.consumer.step if each != row]
    assert len(step) == len(table.consumer.step) - 1
    return dataclasses.replace(table, consumer=dataclasses.replace(table.consumer, step=tuple(step)))


@pytest.mark.slow
def test_the_interpreter_finds_a_race_where_values_are_not_awaited():
    # Two tiles for two slots: the interpreter would wait for ever where a barrier ends a phase that nobody awaits.
    shape = dataclasses.replace(SHAPE, T=13, S=16)
    _, races = interpreted(*prepared(shape), without(Row(Action.WAIT, "value_ready", Index.SLOT)))
    assert races
