"""What a run begins with: parameters, tokenizer and vectors from elsewhere, and what stays as it began."""

import dataclasses
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from seqattn.models import CaptionerConfig, Patches, Seq2SeqConfig, TransformerConfig
from seqattn.nn import BlockConfig
from tests.huggingface_folders import write
from train.checkpoints import run
from train.data.tokenizer import ByteLevelBPE, Characters, Tokenizer
from train.devices.parallel import Sharded
from train.engine import loop, start
from train.hub import exported, origin
from train.update import step
from train.update.initializers import Uniform, Xavier, redraw
from train.update.parameters import paths


def flat(model):
    """The parameters by path."""
    state = nnx.to_flat_state(nnx.state(model, nnx.Param))
    return {"/".join(map(str, path)): np.asarray(leaf[...]) for path, leaf in state}


def fresh(experiment, tokenizer, labels=("a", "b")):
    begun = None if experiment.start_from is None else origin.read(experiment.start_from)
    return start.fresh(experiment, start.given(experiment, tokenizer, labels=labels, origin=begun))


def resolved(experiment, tokenizer, labels=("a", "b")):
    return run.resolve(experiment, tokenizer, labels)


@pytest.fixture(scope="module")
def plain(tiny):
    """The tiny experiment with a tokenizer of its letters."""
    tokenizer = Tokenizer.train(Characters(), ["abc d"])
    return run.resolve(tiny, tokenizer, ()), tokenizer


def test_start_from_takes_all_but_the_head(tagging, masked):
    given = run.load(masked)
    experiment = resolved(tagging, given.tokenizer)
    before, alone = flat(given.model), flat(run.build(experiment.model, seed=experiment.seed))
    after = flat(fresh(experiment, given.tokenizer))
    assert after.keys() == alone.keys()
    assert {name for name in after if name.startswith("head/")} == {"head/output/kernel", "head/output/bias"}
    for name, value in after.items():
        np.testing.assert_array_equal(value, (alone if name.startswith("head/") else before)[name], err_msg=name)
    assert not np.array_equal(alone["embedding/table"], before["embedding/table"])


