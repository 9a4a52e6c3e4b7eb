"""How often instructions run, in programs compiled for the simulated devices and in the words of other compilers."""

import jax
import jax.numpy as jnp
import pytest

from benchmarks.compile.hlo import Module, shapes

LOOP = """
%body.1 (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %p = (s32[]{:T(128)}, f32[8]{0:T(256)}) parameter(0)
  %n = s32[]{:T(128)} get-tuple-element(%p), index=0
  %one = s32[] constant(1)
  %next = s32[] add(%n, %one)
  %x = f32[8]{0} get-tuple-element(%p), index=1
  ROOT %out = (s32[], f32[8]{0}) tuple(%next, %x)
}

%cond.1 (q: (s32[], f32[8])) -> pred[] {
  %q = (s32[], f32[8]{0}) parameter(0)
  %i = s32[] get-tuple-element(%q), index=0
  %limit = s32[] constant(11)
  ROOT %less = pred[] compare(%i, %limit), direction=LT
}

ENTRY %main (x.1: f32[8]) -> f32[8] {
  %x.1 = f32[8]{0} parameter(0)
  %first = s32[] constant(4)
  %copied = s32[] copy(%first)
  %given = (s32[], /*index=1*/f32[8]{0}) tuple(%copied, %x.1)
  %loop = (s32[], f32[8]{0}) while(%given), condition=%cond.1, body=%body.1
  ROOT %y = f32[8]{0} get-tuple-element(%loop), index=1
}
"""


def times(text, opcode):
    return [(times.known, times.exact) for each, _, times in Module(text).instructions() if each.opcode == opcode]


def test_a_condition_tells_how_often_a_loop_runs():
    assert times(LOOP, "add") == [(7, True)]  # from 4 to below 11


@pytest.mark.parametrize("change", [("constant(4)", "parameter(1)"), ("direction=LT", "direction=NE")])
def test_a_loop_that_nobody_can_count_runs_once(change):
    assert times(LOOP.replace(*change), "add") == [(1, False)]


def test_what_the_compiler_states_comes_first():
    stated = LOOP.replace("body=%body.1", 'body=%body.1, backend_config={"known_trip_count":{"n":"5"},"x":"1"}')
    assert times(stated, "add") == [(5, True)]


def test_loops_in_loops_multiply():
    def inner(_, x):
        return jax.lax.fori_loop(0, 5, lambda _, y: jnp.sin(y @ y), x)

    compiled = jax.jit(lambda x: jax.lax.fori_loop(0, 3, inner, x)).lower(jnp.ones((7, 7))).compile()
    sines = times(compiled.as_text(), "sine")
    assert sines
    assert all(found == (15, True) for found in sines)


def test_sizes_of_arrays():
    found = shapes("(bf16[2,3,5]{2,1,0:T(8,128)(2,1)}, pred[7]{0}, s4[11]{0}, token[], f8e4m3fn[13])")
    assert [x.bytes for x in found] == [60, 7, 5.5, 0, 13]
