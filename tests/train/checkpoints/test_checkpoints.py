"""What is saved is what is restored; which steps stay; what does not fit is refused."""

import dataclasses
import functools
import itertools
import re
import shutil
import threading

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from seqattn.models import Transformer, TransformerConfig
from seqattn.nn import BlockConfig
from tests.small_states import assert_same, names, small
from train.checkpoints import checkpoints as module
from train.checkpoints import digests
from train.checkpoints.checkpoints import Checkpoints, MissingStep
from train.update.step import TrainState, start


@functools.cache
def fresh(hidden_dim=7, seed=0):
    block = BlockConfig(model_dim=6, hidden_dim=hidden_dim, num_heads=2)
    config = TransformerConfig(vocab_size=13, num_encoder_layers=1, num_decoder_layers=1, block=block)
    return start(Transformer(config, rngs=nnx.Rngs(seed)), optax.adamw(1e-3))[1]


def at(state, step):
    return dataclasses.replace(state, step=jnp.asarray(step, jnp.int32))


def test_a_state_comes_back_bitwise_with_its_texts(tmp_path):
    saved = at(fresh(seed=3), 5)
    with Checkpoints(tmp_path / "new" / "checkpoints") as checkpoints:
        assert checkpoints.latest is None
        checkpoints.save(saved, {"config": '{"é": 1}', "tokenizer": "words"})
    again = Checkpoints(tmp_path / "new" / "checkpoints")
    assert again.latest == 5
    assert again.texts() == {"config": '{"é": 1}', "tokenizer": "words"}
    assert_same(again.restore(fresh()), saved)


def test_only_the_latest_stay(tmp_path):
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(small(step), {})
        assert checkpoints.steps == [2, 3]
    assert names(tmp_path) == ["2", "3"]
    with pytest.raises(ValueError, match=r"keep \(0\) must be an integer of at least 1"):
        Checkpoints(tmp_path, keep=0)


def test_protected_steps_stay_beside_the_latest(tmp_path):
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        for step, protected in ((1, [1]), (2, [1, 2]), (3, [1, 2]), (4, [1, 2]), (5, [1, 2]), (6, [2])):
            checkpoints.save(small(step), {})
            checkpoints.wait()
            checkpoints.protect(*protected)
        assert checkpoints.steps == [1, 2, 5, 6]
        checkpoints.save(small(7), {})
        assert checkpoints.steps == [2, 6, 7]


def test_any_step_can_be_read(two_steps):
    checkpoints = Checkpoints(two_steps)
    assert checkpoints.texts(4) == {"step": "4"}
    like = TrainState(jnp.int32(0), {"kernel": jnp.zeros((5, 3))}, {"count": jnp.arange(4)})
    assert_same(checkpoints.restore(like, step=4), small(4))
    with pytest.raises(MissingStep, match="holds no checkpoint of step 5"):
        checkpoints.restore(like, step=5)
    with pytest.raises(ValueError, match=r"count: saved int32\[8\], wanted int32\[4\]"):
        checkpoints.restore(like)


def test_where_nothing_was_saved_nothing_is_read(tmp_path):
    with pytest.raises(MissingStep, match=r"holds no checkpoint$"):
        Checkpoints(tmp_path).texts()


def test_later_steps_are_forgotten_and_may_be_saved_again(tmp_path):
    with Checkpoints(tmp_path, keep=5) as checkpoints:
        for step in (2, 9, 11):
            checkpoints.save(small(step), {"step": str(step)})
        checkpoints.forget_after(9)
        assert checkpoints.latest == 9
        assert checkpoints.texts() == {"step": "9"}
        checkpoints.save(small(11), {"step": "again"})
        assert checkpoints.texts() == {"step": "again"}
        with pytest.raises(ValueError, match="no step 10, so later ones are kept"):
            checkpoints.forget_after(10)
    assert names(tmp_path) == ["11", "2", "9"]


def test_saving_a_step_again_keeps_it(copy):
    with Checkpoints(copy) as checkpoints:
        checkpoints.save(small(8), {"step": "again"})
        assert checkpoints.texts() == {"step": "8"}


@pytest.fixture
def hold(monkeypatch):
    """Saves are not finished before this event is set."""
    event, write = threading.Event(), digests.write
    monkeypatch.setattr(digests, "write", lambda folder: event.wait(60) and write(folder))
    yield event
    event.set()


def test_buffers_may_be_given_away_as_soon_as_save_returns(tmp_path):
    """What is written is what they held, whatever takes their memory afterwards."""
    update = jax.jit(lambda tree: jax.tree.map(lambda leaf: -leaf, tree), donate_argnums=0)
    params = update({str(index): jnp.arange(2**17) + index for index in range(7)})
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(TrainState(jnp.asarray(3, jnp.int32), params, ()), {})
        after = update(params)
        for leaf in jax.tree.leaves(params):
            leaf.delete()
        for _ in range(5):
            after = update(jax.block_until_ready(after))
        restored = checkpoints.restore(TrainState(jnp.asarray(0, jnp.int32), after, ()))
    for index in range(7):
        np.testing.assert_array_equal(restored.params[str(index)], -(np.arange(2**17) + index))


def test_save_returns_before_anything_counts(tmp_path, hold):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(small(3), {})
    assert not names(tmp_path) or re.fullmatch(r"\.saving-3-[0-9]+", *names(tmp_path))
    assert Checkpoints(tmp_path).latest is None
    hold.set()
    assert checkpoints.latest == 3
    checkpoints.close()
    assert names(tmp_path) == ["3"]


