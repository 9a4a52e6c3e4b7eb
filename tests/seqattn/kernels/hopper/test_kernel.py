"""What the kernel refuses, and the programs that it lowers to. No GPU is needed."""

import dataclasses
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqattn.coordinates import Coordinates
from seqattn.kernels import hopper
from seqattn.kernels.call import Call
from seqattn.kernels.hopper.plan import Tiling
from seqattn.masks import Causal, SameSegment
from seqattn.score_mods import Alibi, SoftCap
from tests import hopper_plain

pytest.importorskip("absl", reason="Pallas Mosaic GPU needs absl-py")


def call(dtype="bfloat16", dim=64, value_dim=None, length=7, **options):
    given = {"mask": None, "bias": None, "score_mod": None, "q_at": None, "kv_at": None, "scale": None, "dropout": None}
    query, key = (jnp.zeros((2, length, heads, dim), dtype) for heads in (6, 3))
    value = jnp.zeros((2, length, 3, dim if value_dim is None else value_dim), dtype)
    return Call.of(query, key, value, **(given | options))


MANY_ROWS = jax.ShapeDtypeStruct((2**16, 7, 6, 64), jnp.bfloat16)


@pytest.mark.parametrize(
    ("made", "reason"),
    [
        (lambda: call("float32"), "takes bfloat16 and float16, not float32"),
        (lambda: call(dim=80), r"H \(80\) and V \(80\) must be equal, and one of 64, 128, 256"),
        (lambda: call(value_dim=128), r"H \(64\) and V \(128\) must be equal"),
        (
            lambda: dataclasses.replace(call(), query=MANY_ROWS),
            "65536 batch rows; the grid of a kernel has at most 65535",
        ),
        (lambda: dataclasses.replace(call(), platform="cpu"), "runs on a gpu, and this is a cpu"),
    ],
)
def test_what_the_kernel_refuses(made, reason):
    with pytest.raises(NotImplementedError, match=reason):
        hopper.refuse(made())


def test_without_absl_it_is_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "jax.experimental.pallas.mosaic_gpu", None)
    monkeypatch.delattr("jax.experimental.pallas.mosaic_gpu", raising=False)
    with pytest.raises(NotImplementedError, match="it needs absl-py"):
        hopper.refuse(call())


def test_an_empty_call_has_no_kernel():
    output, lse = hopper.attend(call(length=0))
    assert output.shape == (2, 0, 6, 64)
    assert lse.shape == (2, 0, 6)


def traced(fn, dtype, dim):
    """The program for a GPU, with documents known at run time, an array that is captured, and odd lengths."""
    arrays = [jax.ShapeDtypeStruct((2, 301, heads, dim), dtype) for heads in (6, 3, 3)]
    others = jax.ShapeDtypeStruct((2, 301), np.int32), jax.ShapeDtypeStruct((6,), np.float32)

    def attend(query, key, value, segment, slopes):
        at = Coordinates.from_segments(segment)
        options = {"mask": Causal() & SameSegment(), "score_mod": Alibi(slopes), "q_at": at, "kv_at": at}
        return hopper.attend(Call.of(query, key, value, **options, bias=None, scale=None, dropout=None))

    return jax.jit(fn(attend)).trace(*arrays, *others)


def lowered(fn, dtype, dim):
    return traced(fn, dtype, dim).lower(lowering_platforms=("cuda",)).as_text()


def test_it_is_compiled_for_gpus_alone():
    with pytest.raises(NotImplementedError, match="for NVIDIA GPUs cannot be compiled for cpu"):
        traced(lambda attend: attend, "bfloat16", 256).lower(lowering_platforms=("cpu",))


def test_a_program_for_a_gpu_holds_the_kernel_and_no_loop_over_tiles():
    text = lowered(lambda attend: attend, "bfloat16", 64)
    assert text.count("@mosaic_gpu") == 1
    assert "dot_general" not in text


def gradient(attend, by):
    def total(*arrays):
        output, lse = attend(*arrays)
        return output.astype(jnp.float32).sum() + lse.sum()

    return jax.grad(total, by)


def test_where_a_score_mod_reads_a_traced_array_the_gradient_is_computed_by_the_tiles_of_chunked():
    text = lowered(lambda attend: gradient(attend, (0, 1, 2, 4)), "float16", 128)
    # The forward pass runs once and keeps no scores.
    assert text.count("@mosaic_gpu") == 1
    assert "dot_general" in text


@pytest.mark.parametrize(("dim", "kernels"), [(64, 3), (256, 1)])
def test_the_gradient_of_query_key_and_value_is_computed_by_kernels(dim, kernels):
    def attend(query, key, value, segment):
        at = Coordinates.from_segments(segment)
        options = {"mask": Causal() & SameSegment(), "score_mod": SoftCap(5.0), "q_at": at, "kv_at": at}
        return hopper.attend(Call.of(query, key, value, **options, bias=None, scale=None, dropout=None))

    arrays = [jax.ShapeDtypeStruct((2, 301, heads, dim), jnp.bfloat16) for heads in (6, 3, 3)]
    segment = jax.ShapeDtypeStruct((2, 301), np.int32)
    traced = jax.jit(gradient(attend, (0, 1, 2))).trace(*arrays, segment)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("@mosaic_gpu") == kernels
    assert ("dot_general" in text) == (kernels == 1)


def test_explain_says_who_computes_the_gradients():
    assert hopper.note(call()) is None
    assert hopper.note(call(length=0)) is None
    assert hopper.note(call(bias=jnp.zeros((1, 1, 7, 7)))) == "chunked computes the gradients: a bias may need one"
    assert "head dim 256 takes too many registers" in hopper.note(call(dim=256))


def test_second_derivatives_are_refused_as_by_the_tiled_kernel():
    query, key = (jnp.ones((1, 5, heads, 3)) for heads in (2, 1))

    def loss(query):
        made = dataclasses.replace(call("float32", 3), query=query, key=key, value=key)
        return jnp.sum(hopper_plain.attend(made, Tiling(2, 2, 1))[0])

    with pytest.raises(NotImplementedError, match=r"second derivatives .* 'reference'"):
        jax.grad(lambda query: jnp.sum(jax.grad(loss)(query)))(query)
