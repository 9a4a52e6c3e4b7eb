"""Programs compiled for TPU and GPU: `make test-aot`, or the short part of them, `make test-aot-short`.

Each target is compiled in a process of its own. Nothing runs, so nothing is said of results and speed.
"""

import jax
import pytest
from flax import nnx

from benchmarks.compile.child import Child
from benchmarks.compile.program import matching
from benchmarks.compile.programs import PROGRAMS
from benchmarks.compile.targets import TARGETS
from benchmarks.compile.update_programs import TRAININGS
from seqattn.interop import model_type
from train.update.parameters import paths

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


@pytest.mark.parametrize("program", [each.name for each in matching(["kernel/hopper_cached"], PROGRAMS)])
def test_the_kernel_over_a_cache_copies_no_cache_and_spills_nothing(compile_for, program):
    answer = compile_for(program, "h200-1")
    (kernel,) = answer["kernels"]
    assert "seqattn_hopper_cached" in kernel["name"]
    assert kernel["spill_bytes"] == 0
    # The keys of the cache alone are half of the arguments.
    assert answer["temp_bytes"] < answer["argument_bytes"] / 4


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


def parameters(program):
    """Bytes of the parameters in bfloat16, and of the tables among them."""
    config = TRAININGS[program.split("/")[1]].model
    model = nnx.eval_shape(lambda: model_type(config)(config, rngs=nnx.Rngs(params=0)))
    params = nnx.state(model, nnx.Param)
    leaves = dict(zip(jax.tree.leaves(paths(params)), jax.tree.leaves(params), strict=True))
    sizes = {path: 2 * leaf.size for path, leaf in leaves.items()}
    return sum(sizes.values()), sum(size for path, size in sizes.items() if path.endswith("table"))


@pytest.mark.parametrize("axis", ["data", "fsdp", "tensor", "sequence"])
@pytest.mark.parametrize("target", ["v5e-8", "h200-8"])
@pytest.mark.slow
def test_an_update_compiles_and_sends_what_its_axis_needs(compile_for, axis, target):
    program = f"update/base-scan/{axis}"
    answer = compile_for(program, target)
    sent = {each["kind"]: each["bytes"] for each in answer["collectives"]}
    params, tables = parameters(program)
    if axis in ("data", "sequence"):  # the gradients; of a tied table, those of look-ups and of logits
        assert params <= sent["all-reduce"] <= 1.02 * (params + tables)
    if axis == "fsdp":  # each parameter once, as narrow as it is used; TPUs gather a tied table for each of its uses
        again = tables if target == "v5e-8" else 0
        assert 0.98 * params <= sent["all-gather"] <= 1.02 * (params + again)
        assert params <= sent["all-reduce"] + sent.get("reduce-scatter", 0) <= 1.02 * (params + tables)
    if axis == "tensor":  # activations; of the parameters only split biases
        assert sent["all-gather"] < MIB
    others = {"fsdp": {"reduce-scatter"}, "sequence": {"collective-permute"}}.get(axis, set())
    assert sent.keys() <= {"all-reduce", "all-gather"} | others
    assert answer["warnings"] == []
    assert answer["temp_bytes"] < 8 * GIB


@pytest.mark.slow
def test_a_model_that_fits_nowhere_whole_is_evaluated_in_parts(compile_for):
    answer = compile_for("evaluate/decoder-7b/fsdp", "h200-8")
    (found,) = (each for each in answer["collectives"] if each["kind"] == "all-gather")
    # Each parameter is gathered once, in float32, and no device keeps a third of them at a time.
    params, _ = parameters("evaluate/decoder-7b")
    assert found["bytes"] < 1.02 * 2 * params
    assert answer["temp_bytes"] + answer["argument_bytes"] < 2 * params / 3


@pytest.mark.parametrize(
    ("model", "calls", "again", "stacks"),
    [
        # Self attention of encoder and decoder, and cross attention.
        ("base-scan", 3, 0, 2),
        # Self attention, computed again in the backward pass.
        ("decoder", 1, 1, 1),
    ],
)
@pytest.mark.slow
def test_an_update_on_tpus_holds_the_kernel_and_no_loop_over_tiles(compile_for, model, calls, again, stacks):
    """Each call has a forward pass, a kernel for the gradients of queries, and one for those of keys and values."""
    answer = compile_for(f"update/{model}/data", "v5e-8")
    assert answer["tpu_kernels"] == {"seqattn": (2 + again) * calls, "seqattn_transposed": calls}
    # The layers of each stack, forward and backward, are the only loops.
    assert answer["loops"] == 2 * stacks


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
    if target == "v5e-1":
        # Most of the arguments are the cache, of which a small part is filled.
        assert answer["tpu_kernels"] == {"seqattn_cached": 12}
        assert answer["kernel_bytes"] < answer["argument_bytes"] / 5
