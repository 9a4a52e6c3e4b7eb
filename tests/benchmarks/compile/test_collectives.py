"""Collectives of programs compiled for the simulated devices, whose sizes are known."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from benchmarks.compile.collectives import KINDS, Traffic, traffic, warnings

ROWS, COLUMNS, BYTES = 3, 5, 4  # of each device, in float32


@pytest.fixture(scope="module")
def mesh():
    return jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))


def read(mesh, function, **options):
    spread = jax.jit(jax.shard_map(function, mesh=mesh, in_specs=P("x"), out_specs=P("x"), **options))
    x = jax.ShapeDtypeStruct((8 * ROWS, 8 * COLUMNS), jnp.float32, sharding=NamedSharding(mesh, P("x")))
    return traffic(spread.lower(x).compile().as_text())


PART = ROWS * 8 * COLUMNS * BYTES
RING = [(i, (i + 1) % 8) for i in range(8)]


@pytest.mark.parametrize(
    ("kind", "function", "size"),
    [
        ("all-gather", lambda x: jnp.sin(jax.lax.all_gather(x, "x")).sum(0), 8 * PART),
        ("all-reduce", lambda x: x + jax.lax.psum(x, "x"), PART),
        ("reduce-scatter", lambda x: jax.lax.psum_scatter(x, "x", scatter_dimension=1, tiled=True), PART),
        ("collective-permute", lambda x: jax.lax.ppermute(x, "x", RING), PART),
        ("all-to-all", lambda x: jax.lax.all_to_all(x, "x", 1, 1, tiled=True), PART),
    ],
)
def test_each_kind_has_its_bytes(mesh, kind, function, size):
    assert read(mesh, function) == [Traffic(kind, 1, 1, size, True)]


def test_loops_count(mesh):
    def around(x):
        return jax.lax.fori_loop(0, 7, lambda _, y: jnp.sin(jax.lax.ppermute(y, "x", RING)), x)

    (found,) = read(mesh, around)
    assert (found.runs, found.bytes, found.exact) == (7, 7 * PART, True)


def test_a_loop_of_unknown_length_counts_once_and_is_marked(mesh):
    def until(x):
        def step(y):
            return jnp.sin(jax.lax.ppermute(y, "x", RING))

        return jax.lax.while_loop(lambda y: jax.lax.psum(y.sum(), "x") > 1, step, x)

    permutes = [each for each in read(mesh, until) if each.kind == "collective-permute"]
    assert [(each.runs, each.bytes, each.exact) for each in permutes] == [(1, PART, False)]


def test_a_program_without_any():
    assert traffic(jax.jit(jnp.sin).lower(1.0).compile().as_text()) == []


ASYNCHRONOUS = """
ENTRY %main (x: bf16[3,7]) -> bf16[24,7] {
  %x = bf16[3,7]{1,0} parameter(0)
  %start = ((bf16[3,7]{1,0}), (bf16[24,7]{1,0})) all-gather-start(%x), replica_groups=mesh['a'=8] {'a'}, dimensions={0}
  %moved = (bf16[3,7]{1,0}, bf16[3,7]{1,0}, u32[], u32[]) collective-permute-start(%x), source_target_pairs={{0,1}}
  %gone = bf16[3,7]{1,0} collective-permute-done(%moved)
  %alone = bf16[3,7]{1,0} all-reduce(%x), replica_groups={{0},{1}}, to_apply=%add
  %each = bf16[3,7]{1,0} all-reduce(%x), replica_groups=[8,1]<=[8], to_apply=%add
  ROOT %done = bf16[24,7]{1,0} all-gather-done(%start)
}
"""


def test_asynchronous_ones_count_where_they_start_and_groups_of_one_send_nothing():
    found = {each.kind: each.bytes for each in traffic(ASYNCHRONOUS)}
    assert found == {"all-gather": 24 * 7 * 2, "collective-permute": 3 * 7 * 2}
    assert list(found) == [kind for kind in KINDS if kind in found]


def test_warnings_of_the_partitioner():
    printed = "W 1 a.cc:3] [SPMD] Involuntary full rematerialization of x.\nI other\n[SPMD] again\n"
    assert warnings(printed) == ["Involuntary full rematerialization of x.", "again"]
