"""Arrays for compiled programs: the same everywhere, and such that results tell something."""

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.compile.arguments import arguments_of
from benchmarks.compile.program import Program


def made(name, infos, **sizes):
    return arguments_of(Program(name, (1,), build=lambda devices, platform: None, sizes=sizes), infos)


def info(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def test_documents_of_attention_have_positions_and_segments():
    ids = info(2, 67, dtype=jnp.int32)
    query, position, segment = made("attention/x/documents/t67/fwd", (info(2, 67, 3, 5), ids, ids), mask="documents")
    assert abs(query.std() - 1) < 0.1
    for row in range(2):
        for number in np.unique(segment[row]):
            count = (segment[row] == number).sum()
            np.testing.assert_array_equal(position[row, segment[row] == number], np.arange(count))
    assert segment.max() > 1


def test_the_inputs_of_a_kernel_are_segments_slopes_or_the_length_of_a_prefix():
    infos = info(8), info(1, 64, dtype=jnp.int32)
    slopes, segment = made("kernel/hopper/alibi/h64/fwd", infos, mask="alibi")
    assert (slopes > 0).all()
    assert segment.max() > 1
    assert made("kernel/hopper/prefix/h64/fwd", infos, mask="prefix")[1][0, 0] == 16


def test_a_model_has_small_weights_unit_scales_and_tokens_of_its_vocabulary():
    batch = {name: info(4, 9, dtype=jnp.int32) for name in ("source", "source_segment", "source_position")}
    state = {"params": {"kernel": info(50, 30), "scale": info(30)}, "opt_state": {"kernel": info(50, 30)}}
    state |= {"step": info(dtype=jnp.int32)}
    state, batch = made("update/x/data", (state, batch), vocab_size=13)
    assert 0.01 < state["params"]["kernel"].std() < 0.03
    assert (state["params"]["scale"] == 1).all()
    assert not state["opt_state"]["kernel"].any()
    assert state["step"] == 0
    assert 1 <= batch["source"].min() < batch["source"].max() < 13
    assert (batch["source_segment"] == 1).all()
    assert (batch["source_position"] == np.arange(9)).all()


def test_arrays_are_the_same_in_every_process_and_differ_from_each_other():
    infos = [info(7, 5, 3, 2, dtype=jnp.bfloat16)] * 2
    first, second = made("attention/chunked/causal/t5/fwd", infos, mask="causal")
    again = made("attention/hopper/causal/t5/fwd", infos, mask="causal")
    assert first.dtype == jnp.bfloat16
    np.testing.assert_array_equal(first, again[0])
    assert (first != second).any()
