"""The reports of ptxas, as it prints them for two kernels of one program."""

import os
import subprocess

import pytest

from benchmarks.compile.kernels import Kernel, kernels, read, variables
from benchmarks.compile.targets import ROOT, TARGETS

REPORT = """ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'first' for 'sm_90a'
ptxas info    : Function properties for first
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 68 registers, used 2 barriers, 1 bytes smem
ptxas info    : Compiling entry function 'second' for 'sm_90a'
ptxas info    : Function properties for second
    496 bytes stack frame, 492 bytes spill stores, 680 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers
"""


def test_each_kernel_has_its_own_figures():
    assert read(REPORT) == [Kernel("first", 68, 0, 1), Kernel("second", 255, 492 + 680, 0)]


def test_reports_are_read_in_the_order_of_compilation(tmp_path):
    for second, (name, text) in enumerate({"z_0": REPORT, "a_1": REPORT.replace("first", "third")}.items()):
        (tmp_path / f"{name}.ptxas").write_text(text)
        os.utime(tmp_path / f"{name}.ptxas", (second, second))
    (tmp_path / "a_1.mlir-passes.log").write_text("gpu.launch dynamic_shared_memory_size %c32776_i32 {")
    found = kernels(tmp_path)
    assert [(each.name, each.shared_bytes) for each in found] == [
        ("first", 1),
        ("second", 0),
        ("third", 32777),
        ("second", 32776),
    ]


def test_without_reports_there_are_no_kernels(tmp_path):
    assert kernels(tmp_path) == []


DOUBLE = """
import jax, jax.numpy as jnp, numpy as np
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from benchmarks.compile.targets import TARGETS

def double(x, out, shared, barrier):
    plgpu.copy_gmem_to_smem(x, shared, barrier)
    plgpu.barrier_wait(barrier)
    shared[...] = shared[...] * 2
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(shared, out)
    plgpu.wait_smem_to_gmem(0)

array = jax.ShapeDtypeStruct((128, 64), jnp.float32)
shared = plgpu.SMEM(array.shape, array.dtype)
grid = {"grid": (1,), "grid_names": ("i",)}
kernel = plgpu.kernel(double, out_type=array, scratch_types=[shared, plgpu.Barrier()], **grid)
here = NamedSharding(Mesh(np.array(TARGETS["h200-1"].devices()), ("x",)), PartitionSpec())
jax.jit(kernel).trace(jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=here)).lower().compile()
"""


@pytest.mark.aot
def test_a_kernel_that_is_compiled_here_has_a_report(tmp_path):
    target = TARGETS["h200-1"]
    if reason := target.missing():
        pytest.skip(reason)
    python, env = target.environment / "bin" / "python", {**target.variables(), **variables(tmp_path)}
    subprocess.run([python, "-c", DOUBLE], check=True, cwd=ROOT, env=env, capture_output=True, timeout=300)
    (found,) = kernels(tmp_path)
    assert found.name.startswith("double")
    assert 0 < found.registers <= 255
    assert found.spill_bytes == 0
    # The copy of the array, and the barrier.
    assert 128 * 64 * 4 < found.shared_bytes < 128 * 64 * 4 + 1024