def test_a_model_of_other_shapes_is_refused_before_anything_is_written(tagging, masked, tmp_path):
    block = dataclasses.replace(tagging.model.block, hidden_dim=19)
    model = dataclasses.replace(tagging.model, block=block)
    words = (
        rf"--start-from: the model of {masked} is another one than that of the run: "
        r"stack/blocks/0/feed_forward/hidden/bias is \[17\] there and \[19\] here, "
        r"stack/blocks/0/feed_forward/hidden/kernel is \[12, 17\] there and \[12, 19\] here, "
        r"stack/blocks/0/feed_forward/output/kernel is \[17, 12\] there and \[19, 12\] here"
    )
    with pytest.raises(ValueError, match=f"^{words}$"):
        loop.train(dataclasses.replace(tagging, model=model, run=tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_a_model_of_other_parts_is_refused(tiny, masked):
    tokenizer = run.load(masked).tokenizer
    experiment = resolved(dataclasses.replace(tiny, start_from=masked), tokenizer)
    with pytest.raises(ValueError, match=r"decoder/0/.* is missing there and \[12, 12\] here, and \d+ others"):
        fresh(experiment, tokenizer)


@pytest.fixture(scope="module")
def labelled(tagging, masked, tmp_path_factory):
    """An exported tagger of the labels "a" and "b"."""
    given = run.load(masked)
    model = run.build(resolved(tagging, given.tokenizer).model, seed=9)
    folder = tmp_path_factory.mktemp("exported") / "tagger"
    exported.save(exported.Exported(folder, model, given.tokenizer, ("a", "b"), "Tagging", 3), {})
    return folder


@pytest.mark.parametrize("labels", [("a", "b"), ("a", "c")])
def test_a_head_for_the_same_labels_is_taken_and_another_is_drawn(labels, tagging, labelled, caplog):
    begun = origin.read(labelled)
    experiment = resolved(dataclasses.replace(tagging, start_from=labelled), begun.tokenizer)
    before, alone = flat(begun.load(None)), flat(run.build(experiment.model, seed=experiment.seed))
    after, same = flat(fresh(experiment, begun.tokenizer, labels)), labels == begun.labels
    for name, value in after.items():
        expected = before if same or not name.startswith("head/") else alone
        np.testing.assert_array_equal(value, expected[name], err_msg=name)
    assert not np.array_equal(alone["head/output/kernel"], before["head/output/kernel"])
    assert ("those of the head, which is drawn" in caplog.text) == (not same)


@pytest.mark.parametrize("kind", ["run", "exported", "transformers"])
def test_a_mesh_takes_a_model_in_parts(kind, tagging, masked, labelled, language, tmp_path):
    start_from = {"run": masked, "exported": labelled}.get(kind, Path(f"hf:{tmp_path / 'hf'}"))
    if kind == "transformers":
        write(tmp_path / "hf", "gpt2", n_embd=16, n_head=2)
    begun = origin.read(start_from)
    experiment = dataclasses.replace(tagging, start_from=start_from, model=begun.config)
    placed = Sharded(fsdp=4, tensor=2).spread(None)
    given = start.given(experiment, language.tokenizer, labels=begun.labels, origin=begun, shardings=placed.shardings)
    whole = [path for path, (value, _) in given.items() if isinstance(value, jax.Array) and len(value.devices()) == 1]
    assert not whole
    state = placed.draw(lambda given: step.start(start.fresh(experiment, given), optax.sgd(0.1))[1], given)
    assert {len(leaf.devices()) for leaf in jax.tree.leaves(state)} == {8}
    before = flat(begun.load(None))
    assert before.keys() == given.keys()
    for path, value in zip(jax.tree.leaves(paths(state.params)), jax.tree.leaves(state.params), strict=True):
        assert np.asarray(value).tobytes() == before[path].tobytes(), path


def test_start_from_takes_the_tokenizer_over(tagging, masked, tmp_path, monkeypatch):
    few = dataclasses.replace(tagging.task, train_examples=1).load()["train"]
    monkeypatch.setattr(type(tagging.task), "load", lambda _: dict.fromkeys(("train", "validation", "test"), few))
    session = loop.prepare(dataclasses.replace(tagging, run=tmp_path / "run"))
    given = run.load(masked).tokenizer
    own = Tokenizer.train(tagging.tokenizer, session.objective.texts(session.splits["train"]))
    assert session.objective.tokenizer.to_json() == given.to_json() != own.to_json()


def test_what_is_frozen_keeps_every_bit_through_an_interruption_and_the_head_learns(tagged, masked):
    begun, after = flat(run.load(masked).model), flat(run.load(tagged).model)
    for name, value in after.items():
        if not name.startswith("head/"):
            assert value.tobytes() == begun[name].tobytes(), name
    assert run.load(tagged).step == 4
    assert np.abs(after["head/output/bias"]).max() > 0.05


def test_word_vectors_are_what_the_model_sees(plain, tmp_path, caplog):
    experiment, tokenizer = plain
    dim = experiment.model.block.model_dim
    vectors = np.random.default_rng(0).normal(size=(2, dim)).astype(np.float32)
    lines = [" ".join([word, *map(repr, row.tolist())]) for word, row in zip(["c", "q"], vectors, strict=True)]
    (tmp_path / "vectors.txt").write_text("\n".join(lines))
    model = fresh(dataclasses.replace(experiment, word_vectors=tmp_path / "vectors.txt"), tokenizer)
    alone = run.build(experiment.model, seed=experiment.seed)
    (index,) = tokenizer.encode("c")
    np.testing.assert_allclose(model.embedding(jnp.array([index]))[0], vectors[0], rtol=1e-6)
    same = np.array(model.embedding.table[...] == alone.embedding.table[...]).all(axis=1)
    assert [number for number, equal in enumerate(same) if not equal] == [index]
    assert f"vectors of 1 of {tokenizer.vocab_size} tokens" in caplog.text


def test_word_vectors_of_a_word_reach_the_token_that_begins_it(tiny, tmp_path):
    tokenizer = Tokenizer.train(ByteLevelBPE(vocab_size=262), ["to to to to"])  # merges to "to" and " to"
    experiment = run.resolve(tiny, tokenizer, ())
    (tmp_path / "vectors.txt").write_text("to" + " 1.5" * experiment.model.block.model_dim)
    model = fresh(dataclasses.replace(experiment, word_vectors=tmp_path / "vectors.txt"), tokenizer)
    ids = jnp.array(tokenizer.encode("to to"))
    assert len(set(ids.tolist())) == 2
    np.testing.assert_allclose(model.embedding(ids), 1.5, rtol=1e-6)


def test_an_initializer_draws_every_matrix_anew(plain):
    experiment, tokenizer = plain
    rule = Uniform(0.01)
    alone = run.build(experiment.model, seed=experiment.seed)
    drawn, expected = (
        flat(model)
        for model in (
            fresh(dataclasses.replace(experiment, initializer=rule), tokenizer),
            redraw(alone, rule, seed=experiment.seed),
        )
    )
    for name, value in flat(alone).items():
        np.testing.assert_array_equal(drawn[name], expected[name])
        assert (value.ndim < 2) == np.array_equal(drawn[name], value)
        assert value.ndim < 2 or 0.005 < np.abs(drawn[name]).max() <= 0.01
    other = flat(fresh(dataclasses.replace(experiment, initializer=rule, seed=experiment.seed + 1), tokenizer))
    assert not np.array_equal(other["embedding/table"], drawn["embedding/table"])


def test_vectors_stay_when_the_rest_is_drawn_anew(plain, tmp_path):
    experiment, tokenizer = plain
    dim = experiment.model.block.model_dim
    (tmp_path / "vectors.txt").write_text("a" + " 2" * dim)
    both = dataclasses.replace(experiment, word_vectors=tmp_path / "vectors.txt", initializer=Uniform(0.01))
    table = np.asarray(fresh(both, tokenizer).embedding.table[...])
    (index,) = tokenizer.encode("a")
    np.testing.assert_allclose(table[index], 2 / math.sqrt(dim), rtol=1e-6)
    assert np.abs(np.delete(table, index, axis=0)).max() <= 0.01


WEIGHTS = [Xavier("normal"), None]


@pytest.mark.parametrize("initializer", WEIGHTS, ids=["xavier", "default"])
def test_e5_a_mesh_draws_the_bits_of_one_device_in_parts(initializer, plain, tmp_path):
    experiment, tokenizer = plain
    cells = Seq2SeqConfig(tokenizer.vocab_size, embedding_dim=16, hidden_dim=16)
    block = dataclasses.replace(experiment.model.block, model_dim=16, hidden_dim=64, num_heads=2)
    model = cells if initializer is None else dataclasses.replace(experiment.model, vocab_size=128, block=block)
    (tmp_path / "vectors.txt").write_text("c" + " 1.5" * 16)
    vectors = tmp_path / "vectors.txt" if model is cells else None
    experiment = dataclasses.replace(experiment, model=model, initializer=initializer, word_vectors=vectors)
    given = start.given(experiment, tokenizer)
    assert bool(given) == (model is cells)

    def make(given):
        return step.start(start.fresh(experiment, given), optax.adam(0.1), average=True)[1]

    placed = Sharded(fsdp=4, tensor=2).spread(None)
    state, where = placed.draw(make, given), placed.shardings(jax.eval_shape(make, given))
    alone = make(given)
    for path, value, other in zip(*map(jax.tree.leaves, (paths(alone), alone, state)), strict=True):
        assert np.asarray(value).tobytes() == np.asarray(other).tobytes(), path
    assert {len(leaf.devices()) for leaf in jax.tree.leaves(state)} == {8}
    held = sum(shard.nbytes for shard in (leaf.addressable_data(0) for leaf in jax.tree.leaves(state)))
    memory = jax.jit(make, out_shardings=where).lower(given).compile().memory_analysis()
    assert memory.output_size_in_bytes <= held + 64 * len(jax.tree.leaves(state))  # with the addresses of the arrays
    if model is not cells:  # the kernels of cells are not split by `tensor`, and orthogonal ones are drawn whole
        assert held < sum(leaf.nbytes for leaf in jax.tree.leaves(alone)) / 6
        # An array that each device drew whole would take more, even one matrix of this model.
        whole = jax.jit(make).lower(given).compile().memory_analysis()
        assert memory.temp_size_in_bytes < 0.3 * whole.temp_size_in_bytes


WRITER = TransformerConfig(0, 0, 1, BlockConfig(model_dim=8, hidden_dim=5, num_heads=2))


@pytest.mark.parametrize("decoder", [WRITER, Seq2SeqConfig(0, embedding_dim=8, hidden_dim=6)])
def test_word_vectors_reach_what_reads_pictures(decoder, plain, tmp_path):
    experiment, tokenizer = plain
    model = CaptionerConfig(tokenizer.vocab_size, Patches((3, 2)), decoder)
    (tmp_path / "vectors.txt").write_text("c" + " 1.5" * 8)
    begun = fresh(dataclasses.replace(experiment, model=model, word_vectors=tmp_path / "vectors.txt"), tokenizer)
    np.testing.assert_allclose(begun.decoder.embedding(jnp.array(tokenizer.encode("c"))), 1.5, rtol=1e-6)


def test_word_vectors_reach_the_table_of_the_source(plain, tmp_path):
    experiment, tokenizer = plain
    model = dataclasses.replace(experiment.model, share_embeddings=False)
    (tmp_path / "vectors.txt").write_text("c" + " 1.5" * model.block.model_dim)
    begun = fresh(dataclasses.replace(experiment, model=model, word_vectors=tmp_path / "vectors.txt"), tokenizer)
    for table in (begun.embedding, begun.source_embedding):
        np.testing.assert_allclose(table(jnp.array(tokenizer.encode("c"))), 1.5, rtol=1e-6)
