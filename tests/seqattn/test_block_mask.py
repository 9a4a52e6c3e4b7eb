"""A block mask: the same results as its mask, with lists of tiles that are made once."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from seqattn.attention import attend, attend_scores, attention_weights
from seqattn.block_mask import block_mask
from seqattn.coordinates import Coordinates
from seqattn.kernels.dispatch import explain
from seqattn.kernels.split import Split
from seqattn.masks import Causal, Prefix, SameSegment, SlidingWindow
from seqattn.ring_attention import ring_attend
from seqattn.score_mods import RelativePositions
from tests.contract import close, small_tiles

B, T, N, K, H = 2, 23, 4, 2, 5
PACKED = Causal() & SameSegment()


@pytest.fixture(autouse=True)
def tiled(monkeypatch):
    """Calls as short as these are tiled, in many tiles."""
    small_tiles(monkeypatch)
    monkeypatch.setattr("seqattn.kernels.dispatch.TINY_PAIRS", 0)


def _inputs(batch=(B,), length=T):
    rng = np.random.default_rng(0)
    return tuple(jnp.asarray(rng.normal(size=(*batch, length, n, H)), jnp.float32) for n in (N, K, K))


def _packed(batch=(B,), length=T, texts=4):
    segments = np.sort(np.random.default_rng(1).integers(0, texts, (*batch, length)), axis=-1)[..., ::-1]
    return Coordinates.from_segments(jnp.asarray(segments))


def _loss(inputs, **options):
    return jnp.sin(attend(*inputs, **options)).sum()


def _number(compiled, name):
    """How often an operation stands in a compiled program."""
    return len(re.findall(rf"\b{name}\(", compiled.as_text()))


@pytest.mark.parametrize("mask", [PACKED, SlidingWindow(3) & SameSegment(), PACKED | Prefix(jnp.array([3, 0]))])
def test_results_and_gradients_are_those_of_the_mask(mask):
    inputs, at = _inputs(), _packed()

    def shared(inputs, at):
        return _loss(inputs, mask=block_mask(mask, *inputs, q_at=at, kv_at=at))

    def alone(inputs, at):
        return _loss(inputs, mask=mask, q_at=at, kv_at=at, implementation="reference")

    found, expected = (jax.jit(jax.value_and_grad(each))(inputs, at) for each in (shared, alone))
    jax.tree.map(lambda a, b: close(a, b, "float32"), found, expected)


def test_layers_that_are_computed_again_share_the_lists():
    """Layers that make their own sort the tiles in each step, forward and backward."""
    inputs, at = _inputs(), _packed()

    def loss(inputs, position, segment, *, share):
        at = Coordinates(position, segment)
        located = {"mask": PACKED, "q_at": at, "kv_at": at}
        if share:
            located = {"mask": block_mask(PACKED, *inputs, q_at=at, kv_at=at)}

        x = inputs[0]
        for _ in range(3):
            x = jax.checkpoint(lambda x: attend(x, *inputs[1:], **located))(x)
        return jnp.sin(x).sum()

    compiled = {}
    for share in (False, True):
        run = jax.jit(jax.value_and_grad(functools.partial(loss, share=share)))
        compiled[share] = run.lower(inputs, at.position, at.segment).compile()
    a, b = (each(inputs, at.position, at.segment) for each in compiled.values())
    jax.tree.map(lambda a, b: close(a, b, "float32"), a, b)
    assert _number(compiled[True], "sort") < _number(compiled[False], "sort")


def test_a_call_reads_the_lists_and_not_the_mask():
    """Lists that visit nothing hide everything: so they are read."""
    inputs, at = _inputs(), _packed()
    made = block_mask(PACKED, *inputs, q_at=at, kv_at=at)
    nothing = jax.tree.map(jnp.zeros_like, made.visits)
    blind = type(made)(made.mask, made.q_at, made.kv_at, nothing)
    assert not attend(*inputs, mask=blind).any()
    # A call of other sizes makes its own.
    more = inputs[0], *(jnp.repeat(x, 2, axis=2) for x in inputs[1:])
    close(attend(*more, mask=blind), attend(*more, mask=PACKED, q_at=at, kv_at=at), "float32")


def test_a_bias_makes_lists_of_its_own():
    """Its entries of -inf mask pairs of tiles that are full without it."""
    inputs, at = _inputs(), Coordinates.from_segments(jnp.ones((B, T), jnp.int32))
    made = block_mask(PACKED, *inputs, q_at=at, kv_at=at)
    bias = jnp.where(jnp.arange(T) % 3 == 0, -jnp.inf, 0.0)[None]
    bias = jnp.broadcast_to(bias, (T, T))
    expected = attend(*inputs, bias=bias, mask=PACKED, q_at=at, kv_at=at, implementation="reference")
    close(attend(*inputs, bias=bias, mask=made), expected, "float32")


@pytest.mark.parametrize("batch", [(), (3, 2)])
def test_any_batch_dims_and_vmap(batch):
    inputs, at = _inputs(batch), _packed(batch)

    def shared(inputs, at):
        return attend(*inputs, mask=block_mask(PACKED, *inputs, q_at=at, kv_at=at))

    expected = attend(*inputs, mask=PACKED, q_at=at, kv_at=at, implementation="reference")
    close(jax.jit(shared)(inputs, at), expected, "float32")
    if batch:
        close(jax.jit(jax.vmap(shared))(inputs, at), expected, "float32")


def test_made_outside_of_the_program_and_passed_to_it():
    inputs, at = _inputs(), jax.tree.map(np.asarray, _packed())
    made = block_mask(PACKED, *inputs, q_at=at, kv_at=at)
    found = jax.jit(lambda inputs, made: attend(*inputs, mask=made))(inputs, made)
    close(found, attend(*inputs, mask=PACKED, q_at=at, kv_at=at, implementation="reference"), "float32")


def test_shapes_suffice_to_make_it():
    inputs, at = _inputs(), _packed()
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in inputs]
    made = block_mask(PACKED, *shapes, q_at=at, kv_at=at)
    assert list(made.visits.by_name) == ["chunked"]
    assert made.visits.by_name["chunked"].schedule.partial.count > 0


@pytest.mark.parametrize("split", [Split(batch="data"), Split(heads="tensor"), Split(batch="data", heads="tensor")])
@pytest.mark.parametrize("mask", [PACKED, PACKED | Prefix(jnp.array([3, 0]))], ids=["packed", "prefix"])
def test_a_split_call_reads_the_lists_of_its_rows(split, mask):
    mesh = jax.make_mesh((2, 4), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    split, inputs, at = Split(split.batch, split.heads, mesh=mesh), _inputs(), _packed()

    def shared(inputs, at, *, blind=False):
        made = block_mask(mask, *inputs, q_at=at, kv_at=at, split=split)
        assert made.visits.by_name.keys() == {"chunked"}
        visits = jax.tree.map(jnp.zeros_like, made.visits) if blind else made.visits
        return _loss(inputs, mask=type(made)(made.mask, made.q_at, made.kv_at, visits), split=split)

    def alone(inputs, at):
        return _loss(inputs, mask=mask, q_at=at, kv_at=at, implementation="reference")

    found, expected = (jax.jit(jax.value_and_grad(each))(inputs, at) for each in (shared, alone))
    jax.tree.map(lambda a, b: close(a, b, "float32"), found, expected)
    assert jax.jit(functools.partial(shared, blind=True))(inputs, at) == 0


def test_rows_that_differ_are_known_on_no_device():
    """Coordinates that are known at trace time are split as traced ones are. What all rows share stays known."""
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
    split, inputs = Split(batch="data", mesh=mesh), _inputs()
    at = jax.tree.map(np.asarray, _packed())
    made = block_mask(PACKED, *inputs, q_at=at, kv_at=at, split=split)
    assert made.visits.by_name.keys() == {"chunked"}
    expected = attend(*inputs, mask=PACKED, q_at=at, kv_at=at, implementation="reference")
    close(jax.jit(functools.partial(attend, mask=made, split=split))(*inputs), expected, "float32")
    assert not block_mask(Causal(), *inputs, split=split).visits.by_name


@pytest.mark.parametrize("made_for", [None, Split(batch="data")])
def test_lists_of_another_split_are_not_read(made_for):
    mesh = jax.make_mesh((2, 4), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    made_for, other = (x and Split(x.batch, x.heads, mesh=mesh) for x in (made_for, Split("data", "tensor")))
    inputs, at = _inputs(), _packed()
    made = block_mask(PACKED, *inputs, q_at=at, kv_at=at, split=made_for)
    expected = attend(*inputs, mask=PACKED, q_at=at, kv_at=at, implementation="reference")
    for split in (other, None):
        close(attend(*inputs, mask=made, split=split), expected, "float32")


def test_lists_of_another_mesh_are_not_read():
    """A split without a mesh is over that of `jax.set_mesh`, which may be another one when the lists are read."""
    inputs, split = _inputs((4,)), Split(batch="data")
    at = jax.tree.map(np.asarray, _packed((4,)))
    expected = attend(*inputs, mask=PACKED, q_at=at, kv_at=at, implementation="reference")
    with jax.set_mesh(jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))):
        made = jax.device_get(block_mask(PACKED, *inputs, q_at=at, kv_at=at, split=split))
    for size in (2, 4):
        with jax.set_mesh(jax.make_mesh((size,), ("data",), axis_types=(AxisType.Auto,))):
            close(jax.jit(functools.partial(attend, split=split))(*inputs, mask=made), expected, "float32")


def test_a_split_sequence_makes_lists_for_each_step_of_the_ring():
    mesh = jax.make_mesh((2,), ("sequence",), axis_types=(AxisType.Auto,))
    split, inputs, at = Split(sequence="sequence", mesh=mesh), _inputs(length=22), _packed(length=22)
    made = block_mask(PACKED, *inputs, q_at=at, kv_at=at, split=split)
    assert not made.visits.by_name
    expected = attend(*inputs, mask=PACKED, q_at=at, kv_at=at, implementation="reference")
    close(jax.jit(functools.partial(attend, mask=made, split=split))(*inputs), expected, "float32")


def test_a_note_on_a_split_call_is_on_the_whole():
    mesh = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,))
    split, inputs, at = Split(batch="data", mesh=mesh), _inputs(), _packed()
    made = block_mask(PACKED, *inputs, q_at=at, kv_at=at, split=split)
    notes = explain(*inputs, mask=made, split=split).notes
    assert notes["chunked"].startswith("finds out at run time")


@pytest.mark.parametrize("shape", [{"batch": (0,)}, {"length": 0}])
def test_an_empty_call(shape):
    inputs = _inputs(**shape)
    at = Coordinates.range(inputs[0].shape[1])
    made = block_mask(Causal(), *inputs, q_at=at, kv_at=at)
    assert attend(*inputs, mask=made).shape == inputs[0].shape


def test_rows_that_share_their_keys():
    inputs, at = _inputs((3,)), _packed((3,))
    one = inputs[0], *(x[:1] for x in inputs[1:])
    kv_at = jax.tree.map(lambda x: x[0], at)
    made = block_mask(PACKED, *one, q_at=at, kv_at=kv_at)
    expected = attend(*one, mask=PACKED, q_at=at, kv_at=kv_at, implementation="reference")
    close(attend(*one, mask=made), expected, "float32")


def test_the_kernel_for_tpus_is_lowered_with_shared_lists():
    length = 1031
    shapes = [jax.ShapeDtypeStruct((B, length, n, 64), jnp.bfloat16) for n in (N, K, K)]
    each = jax.ShapeDtypeStruct((B, length), jnp.int32)

    def layers(query, key, value, position, segment):
        at = Coordinates(position, segment)
        made = block_mask(PACKED, query, key, value, q_at=at, kv_at=at)
        return jax.lax.scan(lambda x, _: (attend(x, key, value, mask=made), None), query, length=3)[0]

    text = jax.jit(layers).trace(*shapes, each, each).lower(lowering_platforms=("tpu",)).as_text()
    # All lists are sorted before the last loop, that of the layers, which calls the kernel.
    main, functions = text.split("func.func private", maxsplit=1)
    before, loop = main.rsplit("stablehlo.while", maxsplit=1)
    assert "call @argsort" in before
    assert "call @argsort" not in loop + functions
    assert text.count("tpu_custom_call") == 1


def test_what_it_tells():
    x, at = _inputs()[0], Coordinates.range(T)
    made = block_mask(SlidingWindow(2), x, x, x, q_at=at, kv_at=at)
    lines = str(made).splitlines()
    assert re.fullmatch(r"SlidingWindow\(.*\) visits [\d.]+% of the tiles of 1 queries and 1 keys", lines[0])
    assert lines[1:4] == ["#" + 22 * ".", "##" + 21 * ".", ".##" + 20 * "."]
    kinds = made.kinds(4, 4)
    assert isinstance(kinds, np.ndarray)
    assert kinds.shape == (1, 6, 6)
    assert kinds[0, :2].tolist() == [[1, 0, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0]]
    packed = _packed()
    note = explain(x, x, x, mask=block_mask(PACKED, x, x, x, q_at=packed, kv_at=packed)).notes["chunked"]
    assert re.match(r"visits [\d.]+% of the tiles of 4 queries and 4 keys", note)
    told: list[str] = []

    def traced(segments):
        at = Coordinates.from_segments(segments)
        told.append(str(block_mask(PACKED, x, x, x, q_at=at, kv_at=at)))

    jax.eval_shape(traced, packed.segment)
    assert told == [f"{PACKED} of 23 queries and 23 keys"]


def test_without_coordinates_it_is_one_text():
    inputs = _inputs()
    made = block_mask(Causal(), *inputs)
    close(attend(*inputs, mask=made), attend(*inputs, mask=Causal()), "float32")
    close(attention_weights(inputs[0], inputs[1], mask=made).sum(axis=-1), np.ones((B, N, T)), "float32")
    scores = jnp.zeros((B, N, T, T))
    for a, b in zip(
        attend_scores(scores, inputs[2], mask=made),
        attend_scores(scores, inputs[2], mask=Causal()),
        strict=True,
    ):
        close(a, b, "float32")


def test_coordinates_beside_it_are_refused():
    inputs, at = _inputs(), Coordinates.range(T)
    made = block_mask(Causal(), *inputs)
    for function in (attend, explain):
        with pytest.raises(ValueError, match=r"a BlockMask holds the coordinates .* give no q_at and kv_at beside it"):
            function(*inputs, mask=made, q_at=at, kv_at=at)
    with pytest.raises(ValueError, match=r"q_at \(23,\) must be \(22,\)"):
        attend(*(x[:, 1:] for x in inputs), mask=made)


def test_what_takes_none_says_so(as_users_call_it):
    inputs = _inputs()
    made = block_mask(Causal(), *inputs)
    with pytest.raises(TypeError, match="this function takes no BlockMask: give its mask, q_at and kv_at"):
        jax.vmap(functools.partial(ring_attend, axis_name="x", mask=made), axis_name="x")(*(x[None] for x in inputs))
    with pytest.raises(TypeError, match="a BlockMask is made of a Mask, got ArrayImpl"):
        block_mask(jnp.ones((T, T), bool), *inputs)
    with pytest.raises(ValueError, match="23 queries and 22 keys: say how they align"):
        block_mask(Causal(), inputs[0], *(x[:, 1:] for x in inputs[1:]))


def test_the_score_modification_takes_part_in_the_choice():
    """`tpu` refuses one that has an array for each query, so chunked's list is made for a TPU as well."""
    x = jax.ShapeDtypeStruct((B, T, N, H), jnp.float32)
    found: list[list[str]] = []

    def names(segments, *, score_mod):
        at = Coordinates.from_segments(segments)
        found.append(sorted(block_mask(PACKED, x, x, x, q_at=at, kv_at=at, score_mod=score_mod).visits.by_name))

    for score_mod in (None, RelativePositions(jnp.ones((3, H)))):
        jax.eval_shape(functools.partial(names, score_mod=score_mod), _packed().segment)
    assert found == [["chunked", "tpu"], ["chunked"]]


