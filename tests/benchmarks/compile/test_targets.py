"""Programs compiled for TPU and GPU: `make test-aot`, or the short part of them, `make test-aot-short`.

Each target is compiled in a process of its own. Nothing runs, so nothing is said of results and speed.
"""

import pytest

from benchmarks.compile.child import Child
from benchmarks.compile.program import matching
from benchmarks.compile.programs import PROGRAMS
from benchmarks.compile.targets import TARGETS

pytestmark = pytest.mark.aot

MIB, GIB = 2**20, 2**30


@pytest.fixture(scope="module")
def compile_for():
    """Compiles a program for a target. The process of a target ends with the last test."""
    children = {}

    def compiled(program, target):
        if reason := TARGETS[target].missing():
            pytest.skip(reason)
        if target not in children:
            children[target] = Child(TARGETS[target])
        answer = children[target].compile(program, PROGRAMS[program].seconds)
        assert answer["status"] == "compiled", answer["reason"]
        assert answer["temp_bytes"] + answer["argument_bytes"] < TARGETS[target].memory
        return answer

    yield compiled
    for child in children.values():
        child.__exit__(None, None, None)


TILED = [
    (f"attention/{name}/{mask}/t8192/{direction}", target)
    for name, masks, target in (
        ("tpu", ("causal", "documents"), "v5e-1"),
        ("splash", ("causal",), "v5e-1"),
        ("chunked", ("causal", "documents"), "v5e-1"),
        ("cudnn", ("causal",), "h200-1"),
        ("chunked", ("causal", "documents"), "h200-1"),
    )
    for mask in masks
    for direction in ("fwd", "bwd")
]


@pytest.mark.parametrize(("program", "target"), TILED, ids=map("-on-".join, TILED))
def test_tiled_attention_keeps_no_scores(compile_for, program, target):
    answer = compile_for(program, target)
    # The scores alone are 8 x 8192 x 8192 in float32.
    assert answer["temp_bytes"] < 256 * MIB
    assert answer["collectives"] == []
    assert not [kernel for kernel in answer["kernels"] if kernel["spill_bytes"]]


@pytest.mark.parametrize("program", [each.name for each in matching(["kernel/tpu"], PROGRAMS)])
@pytest.mark.parametrize("target", ["v5e-1", "v5p-1", "v6e-1"])
@pytest.mark.slow
def test_the_kernel_for_tpus_compiles_for_each_generation(compile_for, program, target):
    """Masks and score functions that no vendor's kernel takes, within the memory of a core; no copy of a tile stays."""
    assert compile_for(program, target)["temp_bytes"] < 128 * MIB


@pytest.mark.parametrize("name", ["reference", "xla"])
@pytest.mark.parametrize("target", ["v5e-1", "h200-1"])
def test_attention_with_all_scores_compiles(compile_for, name, target):
    assert compile_for(f"attention/{name}/causal/t8192/bwd", target)["temp_bytes"] < 16 * GIB


@pytest.mark.parametrize(("direction", "count"), [("fwd", 3), ("bwd", 10)])
@pytest.mark.parametrize("target", ["v5e-8", "h200-8"])
@pytest.mark.slow
def test_a_ring_sends_its_neighbours_blocks_and_nothing_else(compile_for, direction, count, target):
    answer = compile_for(f"ring/causal/t8192/{direction}", target)
    (found,) = answer["collectives"]
    assert found["kind"] == "collective-permute"
    assert found["exact"]
    if TARGETS[target].platform == "tpu":
        assert found["count"] == count
    assert answer["temp_bytes"] < 128 * MIB


SPLIT = [("tpu", "v5e-8"), ("splash", "v5e-8"), ("chunked", "v5e-8"), ("chunked", "h200-8"), ("cudnn", "h200-8")]


@pytest.mark.parametrize(("name", "target"), SPLIT, ids=map("-on-".join, SPLIT))
def test_attention_over_rows_and_heads_sends_nothing(compile_for, name, target):
    answer = compile_for(f"split/{name}/causal/t8192/bwd", target)
    assert answer["collectives"] == []
    # Of a device's 2 rows and 4 heads; the scores of one head are 256 MiB.
    assert answer["temp_bytes"] < 256 * MIB


AXES = {
    "data": {"all-reduce"},
    "tensor": {"all-gather", "all-reduce"},
    "sequence": {"all-gather", "all-reduce", "collective-permute"},
}


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("target", ["v5e-8", "h200-8"])
@pytest.mark.slow
def test_an_update_compiles_and_sends_what_its_axis_needs(compile_for, axis, target):
    answer = compile_for(f"update/base-scan/{axis}", target)
    assert {each["kind"] for each in answer["collectives"]} <= AXES[axis]
    assert answer["warnings"] == []
    assert answer["temp_bytes"] < 8 * GIB


@pytest.mark.slow
def test_a_long_text_trains_on_eight_small_chips(compile_for):
    answer = compile_for("update/decoder-long/sequence", "v5e-8")
    assert answer["temp_bytes"] < 12 * GIB
    assert answer["warnings"] == []


@pytest.mark.parametrize("program", [each.name for each in matching(["decode"], PROGRAMS)])
@pytest.mark.parametrize("target", ["v5e-1", "h200-1"])
@pytest.mark.slow
def test_a_step_of_decoding_copies_no_cache(compile_for, program, target):
    answer = compile_for(program, target)
    # A copy of the cache would be as large as the arguments.
    assert answer["temp_bytes"] < answer["argument_bytes"] / 4
