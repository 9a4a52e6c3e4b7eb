"""The mean of trees is that of NumPy in float64, and a run is read as the mean of its checkpoints."""

import dataclasses
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from train.checkpoints import run
from train.checkpoints.averaging import average
from train.checkpoints.checkpoints import Checkpoints, MissingStep
from train.engine import loop


def tree(seed, dtype=jnp.float32):
    numbers = np.random.default_rng(seed)
    return {
        "layers": [jnp.asarray(numbers.normal(size=(5, 3)), dtype), jnp.asarray(numbers.normal(size=7) * 1e4, dtype)],
        "scale": jnp.asarray(numbers.normal(), dtype),
        "count": jnp.asarray([4, 2], jnp.int32),
    }


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_the_mean_is_numpys_in_the_dtype_of_each_leaf(dtype):
    trees = [tree(seed, dtype) for seed in range(11)]
    mean = average(iter(trees))
    assert jax.tree.structure(mean) == jax.tree.structure(trees[0])
    for leaf, *leaves in zip(jax.tree.leaves(mean), *map(jax.tree.leaves, trees), strict=True):
        assert leaf.dtype == leaves[0].dtype
        wide = np.mean([np.asarray(other, np.float64) for other in leaves], axis=0)
        np.testing.assert_array_equal(leaf, wide.astype(leaf.dtype))


def test_many_small_numbers_beside_a_large_one_are_not_lost():
    trees = [{"a": jnp.full(3, 2.0**25)}, *[{"a": jnp.ones(3)}] * 255]
    np.testing.assert_array_equal(average(trees)["a"], np.float32((2.0**25 + 255) / 256))


def test_float64_and_complex_numbers_keep_their_dtypes():
    with jax.enable_x64(True):
        for value in (np.float64(1) / 3, np.complex128(1 / 3 + 2j)):
            mean = average([{"a": jnp.asarray(value)}, {"a": jnp.asarray(value * 3)}])["a"]
            assert mean.dtype == value.dtype
            np.testing.assert_allclose(mean, 2 * value, rtol=1e-15)


def test_one_tree_comes_back_bitwise():
    only = {"a": jnp.array([-0.0, jnp.nan, jnp.inf, 1e-45]), "b": jnp.array([1, 2])}
    for before, after in zip(jax.tree.leaves(only), jax.tree.leaves(average([only])), strict=True):
        assert np.asarray(before).tobytes() == np.asarray(after).tobytes()


@pytest.mark.parametrize(
    ("trees", "words"),
    [
        ([], "there is no tree to average"),
        ([tree(0), {"layers": []}], "trees of different structures have no mean"),
        ([tree(0), tree(1), tree(2) | {"scale": jnp.ones(2)}], r"scale .* float32\[\] in one tree and float32\[2\]"),
        ([tree(0), tree(1, jnp.bfloat16)], r"layers/0 .* float32\[5, 3\] in one tree and bfloat16\[5, 3\]"),
        (
            [tree(0), tree(1) | {"count": jnp.asarray([4, 3], jnp.int32)}],
            "count has no mean: its dtype is int32 and its values differ",
        ),
    ],
)
def test_what_has_no_mean_is_refused(trees, words):
    with pytest.raises(ValueError, match=words):
        average(trees)


@pytest.fixture(scope="module")
def saved(tiny, tmp_path_factory):
    """A run with checkpoints after 1, 2 and 3 updates, and their states."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    session = loop.prepare(dataclasses.replace(tiny, run=folder, keep_checkpoints=3, evaluate_every=1))
    states = []
    for step in (1, 2, 3):
        params = jax.tree.map(lambda leaf, step=step: leaf * step + jnp.cos(leaf), session.state.params)
        session.state = dataclasses.replace(session.state, step=jnp.asarray(step, jnp.int32), params=params)
        states.append(session.state)
        session.save()
    session.checkpoints.close()
    return folder, states


def parameters(loaded):
    return jax.tree.leaves(loaded.model)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_run_is_read_as_the_mean_of_its_newest_checkpoints(count, saved):
    folder, states = saved
    loaded = run.load(folder, average=count)
    assert loaded.step == 3
    expected = average(state.params for state in states[-count:])
    for leaf, wanted in zip(parameters(loaded), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(leaf, wanted)
    assert (count == 1) == all(map(np.array_equal, parameters(loaded), parameters(run.load(folder))))


def test_what_only_an_interruption_saved_has_no_part_in_a_mean(tiny):
    experiment = dataclasses.replace(tiny, evaluate_every=2, steps=5)
    assert run.regular([1, 2, 3, 4, 5], experiment) == [2, 4, 5]
    assert run.regular([1, 2, 3], experiment) == [2]


def test_only_checkpoints_that_verify_are_averaged(saved, tmp_path):
    folder, states = saved
    copy = shutil.copytree(folder, tmp_path / "copy")
    (copy / "checkpoints" / "2" / "_CHECKPOINT_METADATA").write_bytes(b"")
    expected = average(state.params for state in (states[0], states[2]))
    for leaf, wanted in zip(parameters(run.load(copy, average=2)), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(leaf, wanted)
    with pytest.raises(ValueError, match=r"average \(3\) must be at most 2, the number of checkpoints that"):
        run.load(copy, average=3)
    with pytest.raises(ValueError, match=r"average \(0\) must be an integer of at least 1"):
        run.load(copy, average=0)


def test_a_checkpoint_that_training_removes_meanwhile_is_followed_by_a_newer_one(saved, tmp_path, monkeypatch):
    folder, states = saved
    copy = shutil.copytree(folder, tmp_path / "copy")
    later = copy / "checkpoints" / "3"
    later.rename(tmp_path / "3")
    restore = Checkpoints.restore

    def trained_on(checkpoints, like, step):
        if step == 1:
            shutil.rmtree(copy / "checkpoints" / "1")
            (tmp_path / "3").rename(later)
        return restore(checkpoints, like, step)

    monkeypatch.setattr(Checkpoints, "restore", trained_on)
    loaded = run.load(copy, average=2)
    assert loaded.step == 3
    expected = average(state.params for state in states[1:])
    for leaf, wanted in zip(parameters(loaded), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(leaf, wanted)

    def always_gone(checkpoints, like, step):
        raise MissingStep("gone")

    monkeypatch.setattr(Checkpoints, "restore", always_gone)
    with pytest.raises(MissingStep):
        run.load(copy)


def test_sharded_trees_are_averaged_part_by_part():
    place = NamedSharding(jax.make_mesh((4,), ("fsdp",), devices=jax.devices()[:4]), PartitionSpec("fsdp"))
    trees = [{"kernel": np.random.default_rng(seed).normal(size=(8, 3)).astype(np.float32)} for seed in (0, 1)]
    mean = average(jax.device_put(trees, place))["kernel"]
    assert mean.sharding == place
    np.testing.assert_array_equal(mean, average(trees)["kernel"])


def test_a_run_is_loaded_in_parts(finished):
    place = NamedSharding(jax.make_mesh((2,), ("fsdp",), devices=jax.devices()[:2]), PartitionSpec())
    alone = run.load(finished).model
    spread = run.load(finished, shardings=lambda state: jax.tree.map(lambda _: place, state)).model
    for ours, theirs in zip(jax.tree.leaves(spread), jax.tree.leaves(alone), strict=True):
        assert ours.sharding == place
        np.testing.assert_array_equal(ours, theirs)