@pytest.mark.parametrize(("batch", "kv_batch"), [((3,), (1,)), ((3, 2), (1, 2)), ((3, 2), (3, 1))])
def test_coordinates_of_keys_that_rows_share(batch, kv_batch):
    (query, *_), at = _inputs(batch), _packed(batch)
    (_, key, value), kv_at = _inputs(kv_batch), _packed(kv_batch)
    made = block_mask(PACKED, query, key, value, q_at=at, kv_at=kv_at)
    located = {"mask": PACKED, "q_at": at, "kv_at": kv_at}
    close(attend(query, key, value, mask=made), attend(query, key, value, **located), "float32")
    kinds = made.kinds(1, 1).reshape(*batch, T, T)
    np.testing.assert_array_equal(kinds > 0, PACKED.dense(at, kv_at))
    with pytest.raises(TypeError, match="dtypes must agree"):
        block_mask(PACKED, query, key, value.astype(jnp.bfloat16), q_at=at, kv_at=kv_at)


def test_arrays_of_explicit_axes_outside_of_their_mesh():
    """Their types name a mesh also where `jax.set_mesh` does not."""
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Explicit,))
    place = functools.partial(jax.device_put, device=NamedSharding(mesh, PartitionSpec("data")))
    inputs, at = _inputs(), _packed()
    expected = attend(*inputs, mask=PACKED, q_at=at, kv_at=at, implementation="reference")

    def shared(inputs, at):
        return attend(*inputs, mask=block_mask(PACKED, *inputs, q_at=at, kv_at=at))

    for call in (shared, jax.jit(shared)):
        close(call(*jax.tree.map(place, (inputs, at))), expected, "float32")
    placed = block_mask(PACKED, *inputs, q_at=place(at), kv_at=place(at))
    assert str(placed) == str(block_mask(PACKED, *inputs, q_at=at, kv_at=at))


def test_it_tells_inside_of_a_traced_function():
    x, at = _inputs()[0], _packed()
    made = block_mask(PACKED | Prefix(jnp.array([3, 0])), x, x, x, q_at=at, kv_at=at)
    told: list[str] = []
    jax.eval_shape(lambda: told.append(str(made)))
    assert told == [str(made)]


@pytest.mark.parametrize("sizes", [(0, 4), (4, -1)])
def test_tiles_of_no_size_are_refused(sizes):
    with pytest.raises(ValueError, match="must be an integer of at least 1"):
        block_mask(Causal(), *_inputs()).kinds(*sizes)


@pytest.mark.parametrize("name", ["mask", "q_at", "kv_at", "visits"])
def test_no_part_can_be_replaced(name):
    """The lists would stay those of the old mask and coordinates, and hide what the new ones show."""
    inputs = _inputs()
    made = block_mask(Causal(), *inputs)
    with pytest.raises(AttributeError, match=f"property '{name}' .* has no setter"):
        setattr(made, name, getattr(made, name))
    with pytest.raises(TypeError, match="dataclass instances"):
        dataclasses.replace(made, **{name: getattr(made, name)})
