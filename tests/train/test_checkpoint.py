"""What is saved is what is restored."""

import jax
import numpy as np
import optax
import pytest
from flax import nnx

from seqattn.models import Transformer, TransformerConfig
from seqattn.nn import BlockConfig
from train.checkpoint import Checkpoints
from train.step import TrainState, start


def fresh(hidden_dim=7, seed=0):
    block = BlockConfig(model_dim=6, hidden_dim=hidden_dim, num_heads=2)
    config = TransformerConfig(vocab_size=13, num_encoder_layers=1, num_decoder_layers=1, block=block)
    return start(Transformer(config, rngs=nnx.Rngs(seed)), optax.adamw(1e-3))[1]


def at(state, step):
    return TrainState(jax.numpy.asarray(step, jax.numpy.int32), state.params, state.opt_state)


def test_a_state_comes_back_bitwise_with_its_texts(tmp_path):
    checkpoints = Checkpoints(tmp_path / "new" / "checkpoints")
    assert checkpoints.latest is None
    saved = at(fresh(seed=3), 5)
    checkpoints.save(saved, {"config": '{"é": 1}', "tokenizer": "words"})
    checkpoints.close()
    again = Checkpoints(tmp_path / "new" / "checkpoints")
    restored = again.restore(fresh())
    assert again.latest == 5
    assert again.texts() == {"config": '{"é": 1}', "tokenizer": "words"}
    assert jax.tree.structure(restored) == jax.tree.structure(saved)
    for before, after in zip(jax.tree.leaves(saved), jax.tree.leaves(restored), strict=True):
        np.testing.assert_array_equal(before, after)
        assert before.dtype == after.dtype


def test_only_the_latest_stay(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in (1, 2, 3):
        checkpoints.save(at(fresh(), step), {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["2", "3"]


def test_a_protected_step_stays_beside_the_latest(tmp_path):
    checkpoints, state = Checkpoints(tmp_path, keep=2), fresh()
    for step, protected in ((1, 1), (2, 1), (3, 1), (4, 3), (5, 3), (6, 3)):
        checkpoints.save(at(state, step), {})
        checkpoints.protect(protected)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["3", "5", "6"]


def test_later_steps_are_forgotten_and_may_be_saved_again(tmp_path):
    checkpoints, states = Checkpoints(tmp_path, keep=5), [fresh(seed=seed) for seed in (0, 1)]
    for step in (2, 9, 11):
        checkpoints.save(at(states[0], step), {"step": str(step)})
    checkpoints.forget_after(9)
    assert checkpoints.latest == 9
    assert checkpoints.texts() == {"step": "9"}
    checkpoints.save(at(states[1], 11), {"step": "again"})
    assert checkpoints.texts() == {"step": "again"}
    assert int(checkpoints.restore(states[0]).step) == 11
    with pytest.raises(ValueError, match="no step 10, so the later ones stay"):
        checkpoints.forget_after(10)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["11", "2", "9"]


def test_saving_a_step_again_keeps_it(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(at(fresh(seed=0), 4), {"config": "first"})
    checkpoints.save(at(fresh(seed=1), 4), {"config": "second"})
    assert checkpoints.texts()["config"] == "first"


def test_d4_a_folder_without_a_commit_file_does_not_count(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(at(fresh(), 4), {})
    checkpoints.close()
    (tmp_path / "9").mkdir()
    assert Checkpoints(tmp_path).latest == 4


def test_d11_another_model_is_refused_by_name_and_shape(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(at(fresh(hidden_dim=7), 1), {})
    with pytest.raises(ValueError, match=r"feed_forward-hidden-bias\S*: saved float32\[7\], wanted float32\[5\]"):
        checkpoints.restore(fresh(hidden_dim=5))
