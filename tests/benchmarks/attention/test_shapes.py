"""Named shapes."""

import pytest

from benchmarks.attention.shapes import GROUPS, SHAPES, named


def test_every_shape_has_an_origin_and_every_group_its_shapes():
    assert all(shape.origin for shape in SHAPES.values())
    assert set().union(*GROUPS.values()) <= set(SHAPES)


def test_the_acceptance_cases():
    sizes = {shape.query for shape in named("acceptance")}
    assert sizes == {(1, 4096, 8, 64), (1, 2048, 8, 64), (4, 512, 8, 64), (32, 64, 8, 64)}


def test_flash_attention_3_has_16k_tokens_and_model_dim_2048():
    shapes = named("fa3")
    assert len(shapes) == 18
    assert {(s.batch * s.length, s.num_heads * s.head_dim) for s in shapes} == {(16384, 2048)}


def test_the_benchmark_of_flex_attention_has_16_rows_of_16_heads_of_64():
    assert {(s.batch, s.num_heads, s.head_dim) for s in named("flex")} == {(16, 16, 64)}
    assert [s.length for s in named("flex")] == [8192, 32768]


def test_sizes_make_a_shape():
    (shape,) = named("b2-t3-s5-n6-k2-d7")
    assert shape.query == (2, 3, 6, 7)
    assert shape.key == (2, 5, 2, 7)


@pytest.mark.parametrize("name", ["cpu", "b2-t3-n4", "b2-t3-n3-k2-d5", "b0-t3-n3-d5"])
def test_what_is_no_shape_is_refused(name):
    with pytest.raises(ValueError, match=name):
        named(name)
