"""What `ring_attend` refuses, the zigzag order, and what a ring costs. Its numbers: kernels/test_ring.py."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from seqattn.coordinates import Coordinates
from seqattn.masks import Causal, SameSegment
from seqattn.ring_attention import ring_attend, ring_cost, zigzag
from seqattn.score_mods import Alibi, SoftCap

TOKENS = jax.ShapeDtypeStruct((8192, 2, 5), np.float32)
AT = Coordinates.range(8192)


def in_a_ring(**options):
    mesh = jax.make_mesh((2,), ("ring",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    x = jnp.ones((4, 1, 3))

    def local(x):
        return ring_attend(x, x, x, **{"axis_name": "ring"} | options)

    return jax.shard_map(local, mesh=mesh, in_specs=P("ring"), out_specs=P("ring"))(x)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"axis_name": "rign"}, r"axis_name \('rign'\) must be an axis of the mesh of a jax.shard_map around"),
        ({"mask": Causal()}, "needs q_at and kv_at: the part of the sequence that a device holds would be"),
        ({"score_mod": Alibi()}, "needs q_at and kv_at"),
        ({"q_at": Coordinates.range(2), "kv_at": Coordinates.range(2)}, "q_at and kv_at only matter to a Mask"),
        ({"mask": np.ones((2, 2), bool)}, r"mask \(2, 2\) must be \[T, S\] \(2, 4\)"),
        ({"scale": np.ones(2)}, "scale must be a scalar"),
    ],
)
@pytest.mark.usefixtures("as_users_call_it")
def test_an_error_states_the_rule(options, message):
    with pytest.raises(ValueError, match=message):
        in_a_ring(**options)


def test_slopes_of_alibi_that_another_axis_may_split_are_refused():
    mesh = jax.make_mesh((2, 2), ("ring", "heads"), axis_types=(AxisType.Auto,) * 2, devices=jax.devices()[:4])

    def local(x, at):
        return ring_attend(x, x, x, axis_name="ring", score_mod=SoftCap(2.0).then(Alibi()), q_at=at, kv_at=at)

    split = jax.shard_map(local, mesh=mesh, in_specs=(P("ring", "heads"), P("ring")), out_specs=P("ring", "heads"))
    with pytest.raises(ValueError, match=r"Alibi\(\) counts the heads of one device, and the mesh axes \['heads'\]"):
        split(jnp.ones((4, 2, 3)), jax.tree.map(jnp.asarray, Coordinates.range(4)))


def test_outside_of_shard_map_is_an_error():
    x = jnp.ones((4, 1, 3))
    with pytest.raises(ValueError, match=r"axis_name \('sequence'\) must be an axis"):
        ring_attend(x, x, x, axis_name="sequence")


@pytest.mark.parametrize(("length", "devices"), [(0, 1), (2, 1), (12, 2), (42, 7)])
def test_zigzag_is_a_permutation_in_which_all_devices_have_as_much_to_do(length, devices):
    order, inverse = zigzag(length, devices)
    np.testing.assert_array_equal(order[inverse], np.arange(length))
    np.testing.assert_array_equal(inverse[order], np.arange(length))
    work = (order + 1).reshape(devices, -1).sum(axis=1)  # keys that a causal mask shows
    assert len(set(work)) == 1


@pytest.mark.parametrize(("length", "devices"), [(6, 2), (4, 0), (-4, 2)])
def test_a_length_that_does_not_divide_is_an_error(length, devices):
    with pytest.raises(
        ValueError, match=rf"length \({length}\) must be a multiple of twice the devices \(2 \* {devices}\)"
    ):
        zigzag(length, devices)


def test_every_step_of_a_zigzag_is_balanced_and_of_one_in_order_none_but_the_first():
    in_order = ring_cost(*[TOKENS] * 3, devices=4, mask=Causal(), q_at=AT, kv_at=AT)
    order, _ = zigzag(8192, 4)
    moved = jax.tree.map(lambda x: x[order], AT)
    even = ring_cost(*[TOKENS] * 3, devices=4, mask=Causal(), q_at=moved, kv_at=moved)
    assert even.balance == 1
    assert in_order.balance < 0.65
    # In step m the first m devices hold a block of the future.
    np.testing.assert_array_equal(in_order.flops_forward[1:] == 0, np.tri(3, 4, dtype=bool))


def test_all_pairs_without_a_mask_and_the_blocks_of_a_document_with_one():
    full = ring_cost(*[TOKENS] * 3, devices=4)
    np.testing.assert_array_equal(full.flops_forward, np.full((4, 4), 2 * (5 + 5) * 2 * 2048 * 2048))
    np.testing.assert_array_equal(full.flops_backward, np.full((4, 4), 2 * 25 * 2 * 2048 * 2048))
    texts = Coordinates(AT.position % 4096, AT.position // 4096 + 1)
    split = ring_cost(*[TOKENS] * 3, devices=2, mask=SameSegment(), q_at=texts, kv_at=texts)
    assert split.flops_forward[0].all()
    assert not split.flops_forward[1].any()
    nothing = Coordinates(AT.position, 0 * AT.position)
    assert ring_cost(*[TOKENS] * 3, devices=2, mask=SameSegment(), q_at=nothing, kv_at=nothing).balance == 1


def test_parts_of_unequal_length_are_an_error():
    with pytest.raises(ValueError, match=r"queries \(8192\) and keys \(8192\) must be multiples of the devices \(3\)"):
        ring_cost(*[TOKENS] * 3, devices=3)
