"""Bytes of programs in the words of the compilers for CPUs and TPUs."""

import jax
import jax.numpy as jnp

from benchmarks.compile.moved import Moved, moved

LOOP = """
%sliced (p0: f32[7,64], p1: s32[]) -> f32[64] {
  %p0 = f32[7,64]{1,0} parameter(0)
  %p1 = s32[] parameter(1)
  %zero = s32[] constant(0)
  %s = f32[1,64]{1,0} dynamic-slice(%p0, %p1, %zero), dynamic_slice_sizes={1,64}
  ROOT %b = f32[64]{0} bitcast(%s)
}

%outer (q0: f32[7,64], q1: s32[]) -> f32[64] {
  %q0 = f32[7,64]{1,0} parameter(0)
  %q1 = s32[] parameter(1)
  %inner = f32[64]{0} fusion(%q0, %q1), kind=kLoop, calls=%sliced
  ROOT %e = f32[64]{0} exponential(%inner)
}

%body (t: (s32[], f32[7,64])) -> (s32[], f32[7,64]) {
  %t = (s32[], f32[7,64]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%t), index=0
  %x = f32[7,64]{1,0} get-tuple-element(%t), index=1
  %row = f32[64]{0%(space)s} fusion(%x, %i), kind=kLoop, calls=%outer
  ROOT %again = (s32[], f32[7,64]{1,0}) tuple(%i, %x)
}

%condition (u: (s32[], f32[7,64])) -> pred[] {
  ROOT %u = (s32[], f32[7,64]{1,0}) parameter(0)
}

ENTRY %main (v: (s32[], f32[7,64])) -> (s32[], f32[7,64]) {
  %v = (s32[], f32[7,64]{1,0}) parameter(0)
  ROOT %w = (s32[], f32[7,64]{1,0}) while(%v), condition=%condition, body=%body, "known_trip_count":{"n":"7"}
}
"""


def loop(space=""):
    return LOOP.replace("%(space)s", space)


def test_a_loop_reads_one_row_in_each_iteration():
    # The index, the row that a fusion within a fusion slices, and the row that it writes.
    assert moved(loop()) == Moved(7 * (4 + 256 + 256), 7 * (4 + 256 + 256))


def test_arrays_in_the_memory_for_vectors_are_not_in_the_main_memory():
    assert moved(loop(":T(8,128)S(1)")) == Moved(7 * (4 + 256), 7 * (4 + 256 + 256))
    # Other spaces are not that memory.
    assert moved(loop(":T(8,128)S(5)")) == moved(loop())


def test_an_update_in_place_writes_the_update():
    x, row = jnp.zeros((64, 640)), jnp.ones((1, 640))

    def updated(x, row, i):
        return jax.lax.dynamic_update_slice(x, jnp.sin(row), (i, 0))

    text = jax.jit(updated, donate_argnums=0).lower(x, row, 3).compile().as_text()
    # Far less than the array, of 164 kB: the row twice, and some indices.
    assert 2 * 2560 <= moved(text).main < 2 * 2560 + 100


def test_what_several_instructions_read_counts_for_each():
    x = jnp.ones((64, 96))
    once = moved(jax.jit(lambda x: x @ x.T).lower(x).compile().as_text())
    twice = moved(jax.jit(lambda x: (x @ x.T) @ (x @ x.T).T).lower(x).compile().as_text())
    assert once.all < twice.all


CALL = """
ENTRY %main (x: bf16[8,128]) -> bf16[8,128] {
  %x = bf16[8,128]{1,0} parameter(0)
  ROOT %y = bf16[8,128]{1,0} custom-call(%x), custom_call_target="NAME", metadata={op_name="call"}
}
"""


def test_a_kernel_moves_its_operands_at_least_once():
    for name in ("tpu_custom_call", "mosaic_gpu_v2"):
        assert moved(CALL.replace("NAME", name)) == Moved(4096, 4096, exact=False)
    assert moved(CALL.replace("NAME", "__cublas$gemm")) == Moved(4096, 4096)
    # What `pipelines` counts is not counted twice.
    assert moved(CALL.replace("NAME", "tpu_custom_call"), kernels=False) == Moved()
    assert moved(CALL.replace("NAME", "mosaic_gpu_v2"), kernels=False) == Moved(4096, 4096, exact=False)