@pytest.mark.parametrize(
    ("params", "words"),
    [
        ({"../x": jnp.ones(2)}, r"'\.\./x'\] cannot be saved: a key must not"),
        ({"a.b": jnp.ones(2)}, r"'a\.b'\] cannot be saved"),
        ({"a/b": jnp.ones(2)}, r"'a/b'\] cannot be saved"),
        ({"": jnp.ones(2)}, r"''\] cannot be saved"),
        ({"a": {"b-c": jnp.ones(2)}, "a-b": {"c": jnp.ones(2)}}, "another leaf has the same name, 'params-a-b-c'"),
    ],
)
def test_d10_names_that_are_none_or_meet_are_refused(params, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        Checkpoints(tmp_path / "checkpoints").save(TrainState(jnp.int32(1), params, ()), {})
    assert names(tmp_path) == ["checkpoints"]
    assert names(tmp_path / "checkpoints") == []


def test_an_array_without_numbers_is_refused_before_orbax_does(tmp_path):
    with pytest.raises(ValueError, match="cannot save empty arrays: opt_state-count"):
        Checkpoints(tmp_path).save(small(0), {})


def test_d11_another_model_is_refused_by_name_and_shape(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(at(fresh(hidden_dim=7), 1), {})
        with pytest.raises(ValueError, match=r"feed_forward-hidden-bias\S*: saved float32\[7\], wanted float32\[5\]"):
            checkpoints.restore(fresh(hidden_dim=5))


@pytest.mark.parametrize(
    ("params", "words"),
    [
        ({"kernel": jnp.ones((5, 3), jnp.bfloat16)}, r"kernel: saved float32\[5, 3\], wanted bfloat16\[5, 3\]"),
        (
            {"bias": jnp.ones(3)},
            r"bias: saved missing, wanted float32\[3\]\n  .*kernel: saved float32.*, wanted missing",
        ),
    ],
)
def test_d11_another_dtype_or_structure_is_refused(params, words, two_steps):
    with pytest.raises(ValueError, match=words):
        Checkpoints(two_steps).restore(dataclasses.replace(small(8), params=params))


def spread(state, devices, **split):
    """A state on so many devices; the leaves of `split` are divided, the others are copied."""
    mesh = Mesh(np.array(jax.devices()[:devices]), ("fsdp",))

    def put(path, leaf):
        name = path[-1].key if isinstance(path[-1], jax.tree_util.DictKey) else ""
        return jax.device_put(leaf, NamedSharding(mesh, PartitionSpec(*split.get(name, ()))))

    return jax.tree_util.tree_map_with_path(put, state)


def test_d12_a_run_goes_on_on_another_number_of_devices(tmp_path):
    numbers = np.random.default_rng(0)
    params = {name: numbers.normal(size=(16, 24)).astype(np.float32) for name in ("rows", "columns", "copied")}
    params["half"] = jnp.asarray(params["rows"], jnp.bfloat16)
    layout = {"rows": ("fsdp",), "columns": (None, "fsdp"), "half": ("fsdp",)}
    state = jax.tree.map(jnp.asarray, TrainState(np.int32(0), params, (np.float32(3),)))
    states = [state, spread(state, 8, **layout), spread(state, 2, **layout), spread(state, 8), state]
    with Checkpoints(tmp_path) as checkpoints:
        for step, (before, after) in enumerate(itertools.pairwise(states), 1):
            checkpoints.save(at(before, step), {})
            restored = checkpoints.restore(after)
            assert_same(restored, at(state, step))
            for leaf, like in zip(jax.tree.leaves(restored), jax.tree.leaves(after), strict=True):
                assert leaf.sharding.device_set == like.sharding.device_set
                assert leaf.sharding.is_equivalent_to(like.sharding, leaf.ndim)


def test_a_reader_changes_nothing_in_a_run_that_is_being_trained(copy):
    (copy / ".saving-12-5" / "state").mkdir(parents=True)
    before = {path: path.stat().st_mtime_ns for path in (copy, *copy.rglob("*"))}
    with Checkpoints(copy) as reader:
        assert reader.steps == [4, 8]
        assert_same(reader.restore(small(8)), small(8))
        assert reader.texts() == {"step": "8"}
    assert {path: path.stat().st_mtime_ns for path in (copy, *copy.rglob("*"))} == before


def test_a_step_that_training_removes_while_it_is_read_has_an_error_of_its_own(copy, monkeypatch):
    reader, metadata = Checkpoints(copy), module.ocp.checkpointables_metadata

    def read_before_it_goes(path):
        found = metadata(path)
        shutil.rmtree(path)
        return found

    def read_after_it_went(path):
        shutil.rmtree(path)
        return metadata(path)

    for step, read in ((8, read_before_it_goes), (4, read_after_it_went)):
        monkeypatch.setattr(module.ocp, "checkpointables_metadata", read)
        with pytest.raises(MissingStep, match=re.escape(f"{copy / str(step)} was removed while it was read")):
            reader.restore(small(step))
    with pytest.raises(MissingStep, match="holds no checkpoint"):
        reader.texts()


def test_what_lies_on_one_device_is_bound_to_none(two_steps):
    restored = Checkpoints(two_steps).restore(small(8))
    assert not any(leaf.committed for leaf in jax.tree.leaves(restored))
