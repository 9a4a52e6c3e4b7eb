"""Bytes of programs in the words of the compilers for CPUs and TPUs."""

import jax
import jax.numpy as jnp
import pytest

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


ASYNCHRONOUS = """
%wrapped (p0: f32[64,32]) -> f32[8,32] {
  %p0 = f32[64,32]{1,0} parameter(0)
  ROOT %s = f32[8,32]{1,0} slice(%p0), slice={[0:8], [0:32]}
}

ENTRY %main (x: f32[64,32]) -> f32[8,32] {
  %x = f32[64,32]{1,0} parameter(0)
  %start = START
  ROOT %done = DONE
}
"""


@pytest.mark.parametrize(
    ("start", "done", "size"),
    [
        # A gather reads its operand and writes a result of eight times the size.
        (
            "(f32[64,32]{1,0}, f32[512,32]{1,0}) all-gather-start(%x), replica_groups=[1,8]<=[8], dimensions={0}",
            "f32[512,32]{1,0} all-gather-done(%start)",
            9 * 8192,
        ),
        (
            "(f32[64,32]{1,0:S(1)}, f32[64,32]{1,0}, u32[]{:S(2)}) copy-start(%x)",
            "f32[64,32]{1,0:S(1)} copy-done(%start)",
            2 * 8192,
        ),
        (
            "((f32[64,32]{1,0}), f32[8,32]{1,0}, u32[]{:S(2)}) async-start(%x), calls=%wrapped",
            "f32[8,32]{1,0} async-done(%start)",
            2 * 1024,
        ),
        (
            "(f32[64,32]{1,0}, f32[8,32]{1,0}, u32[]{:S(2)}) slice-start(%x), slice={[0:8], [0:32]}",
            "f32[8,32]{1,0} slice-done(%start)",
            2 * 1024,
        ),
    ],
    ids=["gather", "copy", "wrapped-slice", "slice"],
)
def test_an_asynchronous_instruction_moves_what_it_moves_at_once(start, done, size):
    assert moved(ASYNCHRONOUS.replace("START", start).replace("DONE", done)).all == size


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
